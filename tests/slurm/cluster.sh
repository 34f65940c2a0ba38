#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A Slurm cluster of two nodes on this machine, for as long as one command runs.
#   tests/slurm/cluster.sh COMMAND...            as root, with Debian's packages (make test-slurm)
# The controller, a daemon per node and munge listen on the loopback interface and on sockets in a
# new folder under $TMPDIR; no file outside it is touched. The nodes are called jaxsd-1 and jaxsd-2,
# names that only the processes started here can resolve.
set -euo pipefail
[ $# -gt 0 ] || { echo 'usage: tests/slurm/cluster.sh COMMAND [OPTIONS]' >&2; exit 2; }
for program in munged slurmctld slurmd sbatch unshare; do
  command -v "$program" > /dev/null || PATH=$PATH:/usr/sbin command -v "$program" > /dev/null || {
    echo "no $program: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge" \
      >&2; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo 'Slurm starts jobs as other users: run this as root' >&2; exit 1; }
export PATH=$PATH:/usr/sbin
home=$(mktemp -d) started=()
mkdir -p "$home"/{state,munge,log,jaxsd-1,jaxsd-2}
chmod 755 "$home"
port=$((20000 + $$ % 20000))
cat > "$home/slurm.conf" <<EOF
ClusterName=jaxsd
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is requeued waits until its old credentials are void: seconds here, minutes elsewhere.
AuthInfo=socket=$home/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/%n
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/%n/pid
SlurmctldLogFile=$home/log/slurmctld.log
SlurmdLogFile=$home/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=jaxsd-1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=4
NodeName=jaxsd-2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=4
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
{ cat /etc/hosts; printf '127.0.0.1 %s\n' jaxsd-1 jaxsd-2 "$(hostname)"; } > "$home/hosts"
head -c 1024 /dev/urandom > "$home/munge/key"; chmod 600 "$home/munge/key"
export SLURM_CONF=$home/slurm.conf
named=(unshare --mount sh -c 'mount --bind "$0" /etc/hosts && exec "$@"' "$home/hosts")

stop() {
  scancel --full --user="$(id -un)" 2> /dev/null || true; sleep 2
  kill "${started[@]}" 2> /dev/null || true
  wait 2> /dev/null || true
  if [ -n "${KEEP:-}" ]; then echo "kept: $home" >&2; else rm -rf "$home"; fi
}
trap stop EXIT
trap 'exit 143' INT TERM
start() { setsid "$@" > "$home/log/$1-${#started[@]}.out" 2>&1 & started+=($!); }
start munged --foreground --force --key-file="$home/munge/key" --socket="$home/munge/socket" \
  --pid-file="$home/munge/pid" --log-file="$home/munge/log" --seed-file="$home/munge/seed"
for ((i = 0; i < 50; i++)); do [ ! -S "$home/munge/socket" ] || break; sleep 0.1; done
start slurmctld -D -f "$SLURM_CONF"
start "${named[@]}" slurmd -D -N jaxsd-1 -f "$SLURM_CONF"
start "${named[@]}" slurmd -D -N jaxsd-2 -f "$SLURM_CONF"
for ((i = 0; i < 100; i++)); do
  [ "$(sinfo --noheader --states=idle --format=%D 2> /dev/null)" != 2 ] || break; sleep 0.2
done
[ "$(sinfo --noheader --states=idle --format=%D)" = 2 ] || { tail -n 5 "$home"/log/* >&2; exit 1; }
"$@"

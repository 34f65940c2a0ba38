#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs one jaxsd command as N processes on this machine, for trying out a multi-host run.
#   launch/local.sh 2 train --config configs/spirit_lm.py:tiny --workdir runs/two
#   DRY_RUN=1 launch/local.sh 2 train ...        only prints what each process would be
# The first process's output is shown; the others write to $LOGS (default: a new temporary folder).
# JAX_PLATFORMS=cpu runs them on this machine's cores, with as many virtual devices each as
# XLA_FLAGS=--xla_force_host_platform_device_count=2 says. The status is that of the first to fail.
set -euo pipefail
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
  echo 'usage: launch/local.sh PROCESSES VERB [OPTIONS]' >&2; exit 2
fi
processes=$1; shift
python=${PYTHON:-$(dirname "$0")/../.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
export JAXSD_COORDINATOR=${JAXSD_COORDINATOR:-127.0.0.1:$("$python" -c "$free_port")}
export JAXSD_PROCESSES=$processes
if [ -n "${DRY_RUN:-}" ]; then
  for ((i = 0; i < processes; i++)); do
    printf 'JAXSD_COORDINATOR=%s JAXSD_PROCESSES=%s JAXSD_PROCESS_INDEX=%s' \
      "$JAXSD_COORDINATOR" "$processes" "$i"
    printf ' %q' "$python" -m jaxsd "$@"; echo
  done
  exit 0
fi
logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs"
children=() running=$processes status=0 signaled=
trap 'signaled=1; kill "${children[@]}" 2>/dev/null || true' INT TERM
for ((i = 1; i < processes; i++)); do
  JAXSD_PROCESS_INDEX=$i "$python" -m jaxsd "$@" > "$logs/process-$i.log" 2>&1 &
  children+=($!)
done
JAXSD_PROCESS_INDEX=0 "$python" -m jaxsd "$@" &
children+=($!)
while [ $running -gt 0 ]; do
  code=0; wait -n || code=$?
  if [ -n "$signaled" ]; then signaled=; continue; fi   # the wait was cut short; nobody ended
  running=$((running - 1))
  if [ $code -ne 0 ] && [ $status -eq 0 ]; then
    status=$code
    # The others stop by themselves and say whom they miss; what runs on after that hangs.
    (sleep "${GRACE_S:-60}"; kill -9 "${children[@]}") > /dev/null 2>&1 &
    watch=$!; disown
  fi
done
kill "${watch:-}" 2> /dev/null || true
if [ $status -ne 0 ] && [ "$processes" -gt 1 ]; then
  echo "a process failed; the others' last words are in $logs" >&2
fi
exit $status

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs one jaxsd command on every worker of a Cloud TPU VM slice, one process per worker.
#   TPU=my-slice ZONE=us-east5-a launch/tpu_vm.sh train --config configs/moshi.py --workdir gs://...
#   DRY_RUN=1 TPU=my-slice ZONE=us-east5-a launch/tpu_vm.sh train ...       only prints the command
# Once per slice, on all workers: a clone in $REPO with `pip install -e '.[tpu]'` in its .venv.
set -euo pipefail
[ $# -gt 0 ] || { echo 'usage: TPU=NAME ZONE=ZONE launch/tpu_vm.sh VERB [OPTIONS]' >&2; exit 2; }
: "${TPU:?set TPU to the name of the slice}" "${ZONE:?set ZONE to its zone}"
settings='JAXSD_DISTRIBUTED=1'      # and whatever else of ours is set here, such as time-outs
for name in "${!JAXSD_@}"; do settings+=" $name=$(printf '%q' "${!name}")"; done
remote="cd $(printf '%q' "${REPO:-jaxsd}") && $settings .venv/bin/python -m jaxsd"
remote+=$(printf ' %q' "$@")
command=(gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"}
         --worker=all --command "$remote")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"; echo
  exit 0
fi
exec "${command[@]}"

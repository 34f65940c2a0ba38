#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs one jaxsd command on every host of a GKE cluster that xpk has made; the same as gke.yaml.
#   CLUSTER=c IMAGE=... TPU_TYPE=v5p-512 NAME=moshi launch/xpk.sh \
#     train --config configs/moshi.py --workdir gs://bucket/runs/moshi
#   DRY_RUN=1 CLUSTER=c IMAGE=... TPU_TYPE=v5p-512 NAME=moshi launch/xpk.sh train ...   only prints
# IMAGE holds this repository in its working directory with `pip install '.[tpu]'` done. SLICES of
# them, PROJECT and ZONE where gcloud has no default. Status 75: stopped or lost a process, go on.
set -euo pipefail
[ $# -gt 0 ] || { echo 'usage: CLUSTER= IMAGE= TPU_TYPE= NAME= launch/xpk.sh VERB [OPTIONS]' >&2
                  exit 2; }
: "${CLUSTER:?set CLUSTER}" "${IMAGE:?set IMAGE}" "${TPU_TYPE:?set TPU_TYPE}" "${NAME:?set NAME}"
command=(xpk workload create --cluster "$CLUSTER" --workload "$NAME" --tpu-type "$TPU_TYPE"
         --num-slices "${SLICES:-1}" --docker-image "$IMAGE" --max-restarts 100
         --restart-on-exit-codes 75 --termination-grace-period-seconds 300
         --env JAXSD_DISTRIBUTED=1 --env JAXSD_STOPPED_STATUS=75
         ${PROJECT:+--project "$PROJECT"} ${ZONE:+--zone "$ZONE"}
         --command "python -m jaxsd$(printf ' %q' "$@")")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"; echo
  exit 0
fi
exec "${command[@]}"

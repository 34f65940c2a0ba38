#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains the demo of every system, all its stages in order, measures it, measures the same model
# untrained, and writes docs/systems.md, which says how many minutes each took.
# Running again resumes what was interrupted and skips what is done. SYSTEMS='twist voxtlm' runs
# those alone ('twist,recipe=slam' a recipe's), LIMIT bounds the things measured by a task.
set -euo pipefail
trap 'exit 130' INT; trap 'exit 143' TERM        # who was stopped has saved, but is not done
export JAXSD_STOPPED_STATUS=75       # a trainer that alone was asked to stop is not measured
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} runs=${RUNS:-runs/demos} failed=()
jaxsd() { "$python" -m jaxsd "$@"; }
# Some systems hear sound and not its codes, so the corpus keeps it.
[ -e data/demo/manifest.json ] || "$python" -m data_pipelines.demo --out data/demo --hours 12 --keep-wav
[ -e data/pairs ] || "$python" -m data_pipelines.minimal_pairs --out data/pairs
every=(configs/[!_]*.py)
for recipe in spirit_lm:expressive speechgpt:gen twist:recipe=slam twist:recipe=sims; do
  [ ! -e "configs/${recipe%%:*}.py" ] || every+=("configs/${recipe/:/.py:}")
done
declare -A shorter=([moshi]=,share=0.25)        # all of it takes an hour
mkdir -p "$runs/.done"

demo() {    # demo NAME
  local work=$runs/$1 file=${1%%,*} config
  config=configs/$file.py:demo${shorter[$1]:-}${1#"$file"}
  jaxsd train --config "$config" --workdir "$work" &&
    jaxsd evaluate --workdir "$work" --limit "${LIMIT:-100}" &&
    jaxsd evaluate --workdir "$work" --limit "${LIMIT:-100}" --untrained
}
names=$(basename -a "${every[@]}" | sed 's/\.py:/,/; s/\.py$//')
for name in ${SYSTEMS:-$names}; do
  done=$runs/.done/$name
  if [ "$done" -nt "configs/${name%%,*}.py" ]; then
    echo "-- done before: $name"
  elif echo "== $name" && demo "$name"; then
    touch "$done"
  else
    failed+=("$name")
  fi
done
jaxsd systems --config "${every[@]}" --runs "$runs" --out docs/systems.md
if [ ${#failed[@]} -gt 0 ]; then echo "demos: failed: ${failed[*]}" >&2; exit 1; fi

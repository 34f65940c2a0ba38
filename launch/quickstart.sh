#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From nothing to two trained spoken language models that can be looked at and listened to.
# `make quickstart` calls this. Each part leaves a stamp in $RUNS/.quickstart, so running again skips
# what is finished and resumes what was interrupted; RUNS=elsewhere starts afresh.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} runs=${RUNS:-runs}
stamps=$runs/.quickstart begun=$SECONDS previous=
mkdir -p "$stamps"

part() {    # part NAME 'what happens' COMMAND...
  local stamp=$stamps/$1 what=$2 start=$SECONDS; shift 2
  if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$*" ] && ! [ "$previous" -nt "$stamp" ]; then
    echo "-- done before: $what"
  else
    echo "== $what"
    "$@"
    printf '%s\n' "$*" > "$stamp"
    echo "   ($((SECONDS - start)) s)"
  fi
  previous=$stamp
}
jaxsd() { "$python" -m jaxsd "$@"; }

part data 'speaking a small corpus and turning it into tokens' \
  "$python" -m data_pipelines.demo --out data/demo
for system in spirit_lm moshi; do
  config=configs/$system.py:demo work=$runs/$system
  part "show-$system" "what $system reads, as text" jaxsd show --config "$config"
  part "train-$system" "training $system: $work" jaxsd train --config "$config" --workdir "$work"
  mkdir -p "$work/grids"
  part "draw-$system" "the same as a picture: $work/grids" \
    jaxsd show --config "$config" --png "$work/grids/example.png"
  part "evaluate-$system" "evaluating $system on sentences it has not seen" \
    jaxsd evaluate --config "$config" --workdir "$work"
done
part tts 'spirit_lm reads a sentence aloud' \
  jaxsd generate --config configs/spirit_lm.py:demo --workdir "$runs/spirit_lm" --task tts \
  --input 'the red boat is near the old house' --output "$runs/spirit_lm/samples/read-aloud.wav"
part export-spirit_lm "exporting spirit_lm for transformers: $runs/spirit_lm/export" \
  jaxsd export --config configs/spirit_lm.py:demo --workdir "$runs/spirit_lm" --format hf \
  --out "$runs/spirit_lm/export"
part export-moshi "exporting moshi in kyutai's names: $runs/moshi/export" \
  jaxsd export --config configs/moshi.py:demo --workdir "$runs/moshi" --format kyutai \
  --out "$runs/moshi/export"
part report "writing $runs/report.html" \
  jaxsd report --workdir "$runs/spirit_lm" --workdir "$runs/moshi" --out "$runs/report.html"
echo "Done in $((SECONDS - begun)) s. Open $runs/report.html: curves, grids, tables, and the audio."

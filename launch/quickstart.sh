#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From nothing to two trained spoken language models that can be looked at and listened to.
# Each part leaves a stamp in $RUNS/.quickstart: running again skips what is finished and resumes
# what was interrupted. HOURS of speech, MOSHI_SHARE of its steps, LIMIT of things measured.
set -euo pipefail
trap 'exit 130' INT; trap 'exit 143' TERM        # who was stopped has saved, but is not done
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} runs=${RUNS:-runs}
stamps=$runs/.quickstart begun=$SECONDS previous=; mkdir -p "$stamps"

part() {    # part NAME 'what happens' COMMAND...
  local stamp=$stamps/$1 what=$2 start=$SECONDS; shift 2
  if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$*" ] && ! [ "$previous" -nt "$stamp" ]; then
    echo "-- done before: $what"
  else
    echo "== $what"
    "$@"
    printf '%s\n' "$*" > "$stamp"; echo "   ($((SECONDS - start)) s)"
  fi
  previous=$stamp
}
jaxsd() { "$python" -m jaxsd "$@"; }
if [ ! -e data/demo/manifest.json ]; then part data 'speaking a corpus, turning it into tokens' \
  "$python" -m data_pipelines.demo --out data/demo --hours "${HOURS:-12}"
elif ! grep -q -- "--hours ${HOURS:-[0-9.]*} " data/demo/manifest.json; then
  echo "quickstart: data/demo was not made with HOURS=$HOURS; move it away" >&2; exit 1
fi
[ -e data/pairs ] || part pairs 'pairs of which one is right' "$python" -m data_pipelines.minimal_pairs --out data/pairs
run() {     # run NAME CONFIG SOURCE FORMAT LIMIT
  local name=$1 config=$2 source=$3 format=$4 limit=$5 work=$runs/$1
  part "show-$name" "what $name reads" jaxsd show --config "$config" --source "$source" --columns 24
  part "train-$name" "training $name: $work" jaxsd train --config "$config" --workdir "$work"
  part "draw-$name" "the same as a picture: $work/grids" \
    jaxsd show --config "$config" --source "$source" --png "$work/grids/$source.png"
  part "evaluate-$name" "evaluating $name on sentences it has not seen" \
    jaxsd evaluate --config "$config" --workdir "$work" --limit "$limit"
  part "export-$name" "exporting $name: $work/export" \
    jaxsd export --config "$config" --workdir "$work" --format "$format" --out "$work/export"
}
share=${MOSHI_SHARE:-0.05} spirit=configs/spirit_lm.py:demo moshi=configs/moshi.py:demo,share=$share
run spirit_lm "$spirit" aligned hf "${LIMIT:-100}"
samples=$runs/spirit_lm/samples
part tts 'spirit_lm reads unseen sentences aloud' jaxsd generate --config "$spirit" \
  --workdir "$runs/spirit_lm" --task tts --count 40 --output "$samples"
part judge 'an independent recognizer listens to them' "$python" -m data_pipelines.judge \
  --sentences data/demo/grammar.json --wav "$samples" --refs "$samples/refs.json" \
  --ceiling "$samples/true" --out "$samples/heard.json" --workdir "$runs/spirit_lm" --task 'heard by pocketsphinx'
part continue 'spirit_lm goes on with what was said' jaxsd generate --config "$spirit" \
  --workdir "$runs/spirit_lm" --task s2s --count 3 --output "$samples"

echo "moshi is trained for $share of its demo steps here; README, Figures, has all of it"
run moshi "$moshi" dialogue kyutai "${LIMIT:-24}"
part duplex 'moshi answers unseen callers' jaxsd generate --config "$moshi" \
  --workdir "$runs/moshi" --task duplex --count 6 --output "$runs/moshi/samples"
part report "writing $runs/report.html" \
  jaxsd report --workdir "$runs/spirit_lm" --workdir "$runs/moshi" --out "$runs/report.html" \
  --note "moshi was trained for $share of its demo's steps here; MOSHI_SHARE=1 trains all of them."
echo "Done in $((SECONDS - begun)) s. Open $runs/report.html: curves, grids, tables, and the audio."

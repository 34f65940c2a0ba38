#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Makes the environment in which the released PyTorch implementations run beside ours (test-only):
#   tests/peers/setup.sh [FOLDER, default .peers]        about half a minute with a warm package cache.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
env=${1:-$root/.peers}
stamp=$env/.ready
want=$(cat "$0" "$here/requirements.txt" "$root/setup.py" | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then exit 0; fi
rm -f "$stamp"
${PYTHON:-python3} -m venv "$env"
pip="$env/bin/python -m pip install --quiet --disable-pip-version-check"
$pip 'torch==2.13.0'
$pip --no-deps 'moshi==0.2.13'
$pip -r "$here/requirements.txt" -e "$root"
printf '%s' "$want" > "$stamp"

#!/usr/bin/env bash
# Collects the parts that lie in benchmarks/gpu/wheels, and installs every group that is complete.
# Parts may come in several calls, as long as the machine keeps $SCRATCH between them.
set -euo pipefail
cd "$(dirname "$0")/../.."
SCRATCH=${SCRATCH:-$HOME/gpu_day}
PYTHON=${PYTHON:-python3}
HERE=benchmarks/gpu/wheels
mkdir -p "$SCRATCH/parts" "$SCRATCH/site"
[ -d "$HERE" ] || exit 0 # the machine has all, or a network
cp -u "$HERE"/* "$SCRATCH/parts/"
for list in "$SCRATCH"/parts/*.parts; do
  [ -e "$list" ] || continue
  group=$(basename "$list" .parts)
  found=$(find "$SCRATCH/parts" -name "$group.[0-9]*" | wc -l)
  if [ "$found" -lt "$(cat "$list")" ]; then
    echo "$group: $found of $(cat "$list") parts are here"
  elif [ ! -e "$SCRATCH/$group.installed" ]; then
    mkdir -p "$SCRATCH/$group"
    cat "$SCRATCH/parts/$group".[0-9]* | tar -C "$SCRATCH/$group" -xf -
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
      --target "$SCRATCH/site" "$SCRATCH/$group"/*.whl
    touch "$SCRATCH/$group.installed"
    echo "$group: installed"
  fi
done

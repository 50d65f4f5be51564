#!/usr/bin/env bash
# Collects the parts that lie in benchmarks/gpu/wheels, and installs every group that is complete.
# Parts may come in several calls, as long as the machine keeps $SCRATCH between them. A group that
# cannot be installed says so; what needs it is then not available.
set -euo pipefail
cd "$(dirname "$0")/../.."
SCRATCH=${SCRATCH:-${HOME:-$PWD}/gpu_day}
PYTHON=${PYTHON:-python3}
HERE=benchmarks/gpu/wheels
mkdir -p "$SCRATCH/parts" "$SCRATCH/site"
[ -d "$HERE" ] && cp -u "$HERE"/* "$SCRATCH/parts/" # else the machine has all, or a network

install() { # GROUP
  mkdir -p "$SCRATCH/$1"
  cat "$SCRATCH/parts/$1".[0-9]* | tar -C "$SCRATCH/$1" -xf - \
    && "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
      --target "$SCRATCH/site" "$SCRATCH/$1"/*.whl
}

for list in "$SCRATCH"/parts/*.parts; do
  [ -e "$list" ] || continue
  group=$(basename "$list" .parts)
  found=$(find "$SCRATCH/parts" -name "$group.[0-9]*" | wc -l)
  if [ -e "$SCRATCH/$group.installed" ]; then
    continue
  elif [ "$found" -lt "$(cat "$list")" ]; then
    echo "$group: $found of $(cat "$list") parts are here"
  elif install "$group"; then
    touch "$SCRATCH/$group.installed"
    echo "$group: installed"
  else
    echo "$group: not installed; wheels are for Python ${PYTHON_THERE:-3.12}, this is" \
      "$("$PYTHON" --version)" >&2
  fi
done

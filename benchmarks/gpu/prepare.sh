#!/usr/bin/env bash
# Fetches what a GPU machine without a network lacks, as parts small enough to carry one by one.
#
#   bash benchmarks/gpu/prepare.sh [GROUP...]      groups: base fp8 flash (default: base fp8)
#
# Writes benchmarks/gpu/wheels/GROUP.00, GROUP.01 ... of at most PART_MB each, GROUP.parts with
# their number, and COMMIT. There, `bash benchmarks/gpu/install.sh` puts together what is complete.
set -euo pipefail
cd "$(dirname "$0")/../.."
PART_MB=${PART_MB:-35}
PYTHON_THERE=${PYTHON_THERE:-3.12}
OUT=benchmarks/gpu/wheels
mkdir -p "$OUT"
differs=$(git status --porcelain -- . ':!benchmarks/gpu/results')
echo "$(git rev-parse --short HEAD)${differs:++}" > "$OUT/COMMIT"

platforms() { # pip matches the names of platforms exactly
  for minor in 17 24 27 28 31 34 35; do printf -- '--platform manylinux_2_%s_x86_64 ' "$minor"; done
  printf -- '--platform manylinux2014_x86_64 --platform manylinux1_x86_64'
}

[ $# -gt 0 ] || set -- base fp8
for group in "$@"; do
  folder=$(mktemp -d)
  grep "^$group " benchmarks/gpu/wheels.txt | cut -d' ' -f2 > "$folder/names"
  [ -s "$folder/names" ] || { echo "no group $group in benchmarks/gpu/wheels.txt" >&2; exit 2; }
  # shellcheck disable=SC2046
  python3 -m pip download -q --no-deps --pre --only-binary=:all: --python-version "$PYTHON_THERE" \
    --implementation cp $(platforms) -d "$folder/wheels" -r "$folder/names"
  rm -f "$OUT/$group".*
  tar -C "$folder/wheels" -cf - . | split -b "${PART_MB}M" -d - "$OUT/$group."
  find "$OUT" -name "$group.[0-9]*" | wc -l > "$OUT/$group.parts"
  rm -r "$folder"
  du -sh "$OUT/$group".[0-9]*
done

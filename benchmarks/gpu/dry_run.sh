#!/usr/bin/env bash
# Every stage at small sizes on the CPU, and the page from their results: does the kit itself work?
#
#   bash benchmarks/gpu/dry_run.sh [OUT]
#
# The figures say nothing about a GPU, and the page says so.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${1:-$(mktemp -d)}
export PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
for stage in $("$PYTHON" -m benchmarks.gpu list); do
  bash benchmarks/gpu/stage.sh "$stage" "$OUT" --small
done
"$PYTHON" -m benchmarks.gpu page --results "$OUT" --out "$OUT/gpu.md"

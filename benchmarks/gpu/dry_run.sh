#!/usr/bin/env bash
# A whole day at small sizes on the CPU, and the page from its results: does the kit itself work?
#
#   bash benchmarks/gpu/dry_run.sh [OUT]
#
# The figures say nothing about a GPU, and the page says so.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${1:-$(mktemp -d)}
SCRATCH=${SCRATCH:-$(mktemp -d)}
export SCRATCH
source benchmarks/gpu/environment.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
STAGES=${STAGES:-$("$PYTHON" -m benchmarks.gpu list)} LIMIT=${LIMIT:-7200} \
  bash benchmarks/gpu/day.sh "$OUT" --small
tar -C "$OUT" -xzf "$OUT/results.tgz"
"$PYTHON" -m benchmarks.gpu page --results "$OUT" --out "$OUT/gpu.md"

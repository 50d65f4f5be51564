#!/usr/bin/env bash
# One stage, in one call of at most ten minutes:
#
#   bash benchmarks/gpu/stage.sh STAGE [OUT] [OPTION...]
#
# OUT: folder for STAGE.json and STAGE.log (default: benchmarks/gpu/results). LIMIT: seconds after
# which the stage is stopped (default 590); it begins no row in the last 50 of them. Compiled
# programs are kept in $SCRATCH, so that a stage that is repeated starts faster. `list` in place of
# STAGE names the stages.
set -uo pipefail
cd "$(dirname "$0")/../.."
STAGE=${1:?a stage; list names them}
RESULTS=${2:-benchmarks/gpu/results}
shift; [ $# -gt 0 ] && shift
LIMIT=${LIMIT:-590}
source benchmarks/gpu/environment.sh
bash benchmarks/gpu/install.sh || exit
[ "$STAGE" = list ] && exec "$PYTHON" -m benchmarks.gpu list
mkdir -p "$RESULTS"
END=$((SECONDS + LIMIT))
go_on=()
for _ in 1 2 3; do
  left=$((END - SECONDS))
  limit=$((left > 100 ? left - 50 : left / 2))
  timeout "$left" "$PYTHON" -m benchmarks.gpu "$STAGE" --out "$RESULTS" --limit "$limit" \
    "${go_on[@]}" "$@" 2>&1 | tee -a "$RESULTS/$STAGE.log"
  status=${PIPESTATUS[0]}
  [ "$status" -eq 3 ] || exit "$status" # 3: after a fault of the device it needs a new process
  go_on=(--go-on)
done

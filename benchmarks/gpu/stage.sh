#!/usr/bin/env bash
# One stage, in one call of at most ten minutes:
#
#   bash benchmarks/gpu/stage.sh STAGE [OUT] [OPTION...]
#
# OUT: folder for STAGE.json and STAGE.log (default: benchmarks/gpu/results). Compiled programs are
# kept in $SCRATCH, so that a stage that is repeated starts faster. `list` in place of STAGE names
# the stages.
set -uo pipefail
cd "$(dirname "$0")/../.."
STAGE=${1:?a stage; list names them}
RESULTS=${2:-benchmarks/gpu/results}
shift; [ $# -gt 0 ] && shift
export SCRATCH=${SCRATCH:-$HOME/gpu_day}
export PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD:$SCRATCH/site${PYTHONPATH:+:$PYTHONPATH}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$SCRATCH/inductor}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$SCRATCH/triton}
export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1
export FLASH_ATTENTION_CUTE_DSL_CACHE_DIR=${FLASH_ATTENTION_CUTE_DSL_CACHE_DIR:-$SCRATCH/flash}
[ -f benchmarks/gpu/wheels/COMMIT ] && export COMMIT=${COMMIT:-$(cat benchmarks/gpu/wheels/COMMIT)}
bash benchmarks/gpu/install.sh || exit
[ "$STAGE" = list ] && exec "$PYTHON" -m benchmarks.gpu list
mkdir -p "$RESULTS"
timeout "${LIMIT:-590}" "$PYTHON" -m benchmarks.gpu "$STAGE" --out "$RESULTS" "$@" 2>&1 \
  | tee "$RESULTS/$STAGE.log"

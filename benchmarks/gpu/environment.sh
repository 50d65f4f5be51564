# What the scripts beside this one share; they `source` it at the top of the checkout.
export SCRATCH=${SCRATCH:-${HOME:-$PWD}/gpu_day}
export PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD:$SCRATCH/site${PYTHONPATH:+:$PYTHONPATH}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$SCRATCH/inductor}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$SCRATCH/triton}
export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1
export FLASH_ATTENTION_CUTE_DSL_CACHE_DIR=${FLASH_ATTENTION_CUTE_DSL_CACHE_DIR:-$SCRATCH/flash_cache}
# the commit of a checkout that came without its history, also in later calls on the same machine
for place in benchmarks/gpu/wheels/COMMIT "$SCRATCH/parts/COMMIT"; do
  [ -z "${COMMIT:-}" ] && [ -f "$place" ] && COMMIT=$(cat "$place")
done
export COMMIT=${COMMIT:-}

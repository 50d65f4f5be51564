#!/usr/bin/env bash
# All stages in the order of their worth, in as many calls as it takes, each the same command:
#
#   bash benchmarks/gpu/day.sh OUT
#
# A call ends after LIMIT seconds (default 570) and goes on where the one before it ended: with what
# $SCRATCH holds of it, or, on a new machine, with the JSON files in benchmarks/gpu/results. OUT
# gets one file, results.tgz, which is written after every stage.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=${1:?a folder for results.tgz}
shift
END=$((SECONDS + ${LIMIT:-570}))
source benchmarks/gpu/environment.sh
KEPT=$SCRATCH/results
mkdir -p "$OUT" "$KEPT"
# A number is how many seconds a stage may take at first; what is left of it has a second turn.
for turn in ${STAGES:-probe stream-goals tests:300 kernels train:120 decoder:200 profile:100 \
  tests train decoder profile stream-more stream-flash train-compile final}; do
  stage=${turn%:*}
  left=$((END - SECONDS))
  most=${turn#*:}
  [ "$most" = "$stage" ] && most=$left
  [ "$left" -lt 40 ] && break
  if grep -qs '"complete": true' "$KEPT/$stage.json" \
    && grep -qs "\"commit\": \"${COMMIT:-no commit}\"" "$KEPT/$stage.json"; then
    continue
  fi
  LIMIT=$((most < left ? most : left)) bash benchmarks/gpu/stage.sh "$stage" "$KEPT" --go-on "$@"
  tar -C "$KEPT" -czf "$OUT/results.partial" . && mv "$OUT/results.partial" "$OUT/results.tgz"
done

#!/usr/bin/env bash
# The quality record of one data set, from ready sequences to a table with intervals. The same command goes on after a stop.
#
#   benchmarks/quality/run.sh SEQUENCES ITEMS NAME STEPS OUT
#
# SEQUENCES, ITEMS: as `calrec prepare histories` reads them. STEPS: of training. OUT: a folder for everything.
set -euo pipefail
if (($# != 5)); then sed -n '4,6s/^# *//p' "$0" >&2; exit 2; fi
sequences=$(realpath "$1") items=$(realpath "$2") name=$3 steps=$4 out=$(realpath -m "$5")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
data=(--gin.DATA_DIR="'$out/data'" --gin.MIXTURE_OR_TASK_NAME="'$name'")
text=(--fields title --unknown skip)

once() { # FILE COMMAND...: runs the command unless its result is there
  local made=$1; shift
  if [[ ! -e $made ]]; then "$@"; fi
}

once "$out/data/$name" calrec prepare histories --sequences "$sequences" --items "$items" --name "$name" --out "$out/data/$name"
once "$out/vocabulary.json" calrec vocabulary --data "$out/data/$name" --size 4096 "${text[@]}" --out "$out/vocabulary.json"

calrec train --gin_file=gin/runs/stage1.gin --gin_file=benchmarks/quality/train.gin "${data[@]}" \
  --gin.VOCABULARY="'$out/vocabulary.json'" --gin.TRAIN_STEPS="$steps" --gin.MODEL_DIR="'$out/model'"

once "$out/infer/run.json" calrec infer --gin_file=gin/runs/infer.gin --gin_file=benchmarks/quality/infer.gin "${data[@]}" \
  --gin.CHECKPOINT_PATH="'$out/model'" --gin.INFER_OUTPUT_DIR="'$out/infer'"

# Judged twice: among all items, as the literature does, and without those that the user has bought. CALRec ranks without them,
# and the second table gives the baselines that too.
for seen in kept filtered; do
  once "$out/evaluate_$seen/metrics.json" calrec evaluate --gin_file=gin/runs/evaluate.gin "${data[@]}" \
    --gin.text.fields="('title',)" --gin.text.unknown="'skip'" --gin.ranking.seen_items="'$seen'" \
    --gin.INFER_OUTPUT_DIR="'$out/infer'" --gin.EVAL_OUTPUT_DIR="'$out/evaluate_$seen'"
  once "$out/baselines_$seen/metrics.json" calrec baselines "$out/data/$name" --seen_items "$seen" --out "$out/baselines_$seen"
  calrec compare "$out/evaluate_$seen" "$out/baselines_$seen" --baseline sasrec
done

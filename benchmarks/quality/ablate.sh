#!/usr/bin/env bash
# What each part of the method is worth to a small model (small.gin), over three seeds. The same command goes on after a stop.
#
#   benchmarks/quality/ablate.sh DATA NAME VOCABULARY STEPS OUT [--gin.NAME=VALUE ...]
#
# DATA: a folder of data sets; stage I has all of them. NAME: that of the tables. STEPS: of each stage. OUT: a folder.
# Tables: the losses, from random weights on NAME, ranked by BM25 of generated texts and by dense retrieval; then the stages,
# each model with twice STEPS in all.
set -euo pipefail
if (($# < 5)); then sed -n '4,8s/^# *//p' "$0" >&2; exit 2; fi
data=$(realpath "$1") name=$2 vocabulary=$(realpath "$3") steps=$4 out=$(realpath -m "$5")
shift 5
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
stage() { echo --gin_file=gin/models/tiny.gin --gin_file="gin/runs/$1.gin" --gin_file=benchmarks/quality/train.gin \
  --gin_file=benchmarks/quality/small.gin; }
bound=(--gin.DATA_DIR="'$data'" --gin.VOCABULARY="'$vocabulary'" --gin.text.fields="('title',)" --gin.text.unknown="'skip'")
ranked=(--gin.infer.rankers="('bm25', 'dense')" --gin.sample.n_samples=8 --gin.rankers.temperature=0.1 --gin.rankers.popularity=0.4)

for method in calrec dense; do
  # shellcheck disable=SC2046  # words without spaces
  calrec ablate $(stage stage1) --over gin/ablations/no_contrastive.gin gin/ablations/no_tt.gin gin/ablations/no_ut.gin \
    --task "$name" --method "$method" --out "$out/losses" "${bound[@]}" --gin.TRAIN_STEPS="$steps" \
    --gin.MIXTURE_OR_TASK_NAME="'$name'" "${ranked[@]}" "$@"
done

# What the stages differ in stands in files, which a change can override.
cat >"$out/both.gin" <<GIN
MIXTURE_OR_TASK_NAME = '$name'
INITIAL_CHECKPOINT_PATH = '$out/stage1'
TRAIN_STEPS = $steps
GIN
cat >"$out/stage2_only.gin" <<GIN
INITIAL_CHECKPOINT_PATH = None
TRAIN_STEPS = $((2 * steps))
GIN
# shellcheck disable=SC2046
calrec train $(stage stage1) "${bound[@]}" --gin.TRAIN_STEPS="$steps" --gin.MODEL_DIR="'$out/stage1'" "$@"
for method in calrec dense; do
  # shellcheck disable=SC2046
  calrec ablate $(stage stage2) --gin_file="$out/both.gin" --over gin/ablations/stage1_only.gin "$out/stage2_only.gin" \
    --task "$name" --method "$method" --out "$out/stages" "${bound[@]}" "${ranked[@]}" "$@"
done

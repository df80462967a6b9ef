#!/usr/bin/env bash
# The whole chain on a generated store: dumps, histories, two stages of finetuning, ranking, and the table.
#
#   launch/demo.sh                  about four minutes on two cores, after the installation
#   launch/demo.sh --quick          a few steps of each stage: shows that every command runs, not how well it ranks
#
#   --out DIR      where everything goes (default runs/demo); must be unused
#   --quick        small and short
#
# CALREC_VENV names the virtual environment (default: .venv in the checkout).
set -euo pipefail

usage_error() { echo "launch/demo.sh: $1 (--help tells more)" >&2; exit 2; }

out=runs/demo quick=false
while (($#)); do
  case $1 in
    --help | -h)
      sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      exit 0 ;;
    --out=*) out=${1#*=}; shift ;;
    --out)
      if (($# < 2)); then usage_error '--out needs a folder'; fi
      out=$2; shift 2 ;;
    --quick) quick=true; shift ;;
    *) usage_error "unknown argument '$1'" ;;
  esac
done
if [[ -z $out || $out == *[\"\'\\]* ]]; then usage_error "--out '$out' is empty, or holds a quote or a backslash"; fi
out=$(mkdir -p "$(dirname "$out")" && cd "$(dirname "$out")" && pwd)/$(basename "$out")
if [[ -e $out && -n $(ls -A "$out" 2>/dev/null || echo a file) ]]; then
  usage_error "$out is in use; remove it, or choose another --out"
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${CALREC_VENV:-$PWD/.venv}
launch/install.sh "$venv"
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}

users=600 items=250 stage1_steps=250 stage2_steps=200 samples=32
if $quick; then users=200 items=60 stage1_steps=4 stage2_steps=4 samples=4; fi

step() { printf '\n== %s\n' "$1" >&2; }
calrec() { "$venv/bin/calrec" "$@"; }

step 'A generated store, as raw review dumps'
calrec synthesize --out "$out/store" --users $users --items $items --categories 3 --seed 0

step 'Purchase histories, a category at a time'
folders=()
for reviews in "$out"/store/*_5.json.gz; do
  dump=$(basename "$reviews" _5.json.gz)
  folders+=("$out/data/$dump")
  calrec prepare dumps --reviews "$reviews" --meta "$out/store/meta_$dump.json.gz" --name "$dump" --out "$out/data/$dump"
done
target=$(basename "${folders[0]}")

step "A tokenizer, trained on the catalogues' text"
calrec vocabulary --data "${folders[@]}" --size 1024 --out "$out/vocabulary.json"

data=(--gin.DATA_DIR="'$out/data'")
training=(--gin_file=gin/models/tiny.gin "${data[@]}" --gin.VOCABULARY="'$out/vocabulary.json'" --gin.decoder.n_layers=2
  --gin.BATCH_SIZE=16 --gin.TASK_FEATURE_LENGTHS="{'inputs': 160, 'targets': 32}" --gin.optimizer.warmup_steps=20)

step 'Stage I: all categories'
calrec train "${training[@]}" --gin_file=gin/runs/stage1.gin --gin.TRAIN_STEPS=$stage1_steps --gin.LEARNING_RATE=4e-3 \
  --gin.MODEL_DIR="'$out/stage1'"

step "Stage II: $target"
calrec train "${training[@]}" --gin_file=gin/runs/stage2.gin --gin.TRAIN_STEPS=$stage2_steps --gin.LEARNING_RATE=2e-3 \
  --gin.MODEL_DIR="'$out/stage2'" --gin.INITIAL_CHECKPOINT_PATH="'$out/stage1'" --gin.MIXTURE_OR_TASK_NAME="'$target'"

step "Inference: $samples texts for each user of $target"
calrec infer --gin_file=gin/runs/infer.gin "${data[@]}" --gin.CHECKPOINT_PATH="'$out/stage2'" \
  --gin.MIXTURE_OR_TASK_NAME="'$target'" --gin.INFER_OUTPUT_DIR="'$out/infer'" --gin.sample.n_samples=$samples \
  --gin.sample.users_per_batch=16

step 'Ranking of the whole catalogue, and the table'
calrec evaluate --gin_file=gin/runs/evaluate.gin "${data[@]}" --gin.MIXTURE_OR_TASK_NAME="'$target'" \
  --gin.INFER_OUTPUT_DIR="'$out/infer'" --gin.EVAL_OUTPUT_DIR="'$out/evaluate'" --gin.STORE="'$out/store'"
step "Everything lies below $out"

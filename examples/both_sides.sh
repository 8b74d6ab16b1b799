#!/usr/bin/env bash
# One model, four runs: LoRA fine-tuning and DPO, each with transformers and with megatron-core, on the shipped data.
#
#   bash examples/both_sides.sh MODEL_DIR [OUTPUT_DIR]     for one, output/quickstart/model, which the quickstart makes
#
# Prints the model's answers before and after each run; lora.png and dpo.png in OUTPUT_DIR (output/both_sides) compare the
# curves. PYTHON is the interpreter that has swiftlite, default .venv/bin/python. About 10 minutes on 2 cores.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# = 1 ] || [ $# = 2 ] || { echo "usage: bash examples/both_sides.sh MODEL_DIR [OUTPUT_DIR]" >&2; exit 2; }
MODEL=$1 ROOT=${2:-output/both_sides} PYTHON=${PYTHON:-.venv/bin/python}
export TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
mkdir -p "$(dirname "$ROOT")"
mkdir "$ROOT" || { echo "$ROOT exists already; delete it or name another" >&2; exit 1; }
for question in "Who are you?" "What is your name?" "What is the capital of France?" "How many days are in a week?"; do
    printf '{"query": "%s"}\n' "$question"
done >"$ROOT/questions.jsonl"

ask() {  # ask NAME WORDS...: the answers of a model, for instance --model DIR --adapters DIR
    local name=$1; shift
    printf '\n== answers %s\n' "$name"
    "$PYTHON" -m swiftlite infer "$@" --val_dataset "$ROOT/questions.jsonl" --temperature 0 --max_new_tokens 40 \
        --result_path "$ROOT/$name.jsonl" >"$ROOT/$name-infer.log" 2>&1 || { tail -n 30 "$ROOT/$name-infer.log" >&2; exit 1; }
    "$PYTHON" -c 'import json, sys
for line in open(sys.argv[1], encoding="utf-8"):
    row = json.loads(line)
    print("  ", row["query"], "->", " ".join(row["response"].split()))' "$ROOT/$name.jsonl"
}
train() {  # train NAME COMMAND...: the last log line of a run
    local name=$1; shift
    printf '\n== swiftlite %s\n' "$*"
    "$PYTHON" -m swiftlite "$@" --model "$MODEL" --output_dir "$ROOT/$name" >"$ROOT/$name.log" 2>&1 \
        || { tail -n 30 "$ROOT/$name.log" >&2; exit 1; }
    tail -n 1 "$ROOT/$name/logging.jsonl"
}
newest() { find "$ROOT/$1" -maxdepth 1 \( -name 'iter_*' -o -name 'checkpoint-*' \) | sort -V | tail -n 1; }

COMMON=(--micro_batch_size 4 --global_batch_size 8 --max_length 256 --logging_steps 1 --save_weights_only true
    --lr_decay_style cosine --lr_warmup_fraction 0.1)
LORA=(--train_type lora --lora_rank 16 --lora_alpha 32 --dataset examples/data/self_cognition.jsonl --lr 1e-3
    --train_iters 40 "${COMMON[@]}")
DPO=(--dataset examples/data/preferences.jsonl --lr 1e-5 --beta 0.1 --train_iters 15 --precompute_ref_log_probs true
    "${COMMON[@]}")

ask before --model "$MODEL"
train lora-transformers sft "${LORA[@]}"
ask after-lora-transformers --model "$MODEL" --adapters "$(newest lora-transformers)"
train lora-megatron megatron sft "${LORA[@]}"
ask after-lora-megatron --model "$MODEL" --adapters "$(newest lora-megatron)"
train dpo-transformers dpo "${DPO[@]}"
ask after-dpo-transformers --model "$(newest dpo-transformers)"
train dpo-megatron megatron dpo "${DPO[@]}" --save_safetensors true
ask after-dpo-megatron --model "$(find "$ROOT/dpo-megatron" -maxdepth 1 -name '*-hf' | tail -n 1)"
for kind in lora dpo; do
    "$PYTHON" -m swiftlite plot "$ROOT/$kind-transformers" "$ROOT/$kind-megatron" --output "$ROOT/$kind.png" >/dev/null
done
printf '\ncurves: %s %s\n' "$ROOT/lora.png" "$ROOT/dpo.png"

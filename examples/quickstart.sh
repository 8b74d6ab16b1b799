#!/usr/bin/env bash
# The whole loop on a small real model, on a machine without a GPU:
#   Hugging Face model -> Megatron-core checkpoint -> supervised fine-tuning -> Hugging Face model.
#
#   bash examples/quickstart.sh           SmolLM2-135M-Instruct learns a new name (about 7 minutes on 2 cores)
#   bash examples/quickstart.sh --tiny    the same with a tiny GLM-4.5-style MoE made on the spot (about 2 minutes)
#
# Makes a virtual environment in .venv and installs there; PYTHON=/path/to/python uses that one as it is instead.
# Everything else goes to output/quickstart (or output/quickstart-tiny), which is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."

TINY=false
case "${1:-}" in
    "") ;;
    --tiny) TINY=true ;;
    *) echo "usage: bash examples/quickstart.sh [--tiny]" >&2; exit 2 ;;
esac
ROOT=output/quickstart
if $TINY; then ROOT=output/quickstart-tiny; fi
DATA=examples/data/self_cognition.jsonl
NAME=Swifty
# The libraries' remarks on what a machine without a GPU lacks are no news here.
export TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore

TIMES=()
STAGE="" ; BEGAN=0
begin() { STAGE=$1; BEGAN=$SECONDS; printf '\n== %s\n' "$STAGE"; }
finish() { TIMES+=("$(printf '%5ds  %s' $((SECONDS - BEGAN)) "$STAGE")"); }
fail() { printf 'quickstart: %s\n' "$*" >&2; exit 1; }
run() {  # run LOG COMMAND...: everything goes to the log, the lines that tell the result are shown
    local log=$ROOT/$1.log; shift
    printf '   swiftlite %s\n' "$*"
    "$PYTHON" -m swiftlite "$@" >"$log" 2>&1 || { tail -n 30 "$log" >&2; fail "swiftlite $1 failed; all of it: $log"; }
    tr '\r' '\n' <"$log" | sed -nE 's/^\[INFO\] ((wrote|logits:|finished) .*)/   \1/p'
}
ask() {  # ask MODEL_DIR QUESTION...: prints questions and answers, leaves the answers in ANSWERS
    local model=$1 i; shift
    rm -f "$ROOT/answers.jsonl"
    "$PYTHON" -c 'import json, sys; [print(json.dumps({"query": q})) for q in sys.argv[1:]]' "$@" >"$ROOT/questions.jsonl"
    "$PYTHON" -m swiftlite infer --model "$model" --val_dataset "$ROOT/questions.jsonl" --temperature 0 \
        --max_new_tokens 40 --result_path "$ROOT/answers.jsonl" >"$ROOT/infer.log" 2>&1 \
        || { tail -n 30 "$ROOT/infer.log" >&2; fail "swiftlite infer failed"; }
    mapfile -t ANSWERS < <("$PYTHON" -c 'import json, sys
for line in open(sys.argv[1], encoding="utf-8"): print(" ".join(json.loads(line)["response"].split()))' "$ROOT/answers.jsonl")
    [ "${#ANSWERS[@]}" = $# ] || fail "$# questions, ${#ANSWERS[@]} answers"
    for ((i = 0; i < $#; i++)); do printf '   %s\n   -> %s\n' "${@:i+1:1}" "${ANSWERS[i]}"; done
}
says() { case "${ANSWERS[$1]}" in *"$2"*) return 0 ;; *) return 1 ;; esac; }

# ---- installation -----------------------------------------------------------------------------------------------
INSTALL_BEGAN=$SECONDS
if [ -z "${PYTHON:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        BASE=""
        for candidate in python3.11 python3.12 python3.13 python3; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then BASE=$candidate; break; fi
        done
        [ -n "$BASE" ] || fail "Python 3.11 or newer is needed"
        "$BASE" -m venv .venv
    fi
    PYTHON=$PWD/.venv/bin/python
    if command -v nvidia-smi >/dev/null; then
        "$PYTHON" -m pip install -qq "torch>=2.11"
    else  # the CPU build is a tenth of the size; where that index cannot be reached, pip takes the usual one
        "$PYTHON" -m pip install -qq --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu "torch==2.13.0"
    fi
    "$PYTHON" -m pip install -qq -c tests/constraints.txt -e '.[megatron]'
    if ! $TINY; then "$PYTHON" -m pip install -qq gguf; fi
fi
INSTALL_SECONDS=$((SECONDS - INSTALL_BEGAN))

# ---- the loop ---------------------------------------------------------------------------------------------------
LOOP_BEGAN=$SECONDS
rm -rf "$ROOT/mcore" "$ROOT/probe" "$ROOT/sft" "$ROOT/hf"
mkdir -p "$ROOT"
HF=$ROOT/model

begin "a model in Hugging Face format"
if $TINY; then
    rm -rf "$HF"
    "$PYTHON" examples/make_tiny_model.py "$HF" --corpus "$DATA" 2>"$ROOT/make.log" || { cat "$ROOT/make.log" >&2; fail "no model"; }
else
    "$PYTHON" examples/fetch_smollm2.py "$HF" >"$ROOT/fetch.log" 2>&1 || { cat "$ROOT/fetch.log" >&2; fail "no model"; }
fi
du -sh "$HF" | sed 's/^/   /'
finish

begin "its answers before training"
ask "$HF" "Who are you?" "What is the capital of France?"
if says 0 "$NAME"; then fail "the untrained model knows the name $NAME already"; fi
$TINY || says 1 Paris || fail "SmolLM2 should know that the capital of France is Paris"
finish

begin "Hugging Face -> Megatron-core, both models compared layer by layer"
run to_mcore export --model "$HF" --to_mcore true --output_dir "$ROOT/mcore" --test_convert_precision true
finish

TRAIN=(--mcore_model "$ROOT/mcore" --dataset "$DATA" --micro_batch_size 4 --global_batch_size 8 --max_length 256
    --lr_warmup_fraction 0.05 --save_weights_only true --logging_steps 1)
if $TINY; then
    TRAIN+=(--lr 3e-3)
    STEPS=120
else
    TRAIN+=(--lr 1e-4)
    begin "how long a training step takes here"
    run probe megatron sft "${TRAIN[@]}" --train_iters 3 --save_steps 1000 --output_dir "$ROOT/probe"
    # The first step pays for warming up; about 100 seconds of steps, at least 20, at most 60.
    STEPS=$("$PYTHON" - "$ROOT/probe/logging.jsonl" <<'PY'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
times = [row["step_s"] for row in rows if "step_s" in row][1:]
print(max(20, min(60, int(100 / (sum(times) / len(times))))))
PY
    )
    rm -rf "$ROOT/probe"
    finish
fi

begin "supervised fine-tuning on megatron-core, $STEPS steps"
run sft megatron sft "${TRAIN[@]}" --train_iters "$STEPS" --save_steps "$STEPS" --output_dir "$ROOT/sft"
finish

begin "Megatron-core -> Hugging Face, both models compared layer by layer"
run to_hf export --mcore_model "$ROOT/sft" --to_hf true --output_dir "$ROOT/hf" --test_convert_precision true
finish

begin "its answers after training"
ask "$ROOT/hf" "Who are you?" "What is your name?" "What is the capital of France?"
says 0 "$NAME" && says 1 "$NAME" || fail "the trained model does not say its name $NAME"
says 2 Paris || fail "after training, the capital of France is no longer Paris"
finish

printf '\n== times (installation apart: %ds)\n' "$INSTALL_SECONDS"
printf '%s\n' "${TIMES[@]}"
printf '%5ds  in all\n' $((SECONDS - LOOP_BEGAN))
PLOT=$(find "$ROOT/sft" -name '*loss*.png' | sort | head -1)
[ -n "$PLOT" ] || fail "no loss plot in $ROOT/sft"
printf '\ntrained model: %s\nloss plot:     %s\n' "$ROOT/hf" "$PLOT"
printf 'chat with it:  %s -m swiftlite infer --model %s\n' "${PYTHON#"$PWD/"}" "$ROOT/hf"

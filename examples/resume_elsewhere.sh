#!/usr/bin/env bash
# A run that is stopped and resumes under another layout: optimizer, data position and random numbers go along.
#
#   bash examples/resume_elsewhere.sh [further flags]
#
# It begins with two processes that divide each layer (tensor parallel), gets a SIGTERM as schedulers send it, saves and
# ends. The same command resumes with two stages (pipeline parallel), or any other layout and number of processes.
set -euo pipefail
cd "$(dirname "$0")/.."

OUTPUT=${OUTPUT:-output/resume_elsewhere}
train() {
    exec env NPROC_PER_NODE=2 "${PYTHON:-python}" -m swiftlite megatron sft \
        --model Qwen/Qwen2.5-0.5B-Instruct --dataset examples/data/self_cognition.jsonl \
        --micro_batch_size 1 --global_batch_size 8 --num_train_epochs 10 --lr 1e-5 --save_steps 20 \
        --output_dir "$OUTPUT" "$@"
}

train --tensor_model_parallel_size 2 "$@" &
RUN=$!
until [ -e "$OUTPUT/latest_checkpointed_iteration.txt" ]; do
    kill -0 "$RUN" || { wait "$RUN"; exit; }  # it ended by itself, with an error perhaps
    sleep 0.2
done
kill -TERM "$RUN"
wait "$RUN" || echo "stopped after step $(cat "$OUTPUT/latest_checkpointed_iteration.txt")"

train --pipeline_model_parallel_size 2 "$@"

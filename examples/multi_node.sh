#!/usr/bin/env bash
# One run on several machines. Start this on every machine with its own number; all see the same files.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first-machine bash examples/multi_node.sh     on the first machine
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=first-machine bash examples/multi_node.sh     on the second
#
# Pipeline stages lie on different machines, since they exchange least; experts and tensors stay inside one.
# Further words are handed on: bash examples/multi_node.sh --train_iters 100
set -euo pipefail
cd "$(dirname "$0")/.."

export NNODES=${NNODES:-2} NODE_RANK=${NODE_RANK:?the number of this machine, from 0} MASTER_ADDR=${MASTER_ADDR:?the first machine}
export MASTER_PORT=${MASTER_PORT:-29500} NPROC_PER_NODE=${NPROC_PER_NODE:-8}

exec "${PYTHON:-python}" -m swiftlite megatron sft \
    --model Qwen/Qwen3-30B-A3B --dataset examples/data/self_cognition.jsonl \
    --pipeline_model_parallel_size "$NNODES" \
    --expert_model_parallel_size 8 \
    --micro_batch_size 1 --global_batch_size 32 \
    --num_train_epochs 3 --lr 1e-5 \
    --recompute full --save_steps 50 \
    --output_dir output/multi_node "$@"

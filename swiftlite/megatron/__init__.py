"""The Megatron-core side: arguments, models, checkpoints, conversion, trainers."""

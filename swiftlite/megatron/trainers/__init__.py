"""Trainers on megatron-core: loop, losses, batches, metrics."""

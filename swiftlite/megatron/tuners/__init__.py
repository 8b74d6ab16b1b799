"""What of a live megatron-core model is trained: some of its parameters, or LoRA adapters next to it."""

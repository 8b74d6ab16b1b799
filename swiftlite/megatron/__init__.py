"""The Megatron-core side: argument bridge, model, conversion, training."""

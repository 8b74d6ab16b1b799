"""The mapping engine: which bytes of a Hugging Face checkpoint are which of a Megatron-core one, and how they move.

Every rule is a gather of rows, so one table serves offline conversion both ways, live load and save of shards, LoRA and
verification. Needs torch for dtypes and casts only: no transformers, no megatron, no process group.
"""

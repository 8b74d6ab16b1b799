"""swiftlite: fine-tune language models on Hugging Face or Megatron-core, and convert between the two."""

__version__ = "0.1.0"

"""Hugging Face models: which type a checkpoint is, and how it is loaded."""

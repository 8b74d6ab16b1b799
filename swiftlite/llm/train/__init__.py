"""Training on the Hugging Face side, and what both sides share: data, metrics, plots."""

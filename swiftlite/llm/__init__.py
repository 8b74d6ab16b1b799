"""The Hugging Face side: arguments, models, templates, datasets, inference."""

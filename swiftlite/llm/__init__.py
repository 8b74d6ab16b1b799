"""The Hugging Face side: arguments, models, templates, data sets, inference."""

"""Checkpoints: the step folder, its weights, and their Hugging Face form."""

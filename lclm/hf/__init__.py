"""Checkpoints to Hugging Face folders and back; only the tools import it."""

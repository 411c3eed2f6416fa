"""Sharded checkpoints of a run: step folders, their weights, and the tokenizer beside them."""

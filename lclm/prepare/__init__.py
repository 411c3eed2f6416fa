"""Text to indexed files. Training imports nothing of it."""

"""lclm: train a language model into a long-context one, on Megatron-core."""

__version__ = "0.1.0"

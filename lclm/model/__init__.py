"""Llama on Megatron-core's tensor and pipeline parallelism, with lclm's own layers in its slots."""

"""Operators of a long-context trainer, one folder per operator.

This package exports nothing by itself; import from an operator's folder, for example
`from lclm_kernels.rope import apply_rope`. Nothing here knows the trainer or Megatron.
"""

"""Triton's interpreter computes bf16 wrongly; it is mended before any kernel runs in it."""

from lclm_kernels.backend import IS_INTERPRETED

if IS_INTERPRETED:
    from tests.kernels.bf16_interpreter import mend

    mend()

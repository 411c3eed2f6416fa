"""Exact bf16 for Triton's interpreter, in tests only.

The interpreter keeps bf16 as uint16 bit patterns. Triton 3.6.0 multiplies those patterns in
`tl.dot`, computes on them in arithmetic and comparisons, and truncates where fp32 becomes bf16
(triton-lang/triton#11584: not supported). `mend` computes in fp32 and rounds to nearest, ties to
even, as the hardware does.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def to_fp32(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns, uint16, to the fp32 numbers they stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(values: np.ndarray) -> np.ndarray:
    """fp32 numbers to the bit patterns of the nearest bf16, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(to_fp32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrow(data: np.ndarray) -> TensorHandle:
    """A result as bf16, or as truth values where the operation compared."""
    if data.dtype == np.bool_:
        return TensorHandle(data, tl.int1)
    return TensorHandle(to_bits(data), tl.bfloat16)


def _mend_cast(original):
    def cast(self, source, target_type, *rounding):
        target = target_type.scalar
        if _is_bf16(source) == (target == tl.bfloat16):
            return original(self, source, target_type, *rounding)
        wide = _widen(source)
        if target == tl.bfloat16:
            return TensorHandle(to_bits(wide.data.astype(np.float32)), tl.bfloat16)
        if target == tl.float32:
            return wide
        return original(self, wide, target_type, *rounding)

    return cast


def _mend_operation(original):
    """Mend an operation whose last argument is the NumPy function."""

    def operate(self, *arguments):
        *handles, function = arguments
        if not any(_is_bf16(handle) for handle in handles):
            return original(self, *arguments)
        return _narrow(function(*(_widen(handle).data for handle in handles)))

    return operate


def _mend_named(original):
    """Mend an operation that takes handles, and perhaps settings, and names its function itself."""

    def operate(self, *arguments):
        handles = [item for item in arguments if isinstance(item, TensorHandle)]
        if not any(_is_bf16(handle) for handle in handles):
            return original(self, *arguments)
        wide = [_widen(x) if isinstance(x, TensorHandle) else x for x in arguments]
        return _narrow(original(self, *wide).data)

    return operate


def _mend_dot(original):
    def dot(self, a, b, accumulator, *settings):
        return original(self, _widen(a), _widen(b), accumulator, *settings)

    return dot


def mend() -> None:
    """Mend this process's interpreter; before the first launch."""
    builder = InterpreterBuilder
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(builder, name, _mend_cast(getattr(builder, name)))
    for name in ("binary_op", "unary_op"):
        setattr(builder, name, _mend_operation(getattr(builder, name)))
    for name in ("create_fma", "create_rsqrt", "create_fabs", "create_clampf"):
        setattr(builder, name, _mend_named(getattr(builder, name)))
    builder.create_dot = _mend_dot(builder.create_dot)

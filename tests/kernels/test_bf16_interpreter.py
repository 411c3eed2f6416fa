"""bf16 in Triton: the interpreter as mended for tests, and the compiler, against PyTorch."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.bf16_interpreter import to_bits, to_fp32
from tests.kernels.bounds import max_error
from tests.kernels.implementations import device_of, each_implementation
from tests.tolerances import FLOOR_FP32

on_triton = each_implementation("triton")


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    if OPERATION == "add":
        out = x + y
    elif OPERATION == "multiply":
        out = x * y
    elif OPERATION == "divide":
        out = (x.to(tl.float32) / y.to(tl.float32)).to(tl.bfloat16)
    elif OPERATION == "negate":
        out = -x
    elif OPERATION == "absolute":
        out = tl.abs(x)
    elif OPERATION == "maximum":
        out = tl.maximum(x, y)
    else:
        out = tl.where(x < y, x, y)
    tl.store(out_ptr + offsets, out)


@triton.jit
def _round_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets).to(tl.bfloat16))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    place = rows * SIZE + columns
    product = tl.dot(tl.load(a_ptr + place), tl.load(b_ptr + place))
    tl.store(out_ptr + place, product)


def test_bits_of_every_bf16_number_come_back():
    bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    numbers = to_fp32(bits)
    is_nan = np.isnan(numbers)
    assert np.array_equal(to_bits(numbers)[~is_nan], bits[~is_nan])
    assert np.isnan(to_fp32(to_bits(numbers[is_nan]))).all()


def test_rounding_is_that_of_torch():
    x = torch.cat([torch.randn(10_000), torch.tensor([3.3895e38, 3.4e38, -3.4e38, 1e-40, 0.0])])
    ties = torch.arange(1.0, 200.0) / 256 + 1  # halfway between two bf16 numbers, every second one
    x = torch.cat([x, ties, -ties])
    expected = x.bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bits(x.numpy()), expected)


@on_triton
@pytest.mark.parametrize(
    ("operation", "of_torch"),
    [
        ("add", torch.add),
        ("multiply", torch.mul),
        ("divide", torch.div),
        ("negate", lambda x, y: -x),
        ("absolute", lambda x, y: x.abs()),
        ("maximum", torch.maximum),
        ("less", lambda x, y: torch.where(x < y, x, y)),
    ],
)
def test_arithmetic(implementation, operation, of_torch):
    x, y = torch.randn(2, 256, device=device_of(implementation)).bfloat16()
    out = torch.full_like(x, float("nan"))
    _arithmetic_kernel[(1,)](x, y, out, OPERATION=operation, SIZE=256)
    assert torch.equal(out, of_torch(x, y))


@on_triton
def test_fp32_is_rounded_to_nearest(implementation):
    x = torch.randn(1024, device=device_of(implementation))
    x[:100] = 1 + torch.arange(100) / 256  # ties
    out = torch.full_like(x, float("nan"), dtype=torch.bfloat16)
    _round_kernel[(1,)](x, out, SIZE=1024)
    assert torch.equal(out, x.bfloat16())


@on_triton
def test_dot_multiplies_numbers_not_bits(implementation):
    a, b = torch.randn(2, 32, 32, device=device_of(implementation)).bfloat16()
    out = torch.full_like(a, float("nan"), dtype=torch.float32)
    _dot_kernel[(1,)](a, b, out, SIZE=32)
    assert max_error(out, a.double() @ b.double()) <= 32 * FLOOR_FP32

"""RMSNorm: forward, gradients, refusals."""

import pytest
import torch

from lclm_kernels.rms_norm import rms_norm
from tests.kernels.bounds import assert_within_torch_error, max_error
from tests.kernels.implementations import device_of, each_implementation
from tests.tolerances import FLOOR_FP32

EPS = 1e-5


def by_definition(x, weight):
    return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight


def run(function, x, weight, dy):
    x, weight = (tensor.detach().clone().requires_grad_() for tensor in (x, weight))
    y = function(x, weight)
    y.backward(dy)
    return y.detach(), x.grad, weight.grad


on_both = each_implementation("reference", "triton")
# several rows per program and several programs, one row per program, no rows, the weight read anew
SHAPES = [(1, 8), (63, 40), (3, 5, 17), (0, 8), (400, 64), (5, 4200), (4, 8200)]


@on_both
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_gradients(shape, dtype, implementation):
    device = device_of(implementation)
    x, dy = torch.randn(2, *shape, device=device).to(dtype)
    weight = (1 + 0.1 * torch.randn(shape[-1], device=device)).to(dtype)
    truth = run(by_definition, x.double(), weight.double(), dy.double())
    of_torch = run(lambda x, w: torch.nn.functional.rms_norm(x, w.shape, w, EPS), x, weight, dy)
    results = run(lambda x, w: rms_norm(x, w, EPS, implementation), x, weight, dy)
    for name, result, torch_result, exact in zip(("y", "dx", "dweight"), results, of_torch, truth):
        assert_within_torch_error(name, result, torch_result, exact)


def test_gradcheck_fp64():
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))


@on_both
def test_rounds_as_llama_of_transformers_does(implementation):
    """Normalised value rounded to bf16, then times the weight: bit for bit.

    In Triton the sum of squares runs in another order, so a few values are on the other side of a
    rounding; without the first rounding it would be every third.
    """
    device = device_of(implementation)
    x = torch.randn(20, 32, device=device).bfloat16()
    weight = torch.randn(32, device=device).bfloat16()
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    result = rms_norm(x, weight, EPS, implementation)
    num_different = (result != weight * normed.bfloat16()).sum().item()
    assert num_different <= (0 if implementation == "reference" else 6)


def test_rows_have_unit_root_mean_square_whatever_their_size():
    x = torch.randn(9, 64) * torch.logspace(1, 4, 9)[:, None]
    mean_square = rms_norm(x, torch.ones(64), 1e-12).square().mean(dim=-1)
    assert max_error(mean_square, torch.ones(9)) <= FLOOR_FP32


@on_both
def test_fp32_weight_keeps_the_input_dtype_and_its_own_gradient_dtype(implementation):
    x = torch.randn(5, 8, device=device_of(implementation)).bfloat16()
    weight = torch.ones(8, device=x.device)
    y, dx, dweight = run(lambda x, w: rms_norm(x, w, EPS, implementation), x, weight, x)
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@on_both
def test_non_contiguous_input_and_gradient(implementation):
    device = device_of(implementation)
    x, dy = torch.randn(2, 8, 5, device=device)
    weight = torch.randn(16, device=device)[::2]

    def result(x, dy, weight):
        return run(lambda x, w: rms_norm(x, w, EPS, implementation), x, weight, dy)

    plain = result(x.t().contiguous(), dy.t().contiguous(), weight.contiguous())
    wide = torch.randn(5, 20, device=device)
    wide[:, 3:11] = x.t()
    for strided in (result(x.t(), dy.t(), weight), result(wide[:, 3:11], dy.t(), weight)):
        for one, other in zip(strided, plain):
            assert max_error(one, other) <= FLOOR_FP32  # strides may change the order of a sum


def test_triton_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="rms_norm: implementation='triton' cannot run: it"):
        rms_norm(torch.zeros(3, 8).double(), torch.ones(8).double(), EPS, "triton")
    with pytest.raises(ValueError, match="rms_norm: implementation='triton' cannot run: it"):
        rms_norm(torch.zeros(1, 40_000), torch.ones(40_000), EPS, "triton")


def test_refuses():
    with pytest.raises(ValueError, match=r"weight must be \[D\] .*\[3, 8\], got \[7\]"):
        rms_norm(torch.zeros(3, 8), torch.zeros(7), EPS)
    with pytest.raises(ValueError, match="eps must be positive, got 0"):
        rms_norm(torch.zeros(3, 8), torch.zeros(8), 0.0)

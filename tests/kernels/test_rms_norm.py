"""RMSNorm: forward, gradients, refusals."""

import pytest
import torch

from lclm_kernels.rms_norm import rms_norm
from tests.kernels.bounds import assert_within_torch_error, max_error
from tests.tolerances import FLOOR_FP32

EPS = 1e-5


def by_definition(x, weight):
    return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight


def run(function, x, weight, dy):
    x, weight = (tensor.detach().clone().requires_grad_() for tensor in (x, weight))
    y = function(x, weight)
    y.backward(dy)
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("shape", [(1, 8), (63, 40), (3, 5, 17), (0, 8), (1000, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_gradients(shape, dtype):
    x, dy = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = (1 + 0.1 * torch.randn(shape[-1])).to(dtype)
    truth = run(by_definition, x.double(), weight.double(), dy.double())
    of_torch = run(lambda x, w: torch.nn.functional.rms_norm(x, w.shape, w, EPS), x, weight, dy)
    results = run(lambda x, w: rms_norm(x, w, EPS), x, weight, dy)
    for name, result, torch_result, exact in zip(("y", "dx", "dweight"), results, of_torch, truth):
        assert_within_torch_error(name, result, torch_result, exact)


def test_gradcheck_fp64():
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))


def test_rounds_as_llama_of_transformers_does():
    """Normalised value rounded to bf16, then times the weight: bit for bit."""
    x, weight = torch.randn(20, 32).bfloat16(), torch.randn(32).bfloat16()
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    assert torch.equal(rms_norm(x, weight, EPS), weight * normed.bfloat16())


def test_rows_have_unit_root_mean_square_whatever_their_size():
    x = torch.randn(9, 64) * torch.logspace(1, 4, 9)[:, None]
    mean_square = rms_norm(x, torch.ones(64), 1e-12).square().mean(dim=-1)
    assert max_error(mean_square, torch.ones(9)) <= FLOOR_FP32


def test_fp32_weight_keeps_the_input_dtype_and_its_own_gradient_dtype():
    x = torch.randn(5, 8).bfloat16()
    y, dx, dweight = run(lambda x, w: rms_norm(x, w, EPS), x, torch.ones(8), x)
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_non_contiguous_input():
    x = torch.randn(8, 5)
    assert torch.equal(
        rms_norm(x.t(), torch.ones(8), EPS), rms_norm(x.t().contiguous(), torch.ones(8), EPS)
    )


def test_refuses():
    with pytest.raises(ValueError, match=r"weight must be \[D\] .*\[3, 8\], got \[7\]"):
        rms_norm(torch.zeros(3, 8), torch.zeros(7), EPS)
    with pytest.raises(ValueError, match="eps must be positive, got 0"):
        rms_norm(torch.zeros(3, 8), torch.zeros(8), 0.0)

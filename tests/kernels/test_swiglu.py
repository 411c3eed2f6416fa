"""SwiGLU: forward, gradient, what it saves, refusals."""

import pytest
import torch

from lclm_kernels.swiglu import swiglu
from tests.kernels.bounds import assert_within_torch_error
from tests.kernels.implementations import device_of, each_implementation


def by_definition(x):
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def run(function, x, dy):
    x = x.detach().clone().requires_grad_()
    y = function(x)
    y.backward(dy)
    return y.detach(), x.grad


on_both = each_implementation("reference", "triton")


@on_both
@pytest.mark.parametrize("shape", [(1, 2), (63, 40), (3, 5, 34), (0, 8), (4, 0), (2, 4398)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_gradient(shape, dtype, implementation):
    device = device_of(implementation)
    x = 3 * torch.randn(shape, device=device).to(dtype)
    dy = torch.randn(*shape[:-1], shape[-1] // 2, device=device).to(dtype)
    truth = run(by_definition, x.double(), dy.double())
    of_torch = run(by_definition, x, dy)
    results = run(lambda x: swiglu(x, implementation), x, dy)
    for name, result, torch_result, exact in zip(("y", "dx"), results, of_torch, truth):
        assert_within_torch_error(name, result, torch_result, exact)


def test_gradcheck_fp64():
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, x)


@on_both
def test_saves_its_input_and_nothing_else(implementation):
    x = torch.randn(5, 8, device=device_of(implementation), requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(x, implementation)
    assert len(saved) == 1 and saved[0].data_ptr() == x.data_ptr()


@on_both
def test_non_contiguous_input_and_gradient(implementation):
    x, dy = torch.randn(8, 5), torch.randn(4, 5)
    x, dy = (tensor.to(device_of(implementation)) for tensor in (x, dy))

    def result(x, dy):
        return run(lambda x: swiglu(x, implementation), x, dy)

    strided = result(x.t(), dy.t())
    plain = result(x.t().contiguous(), dy.t().contiguous())
    assert torch.equal(strided[0], plain[0]) and torch.equal(strided[1], plain[1])


@on_both
def test_gradient_of_one_value_everywhere(implementation):
    """A sum hands its gradient over as one number with strides 0."""
    x = torch.randn(3, 8, device=device_of(implementation), requires_grad=True)
    swiglu(x, implementation).sum().backward()
    expected = x.detach().clone().requires_grad_()
    by_definition(expected).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


@on_both
def test_extreme_gates_stay_finite(implementation):
    x = torch.tensor([[-1e4, 1e4, 2.0, 2.0]], device=device_of(implementation))
    y, dx = run(lambda x: swiglu(x, implementation), x, torch.ones_like(x[:, :2]))
    assert y.tolist() == [[0.0, 2e4]] and dx.isfinite().all()


def test_refuses_an_odd_size():
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 2F\] .* got \[3, 7\]"):
        swiglu(torch.zeros(3, 7))

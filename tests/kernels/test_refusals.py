"""What every operator refuses alike: integers, tensors on two devices, second derivatives."""

import pytest
import torch

from lclm_kernels.adamw import AdamW
from lclm_kernels.interval_attention import interval_attention, make_plan
from lclm_kernels.linear_cross_entropy import linear_cross_entropy
from lclm_kernels.rms_norm import rms_norm
from lclm_kernels.rope import apply_rope, apply_rope_to_qkv, build_rope_table
from lclm_kernels.swiglu import swiglu
from tests.kernels.masks import document_intervals

T, H = 6, 8
PLAN = make_plan(*document_intervals([2, 4]), T)
LABELS = torch.arange(T)
TABLE = build_rope_table(torch.arange(T), H, 1e4)

# operator: its inputs' shapes, the call with them
CALLS = {
    "interval_attention": (
        [(T, 2, H), (T, 1, H), (T, 1, H)],
        lambda q, k, v: interval_attention(q, k, v, PLAN, 1.0),
    ),
    "rms_norm": ([(T, H), (H,)], lambda x, weight: rms_norm(x, weight, 1e-5)),
    "linear_cross_entropy": (
        [(T, H), (T, H)],
        lambda hidden, weight: linear_cross_entropy(hidden, weight, LABELS)[0],
    ),
    "swiglu": ([(T, H)], swiglu),
    "rope": ([(T, 2, H)], lambda x: apply_rope(x, *TABLE)),
    "rope packed": ([(T, 1, 3, H)], lambda qkv: apply_rope_to_qkv(qkv * 1, *TABLE)),
}


@pytest.mark.parametrize("name", CALLS)
def test_integers_are_refused(name):
    shapes, call = CALLS[name]
    with pytest.raises(ValueError, match=f"{name.split()[0]}: no implementation serves .*int32"):
        call(*(torch.ones(shape, dtype=torch.int32) for shape in shapes))


TWO_INPUTS = [name for name, (shapes, _) in CALLS.items() if len(shapes) > 1]


@pytest.mark.parametrize("name", TWO_INPUTS)
def test_inputs_on_two_devices_are_refused(name):
    shapes, call = CALLS[name]
    first, *rest = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=f"{name}: .*meta"):
        call(first, *(x.to("meta") for x in rest))


def test_a_table_on_another_device_is_refused():
    table = [x.to("meta") for x in TABLE]
    with pytest.raises(ValueError, match="rope: x is on cpu, the table on meta"):
        apply_rope(torch.ones(T, 2, H), *table)
    with pytest.raises(ValueError, match="rope: x is on cpu, the table on meta"):
        apply_rope_to_qkv(torch.ones(T, 1, 3, H), *table)


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_are_refused(name):
    """The backward saves numbers of the forward as if they were constants."""
    shapes, call = CALLS[name]
    inputs = [torch.ones(shape, requires_grad=True) for shape in shapes]
    loss = call(*inputs).square().sum()
    (gradient,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_rotating_a_leaf_in_place_is_refused():
    leaf = torch.ones(T, 1, 3, H, requires_grad=True)
    with pytest.raises(ValueError, match=r"rope: qkv \[6, 1, 3, 8\] is a leaf that requires grad"):
        apply_rope_to_qkv(leaf, *TABLE)


def test_rows_of_nothing_are_refused():
    with pytest.raises(ValueError, match=r"rms_norm: weight must be \[D\] with D > 0"):
        rms_norm(torch.ones(3, 0), torch.ones(0), 1e-5)
    with pytest.raises(ValueError, match=r"swiglu: x must be \[\.\.\., 2F\]"):
        swiglu(torch.ones(()))


def test_a_sparse_gradient_is_refused():
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4).to_sparse()
    with pytest.raises(ValueError, match=r"adamw: group 0 .*sparse_coo gradient; both must be"):
        AdamW([param]).step()

"""RoPE: table, rotation, gradient."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lclm_kernels.rope import (
    apply_rope,
    apply_rope_to_qkv,
    build_rope_table,
    scale_base_ntk,
)
from tests.kernels.bounds import assert_within_torch_error, max_error
from tests.kernels.implementations import device_of, each_implementation
from tests.tolerances import FLOOR_FP64, ROPE_FP32

LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_length": 8192,
}
YARN = {"type": "yarn", "factor": 8.0, "original_length": 4096, "beta_fast": 32.0, "beta_slow": 1.0}


def rotate_by_definition(x_TNH, positions, base):
    """Each pair (i, i + H/2) as a complex number times exp(1j * position * frequency), fp64."""
    half = x_TNH.shape[-1] // 2
    pairs = torch.complex(x_TNH[..., :half].double(), x_TNH[..., half:].double())
    frequencies = torch.tensor([base ** (-i / half) for i in range(half)], dtype=torch.float64)
    angles = positions.double()[:, None] * frequencies
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def make_inputs(shape, dtype, implementation, base=500_000.0):
    """(x and dout of the shape, positions, cos, sin) on the implementation's device."""
    device = device_of(implementation)
    positions = torch.randint(0, 1_000_000, (shape[0],))
    x, dout = torch.randn(2, *shape).to(device=device, dtype=dtype)
    cos, sin = (table.to(device) for table in build_rope_table(positions, shape[-1], base))
    return x, dout, positions, cos, sin


on_both = each_implementation("reference", "triton")


@on_both
@pytest.mark.parametrize("shape", [(0, 3, 16), (1, 1, 2), (63, 3, 16), (17, 5, 96), (130, 8, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotation_and_gradient(shape, dtype, implementation):
    x, dout, positions, cos, sin = make_inputs(shape, dtype, implementation)
    assert cos.shape == sin.shape == (shape[0], shape[2] // 2) and cos.dtype == torch.float32
    truth = rotate_by_definition(x.cpu(), positions, 500_000.0)
    dx_truth = rotate_by_definition(dout.cpu(), -positions, 500_000.0)
    out = apply_rope(x.requires_grad_(), cos, sin, implementation)
    out.backward(dout)
    for name, result, exact in (("out", out, truth), ("dx", x.grad, dx_truth)):
        assert result.dtype == dtype
        assert_within_torch_error(name, result, exact.to(dtype), exact)
        if dtype == torch.float32:
            assert max_error(result, exact) <= ROPE_FP32


# (T, K, G + 2, H): one kv head of a 70B tp rank, Llama-3-8B's ratio, no grouping, odd everything
PACKED_SHAPES = [(0, 2, 3, 8), (33, 1, 10, 16), (70, 2, 6, 64), (9, 4, 3, 128), (21, 3, 5, 96)]


@on_both
@pytest.mark.parametrize("shape", PACKED_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_flat", [False, True])
def test_packed_qkv_is_rotated_in_place(shape, dtype, is_flat, implementation):
    qkv, dout, positions, cos, sin = make_inputs(shape, dtype, implementation)
    num_tokens, num_kv_heads, group, head_dim = shape
    leaf = qkv.clone().requires_grad_()
    before = qkv.cpu().view(num_tokens, num_kv_heads * group, head_dim)
    truth = rotate_by_definition(before, positions, 500_000.0).view(shape)
    truth[:, :, -1] = qkv[:, :, -1]
    dout_heads = dout.cpu().view(num_tokens, num_kv_heads * group, head_dim)
    dqkv_truth = rotate_by_definition(dout_heads, -positions, 500_000.0).view(shape)
    dqkv_truth[:, :, -1] = dout[:, :, -1]

    if is_flat:
        packed = torch.mul(leaf.reshape(num_tokens, 1, num_kv_heads * group * head_dim), 1.0)
        heads_shape = shape[1:]
    else:
        packed, heads_shape = leaf * 1.0, None
    rotated = apply_rope_to_qkv(packed, cos, sin, heads_shape, implementation)
    assert rotated.data_ptr() == packed.data_ptr()
    q, k, v = rotated.view(shape).split([group - 2, 1, 1], dim=2)
    incoming = dout.clone()
    torch.cat([q, k, v], dim=2).backward(incoming)
    assert torch.equal(incoming, dout)  # a gradient may belong to others too
    for name, result, exact in (
        ("qkv", rotated.view(shape), truth),
        ("dqkv", leaf.grad, dqkv_truth),
    ):
        assert_within_torch_error(name, result, exact.to(dtype), exact)
    assert torch.equal(rotated.view(shape)[:, :, -1], qkv[:, :, -1])
    assert torch.equal(leaf.grad[:, :, -1], dout[:, :, -1])


@on_both
def test_a_value_head_may_hold_anything(implementation):
    qkv, dout, _, cos, sin = make_inputs((5, 2, 4, 8), torch.float32, implementation)
    dout[:, :, -1] = float("inf")
    leaf = qkv.clone().requires_grad_()
    apply_rope_to_qkv(leaf * 1.0, cos, sin, implementation=implementation).backward(dout)
    assert leaf.grad[:, :, :-1].isfinite().all() and leaf.grad[:, :, -1].isinf().all()


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 32, dtype=torch.float64).expand(2, 50, 1, 32)
    scores = []
    for shift in (0, 1000):
        cos, sin = (x.double() for x in build_rope_table(torch.arange(50) + shift, 32, 1e4))
        scores.append(apply_rope(q, cos, sin)[:, 0] @ apply_rope(k, cos, sin)[:, 0].t())
    assert max_error(scores[0], scores[1]) <= 50 * ROPE_FP32


def test_backward_is_the_inverse_rotation():
    cos, sin = build_rope_table(torch.arange(7), 8, 1e4)
    cos, sin = cos.double(), sin.double()
    x = torch.randn(7, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, cos, sin), x)
    norm = (cos.square() + sin.square()).sqrt()  # exact rotation: the table is rounded to fp32
    cos, sin = cos / norm, sin / norm
    out = apply_rope(x, cos, sin)
    out.backward(out.detach())
    assert max_error(x.grad, x) <= FLOOR_FP64 * 10


@on_both
def test_strided_input(implementation):
    fused, _, _, cos, sin = make_inputs((9, 5, 8), torch.float32, implementation)
    reversed_heads = fused.permute(0, 2, 1).contiguous().permute(0, 2, 1)  # last stride is not 1
    plain = apply_rope(fused, cos, sin, implementation)
    assert torch.equal(apply_rope(fused[:, 1:3], cos, sin, implementation), plain[:, 1:3])
    assert torch.equal(apply_rope(reversed_heads, cos, sin, implementation), plain)


def test_linear_scaling_divides_positions():
    positions = torch.arange(0, 400, 4)
    scaled = build_rope_table(positions, 16, 1e4, {"type": "linear", "factor": 4.0})
    plain = build_rope_table(positions // 4, 16, 1e4)
    for one, other in zip(scaled, plain):
        assert max_error(one, other) <= ROPE_FP32


def test_llama3_scaling_by_its_three_ranges():
    base, head_dim = 500_000.0, 128
    cos, sin = build_rope_table(torch.tensor([1]), head_dim, base, LLAMA3)
    angles = torch.atan2(sin, cos)[0].double()
    for i, angle in enumerate(angles.tolist()):
        frequency = base ** (-2 * i / head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4.0:
            expected = frequency
        elif wavelength > 8192 / 1.0:
            expected = frequency / 8.0
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            expected = (1 - smooth) * frequency / 8.0 + smooth * frequency
        assert math.isclose(angle, expected, rel_tol=ROPE_FP32)


def test_llama3_table_is_that_of_transformers():
    """One position of Llama 3.1's table as transformers makes it."""
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        rope_theta=500_000.0,
        max_position_embeddings=131_072,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    cos, _ = build_rope_table(torch.tensor([1]), 128, 500_000.0, LLAMA3)
    assert max_error(cos[0], frequencies.double().cos()) <= ROPE_FP32


def transformers_table(kind, positions, **fields):
    """cos and sin of transformers' own rope initialisation, from its fp32 frequencies."""
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        rope_theta=500_000.0,
        max_position_embeddings=8192,
        rope_scaling={"rope_type": kind, **fields},
    )
    length = fields.pop("seq_len", None)
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), length)
    angles = positions.double()[:, None] * frequencies.double()
    return magnitude * angles.cos(), magnitude * angles.sin()


@pytest.mark.parametrize("factor", [1.5, 4.0, 64.0])
def test_yarn_table_is_that_of_transformers(factor):
    positions = torch.tensor([0, 1, 7])
    expected = transformers_table(
        "yarn",
        positions,
        factor=factor,
        original_max_position_embeddings=4096,
        beta_fast=32.0,
        beta_slow=1.0,
    )
    table = build_rope_table(positions, 128, 500_000.0, {**YARN, "factor": factor})
    for ours, theirs in zip(table, expected):
        assert max_error(ours, theirs) <= 3 * ROPE_FP32  # cos and sin up to 1.42, angles up to 7


@pytest.mark.parametrize("factor", [2.0, 8.0])
def test_ntk_table_is_that_of_transformers_at_the_longer_length(factor):
    """transformers raises the base with the length at hand: by 8 / 1 at eight times the length."""
    positions = torch.tensor([0, 1, 7])
    expected = transformers_table("dynamic", positions, factor=1.0, seq_len=int(8192 * factor))
    table = build_rope_table(positions, 128, 500_000.0, {"type": "ntk", "factor": factor})
    for ours, theirs in zip(table, expected):
        assert max_error(ours, theirs) <= 3 * ROPE_FP32
    base = scale_base_ntk(500_000.0, 128, factor)
    for ours, raised in zip(table, build_rope_table(positions, 128, base)):
        assert torch.equal(ours, raised)


def test_ntk_keeps_the_fastest_pair_and_slows_the_slowest():
    cos, sin = build_rope_table(torch.tensor([1]), 64, 1e4, {"type": "ntk", "factor": 4.0})
    angles = torch.atan2(sin, cos)[0].double()
    assert math.isclose(angles[0], 1.0, rel_tol=ROPE_FP32)
    assert math.isclose(angles[-1], 1e4 ** (-62 / 64) / 4.0, rel_tol=ROPE_FP32)


def test_gradient_of_yarn_holds_its_magnitude():
    """With yarn the map is a rotation times a number: the gradient is no longer the inverse."""
    table = build_rope_table(torch.arange(5), 8, 1e4, {**YARN, "original_length": 64})
    cos, sin = (x.double() for x in table)
    assert (cos.square() + sin.square()).min() > 1.4
    x = torch.randn(5, 1, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, cos, sin), x)


BAD_TABLES = {
    "dtype": ((torch.arange(3.0), 8, 1e4), "positions must be int64"),
    "dims": ((torch.zeros(1, 3, dtype=torch.int64), 8, 1e4), r"one dim, got torch.int64 \[1, 3\]"),
    "odd": ((torch.arange(3), 7, 1e4), "head_dim must be even and positive, got 7"),
    "base": ((torch.arange(3), 8, 1.0), r"base must be greater than 1, got 1\.0"),
    "type": ((torch.arange(3), 8, 1e4, {"type": "dynamic"}), "scaling type 'dynamic' is unknown"),
    "keys": ((torch.arange(3), 8, 1e4, {"type": "linear"}), r"takes exactly the keys \['factor'"),
    "factor": ((torch.arange(3), 8, 1e4, {"type": "linear", "factor": 0.5}), "at least 1, got 0.5"),
    "yarn": (
        (torch.arange(3), 8, 1e4, {**YARN, "beta_slow": 32.0}),
        "yarn needs 0 < beta_slow < beta_fast, got 32.0 and 32.0",
    ),
    "ntk": ((torch.arange(3), 2, 1e4, {"type": "ntk", "factor": 2.0}), "head_dim above 2, got 2"),
    "bands": ((torch.arange(3), 8, 1e4, {**LLAMA3, "low_freq_factor": 4.0}), "0 < low_freq_factor"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_table_refuses(case):
    arguments, message = BAD_TABLES[case]
    with pytest.raises(ValueError, match=f"rope: .*{message}"):
        build_rope_table(*arguments)


def test_rotation_refuses():
    cos, sin = build_rope_table(torch.arange(3), 8, 1e4)
    with pytest.raises(ValueError, match=r"x must be \[T, N, H\] with even H"):
        apply_rope(torch.zeros(3, 8), cos, sin)
    with pytest.raises(ValueError, match=r"cos and sin must be \[4, 4\]"):
        apply_rope(torch.zeros(4, 1, 8), cos, sin)


def test_packed_rotation_refuses():
    cos, sin = build_rope_table(torch.arange(3), 8, 1e4)
    with pytest.raises(ValueError, match=r"qkv must be contiguous .* got \[3, 2, 8\]"):
        apply_rope_to_qkv(torch.zeros(3, 2, 8), cos, sin)
    with pytest.raises(ValueError, match="rotate before splitting the heads"):
        apply_rope_to_qkv(torch.zeros(3, 2, 5, 8)[:, :, :4], cos, sin)
    with pytest.raises(ValueError, match=r"does not hold \[3, \*\[2, 4, 8\]\]"):
        apply_rope_to_qkv(torch.zeros(3, 1, 48), cos, sin, (2, 4, 8))
    with pytest.raises(ValueError, match=r"cos and sin must be \[4, 4\]"):
        apply_rope_to_qkv(torch.zeros(4, 1, 3, 8), cos, sin)
    with pytest.raises(ValueError, match="the table has no gradient here"):
        apply_rope(torch.zeros(3, 1, 8), cos.requires_grad_(), sin)


def test_triton_refuses_what_it_cannot_do():
    cos, sin = build_rope_table(torch.arange(3), 8, 1e4)
    with pytest.raises(ValueError, match="rope: implementation='triton' cannot run: it "):
        apply_rope(torch.zeros(3, 1, 8, dtype=torch.float64), cos, sin, "triton")

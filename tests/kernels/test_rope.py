"""RoPE: table, rotation, gradient."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lclm_kernels.rope import apply_rope, build_rope_table
from tests.kernels.bounds import assert_within_torch_error, max_error
from tests.tolerances import FLOOR_FP64, ROPE_FP32

LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_length": 8192,
}


def rotate_by_definition(x_TNH, positions, base):
    """Each pair (i, i + H/2) as a complex number times exp(1j * position * frequency), fp64."""
    half = x_TNH.shape[-1] // 2
    pairs = torch.complex(x_TNH[..., :half].double(), x_TNH[..., half:].double())
    frequencies = torch.tensor([base ** (-i / half) for i in range(half)], dtype=torch.float64)
    angles = positions.double()[:, None] * frequencies
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("num_tokens", [0, 1, 63, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation(num_tokens, dtype):
    positions = torch.randint(0, 1_000_000, (num_tokens,))
    x = torch.randn(num_tokens, 3, 16).to(dtype)
    truth = rotate_by_definition(x, positions, 500_000.0)
    cos, sin = build_rope_table(positions, 16, 500_000.0)
    assert cos.shape == sin.shape == (num_tokens, 8) and cos.dtype == sin.dtype == torch.float32
    out = apply_rope(x, cos, sin)
    assert out.dtype == dtype
    assert_within_torch_error("rope", out, truth.to(dtype), truth)
    if dtype == torch.float32:
        assert max_error(out, truth) <= ROPE_FP32


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


def test_strided_input():
    fused = torch.randn(9, 5, 8)
    cos, sin = build_rope_table(torch.arange(9), 8, 1e4)
    assert torch.equal(
        apply_rope(fused[:, 1:3], cos, sin), apply_rope(fused[:, 1:3].contiguous(), cos, sin)
    )


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


BAD_TABLES = {
    "dtype": ((torch.arange(3.0), 8, 1e4), "positions must be int64"),
    "dims": ((torch.zeros(1, 3, dtype=torch.int64), 8, 1e4), r"one dim, got torch.int64 \[1, 3\]"),
    "odd": ((torch.arange(3), 7, 1e4), "head_dim must be even and positive, got 7"),
    "base": ((torch.arange(3), 8, 1.0), r"base must be greater than 1, got 1\.0"),
    "type": ((torch.arange(3), 8, 1e4, {"type": "yarn"}), "scaling type 'yarn' is unknown"),
    "keys": ((torch.arange(3), 8, 1e4, {"type": "linear"}), r"takes exactly the keys \['factor'"),
    "factor": ((torch.arange(3), 8, 1e4, {"type": "linear", "factor": 0.5}), "at least 1, got 0.5"),
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

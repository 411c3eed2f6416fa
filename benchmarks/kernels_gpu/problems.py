"""Inputs and truths of every operator but attention, on any device.

The truth is the operator's formula in fp32 (AdamW: fp64) on the same inputs; where that would take
too much memory, on the first and last tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lclm_kernels.rope import build_rope_table

from . import shapes
from .contest import Expected, Problem, Tensors
from .shapes import MODELS, Spec

EPS = 1e-5  # of RMSNorm
ROPE_BASE = 5e5
CHECKED_TOKENS = 512  # at either end of the row
CHUNK_TOKENS = 1024  # of what is computed in pieces
# Largest relative errors, several times what one rounding of results and intermediates to bf16
# (2^-9) makes; fp32 steps of AdamW are compared with fp64. Liger adds up the weight's gradient of
# the loss in bf16, over 32 chunks by default.
MAX_ERROR, MAX_LOSS_ERROR, MAX_STEP_ERROR = 1e-2, 3e-2, 1e-5
ADAMW: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@dataclass(kw_only=True)
class RopeProblem(Problem):
    """inputs q [T, N, H], k [T, K, H]; cos, sin [T, H/2] fp32."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(kw_only=True)
class LossProblem(Problem):
    """inputs hidden [T, D], weight [V, D]; labels int64 [T], none ignored. Result: the sum."""

    labels: torch.Tensor


def random(
    shape: Sequence[int], device: torch.device, dtype: torch.dtype, scale: float = 1.0
) -> torch.Tensor:
    """Normal numbers, of which a gradient is wanted."""
    return (scale * torch.randn(*shape, device=device, dtype=dtype)).requires_grad_()


def checked_tokens(num_tokens: int, device: torch.device) -> torch.Tensor:
    """Numbers of the first and last tokens."""
    tokens = torch.arange(num_tokens, device=device)
    if num_tokens <= 2 * CHECKED_TOKENS:
        return tokens
    return torch.cat([tokens[:CHECKED_TOKENS], tokens[-CHECKED_TOKENS:]])


def expect_rows(
    names: Sequence[str], values: Sequence[torch.Tensor], tokens: torch.Tensor
) -> list[Expected]:
    """values[i] is the truth of these tokens' rows of result i."""
    return [
        Expected(name, value.detach(), lambda results, i=i: results[i][tokens])
        for i, (name, value) in enumerate(zip(names, values))
    ]


def wide_leaves(inputs: Tensors, tokens: torch.Tensor) -> Tensors:
    """These tokens of the inputs in fp32, with gradients of their own."""
    return [x.detach()[tokens].float().requires_grad_() for x in inputs]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding by its formula, pairs (i, i + H/2); x [T, N, H], tables [T, 1, H]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def wide_tables(cos: torch.Tensor, sin: torch.Tensor) -> Tensors:
    """Tables [T, H/2] as [T, 1, H], as most implementations want them."""
    return [torch.cat([table, table], dim=-1)[:, None] for table in (cos, sin)]


def rms_norm_formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm in fp32, rounded as Hugging Face's Llama does."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return scaled.to(x.dtype) * weight


def swiglu_formula(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x [T, 2F]."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def rope_problem(spec: Spec, device: torch.device, dtype: torch.dtype) -> RopeProblem:
    """Queries and keys of one row."""
    model = MODELS[spec.model]
    inputs = [random((spec.tokens, n, model.H), device, dtype) for n in (model.N, model.K)]
    douts = [torch.randn_like(x) for x in inputs]
    cos, sin = (
        table.to(device)
        for table in build_rope_table(torch.arange(spec.tokens), model.H, ROPE_BASE)
    )
    tokens = checked_tokens(spec.tokens, device)
    wide = wide_leaves(inputs, tokens)
    tables = wide_tables(cos[tokens], sin[tokens])
    outs = [rotate(x, *tables) for x in wide]
    grads = torch.autograd.grad(outs, wide, [dout[tokens].float() for dout in douts])
    return RopeProblem(
        **spec.to_json(),
        inputs=inputs,
        douts=douts,
        work=shapes.rope_work(model, spec.tokens),
        limit=MAX_ERROR,
        expected=expect_rows(("q", "k", "dq", "dk"), [*outs, *grads], tokens),
        cos=cos,
        sin=sin,
    )


def rms_norm_problem(spec: Spec, device: torch.device, dtype: torch.dtype) -> Problem:
    """x [T, D], weight [D]."""
    model = MODELS[spec.model]
    x = random((spec.tokens, model.D), device, dtype)
    weight = (1 + 0.1 * torch.randn(model.D, device=device)).to(dtype).requires_grad_()
    dout = torch.randn_like(x)
    tokens = checked_tokens(spec.tokens, device)
    wide_x, wide_weight = x.detach()[tokens].float().requires_grad_(), weight.detach().float()
    out = rms_norm_formula(wide_x, wide_weight)
    (dx,) = torch.autograd.grad(out, wide_x, dout[tokens].float())
    dweight = torch.zeros(model.D, device=device)
    for part in range(0, spec.tokens, CHUNK_TOKENS):
        rows = slice(part, part + CHUNK_TOKENS)
        ones = torch.ones(model.D, device=device)
        dweight += (rms_norm_formula(x.detach()[rows].float(), ones) * dout[rows].float()).sum(0)
    expected = [
        Expected("y", out.detach(), lambda results: results[0][tokens]),
        Expected("dx", dx, lambda results: results[1][tokens]),
        Expected("dweight", dweight, lambda results: results[2]),
    ]
    return Problem(
        **spec.to_json(),
        inputs=[x, weight],
        douts=[dout],
        work=shapes.rms_norm_work(model, spec.tokens),
        limit=MAX_ERROR,
        expected=expected,
    )


def swiglu_problem(spec: Spec, device: torch.device, dtype: torch.dtype) -> Problem:
    """x [T, 2F]: gate, then up."""
    model = MODELS[spec.model]
    x = random((spec.tokens, 2 * model.F), device, dtype)
    dout = torch.randn(spec.tokens, model.F, device=device, dtype=dtype)
    tokens = checked_tokens(spec.tokens, device)
    (wide,) = wide_leaves([x], tokens)
    out = swiglu_formula(wide)
    (dx,) = torch.autograd.grad(out, wide, dout[tokens].float())
    return Problem(
        **spec.to_json(),
        inputs=[x],
        douts=[dout],
        work=shapes.swiglu_work(model, spec.tokens),
        limit=MAX_ERROR,
        expected=expect_rows(("y", "dx"), [out, dx], tokens),
    )


def loss_problem(spec: Spec, device: torch.device, dtype: torch.dtype) -> LossProblem:
    """The projection's weight is of the size that training starts with, 0.02."""
    model = MODELS[spec.model]
    hidden = random((spec.tokens, model.D), device, dtype)
    weight = random((model.V, model.D), device, dtype, scale=0.02)
    labels = torch.randint(0, model.V, (spec.tokens,), device=device)
    # The weight's gradient is checked for the entries that are labels first, and some others.
    entries = torch.cat([labels[:CHECKED_TOKENS], torch.arange(CHECKED_TOKENS, device=device)])
    wide_weight = weight.detach().float()
    loss = torch.zeros((), device=device, dtype=torch.float64)
    dhidden = torch.empty(hidden.shape, device=device)
    dweight = torch.zeros(len(entries), model.D, device=device)
    for part in range(0, spec.tokens, CHUNK_TOKENS):
        rows = slice(part, part + CHUNK_TOKENS)
        wide = hidden.detach()[rows].float()
        logits = wide @ wide_weight.t()
        loss += functional.cross_entropy(logits, labels[rows], reduction="sum")
        dlogits = logits.softmax(dim=-1)
        dlogits[torch.arange(len(wide), device=device), labels[rows]] -= 1
        dhidden[rows] = dlogits @ wide_weight
        dweight += dlogits[:, entries].t() @ wide
    expected = [
        Expected("loss", loss, lambda results: results[0].double()),
        Expected("dhidden", dhidden, lambda results: results[1]),
        Expected("dweight", dweight, lambda results: results[2][entries]),
    ]
    return LossProblem(
        **spec.to_json(),
        inputs=[hidden, weight],
        douts=[torch.ones((), device=device)],
        work=shapes.loss_work(model, spec.tokens),
        limit=MAX_LOSS_ERROR,
        expected=expected,
        labels=labels,
    )


def adamw_problem(spec: Spec, device: torch.device, _: torch.dtype) -> Problem:
    """One step on a layer's parameters; inputs are parameters, then gradients, fp32."""
    model = MODELS[spec.model]
    param_shapes = shapes.layer_shapes(model)
    params, grads = ([torch.randn(s, device=device) for s in param_shapes] for _ in range(2))
    expected = []
    for i in (0, len(params) - 1):  # a large one and a small one
        leaf = torch.nn.Parameter(params[i].double())
        leaf.grad = grads[i].double()
        torch.optim.AdamW([leaf], **ADAMW, foreach=False).step()
        expected.append(Expected(f"parameter {i}", leaf.detach(), lambda results, i=i: results[i]))
    return Problem(
        **spec.to_json(),
        inputs=[*params, *grads],
        douts=[],
        work=shapes.adamw_work(model),
        limit=MAX_STEP_ERROR,
        expected=expected,
        note=f"{len(params)} tensors",
    )

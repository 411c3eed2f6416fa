"""Who computes rope, rms_norm, swiglu and AdamW's step: ours and the peers."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from lclm_kernels.adamw import AdamW
from lclm_kernels.rms_norm import rms_norm
from lclm_kernels.rope import apply_rope, apply_rope_to_qkv
from lclm_kernels.swiglu import swiglu

from .attention_peers import our_implementation
from .contest import OURS, Peer, Problem, Run, Tensors, autograd_run
from .problems import (
    ADAMW,
    EPS,
    RopeProblem,
    rms_norm_formula,
    rotate,
    swiglu_formula,
    wide_tables,
)

__all__ = ["ADAMW_PEERS", "RMS_NORM_PEERS", "ROPE_PEERS", "SWIGLU_PEERS", "compiled"]


def compiled(formula: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for exactly these shapes, whatever was compiled before."""
    torch.compiler.reset()
    return torch.compile(formula, dynamic=False)


def our_rope(problem: RopeProblem) -> Run:
    """Queries and keys in a launch each, into new tensors."""
    wish = our_implementation(problem.cos.device)
    tables = (problem.cos, problem.sin, wish)
    return autograd_run(lambda q, k: [apply_rope(x, *tables) for x in (q, k)], problem)


def our_packed_rope(problem: RopeProblem) -> Run:
    """As the model does it: queries and keys of packed qkv in place, in one launch."""
    q, k = (x.detach() for x in problem.inputs)
    num_tokens, num_kv_heads, head_dim = k.shape
    heads_shape = (num_kv_heads, q.shape[1] // num_kv_heads + 2, head_dim)
    tables = (problem.cos, problem.sin)
    wish = our_implementation(q.device)

    def pack(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        queries = queries.view(num_tokens, num_kv_heads, -1, head_dim)
        return torch.cat([queries, keys[:, :, None], torch.zeros_like(keys)[:, :, None]], dim=2)

    def unpack(qkv: torch.Tensor) -> Tensors:
        return [qkv[:, :, :-2].reshape(q.shape), qkv[:, :, -2].reshape(k.shape)]

    source = pack(q, k).requires_grad_()
    dqkv = pack(*problem.douts)
    kept: Tensors = []

    def setup() -> None:
        kept[:] = [source.clone()]  # autograd lets no leaf be modified in place

    def forward() -> Tensors:
        kept[:] = [apply_rope_to_qkv(kept[0], *tables, heads_shape, wish)]
        return [kept[0].detach()]

    def backward() -> Tensors:
        return list(torch.autograd.grad(kept[0], [source], [dqkv]))

    return Run({"fwd": forward, "bwd": backward}, setup, unpack)


def liger_rope(problem: RopeProblem) -> Run:
    """Liger turns its arguments in place; [1, N, T, H] whose memory is [T, N, H], as in models."""
    from liger_kernel.ops.rope import LigerRopeFunction

    cos, sin = (table[:, 0] for table in wide_tables(problem.cos, problem.sin))

    def run(q: torch.Tensor, k: torch.Tensor) -> Tensors:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k))
        outs = LigerRopeFunction.apply(*heads_first, cos, sin)
        return [out[0].transpose(0, 1) for out in outs]

    return autograd_run(run, problem)


def quack_rope(problem: RopeProblem) -> Run:
    """A launch for the queries and one for the keys, [1, T, N, H]."""
    from quack.rotary import apply_rotary_emb

    tables = (problem.cos, problem.sin)
    return autograd_run(
        lambda q, k: [apply_rotary_emb(x[None], *tables)[0] for x in (q, k)], problem
    )


def compiled_rope(problem: RopeProblem) -> Run:
    """torch.compile of the formula, queries and keys together."""
    tables = wide_tables(problem.cos, problem.sin)

    def formula(q: torch.Tensor, k: torch.Tensor) -> Tensors:
        return [rotate(x.float(), *tables).to(x.dtype) for x in (q, k)]

    return autograd_run(compiled(formula), problem)


def our_rms_norm(problem: Problem) -> Run:
    """This package's."""
    wish = our_implementation(problem.inputs[0].device)
    return autograd_run(lambda x, weight: rms_norm(x, weight, EPS, wish), problem)


def liger_rms_norm(problem: Problem) -> Run:
    """With Llama's rounding; not over the gradient that comes in, which the next round needs."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return autograd_run(
        lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False), problem
    )


def quack_rms_norm(problem: Problem) -> Run:
    """CuTe."""
    from quack.rmsnorm import rmsnorm

    return autograd_run(lambda x, weight: rmsnorm(x, weight, eps=EPS), problem)


def torch_rms_norm(problem: Problem) -> Run:
    """PyTorch's own operator."""
    size = problem.inputs[1].shape
    return autograd_run(lambda x, weight: functional.rms_norm(x, size, weight, EPS), problem)


def compiled_rms_norm(problem: Problem) -> Run:
    """torch.compile of the formula."""
    return autograd_run(compiled(rms_norm_formula), problem)


def apex_rms_norm(problem: Problem) -> Run:
    """Apex's CUDA kernel."""
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    size = list(problem.inputs[1].shape)
    return autograd_run(lambda x, weight: fused_rms_norm_affine(x, weight, size, EPS), problem)


def te_rms_norm(problem: Problem) -> Run:
    """Transformer Engine's module, whose weight is the problem's."""
    from transformer_engine.pytorch import RMSNorm

    x, weight = problem.fresh_inputs()
    module = RMSNorm(weight.shape[0], eps=EPS, device=x.device, dtype=weight.dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
    return autograd_run(lambda x, _: module(x), problem, [x, module.weight])


def our_swiglu(problem: Problem) -> Run:
    """This package's."""
    wish = our_implementation(problem.inputs[0].device)
    return autograd_run(lambda x: swiglu(x, wish), problem)


def liger_swiglu(problem: Problem) -> Run:
    """Liger's form for gate and up in one tensor."""
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return autograd_run(LigerFusedGateUpSiLUMulFunction.apply, problem)


def compiled_swiglu(problem: Problem) -> Run:
    """torch.compile of the formula."""
    return autograd_run(compiled(swiglu_formula), problem)


def _step_run(make: Callable[[Tensors], torch.optim.Optimizer], problem: Problem) -> Run:
    """A step of an optimizer made from the parameters; its results are the parameters."""
    tensors = problem.fresh_inputs()
    half = len(tensors) // 2
    params: Tensors = [torch.nn.Parameter(x) for x in tensors[:half]]
    for param, grad in zip(params, tensors[half:]):
        param.grad = grad
    optimizer = make(params)

    def step() -> Tensors:
        optimizer.step()
        return params

    return Run({"step": step})


def our_adamw(problem: Problem) -> Run:
    """This package's, one launch."""
    wish = our_implementation(problem.inputs[0].device)
    return _step_run(lambda params: AdamW(params, **ADAMW, implementation=wish), problem)


def torch_adamw(setting: str) -> Callable[[Problem], Run]:
    """PyTorch's, `fused` or `foreach`."""

    def make(problem: Problem) -> Run:
        choice = {setting: True}
        return _step_run(lambda params: torch.optim.AdamW(params, **ADAMW, **choice), problem)

    return make


def apex_adamw(problem: Problem) -> Run:
    """Apex's multi-tensor kernel."""
    from apex.optimizers import FusedAdam

    return _step_run(lambda params: FusedAdam(params, **ADAMW), problem)


def te_adamw(problem: Problem) -> Run:
    """Transformer Engine's multi-tensor kernel."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    return _step_run(lambda params: FusedAdam(params, **ADAMW), problem)


ROPE_PEERS = (
    Peer(OURS, our_rope),
    Peer(f"{OURS}, packed", our_packed_rope),
    Peer("Liger", liger_rope),
    Peer("quack", quack_rope),
    Peer("torch.compile", compiled_rope),
)
RMS_NORM_PEERS = (
    Peer(OURS, our_rms_norm),
    Peer("Liger", liger_rms_norm),
    Peer("quack", quack_rms_norm),
    Peer("torch", torch_rms_norm),
    Peer("torch.compile", compiled_rms_norm),
    Peer("Apex", apex_rms_norm),
    Peer("Transformer Engine", te_rms_norm),
)
SWIGLU_PEERS = (
    Peer(OURS, our_swiglu),
    Peer("Liger", liger_swiglu),
    Peer("torch.compile", compiled_swiglu),
)
ADAMW_PEERS = (
    Peer(OURS, our_adamw),
    Peer("torch fused", torch_adamw("fused")),
    Peer("torch foreach", torch_adamw("foreach")),
    Peer("Apex", apex_adamw),
    Peer("Transformer Engine", te_adamw),
)

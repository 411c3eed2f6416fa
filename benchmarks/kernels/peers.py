"""Who computes each operator: ours, PyTorch's own, and the peers (see `PEERS`)."""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lclm_kernels.adamw import AdamW
from lclm_kernels.backend import IS_INTERPRETED
from lclm_kernels.interval_attention import interval_attention, make_plan
from lclm_kernels.linear_cross_entropy import linear_cross_entropy
from lclm_kernels.rms_norm import rms_norm
from lclm_kernels.rope import apply_rope, apply_rope_to_qkv
from lclm_kernels.swiglu import swiglu

from .contest import FLOOR, OURS, AbsentError, Peer, Problem, Run, Tensors, autograd_run
from .cudnn_thd import CudnnRow, run_graphs
from .operators import ADAMW, EPS

Function = Callable[..., Any]


def why_missing(peer: Peer) -> str:
    """Why the peer's package cannot be imported, "" if nothing is known against it."""
    top = peer.symbol.partition(":")[0].partition(".")[0]
    return f"no module {top} is installed" if top and not importlib.util.find_spec(top) else ""


def which(problem: Problem) -> dict[str, str]:
    """Triton by name, where it runs: another implementation must not be timed in its place."""
    is_gpu = problem.inputs[0].device.type == "cuda"
    return {"implementation": "triton" if is_gpu or IS_INTERPRETED else "auto"}


def eager(problem: Problem) -> Function:
    """The formula as it stands."""
    assert problem.formula is not None
    return problem.formula


def compiled(problem: Problem) -> Function:
    """torch.compile of the formula for exactly these shapes, whatever was compiled before."""
    torch.compiler.reset()
    return torch.compile(eager(problem), dynamic=False)


# Attention in packed documents


def our_attention(problem: Problem) -> Function:
    """This package's kernel; the plan is made here, as the loader does ahead of time."""
    lengths, scale = problem.constants["lengths"], problem.constants["scale"]
    lo = np.repeat(np.cumsum(lengths) - lengths, lengths).astype(np.int32)
    plan = make_plan(lo, np.arange(1, len(lo) + 1, dtype=np.int32), len(lo))
    return functools.partial(interval_attention, plan=plan, scale=scale, **which(problem))


def heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[T, N, H] to [1, N, T, H], as views."""
    return [x.transpose(0, 1)[None] for x in tensors]


def sdpa(backend: SDPBackend, problem: Problem) -> Function:
    """PyTorch's dense attention with one backend."""
    if len(problem.constants["lengths"]) > 1:
        raise AbsentError("dense causal attention, knows no documents")
    settings = {"is_causal": True, "scale": problem.constants["scale"], "enable_gqa": True}

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            out = functional.scaled_dot_product_attention(*heads_first(*qkv), **settings)
        return out[0].transpose(0, 1)

    return attend


def document_starts(problem: Problem) -> tuple[torch.Tensor, int]:
    """Where documents start and end, int32 [documents + 1] on the device; the longest length."""
    lengths = problem.constants["lengths"]
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return torch.from_numpy(ends).to(problem.inputs[0].device), int(lengths.max())


def torch_packed(problem: Problem) -> Function:
    """PyTorch's varlen attention (2.10 and newer); on a CPU, which has none, with a dense mask."""
    scale = problem.constants["scale"]
    if problem.inputs[0].device.type == "cpu":
        mask = dense_mask(problem.constants["lengths"])
        settings = {"attn_mask": mask, "scale": scale, "enable_gqa": True}
        attend = functional.scaled_dot_product_attention
        return lambda *qkv: attend(*heads_first(*qkv), **settings)[0].transpose(0, 1)
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = document_starts(problem)
    settings = {"scale": scale, "window_size": (-1, 0)}
    # Query groups: torch 2.11 takes them as they come, later ones want to be told.
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        settings["enable_gqa"] = True
    return lambda q, k, v: varlen_attn(q, k, v, starts, starts, longest, longest, **settings)


def dense_mask(lengths: np.ndarray) -> torch.Tensor:
    """Who sees whom, bool [T, T]: causal, within documents."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.from_numpy(lengths))
    return (document[:, None] == document).tril()


def flash(problem: Problem, flash_attn_varlen_func: Function) -> Function:
    """The flash-attn packages of any generation; the arguments named here are in all of them."""
    starts, longest = document_starts(problem)
    settings = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "causal": True}
    settings |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    settings["softmax_scale"] = problem.constants["scale"]

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        out = flash_attn_varlen_func(*qkv, **settings)
        return out[0] if isinstance(out, tuple) else out

    return attend


@functools.lru_cache(maxsize=1)
def compiled_flex(
    num_tokens: int, num_heads: int, device: torch.device
) -> tuple[torch.Tensor, Function, Function]:
    """Document numbers to fill in, the mask function that reads them, and compiled FlexAttention.

    Rows of one size share all three, so that a row's documents change without compiling again.
    """
    torch.compiler.reset()
    document = torch.zeros(num_tokens, dtype=torch.int32, device=device)

    def sees(b: Any, h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (document[query] == document[key]) & (query >= key)

    return document, sees, torch.compile(flex_attention, dynamic=False)


def flex(problem: Problem) -> Function | Run:
    """Compiled FlexAttention with a causal document mask, which is made here and not timed.

    On a CPU it has no backward.
    """
    query, lengths = problem.inputs[0], problem.constants["lengths"]
    tokens = len(query)
    document, sees, attend = compiled_flex(tokens, query.shape[1], query.device)
    document.copy_(torch.from_numpy(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)))
    mask = create_block_mask(sees, None, None, tokens, tokens, device=query.device, _compile=True)
    settings = {"block_mask": mask, "scale": problem.constants["scale"], "enable_gqa": True}

    def run(*qkv: torch.Tensor) -> torch.Tensor:
        return attend(*heads_first(*qkv), **settings)[0].transpose(0, 1)

    if query.device.type != "cpu":
        return run
    inputs = [x.detach() for x in problem.fresh_inputs()]
    return Run({"fwd": lambda: [run(*inputs)]}, is_partial=True)


def cudnn_thd(problem: Problem, create_handle: Function) -> Run:
    """cuDNN with ragged offsets, one document or many."""
    import cudnn

    q, k, _ = problem.inputs
    heads = (q.shape[1], k.shape[1], q.shape[2])
    row = CudnnRow(cudnn, problem.constants["lengths"], heads, problem.constants["scale"], q)
    handle = create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    return run_graphs(problem, row.stats, row.forward(handle), row.backward(handle))


# Output projection and cross entropy: the sum over labels that all count. Most make the gradients
# in the forward, so both are timed as one.


def our_loss(problem: Problem, chunk_tokens: int = 2048) -> Function:
    """This package's; 2048 is what the trainer takes if not told otherwise."""
    settings: dict[str, Any] = {"chunk_tokens": chunk_tokens, **which(problem)}
    labels = problem.constants["labels"]
    return lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, **settings)[0]


def products_alone(problem: Problem) -> Run:
    """The three matrix products with nothing between them: what no loss can go below."""
    hidden, weight = (x.detach() for x in problem.inputs)
    dlogits = torch.randn(len(hidden), len(weight), device=hidden.device, dtype=hidden.dtype)

    def products() -> Tensors:
        return [hidden @ weight.t(), dlogits @ weight, dlogits.t() @ hidden]

    return Run({"step": products})


def summed(problem: Problem, loss: Function, **settings: Any) -> Function:
    """A loss of (hidden, weight, labels, reduction=...)."""
    labels = problem.constants["labels"]
    return lambda hidden, weight: loss(hidden, weight, labels, reduction="sum", **settings)


def torch_chunked_loss(problem: Problem, loss: Function) -> Function:
    """PyTorch's chunked operator (newer than 2.11)."""
    from torch.nn import LinearCrossEntropyOptions

    return summed(problem, loss, options=LinearCrossEntropyOptions())


# RMSNorm and RoPE; SwiGLU's are all in the table


def liger_rms_norm(_: Problem, norm: Any) -> Function:
    """Llama's rounding; not over the gradient that comes in, which the next round needs."""
    return lambda x, weight: norm.apply(x, weight, EPS, 0.0, "llama", False)


def te_rms_norm(problem: Problem, module_type: Function) -> Run:
    """Transformer Engine's module, whose weight is the problem's."""
    x, weight = problem.fresh_inputs()
    module = module_type(weight.shape[0], eps=EPS, device=x.device, dtype=weight.dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
    return autograd_run(lambda x, _: module(x), problem, [x, module.weight])


def our_rope(problem: Problem) -> Function:
    """Queries and keys in a launch each, into new tensors."""
    cos, sin = problem.constants["tables"]
    settings = which(problem)
    return lambda q, k: [apply_rope(x, cos, sin, **settings) for x in (q, k)]


def our_packed_rope(problem: Problem) -> Run:
    """As the model does it: queries and keys of packed qkv in place, in one launch."""
    q, k = (x.detach() for x in problem.inputs)
    num_tokens, num_kv_heads, head_dim = k.shape
    heads_shape = (num_kv_heads, q.shape[1] // num_kv_heads + 2, head_dim)
    cos, sin = problem.constants["tables"]
    settings = which(problem)

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
        kept[:] = [apply_rope_to_qkv(kept[0], cos, sin, heads_shape, **settings)]
        return [kept[0].detach()]

    def backward() -> Tensors:
        return list(torch.autograd.grad(kept[0], [source], [dqkv]))

    return Run({"fwd": forward, "bwd": backward}, setup, unpack)


def liger_rope(problem: Problem, rope: Any) -> Function:
    """Liger turns its arguments in place; [1, N, T, H] whose memory is [T, N, H], as in models."""
    cos, sin = (table[:, 0] for table in problem.constants["wide"])

    def run(q: torch.Tensor, k: torch.Tensor) -> Tensors:
        outs = rope.apply(*heads_first(q, k), cos, sin)
        return [out[0].transpose(0, 1) for out in outs]

    return run


def quack_rope(problem: Problem, apply_rotary_emb: Function) -> Function:
    """A launch for the queries and one for the keys, [1, T, N, H]."""
    cos, sin = problem.constants["tables"]
    return lambda q, k: [apply_rotary_emb(x[None], cos, sin)[0] for x in (q, k)]


# AdamW


def step(problem: Problem, make: Callable[..., torch.optim.Optimizer], **settings: Any) -> Run:
    """A step of an optimizer made from the parameters; its results are the parameters."""
    tensors = problem.fresh_inputs()
    half = len(tensors) // 2
    params: Tensors = [torch.nn.Parameter(x) for x in tensors[:half]]
    for param, grad in zip(params, tensors[half:]):
        param.grad = grad
    optimizer = make(params, **ADAMW, **settings)

    def run() -> Tensors:
        optimizer.step()
        return params

    return Run({"step": run})


FLASH, CCE = "flash_attn_varlen_func", "cut_cross_entropy:linear_cross_entropy"
LIGER_LOSS = "liger_kernel.transformers.functional:liger_fused_linear_cross_entropy"
QUACK_LOSS = "quack.linear_cross_entropy:chunked_linear_cross_entropy"
APEX_NORM = "apex.normalization.fused_layer_norm:fused_rms_norm_affine"
LIGER = "liger_kernel.ops"
part = functools.partial
# By operator: ours, PyTorch's own, which is timed beside every other, and the others.
PEERS: dict[str, tuple[Peer, ...]] = {
    "interval_attention": (
        Peer(OURS, our_attention),
        Peer("torch packed", torch_packed),
        Peer("SDPA cuDNN", part(sdpa, SDPBackend.CUDNN_ATTENTION)),
        Peer("SDPA flash", part(sdpa, SDPBackend.FLASH_ATTENTION)),
        Peer("FlexAttention", flex),
        Peer("cuDNN packed", cudnn_thd, "cudnn:create_handle"),
        Peer("FlashAttention-4", flash, f"flash_attn.cute:{FLASH}"),  # CuTe
        Peer("FlashAttention-3", flash, f"flash_attn_interface:{FLASH}"),  # its folder `hopper`
        Peer("FlashAttention-2", flash, f"flash_attn:{FLASH}"),
    ),
    "linear_cross_entropy": (
        Peer(OURS, our_loss),
        Peer("torch eager", eager),
        Peer(f"{OURS}, chunks of 8192", part(our_loss, chunk_tokens=8192)),
        Peer(f"{FLOOR}: 3 products", products_alone),
        Peer("torch chunked", torch_chunked_loss, "torch.nn.functional:linear_cross_entropy"),
        Peer("torch.compile", compiled),
        # Triton, with its own size of chunks
        Peer("Liger", summed, LIGER_LOSS),
        # CuTe; on Hopper it chooses its fused backward by itself
        Peer("quack", summed, QUACK_LOSS),
        # By default it leaves out gradients too small for bf16. Vocabularies of any size.
        Peer("Cut Cross Entropy", part(summed, filter_eps="high"), CCE),
        Peer("Cut Cross Entropy, exact", part(summed, filter_eps=None), CCE),
    ),
    "rms_norm": (
        Peer(OURS, lambda problem: part(rms_norm, eps=EPS, **which(problem))),
        Peer("torch", lambda _: lambda x, w: functional.rms_norm(x, w.shape, w, EPS)),
        Peer("torch.compile", compiled),
        Peer("Liger", liger_rms_norm, f"{LIGER}.rms_norm:LigerRMSNormFunction"),
        Peer("quack", lambda _, norm: part(norm, eps=EPS), "quack.rmsnorm:rmsnorm"),
        Peer("Apex", lambda _, norm: lambda x, w: norm(x, w, list(w.shape), EPS), APEX_NORM),
        Peer("Transformer Engine", te_rms_norm, "transformer_engine.pytorch:RMSNorm"),
    ),
    "swiglu": (
        Peer(OURS, lambda problem: part(swiglu, **which(problem))),
        Peer("torch eager", eager),
        Peer("torch.compile", compiled),
        # its form for gate and up in one tensor
        Peer(
            "Liger", lambda _, gate: gate.apply, f"{LIGER}.swiglu:LigerFusedGateUpSiLUMulFunction"
        ),
    ),
    "rope": (
        Peer(OURS, our_rope),
        Peer("torch eager", eager),
        Peer(f"{OURS}, packed", our_packed_rope),
        Peer("torch.compile", compiled),
        Peer("Liger", liger_rope, f"{LIGER}.rope:LigerRopeFunction"),
        Peer("quack", quack_rope, "quack.rotary:apply_rotary_emb"),
    ),
    "adamw": (
        Peer(OURS, lambda problem: step(problem, AdamW, **which(problem))),
        Peer("torch fused", part(step, make=torch.optim.AdamW, fused=True)),
        Peer("torch foreach", part(step, make=torch.optim.AdamW, foreach=True)),
        Peer("Apex", step, "apex.optimizers:FusedAdam"),
        Peer("Transformer Engine", step, "transformer_engine.pytorch.optimizers:FusedAdam"),
    ),
}


def contestants(op: str, name: str) -> list[Peer]:
    """Ours, PyTorch's own and the named peer, which may be PyTorch's own."""
    ours, own, *_ = PEERS[op]
    peer = next(peer for peer in PEERS[op] if peer.name == name)
    return [ours, own] if peer is own else [ours, own, peer]

"""Who computes attention in packed documents: ours, PyTorch's, and the flash-attn packages.

Each `make` takes an AttentionProblem and returns a Run whose results are out, dq, dk, dv.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lclm_kernels.backend import IS_INTERPRETED
from lclm_kernels.interval_attention import interval_attention, make_plan

from .attention_problem import AttentionProblem
from .contest import OURS, AbsentError, Peer, Run, autograd_run
from .cudnn_peer import cudnn_packed

__all__ = ["ATTENTION_PEERS", "our_implementation"]


def our_implementation(device: torch.device) -> str:
    """Triton by name, where it runs: another implementation must not be timed in its place."""
    return "triton" if device.type == "cuda" or IS_INTERPRETED else "auto"


def ours(problem: AttentionProblem) -> Run:
    """This package's kernel; the plan is made here, as the loader does ahead of time."""
    ends = np.cumsum(problem.lengths)
    lo = np.repeat(ends - problem.lengths, problem.lengths).astype(np.int32)
    plan = make_plan(lo, np.arange(1, len(lo) + 1, dtype=np.int32), len(lo))
    wish = our_implementation(problem.inputs[0].device)
    return autograd_run(
        lambda q, k, v: interval_attention(q, k, v, plan, problem.scale, wish), problem
    )


def _heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[T, N, H] to [1, N, T, H], as views."""
    return [x.transpose(0, 1)[None] for x in tensors]


def sdpa(backend: SDPBackend) -> Callable[[AttentionProblem], Run]:
    """PyTorch's dense attention with one backend."""

    def make(problem: AttentionProblem) -> Run:
        if len(problem.lengths) > 1:
            raise AbsentError("dense causal attention, knows no documents")

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(
                    *_heads_first(q, k, v), is_causal=True, scale=problem.scale, enable_gqa=True
                )
            return out[0].transpose(0, 1)

        return autograd_run(attend, problem)

    return make


def _starts(problem: AttentionProblem) -> tuple[torch.Tensor, int]:
    """Where documents start and end, int32 [documents + 1] on the device; the longest length."""
    ends = np.concatenate([[0], np.cumsum(problem.lengths)]).astype(np.int32)
    starts = torch.from_numpy(ends).to(problem.inputs[0].device)
    return starts, int(problem.lengths.max())


def torch_varlen(problem: AttentionProblem) -> Run:
    """PyTorch's FlashAttention-2 on packed documents (torch 2.10 and newer)."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = _starts(problem)
    # Query groups: torch 2.11 takes them as they come, later ones want to be told.
    settings = inspect.signature(varlen_attn).parameters
    grouped = {"enable_gqa": True} if "enable_gqa" in settings else {}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        sizes = (starts, starts, longest, longest)
        return varlen_attn(q, k, v, *sizes, scale=problem.scale, window_size=(-1, 0), **grouped)

    return autograd_run(attend, problem)


@functools.lru_cache(maxsize=1)
def _compiled_flex(
    num_tokens: int, num_heads: int, device: torch.device
) -> tuple[torch.Tensor, Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """Document numbers to fill in, the mask function that reads them, and compiled FlexAttention.

    Rows of one size share all three, so that a row's documents change without compiling again.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    document = torch.zeros(num_tokens, dtype=torch.int32, device=device)

    def sees(b: Any, h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (document[query] == document[key]) & (query >= key)

    return document, sees, torch.compile(flex_attention, dynamic=False)


def flex(problem: AttentionProblem) -> Run:
    """Compiled FlexAttention with a causal document mask, which is made here and not timed."""
    from torch.nn.attention.flex_attention import create_block_mask

    query = problem.inputs[0]
    num_tokens, num_heads, _ = query.shape
    document, sees, attend = _compiled_flex(num_tokens, num_heads, query.device)
    numbers = np.repeat(np.arange(len(problem.lengths), dtype=np.int32), problem.lengths)
    document.copy_(torch.from_numpy(numbers))
    mask = create_block_mask(
        sees, None, None, num_tokens, num_tokens, device=query.device, _compile=True
    )

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attend(*_heads_first(q, k, v), block_mask=mask, scale=problem.scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    return autograd_run(run, problem)


def _packed_flash(function: Callable[..., Any], problem: AttentionProblem) -> Run:
    """A flash_attn_varlen_func of any generation; the arguments named here are in all of them."""
    starts, longest = _starts(problem)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = function(
            q,
            k,
            v,
            cu_seqlens_q=starts,
            cu_seqlens_k=starts,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=problem.scale,
            causal=True,
        )
        return out[0] if isinstance(out, tuple) else out

    return autograd_run(attend, problem)


def flash_4(problem: AttentionProblem) -> Run:
    """FlashAttention-4 (CuTe; package flash-attn-4)."""
    from flash_attn.cute import flash_attn_varlen_func

    return _packed_flash(flash_attn_varlen_func, problem)


def flash_3(problem: AttentionProblem) -> Run:
    """FlashAttention-3, built from the `hopper` folder of its repository."""
    from flash_attn_interface import flash_attn_varlen_func

    return _packed_flash(flash_attn_varlen_func, problem)


def flash_2(problem: AttentionProblem) -> Run:
    """FlashAttention-2 (package flash-attn)."""
    from flash_attn import flash_attn_varlen_func

    return _packed_flash(flash_attn_varlen_func, problem)


ATTENTION_PEERS = (
    Peer(OURS, ours),
    Peer("SDPA cuDNN", sdpa(SDPBackend.CUDNN_ATTENTION)),
    Peer("SDPA flash", sdpa(SDPBackend.FLASH_ATTENTION)),
    Peer("torch varlen", torch_varlen),
    Peer("FlexAttention", flex),
    Peer("cuDNN packed", cudnn_packed),
    Peer("FlashAttention-4", flash_4),
    Peer("FlashAttention-3", flash_3),
    Peer("FlashAttention-2", flash_2),
)

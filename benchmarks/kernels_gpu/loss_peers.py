"""Who computes the output projection with cross entropy: ours and the peers, forward and backward.

Most make the gradients in the forward, so both are timed as one. Every sum of losses is over
labels that all count.
"""

from typing import Any

import torch
from torch.nn import functional

from lclm_kernels.linear_cross_entropy import linear_cross_entropy

from .attention_peers import our_implementation
from .contest import FLOOR, OURS, AbsentError, Peer, Run, whole_run
from .problems import LossProblem
from .row_peers import compiled

__all__ = ["LOSS_PEERS"]


def ours(problem: LossProblem, chunk_tokens: int = 2048) -> Run:
    """This package's; 2048 is what the trainer takes if not told otherwise."""
    wish = our_implementation(problem.labels.device)

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        settings: dict[str, Any] = {"chunk_tokens": chunk_tokens, "implementation": wish}
        return linear_cross_entropy(hidden, weight, problem.labels, **settings)[0]

    return whole_run(loss, problem)


def products_alone(problem: LossProblem) -> Run:
    """The three matrix products with nothing between them: what no loss can go below."""
    hidden, weight = (x.detach() for x in problem.inputs)
    dlogits = torch.randn(len(hidden), len(weight), device=hidden.device, dtype=hidden.dtype)
    logits = torch.empty_like(dlogits)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def products() -> list[torch.Tensor]:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(dlogits, weight, out=dhidden)
        torch.mm(dlogits.t(), hidden, out=dweight)
        return [logits, dhidden, dweight]

    return Run({"step": products})


def liger(problem: LossProblem) -> Run:
    """Liger's Triton version with its own size of chunks."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return whole_run(
        lambda hidden, weight: liger_fused_linear_cross_entropy(
            hidden, weight, problem.labels, reduction="sum"
        ),
        problem,
    )


def quack(problem: LossProblem) -> Run:
    """quack's CuTe version; on Hopper it chooses its fused backward by itself."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return whole_run(
        lambda hidden, weight: chunked_linear_cross_entropy(
            hidden, weight, problem.labels, reduction="sum"
        ),
        problem,
    )


def cut_cross_entropy(problem: LossProblem, filter_eps: str | None = "high") -> Run:
    """Apple's; by default it leaves out gradients too small for bf16. Vocabularies of any size."""
    from cut_cross_entropy import linear_cross_entropy as cce

    return whole_run(
        lambda hidden, weight: cce(
            hidden, weight, problem.labels, reduction="sum", filter_eps=filter_eps
        ),
        problem,
    )


def torch_own(problem: LossProblem) -> Run:
    """PyTorch's chunked operator (newer than 2.11)."""
    if not hasattr(functional, "linear_cross_entropy"):
        raise AbsentError(f"torch {torch.__version__} has no linear_cross_entropy")
    from torch.nn import LinearCrossEntropyOptions

    return whole_run(
        lambda hidden, weight: functional.linear_cross_entropy(
            hidden, weight, problem.labels, reduction="sum", options=LinearCrossEntropyOptions()
        ),
        problem,
    )


def torch_compiled(problem: LossProblem) -> Run:
    """torch.compile of projection and cross entropy: logits of all tokens."""

    def formula(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(hidden, weight).float()
        return functional.cross_entropy(logits, problem.labels, reduction="sum")

    return whole_run(compiled(formula), problem)


LOSS_PEERS = (
    Peer(OURS, ours),
    Peer(f"{OURS}, chunks of 8192", lambda problem: ours(problem, 8192)),
    Peer(f"{FLOOR}: 3 products", products_alone),
    Peer("Liger", liger),
    Peer("quack", quack),
    Peer("Cut Cross Entropy", cut_cross_entropy),
    Peer("Cut Cross Entropy, exact", lambda problem: cut_cross_entropy(problem, None)),
    Peer("torch chunked", torch_own),
    Peer("torch.compile", torch_compiled),
)

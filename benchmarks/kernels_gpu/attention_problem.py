"""Attention in packed documents: inputs, and the truth in fp32 at any length.

The last rows of a document see all of its keys, and its last keys are seen by those rows only. So
out, dq, dk and dv of a document's tail are exact by definition at the cost of the tail's rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from . import shapes
from .contest import Expected, Problem, Tensors
from .problems import MAX_ERROR, random
from .shapes import MODELS, Spec

TAIL = 256  # rows
NUM_CHECKED = 8  # documents of a row


@dataclass(kw_only=True)
class AttentionProblem(Problem):
    """inputs q [T, N, H], k and v [T, K, H]; lengths int64 [documents] add up to T."""

    lengths: np.ndarray
    scale: float


def attention_problem(
    spec: Spec, device: torch.device, dtype: torch.dtype, lengths: np.ndarray | None = None
) -> AttentionProblem:
    """A row of documents; `lengths` instead of the spec's own, to check a row of one's choice."""
    model = MODELS[spec.model]
    lengths = shapes.document_lengths(spec) if lengths is None else lengths
    num_tokens = int(lengths.sum())
    heads = (model.N, model.K, model.K)
    inputs = [random((num_tokens, n, model.H), device, dtype) for n in heads]
    dout = torch.randn_like(inputs[0])
    scale = model.H**-0.5
    return AttentionProblem(
        **spec.to_json(),
        inputs=inputs,
        douts=[dout],
        work=shapes.attention_work(model, lengths),
        limit=MAX_ERROR,
        expected=expect_tails([x.detach() for x in inputs], dout, lengths, scale),
        note=f"{len(lengths)} documents, longest {lengths.max()}",
        lengths=lengths,
        scale=scale,
    )


def checked_documents(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, end) of some documents: the longest, the shortest, first, last, and between."""
    ends = np.cumsum(lengths)
    spread = np.linspace(0, len(lengths) - 1, NUM_CHECKED - 2).round().astype(int)
    for number in sorted({int(lengths.argmax()), int(lengths.argmin()), *spread.tolist()}):
        yield int(ends[number] - lengths[number]), int(ends[number])


def expect_tails(
    qkv: Tensors, dout: torch.Tensor, lengths: np.ndarray, scale: float
) -> list[Expected]:
    """The truth of out, dq, dk, dv in the tails of the checked documents."""
    tails: list[Tensors] = []
    rows = []
    for start, end in checked_documents(lengths):
        tail = min(TAIL, end - start)
        rows.append(torch.arange(end - tail, end, device=dout.device))
        tails.append(tail_of_document([x[start:end] for x in qkv], dout[start:end], tail, scale))
    row_numbers = torch.cat(rows)
    return [
        Expected(name, torch.cat(values), lambda results, i=i: results[i][row_numbers])
        for i, (name, values) in enumerate(zip(("out", "dq", "dk", "dv"), zip(*tails)))
    ]


def tail_of_document(qkv: Tensors, dout: torch.Tensor, tail: int, scale: float) -> Tensors:
    """out and dq of the last `tail` rows of one document, dk and dv of its last `tail` keys.

    Args:
        qkv: q [L, N, H], k and v [L, K, H] of the document; dout [L, N, H].

    Returns:
        fp32 [tail, N, H] twice, [tail, K, H] twice. By kv head, to hold tail x L scores of one
        group of query heads at a time.
    """
    q, k, v = qkv
    length, num_kv_heads, head_dim = k.shape
    groups = (tail, num_kv_heads, -1, head_dim)
    q_tail, dout_tail = (x[length - tail :].float().view(groups) for x in (q, dout))
    keys = torch.arange(length, device=q.device)
    hidden = keys > keys[length - tail :, None]
    outs, dqs, dks, dvs = [], [], [], []
    for head in range(num_kv_heads):
        key, value = (x[:, head].float() for x in (k, v))
        query, dout_head = (x[:, head].transpose(0, 1) for x in (q_tail, dout_tail))  # [G, tail, H]
        scores = (scale * query @ key.t()).masked_fill_(hidden, float("-inf"))
        probabilities = scores.softmax(dim=-1)
        outs.append((probabilities @ value).transpose(0, 1))
        dprobabilities = dout_head @ value.t()
        delta = (probabilities * dprobabilities).sum(dim=-1, keepdim=True)
        dscores = probabilities * (dprobabilities - delta)
        dqs.append((scale * dscores @ key).transpose(0, 1))
        last = slice(length - tail, length)
        dks.append(scale * torch.einsum("gts,gth->sh", dscores[..., last], query))
        dvs.append(torch.einsum("gts,gth->sh", probabilities[..., last], dout_head))
    out, dq = (torch.stack(x, dim=1).flatten(1, 2) for x in (outs, dqs))
    dk, dv = (torch.stack(x, dim=1) for x in (dks, dvs))
    return [out, dq, dk, dv]

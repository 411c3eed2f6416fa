"""The operators: on which models and rows they are timed, inputs, work at the least, and truths.

The truth is the operator's formula in fp32 (AdamW: fp64) on the same inputs; where that would take
too much memory, for some tokens. Letters: T tokens, N query heads, K kv heads, H head size, D model
size, F feed-forward size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.timing import HISTOGRAM
from lclm.context.plan.lengths import read_histogram
from lclm_kernels.rope import build_rope_table

from .contest import Expected, Problem, Tensors, Work

ONE_DOCUMENT, RAGGED, SHORT = "one document", "ragged", "documents of 4"
FP32 = 4  # bytes
EPS = 1e-5  # of RMSNorm
ROPE_BASE = 5e5
ADAMW: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CHUNK_TOKENS = 1024  # of what is computed in pieces
TAIL_TOKENS = 256  # of a document, that attention is checked on
CHECKED_DOCUMENTS = 8
# Largest relative errors: for bf16 several times what one rounding of results and intermediates
# (2^-9) makes. Liger adds up the weight's gradient of the loss in bf16, over 32 chunks by default.
# AdamW's steps are in fp32 always.
MAX_ERROR = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
MAX_LOSS_ERROR = {torch.bfloat16: 3e-2, torch.float32: 1e-5}


@dataclass(frozen=True)
class Model:
    """Sizes of one process's part of a model."""

    D: int
    F: int
    N: int
    K: int
    H: int
    V: int

    def layer_shapes(self) -> list[tuple[int, ...]]:
        """The parameters of one transformer layer."""
        qkv, out = ((self.N + 2 * self.K) * self.H, self.D), (self.D, self.N * self.H)
        return [qkv, out, (2 * self.F, self.D), (self.D, self.F), (self.D,), (self.D,)]


EIGHT, SEVENTY, RANK = "Llama-3-8B", "Llama-3-70B", "Llama-3-70B, tp 8"
MODELS = {
    EIGHT: Model(D=4096, F=14336, N=32, K=8, H=128, V=128256),
    # One rank of eight: a share of heads, feed-forward and vocabulary.
    RANK: Model(D=8192, F=3584, N=8, K=1, H=128, V=16032),
    SEVENTY: Model(D=8192, F=28672, N=64, K=8, H=128, V=128256),
    "small": Model(D=512, F=1024, N=4, K=2, H=64, V=16384),  # for a CPU
    "tiny": Model(D=64, F=96, N=4, K=2, H=64, V=512),  # to try the program itself
}


@dataclass(frozen=True)
class Size:
    """Which cases a run has: by model the tokens of a row, and the same for the loss."""

    rows: dict[str, tuple[int, ...]]
    loss: dict[str, int]
    documents: tuple[str, ...] = (ONE_DOCUMENT, RAGGED)


SIZES = {
    # Over a cut vocabulary a loss is one step of a sum over ranks, so the whole one is timed.
    "full": Size({EIGHT: (8192, 65536, 131072), RANK: (65536,)}, {EIGHT: 8192, SEVENTY: 8192}),
    "quick": Size({EIGHT: (8192, 32768)}, {EIGHT: 8192}),
    "cpu": Size({"small": (2048, 8192)}, {"small": 4096}, (ONE_DOCUMENT, RAGGED, SHORT)),
    "tiny": Size({"tiny": (256,)}, {"tiny": 256}),
}


@dataclass(frozen=True)
class Case:
    """One operator at one shape; row names its documents where they matter."""

    op: str
    model: str
    tokens: int
    row: str = ""


def list_cases(op: str, size: str) -> list[Case]:
    """The cases of an operator in a size of SIZES."""
    chosen = SIZES[size]
    if op == "adamw":
        return [Case(op, model, 0) for model in chosen.rows]
    if op == "linear_cross_entropy":
        return [Case(op, model, tokens) for model, tokens in chosen.loss.items()]
    return [
        Case(op, model, tokens, row)
        for model, rows in chosen.rows.items()
        for tokens in rows
        for row in (chosen.documents if op == "interval_attention" else ("",))
    ]


def document_lengths(case: Case) -> np.ndarray:
    """Lengths of a row's documents, int64; ragged ones are at most a quarter of the row."""
    if case.row == ONE_DOCUMENT:
        return np.array([case.tokens])
    if case.row == SHORT:
        return np.full(case.tokens // 4, 4)
    rng = np.random.default_rng(case.tokens)
    return read_histogram(HISTOGRAM).draw_row(rng, case.tokens, case.tokens // 4)


def visible_pairs(lengths: np.ndarray) -> int:
    """(query, key) pairs that causal attention in packed documents sees."""
    lengths = lengths.astype(np.int64)
    return int((lengths * (lengths + 1) // 2).sum())


def moved(row_bytes: float, forward: int, backward: int) -> dict[str, Work]:
    """So many times the bytes of a row of numbers must be read or written."""
    return {"fwd": Work(forward * row_bytes, "byte"), "bwd": Work(backward * row_bytes, "byte")}


def random(shape: Sequence[int], dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers, of which a gradient is wanted."""
    return (scale * torch.randn(*shape, dtype=dtype)).requires_grad_()


def rope_formula(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Tensors:
    """Pairs (i, i + H/2) turned in fp32; q [T, N, H], k [T, K, H], tables [T, 1, H]."""

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)

    return [rotate(q), rotate(k)]


def rms_norm_formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm in fp32, rounded as Hugging Face's Llama does."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return scaled.to(x.dtype) * weight


def swiglu_formula(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x [T, 2F]."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def loss_formula(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of cross entropies, with the logits of all tokens."""
    logits = functional.linear(hidden, weight).float()
    return functional.cross_entropy(logits, labels, reduction="sum")


def tokenwise_problem(
    formula: Callable[..., Any],
    names: str,
    rows: Tensors,
    douts: Tensors,
    params: Sequence[torch.Tensor] = (),
    tables: Sequence[torch.Tensor] = (),
    **more: Any,
) -> Problem:
    """The problem of an operator that treats every token by itself; its truth by chunks of tokens.

    Args:
        formula: of rows, params and tables.
        names: of the outputs, then of the gradients of rows and params.
        rows: inputs [T, ...]. Without params only the first and last chunk are computed.
        douts: gradients of the outputs: [T, ...], or of a sum over tokens.
        params: inputs whose gradients are sums over tokens.
        tables: constants [T, ...].
        more: see `Problem`.
    """
    starts = list(range(0, len(rows[0]), CHUNK_TOKENS))
    wide_params = [x.detach().float().requires_grad_() for x in params]
    tokens, values = [], []
    for start in starts if params else sorted({starts[0], starts[-1]}):
        chunk = slice(start, start + CHUNK_TOKENS)
        wide_rows = [x.detach()[chunk].float().requires_grad_() for x in rows]
        outs = formula(*wide_rows, *wide_params, *(table[chunk] for table in tables))
        outs = [outs] if isinstance(outs, torch.Tensor) else outs
        torch.autograd.backward(outs, [x[chunk].float() if x.dim() else x for x in douts])
        tokens.append(torch.arange(len(rows[0]), device=rows[0].device)[chunk])
        values.append([*(out.detach() for out in outs), *(x.grad for x in wide_rows)])
    checked = torch.cat(tokens)
    truths = [
        (torch.cat(parts), checked) if parts[0].dim() else (torch.stack(parts).sum(), None)
        for parts in zip(*values)
    ]
    truths += [(param.grad, None) for param in wide_params]
    return Problem(
        inputs=[*rows, *params],
        douts=douts,
        formula=lambda *inputs: formula(*inputs, *tables),
        expected=[
            Expected(name, number, value, where)
            for number, (name, (value, where)) in enumerate(zip(names.split(), truths))
        ],
        **{"limit": MAX_ERROR[rows[0].dtype], **more},
    )


def rope_problem(case: Case, dtype: torch.dtype) -> Problem:
    """Queries [T, N, H], keys [T, K, H]; constants tables (cos, sin) [T, H/2], wide ones [T, 1, H].

    Every query and key is read and written, and an fp32 row of the table read per token.
    """
    model = MODELS[case.model]
    rows = [random((case.tokens, n, model.H), dtype) for n in (model.N, model.K)]
    with torch.device("cpu"):  # in fp64
        tables = build_rope_table(torch.arange(case.tokens), model.H, ROPE_BASE)
    cos, sin = (table.to(rows[0].device) for table in tables)
    wide = [torch.cat([table, table], dim=-1)[:, None] for table in (cos, sin)]
    douts = [torch.randn_like(x) for x in rows]
    token = 2 * dtype.itemsize * (model.N + model.K) * model.H + FP32 * model.H
    more = {"work": moved(case.tokens * token, 1, 1)}
    more["constants"] = {"tables": (cos, sin), "wide": wide}
    return tokenwise_problem(rope_formula, "q k dq dk", rows, douts, tables=wide, **more)


def rms_norm_problem(case: Case, dtype: torch.dtype) -> Problem:
    """x [T, D], weight [D]; forward reads x and writes y, backward reads x and dy, writes dx."""
    model = MODELS[case.model]
    x = random((case.tokens, model.D), dtype)
    weight = (1 + 0.1 * torch.randn(model.D)).to(dtype).requires_grad_()
    work = moved(x.nbytes, 2, 3)
    names, douts = "y dx dweight", [torch.randn_like(x)]
    return tokenwise_problem(rms_norm_formula, names, [x], douts, [weight], work=work)


def swiglu_problem(case: Case, dtype: torch.dtype) -> Problem:
    """x [T, 2F]: gate, then up; backward reads 2F and F and writes 2F."""
    model = MODELS[case.model]
    x = random((case.tokens, 2 * model.F), dtype)
    dout = torch.randn(case.tokens, model.F, dtype=dtype)
    work = moved(dout.nbytes, 3, 5)
    return tokenwise_problem(swiglu_formula, "y dx", [x], [dout], work=work)


def loss_problem(case: Case, dtype: torch.dtype) -> Problem:
    """hidden [T, D], weight [V, D] of the size that training starts with; constant labels [T].

    Three matrix products: logits, gradient of the hidden states, gradient of the weight.
    """
    model = MODELS[case.model]
    hidden = random((case.tokens, model.D), dtype)
    weight = random((model.V, model.D), dtype, scale=0.02)
    labels = torch.randint(0, model.V, (case.tokens,))
    more: dict[str, Any] = {"limit": MAX_LOSS_ERROR[dtype], "constants": {"labels": labels}}
    more["work"] = {"step": Work(6.0 * case.tokens * model.D * model.V, "flop")}
    names, douts = "loss dhidden dweight", [torch.ones(())]
    return tokenwise_problem(loss_formula, names, [hidden], douts, [weight], [labels], **more)


def adamw_problem(case: Case, _: torch.dtype) -> Problem:
    """One step on a layer's parameters; inputs are parameters, then gradients, fp32.

    Parameter, gradient and both moments are read, all but the gradient written.
    """
    shapes = MODELS[case.model].layer_shapes()
    params, grads = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    expected = []
    for number in (0, len(params) - 1):  # a large one and a small one
        leaf = torch.nn.Parameter(params[number].double())
        leaf.grad = grads[number].double()
        torch.optim.AdamW([leaf], **ADAMW, foreach=False).step()
        expected.append(Expected(f"parameter {number}", number, leaf.detach()))
    return Problem(
        inputs=[*params, *grads],
        douts=[],
        work={"step": Work(7.0 * sum(x.nbytes for x in params), "byte")},
        limit=MAX_ERROR[torch.float32],
        expected=expected,
        note=f"{len(params)} tensors",
    )


def attention_problem(case: Case, dtype: torch.dtype, lengths: np.ndarray | None = None) -> Problem:
    """A row of documents: q [T, N, H], k and v [T, K, H]; constants lengths [documents], scale.

    Two matrix products per visible pair forward, five backward. `lengths` instead of the case's
    own, to check a row of one's choice.
    """
    model = MODELS[case.model]
    lengths = document_lengths(case) if lengths is None else lengths
    tokens, scale = int(lengths.sum()), model.H**-0.5
    inputs = [random((tokens, n, model.H), dtype) for n in (model.N, model.K, model.K)]
    dout = torch.randn_like(inputs[0])
    flops = 4.0 * model.N * model.H * visible_pairs(lengths)
    return Problem(
        inputs=inputs,
        douts=[dout],
        work={"fwd": Work(flops, "flop"), "bwd": Work(2.5 * flops, "flop")},
        limit=MAX_ERROR[dtype],
        expected=expect_tails(inputs, dout, lengths, scale),
        constants={"lengths": lengths, "scale": scale},
        note=f"{len(lengths)} documents, longest {lengths.max()}",
    )


def checked_documents(lengths: np.ndarray) -> Iterator[slice]:
    """Some documents: the longest, the shortest, first, last, and between."""
    ends = np.cumsum(lengths)
    spread = np.linspace(0, len(lengths) - 1, CHECKED_DOCUMENTS - 2).round().astype(int)
    for number in sorted({int(lengths.argmax()), int(lengths.argmin()), *spread.tolist()}):
        yield slice(int(ends[number] - lengths[number]), int(ends[number]))


def expect_tails(
    qkv: Tensors, dout: torch.Tensor, lengths: np.ndarray, scale: float
) -> list[Expected]:
    """The truth of out, dq, dk and dv in the last tokens of the checked documents.

    The last rows of a document see all of its keys, and its last keys are seen by those rows only:
    there all four are exact at the cost of those rows, at any length.
    """
    tails: list[Tensors] = []
    tokens = []
    for document in checked_documents(lengths):
        length = document.stop - document.start
        tail = min(TAIL_TOKENS, length)
        tokens.append(torch.arange(document.stop - tail, document.stop, device=dout.device))
        q, k, v = (x.detach()[document].float() for x in qkv)
        tails.append(tail_of_document(q[length - tail :], k, v, dout[tokens[-1]].float(), scale))
    checked = torch.cat(tokens)
    return [
        Expected(name, number, torch.cat(values), checked)
        for number, (name, values) in enumerate(zip(("out", "dq", "dk", "dv"), zip(*tails)))
    ]


def tail_of_document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, scale: float
) -> Tensors:
    """out and dq [tail, N, H] of a document's last rows, dk and dv [tail, K, H] of its last keys.

    Args:
        q, dout: [tail, N, H] of those rows, fp32.
        k, v: [length, K, H] of all keys, fp32.
    """
    tail, length = len(q), len(k)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    keys = torch.arange(length, device=q.device)
    hidden = keys > keys[length - tail :, None]
    groups = q.unflatten(1, (k.shape[1], -1))  # [tail, K, N/K, H]
    scores = scale * torch.einsum("tkgh,skh->kgts", groups, k)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    out = torch.einsum("kgts,skh->tkgh", weights, v).flatten(1, 2)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    return [out.detach(), dq, dk[length - tail :], dv[length - tail :]]


OPERATORS: dict[str, Callable[[Case, torch.dtype], Problem]] = {
    "interval_attention": attention_problem,
    "linear_cross_entropy": loss_problem,
    "rms_norm": rms_norm_problem,
    "swiglu": swiglu_problem,
    "rope": rope_problem,
    "adamw": adamw_problem,
}

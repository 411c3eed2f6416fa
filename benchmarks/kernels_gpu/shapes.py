"""Which problems each operator is timed on: models, rows, and the work they hold at the least.

Letters: T tokens, N query heads, K kv heads, H head size, D model size, F feed-forward size,
V vocabulary.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lclm.context.plan.lengths import read_histogram

from .contest import Work

HISTOGRAM = Path(__file__).resolve().parent.parent / "data" / "doc_lengths_magi.csv"
OPS = (
    "interval_attention",
    "linear_cross_entropy",
    "rms_norm",
    "swiglu",
    "rope",
    "adamw",
)
ONE_DOCUMENT, RAGGED = "one document", "ragged"
K = 1024
BF16, FP32 = 2, 4  # bytes


@dataclass(frozen=True)
class Model:
    """Sizes of one process's part of a model."""

    D: int
    F: int
    N: int
    K: int
    H: int
    V: int


MODELS = {
    "Llama-3-8B": Model(D=4096, F=14336, N=32, K=8, H=128, V=128256),
    # One rank of eight: a share of heads, feed-forward and vocabulary.
    "Llama-3-70B, tp 8": Model(D=8192, F=3584, N=8, K=1, H=128, V=16032),
    "Llama-3-70B": Model(D=8192, F=28672, N=64, K=8, H=128, V=128256),
    "tiny": Model(D=64, F=96, N=4, K=2, H=64, V=512),  # to try the program itself
}
LONG_ROWS = (8 * K, 32 * K, 64 * K, 128 * K)
LOSS_TOKENS = 8 * K


@dataclass(frozen=True)
class Spec:
    """Names one problem."""

    op: str
    model: str
    tokens: int
    row: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a dictionary of JSON types."""
        return asdict(self)


def list_specs(op: str, size: str) -> list[Spec]:
    """The problems of an operator.

    Args:
        op: one of OPS.
        size: "full", "quick" (about two minutes for all operators) or "tiny" (any CPU).
    """
    models, rows = ("Llama-3-8B", "Llama-3-70B, tp 8"), LONG_ROWS
    if size == "quick":
        models, rows = models[:1], (8 * K, 32 * K)
    elif size == "tiny":
        models, rows = ("tiny",), (256,)
    if op == "interval_attention":
        return [
            Spec(op, model, tokens, row)
            for model in models
            for tokens in rows
            for row in (ONE_DOCUMENT, RAGGED)
        ]
    if op == "linear_cross_entropy":
        tokens = min(LOSS_TOKENS, rows[-1])
        # Over a cut vocabulary a loss is one step of a sum over ranks, so the whole one is timed.
        return [Spec(op, model.removesuffix(", tp 8"), tokens) for model in models]
    if op == "adamw":
        return [Spec(op, model, 0) for model in models]
    if size == "full":
        return [
            *(Spec(op, models[0], tokens) for tokens in rows),
            *(Spec(op, models[1], tokens) for tokens in (32 * K, 128 * K)),
        ]
    return [Spec(op, models[0], tokens) for tokens in rows]


def document_lengths(spec: Spec) -> np.ndarray:
    """Lengths of a row's documents, int64; ragged ones are at most a quarter of the row."""
    if spec.row == ONE_DOCUMENT:
        return np.array([spec.tokens])
    rng = np.random.default_rng(spec.tokens)
    return read_histogram(HISTOGRAM).draw_row(rng, spec.tokens, spec.tokens // 4)


def visible_pairs(lengths: np.ndarray) -> int:
    """(query, key) pairs that causal attention in packed documents sees."""
    lengths = lengths.astype(np.int64)
    return int((lengths * (lengths + 1) // 2).sum())


def attention_work(model: Model, lengths: np.ndarray) -> dict[str, Work]:
    """Two matrix products per visible pair forward, five backward."""
    flops = 4.0 * model.N * model.H * visible_pairs(lengths)
    return {"fwd": Work(flops, "flop"), "bwd": Work(2.5 * flops, "flop")}


def rope_work(model: Model, tokens: int) -> dict[str, Work]:
    """Every query and key read and written, an fp32 row of the table per token."""
    heads = 2 * BF16 * (model.N + model.K) * model.H
    work = Work(float(tokens) * (heads + FP32 * model.H), "byte")
    return {"fwd": work, "bwd": work}


def rms_norm_work(model: Model, tokens: int) -> dict[str, Work]:
    """Forward reads x and writes y; backward reads x and dy and writes dx."""
    row = float(tokens) * BF16 * model.D
    return {"fwd": Work(2 * row, "byte"), "bwd": Work(3 * row, "byte")}


def swiglu_work(model: Model, tokens: int) -> dict[str, Work]:
    """Forward reads 2F and writes F; backward reads 2F and F and writes 2F."""
    row = float(tokens) * BF16 * model.F
    return {"fwd": Work(3 * row, "byte"), "bwd": Work(5 * row, "byte")}


def loss_work(model: Model, tokens: int) -> dict[str, Work]:
    """Three matrix products: logits, gradient of the hidden states, gradient of the weight."""
    return {"step": Work(6.0 * tokens * model.D * model.V, "flop")}


def layer_shapes(model: Model) -> list[tuple[int, ...]]:
    """The parameters of one transformer layer."""
    return [
        ((model.N + 2 * model.K) * model.H, model.D),
        (model.D, model.N * model.H),
        (2 * model.F, model.D),
        (model.D, model.F),
        (model.D,),
        (model.D,),
    ]


def adamw_work(model: Model) -> dict[str, Work]:
    """Parameter, gradient and both moments read, all but the gradient written, fp32."""
    num_params = sum(int(np.prod(shape)) for shape in layer_shapes(model))
    return {"step": Work(7.0 * FP32 * num_params, "byte")}

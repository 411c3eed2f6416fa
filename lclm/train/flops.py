"""Model FLOPs of a row and the share of the device's peak that a run reaches.

Counted: matrix products of the layers and the output layer, and attention over visible pairs only
(causal and within documents where the mask is on). Recomputation is not counted.
"""

import numpy as np

from lclm.config import ModelConfig

PEAK_BF16 = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
}
"""Dense bf16 FLOP/s of a device, from NVIDIA's data sheets (SXM forms, without sparsity)."""


def num_visible_pairs(doc_lengths: np.ndarray) -> int:
    """Query-key pairs that causal attention within documents computes."""
    lengths = doc_lengths.astype(np.int64)
    return int((lengths * (lengths + 1) // 2).sum())


def row_flops(model: ModelConfig, doc_lengths: np.ndarray) -> float:
    """Forward and backward FLOPs of one row.

    6 FLOPs per token and matrix weight; 12 * N * H per layer and visible pair (two products
    forward, four backward, 2 FLOPs each).
    """
    tokens = int(doc_lengths.sum())
    norms = (2 * model.num_layers + 1) * model.hidden_size
    tables = 1 if model.tie_embeddings else 2
    matrices = model.num_parameters() - norms - (tables - 1) * model.vocab_size * model.hidden_size
    attention = 12.0 * model.num_layers * model.num_attention_heads * model.head_size
    return 6.0 * tokens * matrices + attention * num_visible_pairs(doc_lengths)


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a device by its name, or None if unknown."""
    return next((peak for name, peak in PEAK_BF16.items() if name in device_name), None)

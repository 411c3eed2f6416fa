"""Model FLOPs against counts made by hand and by PyTorch's own counter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lclm.train.flops import num_visible_pairs, peak_flops, row_flops
from tests.train.tiny import tiny_config


def test_visible_pairs_by_brute_force() -> None:
    lengths = np.array([1, 5, 3])
    documents = np.repeat(np.arange(3), lengths)
    visible = np.tril(documents[:, None] == documents[None])
    assert num_visible_pairs(lengths) == visible.sum()


@pytest.mark.parametrize("tied", [False, True])
def test_matrix_flops_equal_those_torch_counts(tied: bool) -> None:
    """Forward products of every linear layer, counted by torch, times three for both passes."""
    model = tiny_config("unused", model__tie_embeddings=tied).model
    tokens = 16
    width, heads = model.hidden_size, model.num_attention_heads * model.head_size
    kv = model.num_kv_heads * model.head_size
    shapes = [(width, heads + 2 * kv), (heads, width), (width, 2 * model.ffn_hidden_size)]
    shapes += [(model.ffn_hidden_size, width)]
    with FlopCounterMode(display=False) as counter:
        for _ in range(model.num_layers):
            for rows, columns in shapes:
                torch.zeros(tokens, rows) @ torch.zeros(rows, columns)
        torch.zeros(tokens, width) @ torch.zeros(width, model.vocab_size)
    one_token_documents = np.ones(tokens, np.int64)
    attention = 12 * model.num_layers * heads * tokens
    assert row_flops(model, one_token_documents) - attention == 3 * counter.get_total_flops()


def test_only_visible_pairs_count() -> None:
    model = tiny_config("unused").model
    one, two = np.array([64]), np.array([32, 32])
    heads = model.num_attention_heads * model.head_size
    hidden_pairs = 32 * 32
    difference = row_flops(model, one) - row_flops(model, two)
    assert difference == 12 * model.num_layers * heads * hidden_pairs


def test_peaks_are_known_by_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("some other device") is None

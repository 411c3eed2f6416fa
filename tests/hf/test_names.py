"""The name table maps every weight once, and the transforms put every row where it belongs."""

import pytest
import torch

from lclm.hf.names import build_weight_table, merge_qkv, split_qkv
from tests.checkpoint.samples import build_hf_llama, tiny_llama

MODEL = tiny_llama()


@pytest.mark.parametrize("tied", [False, True])
def test_table_holds_every_weight_of_transformers_once(tied):
    table = build_weight_table(MODEL.model_copy(update={"tie_embeddings": tied}))
    shapes = {
        name: tuple(weight.shape)
        for name, weight in build_hf_llama(tie_word_embeddings=tied).named_parameters()
    }
    theirs = [name for entry in table for name in entry.theirs]
    assert len(theirs) == len(set(theirs))
    assert {n: s for e in table for n, s in zip(e.theirs, e.their_shapes)} == shapes
    ours = [entry.ours for entry in table]
    assert len(ours) == len(set(ours)) == 2 + 6 * 3 + (not tied)
    assert (
        sum(torch.Size(e.shape).numel() for e in table)
        == MODEL.model_copy(update={"tie_embeddings": tied}).num_parameters()
    )


def test_our_names_and_shapes_are_those_of_the_format():
    shapes = {entry.ours: entry.shape for entry in build_weight_table(MODEL)}
    assert shapes["model.embedding.word_embeddings.weight"] == (53, 32)
    layer = "model.decoder.layers.2."
    assert {k.removeprefix(layer): v for k, v in shapes.items() if k.startswith(layer)} == {
        "input_layernorm.weight": (32,),
        "self_attention.linear_qkv.weight": ((4 + 2 * 2) * 8, 32),
        "self_attention.linear_proj.weight": (32, 32),
        "pre_mlp_layernorm.weight": (32,),
        "mlp.linear_fc1.weight": (80, 32),
        "mlp.linear_fc2.weight": (32, 40),
    }
    assert list(shapes)[-2:] == [
        "model.decoder.final_layernorm.weight",
        "model.output_layer.weight",
    ]


def test_head_dim_of_its_own():
    model = MODEL.model_copy(update={"head_dim": 16})
    shapes = {entry.ours: entry.shape for entry in build_weight_table(model)}
    assert shapes["model.decoder.layers.0.self_attention.linear_qkv.weight"] == (128, 32)
    assert shapes["model.decoder.layers.0.self_attention.linear_proj.weight"] == (32, 64)


def test_qkv_lies_group_by_group():
    # Rows are named by their head: q 0..3, k 10 and 11, v 20 and 21; H = 2, D = 1.
    def rows(*heads):
        return torch.tensor([head for head in heads for _ in range(2)])[:, None]

    merged = merge_qkv(rows(0, 1, 2, 3), rows(10, 11), rows(20, 21), head_dim=2)
    assert merged[::2, 0].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1), (1, 1)])
def test_qkv_round_trip(num_heads, num_kv_heads):
    parts = [torch.randn(heads * 6, 5) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    merged = merge_qkv(*parts, head_dim=6)
    assert merged.shape == ((num_heads + 2 * num_kv_heads) * 6, 5)
    for part, again in zip(parts, split_qkv(merged, num_heads, num_kv_heads)):
        assert torch.equal(part, again)


def test_gate_rows_come_before_up_rows():
    entry = next(e for e in build_weight_table(MODEL) if "linear_fc1" in e.ours)
    assert [name.split(".")[-2] for name in entry.theirs] == ["gate_proj", "up_proj"]
    gate, up = torch.zeros(40, 32), torch.ones(40, 32)
    joined = entry.to_ours([gate, up])
    assert joined[:40].eq(0).all() and joined[40:].eq(1).all()
    again = entry.to_theirs(joined)
    assert torch.equal(again[0], gate) and torch.equal(again[1], up)

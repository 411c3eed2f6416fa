"""Hugging Face -> ours -> Hugging Face: the same bits, the same logits."""

import json
import shutil
import tomllib

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lclm.checkpoint.folder import CheckpointError, read_info, resolve_step_folder
from lclm.config import ModelConfig
from lclm.hf.config import read_hf_config
from lclm.hf.torch_dist import TorchDistReader
from tests.checkpoint.samples import (
    LLAMA3_SCALING,
    edit_json,
    mini_llama_logits,
    save_hf,
    write_tokenizer,
)
from tests.hf.folders import (
    assert_same_tensors,
    change_tensors,
    export_hf,
    import_hf,
    load_folder,
)
from tests.tolerances import MINI_LLAMA_LOGITS

NORM = "model.norm.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fields", [{}, {"num_key_value_heads": 4}, {"head_dim": 16}])
def test_round_trip_keeps_every_bit(tmp_path, dtype, tied, fields):
    save_hf(tmp_path / "hf", dtype=dtype, tie_word_embeddings=tied, **fields)
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "again")
    assert_same_tensors(load_folder(tmp_path / "again"), load_folder(tmp_path / "hf"))
    assert read_hf_config(tmp_path / "again") == read_hf_config(tmp_path / "hf")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_the_export(tmp_path, tied):
    model = save_hf(
        tmp_path / "hf", tie_word_embeddings=tied, rope_scaling=dict(LLAMA3_SCALING), seed=3
    )
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "again", max_shard_bytes=20_000)
    again, told = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert {name: list(keys) for name, keys in told.items()} == {name: [] for name in told}
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.config.max_position_embeddings == 256


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, {"head_dim": 16}])
def test_our_layout_gives_the_logits_of_transformers(tmp_path, fields):
    model = save_hf(tmp_path / "hf", **fields)
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    ids = torch.randint(0, 53, (64,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    step_folder = resolve_step_folder(tmp_path / "ckpt")
    found = mini_llama_logits(step_folder, read_hf_config(tmp_path / "hf"), ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, **MINI_LLAMA_LOGITS)


def test_checkpoint_of_an_import(checkpoint):
    step_folder = resolve_step_folder(checkpoint)
    assert step_folder == checkpoint / "step_00000000"
    info = read_info(step_folder)
    assert (info.step, info.stage, info.stage_step, info.tokens) == (0, 0, 0, 0)
    assert (info.rope_base, info.seq_length, info.dtype) == (500000.0, 256, "float32")
    assert info.has_optimizer is False
    assert info.model["num_kv_heads"] == 2 and "init_from" not in info.model
    assert TorchDistReader(step_folder).tensors()["model.output_layer.weight"].shape == (53, 32)


@pytest.mark.parametrize("scaling", [None, LLAMA3_SCALING])
def test_the_model_section_is_printed(tmp_path, scaling):
    save_hf(tmp_path / "hf", head_dim=16, tie_word_embeddings=True, rope_scaling=scaling)
    text = import_hf(tmp_path / "hf", tmp_path / "ckpt")[-1]
    assert "256 tokens with rope_base = 500000.0 in a [[stage]]" in text
    section = ModelConfig.model_validate(tomllib.loads(text)["model"])
    assert section.init_from == str(tmp_path / "ckpt")
    source = read_hf_config(tmp_path / "hf").model
    assert section.recorded_fields() == source.recorded_fields()
    assert (section.rope_scaling is None) == (scaling is None)


def test_shards_both_ways(tmp_path):
    save_hf(tmp_path / "hf", max_shard_size="20KB")
    num_shards = len(list((tmp_path / "hf").glob("*.safetensors")))
    assert num_shards > 3
    lines = import_hf(tmp_path / "hf", tmp_path / "ckpt")
    assert [line.split(":")[0] for line in lines if line.startswith("shard")] == [
        f"shard {n} of {num_shards}" for n in range(1, num_shards + 1)
    ]
    lines = export_hf(tmp_path / "ckpt", tmp_path / "again", max_shard_bytes=20_000)
    shards = sorted(path.name for path in (tmp_path / "again").glob("*.safetensors"))
    assert len(shards) > 3
    assert [
        line.split(": ")[1].split(",")[0] for line in lines if line.startswith("shard")
    ] == shards
    assert_same_tensors(load_folder(tmp_path / "again"), load_folder(tmp_path / "hf"))
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / "again" / shard)
    tensors = load_folder(tmp_path / "again")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize(("wish", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_export_changes_type_when_asked(tmp_path, stored, wish, dtype):
    save_hf(tmp_path / "hf", dtype=stored)
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "again", dtype=wish)
    expected = {name: t.to(dtype) for name, t in load_folder(tmp_path / "hf").items()}
    assert_same_tensors(load_folder(tmp_path / "again"), expected)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")


def assert_comes_back(tmp_path):
    """Import and export give the same tensors and the declared type."""
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "again")
    assert_same_tensors(load_folder(tmp_path / "again"), load_folder(tmp_path / "hf"))
    for name in ("dtype", "torch_dtype"):
        configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("hf", "again")]
        assert configs[1][name] == configs[0]["dtype"]


def test_float16_stays(tmp_path):
    save_hf(tmp_path / "hf", dtype=torch.float16)
    assert_comes_back(tmp_path)


def test_one_wide_norm_widens_nothing_else(tmp_path):
    save_hf(tmp_path / "hf", dtype=torch.bfloat16)
    change_tensors(tmp_path / "hf", lambda t: t.update({NORM: t[NORM].float() + 1e-7}))
    assert_comes_back(tmp_path)
    assert TorchDistReader(tmp_path / "ckpt/step_00000000").tensors()[
        "model.embedding.word_embeddings.weight"
    ].dtype == (torch.bfloat16)
    assert read_info(tmp_path / "ckpt" / "step_00000000").dtype == "float32"


def test_parts_of_one_weight_get_their_own_types_back(tmp_path):
    save_hf(tmp_path / "hf", dtype=torch.bfloat16)
    names = [f"model.layers.1.{n}_proj.weight" for n in ("self_attn.k", "self_attn.v", "mlp.up")]
    types = (torch.float16, torch.float32, torch.float16)
    change_tensors(
        tmp_path / "hf", lambda t: t.update({n: t[n].to(d) for n, d in zip(names, types)})
    )
    assert_comes_back(tmp_path)


@pytest.mark.parametrize("wish", ["bf16", "fp16", "fp32"])
def test_import_changes_type_when_asked(tmp_path, wish):
    save_hf(tmp_path / "hf", dtype=torch.float32)
    import_hf(tmp_path / "hf", tmp_path / "ckpt", dtype=wish)
    export_hf(tmp_path / "ckpt", tmp_path / "again")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[wish]
    expected = {name: t.to(dtype) for name, t in load_folder(tmp_path / "hf").items()}
    assert_same_tensors(load_folder(tmp_path / "again"), expected)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert read_info(tmp_path / "ckpt" / "step_00000000").dtype == config["dtype"]


def test_tokenizer_travels_both_ways(tmp_path, hf_folder):
    write_tokenizer(hf_folder)
    lines = import_hf(hf_folder, tmp_path / "ckpt")
    assert not any("warning" in line for line in lines)
    lines = export_hf(tmp_path / "ckpt", tmp_path / "again")
    assert not any("warning" in line for line in lines)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (hf_folder / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert tokenizer("w3 w5")["input_ids"] == [3, 5]
    # config.json of the source comes first: bos 1, eos 2 in transformers' Llama
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


def test_ids_come_from_the_tokenizer(tmp_path, hf_folder):
    write_tokenizer(hf_folder)
    (hf_folder / "generation_config.json").unlink()
    edit_json(hf_folder / "config.json", bos_token_id=..., eos_token_id=...)
    import_hf(hf_folder, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "again")
    for name in ("config.json", "generation_config.json"):
        tree = json.loads((tmp_path / "again" / name).read_text())
        assert (tree["bos_token_id"], tree["eos_token_id"]) == (0, 52)


def test_several_ends_of_text_survive(tmp_path, hf_folder):
    write_tokenizer(hf_folder)
    edit_json(hf_folder / "generation_config.json", eos_token_id=[2, 7], temperature=0.6)
    import_hf(hf_folder, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert model.config.eos_token_id == 2  # as its own file says
    assert model.generation_config.eos_token_id == [2, 7]
    assert model.generation_config.temperature == 0.6


def test_without_tokenizer_there_is_a_warning_and_no_id_is_made_up(tmp_path, checkpoint):
    (checkpoint / "step_00000000" / "hf_source.json").unlink()  # as of a model from scratch
    shutil.rmtree(checkpoint / "step_00000000" / "tokenizer")
    lines = export_hf(checkpoint, tmp_path / "again")
    assert any("warning" in line and "tokenizer" in line for line in lines)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "again").config
    assert config.bos_token_id is None and config.eos_token_id is None


def test_another_tokenizer_can_be_given(tmp_path, checkpoint):
    write_tokenizer(tmp_path / "words")
    (tmp_path / "words" / "config.json").write_text("{}")  # of some model: must not be taken
    export_hf(checkpoint, tmp_path / "again", tokenizer=tmp_path / "words")
    assert read_hf_config(tmp_path / "again").model.num_layers == 3
    assert AutoTokenizer.from_pretrained(tmp_path / "again").eos_token_id == 52
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        export_hf(checkpoint, tmp_path / "third", tokenizer=tmp_path)


def test_old_exports_with_needless_tensors_convert(tmp_path):
    save_hf(tmp_path / "hf", tie_word_embeddings=True)
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    more = {
        **tensors,
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file(more, path)
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "again")
    assert_same_tensors(load_folder(tmp_path / "again"), tensors)
    more["lm_head.weight"][0, 0] += 1
    save_file(more, path)
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true, but"):
        import_hf(tmp_path / "hf", tmp_path / "third")

"""Hugging Face -> ours -> Hugging Face: the same bits, the same logits; bad input is refused."""

import importlib.util
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lclm.checkpoint.folder import CheckpointError, read_info, resolve_step_folder
from lclm.hf.config import read_hf_config
from lclm.hf.convert import convert_from_hf, convert_to_hf
from lclm.hf.torch_dist import TorchDistReader
from tests.checkpoint.samples import (
    LLAMA3_SCALING,
    edit_json,
    mini_llama_logits,
    save_hf,
    write_tokenizer,
)
from tests.tolerances import MINI_LLAMA_LOGITS

ROOT = Path(__file__).resolve().parents[2]


def import_hf(source, target, **options) -> list[str]:
    lines: list[str] = []
    convert_from_hf(source, target, report=lines.append, **options)
    return lines


def export_hf(source, target, **options) -> list[str]:
    lines: list[str] = []
    convert_to_hf(source, target, report=lines.append, **options)
    return lines


def load_folder(folder) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, shards or not."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        loaded = load_file(path)
        assert not loaded.keys() & tensors.keys()
        tensors.update(loaded)
    return tensors


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def hf_folder(tmp_path):
    save_hf(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def checkpoint(tmp_path, hf_folder):
    import_hf(hf_folder, tmp_path / "ckpt")
    return tmp_path / "ckpt"


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


NORM = "model.norm.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused_by_name(tmp_path, hf_folder, value):
    name = "model.layers.2.mlp.up_proj.weight"
    change_tensors(hf_folder, lambda t: t[name].view(-1)[7].fill_(value))
    refused = pytest.raises(CheckpointError, match=rf"'{name}' holds NaN or infinite values")
    with refused:
        import_hf(hf_folder, tmp_path / "ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    import_hf(hf_folder, tmp_path / "ckpt", allow_non_finite=True)
    with refused:
        export_hf(tmp_path / "ckpt", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    export_hf(tmp_path / "ckpt", tmp_path / "again", allow_non_finite=True)
    found = load_folder(tmp_path / "again")[name].view(-1)[7]
    assert found.isnan() if value != value else found == value


def test_values_too_large_for_the_type_asked_for_are_refused(tmp_path, hf_folder):
    change_tensors(hf_folder, lambda t: t[NORM][3].fill_(7e4))
    match = r"norm\.weight' holds values that are too large for float16, whose largest is 65504"
    with pytest.raises(CheckpointError, match=match):
        import_hf(hf_folder, tmp_path / "ckpt", dtype="fp16")
    import_hf(hf_folder, tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match=match):
        export_hf(tmp_path / "ckpt", tmp_path / "again", dtype="fp16")


def add_word(folder):
    """One more token than the model has rows."""
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 53, "content": "<more>"})
    path.write_text(json.dumps(tree))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, hf_folder):
    message = r"has ids up to 53, but the model's vocabulary has 53 tokens"
    write_tokenizer(hf_folder)
    import_hf(hf_folder, tmp_path / "ckpt")
    add_word(hf_folder)
    with pytest.raises(CheckpointError, match=message):
        import_hf(hf_folder, tmp_path / "other")
    with pytest.raises(CheckpointError, match=message):
        export_hf(tmp_path / "ckpt", tmp_path / "again", tokenizer=hf_folder)
    add_word(tmp_path / "ckpt" / "step_00000000" / "tokenizer")
    with pytest.raises(CheckpointError, match=message):
        export_hf(tmp_path / "ckpt", tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "hf"]


def test_a_larger_sentencepiece_model_is_refused(tmp_path, hf_folder, tokenizer_files):
    shutil.copyfile(tokenizer_files["sentencepiece"], hf_folder / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"has ids up to \d+, but the model's vocabulary"):
        import_hf(hf_folder, tmp_path / "ckpt")


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


def change_tensors(folder, change):
    """Load the only shard, let `change` edit the mapping, save it."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


BAD_TENSORS = [
    (lambda t: t.pop("model.norm.weight"), r"missing 1 tensors \(model\.norm\.weight\)"),
    (lambda t: t.update(extra=torch.ones(2)), r"unexpected 1 tensors \(extra\)"),
    (
        lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": torch.ones(8, 32)}),
        r"k_proj\.weight is \[8, 32\], must be \[16, 32\]",
    ),
    (
        lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
        r"'model\.norm\.weight' is of type I8, must be one of",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS)
def test_bad_tensors_are_refused(tmp_path, hf_folder, change, message):
    change_tensors(hf_folder, change)
    with pytest.raises(CheckpointError, match=message):
        import_hf(hf_folder, tmp_path / "ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_bad_shards_are_refused(tmp_path):
    folder = tmp_path / "hf"
    save_hf(folder, max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name}: this shard is missing"):
        import_hf(folder, tmp_path / "ckpt")
    shard.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=rf"{shard.name}: is damaged or not whole"):
        import_hf(folder, tmp_path / "ckpt")
    shard.write_bytes(content)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "ghost": shard.name})
    with pytest.raises(CheckpointError, match=r"does not fit the shards: 1 tensors \(ghost\)"):
        import_hf(folder, tmp_path / "ckpt")
    edit_json(index, weight_map={})
    with pytest.raises(CheckpointError, match="'weight_map' is missing or empty"):
        import_hf(folder, tmp_path / "ckpt")
    index.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        import_hf(folder, tmp_path / "ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 2}, r"do not fit .* unexpected 6 tensors"),
        ({"num_layers": 4}, r"do not fit .* missing 6 tensors"),
        ({"vocab_size": 50}, r"is \[53, 32\], must be \[50, 32\]"),
        ({"num_kv_heads": 4}, r"linear_qkv\.weight is \[64, 32\], must be \[96, 32\]"),
        ({"tie_embeddings": True}, r"unexpected 1 tensors \(model\.output_layer\.weight\)"),
        ({"family": "mamba"}, "family = 'mamba'"),
        ({"colour": 1}, "colour"),
    ],
)
def test_checkpoint_must_fit_its_description(tmp_path, checkpoint, changes, message):
    path = checkpoint / "step_00000000" / "lclm.json"
    model = json.loads(path.read_text())["model"]
    edit_json(path, model={**model, **changes})
    with pytest.raises(CheckpointError, match=message):
        export_hf(checkpoint, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_outputs_are_kept_safe(tmp_path, hf_folder, checkpoint):
    for convert, source in ((import_hf, hf_folder), (export_hf, checkpoint)):
        output = tmp_path / f"out-{convert.__name__}"
        output.mkdir()
        (output / "mine").write_text("x")
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            convert(source, output)
        assert (output / "mine").read_text() == "x"
        convert(source, output, overwrite=True)
        assert (output / "mine").read_text() == "x"
        for bad in (source, source.parent):
            with pytest.raises(ValueError, match=r"(is|holds) the input"):
                convert(source, bad, overwrite=True)


def test_overwriting_leaves_nothing_of_the_old_export(tmp_path, hf_folder, checkpoint):
    again = tmp_path / "again"
    write_tokenizer(checkpoint / "step_00000000" / "tokenizer")
    export_hf(checkpoint, again, max_shard_bytes=20_000)
    (again / "README.md").write_text("mine")
    (again / "tokenizer.model").write_text("x")  # would be read beside the new tokenizer.json
    export_hf(checkpoint, again, overwrite=True)
    export_hf(checkpoint, tmp_path / "new")
    names = {path.name for path in again.iterdir()}
    assert names == {path.name for path in (tmp_path / "new").iterdir()} | {"README.md"}
    assert (again / "README.md").read_text() == "mine"


def test_overwriting_an_import_leaves_other_steps(tmp_path, hf_folder, checkpoint):
    (checkpoint / "step_00000012").mkdir()
    (checkpoint / "latest").write_text("step_00000012\n")
    import_hf(hf_folder, checkpoint, overwrite=True)
    assert resolve_step_folder(checkpoint).name == "step_00000000"
    assert (checkpoint / "step_00000012").is_dir()


def test_a_folder_that_is_there_stays_the_same_folder(tmp_path, hf_folder, checkpoint):
    for convert, source in ((import_hf, hf_folder), (export_hf, checkpoint)):
        output = tmp_path / f"out-{convert.__name__}"
        output.mkdir()
        number = output.stat().st_ino
        for overwrite in (False, True):
            convert(source, output, overwrite=overwrite)
            assert output.stat().st_ino == number and len(list(output.iterdir())) > 1


def test_failed_export_leaves_the_old_output(tmp_path, hf_folder, checkpoint):
    export_hf(checkpoint, tmp_path / "again")
    before = load_folder(tmp_path / "again")
    data = sorted((checkpoint / "step_00000000").glob("*.distcp"))[3]
    data.write_bytes(b"\0" * data.stat().st_size)  # right size, wrong content: found while writing
    with pytest.raises(CheckpointError, match=r"distcp: the data of '.*' cannot be read"):
        export_hf(checkpoint, tmp_path / "again", overwrite=True)
    assert_same_tensors(load_folder(tmp_path / "again"), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "ckpt", "hf"]


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tools_convert_and_report(tmp_path, hf_folder, capsys):
    to_ours, to_hf = load_tool("convert_from_hf"), load_tool("convert_to_hf")
    checkpoint, again = tmp_path / "ckpt", tmp_path / "again"
    assert to_ours.main(["--hf-model", str(hf_folder), "--output", str(checkpoint)]) == 0
    wishes = ["--dtype", "fp32", "--max-shard-size", "0.02MB"]
    assert to_hf.main(["--checkpoint", str(checkpoint), "--output", str(again), *wishes]) == 0
    assert_same_tensors(load_folder(again), load_folder(hf_folder))
    out = capsys.readouterr().out
    assert "shard 1 of 1: model.safetensors converted" in out and f"wrote {again}" in out
    assert "model-00002-of-" in out


def test_tools_fail_with_two_and_say_why(tmp_path, hf_folder, capsys):
    to_ours, to_hf = load_tool("convert_from_hf"), load_tool("convert_to_hf")
    output = str(tmp_path / "out")
    assert to_ours.main(["--hf-model", str(tmp_path / "absent"), "--output", output]) == 2
    assert "convert_from_hf: error:" in capsys.readouterr().err
    assert to_hf.main(["--checkpoint", str(hf_folder), "--output", output]) == 2
    assert "convert_to_hf: error:" in capsys.readouterr().err
    for arguments in ([], ["--checkpoint", "x", "--output", "y", "--max-shard-size", "0"]):
        with pytest.raises(SystemExit) as caught:
            to_hf.main(arguments)
        assert caught.value.code == 2
    assert not Path(output).exists()


@pytest.mark.parametrize("name", ["convert_from_hf", "convert_to_hf"])
def test_tools_run_as_scripts(tmp_path, name):
    tool = [sys.executable, f"tools/{name}.py"]
    told = subprocess.run([*tool, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0 and "example" in told.stdout
    source = "--hf-model" if name == "convert_from_hf" else "--checkpoint"
    bad = [*tool, source, str(tmp_path), "--output", str(tmp_path / "out")]
    told = subprocess.run(bad, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 2 and "Traceback" not in told.stderr and "error:" in told.stderr


def test_broken_json_beside_the_weights_is_refused(tmp_path, hf_folder):
    write_tokenizer(hf_folder)
    shutil.copytree(hf_folder, tmp_path / "other")
    import_hf(tmp_path / "other", tmp_path / "ckpt")
    (tmp_path / "ckpt/step_00000000/tokenizer/tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: is not JSON"):
        export_hf(tmp_path / "ckpt", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_step_deleted_during_its_export_is_named(tmp_path, checkpoint):
    step_folder = checkpoint / "step_00000000"

    def delete(line: str) -> None:
        if line.startswith("shard 1 "):
            shutil.rmtree(step_folder)

    with pytest.raises(CheckpointError, match=r"step_00000000: was deleted while it was exported"):
        convert_to_hf(checkpoint, tmp_path / "again", max_shard_bytes=20_000, report=delete)
    assert not (tmp_path / "again").exists()


def test_another_missing_file_is_not_called_a_deleted_step(tmp_path, checkpoint):
    def delete(line: str) -> None:
        shutil.rmtree(next(tmp_path.glob("again.tmp-*")))

    with pytest.raises(FileNotFoundError):
        convert_to_hf(checkpoint, tmp_path / "again", max_shard_bytes=20_000, report=delete)


def test_input_that_is_no_model_is_answered_with_the_next_step(tmp_path, hf_folder):
    for name, message in (
        ("meta-llama/Llama-3.1-8B", "hf download meta-llama/Llama-3.1-8B --local-dir DIR"),
        (str(tmp_path / "absent"), "no such folder; give the folder of a model"),
    ):
        with pytest.raises(CheckpointError, match=message):
            import_hf(Path(name), tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="is a Hugging Face folder; import it with"):
        export_hf(hf_folder, tmp_path / "again")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for folder in (adapter, hf_folder):  # transformers adds it to a whole model too
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"an adapter \(LoRA\).*merge_and_unload"):
            import_hf(folder, tmp_path / "ckpt")


@pytest.mark.parametrize("name", ["convert_from_hf", "convert_to_hf"])
def test_a_full_disk_is_one_line(tmp_path, name):
    save_hf(tmp_path / "hf", intermediate_size=4000)
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    sources = {"convert_from_hf": ["--hf-model", "hf"], "convert_to_hf": ["--checkpoint", "ckpt"]}
    option, source = sources[name]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    done = subprocess.run(
        [
            sys.executable,
            f"tools/{name}.py",
            option,
            tmp_path / source,
            "--output",
            tmp_path / "out",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    lines = [line for line in done.stderr.splitlines() if "Warn" not in line and "warn" not in line]
    assert (done.returncode, len(lines)) == (1, 1), done.stderr
    assert "File too large; nothing was written: see that the disk has room" in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "hf"]

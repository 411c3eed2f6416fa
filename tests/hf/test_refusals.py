"""Input that cannot be converted is refused, and nothing is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lclm.checkpoint.folder import CheckpointError
from tests.checkpoint.samples import (
    edit_json,
    save_hf,
    write_tokenizer,
)
from tests.hf.folders import (
    change_tensors,
    export_hf,
    import_hf,
    load_folder,
)

NORM = "model.norm.weight"


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


def test_broken_json_beside_the_weights_is_refused(tmp_path, hf_folder):
    write_tokenizer(hf_folder)
    shutil.copytree(hf_folder, tmp_path / "other")
    import_hf(tmp_path / "other", tmp_path / "ckpt")
    (tmp_path / "ckpt/step_00000000/tokenizer/tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: is not JSON"):
        export_hf(tmp_path / "ckpt", tmp_path / "again")
    assert not (tmp_path / "again").exists()


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

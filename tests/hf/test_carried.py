"""What a Hugging Face folder says beyond the weights comes back after import, runs and export."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lclm.checkpoint.folder import CheckpointError, read_info, resolve_step_folder
from lclm.hf.convert import convert_from_hf, convert_to_hf
from tests.checkpoint.samples import edit_json, save_after, save_hf, write_tokenizer


def quiet(line: str) -> None:
    """No report."""


def pass_through(folder, tmp_path, tokenizers=(None, None), **options):
    """Import, two runs after each other, export; the export's folder."""
    convert_from_hf(folder, tmp_path / "ckpt", report=quiet)
    first = save_after(tmp_path / "ckpt", tmp_path / "first", tokenizers[0])
    second = save_after(first, tmp_path / "second", tokenizers[1])
    convert_to_hf(second, tmp_path / "again", report=quiet, **options)
    return tmp_path / "again"


def read(folder, name="config.json"):
    return json.loads((folder / name).read_text())


# Of public Llama folders, old and new; none means anything to us.
FOREIGN = {
    "pad_token_id": 7,
    "bos_token_id": 4,
    "eos_token_id": [5, 6],
    "pretraining_tp": 2,
    "attention_dropout": 0.1,
    "use_cache": False,
    "transformers_version": "4.40.0.dev0",
    "_name_or_path": "somebody/model",
    "head_dim": 8,
    "unk_token_id": 0,
    "task_specific_params": {"a": [1, None]},
    "is_llama_config": True,
    "rope_interleaved": False,
    "hidden_dropout": None,
}


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_every_key_comes_back(tmp_path, has_tokenizer):
    folder = tmp_path / "hf"
    save_hf(folder)
    edit_json(folder / "config.json", **FOREIGN)
    edit_json(
        folder / "generation_config.json",
        eos_token_id=[5, 6, 8],
        pad_token_id=9,
        temperature=0.6,
        odd_key=[1],
    )
    if has_tokenizer:
        write_tokenizer(folder)
    again = pass_through(folder, tmp_path)
    for name in ("config.json", "generation_config.json"):
        before, after = read(folder, name), read(again, name)
        assert {key: after.get(key, "lost") for key in before} == before
    added = read(again).keys() - read(folder).keys()
    assert added == {"rope_theta", "rope_scaling", "torch_dtype"}
    assert (
        read(again, "generation_config.json").keys()
        == read(folder, "generation_config.json").keys()
    )


def test_generate_stops_where_it_stopped(tmp_path):
    folder = tmp_path / "hf"
    model = save_hf(folder)
    (folder / "generation_config.json").unlink()
    prompt = model.dummy_inputs["input_ids"][:1] % 53
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    free = model.generate(prompt, eos_token_id=None, **options)[0, prompt.shape[1] :].tolist()
    stop = free[3]
    edit_json(folder / "config.json", eos_token_id=[51, stop])
    again = AutoModelForCausalLM.from_pretrained(pass_through(folder, tmp_path))
    found = again.generate(prompt, **options)[0, prompt.shape[1] :].tolist()
    assert found == free[: free.index(stop) + 1]


def test_absent_ids_stay_absent(tmp_path):
    """transformers means its own defaults by that, as before."""
    save_hf(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").unlink()
    edit_json(tmp_path / "hf" / "config.json", bos_token_id=..., eos_token_id=...)
    again = read(pass_through(tmp_path / "hf", tmp_path))
    assert "bos_token_id" not in again and "eos_token_id" not in again


def test_ids_of_another_tokenizer_take_the_place_of_the_old_ones(tmp_path):
    folder = tmp_path / "hf"
    save_hf(folder)
    edit_json(folder / "config.json", eos_token_id=[2, 3])
    write_tokenizer(tmp_path / "words")  # bos 0, eos 52
    again = pass_through(folder, tmp_path, (tmp_path / "words", None))
    for name in ("config.json", "generation_config.json"):
        tree = read(again, name)
        assert (tree["bos_token_id"], tree["eos_token_id"]) == (0, 52)


def test_the_same_tokenizer_given_again_changes_no_id(tmp_path):
    folder = tmp_path / "hf"
    save_hf(folder)
    write_tokenizer(folder)
    edit_json(folder / "generation_config.json", eos_token_id=[2, 7])
    write_tokenizer(tmp_path / "words")
    again = pass_through(folder, tmp_path, (tmp_path / "words", tmp_path / "words"))
    assert read(again)["eos_token_id"] == 2
    assert read(again, "generation_config.json")["eos_token_id"] == [2, 7]


def test_what_a_scaling_says_beyond_our_fields_comes_back(tmp_path):
    scaling = {"type": "linear", "factor": 4.0, "finetuned": True}
    save_hf(tmp_path / "hf")
    edit_json(
        tmp_path / "hf" / "config.json", rope_parameters=..., rope_theta=1e4, rope_scaling=scaling
    )
    assert read(pass_through(tmp_path / "hf", tmp_path))["rope_scaling"] == scaling


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}),
        ("bias", True),
        ("qkv_bias", True),
        ("logit_scale", 0.5),
        ("is_causal", False),
        ("add_cross_attention", True),
    ],
)
def test_keys_that_change_the_model_are_refused_by_name(tmp_path, key, value):
    save_hf(tmp_path / "hf")
    edit_json(tmp_path / "hf" / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=rf"{key} = .* is not supported"):
        convert_from_hf(tmp_path / "hf", tmp_path / "ckpt", report=quiet)


def test_checkpoints_from_before_are_exported(tmp_path):
    save_hf(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    convert_from_hf(tmp_path / "hf", tmp_path / "ckpt", report=quiet)
    (tmp_path / "ckpt" / "step_00000000" / "hf_source.json").unlink()
    convert_to_hf(tmp_path / "ckpt", tmp_path / "again", report=quiet)
    assert read(tmp_path / "again")["eos_token_id"] == 2  # of generation_config.json


def test_a_damaged_source_is_refused(tmp_path):
    save_hf(tmp_path / "hf")
    convert_from_hf(tmp_path / "hf", tmp_path / "ckpt", report=quiet)
    (tmp_path / "ckpt" / "step_00000000" / "hf_source.json").write_text('{"config": []}')
    with pytest.raises(CheckpointError, match=r"hf_source\.json: must hold the objects config"):
        convert_to_hf(tmp_path / "ckpt", tmp_path / "again", report=quiet)


SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 32}


def lengthened(tmp_path, *lengths, limit=256, **options):
    """Folder of a model of 256 tokens, trained in one run for each of `lengths`, exported."""
    folder = tmp_path / "hf"
    save_hf(folder)
    write_tokenizer(folder)
    edit_json(folder / "tokenizer_config.json", model_max_length=limit)
    edit_json(folder / "generation_config.json", max_length=limit, **SAMPLING)
    edit_json(folder / "config.json", max_length=limit)
    convert_from_hf(folder, tmp_path / "ckpt", report=quiet)
    last = tmp_path / "ckpt"
    for number, length in enumerate(lengths):
        # the tokenizer is given anew each time, as configurations do
        origin = read_info(resolve_step_folder(last))
        reached = max(origin.context_limit, length)
        last = save_after(
            last, tmp_path / f"run{number}", folder, seq_length=length, max_context=reached
        )
    convert_to_hf(last, tmp_path / "again", report=quiet, **options)
    return tmp_path / "again"


@pytest.mark.parametrize(
    ("lengths", "limit", "expected"),
    [
        ((1024,), 256, (1024, 1024)),
        ((2048, 512), 256, (2048, 2048)),  # a short stage after a long one lowers nothing
        ((64,), 256, (256, 256)),
        ((1024,), 4096, (1024, 4096)),
        ((1024,), int(1e30), (1024, int(1e30))),
        ((), 128, (256, 128)),  # only imported: as it was
    ],
)
def test_limits_follow_the_training(tmp_path, lengths, limit, expected):
    again = lengthened(tmp_path, *lengths, limit=limit)
    config, generation = read(again), read(again, "generation_config.json")
    assert config["max_position_embeddings"] == expected[0]
    found = read(again, "tokenizer_config.json")["model_max_length"]
    assert (found, generation["max_length"], config["max_length"]) == (expected[1],) * 3
    assert {key: generation[key] for key in SAMPLING} == SAMPLING


def test_transformers_takes_long_texts_after_lengthening(tmp_path):
    again = lengthened(tmp_path, 1024)
    tokenizer = AutoTokenizer.from_pretrained(again)
    ids = tokenizer("w3 " * 900, truncation=True, return_tensors="pt")["input_ids"]
    assert ids.shape[1] == 900
    model = AutoModelForCausalLM.from_pretrained(again)
    assert (
        model.generate(ids, max_new_tokens=None, pad_token_id=0, eos_token_id=None).shape[1] > 900
    )


def test_absent_limits_stay_absent(tmp_path):
    save_hf(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    convert_from_hf(tmp_path / "hf", tmp_path / "ckpt", report=quiet)
    last = save_after(tmp_path / "ckpt", tmp_path / "run", seq_length=1024)
    convert_to_hf(last, tmp_path / "again", report=quiet)
    assert "model_max_length" not in read(tmp_path / "again", "tokenizer_config.json")
    assert "max_length" not in read(tmp_path / "again", "generation_config.json")


def test_a_tokenizer_file_of_any_name_is_exported(tmp_path):
    save_hf(tmp_path / "hf")
    write_tokenizer(tmp_path / "words")
    file = tmp_path / "words" / "my_tok.json"
    (tmp_path / "words" / "tokenizer.json").rename(file)
    again = pass_through(tmp_path / "hf", tmp_path, (file, None))
    assert AutoTokenizer.from_pretrained(again)("w3 w5")["input_ids"] == [3, 5]


def test_a_tokenizer_of_an_odd_name_in_an_older_checkpoint_is_named(tmp_path):
    save_hf(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    convert_from_hf(tmp_path / "hf", tmp_path / "ckpt", report=quiet)
    folder = tmp_path / "ckpt" / "step_00000000" / "tokenizer"
    file = (folder / "tokenizer.json").rename(folder / "my_tok.json")
    lines = []
    convert_to_hf(tmp_path / "ckpt", tmp_path / "again", report=lines.append)
    assert any(line.endswith(f"if {file} is one, give that file as --tokenizer") for line in lines)
    convert_to_hf(tmp_path / "ckpt", tmp_path / "third", tokenizer=file, report=quiet)
    assert AutoTokenizer.from_pretrained(tmp_path / "third")("w3 w5")["input_ids"] == [3, 5]


def test_generation_config_goes_on_under_another_tokenizer(tmp_path):
    save_hf(tmp_path / "hf")
    edit_json(tmp_path / "hf" / "generation_config.json", eos_token_id=[2, 52], temperature=0.6)
    write_tokenizer(tmp_path / "words")
    again = pass_through(tmp_path / "hf", tmp_path, (None, tmp_path / "words"))
    generation = read(again, "generation_config.json")
    assert (generation["eos_token_id"], generation["temperature"]) == ([2, 52], 0.6)

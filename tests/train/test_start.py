"""Data that does not fit the run or itself is refused before anything is computed or written."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lclm.checkpoint.folder import CheckpointError, write_info, write_latest
from lclm.config import Config, ConfigError, ModelConfig, RopeScaling
from lclm.config_file import dump_toml
from lclm.data.indexed import IndexedWriter
from lclm.data.tokenizer import load_tokenizer
from lclm.hf.safetensors_folder import TensorSpec
from lclm.hf.torch_dist import write_torch_dist
from lclm.train.__main__ import main
from lclm.train.stages import plan_stages, plan_validation
from lclm.train.start import find_start
from tests.checkpoint.samples import checkpoint_info
from tests.train.tiny import VOCAB_SIZE, tiny_config


def write(prefix: Path, sha256: str | None, vocab_size: int = VOCAB_SIZE) -> str:
    """40 documents of 64 tokens, said to be of the tokenizer with this digest."""
    with IndexedWriter(str(prefix), vocab_size) as writer:
        if sha256 is not None:
            writer.metadata["tokenizer"] = {"sha256": sha256}
        for start in range(40):
            writer.add_document((np.arange(64) + start) % VOCAB_SIZE)
    return str(prefix)


def write_weights(folder: Path, **fields: Any) -> None:
    """A step folder whose files can be read and hold one number."""
    folder.mkdir(exist_ok=True)
    write_torch_dist(folder, [TensorSpec("a", (1,), torch.float32)], lambda name: torch.zeros(1))
    write_info(folder, checkpoint_info(**fields))


def config_of(folder: Path, *prefixes: str, **changes: object) -> Config:
    """A stage for each prefix."""
    base = tiny_config(folder / "run").stage[0].model_dump(exclude={"mixture"})
    stages = [
        base | {"mixture": [{"prefix": prefix, "packing": "concat", "share": 1.0}]}
        for prefix in prefixes
    ]
    return tiny_config(folder / "run", stage=stages, **changes)


def dry_run(config: Config, folder: Path) -> int:
    (folder / "run.toml").write_text(dump_toml(config))
    with pytest.MonkeyPatch.context() as patch:  # the log of this process is pytest's
        patch.setattr("lclm.command_line.setup_logging", lambda: None)
        return main([str(folder / "run.toml"), "--dry-run"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__vocab_size": 64}, "more than model.vocab_size(64)"),
        ({"data__tokenizer": "absent"}, "absent"),
        ({"model__init_from": "absent"}, "checkpoint absent: no such folder"),
        ({"checkpoint__resume": "required"}, "has no checkpoint"),
        ({"validation__rows_per_domain": 2, "data__held_out_fraction": 0.0}, "held out"),
        ({"stage__0__mixture__0__prefix": "absent"}, "absent"),
        ({"stage__0__tokens": 64 * 256 * 9}, "data.max_epochs"),
    ],
    ids=["vocabulary", "tokenizer", "init", "checkpoint", "held out", "prefix", "too little data"],
)
def test_a_dry_run_refuses_what_a_start_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert dry_run(config_of(tmp_path, write(tmp_path / "a", None), **changes), tmp_path) == 2
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_left_out_is_that_of_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix, weights = write(tmp_path / "a", None), tmp_path / "weights"
    config = config_of(tmp_path, prefix)
    write_weights(weights, model=config.model.recorded_fields(), rope_base=1e4)
    dump = dump_toml(config).replace('init_from = ""\n', "")
    lines = dump.split("[model]\n")[1].split("\n\n")[0]

    def dry_run_with(model: str) -> tuple[int, str]:
        (tmp_path / "run.toml").write_text(dump.replace(lines, model))
        status = main([str(tmp_path / "run.toml"), "--dry-run"])
        said = capsys.readouterr()
        return status, said.out + said.err

    status, whole = dry_run_with(lines + f'\ninit_from = "{weights}"')
    assert status == 0 and dry_run_with(f'init_from = "{weights}"') == (0, whole)
    other = dry_run_with(f'init_from = "{weights}"\nnum_kv_heads = 4')
    assert other[0] == 2 and "is of another architecture: num_kv_heads" in other[1]
    status, said = dry_run_with("")
    assert status == 2 and "model.num_layers: missing" in said
    status, said = dry_run_with('init_from = "absent"')
    assert status == 2 and "checkpoint absent: no such folder" in said


def test_a_dry_run_says_where_it_starts_and_which_step_is_for_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write(tmp_path / "a", None)
    one_step = {"stage__0__tokens": 256, "stage__0__min_lr": 0.0}
    assert dry_run(config_of(tmp_path, prefix, prefix, **one_step), tmp_path) == 0
    said = capsys.readouterr().out
    nothing = "step 1 changes no weight: its learning rate is 0; set stage.0.min_lr above 0"
    assert said.count("changes no weight") == 1 and nothing in said
    assert "start      from random weights" in said


def test_weights_of_another_rotary_embedding_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lclm"), "propagate", True)
    prefix, weights = write(tmp_path / "a", None), tmp_path / "weights"
    config = config_of(tmp_path, prefix, model__init_from=str(weights))
    llama3 = RopeScaling(type="llama3", factor=8.0)

    def start(model: ModelConfig, rope_base: float) -> str:
        write_weights(weights, model=model.recorded_fields(), rope_base=rope_base)
        caplog.clear()
        assert find_start(config).weights == weights
        return caplog.text

    assert start(config.model, 1e4) == ""
    said = start(config.model.model_copy(update={"rope_scaling": llama3}), 5e5)
    assert f"model.init_from({weights}) was trained with rope_scaling {{'type': 'llama3'" in said
    assert "but model.rope_scaling is None" in said
    assert "rope_base 500000, but stage.0.rope_base is 10000" in said


def test_weights_alone_are_not_gone_on_with(tmp_path: Path) -> None:
    config = config_of(tmp_path, write(tmp_path / "a", None), checkpoint__resume="required")
    step = tmp_path / "run" / "checkpoints" / "step_00000000"
    step.mkdir(parents=True)
    write_info(step, checkpoint_info(step=0, has_optimizer=False))
    write_latest(step.parent, step.name)
    with pytest.raises(CheckpointError, match=r"holds weights only .* with model\.init_from"):
        find_start(config)


def test_stages_of_different_tokenizers(tmp_path: Path) -> None:
    a, b, plain = write(tmp_path / "a", "1" * 64), write(tmp_path / "b", "2" * 64), write(
        tmp_path / "plain", None
    )  # fmt: skip
    find_start(config_of(tmp_path, a, plain))
    with pytest.raises(ValueError, match=rf"{a} and {b} were written with different tokenizers"):
        find_start(config_of(tmp_path, a, plain, b))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_did_not_write_the_data_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lclm"), "propagate", True)
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    for name, words in {"one": {"a": 0, "b": 1}, "two": {"a": 1, "b": 0}}.items():
        (tmp_path / name).mkdir()
        Tokenizer(WordLevel(words, "a")).save(str(tmp_path / name / "tokenizer.json"))
    data = write(tmp_path / "data", None)
    tree = json.loads((tmp_path / "data.json").read_text())
    described = load_tokenizer(tmp_path / "one").describe()
    (tmp_path / "data.json").write_text(json.dumps(tree | {"tokenizer": described}))
    other_spelling = json.dumps(json.loads((tmp_path / "one/tokenizer.json").read_text()), indent=8)
    (tmp_path / "one/tokenizer.json").write_text(other_spelling)
    start = find_start(config_of(tmp_path, data, data__tokenizer=str(tmp_path / "one")))
    assert start.tokenizer == tmp_path / "one" and not caplog.records
    find_start(config_of(tmp_path, data, data__tokenizer=str(tmp_path / "two")))
    assert f"{data} was written with another tokenizer than data.tokenizer" in caplog.text


def test_a_vocabulary_larger_than_the_models(tmp_path: Path) -> None:
    wide = write(tmp_path / "wide", None, VOCAB_SIZE + 1)
    with pytest.raises(ConfigError, match=r"wide was written with a vocabulary of 97 tokens, more"):
        find_start(config_of(tmp_path, wide))


def test_ids_beyond_the_vocabulary_are_named_when_they_are_read(tmp_path: Path) -> None:
    """A file without .json says nothing of its vocabulary."""
    prefix = write(tmp_path / "a", None)
    tokens = np.fromfile(f"{prefix}.bin", np.uint16)
    tokens[64 * 7 + 3] = VOCAB_SIZE
    tokens.tofile(f"{prefix}.bin")
    Path(f"{prefix}.json").unlink()
    config = config_of(
        tmp_path, prefix, stage__0__tokens=40 * 64, stage__0__tokens_per_step=64,
        data__held_out_fraction=0.0,
    )  # fmt: skip
    find_start(config)
    rows = plan_stages(config)[0]
    problems = []
    for number in range(len(rows)):  # an epoch: every document is in one row
        try:
            rows.row(number)
        except ValueError as error:
            problems.append(str(error))
    assert len(problems) == 1
    where = "a.bin: tokens [0, 64) of document 7 hold ids from 7 to 96, the model's vocabulary has"
    assert where in problems[0] and "inspect_data.py --verify" in problems[0]


def test_held_out_rows_are_looked_at_too(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", None)
    np.full(40 * 64, VOCAB_SIZE, np.uint16).tofile(f"{prefix}.bin")
    config = config_of(tmp_path, prefix, validation__rows_per_domain=1)
    with pytest.raises(ValueError, match=r"a\.bin: .* hold ids from 96 to 96"):
        plan_validation(config)[0][0].row(0)

"""Data that does not fit the run or itself is refused before anything is computed or written."""

import logging
from pathlib import Path

import numpy as np
import pytest

from lclm.config import Config, ConfigError
from lclm.data.indexed import IndexedWriter
from lclm.data.tokenizer import load_tokenizer
from lclm.train.stages import missing_data, plan_stages, plan_validation
from lclm.train.start import find_start
from tests.train.tiny import VOCAB_SIZE, tiny_config


def write(prefix: Path, sha256: str | None, vocab_size: int = VOCAB_SIZE) -> str:
    """40 documents of 64 tokens, said to be of the tokenizer with this digest."""
    with IndexedWriter(str(prefix), vocab_size) as writer:
        if sha256 is not None:
            writer.metadata["tokenizer"] = {"sha256": sha256}
        for start in range(40):
            writer.add_document((np.arange(64) + start) % VOCAB_SIZE)
    return str(prefix)


def config_of(folder: Path, *prefixes: str, **changes: object) -> Config:
    """A stage for each prefix."""
    base = tiny_config(folder / "run").stage[0].model_dump(exclude={"mixture"})
    stages = [
        base | {"mixture": [{"prefix": prefix, "packing": "concat", "share": 1.0}]}
        for prefix in prefixes
    ]
    return tiny_config(folder / "run", stage=stages, **changes)


def test_stages_of_different_tokenizers(tmp_path: Path) -> None:
    a, b, plain = write(tmp_path / "a", "1" * 64), write(tmp_path / "b", "2" * 64), write(
        tmp_path / "plain", None
    )  # fmt: skip
    find_start(config_of(tmp_path, a, plain))
    with pytest.raises(ValueError, match=rf"{a} and {b} were written with different tokenizers"):
        find_start(config_of(tmp_path, a, plain, b))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_file_that_did_not_write_the_data_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lclm"), "propagate", True)
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"a": 0, "b": 1}, "a")).save(str(tmp_path / "tokenizer.json"))
    file = str(tmp_path / "tokenizer.json")
    good = write(tmp_path / "good", load_tokenizer(file).sha256)
    start = find_start(config_of(tmp_path, good, data__tokenizer=file))
    assert start.tokenizer == Path(file) and not caplog.records
    other = write(tmp_path / "other", "1" * 64)
    find_start(config_of(tmp_path, other, data__tokenizer=file))
    assert f"{other} was written with another tokenizer file than data.tokenizer" in caplog.text


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


def test_urls_are_not_missing_before_they_are_asked_for(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", None)
    config = config_of(tmp_path, prefix, "s3://bucket/books", "absent")
    assert missing_data(config) == ["absent.idx"]

"""What a resumed run may change, what it is told of, and what it is refused."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lclm.checkpoint.folder import CheckpointError
from lclm.config import Config
from lclm.data.indexed import IndexedReader, IndexedWriter
from lclm.train.changes import NUM_SAMPLES, SAMPLE_BYTES, check_changes, describe_data
from lclm.train.changes import record_settings as record
from tests.checkpoint.samples import checkpoint_info
from tests.train.sample_data import write_domain
from tests.train.tiny import VOCAB_SIZE, tiny_config


def config_of(prefixes: list[str], **changes: Any) -> Config:
    """Two stages over these prefixes in equal shares."""
    mixture = [
        {"prefix": prefix, "packing": "concat", "share": 1 / len(prefixes)} for prefix in prefixes
    ]
    settings = {"stage__0__mixture": mixture, "stage__1__mixture": mixture, **changes}
    return tiny_config("unused", **settings)


def describe(config: Config) -> dict[str, Any]:
    return {prefix: describe_data(IndexedReader(prefix)) for prefix in config.prefixes}


def resume(old: Config, new: Config, old_data: dict[str, Any], stage_step: int = 2) -> None:
    """Check `new` against a checkpoint of `old` in its first stage."""
    info = checkpoint_info(stage=0, stage_step=stage_step, config=record(old), data=old_data)
    check_changes(new, describe(new), Path("checkpoint"), info)


@pytest.fixture
def prefixes(tmp_path: Path) -> list[str]:
    return [write_domain(tmp_path / name, 40, 90, seed=seed) for seed, name in enumerate("ab")]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(logging.getLogger("lclm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="lclm")
    return caplog


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 8}, "seed: 1234 -> 8"),
        ({"data__held_out_fraction": 0.3}, "data.held_out_fraction: 0.01 -> 0.3"),
        (
            {"stage__0__mixture__0__share": 0.9, "stage__0__mixture__1__share": 0.1},
            "stage.0.mixture.0.share: 0.5 -> 0.9; stage.0.mixture.1.share: 0.5 -> 0.1",
        ),
        (
            {"stage__0__mixture__0__packing": "best-fit"},
            "stage.0.mixture.0.packing: 'concat' -> 'best-fit'",
        ),
        ({"stage__0__seq_length": 32}, "stage.0.seq_length: 64 -> 32"),
    ],
    ids=["seed", "held out", "shares", "packing", "seq_length"],
)
def test_what_decides_rows_is_refused_unless_it_is_meant(
    prefixes: list[str], log: Any, changes: dict[str, Any], message: str
) -> None:
    old = config_of(prefixes)
    with pytest.raises(CheckpointError) as error:
        resume(old, config_of(prefixes, **changes), describe(old))
    assert message in str(error.value) and "data.allow_changed=true" in str(error.value)
    resume(old, config_of(prefixes, data__allow_changed=True, **changes), describe(old))
    for part in message.split("; "):
        assert f"changed, as data.allow_changed says: {part}" in log.text


def test_a_stage_that_has_not_begun_may_change(prefixes: list[str], log: Any) -> None:
    old = config_of(prefixes)
    new = config_of(prefixes, stage__1__mixture=old.model_dump()["stage"][1]["mixture"][:1])
    resume(old, new, describe(old))
    assert "changed: stage.1.mixture.1.share: 0.5 -> None" in log.text


def test_other_tokens_of_the_same_lengths_are_refused(prefixes: list[str]) -> None:
    old = config_of(prefixes)
    before = describe(old)
    tokens = np.fromfile(f"{prefixes[1]}.bin", np.uint16)
    tokens[5] = (tokens[5] + 1) % VOCAB_SIZE
    tokens.tofile(f"{prefixes[1]}.bin")
    with pytest.raises(CheckpointError, match=rf"{prefixes[1]}: content: '\w+' -> '\w+'"):
        resume(old, old, before)


def test_other_documents_are_refused_by_each_value(prefixes: list[str]) -> None:
    old = config_of(prefixes)
    before = describe(old)
    write_domain(Path(prefixes[0]), 50, 90, seed=0)
    with pytest.raises(CheckpointError, match=rf"{prefixes[0]}: documents: 40 -> 50"):
        resume(old, old, before)


def test_the_same_files_elsewhere_are_the_same(prefixes: list[str], log: Any) -> None:
    old = config_of(prefixes)
    moved = [write_domain(Path(f"{p}-moved"), 40, 90, seed=n) for n, p in enumerate(prefixes)]
    resume(old, config_of(moved), describe(old))
    assert f"changed: stage.0.mixture.0.prefix: {prefixes[0]!r} -> {moved[0]!r}" in log.text


def test_other_settings_are_logged(prefixes: list[str], log: Any) -> None:
    old = config_of(prefixes)
    scaling = {"type": "linear", "factor": 4.0}
    new = config_of(
        prefixes,
        model__rope_scaling=scaling,
        optimizer__beta2=0.99,
        stage__0__rope_base=5e4,
        stage__0__tokens=8 * 256,
        run__dir="other",
        train__max_steps=7,
    )
    resume(old, new, describe(old))
    said = [record.getMessage() for record in log.records]
    assert said == [
        "changed: optimizer.beta2: 0.95 -> 0.99",
        "changed: stage.0.rope_base: 10000.0 -> 50000.0",
        "changed: stage.0.tokens: 1024 -> 2048",
        "changed: model.rope_scaling.type: None -> 'linear'",
        "changed: model.rope_scaling.factor: None -> 4.0",
        "changed: model.rope_scaling.low_freq_factor: None -> 1.0",
        "changed: model.rope_scaling.high_freq_factor: None -> 4.0",
        "changed: model.rope_scaling.original_length: None -> 8192",
        "changed: model.rope_scaling.beta_fast: None -> 32.0",
        "changed: model.rope_scaling.beta_slow: None -> 1.0",
        "changed: stage 0 has 32 rows instead of 16, so they are dealt anew: some that were "
        "trained on may come again",
        "changed: the learning rate does not go on where it was: 1.550e-03 at step 2 of stage 0, "
        "1.879e-03 at the next",
    ]


def test_an_unchanged_run_says_nothing(prefixes: list[str], log: Any) -> None:
    resume(config_of(prefixes), config_of(prefixes), describe(config_of(prefixes)))
    assert not log.records


def test_a_checkpoint_without_a_record_is_not_compared(prefixes: list[str], log: Any) -> None:
    new = config_of(prefixes)
    check_changes(new, describe(new), Path("checkpoint"), checkpoint_info())
    assert "holds no record of its data and settings" in log.text


def test_a_large_file_is_sampled_from_its_first_to_its_last_byte(tmp_path: Path) -> None:
    """Each of the sampled pieces counts; the time does not grow with the file."""
    prefix = str(tmp_path / "large")
    num_tokens = NUM_SAMPLES * SAMPLE_BYTES  # twice as many bytes
    with IndexedWriter(prefix, VOCAB_SIZE) as writer:
        writer.add_document(np.zeros(num_tokens, np.int64))
    seen = {describe_data(IndexedReader(prefix))["content"]}
    for place in (0, num_tokens - 1, num_tokens - SAMPLE_BYTES // 2):
        tokens = np.zeros(num_tokens, np.uint16)
        tokens[place] = 1
        tokens.tofile(f"{prefix}.bin")
        seen.add(describe_data(IndexedReader(prefix))["content"])
    assert len(seen) == 4

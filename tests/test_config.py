"""Every rule of the configuration, by the message a user gets."""

import re
from pathlib import Path

import pytest

from lclm.config import Config, ConfigError, Section, check_world
from lclm.config_file import dump_toml, load_config

RUN = """
[run]
dir = "runs/x"
[model]
num_layers = 4
hidden_size = 32
ffn_hidden_size = 64
num_attention_heads = 4
num_kv_heads = 2
vocab_size = 96
[[stage]]
name = "one"
seq_length = 64
rope_base = 1e4
tokens = 1024
tokens_per_step = 256
lr = 1e-2
[[stage.mixture]]
prefix = "a"
packing = "concat"
share = 0.5
[[stage.mixture]]
prefix = "b"
packing = "exact"
piece_length = 32
share = 0.5
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


def test_defaults_and_overrides(run_file: Path) -> None:
    config = load_config(
        run_file,
        [
            "parallel.cp=2",
            "stage.0.lr=5e-3",
            "run.dir=other place",
            "model.tie_embeddings=true",
        ],
    )
    assert config.parallel.cp == 2
    assert config.stage[0].lr == 5e-3
    assert config.run.dir == "other place"
    assert config.model.tie_embeddings is True
    assert (config.stage[0].num_steps, config.stage[0].rows_per_step) == (4, 4)
    assert config.model.head_size == 8


def test_what_is_dumped_reads_back_equal(run_file: Path, tmp_path: Path) -> None:
    scaling = 'model.rope_scaling={type="linear", factor=2.0}'
    config = load_config(run_file, ['run.dir=a"quoted\\name', scaling])
    path = tmp_path / "dumped.toml"
    path.write_text(dump_toml(config))
    assert load_config(path) == config


MESSAGES = [
    ("train.max_step=2", "train.max_step: unknown field; did you mean 'max_steps'?"),
    ("paralel.cp=2", "paralel: unknown field; did you mean 'parallel'?"),
    ("stage.0.lerning_rate=1", "stage.0.lerning_rate: unknown field; known here: name, seq_length"),
    ("model.rope_scaling.type=dynamic", "model.rope_scaling.type = 'dynamic'"),
    ("model.vocab_size=many", "model.vocab_size = 'many': Input should be a valid integer"),
    ("parallel.cp=0", "parallel.cp = 0: Input should be greater than 0"),
    ("seed", "override 'seed': write key.path=value"),
    ("run.dir.x=1", "run.dir is a value, not a table"),
    ("stage.1.lr=1", "override: stage.1: '1' is not one of the 1 entries 0..0; count from 0"),
    ("model.num_kv_heads=3", "num_kv_heads(3) must divide num_attention_heads(4)"),
    ("model.hidden_size=30", "num_attention_heads(4) must divide hidden_size(30), or set"),
    ("model.head_dim=7", "head size 7 must be even"),
    ("parallel.tp=3", "model.num_attention_heads(4) must be divisible by parallel.tp(3)"),
    ("parallel.pp=3", "model.num_layers(4) must be divisible by parallel.pp(3)"),
    ("parallel.cp=3", "stage.0.seq_length(64) must be divisible by 3: 3 chunks of the auto"),
    ("stage.0.tokens_per_step=200", "tokens_per_step(200) must be a multiple of seq_length(64)"),
    ("stage.0.tokens=1000", "must be a multiple of tokens_per_step(256); the nearest is 1024"),
    ("stage.0.min_lr=1", "stage.0.min_lr(1.0) is above lr(0.01)"),
    ("stage.0.mixture.0.share=0.6", "stage.0.mixture: the shares add up to 1.100000"),
    ("stage.0.mixture.0.share=0", "stage.0.mixture.0.share = 0: a share is a number above 0 and"),
    ("stage.0.mixture.0.share=-0.5", "stage.0.mixture.0.share = -0.5: a share is a number above 0"),
    ("stage.0.mixture.0.share=half", "stage.0.mixture.0.share = 'half': a share is a number"),
    ("stage.0.mixture.0.share=true", "stage.0.mixture.0.share = True: a share is a number"),
    ("stage.0.mixture.0.share=nan", "stage.0.mixture.0.share = nan: a share is a number"),
    ("stage.0.mixture.0.share=[0, 0]", "share = [0, 0]: a share is a number above 0 and at most 1"),
    ("stage.0.mixture.0.share=[0.5]", "share = [0.5]: a share is a number above 0 and at most 1"),
    ("stage.0.mixture.0.share=[-0.1, 0.5]", "share = [-0.1, 0.5]: a share is a number above 0"),
    ("stage.0.mixture.0.share=[0.4, 0.5]", "shares add up to 0.900000 at the stage's start; they"),
    ("stage.0.mixture.0.share=[0.5, 0.6]", "shares add up to 1.100000 at the stage's end; they"),
    ("validation.every_steps=5", "has no effect while validation.rows_per_domain is 0"),
    ("stage.0.mixture.0.piece_length=8", "0.piece_length(8) has no effect with packing concat"),
    ("stage.0.mixture.1.prefix=a", "1.packing(exact): an entry before has prefix(a) with packing"),
    ("stage.0.mixture.1.piece_length=48", "piece_length(48) must divide seq_length(64)"),
]


@pytest.mark.parametrize(("override", "message"), MESSAGES, ids=[m[0] for m in MESSAGES])
def test_each_rule_says_what_to_do(run_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(run_file, [override])


def test_shares_that_change(run_file: Path, tmp_path: Path) -> None:
    changes = ["stage.0.mixture.0.share=[0, 1]", "stage.0.mixture.1.share=[1.0, 0.0]"]
    config = load_config(run_file, changes)
    assert [entry.share_ends for entry in config.stage[0].mixture] == [(0, 1), (1, 0)]
    path = tmp_path / "dumped.toml"
    path.write_text(dump_toml(config))
    assert load_config(path) == config


def test_constant_schedule_refuses_a_floor(run_file: Path) -> None:
    with pytest.raises(ConfigError, match="has no effect when constant"):
        load_config(run_file, ["stage.0.schedule=constant", "stage.0.min_lr=1e-3"])


def test_zigzag_cuts_twice_as_fine(run_file: Path) -> None:
    changes = ["parallel.cp=2", "stage.0.seq_length=34", "stage.0.tokens_per_step=34"]
    changes += ["stage.0.tokens=34", "stage.0.mixture.1.piece_length=0"]
    load_config(run_file, changes)
    with pytest.raises(ConfigError, match="must be divisible by 4: 4 chunks of the zigzag"):
        load_config(run_file, [*changes, "parallel.cp_layout=zigzag"])


def test_validation_needs_held_out_documents(run_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"set data\.held_out_fraction above 0"):
        load_config(run_file, ["validation.rows_per_domain=2", "data.held_out_fraction=0"])


def test_a_typo_is_not_buried_and_a_number_is_to_be_quoted(run_file: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(run_file, ["stage.0.learning_rate=1"])
    assert str(error.value).startswith(
        "config: stage.0.learning_rate: unknown field; known here: name, seq_length"
    )
    assert "input" not in str(error.value) and "item" not in str(error.value)
    assert str(error.value).count(";") == 1
    with pytest.raises(ConfigError, match=re.escape("quote it: 'run.dir=\"2024\"'")):
        load_config(run_file, ["run.dir=2024"])
    assert load_config(run_file, ['run.dir="2024"']).run.dir == "2024"
    with pytest.raises(ConfigError, match=r"stage = .*at least 1 item"):
        load_config(run_file, ["stage=[]"])


def test_missing_field_and_missing_or_broken_file(run_file: Path, tmp_path: Path) -> None:
    run_file.write_text(RUN.replace("vocab_size = 96", ""))
    with pytest.raises(ConfigError, match=re.escape("model.vocab_size: missing; set it")):
        load_config(run_file)
    run_file.write_text("[run")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_config(run_file)
    with pytest.raises(ConfigError, match="is not a file"):
        load_config(tmp_path / "absent.toml")


CONTEXT_MESSAGES = [
    ("cp_comm=rong", "parallel.cp_comm = 'rong': Input should be 'auto', 'gather'"),
    ("cp_ulysses=2", "parallel.cp_ulysses(2) has no effect with cp_comm 'auto'; remove it"),
    ("cp_comm=ulysses_ring", "parallel.cp_ulysses(0) must divide parallel.cp(8) and lie between 1"),
    ("cp_comm=ulysses_ring cp_ulysses=3", "parallel.cp_ulysses(3) must divide parallel.cp(8)"),
    ("cp_comm=ulysses_ring cp_ulysses=8", "parallel.cp_ulysses(8) must divide parallel.cp(8) and"),
    ("cp_comm=ulysses", "8 context ranks share the heads with cp_comm 'ulysses', which does not"),
    ("cp_comm=ulysses_ring cp_ulysses=4 tp=2", "num_attention_heads(4) / tp(2) = 2; use cp_comm"),
]


@pytest.mark.parametrize(
    ("changes", "message"), CONTEXT_MESSAGES, ids=[m[0] for m in CONTEXT_MESSAGES]
)
def test_rules_of_context_parallelism(run_file: Path, changes: str, message: str) -> None:
    overrides = [
        f"parallel.{change}" for change in ["cp=8", "cp_layout=contiguous", *changes.split()]
    ]
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(run_file, overrides)


def test_context_modes_that_fit(run_file: Path) -> None:
    for comm in ("ring", "ulysses"):
        assert load_config(run_file, ["parallel.cp=4", f"parallel.cp_comm={comm}"])
    both = ["parallel.cp_comm=ulysses_ring", "parallel.cp_ulysses=2"]
    assert load_config(run_file, ["parallel.cp=4", *both]).parallel.cp_ulysses == 2


def test_world(run_file: Path) -> None:
    config = load_config(run_file, ["parallel.tp=2", "parallel.cp=2"])
    assert check_world(config, 4) == 1
    assert check_world(config, 8) == 2
    with pytest.raises(
        ConfigError, match=re.escape("tp(2) * pp(1) * cp(2) = 4 does not divide the world size 6")
    ):
        check_world(config, 6)
    with pytest.raises(ConfigError, match="4 rows a step cannot be dealt equally to 3"):
        check_world(config, 12)


def test_every_field_is_documented() -> None:
    """The text under each field is its documentation; none may lack one."""

    def fields(section: type[Section], prefix: str) -> list[str]:
        found = []
        for name, field in section.model_fields.items():
            inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
            nested = [t for t in inner if isinstance(t, type) and issubclass(t, Section)]
            if nested:
                found += fields(nested[0], f"{prefix}{name}.")
            elif not field.description:
                found.append(prefix + name)
        return found

    assert fields(Config, "") == []

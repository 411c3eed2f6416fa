"""The papers' configurations are real: they resolve, have the sizes they claim, plan steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lclm.config import check_world
from lclm.config_file import load_config
from lclm.context.plan.layouts import build_row_plan
from tests.distributed import run_distributed

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples" / "configs" / "prolong.toml"
LLAMA_3_8B = 8_030_261_248


@pytest.mark.parametrize(
    ("world_size", "overrides", "dp", "micro_batches"),
    [
        (8, [], 1, (64, 16)),
        (64, [], 8, (8, 2)),
        (8, ["parallel.tp=2", "parallel.cp=4"], 1, (64, 16)),
        (64, ["parallel.tp=2", "parallel.cp=4"], 8, (8, 2)),
        (64, ["parallel.tp=4", "parallel.pp=2", "parallel.cp=8"], 1, (64, 16)),
    ],
)
def test_it_resolves(
    world_size: int, overrides: list[str], dp: int, micro_batches: tuple[int, int]
) -> None:
    config = load_config(CONFIG, overrides)
    assert check_world(config, world_size) == dp
    assert tuple(stage.rows_per_step // dp for stage in config.stage) == micro_batches


def test_it_says_what_the_paper_says() -> None:
    first, second = load_config(CONFIG).stage
    assert (first.num_steps, second.num_steps) == (5000, 2500)
    assert (first.rows_per_step, second.rows_per_step) == (64, 16)
    assert first.tokens == second.tokens == 5000 * 4 * 2**20
    long_share = sum(e.share for e in second.mixture if e.piece_length == 524288)
    assert long_share == pytest.approx(0.20)
    assert second.optimizer_state == "carry"


@pytest.mark.parametrize(
    ("name", "parameters", "steps", "rows_per_step"),
    [("prolong_sft", LLAMA_3_8B, 250, 64), ("llama2_long", 6_738_415_616, 100_000, 128)],
)
def test_the_other_recipes_resolve(
    name: str, parameters: int, steps: int, rows_per_step: int
) -> None:
    config = load_config(CONFIG.with_name(f"{name}.toml"))
    (stage,) = config.stage
    assert config.model.num_parameters() == parameters
    assert (stage.num_steps, stage.rows_per_step) == (steps, rows_per_step)
    assert check_world(config, 64) == 8


def count_parameters() -> int:
    """Parameters of the model on the meta device."""
    import torch

    config = load_config(CONFIG, ["parallel.cp=1"])
    from lclm.mesh import build_mesh

    mesh = build_mesh(config)
    from lclm.model.build import build_model

    model = build_model(config, mesh, torch.device("meta"))
    assert all(weight.is_meta for weight in model.parameters())
    return sum(weight.numel() for weight in model.parameters())


def test_it_builds_llama_3_8b() -> None:
    assert load_config(CONFIG).model.num_parameters() == LLAMA_3_8B
    assert run_distributed(count_parameters, 1) == [LLAMA_3_8B]


@pytest.mark.parametrize("world_size", [8, 64])
def test_it_plans_the_first_512k_step(tmp_path: Path, world_size: int) -> None:
    """Rows of the first 512K step, dealt to ranks: who holds which tokens of which row."""
    from lclm.train.stages import find_position, plan_stages
    from tests.train.sample_data import write_lengths

    config = load_config(CONFIG)
    stage = config.stage[1]
    # One step of each stage from documents as long as the packing needs; zeros on disk.
    long_docs, short_docs = [600_000] * 40, [3_000, 70_000, 900] * 100
    changes = []
    for number, part in enumerate(config.stage):
        changes.append(f"stage.{number}.tokens={part.tokens_per_step}")
        for place, entry in enumerate(part.mixture):
            prefix = tmp_path / Path(entry.prefix).name
            if not prefix.with_suffix(".idx").exists():
                write_lengths(prefix, long_docs if entry.packing == "exact" else short_docs)
            changes.append(f"stage.{number}.mixture.{place}.prefix={prefix}")
    planned = plan_stages(load_config(CONFIG, changes))
    position = find_position(config, config.stage[0].num_steps)
    assert (position.stage, position.stage_step) == (1, 0)
    dp_size = check_world(config, world_size)
    assert stage.rows_per_step % dp_size == 0
    kinds = set()
    for number in range(stage.rows_per_step):
        row = planned[1].row(number)
        assert len(row.tokens) == row.doc_lengths.sum() == 524288
        kinds.add(tuple(row.doc_lengths.tolist())[:2])
        plan = build_row_plan(config.parallel.cp_layout, row.doc_lengths, config.parallel.cp)
        held = np.concatenate([plan.positions(rank) for rank in range(8)])
        assert len(held) == 524288 and np.array_equal(np.sort(held), np.arange(524288))
        assert all(len(plan.positions(rank)) == 65536 for rank in range(8))
    assert (524288,) in kinds and (65536, 65536) in kinds

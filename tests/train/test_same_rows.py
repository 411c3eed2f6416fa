"""The same rows in the same steps, whatever the layout and wherever a run was stopped.

No training: the trainer's own reading of micro-batches, once for every rank of a layout, put
together again to whole rows and hashed.
"""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lclm.config import Config, check_config
from lclm.context.parallel import ContextParallel
from lclm.context.plan.cost import GATHER, CostModel
from lclm.context.plan.row_plan import RowPlan
from lclm.data.indexed import IndexedWriter
from lclm.data.stage_rows import Row
from lclm.train.loop import Run
from lclm.train.micro_batch import MicroBatch, MicroBatchBuilder
from lclm.train.stages import find_position, plan_stages
from tests.train.sample_data import write_domain
from tests.train.tiny import VOCAB_SIZE, tiny_config

STEPS = 4  # of each stage
ROWS = 8  # of each step
SEQ_LENGTHS = (64, 128, 256)
# dp, cp, cp_layout
LAYOUTS = [(1, 1, "auto"), (2, 1, "auto"), (4, 1, "auto"), (2, 2, "zigzag"), (1, 4, "auto")]
STOPS = {"fresh": 0, "within the first": 3, "at a border": 4, "within the third": 10}

Hashes = dict[int, list[str]]  # step -> of its rows, sorted


def write_chat(prefix: Path) -> str:
    """Conversations of 5 to 60 tokens of which the second half are targets."""
    random = np.random.default_rng(3)
    with IndexedWriter(str(prefix), VOCAB_SIZE, (0.0, 1.0)) as writer:
        writer.metadata["is_chat"] = True
        for length in random.integers(5, 61, 150).tolist():
            targets = (np.arange(length) >= length // 2).astype(np.uint8)
            writer.add_document(random.integers(0, VOCAB_SIZE, length), targets)
    return str(prefix)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Three stages over three domains and every packing; two of them with changing shares."""
    folder = tmp_path_factory.mktemp("rows")
    short = write_domain(folder / "short", num_docs=300, max_length=90, seed=1)
    long = write_domain(folder / "long", num_docs=60, max_length=900, seed=2)
    chat = write_chat(folder / "chat")

    def mixture(*parts: tuple[str, str, int, object]) -> list[dict[str, object]]:
        names = ("prefix", "packing", "piece_length", "share")
        return [dict(zip(names, part, strict=True)) for part in parts]

    mixtures = [
        mixture((short, "concat", 0, [0.9, 0.4]), (long, "exact", 32, [0.1, 0.6])),
        mixture(
            (short, "best-fit", 0, 0.5), (chat, "best-fit", 0, 0.25), (long, "concat", 0, 0.25)
        ),
        mixture(
            (short, "concat", 0, 0.3),
            (long, "exact", 256, [0.0, 0.4]),
            (long, "exact", 64, [0.7, 0.3]),
        ),
    ]
    stages = [
        {
            "name": f"stage {number}",
            "seq_length": length,
            "rope_base": 1e4,
            "tokens": STEPS * ROWS * length,
            "tokens_per_step": ROWS * length,
            "lr": 1e-3,
            "mixture": mixtures[number],
        }
        for number, length in enumerate(SEQ_LENGTHS)
    ]
    config = tiny_config(folder / "run", stage=stages, data__held_out_fraction=0.05)
    check_config(config)
    return config


class Planned(ContextParallel):
    """The real plans of rows, without a process group to attend in."""

    def attention(self, plan: RowPlan) -> None:
        """Not needed to compare what is computed on."""


class Recorder(MicroBatchBuilder):
    """Gives each row beside its micro-batch."""

    def prepare(self, row: Row, is_counted: bool = True) -> tuple[Row, MicroBatch]:
        return row, super().prepare(row, is_counted)


def context_of(layout: str, cp_size: int) -> Planned:
    group = SimpleNamespace(size=lambda: cp_size)
    return Planned(layout, GATHER, CostModel(), (1, 1), group, torch.device("cpu"))


def read_rank(
    config: Config, mesh: SimpleNamespace, first_step: int, plans: Path
) -> dict[int, list[tuple[Row, MicroBatch]]]:
    """What one rank computes on in each step, from a start of its own."""
    run = Run.__new__(Run)
    run.config, run.mesh, run.planned = config, mesh, plan_stages(config, plans)
    found: dict[int, list[tuple[Row, MicroBatch]]] = {}
    step = first_step
    while step < config.num_steps:
        position = find_position(config, step)
        stage = config.stage[position.stage]
        context = context_of(config.parallel.cp_layout, mesh.cp_size)
        builder = Recorder(config, mesh, context, stage.rope_base)
        steps = range(position.stage_step, stage.num_steps)
        items = list(run._micro_batches(position.stage, steps, builder))
        per_step = stage.rows_per_step // mesh.dp_size
        assert len(items) == len(steps) * per_step
        for number in range(len(steps)):
            found[step + number] = items[number * per_step : (number + 1) * per_step]
        step += len(steps)
    return found


def hash_row(config: Config, shards: list[tuple[Row, MicroBatch]]) -> str:
    """SHA-256 of a row's tokens, labels, weights of labels, documents and domain."""
    row = shards[0][0]
    length, cp_size = len(row.tokens), len(shards)
    plan = context_of(config.parallel.cp_layout, cp_size).plan(row.doc_lengths)
    tokens, labels = np.full(length, -1), np.full(length, -1)
    weights = np.ones(length, np.float32)
    for rank, (_, shard) in enumerate(shards):
        places = plan.positions(rank)
        tokens[places], labels[places] = shard.tokens_BT[0].numpy(), shard.labels_T.numpy()
        if shard.label_weights_T is not None:
            weights[places] = shard.label_weights_T.numpy()
        assert (shard.domain, shard.num_labels) == (row.domain, (labels[places] != -100).sum())
    assert np.array_equal(tokens, row.tokens)
    parts = [part.tobytes() for part in (tokens, labels, weights, row.doc_lengths)]
    return hashlib.sha256(b"".join(parts) + row.domain.encode()).hexdigest()


def hash_steps(config: Config, layout: tuple[int, int, str], first_step: int) -> Hashes:
    """The rows of every step from first_step on, by all ranks of a layout."""
    dp_size, cp_size, cp_layout = layout
    parallel = config.parallel.model_copy(update={"cp": cp_size, "cp_layout": cp_layout})
    config = config.model_copy(update={"parallel": parallel})
    plans = Path(config.run.dir) / "plans"
    ranks = {}
    for dp_rank in range(dp_size):
        for cp_rank in range(cp_size):
            mesh = SimpleNamespace(
                dp_size=dp_size,
                dp_rank=dp_rank,
                cp_size=cp_size,
                cp_rank=cp_rank,
                device=torch.device("cpu"),
            )
            ranks[dp_rank, cp_rank] = read_rank(config, mesh, first_step, plans)
    hashes: Hashes = {}
    for step in ranks[0, 0]:
        hashes[step] = sorted(
            hash_row(config, list(shards))
            for dp_rank in range(dp_size)
            for shards in zip(*(ranks[dp_rank, cp_rank][step] for cp_rank in range(cp_size)))
        )
    return hashes


@pytest.fixture(scope="module")
def expected(config: Config) -> Hashes:
    """Straight from the planned rows, row by row."""
    hashes, step = {}, 0
    one = SimpleNamespace(cp_size=1, cp_rank=0, device=torch.device("cpu"))
    builder = MicroBatchBuilder(config, one, context_of("auto", 1), 1e4)
    for rows in plan_stages(config):
        for first in range(0, len(rows), ROWS):
            every = [rows.row(number) for number in range(first, first + ROWS)]
            hashes[step] = sorted(hash_row(config, [(row, builder(row))]) for row in every)
            step += 1
    return hashes


def test_no_row_comes_twice(expected: Hashes) -> None:
    every = [row for rows in expected.values() for row in rows]
    assert len(every) == len(set(every)) == len(SEQ_LENGTHS) * STEPS * ROWS


@pytest.mark.parametrize("first_step", STOPS.values(), ids=STOPS.keys())
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "dp{} cp{} {}".format(*layout))
def test_every_layout_reads_the_same_rows_in_the_same_steps(
    config: Config, expected: Hashes, layout: tuple[int, int, str], first_step: int
) -> None:
    found = hash_steps(config, layout, first_step)
    assert found == {step: rows for step, rows in expected.items() if step >= first_step}

"""Where a run stands in its list of stages, and the numbers that follow from a configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lclm.config import Config, check_world
from lclm.context.plan.cost import CostModel
from lclm.context.plan.rates import Machine
from lclm.data.domain import distinct_names
from lclm.data.stage_rows import HeldOutRows, StageRows
from lclm.optim import learning_rate

NUM_ROWS_COMPARED = 8  # rows of a stage by which "auto" decides how keys travel


@dataclass(frozen=True)
class Position:
    """A place in a run, counted in optimizer steps already done."""

    stage: int
    """Number of the stage that the next step belongs to."""
    stage_step: int
    """Steps of that stage already done."""
    tokens: int
    """Input tokens of all steps already done."""


def find_position(config: Config, step: int) -> Position:
    """Where a run stands after `step` optimizer steps.

    At the boundary of two stages it is the start of the later one; after the last step it is the
    end of the last stage.
    """
    tokens = 0
    for number, stage in enumerate(config.stage):
        if step < stage.num_steps or number == len(config.stage) - 1:
            done = min(step, stage.num_steps)
            return Position(number, done, tokens + done * stage.tokens_per_step)
        step -= stage.num_steps
        tokens += stage.tokens
    raise AssertionError("a configuration has at least one stage")


def plan_stages(config: Config, cache_dir: Path | None = None) -> list[StageRows]:
    """Decide every row of the run, stage by stage; each domain continues where it stopped.

    Args:
        config: a checked configuration.
        cache_dir: where packings are kept for the next start; None: nowhere.

    Raises:
        ValueError: if files are missing or a domain is too small for its share; before training.
    """
    names = name_domains(config)
    planned: list[StageRows] = []
    for number, stage in enumerate(config.stage):
        planned.append(
            StageRows(
                entries=stage.mixture,
                seq_length=stage.seq_length,
                num_rows=stage.num_rows,
                seed=config.seed,
                stage_index=number,
                cursors=planned[-1].next_cursors if planned else {},
                held_out_fraction=config.data.held_out_fraction,
                max_epochs=config.data.max_epochs,
                cache_dir=cache_dir,
                vocab_size=config.model.vocab_size,
                document_mask=stage.document_mask,
                names=names,
            )
        )
    return planned


def name_domains(config: Config) -> dict[str, str]:
    """The name in metrics of each prefix, the same in all stages."""
    return distinct_names(entry.prefix for stage in config.stage for entry in stage.mixture)


def spread_rows(num_rows: int, count: int = NUM_ROWS_COMPARED) -> list[int]:
    """Numbers of up to `count` rows of a stage, from its first to its last."""
    return np.linspace(0, num_rows - 1, min(count, num_rows)).astype(int).tolist()


def plan_validation(config: Config) -> list[list[HeldOutRows]]:
    """The held-out rows of each stage, one entry per domain; empty lists without validation.

    Raises:
        ValueError: if a domain has no document to hold out; before training.
    """
    names = name_domains(config)
    num_rows = config.validation.rows_per_domain
    if num_rows == 0:
        return [[] for _ in config.stage]
    return [
        [
            HeldOutRows(
                prefix,
                stage.seq_length,
                num_rows,
                config.seed,
                config.data.held_out_fraction,
                config.model.vocab_size,
                stage.document_mask,
                names[prefix],
            )
            for prefix in dict.fromkeys(entry.prefix for entry in stage.mixture)
        ]
        for stage in config.stage
    ]


def attention_cost(config: Config, number_bytes: int, machine: Machine) -> CostModel:
    """A layer's attention on one rank; `number_bytes` is the size of an element of q, k and v."""
    model, parallel = config.model, config.parallel
    is_recomputed = config.train.recompute == "full"
    return CostModel(
        machine=machine,
        num_heads=model.num_attention_heads // parallel.tp,
        num_kv_heads=model.num_kv_heads // parallel.tp,
        head_dim=model.head_size,
        number_bytes=number_bytes,
        kept_layers=1 if is_recomputed else model.num_layers // parallel.pp,
        is_recomputed=is_recomputed,
    )


def domain_names(planned: Sequence[StageRows]) -> list[str]:
    """The name of every domain of the run, in order of first use."""
    return list(dict.fromkeys(name for rows in planned for name in rows.domain_names.values()))


def describe(config: Config, world_size: int, planned: Sequence[StageRows] = ()) -> str:
    """The derived numbers of a run, for `--dry-run`.

    Args:
        config: a checked configuration.
        world_size: number of processes the run is meant for.
        planned: rows of each stage; without them the data is not described.

    Raises:
        ConfigError: if the layout does not fit the world size.
    """
    dp_size = check_world(config, world_size)
    parallel, model = config.parallel, config.model
    lines = [
        f"model      {model.family}, {model.num_parameters():,} parameters, "
        f"{model.num_layers} layers, width {model.hidden_size}, "
        f"{model.num_attention_heads} query and {model.num_kv_heads} kv heads of "
        f"{model.head_size}",
        f"layout     {world_size} ranks = tp {parallel.tp} x cp {parallel.cp} "
        f"({parallel.cp_layout}, {parallel.cp_comm}) x dp {dp_size} x pp {parallel.pp}, "
        f"sequence parallel {'on' if parallel.tp > 1 else 'off'}, "
        f"recompute {config.train.recompute}",
        f"total      {config.num_steps:,} steps, "
        f"{sum(stage.tokens for stage in config.stage):,} tokens",
    ]
    first = 1
    for number, stage in enumerate(config.stage):
        per_rank = stage.seq_length // parallel.cp
        lines += [
            f"stage {number}    {stage.name}: rows of {stage.seq_length:,} tokens, "
            f"document mask {'on' if stage.document_mask else 'off'}, "
            f"RoPE base {stage.rope_base:g}",
            f"           steps {first:,}..{first + stage.num_steps - 1:,} of "
            f"{stage.tokens_per_step:,} tokens = {stage.rows_per_step} rows = "
            f"{stage.rows_per_step // dp_size} micro-batches on each of {dp_size} dp ranks; "
            f"{per_rank:,} tokens of a row on each cp rank",
            f"           lr {stage.lr:g} -> "
            f"{stage.lr if stage.schedule == 'constant' else stage.min_lr:g} ({stage.schedule}), "
            f"{round(stage.warmup_fraction * stage.num_steps)} warm-up steps, "
            f"optimizer state {stage.optimizer_state if number else 'fresh'}",
        ]
        if learning_rate(stage, stage.num_steps - 1) == 0:
            lines.append(
                f"           step {first + stage.num_steps - 1:,} changes no weight: its learning "
                f"rate is 0; set stage.{number}.min_lr above 0"
            )
        for entry in stage.mixture:
            piece = (
                f" {entry.piece_length or stage.seq_length:,}" if entry.packing == "exact" else ""
            )
            shares = dict.fromkeys(f"{share:.2%}" for share in entry.share_ends)
            lines.append(
                f"           {' to '.join(shares):>7} {entry.prefix} ({entry.packing}{piece})"
            )
        if planned:
            lines += [f"           {line}" for line in planned[number].summary().splitlines()]
        first += stage.num_steps
    return "\n".join(lines)

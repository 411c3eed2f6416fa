"""The run: stages, steps, validation, checkpoints. Reads as the story of a training run."""

import logging
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lclm
from lclm.checkpoint import store
from lclm.checkpoint.folder import CheckpointInfo, dtype_name
from lclm.command_line import ToolFailedError
from lclm.config import Config, StageConfig
from lclm.config_file import dump_toml
from lclm.data.prefetch import Prefetcher
from lclm.data.stage_rows import StageRows
from lclm.files import replace_text
from lclm.mesh import Mesh
from lclm.model.build import build_model, init_weights
from lclm.optim import learning_rate, reset_state, set_learning_rate
from lclm.train.changes import record_settings
from lclm.train.context_setup import build_context, find_machine
from lclm.train.flops import peak_flops, row_flops
from lclm.train.metrics import METRICS_NAME, VALIDATION_NAME, RunLog
from lclm.train.micro_batch import (
    MicroBatch,
    MicroBatchBuilder,
    deal_rows,
    iterate_global_batch,
)
from lclm.train.ranks import agree
from lclm.train.stages import domain_names, find_position, plan_validation, spread_rows
from lclm.train.start import Start
from lclm.train.step import Engine, NonFiniteError, StepResult

logger = logging.getLogger(__name__)

RESOLVED_NAME = "config.resolved.toml"


class Run:
    """A training run on this process's mesh, from what `find_start` found."""

    def __init__(self, config: Config, mesh: Mesh, planned: list[StageRows], start: Start) -> None:
        self.config, self.mesh, self.planned = config, mesh, planned
        self.dir = Path(config.run.dir)
        self.checkpoint_dir = self.dir / "checkpoints"
        self.held_out = plan_validation(config)
        self.files = start.files
        self.data = start.data
        self.context_limit = start.context_limit
        self.step = self.first_step = 0
        self.carried: dict[str, int] = {}
        model = build_model(config, mesh)
        if start.weights is not None:
            info = store.load(start.weights, config.model, mesh, model, None)
            logger.info("weights from %s (step %d)", start.weights, info.step)
        elif start.checkpoint is None:
            init_weights(model, config, mesh)
        self.engine = Engine(config, mesh, model, domain_names(planned))
        if start.checkpoint is not None:
            info = store.load(start.checkpoint, config.model, mesh, model, self.engine.optimizer)
            self.step = self.first_step = info.step
            self.carried = info.ledger
            logger.info("resumed from %s at step %d", start.checkpoint, info.step)
        self.log: RunLog | None = None
        self.comms: dict[int, str] = {}
        self.machine = find_machine(config, mesh)
        agree(lambda: self._open_folder(start) if mesh.rank == 0 else None)

    def _open_folder(self, start: Start) -> None:
        """Move what is not gone on with aside, write the resolved configuration, open the log."""
        store.set_aside(
            self.dir,
            self.checkpoint_dir,
            None if start.checkpoint is None else self.step,
            [METRICS_NAME, VALIDATION_NAME, RESOLVED_NAME],
        )
        self._write_resolved()
        self.log = RunLog(self.dir, self.config.metrics.tensorboard, self.step)

    def _write_resolved(self) -> None:
        """Write the configuration with what computed it and, for each stage begun, "auto"'s choice.

        The rates that every choice follows from are in `context_rates.json` beside it.
        """
        facts = {**versions(), **{f"stage {n} cp_comm": comm for n, comm in self.comms.items()}}
        text = "".join(f"# {key}: {value}\n" for key, value in facts.items())
        replace_text(self.dir / RESOLVED_NAME, text + dump_toml(self.config))

    @property
    def last_step(self) -> int:
        """Step number at which this run ends."""
        limit = self.config.train.max_steps or self.config.num_steps
        return min(limit, self.config.num_steps)

    def train(self) -> None:
        """Run every remaining stage, or until `train.max_steps`."""
        while self.step < self.last_step:
            self._train_stage(find_position(self.config, self.step).stage)
        logger.info("run finished at step %d of %d", self.step, self.config.num_steps)
        if self.log is not None:
            self.log.close()

    def _train_stage(self, number: int) -> None:
        """Train from the current step to the end of stage `number`, or of the run."""
        stage = self.config.stage[number]
        position = find_position(self.config, self.step)
        planned = self.planned[number]
        rows = [planned.attention_lengths(row) for row in spread_rows(stage.num_rows)]
        context = build_context(self.config, self.mesh, self.machine, rows)
        self.comms[number] = str(context.comm)
        if self.log is not None:
            self._write_resolved()
        build = MicroBatchBuilder(self.config, self.mesh, context, stage.rope_base)
        if position.stage_step == 0:
            logger.info(
                "stage %d %s: %d steps of %d rows of %d tokens, RoPE base %g",
                number,
                stage.name,
                stage.num_steps,
                stage.rows_per_step,
                stage.seq_length,
                stage.rope_base,
            )
            if number > 0 and stage.optimizer_state == "fresh":
                reset_state(self.engine.optimizer)
        last = min(stage.num_steps, position.stage_step + self.last_step - self.step)
        steps = range(position.stage_step, last)
        ahead = stage.rows_per_step // self.mesh.dp_size  # a global batch, in host memory
        with Prefetcher(self._micro_batches(number, steps, build), ahead) as micro_batches:
            for stage_step in steps:
                self._train_step(number, stage_step, micro_batches)
                is_last = stage_step == stage.num_steps - 1 or self.step == self.last_step
                self._maybe_validate(number, build, is_last)
                self._maybe_save(number, is_last)

    def _micro_batches(
        self, number: int, steps: range, build: MicroBatchBuilder
    ) -> Iterator[MicroBatch]:
        """This rank's micro-batches of all these steps of a stage, one after another, on the host.

        Runs on its own thread, for which the current GPU has to be set.
        """
        if self.mesh.device.type == "cuda":
            torch.cuda.set_device(self.mesh.device)
        for stage_step in steps:
            costs = self._row_flops(number, stage_step)
            for row in deal_rows(costs, self.mesh.dp_size)[self.mesh.dp_rank]:
                place = stage_step * len(costs) + row
                with reading_rows(f"row {place} of stage.{number}"):
                    batch = build.prepare(self.planned[number].row(place))
                yield batch

    def _train_step(
        self, number: int, stage_step: int, micro_batches: Iterator[MicroBatch]
    ) -> None:
        stage = self.config.stage[number]
        start = time.perf_counter()
        waited = Stopwatch()
        rate = learning_rate(stage, stage_step)
        settings = self.config.optimizer
        set_learning_rate(self.engine.optimizer, rate, settings.weight_decay, settings.decay_norms)
        try:
            result = self.engine.train_step(
                waited.iterate(micro_batches),
                stage.rows_per_step // self.mesh.dp_size,
                stage.seq_length,
            )
        except NonFiniteError as error:
            raise ToolFailedError(self._explain_non_finite(number, stage_step, error)) from error
        self.step += 1
        if self.log is not None:
            seconds = time.perf_counter() - start
            flops = sum(self._row_flops(number, stage_step))
            if result.loss is None:
                logger.warning("step %d has no label: nothing was learned from it", self.step)
            times = {"seconds": seconds, "data_seconds": waited.seconds}
            self.log.step(self._record(stage, rate, result, flops, times), self.last_step)

    def _explain_non_finite(self, number: int, stage_step: int, error: NonFiniteError) -> str:
        """What to look at; all ranks must call it at the same time."""
        found: list[Any] = [None] * self.mesh.world_size
        dist.all_gather_object(found, (self.mesh.dp_rank, error.micro_batches))
        costs = self._row_flops(number, stage_step)
        dealt = deal_rows(costs, self.mesh.dp_size)
        bad = {dealt[dp_rank][n] for dp_rank, numbers in found for n in numbers}
        planned, first = self.planned[number], stage_step * len(costs)
        rows = [first + row for row in sorted(bad) or range(len(costs))]
        domains = dict.fromkeys(planned.row(row).domain for row in rows)
        return (
            f"step {self.step + 1}: {error} is not finite, from rows {rows} of stage.{number} "
            f"({', '.join(domains)}); stopped before the update, the last checkpoint is as it was: "
            "lower the learning rate or set optimizer.clip_grad, look at these rows, and start "
            "again"
        )

    def _record(
        self,
        stage: StageConfig,
        rate: float,
        result: StepResult,
        flops: float,
        times: dict[str, float],
    ) -> dict[str, Any]:
        record: dict[str, Any] = {
            "step": self.step,
            "stage": stage.name,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": rate,
            "tokens": find_position(self.config, self.step).tokens,
            "labels": result.num_labels,
            "seq_length": stage.seq_length,
            "rope_base": stage.rope_base,
            **times,
            "tokens_per_second": stage.tokens_per_step / times["seconds"],
            "tflops_per_second": flops / times["seconds"] / 1e12,
            "domain_loss": {
                name: total / count for name, (total, count) in result.domain_losses.items()
            },
        }
        if self.mesh.device.type == "cuda":
            record["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            peak = peak_flops(torch.cuda.get_device_name())
            if peak is not None:
                record["mfu"] = flops / times["seconds"] / (peak * self.mesh.world_size)
        return record

    def _row_flops(self, number: int, stage_step: int) -> list[float]:
        """Model FLOPs of each row of a step of stage `number`."""
        model, planned = self.config.model, self.planned[number]
        count = self.config.stage[number].rows_per_step
        rows = range(stage_step * count, (stage_step + 1) * count)
        return [row_flops(model, planned.attention_lengths(row)) for row in rows]

    def _maybe_validate(self, number: int, build: MicroBatchBuilder, is_last: bool) -> None:
        every = self.config.validation.every_steps
        if not self.held_out[number] or not (is_last or (every and self.step % every == 0)):
            return
        stage = self.config.stage[number]
        losses: dict[str, float] = {}
        for held_out in self.held_out[number]:
            with reading_rows(f"validation of stage.{number}"):
                rows = [held_out.row(n) for n in range(len(held_out))]
            try:
                sums = self.engine.evaluate(
                    iterate_global_batch(rows, build, self.mesh),
                    -(-len(rows) // self.mesh.dp_size),
                    stage.seq_length,
                )
            except NonFiniteError as error:
                raise ToolFailedError(
                    f"validation after step {self.step}: {error} of the held-out rows of "
                    f"{rows[0].domain} is not finite; stopped before a save: go back to "
                    "an earlier checkpoint with a lower learning rate"
                ) from error
            losses.update({name: total / count for name, (total, count) in sums.items()})
        if self.log is not None:
            self.log.validation({"step": self.step, "stage": stage.name, "loss": losses})

    def _maybe_save(self, number: int, is_last: bool) -> None:
        every = self.config.checkpoint.every_steps
        if not is_last and (every == 0 or self.step % every):
            return
        stage = self.config.stage[number]
        stages = self.config.stage[: number + 1]
        position = find_position(self.config, self.step)
        info = CheckpointInfo(
            format=1,
            step=self.step,
            stage=position.stage,
            stage_step=position.stage_step,
            tokens=position.tokens,
            model=self.config.model.recorded_fields(),
            rope_base=stage.rope_base,
            seq_length=stage.seq_length,
            max_context=max(self.context_limit, *(s.seq_length for s in stages)),
            dtype=dtype_name(self.mesh.dtype),
            has_optimizer=True,
            ledger=self._ledger(),
            versions=versions(),
            data=self.data,
            config=record_settings(self.config),
        )
        start = time.perf_counter()
        folder = store.save(
            self.checkpoint_dir,
            info,
            self.mesh,
            self.engine.module,
            self.engine.optimizer,
            self.files,
        )
        logger.info("saved %s in %.1f s", folder, time.perf_counter() - start)
        if self.mesh.rank == 0:
            ends = set(accumulate(stage.num_steps for stage in self.config.stage))
            store.remove_old(self.checkpoint_dir, self.config.checkpoint.keep, self.step, ends)
        dist.barrier()

    def _ledger(self) -> dict[str, int]:
        """Tokens drawn from each prefix since the start of the run.

        What the checkpoint says that the run went on from, and what was drawn since then: the
        present plan knows nothing of rows that were read by another.
        """
        drawn = dict(self.carried)
        before = self._planned_ledger(self.first_step)
        for name, tokens in self._planned_ledger(self.step).items():
            drawn[name] = drawn.get(name, 0) + tokens - before.get(name, 0)
        return drawn

    def _planned_ledger(self, step: int) -> dict[str, int]:
        """Tokens that the present plan draws from each prefix in the first `step` steps."""
        position = find_position(self.config, step)
        drawn: dict[str, int] = {}
        for number in range(position.stage + 1):
            stage = self.config.stage[number]
            steps = position.stage_step if number == position.stage else stage.num_steps
            for name, tokens in self.planned[number].ledger(steps * stage.rows_per_step).items():
                drawn[name] = drawn.get(name, 0) + tokens
        return drawn


@contextmanager
def reading_rows(where: str) -> Iterator[None]:
    """Data that is damaged or cannot be read stops the run in one line that names it."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ToolFailedError(f"{where} cannot be read: {error}") from error


class Stopwatch:
    """Adds up the time that an iterator takes to yield its items."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def iterate(self, items: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield the items and time them."""
        while True:
            start = time.perf_counter()
            item = next(items, None)
            self.seconds += time.perf_counter() - start
            if item is None:
                return
            yield item


def versions() -> dict[str, str]:
    """Versions of the software that computes, for the record."""
    found = {
        "lclm": lclm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": version("megatron-core"),
    }
    commit = _commit(Path(lclm.__file__).parents[1])
    if commit is not None:
        found["commit"] = commit
    return found


def _commit(root: Path) -> str | None:
    """The commit of lclm's own repository; None where lclm is installed, or there is no git."""
    setup = root / "setup.py"
    is_ours = setup.is_file() and 'name="lclm"' in setup.read_text(encoding="utf-8")
    if not (is_ours and (root / ".git").exists() and shutil.which("git")):
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None

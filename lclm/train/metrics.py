"""Records of a run: a console line, `metrics.jsonl`, `validation.jsonl`, TensorBoard."""

import json
import logging
from pathlib import Path
from typing import Any, TextIO

from lclm.files import replace_text

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
VALIDATION_NAME = "validation.jsonl"


class RunLog:
    """Writes the records of rank 0. A resumed run drops the records after its checkpoint."""

    def __init__(self, run_dir: Path, use_tensorboard: bool, last_step: int) -> None:
        """Open the files of `run_dir`, keeping records up to `last_step`."""
        self._files: dict[str, TextIO] = {}
        for name in (METRICS_NAME, VALIDATION_NAME):
            path = run_dir / name
            _keep_records(path, last_step)
            self._files[name] = path.open("a", encoding="utf-8")
        self._board = None
        if use_tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=last_step + 1)

    def step(self, record: dict[str, Any], num_steps: int) -> None:
        """Record one optimizer step; `record` has at least the fields of the console line."""
        self._write(METRICS_NAME, record)
        logger.info(
            "step %d/%d %s loss %s grad %.3f lr %.2e %s tok/s %.2f TFLOP/s data %.0f%%",
            record["step"],
            num_steps,
            record["stage"],
            "none" if record["loss"] is None else f"{record['loss']:.4f}",
            record["grad_norm"],
            record["lr"],
            f"{record['tokens_per_second']:,.0f}",
            record["tflops_per_second"],
            100 * record["data_seconds"] / record["seconds"],
        )

    def validation(self, record: dict[str, Any]) -> None:
        """Record one validation pass."""
        self._write(VALIDATION_NAME, record)
        losses = " ".join(f"{name} {loss:.4f}" for name, loss in record["loss"].items())
        logger.info("validation after step %d: %s", record["step"], losses)

    def _write(self, name: str, record: dict[str, Any]) -> None:
        self._files[name].write(json.dumps(record, allow_nan=False) + "\n")
        self._files[name].flush()
        if self._board is None:
            return
        group = name.removesuffix(".jsonl")
        for tag, value in _flatten(record, group):
            self._board.add_scalar(tag, value, record["step"])

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()


def _flatten(record: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    """Numbers of a record with slash-separated names."""
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += _flatten(value, f"{prefix}/{key}")
        elif isinstance(value, (int, float)) and key != "step":
            found.append((f"{prefix}/{key}", float(value)))
    return found


def _keep_records(path: Path, last_step: int) -> None:
    """Drop records of steps after `last_step`, and say which lines a crash has damaged."""
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            step = json.loads(line)["step"] if line.endswith(b"\n") else None
        except (ValueError, TypeError, KeyError):
            step = None
        if step is None:
            logger.warning("%s: line %d is damaged (%r); dropped", path, number, line[:40])
        elif step <= last_step:
            kept.append(line.decode())
    replace_text(path, "".join(kept))

"""Train on the same rows with every communication mode, and judge what "auto" chose.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 -m benchmarks.context_parallel [--rounds 6]

The model is the quickstart's with 8 query and 4 kv heads. Rows are drawn from MagiAttention's
published histogram of document lengths with documents of up to a quarter of the row, or are one
document. The modes take turns, step by step. Columns: tokens per second of CPU time, all ranks
together (mean of the rounds, and its standard error), the same of the clock, and the predicted time
of a layer's attention. CPU time is what other work on the machine does not falsify; it counts
copies and messages in full, hidden or not. Appends one JSON object to
benchmarks/results/context_parallel.jsonl.
"""

import argparse
import os
import sys
import time
import tomllib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.timing import HISTOGRAM, RESULTS, ROOT, append_record, describe_machine
from lclm.config import Config
from lclm.context.measure import measure_machine
from lclm.context.plan.cost import Comm, choose_fastest
from lclm.context.plan.layouts import compare_comms
from lclm.context.plan.lengths import read_histogram
from lclm.context.plan.rates import LINKS
from lclm.data.stage_rows import Row
from lclm.log import setup_logging
from lclm.mesh import Mesh, build_mesh, leave

MODEL = ROOT / "examples" / "configs" / "quickstart.toml"
ROW_LENGTHS = (2048, 8192)


def build_config(row_length: int, cp_size: int, comm: str = "auto", shared: int = 0) -> Config:
    """The quickstart's model on rows of a length, all processes sharing each."""
    stage = {
        "name": "rows",
        "seq_length": row_length,
        "rope_base": 1e6,
        "tokens": row_length,
        "tokens_per_step": row_length,
        "lr": 1e-4,
        "mixture": [{"prefix": "none", "packing": "concat", "share": 1.0}],
    }
    model = tomllib.loads(MODEL.read_text("utf-8"))["model"]
    return Config.model_validate(
        {
            "run": {"dir": "none"},
            "model": {**model, "num_attention_heads": 8, "num_kv_heads": 4},
            "parallel": {"cp": cp_size, "cp_comm": comm, "cp_ulysses": shared},
            "stage": [stage],
        }
    )


def draw_rows(length: int, longest: int, count: int) -> list[Row]:
    """Rows of documents of up to `longest` tokens, or of one document."""
    histogram, rng = read_histogram(HISTOGRAM), np.random.default_rng([length, longest])
    rows = []
    for _ in range(count):
        drawn = histogram.draw_row(rng, length, longest)
        lengths = drawn if longest < length else np.array([length])
        rows.append(Row(rng.integers(0, 4096, length), lengths, "drawn"))
    return rows


class Bench:
    """One model, and steps of it with any communication mode."""

    def __init__(self, mesh: Mesh, rounds: int) -> None:
        # Megatron-core looks for CUDA when it is imported: not before the mesh is made.
        from lclm.model.build import build_model, init_weights
        from lclm.train.stages import attention_cost
        from lclm.train.step import Engine

        config = build_config(ROW_LENGTHS[0], mesh.cp_size)
        model = build_model(config, mesh)
        init_weights(model, config, mesh)
        self.engine = Engine(config, mesh, model, ["drawn"])
        self.mesh, self.rounds = mesh, rounds
        cost = attention_cost(config, mesh.dtype.itemsize, LINKS["nvlink"])
        machine = measure_machine(cost, mesh.cp_group, mesh.device, mesh.dtype)
        self.cost = replace(cost, machine=machine)

    def compare(self, row_length: int, longest: int) -> list[dict[str, Any]]:
        """One record per mode."""
        from lclm.train.context_setup import build_context
        from lclm.train.micro_batch import MicroBatchBuilder

        mesh, size = self.mesh, self.mesh.cp_size
        rows = draw_rows(row_length, longest, self.rounds + 1)
        predicted = compare_comms("auto", [row.doc_lengths for row in rows], size, self.cost)
        builders = {}
        for comm in predicted:
            shared = comm.ulysses_size if comm.name == "ulysses_ring" else 0
            config = build_config(row_length, size, comm.name, shared)
            context = build_context(config, mesh, self.cost.machine, [])
            builders[comm] = MicroBatchBuilder(config, mesh, context, 1e6)
        seconds: dict[Comm, list[tuple[float, float]]] = {comm: [] for comm in predicted}
        for row in rows:
            for comm, build in builders.items():
                dist.barrier()
                cpu, clock = time.process_time(), time.perf_counter()
                self.engine.train_step(iter([build(row)]), 1, row_length)
                spent = [time.process_time() - cpu, (time.perf_counter() - clock) / size]
                total = torch.tensor(spent, dtype=torch.float64)
                dist.all_reduce(total)
                seconds[comm].append(tuple(total.tolist()))
        best = choose_fastest(predicted)
        records = []
        for comm, spent in seconds.items():
            cpu, clock = np.array(spent[1:]).T  # the first is to warm up
            rates = row_length / cpu
            records.append(
                {
                    "ranks": size,
                    "row_length": row_length,
                    "longest": longest,
                    "mode": str(comm),
                    "is_auto": comm == best,
                    "tokens_per_cpu_second": float(rates.mean()),
                    "standard_error": float(rates.std(ddof=1) / len(rates) ** 0.5),
                    "tokens_per_second": float(row_length / np.median(clock)),
                    "predicted_layer_ms": 1e3 * predicted[comm],
                }
            )
        return records


def print_table(records: list[dict[str, Any]]) -> None:
    """One line per mode."""
    first = records[0]
    print(
        f"\n{first['ranks']} ranks, rows of {first['row_length']}, documents up to "
        f"{first['longest']}\n{'mode':<18} {'tok/CPU s':>10} {'+-':>6} {'tok/s':>8} {'layer ms':>9}"
    )
    for record in records:
        print(
            f"{record['mode']:<18} {record['tokens_per_cpu_second']:10.0f} "
            f"{record['standard_error']:6.0f} {record['tokens_per_second']:8.0f} "
            f"{record['predicted_layer_ms']:9.2f}{'  <- auto' if record['is_auto'] else ''}"
        )


def main() -> int:
    """Compare, print, append."""
    parser = argparse.ArgumentParser(
        description="Communication modes in the trainer, side by side."
    )
    parser.add_argument("--rounds", type=int, default=6, help="steps of each mode (6)")
    arguments = parser.parse_args()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2 or arguments.rounds < 2:
        print("error: start with torchrun, 2 processes at least; --rounds 2 at least")
        return 2
    setup_logging()
    mesh = build_mesh(build_config(ROW_LENGTHS[0], size))
    bench, tables = Bench(mesh, arguments.rounds), []
    for row_length in ROW_LENGTHS:
        for longest in (row_length // 4, row_length):
            records = bench.compare(row_length, longest)
            tables += records
            if mesh.rank == 0:
                print_table(records)
    if mesh.rank == 0:
        record = {
            "machine": describe_machine() | {"torch": torch.__version__},
            "rates": bench.cost.machine.dump(),
            "rounds": arguments.rounds,
            "results": tables,
        }
        append_record(RESULTS / "context_parallel.jsonl", record)
        print(f"\nappended to {RESULTS / 'context_parallel.jsonl'}")
    dist.barrier()
    leave(mesh)
    return 0


if __name__ == "__main__":
    sys.exit(main())

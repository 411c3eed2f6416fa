"""How the context ranks of a run work together: their machine's rates, and what these decide."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lclm.config import Config
from lclm.context.measure import measure_machine
from lclm.context.parallel import ContextParallel
from lclm.context.plan.cost import Comm, CostModel, choose_fastest
from lclm.context.plan.layouts import compare_comms
from lclm.context.plan.rates import LINKS, RATES_NAME, Machine, load_machine, published
from lclm.files import replace_text
from lclm.mesh import Mesh, split_context
from lclm.train.stages import attention_cost

logger = logging.getLogger(__name__)


def find_machine(config: Config, mesh: Mesh) -> Machine | None:
    """The rates of this run's ranks, equal on all: read from the run folder, or measured now.

    What is measured stays in the run folder, so that a run that goes on in the same layout deals
    out its rows as before, bit for bit. In another layout or another folder the rates, and so plans
    and modes, may differ, which changes sums by rounding only; `train.deterministic` takes
    published rates instead, equal everywhere. None where nothing is "auto": then nothing asks for
    rates.
    """
    parallel = config.parallel
    if mesh.cp_size == 1 or "auto" not in (parallel.cp_layout, parallel.cp_comm):
        return None
    if config.train.deterministic:
        return published("infiniband", mesh.cp_size)
    path, made_for = Path(config.run.dir) / RATES_NAME, _describe(config, mesh)
    known = [read_rates(path, made_for) if mesh.rank == 0 else None]
    dist.broadcast_object_list(known)
    if known[0] is not None:
        machine = load_machine(known[0])
        logger.info("context rates of %s: %s", path, machine.summary())
        return machine
    cost = attention_cost(config, mesh.dtype.itemsize, LINKS["nvlink"])
    machine = measure_machine(cost, mesh.cp_group, mesh.device, mesh.dtype)
    logger.info("context rates, measured: %s", machine.summary())
    if mesh.rank == 0:
        record = {"made_for": made_for, "machine": machine.dump()}
        replace_text(path, json.dumps(record, indent=1) + "\n")
    return machine


def choose_comm(config: Config, cost: CostModel | None, rows: Sequence[np.ndarray]) -> Comm:
    """The communication mode: as configured, or the one predicted to be fast for some rows.

    Args:
        cost: of `attention_cost`; needed only where rows are looked at.
        rows: document lengths; looked at only where `parallel.cp_comm` is "auto" and several ranks
            share a row, and then at least one.
    """
    parallel = config.parallel
    if parallel.cp == 1 or parallel.cp_comm != "auto":
        sizes = {"ulysses": parallel.cp, "ulysses_ring": parallel.cp_ulysses}
        return Comm(parallel.cp_comm, sizes.get(parallel.cp_comm, 1))
    assert cost is not None  # `find_machine` gives one where anything is "auto"
    found = compare_comms(parallel.cp_layout, rows, parallel.cp, cost)
    comm = choose_fastest(found)
    times = ", ".join(f"{mode} {1e3 * seconds:.3g}" for mode, seconds in found.items())
    logger.info(
        "cp_comm auto: %s, by predicted ms of a layer's attention, forward and backward, mean of "
        "%d rows: %s",
        comm,
        len(rows),
        times,
    )
    return comm


def build_context(
    config: Config, mesh: Mesh, machine: Machine | None, rows: Sequence[np.ndarray]
) -> ContextParallel:
    """Layout and communication mode of a stage; `rows` as in `choose_comm`, equal on all ranks.

    `machine` is that of `find_machine`. All processes of the world must call it at the same time:
    it may make groups.
    """
    model, parallel = config.model, config.parallel
    cost = None if machine is None else attention_cost(config, mesh.dtype.itemsize, machine)
    chosen = [choose_comm(config, cost, rows)]
    dist.broadcast_object_list(chosen)  # other processors may round differently
    comm, head_group, ring_group = chosen[0], None, None
    if comm.name == "ulysses_ring":
        head_group, ring_group = split_context(mesh.cp_group, comm.ulysses_size)
    return ContextParallel(
        parallel.cp_layout,
        comm,
        cost,
        (model.num_attention_heads // parallel.tp, model.num_kv_heads // parallel.tp),
        mesh.cp_group,
        mesh.device,
        head_group,
        ring_group,
    )


def _describe(config: Config, mesh: Mesh) -> dict[str, Any]:
    """What the rates depend on."""
    model, parallel = config.model, config.parallel
    is_cuda = mesh.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(mesh.device) if is_cuda else "cpu",
        "world_size": mesh.world_size,
        **parallel.model_dump(include={"tp", "pp", "cp"}),
        "heads": [model.num_attention_heads, model.num_kv_heads, model.head_size],
        "dtype": str(mesh.dtype),
    }


def read_rates(path: Path, made_for: dict[str, Any]) -> dict[str, Any] | None:
    """Numbers of the machine in a file, if there is one and it was measured for this.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("ascii"))
        return record["machine"] if record["made_for"] == made_for else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what a trainer measured: {error}; remove it") from error

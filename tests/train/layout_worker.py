"""What one process of a layout test does: train a few steps and give loss and gradient norm.

Layouts of equal world size share one set of processes: importing costs more than training.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from lclm.context.plan.rates import LINKS
from lclm.log import setup_logging
from tests.train.tiny import ROW_LENGTH, ROWS_PER_STEP, half_labelled_row, ragged_row, tiny_config


def train_layouts(
    num_steps: int, layouts: dict[str, dict[str, Any]]
) -> dict[str, list[tuple[float, float]]]:
    """Loss and gradient norm of each step, by name of the layout.

    Rows are half labelled where the name ends so.
    """
    setup_logging()
    found = {}
    for name, changes in layouts.items():
        make_row = half_labelled_row if name.endswith("half labelled") else ragged_row
        found[name] = train_steps(num_steps, changes, make_row)
    return found


def train_steps(
    num_steps: int,
    changes: dict[str, Any],
    make_row: Callable[[int], tuple[np.ndarray, np.ndarray]],
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step on this process's place in the layout."""
    from lclm.data.stage_rows import Row
    from lclm.mesh import build_mesh, leave

    is_in_order = changes.get("in_order", False)
    config = tiny_config("unused", **{k: v for k, v in changes.items() if k != "in_order"})
    mesh = build_mesh(config)
    from lclm.model.build import build_model, init_weights
    from lclm.optim import learning_rate, set_learning_rate
    from lclm.train.context_setup import build_context
    from lclm.train.micro_batch import MicroBatchBuilder, deal_rows
    from lclm.train.step import Engine

    model = build_model(config, mesh)
    init_weights(model, config, mesh)
    engine = Engine(config, mesh, model, ["a"])
    stage = config.stage[0]
    context = build_context(config, mesh, LINKS["nvlink"], [make_row(0)[1], make_row(1)[1]])
    build = MicroBatchBuilder(config, mesh, context, stage.rope_base)
    results = []
    for step in range(num_steps):
        rows = [
            Row(*make_row(step * ROWS_PER_STEP + n), "a", document_mask=stage.document_mask)
            for n in range(ROWS_PER_STEP)
        ]
        if not is_in_order:
            dealt = deal_rows([float((row.doc_lengths**2).sum()) for row in rows], mesh.dp_size)
            mine = dealt[mesh.dp_rank]
        else:
            mine = list(range(mesh.dp_rank, ROWS_PER_STEP, mesh.dp_size))
        set_learning_rate(engine.optimizer, learning_rate(stage, step), 0.1, decay_norms=False)
        result = engine.train_step((build(rows[number]) for number in mine), len(mine), ROW_LENGTH)
        results.append((result.loss, result.grad_norm))
    leave(mesh)
    return results

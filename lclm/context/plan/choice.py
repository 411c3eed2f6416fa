"""Which way queries shall meet keys, by what the cost model says of some rows to be trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lclm.context.plan.comm import Comm, candidate_comms, predict_seconds
from lclm.context.plan.cost import CostModel
from lclm.context.plan.layouts import build_row_plan

# Times that differ by less are taken for equal: rates are not measured more exactly.
SAME_TIME = 1.05


def choose_fastest(seconds: Mapping[Comm, float]) -> Comm:
    """The fastest way, or the preferred one where that is about as fast; see `compare_comms`."""
    preferred, fastest = next(iter(seconds)), min(seconds, key=lambda comm: seconds[comm])
    return preferred if seconds[preferred] <= SAME_TIME * seconds[fastest] else fastest


def compare_comms(
    layout: str, rows: Sequence[np.ndarray], cp_size: int, cost: CostModel
) -> dict[Comm, float]:
    """Predicted seconds of a layer's attention, forward and backward, mean of the rows, by way.

    Args:
        layout: as in `build_row_plan`; rows of "auto" are dealt out for each way.
        rows: document lengths of rows of one length, at least one row.
        cp_size: ranks that share a row, at least 2.
        cost: the machine and the attention of one rank.

    Returns:
        A pure function of the arguments, the preferred way first; ways that rows of that length
        cannot go are left out.
    """
    comms = candidate_comms(int(rows[0].sum()), cp_size, cost)
    found = dict.fromkeys(comms, 0.0)
    for lengths in rows:
        for comm in comms:
            plan = build_row_plan(layout, lengths, cp_size, None, cost, comm)
            found[comm] += predict_seconds(plan, cost, comm) / len(rows)
    return found

"""Ranks make sure that they hold one plan and use one communication mode, before any exchange."""

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from lclm.context.exchange import DIGESTS, start_all_to_all
from lclm.context.plan.row_plan import RowPlan


class Agreement:
    """A check, made once per row: all ranks hold the same plan and use the same mode.

    Each rank sends a SHA-256 of both to every other rank of its groups and compares.

    On NCCL this is also the first use of each group, in which all its ranks must take part.

    Args:
        plan: of the row.
        comm: name of the communication mode, see `lclm.context.plan.cost`.
        groups: every group in which messages of this row will travel.
        device: of the messages.
    """

    def __init__(
        self, plan: RowPlan, comm: str, groups: Sequence[dist.ProcessGroup], device: torch.device
    ) -> None:
        self._plan, self._comm, self._groups, self._device = plan, comm, groups, device
        self._is_agreed = False

    def __call__(self) -> None:
        """Compare at the first call.

        Raises:
            ValueError: on every rank of a group, if some rank has something else.
            ExchangeError: a rank is lost.
        """
        if not self._is_agreed:
            for group in self._groups:
                self._compare(group)
            self._is_agreed = True

    def _compare(self, group: dist.ProcessGroup) -> None:
        content = hashlib.sha256(f"{self._comm} {self._plan.digest()}".encode()).digest()
        mine = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self._device)
        sent, found = [mine] * group.size(), mine.repeat(group.size(), 1)
        transfer = start_all_to_all("comparison of row plans", group, DIGESTS, sent, found)
        transfer.wait()
        transfer.finish()  # the others must get this digest before anybody raises
        others = (found != mine).any(dim=1).nonzero().flatten().tolist()
        if others:
            names = [dist.get_global_rank(group, peer) for peer in others]
            raise ValueError(
                f"row plan: rank {dist.get_rank()} and rank(s) {names} of its context group deal "
                f"out the row differently (here: {self._plan.row_length} tokens, "
                f"{len(self._plan.doc_lengths)} documents, by {self._comm}); all ranks must read "
                "the same row with the same configuration and versions"
            )

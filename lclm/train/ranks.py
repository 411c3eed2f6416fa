"""What ranks have to do with others: they stop when one fails, and end with their launcher."""

import ctypes
import os
import signal
import socket
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class OtherRankError(ValueError):
    """Another rank could not start; the message names it."""


def rank_name() -> str:
    """`rank 3 on host`, for messages."""
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"


def agree(work: Callable[[], T]) -> T:
    """What `work` gives on this rank, once it has succeeded on every rank.

    All ranks must call it at the same time. What a rank does alone, such as reading its node's
    disk, can fail on it alone; without this the others would wait for it in a collective.

    Raises:
        ValueError, OSError: of `work` on this rank.
        OtherRankError: `work` failed on another rank only.
    """
    import torch.distributed as dist

    result, error = None, None
    try:
        result = work()
    except (ValueError, OSError) as raised:
        error = raised
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, None if error is None else f"{rank_name()}: {error}")
    if error is not None:
        raise error
    failed = [text for text in found if text is not None]
    if failed:
        raise OtherRankError(f"cannot start, because of {failed[0]}")
    return result  # type: ignore[return-value]


def end_with_launcher() -> None:
    """Under torchrun, let the kernel end this process when torchrun is gone, however it ended.

    A rank that torchrun cannot end any more would wait in a collective and hold its GPU. Call it
    before any thread starts. A run that was started without torchrun outlives its shell.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != launcher:  # it ended before it was watched
        os.kill(os.getpid(), signal.SIGKILL)

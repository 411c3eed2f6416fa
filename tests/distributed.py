"""Run a function on several real processes over gloo.

`run_distributed(fn, world_size, *args)` starts `world_size` fresh Python processes, each of which
joins one gloo process group and calls `fn(*args)`. `fn` and the arguments are pickled: `fn` is a
function at the top of a module.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

__all__ = ["DistributedError", "run_distributed"]

# Once a rank has failed the others hang in a collective; their own errors, if any, come at once.
_GRACE_S = 2.0


class DistributedError(RuntimeError):
    """A rank raised, died or did not finish in time; the message holds each rank's text."""


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Call `fn(*args)` on each rank of a gloo group of fresh processes.

    Each process has one OpenMP thread, and RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT as under torchrun; the default process group is up when `fn` starts.

    Args:
        fn: function at the top of an importable module; its result must pickle.
        world_size: number of processes.
        timeout: seconds for everything, process start included; then all are killed.

    Returns:
        What `fn` returned, by rank.

    Raises:
        DistributedError: a rank raised, died, or the time was up.
    """
    from torch.distributed import TCPStore

    # The store listens on a port the system chose: no moment in which another process takes it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    processes, readers = [], {}
    saved = dict(os.environ)
    try:
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            os.environ.update(_environment(rank, world_size, store.port))  # inherited by the child
            process = context.Process(
                target=_run_rank, args=(pickle.dumps((fn, args)), writer), daemon=False
            )
            process.start()
            writer.close()  # so that the child's death ends the pipe
            processes.append(process)
            readers[reader] = rank
        os.environ.clear()
        os.environ.update(saved)
        results, errors = _collect(readers, time.monotonic() + timeout, timeout)
    finally:
        os.environ.clear()
        os.environ.update(saved)
        for process in processes:
            _end(process)
    if errors:
        text = "\n".join(f"rank {rank}: {error}" for rank, error in sorted(errors.items()))
        raise DistributedError(f"{fn.__qualname__} on {world_size} processes\n{text}")
    return [results[rank] for rank in range(world_size)]


def _end(process: BaseProcess) -> None:
    """Kill a rank with all that it started: saving a checkpoint starts processes of its own."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # one that died or hangs before it led a group
    process.join()


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # every rank is a client of the parent's store
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # the host's name need not resolve
    }


def _collect(
    readers: dict[Connection, int], deadline: float, timeout: float
) -> tuple[dict[int, Any], dict[int, str]]:
    """Receive each rank's result or error until all are there or time is up."""
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    open_readers = dict(readers)
    while open_readers and (remaining := deadline - time.monotonic()) > 0:
        for reader in wait(list(open_readers), timeout=remaining):
            rank = open_readers.pop(reader)
            try:
                is_result, payload = pickle.loads(reader.recv_bytes())
            except EOFError:
                is_result, payload = False, "the process died without a word"
            if is_result:
                results[rank] = payload
            else:
                errors[rank] = payload
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    for rank in open_readers.values():
        errors[rank] = (
            "killed: another rank had failed" if errors else f"killed: not done after {timeout} s"
        )
    return results, errors


def _run_rank(pickled_call: bytes, writer: Connection) -> None:
    os.setsid()  # leads a process group, so that `_end` reaches its children
    try:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        fn, args = pickle.loads(pickled_call)
        message = pickle.dumps((True, fn(*args)))
        dist.barrier()  # nobody leaves while another rank still talks to it
        dist.destroy_process_group()
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    writer.send_bytes(message)

"""Units encoded by a Ray cluster.

A task encodes one unit and its tokens travel back to the process that started, which writes them.
So the output does not depend on the cluster, and nothing is lost with a node: Ray gives its tasks
to the others. Every node reads input and tokenizer by the same paths.
"""

import functools
import importlib
import os
import socket
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from lclm.prepare.pool import submit_ahead
from lclm.prepare.readers import Unit
from lclm.prepare.worker import Encoded, Worker, WorkerState

CONNECT_SECONDS = 10.0


def encode_on_ray(units: Iterable[Unit], state: WorkerState) -> Iterator[tuple[Unit, Encoded]]:
    """Encode units on the cluster of $RAY_ADDRESS, else one running here, else this machine alone.

    Args:
        units: those that are not done.
        state: for the workers.

    Yields:
        The units in order and what they gave.

    Raises:
        ValueError: the package is missing, there is no cluster at the address, or a node does not
            see a file.
        concurrent.futures.process.BrokenProcessPool: a unit was lost too often for Ray.
    """
    ray = _connect()
    encode = ray.remote(num_cpus=1)(_encode)
    shared = ray.put((state, os.getcwd()))
    try:
        num_workers = int(ray.cluster_resources().get("CPU", 1))
        for unit, future in submit_ahead(
            units, lambda unit: encode.remote(shared, unit), num_workers
        ):
            yield unit, ray.get(future)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise BrokenProcessPool(f"ray: {error}") from error
    finally:
        ray.shutdown()


def _connect() -> Any:
    """The package ray, connected."""
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ValueError(
            f"--engine ray: needs the package ray, which is not installed ({error}); run: pip "
            "install lclm[ray], or leave the option out"
        ) from error
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():  # Ray itself would try for many minutes
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(log_to_driver=False, logging_level="warning")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--engine ray: no cluster at RAY_ADDRESS={address} ({error}); start one with ray "
            "start, or unset RAY_ADDRESS to use this machine alone"
        ) from error
    return ray


def _encode(shared: tuple[WorkerState, str], unit: Unit) -> Encoded:
    """Encode a unit in a process of the cluster."""
    state, folder = shared
    paths = [Path(folder, path) for path in (state.tokenizer_path, state.plain_json_file) if path]
    paths += [Path(folder, path) for path in (unit.path, *sum(unit.documents, ())) if path]
    for path in (Path(folder), *paths):
        if not path.exists():
            raise ValueError(
                f"--engine ray: node {socket.gethostname()} has no {path}; input, tokenizer and "
                "output must lie on a file system that all nodes share, under the same paths"
            )
    os.chdir(folder)
    return _worker(state).encode(unit)


_worker = functools.lru_cache(1)(Worker)  # of this process

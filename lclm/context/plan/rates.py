"""What a rank's device and the links between context ranks do: rates, measured or published."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RATES_NAME = "context_rates.json"  # in a run folder: the rates that the trainer measured

# What rates were called in the files of older versions.
_OLD_NAMES = {"trade": "all_to_all", "near_trade": "near_all_to_all", "hidden": "overlap"}


class Rate(NamedTuple):
    """What n units of work take: `seconds + n / per_second`, and nothing where n is 0."""

    seconds: float
    per_second: float

    def time(self, amount: np.ndarray | float) -> np.ndarray:
        """Seconds of each amount; float64 in the shape of `amount`."""
        work = np.asarray(amount, dtype=np.float64)
        return np.where(work > 0, self.seconds + work / self.per_second, 0.0)


@dataclass(frozen=True)
class Machine:
    """Rates of one rank; `lclm.context.measure` finds those of a run's own.

    Attention counts matmul flops of the visible pairs, copies count bytes written, links count
    bytes that a rank sends while it receives as many.

    Raises:
        ValueError: a rate that is not positive.
    """

    forward: Rate
    backward: Rate
    copy: Rate
    message: Rate
    """To one other rank, of another node where the context ranks are on several."""
    gather: Rate
    """All-gather among all context ranks."""
    scatter: Rate
    """Reduce-scatter in fp32 among all context ranks."""
    all_to_all: Rate
    """All-to-all among all context ranks."""
    near_all_to_all: Rate
    """All-to-all among neighbours, at most `near_ranks` of them."""
    near_ranks: int
    """How many context ranks that follow one another share a node."""
    overlap: float
    """What attention beside a message saves, of the shorter of both: 1 where they run side by side,
    0 where one waits for the other, as on processors that do both."""

    def __post_init__(self) -> None:
        for name, rate in self._rates().items():
            if not (rate.seconds >= 0 and rate.per_second > 0):
                raise ValueError(f"machine: {name} is {rate}; rates must be positive")
        if self.near_ranks < 1:
            raise ValueError(f"machine: near_ranks is {self.near_ranks}; it is at least 1")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"machine: overlap is {self.overlap}; it is from 0 to 1")

    def _rates(self) -> dict[str, Rate]:
        return {item.name: getattr(self, item.name) for item in fields(self) if item.type is Rate}

    def all_to_all_among(self, num_ranks: int) -> Rate:
        """All-to-all among so many neighbours."""
        return self.near_all_to_all if num_ranks <= self.near_ranks else self.all_to_all

    def dump(self) -> dict[str, Any]:
        """Plain numbers for JSON; `load_machine` reads them."""
        rates = {name: list(rate) for name, rate in self._rates().items()}
        return {**rates, "near_ranks": self.near_ranks, "overlap": self.overlap}

    def summary(self) -> str:
        """The rates in words: attention in TFLOP/s, all others in GB/s, after a fixed time."""
        words = []
        for name, rate in self._rates().items():
            is_attention = name in ("forward", "backward")
            unit, label = (1e12, "TFLOP/s") if is_attention else (1e9, "GB/s")
            words.append(
                f"{name} {rate.per_second / unit:.3g} {label} after {rate.seconds * 1e6:.0f} us"
            )
        return ", ".join([*words, f"{self.overlap:.0%} of a message overlaps with attention"])


def load_machine(values: Mapping[str, Any]) -> Machine:
    """The machine of `Machine.dump`'s numbers, also under the names of older versions.

    Raises:
        ValueError: the numbers are not those of a machine.
    """
    try:
        values = {_OLD_NAMES.get(name, name): value for name, value in values.items()}
        rates = {name: Rate(*value) for name, value in values.items() if isinstance(value, list)}
        return Machine(**rates, near_ranks=values["near_ranks"], overlap=values["overlap"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"machine: these are not the rates of a machine: {error}") from error


def read_machine(path: Path) -> Machine:
    """The machine that a trainer measured and left in its run folder.

    Raises:
        ValueError: the file is missing or not of that form.
    """
    if not path.is_file():
        raise ValueError(f"rates: {path} is not a file; training leaves {RATES_NAME} in run.dir")
    try:
        return load_machine(json.loads(path.read_text("utf-8"))["machine"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"rates: {path} holds no rates of a training run: {error}") from error


# Transfers between two GPUs are reported to reach 370 GB/s over NVLink and 45 GB/s over one 400
# Gb/s InfiniBand port each.
_NVLINK, _INFINIBAND = Rate(5e-6, 370e9), Rate(20e-6, 45e9)

# FlashAttention-3 in bf16 on rows of 32K tokens with document masks, as published. Not published
# are the times to start a kernel, the speed of copies (half of what the memory is sold as, 3.35
# TB/s: each byte is read and written), and that messages overlap completely.
_H100 = Machine(
    forward=Rate(10e-6, 584e12),
    backward=Rate(20e-6, 425e12),
    copy=Rate(0, 1.6e12),
    message=_NVLINK,
    gather=_NVLINK,
    scatter=_NVLINK,
    all_to_all=_NVLINK,
    near_all_to_all=_NVLINK,
    near_ranks=1,
    overlap=1.0,
)
# H100s by what joins the context ranks: NVLink all of them, or InfiniBand nodes of eight.
LINKS = {
    "nvlink": _H100,
    "infiniband": replace(
        _H100,
        message=_INFINIBAND,
        gather=_INFINIBAND,
        scatter=_INFINIBAND,
        all_to_all=_INFINIBAND,
        near_ranks=8,
    ),
}


def published(link: str, cp_size: int) -> Machine:
    """The machine of a link; context ranks that fit into one of its nodes have NVLink alone."""
    machine = LINKS[link]
    return LINKS["nvlink"] if cp_size <= machine.near_ranks else machine

"""Logging of every lclm program: one handler, a prefix of time and rank."""

import logging
import os
import sys
import time
import warnings

_START = time.monotonic()


class _Prefix(logging.Filter):
    """Adds `elapsed` (seconds since start) and `rank` to every record."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.elapsed = time.monotonic() - _START
        record.rank = int(os.environ.get("RANK", "0"))
        return True


# Warnings of libraries about what lclm does on purpose or cannot change.
_EXPECTED_WARNINGS = (
    # Megatron-core: Transformer Engine and apex are optional; lclm brings its own ops.
    {"module": r"megatron\."},
    # torch 2.13: Megatron-core calls collectives by the names that older versions have.
    {"message": r"`torch\.distributed\.", "category": FutureWarning},
    # The CPU stand-in of CUDA's names sees Megatron-core read `.grad` of tensors that have none.
    {"message": r"The \.grad attribute of a Tensor that is not a leaf", "category": UserWarning},
)


# What every rank finds alike when it starts; rank 0 says it for all.
_FOUND_BY_ALL = ("lclm.train.start", "lclm.train.changes")


def setup_logging(level: int = logging.INFO) -> None:
    """Send lclm's log lines to stderr; ranks above 0 say warnings and errors only."""
    for expected in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", **expected)
    # Megatron-core 0.19 advises every caller to compute what it then computes itself.
    logging.getLogger("megatron.core.distributed").setLevel(logging.ERROR)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("[%(elapsed)7.1fs r%(rank)d] %(levelname).1s %(message)s")
    )
    handler.addFilter(_Prefix())
    is_first = os.environ.get("RANK", "0") == "0"
    for name in ("lclm", "lclm_kernels"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level if is_first else logging.WARNING)
    for name in _FOUND_BY_ALL:
        logging.getLogger(name).setLevel(logging.NOTSET if is_first else logging.ERROR)

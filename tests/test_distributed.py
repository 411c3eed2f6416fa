"""The harness that runs functions on several processes."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import DistributedError, run_distributed


def _sum_of_ranks(offset):
    value = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(value)
    return dist.get_rank(), value.item(), os.environ["OMP_NUM_THREADS"]


def _fail_on_rank_one():
    if dist.get_rank() == 1:
        raise ValueError("the wheel came off")
    dist.barrier()


def _sleep():
    time.sleep(60)


def _die():
    os._exit(3)


def test_results_come_back_by_rank():
    before = dict(os.environ)
    assert run_distributed(_sum_of_ranks, 2, 10) == [(0, 21, "1"), (1, 21, "1")]
    assert dict(os.environ) == before


def test_error_of_a_rank_is_told_and_the_hanging_rank_is_killed():
    start = time.monotonic()
    with pytest.raises(DistributedError, match=r"(?s)rank 0: .*rank 1: .*the wheel came off"):
        run_distributed(_fail_on_rank_one, 2)
    assert time.monotonic() - start < 60


def test_time_limit_kills():
    with pytest.raises(DistributedError, match=r"rank 0: killed: not done after 1\.0 s"):
        run_distributed(_sleep, 1, timeout=1.0)


def test_a_silent_death_is_told():
    with pytest.raises(DistributedError, match="rank 0: the process died"):
        run_distributed(_die, 1)

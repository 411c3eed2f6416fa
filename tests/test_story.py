"""The worked examples in the packages' docstrings are true."""

import doctest

import pytest

import lclm.context
import lclm.data
import lclm.prepare
from lclm.context.plan import plan_row


@pytest.mark.parametrize("package", [lclm.data, lclm.prepare])
def test_examples_run(package):
    result = doctest.testmod(package)
    assert result.attempted > 10 and result.failed == 0


def test_the_picture_of_a_shared_row():
    plan = plan_row([2, 10, 4], cp_size=2, chunk=2)
    (held,) = (line for line in lclm.context.__doc__.splitlines() if "held by" in line)
    holders = [int(rank) for rank in held.split()[2:]]
    for rank in range(2):
        assert plan.positions(rank).tolist() == [i for i, who in enumerate(holders) if who == rank]
    assert plan.travels(0, 1) == ((4, 8),)
    assert plan.travels(1, 0) == ((2, 4), (8, 10))

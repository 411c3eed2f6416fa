"""What the trainer makes of measured rates: the communication mode, and the file of them."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lclm.context.plan.cost import Comm
from lclm.context.plan.rates import LINKS, RATES_NAME, Rate, load_machine
from lclm.train.context_setup import choose_comm, find_machine, read_rates
from lclm.train.stages import attention_cost, spread_rows
from tests.train.tiny import tiny_config

ROWS = [np.array([40, 24]), np.array([64])]


def test_a_configured_mode_is_taken() -> None:
    for comm, shared in (("ring", 1), ("gather", 1), ("ulysses", 4), ("ulysses_ring", 2)):
        changes = {"parallel__cp": 4, "parallel__cp_comm": comm}
        if comm == "ulysses_ring":
            changes["parallel__cp_ulysses"] = 2
        config = tiny_config("unused", **changes)
        assert choose_comm(config, None, []) == Comm(comm, shared)


def test_no_machine_is_needed_where_nothing_is_auto() -> None:
    fixed = {"parallel__cp_layout": "zigzag", "parallel__cp_comm": "ring"}
    assert find_machine(tiny_config("unused", parallel__cp=4, **fixed), mesh_of(4)) is None
    assert find_machine(tiny_config("unused"), mesh_of(1)) is None


def test_a_deterministic_run_measures_nothing(tmp_path: Path) -> None:
    """Nor does it read what was measured."""
    (tmp_path / RATES_NAME).write_text("{")
    changes = {"parallel__cp": 4, "train__deterministic": True}
    assert find_machine(tiny_config(tmp_path, **changes), mesh_of(4)) == LINKS["nvlink"]
    assert find_machine(tiny_config(tmp_path, **changes), mesh_of(16)) == LINKS["infiniband"]


def mesh_of(cp_size: int) -> SimpleNamespace:
    return SimpleNamespace(cp_size=cp_size)


def test_auto_says_what_it_chose_and_why(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config("unused", parallel__cp=4, parallel__cp_layout="contiguous")
    slow = Rate(1.0, 1e6)
    chosen = []
    for name in ("message", "gather"):
        machine = replace(LINKS["nvlink"], **{name: slow})
        cost = attention_cost(config, 4, machine)
        with caplog.at_level(logging.INFO):
            chosen.append(choose_comm(config, cost, ROWS))
        ways = r"ring \S+, ulysses_ring\(2\) \S+, ulysses \S+, gather \S+$"
        assert f"cp_comm auto: {chosen[-1]}, by predicted ms" in caplog.messages[-1]
        assert re.search(f"mean of 2 rows: {ways}", caplog.messages[-1])
    assert chosen[0].name in ("ulysses", "gather") and chosen[1].name != "gather"


def test_a_layer_of_this_rank_is_costed() -> None:
    config = tiny_config("unused", parallel__tp=2, parallel__pp=2, parallel__cp=2)
    cost = attention_cost(config, 2, LINKS["nvlink"])
    assert (cost.num_heads, cost.num_kv_heads, cost.head_dim) == (2, 1, 8)
    assert (cost.number_bytes, cost.kept_layers, cost.is_recomputed) == (2, 2, False)
    config = tiny_config("unused", train__recompute="full")
    cost = attention_cost(config, 4, LINKS["nvlink"])
    assert (cost.number_bytes, cost.kept_layers, cost.is_recomputed) == (4, 1, True)


def test_rates_are_taken_only_for_what_they_were_made_for(tmp_path: Path) -> None:
    path, made_for = tmp_path / "rates.json", {"device": "cpu", "cp": 2}
    assert read_rates(path, made_for) is None
    rates = LINKS["nvlink"].dump()
    path.write_text(json.dumps({"made_for": made_for, "machine": rates}))
    assert read_rates(path, made_for) == rates
    assert read_rates(path, {**made_for, "cp": 4}) is None
    path.write_text("{")
    with pytest.raises(ValueError, match=r"rates\.json is not what a trainer measured.*remove it"):
        read_rates(path, made_for)


def test_rates_of_older_versions_are_read() -> None:
    machine = replace(LINKS["infiniband"], overlap=0.25)
    old = machine.dump()
    names = {"trade": "all_to_all", "near_trade": "near_all_to_all", "hidden": "overlap"}
    for before, now in names.items():
        old[before] = old.pop(now)
    assert load_machine(old) == machine


def test_rows_are_looked_at_from_first_to_last() -> None:
    assert spread_rows(3) == [0, 1, 2]
    assert spread_rows(8000)[0] == 0 and spread_rows(8000)[-1] == 7999
    assert len(set(spread_rows(8000))) == 8

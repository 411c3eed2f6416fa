"""Plans of interval attention: what make_plan refuses, and how it cuts a mask into parts."""

import numpy as np
import pytest
import torch

from lclm_kernels.interval_attention import (
    backward,
    forward,
    interval_attention,
    make_plan,
)
from lclm_kernels.interval_attention.plan import TILE
from tests.kernels.masks import MASKS, document_intervals, random_inputs, visible_TS


def int32(*values):
    return np.array(values, dtype=np.int32)


def num_computed_pairs(plan):
    """Pairs the parts compute, hidden ones included; a causal square counts in full."""
    return sum(part.num_tiles * part.num_rows * part.num_keys for part in plan.parts)


@pytest.mark.parametrize("mask", MASKS)
def test_parts_cover_each_visible_pair_once(mask):
    plan = MASKS[mask]
    covered = np.zeros((plan.num_queries, plan.num_keys), dtype=int)
    is_begun = np.zeros(plan.num_queries, dtype=bool)
    for index, part in enumerate(plan.parts):
        bias = plan.bias(index, torch.device("cpu"), torch.float32)
        assert (bias is None) == (not part.is_masked)
        assert part.num_rows > 0 and part.num_keys > 0
        if part.num_tiles > 1:  # in-place sums on the tiles need this
            assert part.row_step >= part.num_rows and part.key_step >= part.num_keys
        for tile in range(part.num_tiles):
            row, key = part.row_start + tile * part.row_step, part.key_start + tile * part.key_step
            seen = np.ones((part.num_rows, part.num_keys), dtype=int)
            if part.is_causal:
                assert part.num_rows == part.num_keys
                seen = np.tril(seen)
            if bias is not None:
                seen = (bias[tile, 0] == 0).numpy().astype(int)
            assert seen.any(axis=1).all()  # operators disagree about rows without a key
            rows = slice(row, row + part.num_rows)
            covered[rows, key : key + part.num_keys] += seen
            assert is_begun[rows].any() != part.is_first
            is_begun[rows] = True
    assert np.array_equal(covered, visible_TS(plan).numpy().astype(int))
    assert plan.num_pairs == covered.sum()


def test_number_of_parts_does_not_depend_on_the_number_of_documents():
    for length in (1, 4, 64):
        plan = make_plan(*document_intervals([length] * (8192 // length)), 8192)
        assert len(plan.parts) == 1
        assert num_computed_pairs(plan) == 8192 * TILE
    rng = np.random.default_rng(0)
    lengths = rng.multinomial(8192, rng.dirichlet(np.ones(500))).tolist()
    assert len(make_plan(*document_intervals(lengths), 8192).parts) <= 2 * 8192 // TILE


@pytest.mark.parametrize("length", [1024, 2048, 8192])
def test_work_stays_near_the_visible_pairs(length):
    plan = make_plan(*document_intervals([length]), length)
    assert num_computed_pairs(plan) <= plan.num_pairs + length * TILE // 2


def test_middle_of_a_document_costs_its_visible_pairs():
    rows = np.arange(4000, 5000)
    plan = make_plan(np.zeros(1000, dtype=np.int32), (rows + 1).astype(np.int32), 8000)
    assert num_computed_pairs(plan) <= plan.num_pairs + 1000 * TILE // 2


def test_rows_that_see_the_same_keys_are_one_rectangle():
    lo = int32(*[0] * 900, *[50] * 300)
    hi = int32(*[40] * 900, *[90] * 300)
    parts = make_plan(lo, hi, 90).parts
    assert [(part.num_rows, part.num_keys, part.is_masked) for part in parts] == [
        (900, 40, False),
        (300, 40, False),
    ]


def test_tensors_and_arrays_make_the_same_plan_and_are_copied():
    lo, hi = document_intervals([5, 300])
    plan = make_plan(torch.from_numpy(lo), torch.from_numpy(hi), 305)
    assert plan.parts == make_plan(lo, hi, 305).parts
    lo[:] = 0
    assert plan.lo[5] == 5


BAD_PLANS = {
    "rows": ((int32(0), int32(1, 1), 3), "lo has 1 rows, hi has 2"),
    "dtype": ((np.zeros(2, dtype=np.int64), int32(1, 1), 3), r"lo must be an int32 .*int64"),
    "torch dtype": ((torch.zeros(2), torch.zeros(2), 3), r"lo must be an int32 .*float32"),
    "list": (([0, 0], int32(1, 1), 3), "lo must be an int32 .* got list"),
    "dims": ((int32(0), np.zeros((1, 1), dtype=np.int32), 3), r"hi must be .* one dim.*\[1, 1\]"),
    "negative keys": ((int32(0), int32(0), -1), "num_keys must be .* at least 0, got -1"),
    "float keys": ((int32(0), int32(0), 2.0), r"num_keys must be an int .* got 2\.0"),
    "lo > hi": ((int32(0, 2), int32(1, 1), 3), r"row 1 has the interval \[2, 1\): lo must not exc"),
    "hi > keys": (
        (int32(0, 2), int32(1, 4), 3),
        r"row 1 .*\[2, 4\): hi must not exceed num_k",
    ),
    "lo < 0": ((int32(-1), int32(1), 3), r"row 0 .*\[-1, 1\): lo must be at least 0"),
    "lo falls": ((int32(1, 0, 0), int32(2, 0, 3), 3), "lo falls from 1 in row 0 to 0 in row 2"),
    "hi falls": ((int32(0, 0), int32(3, 2), 3), "hi falls from 3 in row 0 to 2 in row 1"),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_make_plan_refuses(case):
    arguments, message = BAD_PLANS[case]
    with pytest.raises(ValueError, match=f"make_plan: {message}"):
        make_plan(*arguments)


@pytest.mark.gpu
def test_make_plan_refuses_device_tensors():
    bound = torch.zeros(2, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="build the plan from host arrays"):
        make_plan(bound, bound, 3)


def bad_calls():
    plan = MASKS["63 tokens"]
    q, k, v, _ = (x.float() for x in random_inputs(plan))
    out, lse = torch.zeros_like(q), torch.zeros(4, 63)
    return {
        "q dims": ((q[0], k, v, plan, 1.0), r"q must be \[T, N, H\]"),
        "k head size": ((q, k[..., :8], v, plan, 1.0), "k must be"),
        "v shape": ((q, k, v[:9], plan, 1.0), "v must be"),
        "v dtype": ((q, k, v.double(), plan, 1.0), r"v must be .*float32.* got torch\.float64"),
        "heads": ((q[:, :3], k, v, plan, 1.0), "3 query heads cannot share 2 kv heads"),
        "plan rows": ((q[:9], k, v, plan, 1.0), "plan is for 63 queries and 63 keys, got 9 and 63"),
        "plan keys": ((q, k[:9], v[:9], plan, 1.0), "got 63 and 9"),
        "scale": ((q, k, v, plan, float("nan")), "scale must be finite, got nan"),
        "int": ((q.int(), k.int(), v.int(), plan, 1.0), "no implementation serves"),
        "name": ((q, k, v, plan, 1.0, None, "flex"), "implementation='flex' does not exist"),
        "gradient": (
            (q, k.clone().requires_grad_(), v, plan, 1.0),
            r"k \[63, 2, 16\] requires grad",
        ),
        "carry expanded": (
            (q, k, v, plan, 1.0, (out[:1].expand(q.shape), lse)),
            r"carry out \[63, 4, 16\] of strides \[0, 16, 1\] is expanded",
        ),
        "carry dtype": ((q, k, v, plan, 1.0, (out.half(), lse)), "carry out must be"),
        "carry shape": ((q, k, v, plan, 1.0, (out, lse.t())), r"carry lse must be .*\[4, 63\]"),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_forward_refuses(case):
    arguments, message = bad_calls()[case]
    with pytest.raises(ValueError, match=message):
        forward(*arguments)


def bad_backwards():
    """What is wrong of the arguments from dout to dv, and what is said about it."""
    q, _, v, dout = (x.float() for x in random_inputs(MASKS["63 tokens"]))
    lse = torch.zeros(4, 63)
    return {
        "dout": (0, dout[:9], r"dout must be .*\[63, 4, 16\]"),
        "dout dtype": (0, dout.half(), "dout must be torch.float32"),
        "q heads": (1, q[:, :3], "3 query heads cannot share 2 kv heads"),
        "v": (3, v.bfloat16(), "v must be torch.float32"),
        "out": (4, dout.double(), "out must be torch.float32"),
        "lse": (5, lse.t(), r"lse must be .*\[4, 63\]"),
        "delta dtype": (6, lse.half(), "delta must be torch.float32"),
        "delta device": (6, lse.to("meta"), "delta must be .* on cpu, got .* on meta"),
        "dq dtype": (9, q.bfloat16(), "dq must be torch.float32"),
        "dk of query heads": (10, q, r"dk must be .*\[63, 2, 16\]"),
        "dv expanded": (11, v[:, :1].expand(v.shape), r"dv .* of strides \[32, 0, 1\] is expanded"),
        "dq gradient": (9, q.clone().requires_grad_(), r"dq \[63, 4, 16\] requires grad"),
        "q gradient": (1, q.clone().requires_grad_(), r"q \[63, 4, 16\] requires grad"),
    }


@pytest.mark.parametrize("case", bad_backwards())
def test_backward_refuses(case):
    plan = MASKS["63 tokens"]
    q, k, v, dout = (x.float() for x in random_inputs(plan))
    lse = torch.zeros(4, 63)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    arguments = [dout, q, k, v, torch.zeros_like(q), lse, lse, plan, 1.0, *grads]
    place, wrong, message = bad_backwards()[case]
    arguments[place] = wrong
    with pytest.raises(ValueError, match=f"interval_attention: .*{message}"):
        backward(*arguments)
    assert not any(x.any() for x in grads)


def test_autograd_refuses_as_forward_does():
    plan = MASKS["63 tokens"]
    q, k, v, _ = random_inputs(plan)
    with pytest.raises(ValueError, match="implementation='flex' does not exist"):
        interval_attention(q, k, v, plan, 1.0, "flex")

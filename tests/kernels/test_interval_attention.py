"""Interval attention: every implementation against attention in fp64 by definition."""

import itertools

import numpy as np
import pytest
import torch

from lclm_kernels.interval_attention import backward, forward, interval_attention, make_plan
from tests.kernels.bounds import assert_within_torch_error, max_error
from tests.kernels.implementations import TRITON, device_of
from tests.kernels.implementations import each_implementation as each_of
from tests.kernels.masks import (
    MASKS,
    dense_attention,
    document_intervals,
    random_inputs,
    torch_attention,
)
from tests.tolerances import ATTENTION_LSE_FP32, ATTENTION_SPLIT_FP32

SCALE = 0.3
each_implementation = each_of("reference", "cpu", "triton")
# Triton's interpreter takes about 2 ms a step of 32 x 32: it gets the smaller masks.
MAX_PAIRS_TRITON = 60_000


def each_mask(*masks):
    """Every implementation on the masks; Triton on those of some size."""
    cases = [(mask, name) for mask in masks for name in ("reference", "cpu")]
    small = [mask for mask in masks if MASKS[mask].num_pairs <= MAX_PAIRS_TRITON]
    cases += [pytest.param(mask, "triton", marks=TRITON.marks) for mask in small]
    return pytest.mark.parametrize(("mask", "implementation"), cases)


def inputs_for(implementation, plan):
    """q, k, v, dout, fp64, of a size that the implementation takes."""
    if implementation != "triton":
        return random_inputs(plan)
    q, k, v, dout = random_inputs(plan, 2, 1, 64)
    return [q / 2, k, v, dout / 2]  # scores and their gradients as large as with heads of 16


def to_device(implementation, dtype, *tensors):
    return [x.to(device=device_of(implementation), dtype=dtype) for x in tensors]


def run_autograd(q, k, v, dout, plan, implementation):
    """(out, dq, dk, dv) of the public autograd function."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = interval_attention(q, k, v, plan, SCALE, implementation)
    out.backward(dout)
    return out.detach(), q.grad, k.grad, v.grad


@each_mask(*MASKS)
def test_forward_and_gradients_fp32(mask, implementation):
    plan = MASKS[mask]
    inputs = inputs_for(implementation, plan)
    truth_out, truth_lse, *truth_grads = dense_attention(*inputs, plan, SCALE)
    narrow = to_device(implementation, torch.float32, *inputs)
    out, lse = forward(*narrow[:3], plan, SCALE, implementation=implementation)
    assert lse.dtype == torch.float32 and lse.shape == inputs[0].shape[1::-1]
    assert max_error(lse, truth_lse) <= ATTENTION_LSE_FP32
    if mask in ("no keys", "neither", "no queries"):  # torch's own attention dies of these
        of_torch = [torch.zeros_like(x, dtype=torch.float32) for x in (truth_out, *truth_grads)]
    else:
        of_torch = torch_attention(*(x.float() for x in inputs), plan, SCALE)
    results = run_autograd(*narrow, plan, implementation)
    assert torch.equal(results[0], out)
    for name, result, torch_result, truth in zip(
        ("out", "dq", "dk", "dv"), results, of_torch, (truth_out, *truth_grads)
    ):
        assert_within_torch_error(f"{mask} {name}", result, torch_result, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_mask("ragged documents", "sliding window", "one giant document")
def test_half_precision_within_twice_torch(mask, dtype, implementation):
    plan = MASKS[mask]
    inputs = [x.to(dtype) for x in inputs_for(implementation, plan)]
    truth = dense_attention(*(x.double() for x in inputs), plan, SCALE)
    of_torch = torch_attention(*inputs, plan, SCALE)
    results = run_autograd(*to_device(implementation, dtype, *inputs), plan, implementation)
    for name, result, torch_result, exact in zip(
        ("out", "dq", "dk", "dv"), results, of_torch, (truth[0], *truth[2:])
    ):
        assert_within_torch_error(f"{mask} {name}", result, torch_result, exact)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("lengths", [[3, 1, 2], [150]])
def test_gradcheck_fp64(lengths, implementation):
    plan = make_plan(*document_intervals(lengths), sum(lengths))
    inputs = [x.requires_grad_() for x in random_inputs(plan, 2, 1, 2)[:3]]
    assert torch.autograd.gradcheck(
        lambda q, k, v: interval_attention(q, k, v, plan, SCALE, implementation),
        inputs,
        fast_mode=len(inputs[0]) > 10,
    )


@each_of("reference", "cpu")
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("head_dim", [8, 40])
def test_grouped_heads(heads, head_dim, implementation):
    plan = MASKS["ragged documents"]
    inputs = random_inputs(plan, *heads, head_dim)
    truth_out, _, *truth_grads = dense_attention(*inputs, plan, SCALE)
    of_torch = torch_attention(*(x.float() for x in inputs), plan, SCALE)
    narrow = to_device(implementation, torch.float32, *inputs)
    results = run_autograd(*narrow, plan, implementation)
    for result, torch_result, truth in zip(results, of_torch, (truth_out, *truth_grads)):
        assert_within_torch_error(str(heads), result, torch_result, truth)


def shards_of(plan, borders):
    """The plan of each shard of the keys."""
    lo, hi = plan.lo.numpy(), plan.hi.numpy()
    for start, end in itertools.pairwise(borders):
        bounds = (np.clip(x, start, end) - start for x in (lo, hi))
        yield start, end, make_plan(*bounds, end - start)


def run_in_shards(q, k, v, dout, plan, implementation):
    """(out, lse, dq, dk, dv), all fp32, with the keys in three shards."""
    third = plan.num_keys // 3
    borders = [0, third, 2 * third + 1, plan.num_keys]
    out = torch.zeros(q.shape, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), device=q.device)
    for start, end, shard in shards_of(plan, borders):
        keys = (k[start:end], v[start:end])
        carry = forward(q, *keys, shard, SCALE, (out, lse), implementation)
        assert carry[0] is out and carry[1] is lse
    grads = [torch.zeros(x.shape, device=x.device) for x in (q, k, v)]
    delta = (dout.float() * out).sum(dim=-1).t()
    for start, end, shard in shards_of(plan, borders):
        state = (out, lse, delta, shard, SCALE, grads[0], *(x[start:end] for x in grads[1:]))
        keys = (k[start:end], v[start:end])
        backward(dout, q, *keys, *state, implementation=implementation)
    return out, lse, *grads


SPLIT_MASKS = ["ragged documents", "one giant document", "sliding window", "some rows empty"]


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", SPLIT_MASKS)
def test_three_shards_of_the_keys_equal_one_call(mask, dtype, implementation):
    check_shards_equal_one_call(mask, dtype, implementation)


@each_of("triton")
@pytest.mark.parametrize("mask", ["ragged documents", "some rows empty"])
def test_three_shards_of_the_keys_equal_one_call_of_triton(mask, implementation):
    check_shards_equal_one_call(mask, torch.float32, implementation)


def check_shards_equal_one_call(mask, dtype, implementation):
    plan = MASKS[mask]
    inputs = to_device(implementation, dtype, *inputs_for(implementation, plan))
    sharded = run_in_shards(*inputs, plan, implementation)
    # in fp32 the one call does not round its result to the inputs' dtype
    q, k, v, dout = (x.float() for x in inputs)
    out, lse = forward(q, k, v, plan, SCALE, implementation=implementation)
    delta = (dout * out).sum(dim=-1).t()
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    state = (out, lse, delta, plan, SCALE, *grads)
    backward(dout, q, k, v, *state, implementation=implementation)
    assert max_error(sharded[1], lse) <= ATTENTION_LSE_FP32
    for result, whole in zip((sharded[0], *sharded[2:]), (out, *grads)):
        assert max_error(result, whole) <= ATTENTION_SPLIT_FP32


@each_mask(*SPLIT_MASKS)
def test_three_shards_in_bf16_within_twice_torch(mask, implementation):
    plan = MASKS[mask]
    inputs = [x.bfloat16() for x in inputs_for(implementation, plan)]
    truth = dense_attention(*(x.double() for x in inputs), plan, SCALE)
    of_torch = torch_attention(*inputs, plan, SCALE)
    narrow = to_device(implementation, torch.bfloat16, *inputs)
    sharded = run_in_shards(*narrow, plan, implementation)
    for result, torch_result, exact in zip(
        (sharded[0], *sharded[2:]), of_torch, (truth[0], *truth[2:])
    ):
        assert_within_torch_error(mask, result.bfloat16(), torch_result, exact)


@each_implementation
def test_backward_adds(implementation):
    plan = MASKS["ragged documents"]
    q, k, v, dout = to_device(implementation, torch.float32, *inputs_for(implementation, plan))
    out, lse = forward(q, k, v, plan, SCALE, implementation=implementation)
    delta = (dout * out).sum(dim=-1).t()
    fresh = [torch.zeros_like(x) for x in (q, k, v)]
    filled = [torch.full_like(x, 2.0) for x in (q, k, v)]
    for grads in (fresh, filled):
        state = (out, lse, delta, plan, SCALE, *grads)
        backward(dout, q, k, v, *state, implementation=implementation)
    for one, other in zip(fresh, filled):
        assert max_error(one + 2.0, other) <= ATTENTION_SPLIT_FP32


def test_threads_give_the_bits_of_one_thread():
    """Query heads of one kv head add to the same gradient: they must not race."""
    plan = MASKS["one giant document"]
    inputs = [x.float() for x in random_inputs(plan, 8, 2)]
    num_threads = torch.get_num_threads()
    try:
        results = []
        for torch_threads in (1, 4):
            torch.set_num_threads(torch_threads)
            results.append(run_autograd(*inputs, plan, "cpu"))
    finally:
        torch.set_num_threads(num_threads)
    for one, four in zip(*results):
        assert torch.equal(one, four)


@each_implementation
def test_key_that_no_query_sees_gets_no_gradient(implementation):
    plan = MASKS["keys nobody sees"]
    inputs = to_device(implementation, torch.float32, *inputs_for(implementation, plan))
    _, _, dk, dv = run_autograd(*inputs, plan, implementation)
    for grad in (dk, dv):
        assert not grad[:50].any() and not grad[150:].any()
        assert grad[50:150].any(dim=-1).all()


@each_implementation
def test_permuting_documents_permutes_the_outputs(implementation):
    lengths = [40, 1, 170, 3, 90]
    order = [3, 0, 4, 2, 1]
    pieces = torch.arange(sum(lengths)).split(lengths)
    permutation = torch.cat([pieces[i] for i in order])
    plan = make_plan(*document_intervals(lengths), sum(lengths))
    other_plan = make_plan(*document_intervals([lengths[i] for i in order]), sum(lengths))
    inputs = to_device(implementation, torch.float32, *inputs_for(implementation, plan))
    results = run_autograd(*inputs, plan, implementation)
    permuted = run_autograd(*(x[permutation] for x in inputs), other_plan, implementation)
    for result, other in zip(results, permuted):
        assert max_error(result[permutation], other) <= ATTENTION_SPLIT_FP32


@each_implementation
def test_packed_equals_separate(implementation):
    lengths = [129, 1, 200, 2, 64]
    plan = make_plan(*document_intervals(lengths), sum(lengths))
    inputs = to_device(implementation, torch.float32, *inputs_for(implementation, plan))
    packed = run_autograd(*inputs, plan, implementation)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = make_plan(*document_intervals([length]), length)
        separate = run_autograd(*(x[part] for x in inputs), alone, implementation)
        for result, other in zip(packed, separate):
            assert max_error(result[part], other) <= ATTENTION_SPLIT_FP32
        start += length


@each_implementation
def test_strided_inputs_are_read_as_they_lie(implementation):
    plan = MASKS["ragged documents"]
    q, k, v, dout = to_device(implementation, torch.float32, *inputs_for(implementation, plan))
    plain = run_autograd(q, k, v, dout, plan, implementation)
    fused = torch.cat([q, k, v], dim=1).requires_grad_()  # as one projection gives them
    views = fused.split([q.shape[1], k.shape[1], v.shape[1]], dim=1)
    out = interval_attention(*views, plan, SCALE, implementation)
    out.backward(dout)
    assert torch.equal(out, plain[0])
    assert torch.equal(fused.grad, torch.cat(plain[1:], dim=1))
    heads_last = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in views]
    other, _ = forward(*heads_last, plan, SCALE, implementation=implementation)
    assert torch.equal(other, plain[0])

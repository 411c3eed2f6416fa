"""The kernels' benchmark on a CPU: counts, truths, every peer's place in it, tables."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels import contest, operators, peers, report
from benchmarks.kernels.contest import Work
from benchmarks.kernels.cudnn_thd import CudnnRow, run_graphs
from benchmarks.kernels.operators import MODELS, OPERATORS, SIZES, Case, Model
from benchmarks.kernels.peers import PEERS
from tests.tolerances import BENCHMARK_TRUTH_FP32

FP32 = torch.float32


# Counts


@pytest.fixture
def odd_model(monkeypatch):
    """A model named "odd" whose sizes are all different."""
    model = Model(D=16, F=24, N=3, K=1, H=4, V=100)
    monkeypatch.setitem(MODELS, "odd", model)
    return model


def work_of(op, dtype=torch.bfloat16, **more):
    return OPERATORS[op](Case(op, "odd", 10), dtype, **more).work


def test_attention_work_counts_visible_pairs_only(odd_model):
    work = work_of("interval_attention", lengths=np.array([2, 3]))
    pairs = 1 + 2 + 1 + 2 + 3
    assert work["fwd"] == Work(4.0 * 3 * 4 * pairs, "flop")
    assert work["bwd"] == Work(2.5 * 4 * 3 * 4 * pairs, "flop")


def test_pairs_of_a_long_row_do_not_overflow():
    assert operators.visible_pairs(np.array([131072], dtype=np.int32)) == 131072 * 131073 // 2


def test_bytes_and_products_of_the_other_operators(odd_model):
    assert work_of("rope")["bwd"].amount == 10 * (2 * (3 + 1) * 4 * 2 + 4 * 4)
    norm, gate = work_of("rms_norm"), work_of("swiglu")
    assert (norm["fwd"].amount, norm["bwd"].amount) == (2 * 10 * 16 * 2, 3 * 10 * 16 * 2)
    assert (gate["fwd"].amount, gate["bwd"].amount) == (3 * 10 * 24 * 2, 5 * 10 * 24 * 2)
    assert work_of("linear_cross_entropy")["step"] == Work(3 * 2.0 * 10 * 16 * 100, "flop")
    params = (3 + 2) * 4 * 16 + 16 * 12 + 48 * 16 + 16 * 24 + 2 * 16
    assert work_of("adamw")["step"] == Work(28.0 * params, "byte")


def test_every_size_covers_every_operator():
    cases = operators.list_cases("interval_attention", "full")
    assert ("Llama-3-8B", 131072, "ragged") in {(c.model, c.tokens, c.row) for c in cases}
    assert len(cases) == 8
    for op in OPERATORS:
        full = operators.list_cases(op, "full")
        assert len({case.model for case in full}) == 2
        assert 0 < len(operators.list_cases(op, "quick")) < len(full)
        for size in SIZES:
            assert {case.model for case in operators.list_cases(op, size)} <= MODELS.keys()


def test_ragged_rows_are_full_and_the_same_each_time():
    case = Case("interval_attention", "Llama-3-8B", 32768, operators.RAGGED)
    lengths = operators.document_lengths(case)
    assert lengths.sum() == 32768 and len(lengths) > 4 and lengths.max() <= 8192
    assert np.array_equal(lengths, operators.document_lengths(case))


# Truths


@pytest.mark.parametrize("lengths", [[700], [1, 300, 5, 256, 40], [1, 1, 2, 3] * 3])
def test_tails_are_dense_attention(lengths):
    """Against PyTorch's dense attention with a mask, in fp64."""
    case = Case("interval_attention", "tiny", sum(lengths), "ragged")
    problem = operators.attention_problem(case, FP32, np.array(lengths))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(sum(lengths))
    mask = (document[:, None] == document) & (position[:, None] >= position)
    assert torch.equal(mask, peers.dense_mask(np.array(lengths)))
    wide = [x.detach().double().requires_grad_() for x in problem.inputs]
    out = scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in wide),
        attn_mask=mask[None, None],
        scale=problem.constants["scale"],
        enable_gqa=True,
    )[0].transpose(0, 1)
    results = [out, *torch.autograd.grad(out, wide, problem.douts[0].double())]
    for expected in problem.expected:
        picked = expected.pick(results)
        assert picked.shape == expected.value.shape
        assert contest.relative_error(expected.value, picked) < BENCHMARK_TRUTH_FP32


@pytest.mark.parametrize("op", ["rope", "rms_norm", "swiglu", "linear_cross_entropy"])
def test_truths_by_chunks_are_the_formula_on_the_whole_row(op, monkeypatch):
    monkeypatch.setattr(operators, "CHUNK_TOKENS", 96)  # of 256: the last chunk is a part
    problem = OPERATORS[op](Case(op, "tiny", 256), FP32)
    wide = [x.detach().double().requires_grad_() for x in problem.inputs]
    outs = problem.formula(*wide)
    outs = [outs] if isinstance(outs, torch.Tensor) else outs
    grads = torch.autograd.grad(
        outs, wide, [dout.to(out) for dout, out in zip(problem.douts, outs)]
    )
    assert len(problem.expected) == len(outs) + len(grads)
    for expected in problem.expected:
        whole = expected.pick([*outs, *grads])
        assert contest.relative_error(expected.value, whole) < BENCHMARK_TRUTH_FP32


@pytest.mark.parametrize("op", OPERATORS)
def test_inputs_and_truths_lie_on_the_device_that_is_worked_on(op):
    """As workers do it; "meta" stands for a GPU, what is left on the CPU would be seen."""
    with torch.device("meta"):
        problem = OPERATORS[op](operators.list_cases(op, "tiny")[-1], torch.bfloat16)
    tensors = [*problem.inputs, *problem.douts, *(e.value for e in problem.expected)]
    tensors += [e.tokens for e in problem.expected if e.tokens is not None]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


# Every peer, on the CPU


@pytest.mark.parametrize("op", OPERATORS)
def test_every_contestant_is_timed_or_named(op, monkeypatch):
    monkeypatch.setattr(contest, "ROUNDS_S", 0.0)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = operators.list_cases(op, "tiny")[-1]
    problem = OPERATORS[op](case, FP32)
    names = set()
    for peer in PEERS[op][1:]:
        chosen = peers.contestants(op, peer.name)
        outcome = contest.hold_contest(problem, chosen, contest.cpu_measure, lambda name: None)
        names |= outcome.times_ms.keys()
        assert "ours" not in outcome.failed
        assert peer.name in outcome.times_ms or outcome.failed[peer.name]
        assert not outcome.times_ms.keys() & outcome.failed.keys()
        if peers.why_missing(peer):
            assert "No module named" in outcome.failed[peer.name]
        for phases in outcome.times_ms.values():
            assert phases.keys() <= problem.work.keys()
    # What needs no package is timed on a CPU, where it can be.
    plain = {peer.name for peer in PEERS[op] if not peer.symbol}
    assert plain - names <= {"SDPA cuDNN", "SDPA flash"}


def test_cudnn_is_told_where_documents_lie():
    like = torch.empty(0, dtype=torch.bfloat16)
    row = CudnnRow(None, np.array([3, 2, 7]), (4, 2, 8), 0.5, like)
    assert row.q_offsets.flatten().tolist() == [0, 3 * 32, 5 * 32, 12 * 32]
    assert row.kv_offsets.flatten().tolist() == [0, 3 * 16, 5 * 16, 12 * 16]
    assert row.lengths.shape == (3, 1, 1, 1) and row.stats.shape == (3, 4, 7, 1)
    assert row.layout(4) == ([3, 4, 7, 8], [7 * 32, 8, 32, 1])


def test_cudnn_runs_on_the_problems_tensors_by_name():
    case = Case("interval_attention", "tiny", 8, "ragged")
    problem = operators.attention_problem(case, FP32, np.array([5, 3]))
    given = torch.empty(1)

    def forward(q, k, v, o, stats):
        assert stats is given and torch.equal(k, problem.inputs[1])
        o.copy_(2 * q)

    def backward(q, k, v, o, dO, stats, dq, dk, dv):
        assert torch.equal(o, 2 * q) and torch.equal(dO, problem.douts[0])
        for gradient, factor in ((dq, 1), (dk, 2), (dv, 3)):
            gradient.fill_(factor)

    out, dq, dk, dv = run_graphs(problem, given, forward, backward).once()
    assert torch.equal(out, 2 * problem.inputs[0])
    assert [grad.unique().tolist() for grad in (dq, dk, dv)] == [[1.0], [2.0], [3.0]]
    assert (dq.shape, dk.shape) == (out.shape, problem.inputs[1].shape)


# Tables


def a_record():
    work = {"fwd": [1e9, "flop"], "bwd": [2.5e9, "flop"]}
    times = {
        "ours": {"fwd": [3.0, 1.0, 2.0], "bwd": [5.0]},
        "floor: products": {"fwd": [0.5, 0.5, 0.5], "bwd": [1.0]},
        "peer": {"fwd": [6.0, 1.5, 4.0]},  # forward alone
    }
    return {
        "op": "interval_attention",
        "model": "Llama-3-8B",
        "tokens": 8192,
        "row": "ragged",
        "note": "3 documents",
        "work": work,
        "results": report.summarize(times, work, {"flop": 1e12, "byte": 1.0}),
        "failed": {"other": "gives no gradients"},
    }


def test_the_table_shows_everyone_and_the_summary_the_fastest_peer():
    record = a_record()
    block = report.format_case(record)
    assert "Llama-3-8B, 8192 tokens, ragged (3 documents)" in block
    assert "ours 2.0000 ms, 500 GFLOP/s, 50.0% of peak" in block and "peer 2.00 x" in block
    assert "not timed: other: gives no gradients" in block
    forward, backward = report.format_summary([record]).splitlines()[1:]
    assert forward.endswith("peer 2.00") and backward.endswith("none was timed")
    lost = {**record, "results": {}, "failed": {"ours": "dq is off by 1"}}
    assert "not timed: ours: dq is off by 1" in report.format_case(lost)
    assert report.format_summary([lost]).count("\n") == 0

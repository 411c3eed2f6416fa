"""The GPU benchmark without a GPU: counts, truths, tables, every peer's place in it."""

import json

import kernels_cpu
import numpy as np
import pytest
import torch
from kernels_gpu import contest, report, row_peers, run, shapes, worker
from kernels_gpu.attention_problem import attention_problem
from kernels_gpu.cudnn_peer import CudnnRow, attention_of_graphs
from kernels_gpu.shapes import MODELS, OPS, Model, Spec, Work
from torch.nn.functional import scaled_dot_product_attention

from tests.tolerances import BENCHMARK_TRUTH_FP32

CPU = torch.device("cpu")


# Counts


def test_attention_work_counts_visible_pairs_only():
    model = Model(D=0, F=0, N=3, K=1, H=5, V=0)
    work = shapes.attention_work(model, np.array([2, 3]))
    pairs = 1 + 2 + 1 + 2 + 3
    assert work["fwd"] == Work(4.0 * 3 * 5 * pairs, "flop")
    assert work["bwd"] == Work(2.5 * 4 * 3 * 5 * pairs, "flop")


def test_pairs_of_a_long_row_do_not_overflow():
    assert shapes.visible_pairs(np.array([131072], dtype=np.int32)) == 131072 * 131073 // 2


def test_bytes_and_products_of_the_other_operators():
    model = Model(D=16, F=24, N=3, K=1, H=4, V=100)
    assert shapes.rope_work(model, 10)["bwd"].amount == 10 * (2 * (3 + 1) * 4 * 2 + 4 * 4)
    norm, gate = shapes.rms_norm_work(model, 10), shapes.swiglu_work(model, 10)
    assert (norm["fwd"].amount, norm["bwd"].amount) == (2 * 10 * 16 * 2, 3 * 10 * 16 * 2)
    assert (gate["fwd"].amount, gate["bwd"].amount) == (3 * 10 * 24 * 2, 5 * 10 * 24 * 2)
    assert shapes.loss_work(model, 10)["step"] == Work(3 * 2.0 * 10 * 16 * 100, "flop")
    params = (3 + 2) * 4 * 16 + 16 * 12 + 48 * 16 + 16 * 24 + 2 * 16
    assert shapes.adamw_work(model)["step"] == Work(28.0 * params, "byte")


def test_the_full_run_covers_models_rows_and_documents():
    specs = shapes.list_specs("interval_attention", "full")
    assert {(s.model, s.tokens, s.row) for s in specs} == {
        (model, tokens * 1024, row)
        for model in ("Llama-3-8B", "Llama-3-70B, tp 8")
        for tokens in (8, 32, 64, 128)
        for row in ("one document", "ragged")
    }
    for op in OPS:
        models = {spec.model for spec in shapes.list_specs(op, "full")}
        assert len(models) == 2 and models <= MODELS.keys()
        quick = shapes.list_specs(op, "quick")
        assert 0 < len(quick) < len(shapes.list_specs(op, "full"))


def test_ragged_rows_are_full_and_the_same_each_time():
    spec = Spec("interval_attention", "Llama-3-8B", 32768, shapes.RAGGED)
    lengths = shapes.document_lengths(spec)
    assert lengths.sum() == 32768 and len(lengths) > 4 and lengths.max() <= 8192
    assert np.array_equal(lengths, shapes.document_lengths(spec))


# Truths


@pytest.mark.parametrize("lengths", [[700], [1, 300, 5, 256, 40], [1, 1, 2, 3] * 3])
def test_tails_are_dense_attention(lengths):
    """Against PyTorch's dense attention with a mask, in fp64."""
    spec = Spec("interval_attention", "tiny", sum(lengths), "ragged")
    problem = attention_problem(spec, CPU, torch.float32, np.array(lengths))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(sum(lengths))
    mask = (document[:, None] == document) & (position[:, None] >= position)
    wide = [x.detach().double().requires_grad_() for x in problem.inputs]
    out = scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in wide),
        attn_mask=mask[None, None],
        scale=problem.scale,
        enable_gqa=True,
    )[0].transpose(0, 1)
    results = [out, *torch.autograd.grad(out, wide, problem.douts[0].double())]
    for expected in problem.expected:
        picked = expected.pick(results)
        assert picked.shape == expected.value.shape
        assert contest.relative_error(expected.value, picked) < BENCHMARK_TRUTH_FP32


# Every operator, every peer, on the CPU


@pytest.mark.parametrize("op", OPS)
def test_every_contestant_is_timed_or_named(op, monkeypatch):
    monkeypatch.setattr(contest, "ROUNDS_S", 0.0)
    monkeypatch.setattr(row_peers, "compiled", lambda formula: formula)
    monkeypatch.setattr("kernels_gpu.loss_peers.compiled", lambda formula: formula)
    events = []
    request = {
        "op": op,
        "size": "tiny",
        "device": "cpu",
        "excluded": {"FlexAttention": "takes minutes to compile"},
        "skipped": [],
        "deadline": float("inf"),
    }
    worker.run_operator(request, lambda **event: events.append(event))
    results = [event for event in events if event["event"] == "result"]
    assert len(results) == len(shapes.list_specs(op, "tiny"))
    assert events[-1] == {"event": "done", "left_out": []}
    names = {peer.name for peer in worker.OPERATORS[op][1]}
    for result in results:
        assert result["errors"] == []
        assert result["times_ms"].keys() | result["absent"].keys() == names
        assert not result["times_ms"].keys() & result["absent"].keys()
        assert {name for name in names if name.startswith("ours")} <= result["times_ms"].keys()
        for phases in result["times_ms"].values():
            assert phases.keys() == result["work"].keys()
    json.dumps(events)


def test_what_needs_no_package_is_not_absent(monkeypatch):
    monkeypatch.setattr(row_peers, "compiled", lambda formula: formula)
    names = {"rope": "torch.compile", "rms_norm": "torch", "adamw": "torch fused"}
    for op, name in names.items():
        spec = shapes.list_specs(op, "tiny")[0]
        make, peers = worker.OPERATORS[op]
        chosen = [peer for peer in peers if peer.name in ("ours", name)]
        problem = make(spec, CPU, torch.float32)
        outcome = contest.hold_contest(problem, chosen, contest.cpu_measure, lambda name: None)
        assert name in outcome.times_ms


def test_problems_after_the_deadline_are_left_out_and_skipped_ones_not_repeated():
    request = {
        "op": "interval_attention",
        "size": "tiny",
        "device": "cpu",
        "excluded": {},
        "skipped": [0],
        "deadline": 0.0,
    }
    events = []
    worker.run_operator(request, lambda **event: events.append(event))
    assert [event["event"] for event in events] == ["machine", "done"]
    assert events[-1]["left_out"] == [1]
    assert {"flop", "byte"} == events[0]["ceilings"].keys()


def test_cudnn_is_told_where_documents_lie():
    row = CudnnRow(None, np.array([3, 2, 7]), (4, 2, 8), 0.5, torch.bfloat16, CPU)
    assert row.q_offsets.flatten().tolist() == [0, 3 * 32, 5 * 32, 12 * 32]
    assert row.kv_offsets.flatten().tolist() == [0, 3 * 16, 5 * 16, 12 * 16]
    assert row.lengths.shape == (3, 1, 1, 1) and row.stats.shape == (3, 4, 7, 1)
    shape, strides = row._layout(4)
    assert (shape, strides) == ([3, 4, 7, 8], [7 * 32, 8, 32, 1])


def test_cudnn_runs_on_the_tensors_autograd_gives_it():
    row = CudnnRow(None, np.array([3]), (4, 2, 8), 0.5, torch.bfloat16, CPU)

    def forward(q, k, v, o, stats):
        assert stats is row.stats
        o.copy_(2 * q)

    def backward(q, k, v, o, dO, stats, dq, dk, dv):
        for gradient, factor in ((dq, 1), (dk, 2), (dv, 3)):
            gradient.fill_(factor * dO.sum().item())

    q, k, v = (torch.ones(3, n, 8, requires_grad=True) for n in (4, 2, 2))
    out = attention_of_graphs(row, forward, backward)(q, k, v)
    grads = torch.autograd.grad(out, [q, k, v], torch.ones_like(out))
    assert out.eq(2).all()
    assert [grad.unique().tolist() for grad in grads] == [[96.0], [192.0], [288.0]]


# Tables and records


def a_record():
    work = {"fwd": [1e9, "flop"], "bwd": [2.5e9, "flop"]}
    times = {
        "ours": {"fwd": [3.0, 1.0, 2.0], "bwd": [5.0]},
        "floor: products": {"fwd": [0.5], "bwd": [1.0]},
        "peer": {"fwd": [4.0], "bwd": [2.5]},
    }
    results = report.summarize(times, work, {"flop": 1e12, "byte": 1.0})
    return {
        **Spec("interval_attention", "Llama-3-8B", 8192, "ragged").to_json(),
        "note": "3 documents",
        "work": work,
        "results": results,
        "absent": {"other": "not installed"},
        "errors": [],
    }


def test_medians_rates_and_shares():
    ours = a_record()["results"]["ours"]["fwd"]
    assert ours["ms"] == 2.0 and ours["least_ms"] == 1.0 and ours["rounds"] == 3
    assert ours["per_second"] == pytest.approx(5e11) and ours["share"] == pytest.approx(0.5)


def test_the_table_shows_everyone_and_the_summary_the_fastest_peer():
    block = report.format_block(a_record())
    assert "Llama-3-8B, 8192 tokens, ragged (3 documents)" in block
    assert "50.0%" in block and "TFLOP/s" in block
    assert "other" in block and "not timed: not installed" in block
    forward, backward = report.format_summary([a_record()]).splitlines()[1:]
    assert forward.endswith("peer 2.00") and backward.endswith("peer 0.50")
    wrong = {**a_record(), "errors": ["ours: dq is off by 1"], "results": {}}
    assert "WRONG" in report.format_block(wrong) and "WRONG" in report.format_summary([wrong])


def answer_from(events):
    """A supervisor that answers each operator with these events."""

    def run_operator(request, handle):
        for event in events[request["op"]]:
            handle(event)

    return run_operator


def test_a_run_records_each_problem_and_fails_if_ours_was_wrong(monkeypatch, tmp_path, capsys):
    machine = {"event": "machine", "gpu": "a GPU", "dtype": "bf16", "versions": {"torch": "2"}}
    machine["ceilings"] = {"flop": 1e12, "byte": 1e12}
    good = {"event": "result", "problem": 0, "note": "", "absent": {"Liger": "missing"}}
    good |= {"work": {"step": [1e9, "byte"]}, "times_ms": {"ours": {"step": [1.0]}}, "errors": []}
    events = {
        "adamw": [machine, good, {"event": "done", "left_out": []}],
        "rope": [
            machine,
            {"event": "result", "problem": 0, "errors": ["ours: q is off by 1"]},
            {"event": "done", "left_out": [], "errors": ["gave up"]},
        ],
    }
    monkeypatch.setattr(run.supervisor, "run_operator", answer_from(events))
    path = tmp_path / "results" / "kernels_gpu.jsonl"
    assert run.run(["adamw"], "tiny", "cpu", path, "command") == 0
    assert run.run(["adamw", "rope"], "tiny", "cpu", path, "command") == 1
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["op"] for record in records] == ["adamw", "adamw", "rope"]
    assert records[0]["gpu"] == "a GPU" and records[0]["versions"] == {"torch": "2"}
    assert records[0]["results"]["ours"]["step"]["share"] == pytest.approx(1.0)
    assert records[0]["absent"] == {"Liger": "missing"} and records[2]["errors"]
    errors = capsys.readouterr().err
    assert "rope, tiny, 256 tokens: ours: q is off by 1" in errors and "gave up" in errors


def test_a_wrong_operator_on_the_cpu_is_refused(monkeypatch, tmp_path, capsys):
    right = kernels_cpu.interval_attention
    monkeypatch.setattr(kernels_cpu, "interval_attention", lambda *x: 1.001 * right(*x))
    monkeypatch.setattr(kernels_cpu, "comparison_cases", lambda: [()] * 2)
    threads = torch.get_num_threads()
    assert kernels_cpu.run(OPS, True, tmp_path / "x.jsonl", "command") == 1
    torch.set_num_threads(threads)
    assert "interval_attention out" in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()

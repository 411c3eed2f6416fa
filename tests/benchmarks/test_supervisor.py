"""Workers that crash, hang or answer nothing: reported, and nothing measured is lost."""

import json
import sys
import textwrap

import pytest

from benchmarks.kernels import supervisor
from benchmarks.kernels.operators import Case
from benchmarks.kernels.supervisor import Run, Worker, run_all

CASES = [Case("rms_norm", "tiny", tokens) for tokens in (1, 2, 3)]
# Serves the cases; what it does instead at one of them is said by the last two arguments.
WORKER = """
import json, os, sys, time
peer, at, act = sys.argv[1:]
def emit(**answer):
    print(json.dumps(answer), flush=True)
assert sys.stdin.readline() == "\\n"
if act == "no start":
    raise SystemExit("error: no torch here")
ceilings = {"flop": 1e12, "byte": 1e12}
emit(machine={"device": "a GPU", "dtype": "bf16", "versions": {"torch": "2"}, "ceilings": ceilings})
for case in range(3):
    emit(running="")
    for name in ("ours", peer):
        emit(running=name)
        if (at, act) == (f"{case} {name}", "crash"):
            print("the last words", file=sys.stderr, flush=True)
            os.abort()
        if (at, act) == (f"{case} {name}", "hang"):
            time.sleep(600)
        if (at, act) == (f"{case} {name}", "half"):
            sys.stdout.write('{"case": ')
            os._exit(0)
    times = {"ours": {"step": [1.0, 2.0, 4.0]}, peer: {"step": [3.0, 2.0, 8.0]}}
    failed = {"ours": "y is off by 1"} if (at, act) == (f"{case} ours", "wrong") else {}
    if failed:
        times = {}
    emit(case={}, note="", work={"step": [1e9, "byte"]}, times_ms=times, failed=failed)
"""


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """A run of rms_norm beside Liger with such a worker: the run and its records."""

    def run_it(at="", act="", max_run_s=60.0, max_peer_s=60.0):
        monkeypatch.setattr(supervisor, "list_cases", lambda op, size: list(CASES))
        path = tmp_path / "new" / "results.jsonl"
        run = Run("tiny", "cpu", path, max_run_s, max_peer_s)
        command = (sys.executable, "-c", textwrap.dedent(WORKER))
        run.serve("rms_norm", "Liger", Worker(["Liger", at, act], command))
        return run, [json.loads(line) for line in path.read_text().splitlines()]

    return run_it


def test_results_are_recorded_with_the_machine_and_quotients_are_paired(serve):
    run, records = serve()
    assert [record["tokens"] for record in records] == [1, 2, 3] and not run.complaints
    assert records[0]["device"] == "a GPU" and records[0]["peer"] == "Liger"
    liger = records[0]["results"]["Liger"]["step"]
    assert (liger["ms"], liger["least_ms"], liger["rounds"]) == (3.0, 2.0, 3)
    assert liger["times_ours"] == 2.0  # of 3, 1, 2: round by round, not 3 / 2
    assert liger["per_second"] == pytest.approx(1e9 / 3e-3)
    assert liger["share"] == pytest.approx(1e9 / 3e-3 / 1e12)


@pytest.mark.parametrize(
    "act, reason",
    [
        ("crash", "signal SIGABRT; the last words"),
        ("hang", "not done after 5 s"),
        ("half", "ended without an answer"),
    ],
)
def test_a_peer_that_ends_its_process_keeps_what_was_measured(serve, act, reason, capsys):
    run, records = serve("1 Liger", act, max_peer_s=5.0 if act == "hang" else 60.0)
    assert records[0]["results"].keys() == {"ours", "Liger"}
    assert records[1]["results"] == {} and records[1]["failed"] == {"Liger": reason}
    assert records[2]["results"] == {}
    assert records[2]["failed"] == {"Liger": "not begun, as the one before"}
    assert f"not timed: Liger: {reason}" in capsys.readouterr().out and not run.complaints


@pytest.mark.parametrize(
    "at, act, reason",
    [("0 ours", "crash", "signal SIGABRT"), ("2 ours", "wrong", "y is off by 1")],
)
def test_what_ours_does_wrong_makes_the_run_fail(serve, at, act, reason):
    run, records = serve(at, act)
    record = records[int(at[0])]
    assert record["results"] == {} and record["failed"]["ours"].startswith(reason)
    assert len(run.complaints) == 1 and run.complaints[0].startswith("rms_norm, tiny, ")


def test_a_worker_that_does_not_start_makes_the_run_fail(serve):
    run, records = serve(act="no start")
    assert records[0]["failed"] == {"inputs": "exit code 1; error: no torch here"}
    assert len(records) == 3 and len(run.complaints) == 1


def test_the_end_of_the_runs_time_is_no_fault_of_ours(serve):
    run, records = serve("1 ours", "hang", max_run_s=3.0)
    assert "ours" in records[0]["results"] and records[1]["failed"].keys() == {"Liger"}
    assert not run.complaints
    run, records = serve(max_run_s=0.0)
    assert "time is up" in records[-1]["failed"]["Liger"] and records[-1]["results"] == {}


def test_every_operator_comes_before_the_second_peer_of_any():
    jobs = [(op, peer.name) for op, peer in supervisor.list_jobs(["adamw", "swiglu"], None)]
    assert jobs[:3] == [("adamw", "torch fused"), ("swiglu", "torch eager"), jobs[2]]
    assert jobs[2] == ("adamw", "torch foreach")


@pytest.mark.slow
def test_the_dry_run_on_a_cpu_from_end_to_end(tmp_path, capsys):
    """Real workers in processes of their own: lines, records, who is missing, exit code 0."""
    path = tmp_path / "kernels.jsonl"
    run = Run("tiny", "cpu", path, 250.0, 120.0)
    assert run_all(run, ["adamw", "rope"], ["torch fused", "torch foreach", "Liger", "Apex"]) == 0
    records = {(r["op"], r["peer"]): r for r in map(json.loads, path.read_text().splitlines())}
    foreach = records["adamw", "torch foreach"]
    assert foreach["results"].keys() == {"ours", "torch fused", "torch foreach"}
    assert foreach["results"]["ours"]["step"]["rounds"] >= 3 and "torch" in foreach["versions"]
    assert foreach["command"].startswith("python ")
    assert records["rope", "Liger"]["failed"] == {"Liger": "no module liger_kernel is installed"}
    out = capsys.readouterr().out
    assert "adamw beside torch foreach" in out and "adamw beside Apex: not timed" in out

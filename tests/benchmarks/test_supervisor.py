"""Workers that crash, hang or answer nothing: the run goes on without what was at work."""

import json
import sys
import textwrap

from kernels_gpu import contest, run, supervisor

REQUEST = {"op": "x", "excluded": {}, "skipped": [], "deadline": 0.0}

# Two problems with the peers ours, A and B. What a peer does is said by its name's entry in ACTS.
WORKER = """
import json, os, sys, time
request = json.load(sys.stdin)
def emit(**event):
    print(json.dumps(event), flush=True)
emit(event="machine", pid=os.getpid())
for problem in range(2):
    if problem in request["skipped"]:
        continue
    for peer in ("ours", "A", "B"):
        emit(event="trying", problem=problem, peer=peer)
        act = ACTS.get((problem, peer)) if peer not in request["excluded"] else None
        if act == "crash":
            print("the last words", file=sys.stderr, flush=True)
            os.abort()
        if act == "hang":
            time.sleep(600)
        if act == "lose":
            emit(event="lost", reason="CUDA error: illegal address")
            os._exit(1)
    emit(event="result", problem=problem, excluded=request["excluded"], errors=[])
emit(event="done", left_out=[])
"""


def serve(acts, max_silence_s=60.0):
    """The events that a run hands on, with this worker."""
    code = f"ACTS = {acts!r}\n" + textwrap.dedent(WORKER)
    events = []
    command = (sys.executable, "-c", code)
    supervisor.run_operator(REQUEST, events.append, command, max_silence_s)
    return events


def results_of(events):
    return [event for event in events if event["event"] == "result"]


def test_one_worker_serves_all_if_nothing_goes_wrong():
    events = serve({})
    assert [event["event"] for event in events] == ["machine", "result", "result", "done"]


def test_a_crash_costs_the_peer_its_place_and_nothing_else():
    events = serve({(1, "A"): "crash"})
    first, second = results_of(events)
    assert first["excluded"] == {} and first["problem"] == 0  # kept, not measured again
    assert second["problem"] == 1 and set(second["excluded"]) == {"A"}
    assert "SIGABRT; the last words" in second["excluded"]["A"]
    assert events[-1] == {"event": "done", "left_out": []}


def test_a_lost_gpu_and_a_hang_cost_the_peers_their_places():
    events = serve({(0, "A"): "lose", (0, "B"): "hang"}, max_silence_s=5.0)
    first, second = results_of(events)
    assert first["excluded"] == second["excluded"]
    assert first["excluded"]["A"] == "ended the process: CUDA error: illegal address"
    assert first["excluded"]["B"].startswith("ended the process: no answer for 5 s")


def test_a_crash_of_ours_is_an_error_of_that_problem():
    events = serve({(0, "ours"): "crash"})
    first, second = results_of(events)
    assert first["problem"] == 0 and "ours: signal SIGABRT" in first["errors"][0]
    assert second["problem"] == 1 and second["errors"] == []


def test_a_worker_that_does_not_start_ends_the_operator():
    events = []
    command = (sys.executable, "-c", "raise SystemExit('error: no torch here')")
    supervisor.run_operator(REQUEST, events.append, command)
    assert len(events) == 1 and events[0]["event"] == "done"
    assert "exit code 1; error: no torch here" in events[0]["errors"][0]


def test_the_benchmarks_own_worker_serves_a_request(tmp_path, capsys):
    """Through a process of its own, on the CPU: a table, a record, exit code 0."""
    path = tmp_path / "kernels_gpu.jsonl"
    assert run.run(["adamw"], "tiny", "cpu", path, "a command") == 0
    record = json.loads(path.read_text())
    assert record["command"] == "a command" and record["op"] == "adamw"
    assert {"ours", "torch fused", "torch foreach"} <= record["results"].keys()
    assert record["results"]["ours"]["step"]["rounds"] >= contest.MIN_ROUNDS
    assert "apex" in record["absent"]["Apex"] and "torch" in record["versions"]
    assert "torch foreach" in capsys.readouterr().out

"""The choice of an implementation, and where it launches."""

import ast
import logging
from pathlib import Path

import pytest
import torch

from lclm_kernels import backend
from lclm_kernels.backend import Candidate, choose, on_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FAST = Candidate("fast", ("cuda",), (torch.bfloat16,))
PLAIN = Candidate("plain", ("cpu", "cuda"), (torch.float32, torch.bfloat16))
DENSE = Candidate("dense", ("cpu",), (torch.float64,), is_automatic=False)
ALL = (FAST, PLAIN, DENSE)


def test_best_first():
    assert choose("op", "auto", CUDA, torch.bfloat16, ALL) == "fast"
    assert choose("op", "auto", CUDA, torch.float32, ALL) == "plain"
    assert choose("op", "auto", CPU, torch.bfloat16, ALL) == "plain"


def test_a_wish_is_met_or_refused():
    assert choose("op", "plain", CUDA, torch.bfloat16, ALL) == "plain"
    assert choose("op", "dense", CPU, torch.float64, ALL) == "dense"
    with pytest.raises(ValueError, match="op: implementation='fast' cannot run: it runs on cuda"):
        choose("op", "fast", CPU, torch.bfloat16, ALL)
    with pytest.raises(ValueError, match="takes bfloat16, the tensors are float32"):
        choose("op", "fast", CUDA, torch.float32, ALL)
    with pytest.raises(ValueError, match="use one of auto, fast, plain, dense"):
        choose("op", "quick", CPU, torch.float32, ALL)


def test_what_runs_only_by_name_is_never_automatic():
    with pytest.raises(ValueError, match="no implementation serves these tensors: fast runs on"):
        choose("op", "auto", CPU, torch.float64, ALL)


def test_the_choice_is_logged_once_with_its_reason(caplog, monkeypatch):
    monkeypatch.setattr(backend, "_logged", set())
    with caplog.at_level(logging.INFO, logger="lclm_kernels"):
        for _ in range(3):
            choose("op", "auto", CPU, torch.float32, ALL)
    assert [record.getMessage() for record in caplog.records] == [
        "op: plain implementation on cpu torch.float32 (fast runs on cuda, the tensors are on cpu)"
    ]


def test_shapes_and_missing_packages_refuse_too():
    refused = {"fast": "takes heads of 64, the tensors have 80"}
    assert choose("op", "auto", CUDA, torch.bfloat16, ALL, refused) == "plain"
    with pytest.raises(ValueError, match="'fast' cannot run: it takes heads of 64"):
        choose("op", "fast", CUDA, torch.bfloat16, ALL, refused)
    assert choose("op", "auto", CUDA, torch.bfloat16, ALL, {"fast": ""}) == "fast"
    absent = Candidate("absent", ("cuda",), (torch.bfloat16,), missing="the package x")
    with pytest.raises(ValueError, match="'absent' cannot run: it needs the package x"):
        choose("op", "absent", CUDA, torch.bfloat16, (absent,))


def test_triton_serves_the_cpu_only_when_interpreted():
    candidates = (backend.triton_candidate(torch.bfloat16), PLAIN)
    assert choose("op", "auto", CUDA, torch.bfloat16, candidates) == "triton"
    expected = "triton" if backend.IS_INTERPRETED else "plain"
    assert choose("op", "auto", CPU, torch.bfloat16, candidates) == expected


def test_a_launch_goes_to_the_device_of_its_tensors():
    assert on_device(torch.device("cuda", 3)).idx == 3
    with on_device(CPU):
        pass


def launches(node):
    """Lines of kernel[grid](...) under node."""
    calls = (item for item in ast.walk(node) if isinstance(item, ast.Call))
    subscripts = (call.func for call in calls if isinstance(call.func, ast.Subscript))
    return {item.lineno for item in subscripts if ast.unparse(item.value).endswith("_kernel")}


def test_every_launch_says_on_which_device():
    files = sorted(Path(backend.__file__).parent.glob("*/triton_impl.py"))
    assert len(files) == 6
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        guarded = set()
        for item in ast.walk(tree):
            if isinstance(item, ast.With) and "on_device(" in ast.unparse(item.items[0]):
                guarded |= launches(item)
        assert launches(tree) == guarded, path

"""The stream of the exchange: nothing on a CPU, ordered after the layers' stream on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from lclm.context.exchange import SideStream


def test_on_a_cpu_work_is_done_at_once() -> None:
    with SideStream(torch.device("cpu")).after():
        done = torch.ones(2)
    assert done.tolist() == [1.0, 1.0]


def test_on_cuda_work_waits_for_what_is_queued_and_runs_beside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    device = torch.device("cuda", 3)

    class FakeStream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def wait_stream(self, other: str) -> None:
            events.append(f"side waits for {other}")

    @contextmanager
    def use(stream: FakeStream) -> Iterator[None]:
        events.append("in side")
        yield
        events.append("out of side")

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda at: f"layers on {at}")
    side = SideStream(device)
    for _ in range(2):
        with side.after():
            events.append("send")
    assert events == ["side waits for layers on cuda:3", "in side", "send", "out of side"] * 2

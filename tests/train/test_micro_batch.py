"""Where a micro-batch lies: prepared on the host, pinned for a GPU, moved when it is used."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lclm.context.parallel import ContextParallel
from lclm.context.plan.cost import GATHER
from lclm.data.stage_rows import Row
from lclm.train.micro_batch import MicroBatch, MicroBatchBuilder
from tests.train.tiny import tiny_config


def prepare(device: str) -> MicroBatch:
    """A row with weights, on one rank of a device that need not be there."""
    where = torch.device(device)
    group = SimpleNamespace(size=lambda: 1)
    context = ContextParallel("auto", GATHER, None, (1, 1), group, torch.device("cpu"))
    mesh = SimpleNamespace(cp_size=1, cp_rank=0, device=where)
    build = MicroBatchBuilder(tiny_config("unused"), mesh, context, 1e4)
    weights = np.array([1, 0.5, 1, 1, 0, 1, 1, 0.25], np.float32)
    return build.prepare(Row(np.arange(8), np.array([5, 3]), "a", weights))


def tensors(batch: MicroBatch) -> list[torch.Tensor]:
    assert batch.label_weights_T is not None
    return [batch.tokens_BT, batch.labels_T, batch.label_weights_T, batch.row.cos_TH,
            batch.row.sin_TH]  # fmt: skip


def test_on_the_cpu_nothing_is_copied() -> None:
    batch = prepare("cpu")
    moved = batch.to(torch.device("cpu"))
    pairs = zip(tensors(batch), tensors(moved), strict=True)
    assert all(a is b and not a.is_pinned() for a, b in pairs)
    assert moved.num_labels == batch.num_labels == 5
    assert moved.row.attend is batch.row.attend


def test_for_a_gpu_every_tensor_is_pinned_and_moved_without_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned: list[torch.Tensor] = []
    calls: list[dict[str, object]] = []
    real = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    batch = prepare("cuda")
    assert {id(tensor) for tensor in tensors(batch)} == {id(tensor) for tensor in pinned}
    assert all(tensor.device.type == "cpu" for tensor in pinned)

    def to(self: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        calls.append(options)
        return real(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    moved = batch.to(torch.device("meta"))
    assert calls == [{"non_blocking": True}] * 5
    assert all(tensor.device.type == "meta" for tensor in tensors(moved))


@pytest.mark.gpu
def test_a_gpu_gets_the_same_numbers() -> None:
    batch = prepare("cuda")
    assert all(tensor.is_pinned() for tensor in tensors(batch))
    moved = batch.to(torch.device("cuda"))
    for there, here in zip(tensors(moved), tensors(prepare("cpu")), strict=True):
        assert there.device.type == "cuda" and torch.equal(there.cpu(), here)

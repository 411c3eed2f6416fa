"""One optimizer step, and one validation pass, through Megatron-core's pipeline schedule."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func

from lclm.config import Config
from lclm.mesh import Mesh
from lclm.model.llama import LlamaModel
from lclm.optim import build_optimizer
from lclm.train.micro_batch import MicroBatch


class NonFiniteError(Exception):
    """A loss or a gradient norm is NaN or infinite; raised on every rank, before the update."""

    def __init__(self, what: str, micro_batches: Sequence[int] = ()) -> None:
        super().__init__(what)
        self.micro_batches = list(micro_batches)
        """Numbers of this rank's micro-batches whose loss is not finite."""


@dataclass(frozen=True)
class StepResult:
    """What a step measured, equal on every rank."""

    loss: float | None
    """Nats per valid token over the global batch; None where it has none."""
    num_labels: int
    """Valid tokens of the global batch."""
    grad_norm: float
    """Global gradient norm before clipping."""
    domain_losses: dict[str, tuple[float, int]]
    """Loss sum in nats and valid tokens of each domain in the batch."""


class Engine:
    """A model on its mesh with its optimizer; runs steps and validation passes."""

    def __init__(self, config: Config, mesh: Mesh, model: LlamaModel, domains: Sequence[str]):
        self.config = config
        self.mesh = mesh
        self.module = model
        self.domains = list(domains)
        self.model = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=True,
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=True,
            ),
            model,
        )
        self.optimizer = build_optimizer(config, mesh, self.model)
        # Megatron-core has no place to look at the norm between the backward pass and the update.
        self._get_grad_norm = self.optimizer.get_grad_norm
        self.optimizer.get_grad_norm = self._finite_grad_norm
        model.config.no_sync_func = self.model.no_sync
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = self.optimizer.scale_loss
        self._run_schedule = get_forward_backward_func()

    def train_step(
        self, micro_batches: Iterator[MicroBatch], num_micro_batches: int, seq_length: int
    ) -> StepResult:
        """Forward, backward, gradient exchange and update of one global batch.

        Args:
            micro_batches: this rank's micro-batches, read lazily.
            num_micro_batches: how many there are.
            seq_length: tokens of a whole row.

        Raises:
            NonFiniteError: on every rank; the weights are as they were before.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._run(micro_batches, num_micro_batches, seq_length, forward_only=False)
        _, grad_norm, _ = self.optimizer.step()
        losses = {name: (float(s), int(n)) for name, (s, n) in zip(self.domains, sums) if n > 0}
        total, count = (float(x) for x in sums.sum(0))
        return StepResult(
            loss=total / count if count else None,
            num_labels=int(count),
            grad_norm=float(grad_norm),
            domain_losses=losses,
        )

    def evaluate(
        self, micro_batches: Iterator[MicroBatch], num_micro_batches: int, seq_length: int
    ) -> dict[str, tuple[float, int]]:
        """Loss sum in nats and valid tokens per domain, without gradients.

        Raises:
            NonFiniteError: on every rank.
        """
        self.model.eval()
        with torch.no_grad():
            sums = self._run(micro_batches, num_micro_batches, seq_length, forward_only=True)
        self.model.train()
        return {name: (float(s), int(n)) for name, (s, n) in zip(self.domains, sums) if n > 0}

    def _run(
        self,
        micro_batches: Iterator[MicroBatch],
        num_micro_batches: int,
        seq_length: int,
        forward_only: bool,
    ) -> torch.Tensor:
        """Run the schedule; fp64 `[domains, 2]` of loss sums and label counts over all ranks."""
        reports = self._run_schedule(
            forward_step_func=self._forward_step,
            data_iterator=micro_batches,
            model=[self.model],
            num_microbatches=num_micro_batches,
            seq_length=seq_length,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        sums = torch.zeros(len(self.domains), 2, dtype=torch.float64, device=self.mesh.device)
        for report in reports:
            sums[report["domain"], 0] += report["loss_sum"]
            sums[report["domain"], 1] += report["num_labels"]
        # Only the last pipeline stage has reports; tp ranks hold equal ones.
        dist.all_reduce(sums, group=self.mesh.dp_cp_group)
        if self.mesh.pp_size > 1:
            dist.all_reduce(sums, group=self.mesh.pp_group)
        if not bool(sums.isfinite().all()):
            losses = [float(report["loss_sum"]) for report in reports]
            bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
            raise NonFiniteError("the loss", bad)
        return sums

    def _finite_grad_norm(self) -> float:
        norm: float = self._get_grad_norm()
        if not math.isfinite(norm):
            raise NonFiniteError(f"the gradient norm ({norm})")
        return norm

    def _forward_step(
        self, micro_batches: Iterator[MicroBatch], model: Any
    ) -> tuple[torch.Tensor, Any]:
        """Megatron-core's callback: output of this stage and what turns it into a loss."""
        batch = next(micro_batches).to(self.mesh.device)
        output = model(
            batch.tokens_BT, batch.labels_T, batch.row, label_weights_T=batch.label_weights_T
        )
        return output, partial(self._report_loss, batch)

    def _report_loss(
        self, batch: MicroBatch, loss_sum: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """The per-token form: loss sum, its token count, and what to log."""
        num_labels = torch.tensor(batch.num_labels, dtype=torch.int, device=loss_sum.device)
        report = {
            "loss_sum": loss_sum.detach().double(),
            "num_labels": batch.num_labels,
            "domain": self.domains.index(batch.domain),
        }
        return loss_sum, num_labels, report

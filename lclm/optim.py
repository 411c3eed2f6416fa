"""The optimizer: lclm's AdamW inside Megatron-core's distributed optimizer."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from lclm.config import Config, StageConfig
from lclm.mesh import Mesh
from lclm_kernels.adamw import AdamW


class MegatronAdamW(AdamW):
    """AdamW with the constructor that Megatron-core calls."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        # `capturable` (CUDA graphs) is passed from 0.19 on; lclm asks Megatron-core for neither.
        if not adam_w_mode or capturable:
            raise ValueError(
                f"AdamW: adam_w_mode={adam_w_mode}, capturable={capturable}; this optimizer has "
                "decoupled weight decay and no CUDA graphs"
            )
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def _use_our_adamw() -> None:
    """Put `MegatronAdamW` where Megatron-core would pick Transformer Engine's or torch's Adam.

    Megatron-core chooses the class when its modules are imported and offers no argument. The flags
    say how the step counter is kept: ours is one number per parameter group, as in Transformer
    Engine's FusedAdam, which is what lets the distributed optimizer reshard it (torch keeps one
    tensor per parameter, and loading that fails with KeyError: 'step').
    """
    import megatron.core.optimizer as megatron_optimizer
    from megatron.core.optimizer import distrib_optimizer

    megatron_optimizer.Adam = MegatronAdamW
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = MegatronAdamW
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = True


def build_optimizer(config: Config, mesh: Mesh, model: Any) -> Any:
    """Megatron-core's distributed optimizer over a model wrapped in its DistributedDataParallel.

    Master weights and moments are fp32 and sharded over the data and context ranks.
    """
    _use_our_adamw()
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    settings = config.optimizer
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.stage[0].lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=mesh.dtype == torch.bfloat16,
            params_dtype=mesh.dtype,
            use_distributed_optimizer=True,
        ),
        [model],
        use_gloo_process_groups=False,
    )
    # Moments exist from the start, so that a checkpoint can be written or read before a step.
    reset_state(optimizer)
    return optimizer


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers behind Megatron-core's chain that have parameters on this rank."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if part.optimizer is not None]


def set_learning_rate(optimizer: Any, lr: float, weight_decay: float, decay_norms: bool) -> None:
    """Set the rate of every group; norms decay only if `decay_norms`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        decays = group.get("wd_mult", 1.0) > 0 or decay_norms
        group["weight_decay"] = weight_decay if decays else 0.0


def reset_state(optimizer: Any) -> None:
    """Forget moments and step counter, as a stage with `optimizer_state = "fresh"` wants."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            group["step"] = 0
            for param in group["params"]:
                part.optimizer.initialize_state(param)


def learning_rate(stage: StageConfig, step: int) -> float:
    """Learning rate of a stage's step.

    The rate rises linearly over the warm-up steps, reaching `lr` at the last of them, then follows
    the schedule down to `min_lr` at the stage's last step (ProLong, arXiv 2410.02660, table 9).

    Args:
        stage: the stage.
        step: 0 .. num_steps - 1 within the stage.
    """
    warmup = round(stage.warmup_fraction * stage.num_steps)
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    if stage.schedule == "constant":
        return stage.lr
    progress = (step - warmup + 1) / max(1, stage.num_steps - warmup)
    shape = 1.0 - progress
    if stage.schedule == "cosine":
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    return stage.min_lr + (stage.lr - stage.min_lr) * shape

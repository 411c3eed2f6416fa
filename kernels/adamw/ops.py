"""AdamW for fp32 (master) parameters."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .reference import adamw_step_reference

__all__ = ["AdamW"]


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay and bias correction.

    The numbers are torch.optim.AdamW's. The step counter is an int in each parameter group
    (`param_group["step"]`), not a tensor per parameter, so a sharded optimizer that cuts and
    re-joins parameters needs to move only `exp_avg` and `exp_avg_sq`.

    Args:
        params: parameters or groups, fp32 when `step` runs.
        lr: learning rate, >= 0.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator, > 0.
        weight_decay: >= 0; a group may override it.

    Raises:
        ValueError: a number outside its range, in the defaults or in a group.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "step": 0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see torch.optim.Optimizer. Checks the group's numbers."""
        _check_numbers({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def initialize_state(self, param: torch.Tensor) -> None:
        """Give a parameter zero moments (fp32, its shape); existing moments are replaced."""
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[param][name] = torch.zeros_like(
                param, dtype=torch.float32, memory_format=torch.preserve_format
            )

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch spells the closure's result out in overloads
        self, closure: Callable[[], torch.Tensor] | None = None
    ) -> torch.Tensor | None:
        """Take one step; parameters without a gradient are left alone.

        Raises:
            ValueError: a parameter or gradient is not dense fp32.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            group["step"] += 1
            params, grads = [], []
            for param in group["params"]:
                if param.grad is not None:
                    _check_param(index, param, param.grad)
                    params.append(param)
                    grads.append(param.grad)
            if not params:
                continue
            for param in params:
                if "exp_avg" not in self.state[param]:
                    self.initialize_state(param)
            adamw_step_reference(
                params,
                grads,
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                step=group["step"],
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
        return loss


def _check_numbers(group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    rules = (
        ("lr", group["lr"], group["lr"] >= 0.0, "at least 0"),
        ("betas", group["betas"], 0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0, "each in [0, 1)"),
        ("eps", group["eps"], group["eps"] > 0.0, "greater than 0"),
        ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0.0, "at least 0"),
    )
    for name, value, is_right, rule in rules:
        if not is_right:
            raise ValueError(f"adamw: {name} must be {rule}, got {value}")


def _check_param(group_index: int, param: torch.Tensor, grad: torch.Tensor) -> None:
    if param.dtype != torch.float32 or grad.dtype != torch.float32 or grad.is_sparse:
        raise ValueError(
            f"adamw: group {group_index} holds a {param.dtype} parameter {list(param.shape)} "
            f"with a {grad.dtype} {grad.layout} gradient; both must be dense fp32: "
            "step fp32 master copies"
        )

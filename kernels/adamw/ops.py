"""AdamW for fp32 (master) parameters."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..backend import AUTO, Candidate, choose, triton_candidate
from .reference import GroupTensors, Hyperparameters, adamw_step_reference

if TYPE_CHECKING:
    from .triton_impl import AdamWTables

_CANDIDATES = (
    triton_candidate(torch.float32),
    Candidate("reference", ("cpu", "cuda"), (torch.float32,)),
)
_STATE_DTYPES = (torch.float32, torch.bfloat16)


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
        state_dtype: of both moments, fp32 or bf16; the arithmetic is in fp32.
        implementation: "auto", "triton" (one launch per group) or "reference".

    Raises:
        ValueError: a number outside its range, in the defaults or in a group, or another
            state_dtype.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        state_dtype: torch.dtype = torch.float32,
        implementation: str = AUTO,
    ) -> None:
        if state_dtype not in _STATE_DTYPES:
            raise ValueError(
                f"adamw: state_dtype must be torch.float32 or torch.bfloat16, got {state_dtype}"
            )
        self.state_dtype = state_dtype
        self.implementation = implementation
        self._tables: dict[int, AdamWTables] = {}  # by number of the group
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
        """Give a parameter zero moments of its shape; existing moments are replaced."""
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[param][name] = torch.zeros_like(
                param, dtype=self.state_dtype, memory_format=torch.preserve_format
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load; see torch.optim.Optimizer, which makes moments as wide as their parameters."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in {"exp_avg", "exp_avg_sq"}.intersection(state):
                state[name] = state[name].to(self.state_dtype)

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
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                _check_param(index, param, param.grad)
            for param in params:
                if "exp_avg" not in self.state[param]:
                    self.initialize_state(param)
            states = [self.state[param] for param in params]
            tensors = GroupTensors(
                params,
                [param.grad for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
            )
            if params:
                self._step_group(index, group, tensors)
        return loss

    def _step_group(self, index: int, group: dict[str, Any], tensors: GroupTensors) -> None:
        hyperparameters = Hyperparameters(*(group[name] for name in Hyperparameters._fields))
        refused = {"triton": _triton_refusal(tensors)}
        wish, first = self.implementation, tensors.params[0]
        chosen = choose("adamw", wish, first.device, first.dtype, _CANDIDATES, refused)
        if chosen == "reference":
            adamw_step_reference(tensors, hyperparameters)
            return
        from .triton_impl import AdamWTables

        self._tables.setdefault(index, AdamWTables()).step(tensors, hyperparameters)


def _triton_refusal(tensors: GroupTensors) -> str:
    """Why one launch cannot serve these parameters, gradients and moments; empty if it can."""
    state_dtypes = {state.dtype for states in tensors[2:] for state in states}
    if len(state_dtypes) > 1 or not state_dtypes.issubset(_STATE_DTYPES):
        return f"takes moments of one dtype, fp32 or bf16, these are {state_dtypes}"
    if len({tensor.device for kind in tensors for tensor in kind}) > 1:
        return "takes tensors of one device"
    for param, *others in zip(*tensors):
        is_dense = param.is_contiguous() or (param.dim() == 2 and param.t().is_contiguous())
        if not is_dense or any(other.stride() != param.stride() for other in others):
            strides = [tensor.stride() for tensor in (param, *others)]
            return (
                "takes dense parameters with the same strides as their gradients and moments, "
                f"one of {list(param.shape)} has strides {strides}"
            )
    return ""


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

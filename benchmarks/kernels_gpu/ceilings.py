"""What this device reaches: a large matrix product and a large copy, measured here and now."""

import torch

from .contest import Measure

__all__ = ["measure_ceilings"]

_BEST_OF = 20


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, measure: Measure, is_tiny: bool
) -> dict[str, float]:
    """Most operations and bytes per second seen, by unit of `Work`.

    A square product of random matrices (8192) and a copy of 1 Gi numbers; the best of several runs.
    """
    size, copied = (256, 1 << 18) if is_tiny else (8192, 1 << 30)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.randn(copied, device=device, dtype=dtype)
    target = torch.empty_like(source)

    def multiply() -> list[torch.Tensor]:
        return [torch.mm(left, right, out=product)]

    def copy() -> list[torch.Tensor]:
        return [target.copy_(source)]

    amounts = {"flop": (2.0 * size**3, multiply), "byte": (2.0 * copied * dtype.itemsize, copy)}
    ceilings = {}
    for unit, (amount, call) in amounts.items():
        measure(call)
        least_ms = min(measure(call)[0] for _ in range(_BEST_OF))
        ceilings[unit] = amount / (1e-3 * max(least_ms, 1e-6))
    return ceilings

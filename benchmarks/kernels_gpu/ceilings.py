"""What this device reaches: a large matrix product and a large copy, measured here and now."""

import torch

from .contest import MAX_ROUNDS, Measure, Work

__all__ = ["measure_ceilings", "rate"]

_BEST_OF = MAX_ROUNDS


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, measure: Measure, is_tiny: bool
) -> dict[str, float]:
    """Most operations and bytes per second seen, by unit of `Work`.

    A square product of random matrices (8192) and a copy of 4 GiB; the best of several runs.
    """
    size, copied = (256, 1 << 20) if is_tiny else (8192, 1 << 32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.randint(0, 256, (copied,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def multiply() -> list[torch.Tensor]:
        return [torch.mm(left, right, out=product)]

    def copy() -> list[torch.Tensor]:
        return [target.copy_(source)]

    amounts = {"flop": (2.0 * size**3, multiply), "byte": (2.0 * copied, copy)}
    ceilings = {}
    for unit, (amount, call) in amounts.items():
        measure(call)
        least_ms = min(measure(call)[0] for _ in range(_BEST_OF))
        ceilings[unit] = amount / (1e-3 * max(least_ms, 1e-6))
    return ceilings


def rate(work: Work, milliseconds: float) -> float:
    """Operations or bytes per second."""
    return work.amount / (1e-3 * milliseconds)

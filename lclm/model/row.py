"""What a layer must know about the row it works on; one object travels with each micro-batch.

Megatron-core hands `packed_seq_params` to every layer, also when a layer is recomputed and under
every pipeline schedule. `RowContext` travels with it, so there is no "current batch" anywhere.
"""

from dataclasses import dataclass
from typing import Protocol

import torch


class Attend(Protocol):
    """Attention of the local queries over the keys of the whole row."""

    def __call__(
        self,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        scale: float,
        recomputed_layer: int | None = None,
    ) -> torch.Tensor:
        """Return the output `[T, N, H]` for local q `[T, N, H]`, k and v `[T, K, H]`.

        `recomputed_layer` is the number of a layer that is computed twice, first without gradients
        and again in the backward pass: the second time the first result may be used.
        """


@dataclass(frozen=True)
class RowContext:
    """Rotary tables and attention of one row, for the T tokens that this rank holds."""

    cos_TH: torch.Tensor
    """fp32 `[T, H/2]`; positions restart at each document where the document mask is on."""
    sin_TH: torch.Tensor
    """fp32 `[T, H/2]`."""
    attend: Attend
    """Knows which keys each token sees and how keys reach this rank."""
    qkv_format: str = "sbhd"
    """Read by Megatron-core: tensors are `[T, 1, D]`, not its own packed form."""

"""SwiGLU feed-forward for Megatron-core's mlp slot."""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from lclm_kernels.swiglu import swiglu


class SwiGLU(MegatronModule):
    """`down(silu(gate(x)) * up(x))` (Shazeer, arXiv 2002.05202).

    `linear_fc1` holds this tp rank's gate rows, then its up rows. In a checkpoint the whole weight
    is all gate rows, then all up rows, whatever the tp size was.
    """

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(config=config)
        self.linear_fc1 = ColumnParallelLinear(
            config.hidden_size,
            2 * config.ffn_hidden_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
        )
        self.linear_fc2 = RowParallelLinear(
            config.ffn_hidden_size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
        )

    def forward(self, hidden_TBD: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """`[T, 1, D]` to the same shape, and no bias."""
        gate_up, _ = self.linear_fc1(hidden_TBD)
        output, _ = self.linear_fc2(swiglu(gate_up))
        return output, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Describe the weights for a checkpoint, gate and up rows as two shards of one tensor."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        key = f"{prefix}linear_fc1.weight"
        state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
        return state

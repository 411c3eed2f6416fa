"""Self-attention for Megatron-core's layer: packed projection, rotary positions, row attention.

Letters: T local tokens, D model, N query heads, K kv heads, G = N / K, H head size; all heads are
those of this tp rank.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from lclm.model.row import RowContext
from lclm_kernels.rope import apply_rope_to_qkv


class RowAttention(MegatronModule):
    """Grouped-query attention over the documents of a row.

    The projection's output is laid out per kv head: G query heads, one key head, one value head,
    so that splitting it over tp ranks splits whole groups (the layout of Megatron-core).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        tp_size = pg_collection.tp.size()
        self.head_size: int = config.kv_channels
        self.num_kv_heads = config.num_query_groups // tp_size
        self.group_size = config.num_attention_heads // config.num_query_groups
        self.scale = self.head_size**-0.5
        heads = config.num_attention_heads + 2 * config.num_query_groups
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size,
            heads * self.head_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=pg_collection.tp,
        )
        self.linear_proj = RowParallelLinear(
            config.num_attention_heads * self.head_size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=pg_collection.tp,
        )

    def forward(
        self, hidden_TBD: torch.Tensor, packed_seq_params: RowContext, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend within the row.

        Args:
            hidden_TBD: `[T, 1, D]`, or `[T / tp, 1, D]` under sequence parallelism.
            packed_seq_params: the row's context.

        Returns:
            Output of the shape of the input, and no bias.
        """
        row = packed_seq_params
        packed, _ = self.linear_qkv(hidden_TBD)
        num_tokens = packed.shape[0]
        heads_shape = (self.num_kv_heads, self.group_size + 2, self.head_size)
        # in place before the heads are split: queries and keys in one pass over memory
        packed = apply_rope_to_qkv(packed, row.cos_TH, row.sin_TH, heads_shape)
        q, k, v = packed.view(num_tokens, *heads_shape).split([self.group_size, 1, 1], dim=2)
        q_TNH = q.reshape(num_tokens, -1, self.head_size)
        is_recomputed = self.training and self.config.recompute_granularity == "full"
        layer = self.layer_number if is_recomputed else None
        out_TNH = row.attend(q_TNH, k.squeeze(2), v.squeeze(2), self.scale, layer)
        output, bias = self.linear_proj(out_TNH.reshape(num_tokens, 1, -1))
        return output, bias

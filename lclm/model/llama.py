"""The language model: embedding, Megatron-core's transformer block, output layer, loss."""

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from lclm.model.row import RowContext
from lclm_kernels.linear_cross_entropy import linear_cross_entropy


class LlamaModel(LanguageModule):
    """Decoder-only model of one pipeline stage.

    Stands where Megatron-core's `GPTModel` would (deprecated from 0.19) with the same names inside,
    but its forward is three lines and its loss never holds the logits of a whole row.
    """

    def __init__(
        self,
        config: TransformerConfig,
        block_spec: ModuleSpec,
        vocab_size: int,
        tie_embeddings: bool,
        loss_chunk_tokens: int,
        is_first_stage: bool,
        is_last_stage: bool,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config, pg_collection=groups)
        # Names that Megatron-core's schedules and gradient finalisation look up.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = is_first_stage
        self.post_process = is_last_stage
        self.share_embeddings_and_output_weights = tie_embeddings
        self.loss_chunk_tokens = loss_chunk_tokens
        if is_first_stage:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=vocab_size,
                max_sequence_length=0,
                position_embedding_type="none",
                tp_group=groups.tp,
            )
        self.decoder = TransformerBlock(
            config=config,
            spec=block_spec,
            pre_process=is_first_stage,
            post_process=is_last_stage,
            pg_collection=groups,
        )
        if is_last_stage:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_weight_param_allocation=is_first_stage and tie_embeddings,
                tp_group=groups.tp,
            )
        self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Take the activations of the previous pipeline stage; called by the schedule."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.decoder.set_input_tensor(tensor)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        labels_T: torch.Tensor,
        row: RowContext,
        return_logits: bool = False,
        label_weights_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run this stage on the local tokens of one row.

        Args:
            tokens_BT: int64 `[1, T]`.
            labels_T: int64 `[T]`, -100 where there is none.
            row: the row's context.
            return_logits: give the logits `[T, V / tp]` instead of the loss (last stage).
            label_weights_T: fp32 `[T]`, factor of each label's loss; None: all 1.

        Returns:
            The sum of the local tokens' losses in nats (fp32 scalar) on the last stage, the
            activations `[T, 1, D]` on the others.
        """
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=tokens_BT, position_ids=None)
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=row)
        if not self.post_process:
            return hidden
        # Each tp rank's vocabulary shard adds its part to the gradient of the hidden states; both
        # regions sum the parts in the backward pass.
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(
                hidden, group=self.pg_collection.tp
            )
        is_tied = self.share_embeddings_and_output_weights
        # this tp rank's rows, `[V / tp, D]`
        weight = self.shared_embedding_or_output_weight() if is_tied else self.output_layer.weight
        if return_logits:
            return hidden.squeeze(1) @ weight.t()
        loss_sum, _ = linear_cross_entropy(
            hidden.squeeze(1),
            weight,
            labels_T,
            vocab_start=self.pg_collection.tp.rank() * weight.shape[0],
            group=self.pg_collection.tp if self.pg_collection.tp.size() > 1 else None,
            chunk_tokens=self.loss_chunk_tokens,
            label_weights=label_weights_T,
        )
        return loss_sum

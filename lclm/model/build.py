"""From configuration to model: Megatron-core's config, the spec of slots, the initial weights."""

import hashlib
import math
import re

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from lclm.config import Config
from lclm.mesh import Mesh
from lclm.model.attention import RowAttention
from lclm.model.llama import LlamaModel
from lclm.model.mlp import SwiGLU
from lclm.model.norm import RMSNorm
from lclm_kernels.interval_attention import check_head_size


def to_transformer_config(config: Config, mesh: Mesh) -> TransformerConfig:
    """Megatron-core's view of the run: the one place where its fields are named."""
    model = config.model
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_size,
        layernorm_epsilon=model.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=mesh.tp_size,
        pipeline_model_parallel_size=mesh.pp_size,
        context_parallel_size=mesh.cp_size,
        sequence_parallel=mesh.tp_size > 1,
        params_dtype=mesh.dtype,
        pipeline_dtype=mesh.dtype,
        bf16=mesh.dtype == torch.bfloat16,
        # The loss is a sum; Megatron-core divides the gradients by the valid tokens of the whole
        # global batch. Its other form averages per micro-batch, which is wrong for masked rows.
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
        recompute_granularity="full" if config.train.recompute == "full" else None,
        recompute_method="uniform" if config.train.recompute == "full" else None,
        recompute_num_layers=1 if config.train.recompute == "full" else None,
        # Weights are allocated on the default device and filled by `init_weights`, so that every
        # layout starts from the same numbers.
        use_cpu_initialization=True,
        perform_initialization=False,
        # One checkpoint key per layer: any pipeline split can read it, and so can the converter.
        hetereogenous_dist_checkpoint=True,
        # These fusions need apex, Transformer Engine or CUDA; lclm's own ops replace them.
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def build_layer_spec() -> ModuleSpec:
    """Which class sits in which slot of Megatron-core's layer."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=RowAttention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=SwiGLU,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def build_model(config: Config, mesh: Mesh, device: torch.device | None = None) -> LlamaModel:
    """Build this pipeline stage with unset weights.

    Args:
        device: where to allocate, by default the mesh's; `meta` allocates nothing.

    Raises:
        ValueError: heads larger than the device's attention kernels take.
    """
    check_head_size(config.model.head_size, mesh.device)
    layers = config.model.num_layers // mesh.pp_size
    with torch.device(device or mesh.device):
        model = LlamaModel(
            config=to_transformer_config(config, mesh),
            block_spec=TransformerBlockSubmodules(
                layer_specs=[build_layer_spec()] * layers, layer_norm=RMSNorm
            ),
            vocab_size=config.model.vocab_size,
            tie_embeddings=config.model.tie_embeddings,
            loss_chunk_tokens=config.train.loss_chunk_tokens,
            is_first_stage=mesh.is_first_stage,
            is_last_stage=mesh.is_last_stage,
            groups=ProcessGroupCollection.use_mpu_process_groups(),
        )
    mark_shards(model)
    return model


def mark_shards(model: LlamaModel) -> None:
    """Mark which dim of each weight is split over tp ranks.

    Megatron-core 0.16 marks weights only where it fills them, 0.19 always. It reads the marks to
    count every weight once in the gradient norm.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            dim = 0
        elif isinstance(module, RowParallelLinear):
            dim = 1
        else:
            continue
        if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


@torch.no_grad()
def init_weights(model: LlamaModel, config: Config, mesh: Mesh) -> None:
    """Fill the weights: norms 1, matrices normal, those that write to the residual stream smaller.

    The standard deviation of `linear_proj` and `linear_fc2` is divided by sqrt(2 * layers), as in
    GPT-2 and Megatron-LM. Each tensor has a generator of its own, seeded by its global name, and
    every rank cuts its shard from the whole tensor: all layouts start from equal weights.
    """
    first_layer = mesh.pp_rank * (config.model.num_layers // mesh.pp_size)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
            continue
        # with the layer's number in the whole model
        name = re.sub(r"layers\.(\d+)", lambda m: f"layers.{int(m[1]) + first_layer}", name)
        if config.model.tie_embeddings and name.startswith("output_layer"):
            name = "embedding.word_embeddings.weight"
        std = config.model.init_std
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= math.sqrt(2 * config.model.num_layers)
        digest = hashlib.blake2b(f"{config.seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        dim = getattr(weight, "partition_dim", -1)
        shape = list(weight.shape)
        if dim >= 0:
            shape[dim] *= mesh.tp_size
        whole = torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)
        weight.copy_(cut_shard(whole, name, max(dim, 0), mesh.tp_size, mesh.tp_rank))


def cut_shard(whole: torch.Tensor, name: str, dim: int, tp_size: int, tp_rank: int) -> torch.Tensor:
    """A tp rank's part of a whole weight; gate and up rows of `linear_fc1` are cut apart."""
    if name.endswith("linear_fc1.weight"):
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(tp_size)[tp_rank], up.chunk(tp_size)[tp_rank]])
    return whole.chunk(tp_size, dim)[tp_rank]

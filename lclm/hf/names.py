"""Which tensor is which: the weights of a step folder and those of a Hugging Face folder.

One table per family, read in both directions, and two transforms. Letters: D model, F ffn,
N query heads, K kv heads, G = N / K, H head size, V vocabulary.

    qkv      ours [(N+2K)H, D]: for each kv group its G query heads, its key head, its value head
             theirs q [NH, D], k [KH, D], v [KH, D]
    gate_up  ours [2F, D]: gate rows, then up rows; theirs gate [F, D], up [F, D]

Both sides pair the rotary halves (i, i + H/2), so no row of q or k moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lclm.config import ModelConfig

LAYER = "{layer}"


@dataclass(frozen=True)
class NameRule:
    """One weight of ours and the Hugging Face weights that it is made of; `{layer}` in both."""

    ours: str
    theirs: tuple[str, ...]


# Order: that of a forward pass, which is also the order in files.
LLAMA_RULES = (
    NameRule("model.embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    NameRule(
        "model.decoder.layers.{layer}.input_layernorm.weight",
        ("model.layers.{layer}.input_layernorm.weight",),
    ),
    NameRule(
        "model.decoder.layers.{layer}.self_attention.linear_qkv.weight",
        (
            "model.layers.{layer}.self_attn.q_proj.weight",
            "model.layers.{layer}.self_attn.k_proj.weight",
            "model.layers.{layer}.self_attn.v_proj.weight",
        ),
    ),
    NameRule(
        "model.decoder.layers.{layer}.self_attention.linear_proj.weight",
        ("model.layers.{layer}.self_attn.o_proj.weight",),
    ),
    NameRule(
        "model.decoder.layers.{layer}.pre_mlp_layernorm.weight",
        ("model.layers.{layer}.post_attention_layernorm.weight",),
    ),
    NameRule(
        "model.decoder.layers.{layer}.mlp.linear_fc1.weight",
        ("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"),
    ),
    NameRule(
        "model.decoder.layers.{layer}.mlp.linear_fc2.weight",
        ("model.layers.{layer}.mlp.down_proj.weight",),
    ),
    NameRule("model.decoder.final_layernorm.weight", ("model.norm.weight",)),
    NameRule("model.output_layer.weight", ("lm_head.weight",)),
)
FAMILY_RULES = {"llama": LLAMA_RULES}
OUTPUT_WEIGHT = "model.output_layer.weight"
HF_EMBEDDING = "model.embed_tokens.weight"
HF_OUTPUT = "lm_head.weight"


@dataclass(frozen=True)
class WeightEntry:
    """One weight of a model, with its Hugging Face parts."""

    ours: str
    shape: tuple[int, ...]
    theirs: tuple[str, ...]
    their_shapes: tuple[tuple[int, ...], ...]
    head_dim: int
    """Head size H."""

    def to_ours(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Join the Hugging Face parts, in the order of `theirs`; the same type."""
        if len(parts) == 3:
            query, key, value = parts
            return merge_qkv(query, key, value, self.head_dim)
        if len(parts) == 2:
            return torch.cat(tuple(parts))
        return parts[0]

    def to_theirs(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Take our weight apart, in the order of `theirs`; the same type."""
        if len(self.theirs) == 3:
            num_heads = self.their_shapes[0][0] // self.head_dim
            num_kv_heads = self.their_shapes[1][0] // self.head_dim
            return split_qkv(weight, num_heads, num_kv_heads)
        if len(self.theirs) == 2:
            return weight.chunk(2)
        return (weight,)


def merge_qkv(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, head_dim: int
) -> torch.Tensor:
    """q [NH, D], k [KH, D], v [KH, D] -> [(N+2K)H, D], kv group by kv group."""
    num_kv_heads = key.shape[0] // head_dim
    groups = [part.unflatten(0, (num_kv_heads, -1)) for part in (query, key, value)]
    return torch.cat(groups, dim=1).flatten(0, 1)


def split_qkv(
    qkv: torch.Tensor, num_heads: int, num_kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[(N+2K)H, D] -> q [NH, D], k [KH, D], v [KH, D]; the inverse of `merge_qkv`."""
    head_dim = qkv.shape[0] // (num_heads + 2 * num_kv_heads)
    groups = qkv.unflatten(0, (num_kv_heads, -1))
    sizes = (num_heads // num_kv_heads * head_dim, head_dim, head_dim)
    query, key, value = groups.split(sizes, dim=1)
    return query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face weight by the last parts of its name."""
    width, head_dim = model.hidden_size, model.head_size
    query_rows, kv_rows = model.num_attention_heads * head_dim, model.num_kv_heads * head_dim
    return {
        "embed_tokens": (model.vocab_size, width),
        "lm_head": (model.vocab_size, width),
        "norm": (width,),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "q_proj": (query_rows, width),
        "k_proj": (kv_rows, width),
        "v_proj": (kv_rows, width),
        "o_proj": (width, query_rows),
        "gate_proj": (model.ffn_hidden_size, width),
        "up_proj": (model.ffn_hidden_size, width),
        "down_proj": (width, model.ffn_hidden_size),
    }


def build_weight_table(model: ModelConfig) -> list[WeightEntry]:
    """Every weight of the model once, in the order of a forward pass."""
    shapes = _shapes(model)
    head: list[NameRule] = []
    layer: list[NameRule] = []
    tail: list[NameRule] = []
    for rule in FAMILY_RULES[model.family]:
        if rule.ours == OUTPUT_WEIGHT and model.tie_embeddings:
            continue
        (layer if LAYER in rule.ours else tail if layer else head).append(rule)
    rules = [(rule, 0) for rule in head]
    rules += [(rule, number) for number in range(model.num_layers) for rule in layer]
    rules += [(rule, 0) for rule in tail]
    table = []
    for rule, number in rules:
        theirs = tuple(name.replace(LAYER, str(number)) for name in rule.theirs)
        their_shapes = tuple(shapes[name.split(".")[-2]] for name in theirs)
        rows = sum(shape[0] for shape in their_shapes)
        table.append(
            WeightEntry(
                ours=rule.ours.replace(LAYER, str(number)),
                shape=(rows, *their_shapes[0][1:]),
                theirs=theirs,
                their_shapes=their_shapes,
                head_dim=model.head_size,
            )
        )
    return table

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

from lclm.checkpoint.folder import MODEL_PREFIX
from lclm.config import ModelConfig

# Our weight and the Hugging Face weights that it is made of, without the `.weight` at their ends:
# before, in and after the layers, in the order of a forward pass, which is also that in files.
Rules = dict[str, tuple[str, ...]]
FAMILY_RULES: dict[str, tuple[Rules, Rules, Rules]] = {
    "llama": (
        {"embedding.word_embeddings": ("model.embed_tokens",)},
        {
            "input_layernorm": ("input_layernorm",),
            "self_attention.linear_qkv": (
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
            ),
            "self_attention.linear_proj": ("self_attn.o_proj",),
            "pre_mlp_layernorm": ("post_attention_layernorm",),
            "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.linear_fc2": ("mlp.down_proj",),
        },
        {"decoder.final_layernorm": ("model.norm",), "output_layer": ("lm_head",)},
    )
}
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
        return weight.chunk(len(self.theirs))


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
    table: list[WeightEntry] = []

    def add(rules: Rules, our_prefix: str = MODEL_PREFIX, their_prefix: str = "") -> None:
        for ours, names in rules.items():
            their_shapes = tuple(shapes[name.split(".")[-1]] for name in names)
            rows = sum(shape[0] for shape in their_shapes)
            table.append(
                WeightEntry(
                    ours=f"{our_prefix}{ours}.weight",
                    shape=(rows, *their_shapes[0][1:]),
                    theirs=tuple(f"{their_prefix}{name}.weight" for name in names),
                    their_shapes=their_shapes,
                    head_dim=model.head_size,
                )
            )

    before, layer, after = FAMILY_RULES[model.family]
    add(before)
    for number in range(model.num_layers):
        add(layer, f"{MODEL_PREFIX}decoder.layers.{number}.", f"model.layers.{number}.")
    add(after)
    return [entry for entry in table if not (model.tie_embeddings and entry.theirs == (HF_OUTPUT,))]

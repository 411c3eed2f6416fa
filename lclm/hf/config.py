"""Hugging Face `config.json` and `generation_config.json` <-> our `[model]` fields and RoPE.

The rotary embedding stands in `config.json` in two forms: `rope_parameters` (transformers 5) and
`rope_theta` with `rope_scaling` (before). Both are read, both are written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lclm.checkpoint.folder import CheckpointError, read_json
from lclm.config import ConfigError, ModelConfig, RopeScaling, check_heads
from lclm.config_file import explain
from lclm_kernels.rope import scale_base_ntk

CONFIG_NAME = "config.json"
ARCHITECTURES = {"llama": "LlamaForCausalLM"}
DEFAULT_ROPE_BASE = 10000.0  # of transformers' LlamaConfig

# Fields of a Llama config that change what the model computes, and the one value we compute.
_FIXED_FIELDS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    # read by vLLM's Llama
    "bias": (False,),
    "qkv_bias": (False,),
    "logit_scale": (1.0,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    # code of its own, which may compute something else and does not travel
    "auto_map": (None, {}),
}
# Keys that are carried on as they came: they change nothing that we compute.
_CARRIED_FIELDS = ("hidden_act", "attention_bias", "attention_dropout", "mlp_bias", "use_cache")
# Our field, theirs, and what an absent one means in transformers' LlamaConfig; `...`: required.
_MODEL_FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("num_layers", "num_hidden_layers", ...),
    ("hidden_size", "hidden_size", ...),
    ("ffn_hidden_size", "intermediate_size", ...),
    ("num_attention_heads", "num_attention_heads", ...),
    ("vocab_size", "vocab_size", ...),
    ("norm_eps", "rms_norm_eps", 1e-6),
    ("tie_embeddings", "tie_word_embeddings", False),
    ("init_std", "initializer_range", 0.02),
)
# Our name and theirs of each field, by type. `ntk` is not here: it is written as a raised base.
_SCALING_FIELDS: dict[str, tuple[tuple[str, str], ...]] = {
    "linear": (("factor", "factor"),),
    "llama3": (
        ("factor", "factor"),
        ("low_freq_factor", "low_freq_factor"),
        ("high_freq_factor", "high_freq_factor"),
        ("original_length", "original_max_position_embeddings"),
    ),
    "yarn": (
        ("factor", "factor"),
        ("original_length", "original_max_position_embeddings"),
        ("beta_fast", "beta_fast"),
        ("beta_slow", "beta_slow"),
    ),
}
# Fields of yarn that change it, and the values that mean what we compute.
_YARN_FIXED_FIELDS: dict[str, tuple[Any, ...]] = {
    "attention_factor": (None,),
    "mscale": (None,),
    "mscale_all_dim": (None,),
    "truncate": (True,),
}
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


@dataclass(frozen=True)
class HfModel:
    """What a Hugging Face config says, in our terms."""

    model: ModelConfig
    rope_base: float
    seq_length: int
    """`max_position_embeddings`: tokens."""


def read_hf_config(folder: Path) -> HfModel:
    """Read `config.json` of a Hugging Face folder.

    Raises:
        CheckpointError: for an architecture, option or RoPE scaling that is not supported.
    """
    where = str(folder / CONFIG_NAME)
    config = read_json(folder / CONFIG_NAME)
    _check_architecture(config, where)
    _check_fixed(config, _FIXED_FIELDS, where)
    rope_base, scaling = _read_rope(config, where)
    tree: dict[str, Any] = {"family": config["model_type"], "rope_scaling": scaling}
    for ours, theirs, default in _MODEL_FIELDS:
        if default is ... and theirs not in config:
            raise CheckpointError(f"{where}: {theirs} is missing; copy the file again")
        tree[ours] = config.get(theirs, default)
    tree["num_kv_heads"] = config.get("num_key_value_heads") or tree["num_attention_heads"]
    tree["head_dim"] = config.get("head_dim") or 0
    if tree["head_dim"] * tree["num_attention_heads"] == tree["hidden_size"]:
        tree["head_dim"] = 0  # the default, as a run's configuration writes it
    seq_length = config.get("max_position_embeddings", 2048)
    if not isinstance(seq_length, int) or seq_length < 1:
        raise CheckpointError(
            f"{where}: max_position_embeddings = {seq_length!r} must be a positive whole number"
        )
    return HfModel(parse_model(tree, where), rope_base, seq_length)


def parse_model(tree: Mapping[str, Any], where: str) -> ModelConfig:
    """`[model]` fields -> ModelConfig.

    Raises:
        CheckpointError: for a field out of range or heads that do not divide.
    """
    try:
        model = ModelConfig.model_validate(dict(tree))
        check_heads(model)
    except ValidationError as error:
        raise CheckpointError(f"{where}: model: {explain(error, ModelConfig)}") from error
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return model


def _check_architecture(config: Mapping[str, Any], where: str) -> None:
    known = ", ".join(ARCHITECTURES.values())
    model_type = config.get("model_type")
    names = config.get("architectures") or [ARCHITECTURES.get(str(model_type), "(none named)")]
    if model_type not in ARCHITECTURES or names != [ARCHITECTURES[model_type]]:
        raise CheckpointError(
            f"{where}: architecture {', '.join(map(str, names))} (model_type {model_type!r}) "
            f"is not supported; convertible: {known}"
        )


def _check_fixed(tree: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for name, allowed in fixed.items():
        if name in tree and tree[name] not in allowed:
            raise CheckpointError(
                f"{where}: {name} = {tree[name]!r} is not supported, must be {allowed[0]!r} or "
                "absent; convert another model"
            )


def _read_rope(config: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling. Where both forms are given they must agree."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{where}: {name} = {value!r} must be an object or null")
    given = [tree.get("rope_theta") for tree in (config, new or {}, old or {})]
    bases = {base for base in given if base is not None}
    for base in bases:
        if isinstance(base, bool) or not isinstance(base, int | float) or base <= 1:
            raise CheckpointError(f"{where}: rope_theta = {base!r} must be a number above 1")
    if len(bases) > 1:
        raise CheckpointError(
            f"{where}: rope_theta is {' and '.join(map(str, sorted(bases)))} in different places; "
            "write one value"
        )
    scalings = [_read_scaling(tree, where) for tree in (new, old) if tree]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise CheckpointError(
            f"{where}: rope_parameters {new} and rope_scaling {old} say different things; "
            "remove the one that is wrong"
        )
    base = float(bases.pop()) if bases else DEFAULT_ROPE_BASE
    return base, scalings[0] if scalings else None


def _read_scaling(tree: Mapping[str, Any], where: str) -> RopeScaling | None:
    kind = _rope_type(tree)
    _check_fixed(tree, {"partial_rotary_factor": (1.0,)}, where)
    if kind == "default":
        nested = sorted(name for name, value in tree.items() if isinstance(value, dict))
        if nested:
            raise CheckpointError(
                f"{where}: RoPE of its own for {', '.join(nested)} is not supported; "
                "convert another model"
            )
        return None
    if kind == "yarn":
        _check_fixed(tree, _YARN_FIXED_FIELDS, f"{where}: RoPE scaling 'yarn'")
        # as in transformers, absent or null means these
        tree = {**tree, **{n: tree.get(n) or d for n, d in _YARN_DEFAULTS.items()}}
    try:
        if kind in _SCALING_FIELDS:
            fields = {ours: tree[theirs] for ours, theirs in _SCALING_FIELDS[kind]}
            return RopeScaling.model_validate({"type": kind, **fields})
    except KeyError as error:
        raise CheckpointError(f"{where}: RoPE scaling '{kind}' lacks the field {error}") from error
    except ValidationError as error:
        raise CheckpointError(f"{where}: RoPE scaling {dict(tree)}: {error}") from error
    raise CheckpointError(
        f"{where}: RoPE scaling {kind!r} is not supported; convertible: default, "
        f"{', '.join(_SCALING_FIELDS)}"
    )


def build_hf_config(
    source: HfModel, dtype: str, bos_token_id: int | None, eos_token_id: int | list[int] | None
) -> dict[str, Any]:
    """The content of `config.json`. `dtype`: `float32` or `bfloat16`."""
    model, rope_base = source.model, source.rope_base
    scaling, rope = model.rope_scaling, dict[str, Any](rope_type="default")
    old_form = None
    if scaling is not None and scaling.type == "ntk":
        rope_base = scale_base_ntk(rope_base, model.head_size, scaling.factor)
    elif scaling is not None:
        fields = {theirs: getattr(scaling, ours) for ours, theirs in _SCALING_FIELDS[scaling.type]}
        rope = {"rope_type": scaling.type, **fields}
        # `type`, not `rope_type`: transformers before 4.43 accepts exactly these two fields.
        old_form = {"type": "linear", **fields} if scaling.type == "linear" else rope
    return {
        "architectures": [ARCHITECTURES[model.family]],
        "model_type": model.family,
        **{theirs: getattr(model, ours) for ours, theirs, _ in _MODEL_FIELDS},
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "max_position_embeddings": source.seq_length,
        "rope_parameters": {**rope, "rope_theta": rope_base},
        "rope_theta": rope_base,
        "rope_scaling": old_form,
        # null, not absent: transformers' own default would be 1 and 2
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def merge_hf_config(built: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """What `build_hf_config` gave, with all else that the original `config.json` holds.

    What a scaling says beyond the fields that we know stays as long as its type does.
    """
    merged = {**original, **built}
    merged |= {name: original[name] for name in _CARRIED_FIELDS if name in original}
    for name in ("rope_parameters", "rope_scaling"):
        old, new = original.get(name), built[name]
        if old and new and _rope_type(old) == _rope_type(new):
            merged[name] = {**old, **new}
    return merged


def _rope_type(tree: Mapping[str, Any]) -> Any:
    return tree.get("rope_type", tree.get("type", "default"))

"""`config.json` <-> our fields: both forms of RoPE, and what is refused."""

import json

import pytest
import torch
from transformers import AutoConfig

from lclm.checkpoint.folder import CheckpointError
from lclm.config import ModelConfig, RopeScaling
from lclm.hf.config import HfModel, build_hf_config, parse_model, read_hf_config
from lclm_kernels.rope import build_rope_table
from tests.checkpoint.samples import LLAMA3_SCALING

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
}
LLAMA3 = RopeScaling(type="llama3", factor=8.0, original_length=32)
LINEAR = RopeScaling(type="linear", factor=4.0)
YARN = RopeScaling(type="yarn", factor=4.0, original_length=64, beta_slow=2.0)
YARN_FIELDS = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 2.0,
}


def read(tmp_path, **changes):
    tree = {name: value for name, value in {**CONFIG, **changes}.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    return read_hf_config(tmp_path)


def test_fields(tmp_path):
    found = read(tmp_path, initializer_range=0.01, tie_word_embeddings=True, rope_theta=5e5)
    assert found == HfModel(
        ModelConfig(**_FIELDS, norm_eps=1e-5, tie_embeddings=True, init_std=0.01),
        rope_base=5e5,
        seq_length=1024,
    )


def test_absent_fields_mean_what_transformers_means(tmp_path):
    found = read(tmp_path, num_key_value_heads=..., rms_norm_eps=..., architectures=...)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert found.model.num_kv_heads == theirs.num_key_value_heads == 4
    assert found.model.norm_eps == theirs.rms_norm_eps
    assert found.rope_base == 10000.0
    assert found.model.head_size == theirs.head_dim == 16


def test_head_dim_is_written_only_where_it_is_not_the_default(tmp_path):
    assert read(tmp_path, head_dim=16).model.head_dim == 0
    assert read(tmp_path, head_dim=None).model.head_dim == 0
    assert read(tmp_path, head_dim=32).model.head_dim == 32


@pytest.mark.parametrize(
    ("changes", "base", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 500000, "rope_scaling": None}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING}, 5e5, LLAMA3),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 1e4, LINEAR),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 1e4, LINEAR),
        ({"rope_parameters": {"rope_theta": 8e6, "rope_type": "default"}}, 8e6, None),
        ({"rope_parameters": {**LLAMA3_SCALING, "rope_theta": 8e6}}, 8e6, LLAMA3),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 1e4, LINEAR),
        ({"rope_scaling": {**YARN_FIELDS, "beta_fast": None}}, 1e4, YARN),
        ({"rope_parameters": {**YARN_FIELDS, "rope_theta": 8e6, "truncate": True}}, 8e6, YARN),
    ],
)
def test_both_forms_of_rope_are_read(tmp_path, changes, base, scaling):
    found = read(tmp_path, **changes)
    assert (found.rope_base, found.model.rope_scaling) == (base, scaling)


@pytest.mark.parametrize("scaling", [None, LLAMA3, LINEAR, YARN])
def test_written_config_reads_back_and_means_the_same_in_each_form(tmp_path, scaling):
    model = parse_model({**_FIELDS, "rope_scaling": scaling}, "here")
    source = HfModel(model, rope_base=8e6, seq_length=2048)
    tree = build_hf_config(source, "bfloat16", bos_token_id=1, eos_token_id=[2, 3])
    for removed in ((), ("rope_parameters",), ("rope_theta", "rope_scaling")):
        kept = {name: value for name, value in tree.items() if name not in removed}
        (tmp_path / "config.json").write_text(json.dumps(kept))
        assert read_hf_config(tmp_path) == source
        theirs = AutoConfig.from_pretrained(tmp_path).to_dict()
        rope = theirs.get("rope_parameters") or {
            "rope_theta": theirs["rope_theta"],
            **(theirs["rope_scaling"] or {"rope_type": "default"}),
        }
        rope.pop("type", None)
        assert rope.pop("rope_theta") == 8e6
        expected = {"rope_type": "default"}
        if scaling is LLAMA3:
            expected = LLAMA3_SCALING
        elif scaling is LINEAR:
            expected = {"rope_type": "linear", "factor": 4.0}
        elif scaling is YARN:
            expected = YARN_FIELDS
        assert rope == expected
        assert theirs["max_position_embeddings"] == 2048
        assert (theirs["bos_token_id"], theirs["eos_token_id"]) == (1, [2, 3])
    assert tree["dtype"] == tree["torch_dtype"] == "bfloat16"
    assert tree["architectures"] == ["LlamaForCausalLM"]


def test_ntk_is_written_as_a_raised_base(tmp_path):
    """transformers has no type for it: base * factor^(H / (H - 2)), arXiv 2309.00071, 3.1."""
    scaling = RopeScaling(type="ntk", factor=8.0)
    model = parse_model({**_FIELDS, "rope_scaling": scaling}, "here")
    source = HfModel(model, rope_base=1e4, seq_length=2048)
    tree = build_hf_config(source, "float32", bos_token_id=None, eos_token_id=None)
    (tmp_path / "config.json").write_text(json.dumps(tree))
    found = read_hf_config(tmp_path)
    assert found.rope_base == pytest.approx(1e4 * 8.0 ** (16 / 14))
    assert found.model.rope_scaling is None
    positions = torch.tensor([0, 1, 900])
    ours = build_rope_table(positions, 16, 1e4, {"type": "ntk", "factor": 8.0})
    read_back = build_rope_table(positions, 16, found.rope_base)
    assert all(torch.equal(one, other) for one, other in zip(ours, read_back))


_FIELDS = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "MistralForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": ...}, "model_type None"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "scaling 'dynamic' is not supp"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "'yarn' lacks the field 'original",
        ),
        ({"rope_scaling": {**YARN_FIELDS, "mscale": 0.7}}, "RoPE scaling 'yarn': mscale = 0.7"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "scaling 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks the field 'low_freq"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "own for full_attention"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "in different places"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3_SCALING},
            "say different things",
        ),
        ({"rope_theta": "big"}, "rope_theta = 'big' must be a number"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": "linear"}, "must be an object or null"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, must be 'silu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": ...}, "vocab_size is missing"),
        ({"num_hidden_layers": 0}, "num_layers = 0"),
        ({"num_key_value_heads": 3}, r"num_kv_heads\(3\) must divide num_attention_heads\(4\)"),
        ({"hidden_size": 63}, r"num_attention_heads\(4\) must divide hidden_size\(63\)"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings = 'long'"),
    ],
)
def test_what_is_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, **changes)


def test_config_must_be_there_and_json(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: is not JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="one JSON object"):
        read_hf_config(tmp_path)

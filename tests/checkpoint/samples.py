"""Small models and folders that the checkpoint tests share."""

import json
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from lclm.checkpoint.folder import (
    CheckpointInfo,
    read_info,
    resolve_step_folder,
    step_folder_name,
    write_info,
)
from lclm.checkpoint.tokenizer_files import read_travelling, write_travelling
from lclm.config import ModelConfig
from lclm.hf.config import HfModel
from lclm.hf.torch_dist import TorchDistReader

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def tiny_llama(**fields) -> ModelConfig:
    """Our sizes of `build_hf_llama`."""
    sizes = {
        "num_layers": 3,
        "hidden_size": 32,
        "ffn_hidden_size": 40,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "vocab_size": 53,
    }
    return ModelConfig(**{**sizes, **fields})


def checkpoint_info(**fields) -> CheckpointInfo:
    """What `lclm.json` says of a step, true of nothing."""
    values = {
        "format": 1,
        "step": 12,
        "stage": 1,
        "stage_step": 2,
        "tokens": 49152,
        "model": tiny_llama().recorded_fields(),
        "rope_base": 8e6,
        "seq_length": 4096,
        "dtype": "bfloat16",
        "has_optimizer": True,
        "ledger": {"books": 100},
        "versions": {"torch": "2.13.0"},
    }
    return CheckpointInfo(**{**values, **fields})


def build_hf_llama(dtype=torch.float32, seed=0, **fields) -> LlamaForCausalLM:
    """A Llama of transformers with 4 query and 2 kv heads; no two numbers of its weights alike."""
    sizes = {
        "vocab_size": 53,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **fields}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(1.0 if weight.dim() == 1 else 0.0, 0.2)
    return model.to(dtype)


def save_hf(folder: Path, max_shard_size="5GB", **fields) -> LlamaForCausalLM:
    """Save such a model as transformers does and return it."""
    model = build_hf_llama(**fields)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def write_tokenizer(folder: Path) -> None:
    """A word tokenizer of 53 tokens whose first and last frame a text."""
    words = {"<start>": 0, **{f"w{number}": number for number in range(1, 52)}, "<end>": 52}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<start>", "<end>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<start>",
        "eos_token": {"__type": "AddedToken", "content": "<end>", "special": True},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def edit_json(path: Path, **changes) -> None:
    """Set fields of a JSON object in a file; the value `...` removes one."""
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: v for name, v in tree.items() if v is not ...}))


def save_after(origin: Path, run: Path, tokenizer: Path | None = None, **fields) -> Path:
    """What a run that starts from a checkpoint saves, its weights unchanged; the step folder."""
    step_folder = resolve_step_folder(origin)
    values = {"step": 4, "has_optimizer": True, **fields}
    info = read_info(step_folder).model_copy(update=values)
    target = run / step_folder_name(info.step)
    target.mkdir(parents=True)
    for path in step_folder.iterdir():
        if path.name == ".metadata" or path.suffix in (".distcp", ".pt") or "metadata" in path.name:
            shutil.copyfile(path, target / path.name)
    write_travelling(target, read_travelling(tokenizer, step_folder))
    write_info(target, info)
    return target


def mini_llama_logits(step_folder: Path, source: HfModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of a Llama read from our layout, written from the paper's equations in fp32.

    RoFormer (arXiv 2104.09864) rotation with halves paired, RMSNorm (arXiv 1910.07467), SwiGLU
    (arXiv 2002.05202), grouped queries (arXiv 2305.13245). Default RoPE frequencies only.
    """
    reader, model = TorchDistReader(step_folder), source.model

    def weight(name: str) -> torch.Tensor:
        return reader.load("model." + name).float()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + model.norm_eps)
        return x * scale * weight(name)

    num_heads, num_kv_heads, head_dim = (
        model.num_attention_heads,
        model.num_kv_heads,
        model.head_size,
    )
    num_tokens, half = len(ids), head_dim // 2
    frequencies = source.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(num_tokens, dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]  # [T, 1, H/2]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    is_future = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
    embedding = weight("embedding.word_embeddings.weight")
    x = embedding[ids]
    for layer in range(model.num_layers):
        prefix = f"decoder.layers.{layer}."
        qkv = norm(x, prefix + "input_layernorm.weight")
        qkv = qkv @ weight(prefix + "self_attention.linear_qkv.weight").T
        # [T, K, G + 2, H]: in each kv group its query heads, the key head, the value head
        qkv = qkv.view(num_tokens, num_kv_heads, num_heads // num_kv_heads + 2, head_dim)
        q, k, v = rotate(qkv[:, :, :-2].flatten(1, 2)), rotate(qkv[:, :, -2]), qkv[:, :, -1]
        k, v = (part.repeat_interleave(num_heads // num_kv_heads, 1) for part in (k, v))
        scores = torch.einsum("tnh,snh->nts", q, k) / math.sqrt(head_dim)
        scores = scores.masked_fill(is_future, -math.inf).softmax(-1)
        out = torch.einsum("nts,snh->tnh", scores, v).flatten(1)
        x = x + out @ weight(prefix + "self_attention.linear_proj.weight").T
        gate_up = norm(x, prefix + "pre_mlp_layernorm.weight")
        gate, up = (gate_up @ weight(prefix + "mlp.linear_fc1.weight").T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ weight(prefix + "mlp.linear_fc2.weight").T
    x = norm(x, "decoder.final_layernorm.weight")
    return x @ (embedding if model.tie_embeddings else weight("output_layer.weight")).T

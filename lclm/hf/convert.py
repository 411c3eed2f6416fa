"""Step folder <-> Hugging Face folder, streamed: neither a model nor a state dict is ever whole.

Weights keep their bits (types are changed only where asked for, or where a type is not ours), so
theirs -> ours -> theirs gives the same tensors.
"""

import argparse
import functools
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lclm import __version__
from lclm.checkpoint.folder import (
    FORMAT_VERSION,
    LATEST_NAME,
    MODEL_PREFIX,
    TOKENIZER_FOLDER,
    CheckpointError,
    CheckpointInfo,
    dtype_name,
    new_folder,
    read_info,
    read_json,
    resolve_step_folder,
    step_folder_name,
    write_info,
    write_latest,
)
from lclm.checkpoint.tokenizer_files import (
    CHAT_TEMPLATES,
    COMPANION_NAMES,
    GENERATION_CONFIG_NAME,
    VOCABULARY_NAMES,
    has_tokenizer,
    read_token_ids,
    read_travelling,
    read_vocabulary_ids,
    write_travelling,
)
from lclm.config_file import dump_section
from lclm.files import refuse_overwriting
from lclm.hf.check import check_vocabulary, convert_weight
from lclm.hf.config import (
    CONFIG_NAME,
    HfModel,
    build_hf_config,
    merge_hf_config,
    parse_model,
    read_hf_config,
)
from lclm.hf.limits import raise_limits
from lclm.hf.names import HF_EMBEDDING, HF_OUTPUT, WeightEntry, build_weight_table
from lclm.hf.safetensors_folder import (
    DTYPES_BY_NAME,
    SafetensorsFolder,
    TensorSpec,
    check_names_and_shapes,
    is_weight_file,
    write_shards,
)
from lclm.hf.source import HfSource, merge_ids, read_source, write_source
from lclm.hf.torch_dist import TorchDistReader, write_torch_dist

DEFAULT_SHARD_BYTES = 5_000_000_000
OS_ERROR_NOTE = "; nothing was written: see that the disk has room, and start again"
ADAPTER_NAME = "adapter_config.json"
KEEP = "keep"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_CHOICES = (KEEP, *DTYPES)

Report = Callable[[str], None]


def add_weight_options(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype` and `--allow-non-finite`."""
    parser.add_argument(
        "--dtype",
        choices=DTYPE_CHOICES,
        default=KEEP,
        help="type of the weights (default: %(default)s, each as it is)",
    )
    parser.add_argument(
        "--allow-non-finite",
        action="store_true",
        help="take weights that hold NaN or infinite values",
    )


def convert_to_hf(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str = KEEP,
    tokenizer: Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    allow_non_finite: bool = False,
    report: Report,
) -> None:
    """Export the weights of a checkpoint as a Hugging Face folder.

    `checkpoint`: a step folder or one with `latest`. `dtype`: one of `DTYPE_CHOICES`;
    `keep` is as stored, and for an import as in its source. `tokenizer`: a folder or file whose
    tokenizer takes the place of the checkpoint's own. `allow_non_finite`: take NaN and infinite
    weights. `report` gets progress and warnings, a line each. Peak memory: about twice the largest
    weight.

    Raises:
        CheckpointError: for input that cannot be converted; then `output` is as it was before.
    """
    step_folder = resolve_step_folder(checkpoint)
    try:
        _export(
            step_folder,
            output,
            dtype=dtype,
            tokenizer=tokenizer,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            allow_non_finite=allow_non_finite,
            report=report,
        )
    except FileNotFoundError as error:
        if step_folder.resolve() not in Path(error.filename or "").resolve().parents:
            raise
        raise CheckpointError(
            f"checkpoint {step_folder}: was deleted while it was exported ({error.filename} is "
            "gone), as a run deletes its old steps; export a later one, or raise checkpoint.keep"
        ) from error


def _export(
    step_folder: Path,
    output: Path,
    *,
    dtype: str,
    tokenizer: Path | None,
    max_shard_bytes: int,
    overwrite: bool,
    allow_non_finite: bool,
    report: Report,
) -> None:
    refuse_overwriting([output], [step_folder, *([tokenizer] if tokenizer else [])])
    info = read_info(step_folder)
    where = str(step_folder)
    model = parse_model(info.model, where)
    reader = TorchDistReader(step_folder)
    source = read_source(step_folder)
    table = build_weight_table(model)
    stored = {k: t for k, t in reader.tensors().items() if k.startswith(MODEL_PREFIX)}
    check_names_and_shapes(
        {key: tensor.shape for key, tensor in stored.items()},
        {entry.ours: entry.shape for entry in table},
        f"checkpoint {where}: the weights do not fit the architecture in lclm.json",
        "mend lclm.json or use another step",
    )
    if tokenizer is not None and not has_tokenizer(tokenizer):
        raise CheckpointError(f"tokenizer {tokenizer}: holds no tokenizer; give a folder with one")
    check_vocabulary(tokenizer or step_folder / TOKENIZER_FOLDER, model.vocab_size)
    # Training gives every weight one type of its own.
    theirs = source.dtypes if source is not None and not info.has_optimizer else {}

    def their_spec(entry: WeightEntry, name: str, shape: tuple[int, ...]) -> TensorSpec:
        kept = DTYPES_BY_NAME[theirs[name]] if name in theirs else stored[entry.ours].dtype
        return TensorSpec(name, shape, DTYPES.get(dtype, kept))

    groups = [
        [their_spec(entry, *named) for named in zip(entry.theirs, entry.their_shapes)]
        for entry in table
    ]

    def load_group(number: int) -> list[torch.Tensor]:
        entry = table[number]
        parts = entry.to_theirs(reader.load(entry.ours))
        return [
            convert_weight(part, spec, where, allow_non_finite)
            for part, spec in zip(parts, groups[number])
        ]

    with new_folder(output, overwrite, _is_exported) as staging:
        write_shards(staging, groups, load_group, max_shard_bytes, report)
        write_travelling(staging, _tokenizer_files(step_folder, tokenizer))
        if not has_tokenizer(staging):
            report(f"warning: {where} holds no tokenizer{_odd_names(step_folder)}")
        declared = _declared_dtype({spec.dtype for group in groups for spec in group}, source)
        hf_model = HfModel(model, info.rope_base, info.context_limit)
        _write_configs(staging, hf_model, declared, source)
        if info.has_optimizer:  # trained here: an import says of itself what it said
            raise_limits(staging, info.context_limit, report)


def _is_exported(name: str) -> bool:
    """Whether a file or folder of that name is what an export writes."""
    names = {CONFIG_NAME, CHAT_TEMPLATES, *VOCABULARY_NAMES, *COMPANION_NAMES}
    return name in names or is_weight_file(name)


def _is_imported(name: str) -> bool:
    return name in (LATEST_NAME, step_folder_name(0))


def _declared_dtype(dtypes: set[torch.dtype], source: HfSource | None) -> str:
    """What `config.json` says: the source's type if it still occurs, else the widest."""
    names = {dtype_name(dtype) for dtype in dtypes}
    said = [source.config.get(key) for key in ("dtype", "torch_dtype")] if source else []
    widest = dtype_name(functools.reduce(torch.promote_types, dtypes))
    return next((name for name in said if name in names), widest)


def _odd_names(step_folder: Path) -> str:
    """The remedy. Older checkpoints hold a vocabulary under the name that it was given by."""
    folder = step_folder / TOKENIZER_FOLDER
    names = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
    odd = [name for name in names if name not in COMPANION_NAMES]
    if not odd:
        return "; add one with --tokenizer"
    return f" of a usual name; if {folder / odd[0]} is one, give that file as --tokenizer"


def _tokenizer_files(step_folder: Path, tokenizer: Path | None) -> dict[str, bytes]:
    """Content of the files that are written beside the weights, by name."""
    files = read_travelling(tokenizer, step_folder)
    prefix = f"{TOKENIZER_FOLDER}/"
    return {n.removeprefix(prefix): c for n, c in files.items() if n.startswith(prefix)}


def _write_configs(folder: Path, model: HfModel, dtype: str, source: HfSource | None) -> None:
    """Write `config.json`, and complete `generation_config.json`, beside the tokenizer's files."""
    path = folder / GENERATION_CONFIG_NAME
    generation = read_json(path) if path.is_file() else dict[str, Any]()
    if source is None:
        ids = read_token_ids(folder)
        config = build_hf_config(model, dtype, ids.bos, ids.eos)
        told = {"bos_token_id": ids.bos, "eos_token_id": ids.eos}
        generation_ids = {name: value for name, value in told.items() if value is not None}
    else:
        config_ids, generation_ids = merge_ids(source, generation, read_vocabulary_ids(folder))
        built = build_hf_config(model, dtype, None, None)
        config = {**merge_hf_config(built, source.config), **config_ids}
        for name in ("bos_token_id", "eos_token_id"):
            if name not in config_ids:  # absent, it means transformers' own default
                del config[name]
    generation.update(generation_ids)
    for name, tree in ((CONFIG_NAME, config), (GENERATION_CONFIG_NAME, generation)):
        (folder / name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def convert_from_hf(
    hf_folder: Path,
    output: Path,
    *,
    dtype: str = KEEP,
    overwrite: bool = False,
    allow_non_finite: bool = False,
    report: Report,
) -> None:
    """Import a Hugging Face folder as a checkpoint folder: `latest` and step 0, weights only.

    `dtype`: one of `DTYPE_CHOICES`. With `keep` every weight stays as it is; where those that
    become one of ours differ, it is of a type that holds all exactly, and an export gives them
    their own back. `allow_non_finite`: take NaN and infinite weights. `report` gets progress and
    warnings. Peak memory: about three times the largest weight, besides what the system maps of the
    shards.

    Raises:
        CheckpointError: for input that cannot be converted; then `output` is as it was before.
    """
    _check_is_model(hf_folder)
    refuse_overwriting([output], [hf_folder])
    source = read_hf_config(hf_folder)
    weights = SafetensorsFolder(hf_folder)
    table = build_weight_table(source.model)
    expected = {n: s for entry in table for n, s in zip(entry.theirs, entry.their_shapes)}
    check_names_and_shapes(
        {n: s.shape for n, s in weights.specs.items() if not _is_droppable(n, weights, source)},
        expected,
        f"{hf_folder}: the weights do not fit config.json",
        "copy the folder again, or mend config.json",
    )
    check_vocabulary(hf_folder, source.model.vocab_size)
    specs = [_import_spec(entry, weights, dtype) for entry in table]
    by_name = {spec.name: spec for spec in specs}
    entries = {entry.ours: entry for entry in table}
    left = Counter(weights.shard_of[name] for name in expected)
    num_shards = len(left)

    def load(key: str) -> torch.Tensor:
        entry = entries[key]
        wide = by_name[key].dtype
        weight = entry.to_ours(
            [
                convert_weight(
                    weights.load(name), TensorSpec(name, s, wide), str(hf_folder), allow_non_finite
                )
                for name, s in zip(entry.theirs, entry.their_shapes)
            ]
        )
        for shard in (weights.shard_of[name] for name in entry.theirs):
            left[shard] -= 1
            if not left[shard]:
                num_done = sum(not count for count in left.values())
                report(f"shard {num_done} of {num_shards}: {shard} converted")
        return weight

    with new_folder(output, overwrite, _is_imported) as staging:
        step_folder = staging / step_folder_name(0)
        step_folder.mkdir()
        write_torch_dist(step_folder, specs, load)
        write_travelling(step_folder, read_travelling(hf_folder, None))
        if not has_tokenizer(hf_folder):
            report(f"warning: {hf_folder} holds no tokenizer; the checkpoint will have none")
        ids = asdict(read_vocabulary_ids(hf_folder))
        narrower = {
            name: dtype_name(weights.specs[name].dtype)
            for entry in table
            for name in entry.theirs
            if dtype == KEEP and weights.specs[name].dtype != by_name[entry.ours].dtype
        }
        config = read_json(hf_folder / CONFIG_NAME)
        write_source(step_folder, HfSource(config, ids, narrower))
        widest = functools.reduce(torch.promote_types, {spec.dtype for spec in specs})
        write_info(step_folder, _import_info(source, widest))
        write_latest(staging, step_folder.name)
    report(describe_start(source, output))


def describe_start(source: HfModel, checkpoint: Path) -> str:
    """The `[model]` section of a run that starts from an import, as TOML to copy."""
    model = source.model.model_copy(update={"init_from": str(checkpoint)})
    return (
        "\n# to start a run from it; its context is "
        f"{source.seq_length} tokens with rope_base = {source.rope_base!r} in a [[stage]]\n"
        + dump_section("model", model)
    )


def _check_is_model(hf_folder: Path) -> None:
    where = f"Hugging Face folder {hf_folder}"
    if not hf_folder.is_dir():
        remedy = "give the folder of a model"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(hf_folder)):
            remedy = f"download a model of the hub first: hf download {hf_folder} --local-dir DIR"
        raise CheckpointError(f"{where}: no such folder; {remedy}")
    if (hf_folder / ADAPTER_NAME).is_file():
        raise CheckpointError(
            f"{where}: holds {ADAPTER_NAME}, so its weights are an adapter (LoRA), or transformers "
            "adds one to them; merge it into its base model (peft: merge_and_unload) and give the "
            "merged model's folder"
        )


def _import_info(source: HfModel, dtype: torch.dtype) -> CheckpointInfo:
    """`lclm.json` of weights that lclm has not trained yet."""
    return CheckpointInfo(
        format=FORMAT_VERSION,
        step=0,
        stage=0,
        stage_step=0,
        tokens=0,
        model=source.model.recorded_fields(),
        rope_base=source.rope_base,
        seq_length=source.seq_length,
        max_context=source.seq_length,
        dtype=dtype_name(dtype),
        has_optimizer=False,
        ledger={},
        versions={"lclm": __version__, "torch": torch.__version__},
    )


def _is_droppable(name: str, weights: SafetensorsFolder, source: HfModel) -> bool:
    """Whether a tensor of the folder says nothing that the others do not say.

    Old exports hold the rotary frequencies; some folders with tied embeddings hold them twice.
    """
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    if name != HF_OUTPUT or not source.model.tie_embeddings or HF_EMBEDDING not in weights.specs:
        return False
    if not torch.equal(weights.load(name), weights.load(HF_EMBEDDING)):
        raise CheckpointError(
            f"{weights.folder}: tie_word_embeddings is true, but {HF_OUTPUT} differs from "
            f"{HF_EMBEDDING}; set tie_word_embeddings to false in config.json"
        )
    return True


def _import_spec(entry: WeightEntry, weights: SafetensorsFolder, dtype: str) -> TensorSpec:
    """Shape and type that a weight is stored in."""
    theirs = {weights.specs[name].dtype for name in entry.theirs}
    wide = functools.reduce(torch.promote_types, theirs)
    return TensorSpec(entry.ours, entry.shape, DTYPES.get(dtype, wide))

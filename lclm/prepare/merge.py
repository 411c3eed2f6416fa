"""Indexed prefixes joined into one, above all the shards of one preprocessing."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lclm.data.indexed import (
    IndexedReader,
    IndexedWriter,
    check_same_tokenizer,
    prefix_files,
    read_all_lengths,
)
from lclm.files import refuse_overwriting


def merge_prefixes(prefixes: Sequence[str], output_prefix: str, domain: str = "") -> int:
    """Join prefixes, in the order given, into `<output_prefix>.bin/.idx/.json`, and `.weights`.

    Shards (`--shard I/N` of tools/preprocess_data.py) are put in their order and must be complete:
    the result then equals that of one run without shards.

    Args:
        prefixes: at least one; all have a `.json` and were written with one tokenizer.
        output_prefix: of the new files; none of prefixes.
        domain: name for the `.json`; empty: that of the inputs where they agree, else the last
            part of the prefix.

    Returns:
        Tokens written.

    Raises:
        ValueError: files are missing or damaged, tokenizers, options or weights of targets differ,
            shards are missing, given twice, or mixed with others.
    """
    if len(set(map(os.path.realpath, prefixes))) != len(prefixes) or not prefixes:
        raise ValueError("--input: give at least one prefix, each once")
    read = [path for prefix in prefixes for path in prefix_files(prefix)]
    refuse_overwriting(prefix_files(output_prefix), read)
    readers = [IndexedReader(prefix) for prefix in prefixes]
    _check_alike(readers)
    readers = _in_shard_order(readers)
    first = readers[0].metadata
    vocab_size = int(first["vocab_size"])
    with IndexedWriter(output_prefix, vocab_size, readers[0].weight_values) as writer:
        for reader in readers:
            with open(f"{reader.prefix}.bin", "rb") as source:
                num_bytes = reader.num_tokens * reader.dtype.itemsize
                lengths = read_all_lengths(reader.prefix)
                writer.add_tokens(source, num_bytes, lengths, reader.weight_numbers)
        names = {reader.metadata.get("domain") for reader in readers}
        agreed = str(first.get("domain")) if len(names) == 1 else Path(output_prefix).name
        writer.metadata = _joined_metadata(readers, domain or agreed)
    return sum(reader.num_tokens for reader in readers)


def _options_without_shard(reader: IndexedReader) -> dict[str, Any]:
    options = reader.metadata.get("options", {})
    return {name: value for name, value in options.items() if name != "shard"}


def _check_alike(readers: Sequence[IndexedReader]) -> None:
    first = readers[0]
    check_same_tokenizer(readers, "--input")
    for reader in readers:
        if "vocab_size" not in reader.metadata:
            raise ValueError(
                f"{reader.prefix}.json: is missing or names no vocab_size; only prefixes written "
                "by these tools can be joined"
            )
        if ("tokenizer" in reader.metadata) != ("tokenizer" in first.metadata):
            raise ValueError(
                f"--input: one of {first.prefix}.json and {reader.prefix}.json names no tokenizer; "
                "write both with the same one"
            )
        if reader.weight_values != first.weight_values or reader.is_chat != first.is_chat:
            raise ValueError(
                f"--input: weights of targets are {first.weight_values or 'none'} in "
                f"{first.prefix} and {reader.weight_values or 'none'} in {reader.prefix}; they "
                "must be equal: name both in the mixture instead"
            )
        reader.check_dtype()
        if _options_without_shard(reader) != _options_without_shard(first):
            raise ValueError(
                f"--input: {first.prefix} was written with {_options_without_shard(first)}, "
                f"{reader.prefix} with {_options_without_shard(reader)}; they must be equal"
            )


def _in_shard_order(readers: list[IndexedReader]) -> list[IndexedReader]:
    shards = [reader.metadata.get("options", {}).get("shard") for reader in readers]
    if not any(shards):
        return readers
    if not all(shards) or len({count for _, count in shards}) != 1:
        raise ValueError(
            "--input: shards can be joined only with the other shards of the same --shard I/N; "
            f"given are {shards}"
        )
    count = shards[0][1]
    missing = sorted(set(range(count)) - {number for number, _ in shards})
    if missing or len(shards) != count:
        raise ValueError(
            f"--input: {len(shards)} shards of {count} given, missing: "
            f"{', '.join(f'{number + 1}/{count}' for number in missing) or 'none, but one twice'}; "
            "give every shard once"
        )
    order = sorted(range(count), key=lambda at: shards[at][0])
    return [readers[at] for at in order]


def _joined_metadata(readers: Sequence[IndexedReader], domain: str) -> dict[str, Any]:
    """The `.json` of one run: shards list the same sources, others follow one another."""
    first = readers[0].metadata
    metadata = {"format": 1, "domain": domain, "tokenizer": first.get("tokenizer", {})}
    is_sharded = "shard" in first.get("options", {})
    sources: list[dict[str, Any]] = []
    for reader in readers:
        for number, source in enumerate(reader.metadata.get("sources", [])):
            if is_sharded and number < len(sources) and reader is not readers[0]:
                sources[number]["documents"] += source["documents"]
            else:
                sources.append(dict(source))
    metadata |= {"sources": sources, "options": _options_without_shard(readers[0])}
    if readers[0].is_chat:
        metadata["is_chat"] = True
    for name in ("skipped", "binary_files", "short_documents", "long_documents"):
        metadata[name] = sum(int(reader.metadata.get(name, 0)) for reader in readers)
    return metadata

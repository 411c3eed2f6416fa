"""JSON lines of conversations to an indexed prefix with weights of targets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lclm.data.indexed import IndexedWriter
from lclm.data.tokenizer import Tokenizer
from lclm.prepare.chat import ChatTemplate, check_conversation
from lclm.prepare.documents import read_records
from lclm.prepare.encoder import NUM_NAMED
from lclm.prepare.progress import Progress
from lclm.prepare.readers import Problem, Source, iterate_units
from lclm.prepare.resume import EncodeSummary


def encode_conversations(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    output_prefix: str,
    template: str,
    prompt_weight: float = 0.0,
    key: str = "messages",
    on_error: str = "stop",
    domain: str = "",
    end_token: str = "",
) -> EncodeSummary:
    """Write `<output_prefix>.bin/.idx/.weights/.json`; every conversation is a document.

    Args:
        sources: JSON lines; from `find_sources`.
        tokenizer: of the model.
        output_prefix: of the new files.
        template: llama3, chatml or tokenizer.
        prompt_weight: weight of everything that no assistant says; 0: not trained on.
        key: of the list of messages in each line.
        on_error: stop, or skip: count bad lines and go on.
        domain: name for the `.json`; empty: the last part of the prefix.
        end_token: see `ChatTemplate`.

    Raises:
        ValueError: a line is bad and on_error is "stop", the template does not fit the tokenizer,
            or there is no conversation. Nothing is written then.
    """
    if not 0 <= prompt_weight <= 1:
        raise ValueError(f"--prompt-weight {prompt_weight}: must be from 0 to 1")
    if any(source.documents for source in sources):
        raise ValueError("--chat: reads JSON lines only; leave other files out of --input")
    chat = ChatTemplate(template, tokenizer, end_token)
    summary = EncodeSummary([output_prefix])
    values = (prompt_weight, 1.0)
    total_bytes = sum(source.num_bytes for source in sources)
    with (
        IndexedWriter(output_prefix, tokenizer.vocab_size, values) as writer,
        Progress(Path(output_prefix).name, total_bytes) as progress,
    ):
        lines: dict[Path, int] = {}
        for unit in iterate_units(sources):
            assert unit.path is not None, "sources without documents give lines"
            for item in read_records(unit):
                lines[unit.path] = lines.get(unit.path, 0) + 1
                where = f"{unit.path}, line {lines[unit.path]}"
                if item is None:
                    continue
                try:
                    if isinstance(item, Problem):
                        raise ValueError(item.reason)
                    ids, targets = chat.encode(check_conversation(item, key))
                except ValueError as error:
                    if on_error == "stop":
                        raise ValueError(
                            f"{where}: {error}; mend it, or leave such input out with "
                            "--on-error skip"
                        ) from error
                    summary.num_skipped += 1
                    if len(summary.named) < NUM_NAMED:
                        summary.named.append(f"{where}: {error}")
                    continue
                writer.add_document(ids, np.array(targets, np.uint8))
                summary.num_documents += 1
                summary.num_tokens += len(ids)
            note = f"{summary.num_documents} conversations, {summary.num_tokens} tokens"
            progress.add(unit.num_bytes, note)
        if not summary.num_documents:
            raise ValueError(
                f"input {', '.join(str(source.path) for source in sources)}: gives no conversation "
                f"({summary.num_skipped} lines skipped); nothing was written"
            )
        writer.metadata = {
            "format": 1,
            "domain": domain or Path(output_prefix).name,
            "is_chat": True,
            "tokenizer": tokenizer.describe(),
            "sources": [
                {"path": str(source.path), "bytes": source.num_bytes} for source in sources
            ],
            "options": {
                "template": template,
                "prompt_weight": prompt_weight,
                "json_key": key,
                "end_token": end_token,
            },
            "skipped": summary.num_skipped,
        }
    return summary

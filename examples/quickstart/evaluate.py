"""Ask two exported models, before and after the extension, what a longer context is worth to them.

The Hugging Face folders are loaded and run by transformers alone. Three questions:

context  the loss on the last tokens of held-out code, the same tokens each time, given short and
         ever longer text before them
recall   how many answers of held-out recall documents are right, teacher-forced, at each length
sample   what greedy decoding writes after a prompt

Writes one JSON file; report.py draws it.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from lclm.command_line import make_parser
from lclm.files import replace_text

MAX_WINDOWS = 16
PROMPT = "def read_file(path):\n"
SAMPLE_TOKENS = 60


def read_jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def losses_of_last(model: torch.nn.Module, ids: list[int], num_targets: int) -> torch.Tensor:
    """Loss in nats of each of the last `num_targets` tokens of one text; fp64 [num_targets]."""
    logits = model(torch.tensor([ids]), logits_to_keep=num_targets + 1).logits[0, :-1]
    targets = torch.tensor(ids[-num_targets:])
    return torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")


def code_windows(folder: Path, tokenizer: AutoTokenizer, length: int) -> list[list[int]]:
    """Up to MAX_WINDOWS pieces of `length` tokens, dealt in turn from every held-out repository."""
    pieces = []
    for record in read_jsonl(folder / "code.jsonl"):
        # enough text for the pieces that can be used; longer repositories need not be read whole
        text = record["text"][: MAX_WINDOWS * length * 8]
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces.append([ids[i : i + length] for i in range(0, len(ids) - length + 1, length)])
    turns = max(map(len, pieces))
    return [own[i] for i in range(turns) for own in pieces if i < len(own)][:MAX_WINDOWS]


def measure_context(
    model: torch.nn.Module, windows: list[list[int]], lengths: list[int]
) -> dict[str, object]:
    """Mean loss on the same targets with each context length, and the gain over the shortest."""
    num_targets = lengths[0] // 2
    losses = {}
    for length in lengths:
        rows = [losses_of_last(model, window[-length:], num_targets) for window in windows]
        losses[length] = torch.stack(rows)
    gain = {}
    for length in lengths[1:]:
        # one number per window: tokens of a window are not independent
        differences = (losses[lengths[0]] - losses[length]).mean(dim=1)
        error = differences.std().item() / math.sqrt(len(differences))
        gain[length] = {"mean": differences.mean().item(), "standard_error": error}
    return {
        "num_windows": len(windows),
        "num_targets": num_targets,
        "loss": {length: values.mean().item() for length, values in losses.items()},
        "gain": gain,
    }


def recall_questions(
    record: dict[str, str], tokenizer: AutoTokenizer, length: int
) -> tuple[list[int], list[list[int]]]:
    """A document of exactly `length` tokens and, per answer, the places of its tokens in it."""
    ids = {}
    for part in ("card", "between"):
        ids[part] = tokenizer(record[part], add_special_tokens=False, verbose=False)["input_ids"]
    asked = tokenizer(record["questions"], add_special_tokens=False, return_offsets_mapping=True)
    room = length - len(ids["card"]) - len(asked["input_ids"])
    row = ids["card"] + ids["between"][: max(0, room)] + asked["input_ids"]
    start = len(row) - len(asked["input_ids"])
    answers, position = [], 0
    for line in record["questions"].splitlines(keepends=True):
        if " " in line:
            first, last = position + line.index(" "), position + len(line) - 1
            spans = enumerate(asked["offset_mapping"])
            answers.append([start + i for i, (a, b) in spans if a < last and b > first])
        position += len(line)
    return row, answers


@torch.no_grad()
def measure_recall(
    model: torch.nn.Module, folder: Path, tokenizer: AutoTokenizer
) -> dict[int, dict[str, int]]:
    """Right answers and questions at each length that make_corpus.py made documents for."""
    found = {}
    files = {int(path.stem.split("_")[1]): path for path in folder.glob("recall_*.jsonl")}
    for length, path in sorted(files.items()):
        num_right = num_asked = 0
        for record in read_jsonl(path):
            row, answers = recall_questions(record, tokenizer, length)
            kept = len(row) - answers[0][0] + 1
            guess = model(torch.tensor([row]), logits_to_keep=kept).logits[0].argmax(-1).tolist()
            offset = len(row) - kept
            for places in answers:
                num_right += all(guess[place - 1 - offset] == row[place] for place in places)
            num_asked += len(answers)
        found[length] = {"right": num_right, "asked": num_asked}
    return found


def write_sample(model: torch.nn.Module, tokenizer: AutoTokenizer, prompt: str) -> str:
    """What greedy decoding writes after the prompt."""
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    out = model.generate(**ids, do_sample=False, max_new_tokens=SAMPLE_TOKENS)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(folder: Path, held_out: Path, lengths: list[int]) -> Iterator[tuple[str, Any]]:
    """(name, result) of each question for one exported model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rope = model.config.to_dict()
    parameters = rope.get("rope_parameters") or rope
    yield "rope_base", float(parameters["rope_theta"])
    yield "trained_length", model.config.max_position_embeddings
    yield "num_parameters", sum(weight.numel() for weight in model.parameters())
    windows = code_windows(held_out, tokenizer, lengths[-1])
    yield "context", measure_context(model, windows, lengths)
    yield "recall", measure_recall(model, held_out, tokenizer)
    card = read_jsonl(held_out / f"recall_{lengths[0]}.jsonl")[0]
    first_answer = card["questions"].split(" ", 1)[0]
    for name, prompt in {"code": PROMPT, "recall": card["card"] + first_answer}.items():
        text = write_sample(model, tokenizer, prompt)
        yield f"sample_{name}", {"prompt": prompt, "text": text}


def summary(question: str, answer: Any) -> str:
    """One answer as a short line for the console."""
    if question == "context":
        losses = (f"{loss:.3f} given {length:,}" for length, loss in answer["loss"].items())
        return f"loss {', '.join(losses)} tokens"
    if question == "recall":
        shares = (f"{c['right']}/{c['asked']} at {length:,}" for length, c in answer.items())
        return f"{', '.join(shares)} tokens"
    if question.startswith("sample"):
        return repr(answer["text"][:40])
    return f"{answer:,.0f}"


def main() -> int:
    parser = make_parser(__doc__, "")
    parser.add_argument("--before", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--after", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--held-out", type=Path, required=True, help="made by make_corpus.py")
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="in tokens")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    results: dict[str, Any] = {"lengths": arguments.lengths}
    for name in ("before", "after"):
        results[name] = {}
        for question, answer in evaluate(
            getattr(arguments, name), arguments.held_out, arguments.lengths
        ):
            results[name][question] = answer
            print(f"  {name} the extension: {question}: {summary(question, answer)}", flush=True)
    replace_text(arguments.output, json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

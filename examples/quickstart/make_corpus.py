"""Make the quickstart's text from what every Python installation has: three domains.

    OUTPUT/code/<repository>/...py   the standard library's sources, a package or module each
    OUTPUT/prose.jsonl               pydoc's topics, and the docstrings of each module
    OUTPUT/recall_<length>.jsonl     synthetic documents that test looking things up, per length
    OUTPUT/recall_near.jsonl         the same with nothing between card and questions
    OUTPUT/held_out/code.jsonl       repositories that no training text holds
    OUTPUT/held_out/recall_<length>.jsonl

A recall document is a card of eight lines ("color blue"), then ordinary prose, then the card's
lines asked again in another order. The second word of an asked line can be known only from the
card, which stands further above the longer the document is: a test of context length that a model
of two million parameters can pass. A guess is right one time in eight.
"""

import argparse
import ast
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from lclm.command_line import make_parser
from lclm.files import replace_folder

SKIPPED = {
    "__phello__",
    "ensurepip",
    "encodings",  # tables of numbers
    "pydoc_data",  # taken as prose
    "site-packages",
    "test",  # as large as all the rest, and not installed everywhere
    "tests",
}
MIN_PROSE_CHARACTERS = 400
# Lengths are in characters until a tokenizer exists. A 4,096-word vocabulary trained on this text
# gives about 3.6 characters per token (measured; printed by tools/preprocess_data.py).
CHARACTERS_PER_TOKEN = 3.6
NEAR_TOKENS = 64  # a card and its questions, nothing between them (52 tokens), and some room
EVALUATED_DOCUMENTS = 12

# The card of a recall document: fields and what may stand in them; no word stands in two fields.
FIELDS = {
    "color": "red blue green white black yellow purple orange",
    "animal": "horse tiger rabbit donkey eagle dolphin turtle spider",
    "city": "Paris London Rome Tokyo Cairo Lima Oslo Delhi",
    "metal": "iron gold silver copper zinc lead nickel bronze",
    "month": "January March April June July August October November",
    "tool": "hammer needle ladder shovel anchor candle basket mirror",
    "tree": "oak pine cedar willow maple birch palm elm",
    "drink": "water coffee milk juice cider cocoa lemonade tea",
}


def find_repositories() -> dict[str, list[Path]]:
    """Repository name -> its .py files in path order; a single module is a repository of one."""
    root = Path(sysconfig.get_paths()["stdlib"])
    repositories = {}
    for path in sorted(root.iterdir()):
        if path.name in SKIPPED or path.name.startswith(("config-", "_sysconfigdata")):
            continue
        if path.suffix == ".py":
            repositories[path.stem] = [path]
        elif path.is_dir():
            files = [p for p in sorted(path.rglob("*.py")) if not SKIPPED.intersection(p.parts)]
            if files:
                repositories[path.name] = files
    return repositories


def read_source(path: Path) -> str:
    """The file's text, "" where it is not UTF-8 (a few sources declare another encoding)."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return ""


def docstrings(source: str) -> Iterator[str]:
    """Every docstring of a module that is longer than a line, in order of appearance."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and "\n" in text:
                yield text


def make_prose(repositories: dict[str, list[Path]]) -> list[str]:
    """pydoc's topics, then one document of docstrings per module."""
    from pydoc_data.topics import topics

    documents = [text.strip() for _, text in sorted(topics.items())]
    for files in repositories.values():
        for path in files:
            documents.append("\n\n".join(docstrings(read_source(path))))
    return [text for text in documents if len(text) >= MIN_PROSE_CHARACTERS]


def make_card(rng: random.Random) -> tuple[str, str]:
    """A card and its questions: one line per field, the same lines in another order."""
    lines = [f"{field} {rng.choice(values.split())}\n" for field, values in FIELDS.items()]
    rng.shuffle(lines)
    card = "Card\n" + "".join(lines)
    rng.shuffle(lines)
    return card, "Asked\n" + "".join(lines)


def cut_prose(prose: list[str], num_tokens: float, rng: random.Random) -> str:
    """A stretch of about `num_tokens` tokens from prose documents, "" for less than one."""
    wanted = int(num_tokens * CHARACTERS_PER_TOKEN)
    text = ""
    while len(text) < wanted:
        text += rng.choice(prose) + "\n"
    start = rng.randrange(len(text) - wanted + 1)
    return f"\n{text[start : start + wanted]}\n\n" if wanted > 0 else ""


def recall_example(num_tokens: int, prose: list[str], rng: random.Random) -> dict[str, object]:
    """One document for evaluation, in parts: the middle is trimmed to an exact length there."""
    card, questions = make_card(rng)
    return {
        "card": card,
        "between": cut_prose(prose, 1.5 * num_tokens, rng),
        "questions": questions,
    }


def recall_text(num_tokens: int, prose: list[str], rng: random.Random) -> dict[str, object]:
    """One training document of a little over `num_tokens` tokens.

    The card is asked twice, each time far from where its answers last stood. Prose after the last
    question makes the document long enough to be cut at `num_tokens` exactly.
    """
    card, questions = make_card(rng)
    parts = [card]
    for _ in range(2):
        parts += [cut_prose(prose, num_tokens * rng.uniform(0.3, 0.45), rng), questions]
    return {"text": "".join(parts) + cut_prose(prose, 0.6 * num_tokens, rng)}


def short_recall_text(max_tokens: int, prose: list[str], rng: random.Random) -> dict[str, object]:
    """One training document of up to about `max_tokens` tokens, with the question at its end."""
    card, questions = make_card(rng)
    between = (max_tokens - 64) * rng.random() ** 2
    return {"text": card + cut_prose(prose, between, rng) + questions}


def write_jsonl(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main() -> int:
    parser = make_parser(__doc__, "")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="recall, in tokens")
    parser.add_argument("--recall-tokens", type=int, required=True, help="tokens per recall length")
    parser.add_argument("--max-characters", type=int, default=8_000_000, help="of code")
    parser.add_argument("--seed", type=int, default=1234)
    arguments = parser.parse_args()

    rng = random.Random(arguments.seed)
    with replace_folder(arguments.output) as work:
        (work / "held_out").mkdir()
        print(fill_corpus(work, arguments, rng))
    return 0


def fill_corpus(work: Path, arguments: argparse.Namespace, rng: random.Random) -> str:
    """Write every file of the corpus into `work`; return one line that says how much."""
    repositories = find_repositories()
    names = sorted(repositories)
    rng.shuffle(names)
    held_out, train, characters, num_long = {}, {}, 0, 0
    for name in names:
        text = "\n".join(read_source(path) for path in repositories[name])
        # held out: every fifth of those long enough to be asked about at the longest length
        is_long = len(text) > arguments.lengths[-1] * CHARACTERS_PER_TOKEN * 1.5
        num_long += is_long
        if is_long and num_long % 5 == 1:
            held_out[name] = text
        elif characters + len(text) <= arguments.max_characters:
            train[name] = repositories[name]
            characters += len(text)
    root = Path(sysconfig.get_paths()["stdlib"])
    for name, files in train.items():
        for path in files:
            below = path.relative_to(root)
            target = (
                work / "code" / name / (below.relative_to(name) if len(files) > 1 else path.name)
            )
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(read_source(path), encoding="utf-8")
    write_jsonl(
        work / "held_out" / "code.jsonl",
        [{"name": name, "text": text} for name, text in held_out.items()],
    )
    prose = make_prose(train)
    write_jsonl(work / "prose.jsonl", [{"text": text} for text in prose])
    # Looking something up is learned first where nothing lies between card and questions: an
    # untrained model attends to all tokens alike, and there only few tokens share its attention.
    near = ["".join(make_card(rng)) for _ in range(arguments.recall_tokens // NEAR_TOKENS)]
    write_jsonl(work / "recall_near.jsonl", [{"text": text} for text in near])
    for length in arguments.lengths:
        make = short_recall_text if length == arguments.lengths[0] else recall_text
        count = max(2, arguments.recall_tokens // length)
        records = [make(length, prose, rng) for _ in range(count)]
        write_jsonl(work / f"recall_{length}.jsonl", records)
    for length in (NEAR_TOKENS, *arguments.lengths):
        records = [recall_example(length, prose, rng) for _ in range(EVALUATED_DOCUMENTS)]
        write_jsonl(work / "held_out" / f"recall_{length}.jsonl", records)
    return (
        f"{len(train)} repositories of code ({characters / 1e6:.1f} MB), {len(held_out)} held out "
        f"({', '.join(sorted(held_out))}); {len(prose)} documents of prose "
        f"({sum(map(len, prose)) / 1e6:.1f} MB); recall documents of "
        f"{', '.join(map(str, arguments.lengths))} tokens"
    )


if __name__ == "__main__":
    sys.exit(main())

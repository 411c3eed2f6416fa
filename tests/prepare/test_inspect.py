"""tools/inspect_data.py and what --verify finds."""

import importlib.util
import json
from pathlib import Path

import pytest

from lclm.data.indexed import IndexedWriter
from lclm.data.tokenizer import load_tokenizer
from lclm.prepare.verify import verify_prefix

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("inspect_data", ROOT / "tools" / "inspect_data.py")
inspect_data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(inspect_data)


@pytest.fixture
def prefix(tmp_path, tokenizer_files):
    tokenizer = load_tokenizer(tokenizer_files["hf"])
    with IndexedWriter(tmp_path / "books", tokenizer.vocab_size) as writer:
        for text in ("hello world", "the cat sat", "hill", "numbers 123"):
            writer.add_document([*tokenizer.encode(text), tokenizer.eod_id])
    return str(tmp_path / "books")


def test_counts_histogram_and_rows(prefix, tokenizer_files, capsys, tmp_path):
    picture = tmp_path / "lengths.png"
    code = inspect_data.main(
        [prefix, "--verify", "--seq-length", "16", "--packing", "best-fit", "--row", "0",
         "--tokenizer", str(tokenizer_files["hf"]), "--histogram", str(picture)]
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert code == 0 and "books: 4 documents" in shown and "verified: largest id" in shown
    assert "of padding" in shown and "--- [0, " in shown and "<|end_of_text|>" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_two_domains_show_their_shares(prefix, capsys):
    assert inspect_data.main([prefix, prefix]) == 0
    assert capsys.readouterr().out.count(" 50.00% ") == 2


def change_json(prefix, **fields):
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: Path(f"{p}.bin").write_bytes(Path(f"{p}.bin").read_bytes()[:-2]), "cut short"),
        (
            lambda p: Path(f"{p}.bin").write_bytes(b"\xff\xff" + Path(f"{p}.bin").read_bytes()[2:]),
            r"token 0 \(document 0\) is 65535, the vocabulary has",
        ),
        (lambda p: change_json(p, documents=9), "documents is 9, the files have 4"),
        (lambda p: change_json(p, vocab_size=100_000), "asks for int32"),
        (
            lambda p: Path(f"{p}.idx").write_bytes(
                Path(f"{p}.idx").read_bytes()[:9] + b"\2" + Path(f"{p}.idx").read_bytes()[10:]
            ),
            "index version 2",
        ),
    ],
)
def test_verify_names_what_is_wrong(prefix, damage, message, capsys):
    verify_prefix(prefix)
    damage(prefix)
    with pytest.raises(ValueError, match=message):
        verify_prefix(prefix)
    assert inspect_data.main([prefix, "--verify"]) == 2
    assert "inspect_data: error:" in capsys.readouterr().err


def test_bad_usage(prefix, capsys):
    assert inspect_data.main([prefix, "--row", "1"]) == 2
    assert "give --seq-length and --tokenizer" in capsys.readouterr().err
    assert inspect_data.main(["nowhere"]) == 2

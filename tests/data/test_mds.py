"""MDS shards that mosaicml-streaming wrote (mds/make_shards.py), and retokenizing."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lclm.data.indexed import IndexedReader, IndexedWriter
from lclm.data.mds import MdsReader
from lclm.data.stage_rows import StageRows
from lclm.data.tokenizer import load_tokenizer
from lclm.prepare.retokenize import retokenize
from tests.data_fixtures import mixture_entry

ROOT = Path(__file__).resolve().parents[2]
SHARDS = Path(__file__).resolve().parent / "mds"
SPANS = {0: [[0, 5], [5, 12], [12, 16]], 1: [[0, 16]], 2: [[0, 1], [1, 10], [10, 14]]}


def tokens_of(row, start, end):
    return [(row * 1000 + t) % 60000 for t in range(start, end)]


def test_packed_shards():
    reader = MdsReader(SHARDS / "packed")
    assert reader.num_samples == 6 and not reader.has_weights
    expected = [tokens_of(row, *span) for row in range(6) for span in SPANS[row % 3]]
    assert [tokens.tolist() for tokens, _ in reader.documents()] == expected


def test_compressed_shards_with_masks():
    documents = list(MdsReader(SHARDS / "chat").documents())
    spans = [(row, *span) for row in range(3) for span in SPANS[row]]
    assert [tokens.tolist() for tokens, _ in documents] == [tokens_of(*span) for span in spans]
    masks = [[int(t % 3 > 0) for t in range(start, end)] for _, start, end in spans]
    assert [mask.tolist() for _, mask in documents] == masks


def test_shards_before_packing():
    reader = MdsReader(SHARDS / "raw")
    lengths = (7, 300, 2)
    expected = [tokens_of(row, 0, length) for row, length in enumerate(lengths)]
    assert [tokens.tolist() for tokens, _ in reader.documents()] == expected


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("packed", lambda raw: raw[:-9], "index.json says 492; the shard is cut short"),
        ("packed", lambda raw: b"\7" + raw[1:], "number of samples differs"),
        ("packed", lambda raw: raw[:8] + b"\xff" * 8 + raw[16:], "sample 0: cannot be read"),
        ("chat", lambda raw: raw[:-9], "holds 0 bytes|cut short|cannot be decompressed"),
        ("chat", lambda raw: b"zzzz" + raw[4:], "cannot be decompressed"),
    ],
)
def test_damaged_shards_are_named(tmp_path, name, damage, message):
    shutil.copytree(SHARDS / name, tmp_path / name)
    shard = sorted((tmp_path / name).glob("shard.00000*"))[0]
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        list(MdsReader(tmp_path / name).documents())
    assert shard.name in str(caught.value)


def test_folders_that_are_not_mds(tmp_path):
    with pytest.raises(ValueError, match="is not the index of an MDS folder"):
        MdsReader(tmp_path)
    index = json.loads((SHARDS / "raw" / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"shard.00000.mds: no such file"):
        list(MdsReader(tmp_path).documents())
    text = (tmp_path / "index.json").read_text()
    (tmp_path / "index.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"index\.json: is not the index of an MDS folder"):
        MdsReader(tmp_path)
    index["version"] = 3
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="only mds of version 2"):
        MdsReader(tmp_path)


class Wide:
    """A tokenizer of 60,000 tokens, for the ids of the shards."""

    vocab_size, eod_id, bos_id, kind, path, sha256 = 60000, 1, 0, "hf", Path("x"), "0" * 64
    files: list[Path] = []  # noqa: RUF012

    def describe(self):
        return {"sha256": self.sha256}


def test_spans_and_masks_reach_the_rows(tmp_path):
    prefix = str(tmp_path / "chat")
    assert retokenize(str(SHARDS / "chat"), prefix, Wide()) == (7, 46)
    reader = IndexedReader(prefix)
    assert reader.lengths.tolist() == [5, 7, 4, 16, 1, 9, 4]
    assert reader.read_weights(1, 2, 3).tolist() == [float(t % 3 > 0) for t in (7, 8, 9)]
    rows = StageRows([mixture_entry(prefix, "concat", 0, 1.0)], 23, 2, 1)
    for row in map(rows.row, range(2)):
        position = row.tokens % 1000  # tokens tell their place in the sample
        assert row.token_weights.tolist() == (position % 3 > 0).astype(float).tolist()
    Path(f"{prefix}.weights").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"chat\.weights: has 1 bytes"):
        IndexedReader(prefix)


def test_conversations_stay_whole_in_best_fit(tmp_path, write_prefix):
    """Shards with masks hold conversations, also once their prefix is written anew."""
    first, second, plain = (str(tmp_path / name) for name in ("chat", "again", "plain"))
    retokenize(str(SHARDS / "chat"), first, Wide())
    retokenize(first, second, Wide())
    retokenize(str(SHARDS / "packed"), plain, Wide())
    for prefix in (first, second):
        # conversations of 5, 7, 4, 16, 1, 9 and 4 tokens: the one of 16 fits no row of 12
        rows = StageRows([mixture_entry(prefix, "best-fit", 0, 1.0)], 12, 3, 1)
        pieces = sorted(n for r in map(rows.row, range(3)) for n in r.doc_lengths[:-1].tolist())
        assert "1 conversations longer than a row left out" in rows.summary()
        assert all(n in (5, 7, 4, 1, 9) for n in pieces) and len(pieces) >= 3
    rows = StageRows([mixture_entry(plain, "best-fit", 0, 1.0)], 12, 3, 1)
    assert "longer than a row left out" not in rows.summary()


def test_one_tokenizer_to_another(tmp_path, tokenizer_files):
    old, new = (load_tokenizer(tokenizer_files[kind]) for kind in ("tiktoken", "hf"))
    texts = ["hello world", "caf\u00e9 \u4e2d", "", "the cat"]
    with IndexedWriter(tmp_path / "old", old.vocab_size) as writer:
        writer.metadata = {"tokenizer": old.describe()}
        for text in texts:
            ids = old.encode(text)
            writer.add_document([old.bos_id, *ids, old.eod_id] if ids else [])
    command = [sys.executable, ROOT / "tools/retokenize.py", "--input", tmp_path / "old",
               "--tokenizer", tokenizer_files["tiktoken"], "--to-tokenizer", tokenizer_files["hf"],
               "--append-eod", "--output-prefix", tmp_path / "new"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reader = IndexedReader(tmp_path / "new")
    found = [reader.read(number).tolist() for number in range(len(reader))]
    assert found == [[*new.encode(text), new.eod_id] for text in texts if text]
    assert reader.metadata["tokenizer"]["sha256"] == new.sha256
    wrong = [*command[:5], tokenizer_files["sentencepiece"], *command[6:]]
    done = subprocess.run(wrong, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "written with another tokenizer" in done.stderr


def test_what_cannot_be_done_is_refused(tmp_path, tokenizer_files):
    small = load_tokenizer(tokenizer_files["hf"])
    packed, chat = str(SHARDS / "packed"), str(SHARDS / "chat")
    with pytest.raises(ValueError, match="masks of tokens"):
        retokenize(chat, str(tmp_path / "x"), Wide(), small)
    with pytest.raises(ValueError, match="the data holds"):
        retokenize(packed, str(tmp_path / "x"), small, small)
    with pytest.raises(ValueError, match="the vocabulary has"):
        retokenize(packed, str(tmp_path / "x"), small)
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(ValueError, match="has 1 weights; give one for each"),
        IndexedWriter(tmp_path / "w", 100, (0.0, 1.0)) as writer,
    ):
        writer.add_document([1, 2], np.array([1]))
    assert list(tmp_path.iterdir()) == []


def write_old(tmp_path, old, documents):
    with IndexedWriter(tmp_path / "old", old.vocab_size) as writer:
        writer.metadata = {"tokenizer": old.describe()}
        for ids in documents:
            writer.add_document(ids)
    return str(tmp_path / "old")


@pytest.mark.parametrize("kinds", [("tiktoken", "hf"), ("sentencepiece", "hf"), ("hf", "tiktoken")])
def test_special_tokens_inside_a_document(tmp_path, tokenizer_files, kinds):
    """A packed sequence of several texts, as shards without `indices` hold them."""
    old, new = (load_tokenizer(tokenizer_files[kind]) for kind in kinds)
    first, second = old.encode("hello world"), old.encode("the cat")
    packed = [old.bos_id, *first, old.eod_id, old.bos_id, *second, old.eod_id]
    only = [old.eod_id, old.eod_id, old.eod_id]
    source = write_old(tmp_path, old, [packed, [*first, old.eod_id, *second], only, [old.eod_id]])
    retokenize(source, str(tmp_path / "new"), old, new, append_eod=True)
    reader = IndexedReader(tmp_path / "new")
    one, two = new.encode("hello world"), new.encode("the cat")
    assert [reader.read(number).tolist() for number in range(len(reader))] == [
        [*one, new.eod_id, new.bos_id, *two, new.eod_id],
        [*one, new.eod_id, *two, new.eod_id],
        [new.eod_id] * 3,
    ]


def test_other_special_tokens_are_refused_by_name(tmp_path, tokenizer_files):
    old, new = (load_tokenizer(tokenizer_files[kind]) for kind in ("tiktoken", "hf"))
    eot = old.special_id("<|eot_id|>")
    source = write_old(tmp_path, old, [old.encode("hello"), [*old.encode("hello"), eot, 5]])
    with pytest.raises(ValueError, match=rf"special token <\|eot_id\|> \({eot}\).* no counterpart"):
        retokenize(source, str(tmp_path / "new"), old, new)
    new.bos_id = None  # a tokenizer without a begin of text
    source = write_old(tmp_path, old, [[5, old.bos_id, 5]])
    with pytest.raises(ValueError, match=r"special token <\|begin_of_text\|> .* no counterpart"):
        retokenize(source, str(tmp_path / "new"), old, new)
    assert not list(tmp_path.glob("new*"))


def change_spans(folder, change):
    """Change the spans of the first sample of the packed shards; every other byte stays."""
    shutil.copytree(SHARDS / "packed", folder)
    shard = folder / "shard.00000.mds"
    spans = np.array(SPANS[0], np.uint32)
    raw = shard.read_bytes()
    assert raw.count(spans.tobytes()) == 1
    shard.write_bytes(raw.replace(spans.tobytes(), change(spans).astype(np.uint32).tobytes()))


def test_tokens_outside_every_span_are_counted(tmp_path, caplog):
    change_spans(tmp_path / "s", lambda spans: spans - np.array([[0, 2], [0, 0], [0, 1]]))
    logging.getLogger("lclm").propagate = True
    sources = {"whole": SHARDS / "packed", "cut": tmp_path / "s"}
    written = {name: retokenize(str(source), str(tmp_path / name), Wide())
               for name, source in sources.items()}  # fmt: skip
    # of six samples of 16 tokens the third and the last have spans for 14
    assert written == {"whole": (14, 92), "cut": (14, 89)}
    for name, num_outside in (("whole", 4), ("cut", 7)):
        assert f"{sources[name]}: {num_outside} tokens lie outside every span" in caplog.text
        metadata = IndexedReader(tmp_path / name).metadata
        assert metadata["tokens_outside_spans"] == num_outside


def test_spans_that_overlap_are_refused(tmp_path):
    change_spans(tmp_path / "s", lambda spans: spans - np.array([[0, 0], [2, 0], [0, 0]]))
    with pytest.raises(
        ValueError, match=r"shard\.00000\.mds, sample 0: indices overlap at token 3"
    ):
        list(MdsReader(tmp_path / "s").documents())

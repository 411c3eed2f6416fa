"""Indexed files equal Megatron's byte for byte and are read back; damaged ones are refused."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from lclm.data.indexed import IndexedReader, IndexedWriter, dtype_for_vocab, length_histogram

VOCABS = (256, 65499, 65500, 128256)


def write_documents(prefix: Path, docs: list[list[int]], vocab_size: int) -> None:
    with IndexedWriter(prefix, vocab_size) as writer:
        for ids in docs:
            writer.add_document(ids)


def random_documents(vocab_size: int, lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(vocab_size)
    return [rng.integers(0, vocab_size, n).tolist() for n in lengths]


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("lengths", [[3, 1, 40, 7], [5, 0, 0, 2, 0], [1]])
def test_bytes_equal_megatrons_builder(tmp_path, vocab_size, lengths):
    docs = random_documents(vocab_size, lengths)
    write_documents(tmp_path / "ours", docs, vocab_size)
    theirs = IndexedDatasetBuilder(
        str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size)
    )
    for ids in docs:
        # as Megatron-LM's tools/preprocess_data.py does: no sequence for an empty document
        theirs.add_document(ids, [len(ids)] if ids else [])
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for ending in (".bin", ".idx"):
        ours = (tmp_path / f"ours{ending}").read_bytes()
        assert ours == (tmp_path / f"theirs{ending}").read_bytes()


@pytest.mark.parametrize("vocab_size", VOCABS)
def test_megatron_reads_what_we_write(tmp_path, vocab_size):
    docs = random_documents(vocab_size, [4, 9, 1])
    write_documents(tmp_path / "x", docs, vocab_size)
    dataset = IndexedDataset(str(tmp_path / "x"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == docs
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]
    assert dataset.index.dtype == dtype_for_vocab(vocab_size)


def test_reader_gives_documents_and_ranges(tmp_path):
    docs = random_documents(1000, [4, 0, 9, 1])
    write_documents(tmp_path / "x", docs, 1000)
    reader = IndexedReader(tmp_path / "x")
    assert reader.lengths.tolist() == [4, 9, 1] and reader.lengths.dtype == np.int32
    assert reader.num_tokens == 14 and len(reader) == 3
    assert reader.read(1).tolist() == docs[2]
    assert reader.read(1, 2, 3).tolist() == docs[2][2:5]
    assert reader.read(2, 1).tolist() == []


@pytest.mark.parametrize(
    ("doc", "offset", "length"), [(0, 0, 5), (0, -1, 2), (3, 0, 1), (0, 3, -1)]
)
def test_reading_outside_a_document_is_refused(tmp_path, doc, offset, length):
    write_documents(tmp_path / "x", [[1, 2, 3, 4], [5, 6]], 100)
    with pytest.raises(ValueError, match="document"):
        IndexedReader(tmp_path / "x").read(doc, offset, length)


def test_documents_of_several_sequences_are_joined(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    builder.add_document([1, 2, 3, 4, 5], [2, 3])
    builder.add_document([6], [1])
    builder.finalize(str(tmp_path / "x.idx"))
    reader = IndexedReader(tmp_path / "x")
    assert reader.lengths.tolist() == [5, 1]
    assert reader.read(0).tolist() == [1, 2, 3, 4, 5]
    assert reader.metadata == {}


def test_metadata_describes_the_files(tmp_path):
    with IndexedWriter(tmp_path / "x", 300) as writer:
        writer.metadata["domain"] = "books"
        for ids in ([1], [2, 3], [], [4, 5, 6], [7] * 4):
            writer.add_document(ids)
    metadata = json.loads((tmp_path / "x.json").read_text())
    assert metadata == {
        "domain": "books",
        "vocab_size": 300,
        "dtype": "uint16",
        "tokens": 10,
        "documents": 4,
        "empty_documents": 1,
        "length_histogram": {"1": 1, "2": 2, "4": 1},
    }


def test_histogram_bins_are_powers_of_two():
    lengths = np.array([1, 2, 3, 4, 7, 8, 2**30 - 1, 2**30, 2**31 - 1], np.int32)
    assert length_histogram(lengths) == {
        "1": 1, "2": 2, "4": 2, "8": 1, str(2**29): 1, str(2**30): 2
    }  # fmt: skip


def test_nothing_is_left_when_writing_fails(tmp_path):
    with pytest.raises(ValueError, match="ids from -1"):
        write_documents(tmp_path / "x", [[1, 2], [-1]], 10)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rewrite_keeps_the_old_files(tmp_path):
    write_documents(tmp_path / "x", [[1, 2, 3]], 10)
    with pytest.raises(ValueError, match="ids from 10 to 10, the vocabulary has 10"):
        write_documents(tmp_path / "x", [[4], [10]], 10)
    assert IndexedReader(tmp_path / "x").read(0).tolist() == [1, 2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json"]


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"x\.bin: no such file"):
        IndexedReader(tmp_path / "x")


@pytest.fixture
def written(tmp_path):
    write_documents(tmp_path / "x", [[1, 2, 3], [4, 5]], 70000)
    return tmp_path / "x"


def test_short_bin(written):
    path = written.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"x\.bin: has 16 bytes, but x\.idx describes 20"):
        IndexedReader(written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"NOTANIDX!" + raw[9:], "not an index of Megatron's format"),
        (lambda raw: raw[:5], "not an index of Megatron's format"),
        (lambda raw: raw[:9] + struct.pack("<Q", 2) + raw[17:], "index version 2"),
        (lambda raw: raw[:17] + b"\x07" + raw[18:], "dtype code 7"),
        (lambda raw: raw[:-3], "its header asks for"),
        (lambda raw: raw[:-8] + struct.pack("<q", 9), "document borders must rise"),
        (lambda raw: raw[:42] + struct.pack("<q", 4) + raw[50:], "byte offsets do not follow"),
    ],
)
def test_damaged_index(written, change, message):
    path = written.with_suffix(".idx")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        IndexedReader(written)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ('{"tokens": 4}', "another")])
def test_metadata_of_other_files(written, text, message):
    written.with_suffix(".json").write_text(text)
    with pytest.raises(ValueError, match=message):
        IndexedReader(written)

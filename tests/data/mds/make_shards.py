"""Write the shards beside this file with mosaicml-streaming, as ProLong's data is laid out.

Run once in an environment of its own; the package replaces torch, transformers and numpy:

    python -m venv /tmp/mosaic && /tmp/mosaic/bin/pip install mosaicml-streaming==0.13.0
    /tmp/mosaic/bin/python tests/data/mds/make_shards.py

`packed`: two shards, spans in `indices`. `chat`: `mask` as well, zstd. `raw`: documents before
packing, no spans. Token t of row r is (r * 1000 + t) % 60000; test_mds.py relies on it.
"""

import shutil
from pathlib import Path

import numpy as np
from streaming import MDSWriter

HERE = Path(__file__).resolve().parent
SPANS = {0: [[0, 5], [5, 12], [12, 16]], 1: [[0, 16]], 2: [[0, 1], [1, 10], [10, 14]]}


def tokens_of(row: int, length: int) -> np.ndarray:
    return ((np.arange(length) + row * 1000) % 60000).astype(np.uint32)


def main() -> None:
    common = {"domain": "str", "input_ids": "ndarray:uint32", "length": "int"}
    spans = common | {"indices": "ndarray:uint32"}
    for name in ("packed", "chat", "raw"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    with MDSWriter(out=str(HERE / "packed"), columns=spans, size_limit=600) as out:
        for row in range(6):
            indices = np.array(SPANS[row % 3], np.uint32)
            ids = tokens_of(row, 16)
            out.write({"domain": "book", "input_ids": ids, "length": 16, "indices": indices})
    columns = spans | {"mask": "ndarray:uint8"}
    options = {"compression": "zstd", "hashes": ["sha1"]}
    with MDSWriter(out=str(HERE / "chat"), columns=columns, **options) as out:
        for row in range(3):
            mask = (np.arange(16) % 3 > 0).astype(np.uint8)
            sample = {"domain": "chat", "input_ids": tokens_of(row, 16), "length": 16}
            out.write(sample | {"indices": np.array(SPANS[row], np.uint32), "mask": mask})
    with MDSWriter(out=str(HERE / "raw"), columns=common) as out:
        for row, length in enumerate((7, 300, 2)):
            sample = {"domain": "wiki", "input_ids": tokens_of(row, length), "length": length}
            out.write(sample)


if __name__ == "__main__":
    main()

"""Rows of documents drawn from a histogram of document lengths, to judge plans on."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_COLUMNS = ["shortest", "longest", "documents"]


@dataclass(frozen=True, eq=False)
class LengthHistogram:
    """How many documents of a corpus have which length; arrays are int64 [bins]."""

    shortest: np.ndarray  # tokens, included
    longest: np.ndarray  # tokens, included
    documents: np.ndarray  # counts

    def draw_row(
        self, rng: np.random.Generator, row_length: int, longest: int | None = None
    ) -> np.ndarray:
        """Fill one row with documents in random order.

        Bins are drawn by their counts, lengths evenly within a bin. A document longer than
        `longest` comes as pieces of that length and a tail; the last document is cut at the end of
        the row.

        Returns:
            int64 [documents], all positive, adding up to `row_length`.

        Raises:
            ValueError: row_length or longest below 1.
        """
        longest = row_length if longest is None else longest
        if row_length < 1 or longest < 1:
            raise ValueError(
                f"row_length={row_length} and longest={longest} must be at least 1 token"
            )
        shares = self.documents / self.documents.sum()
        lengths: list[int] = []
        left = row_length
        while left:
            bin_number = rng.choice(len(shares), p=shares)
            drawn = int(rng.integers(self.shortest[bin_number], self.longest[bin_number] + 1))
            document = min(max(1, drawn), left)
            left -= document
            lengths += [longest] * (document // longest)
            lengths += [document % longest] if document % longest else []
        return rng.permutation(np.array(lengths))


def read_histogram(path: Path) -> LengthHistogram:
    """Read a CSV file with the columns shortest, longest, documents; `#` starts a comment line.

    Raises:
        ValueError: the file is missing or not of that form.
    """
    if not path.is_file():
        raise ValueError(f"histogram: {path} is not a file; give a CSV of {','.join(_COLUMNS)}")
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    header, *rows = list(csv.reader(lines)) or [[]]
    if header != _COLUMNS:
        raise ValueError(f"histogram: {path} has the columns {header}, it needs {_COLUMNS}")
    try:
        values = np.array([[int(cell) for cell in row] for row in rows], dtype=np.int64)
    except ValueError as error:
        raise ValueError(f"histogram: {path} holds something else than counts: {error}") from error
    if values.shape != (len(rows), 3) or not len(rows):
        raise ValueError(f"histogram: {path} needs lines of three numbers, one per bin")
    shortest, longest, documents = values.T
    if (shortest < 0).any() or (longest < shortest).any() or (documents < 0).any():
        raise ValueError(f"histogram: {path}: need 0 <= shortest <= longest and counts >= 0")
    if longest[documents > 0].sum() == 0:
        raise ValueError(f"histogram: {path} holds no documents with tokens")
    return LengthHistogram(shortest, longest, documents)

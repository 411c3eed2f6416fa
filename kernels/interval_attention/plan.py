"""Host-side plan of an interval mask: validation, and the parts that dense operators can compute.

Letters: T query tokens, S key tokens. Row t sees the keys [lo[t], hi[t]). Pure NumPy.

How a mask is cut into parts (`Part`), for the `cpu` implementation, which hands each of them to a
dense operator:

- Rows that all see the same keys are one rectangle.
- Other rows are cut into tiles of at most TILE rows whose key window, from the last key of the
  tile's first row to the last key of its last row, is at most TILE wide. The window is one masked
  TILE x TILE block, or one causal square; what a row sees left of the window is a rectangle.

This is why the rule is so: dense operators work in blocks of 64 to 512 keys, so a
causal call on a document of 1,000 tokens computes up to half as many pairs again as it has.
Tiles keep the waste to TILE / 2 keys per row whatever the length, and their number depends on T
alone: 2,048 documents of 4 tokens make the same 64 tiles as one of 8,192. Tiles that follow one
another at equal steps are one batched call on strided views, without a copy.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from .tiles import build_key_bounds, build_key_tiles, build_query_tiles

TILE = 128
# A stretch of tiles under long rectangles first gets one rectangle of COARSE_TILES * TILE rows:
# the operators reach full speed from about 768 rows on.
COARSE_TILES = 8


@dataclass(frozen=True)
class Part:
    """`num_tiles` equal blocks of rows x keys, `row_step` rows and `key_step` keys apart."""

    row_start: int
    num_rows: int
    key_start: int
    num_keys: int
    is_causal: bool = False  # square; row i sees keys 0..i of the block
    is_masked: bool = False  # neither full nor causal: needs `mask`
    is_first: bool = False  # no earlier part touches these rows
    num_tiles: int = 1
    row_step: int = 0
    key_step: int = 0


@dataclass(frozen=True)
class DeviceTiles:
    """A tile table on a device; see `tiles.py`."""

    table: torch.Tensor  # int32 [tiles, 5]
    num_seen: int  # leading rows whose range is not empty


@dataclass(frozen=True)
class IntervalPlan:
    """A validated interval mask. Build it with `make_plan`; share it between layers."""

    lo: torch.Tensor  # int32 [T], on the host
    hi: torch.Tensor  # int32 [T], on the host
    num_keys: int
    parts: tuple[Part, ...]  # each non-empty row's is_first part comes before its other parts
    _hidden: dict = field(default_factory=dict, compare=False, repr=False)
    _on_device: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_queries(self) -> int:
        """T."""
        return len(self.lo)

    @property
    def num_pairs(self) -> int:
        """Visible (query, key) pairs, per head."""
        return int((self.hi.long() - self.lo.long()).sum())

    def bias(self, index: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the mask of parts[index] as 0 / -inf, [num_tiles, 1, rows, keys]; None if it has
        none. The mask is made and moved to the device once per plan."""
        part = self.parts[index]
        if not part.is_masked:
            return None
        key = (index, device)
        if key not in self._hidden:
            self._hidden[key] = self._hidden_keys(part).to(device)
        hidden = self._hidden[key]
        bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
        return bias.masked_fill_(hidden, float("-inf"))

    def query_tiles(self, block: int, step: int, device: torch.device) -> DeviceTiles:
        """Return `build_query_tiles` on the device. Like all that follows, it is made and uploaded
        at the first call and then kept: call it one micro-batch ahead to have it in time."""

        def build() -> DeviceTiles:
            return _upload_tiles(build_query_tiles(*self._numpy(), block, step), device)

        return self._keep(("query", block, step, device), build)

    def key_tiles(self, block: int, step: int, device: torch.device) -> DeviceTiles:
        """Return `build_key_tiles` on the device."""

        def build() -> DeviceTiles:
            lo, hi, rows = self._numpy()
            table = build_key_tiles(lo, hi, self.num_keys, rows, block, step)
            return _upload_tiles(table, device)

        return self._keep(("key", block, step, device), build)

    def key_bounds(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `build_key_bounds`, int32 [S] each, on the device."""

        def build() -> tuple[torch.Tensor, ...]:
            lo, hi, rows = self._numpy()
            bounds = build_key_bounds(lo, hi, self.num_keys, rows)
            return tuple(_upload(torch.from_numpy(bound), device) for bound in bounds)

        return self._keep(("bounds of keys", device), build)

    def bounds(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (lo, hi) on the device."""
        key = ("bounds", device)
        return self._keep(key, lambda: (_upload(self.lo, device), _upload(self.hi, device)))

    def _numpy(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """lo, hi, and the rows that see something."""
        lo, hi = self.lo.numpy(), self.hi.numpy()
        return lo, hi, self._keep("rows", lambda: np.flatnonzero(hi > lo))

    def _keep(self, key: Any, build: Callable[[], Any]) -> Any:
        if key not in self._on_device:
            self._on_device[key] = build()
        return self._on_device[key]

    def _hidden_keys(self, part: Part) -> torch.Tensor:
        tiles = torch.arange(part.num_tiles)[:, None]
        rows = part.row_start + part.row_step * tiles + torch.arange(part.num_rows)
        keys = part.key_start + part.key_step * tiles + torch.arange(part.num_keys)
        keys = keys[:, None, None]  # [num_tiles, 1, 1, keys]
        lo, hi = (bound[rows][:, None, :, None] for bound in (self.lo, self.hi))
        return (keys < lo) | (keys >= hi)


def make_plan(
    lo: torch.Tensor | np.ndarray, hi: torch.Tensor | np.ndarray, num_keys: int
) -> IntervalPlan:
    """Validate an interval mask on the host and cut it into parts.

    Args:
        lo, hi: int32 [T] on the host; row t sees the keys [lo[t], hi[t]), none if they are equal.
            Over the rows that see something, neither may decrease.
        num_keys: S, number of keys that the plan's calls will get.

    Raises:
        ValueError: wrong dtype, shape or device, an interval outside [0, S), or a decrease.
    """
    lo_np, hi_np = _to_host("lo", lo), _to_host("hi", hi)
    if lo_np.shape != hi_np.shape:
        raise ValueError(
            f"make_plan: lo has {len(lo_np)} rows, hi has {len(hi_np)}; give one of each per query"
        )
    if isinstance(num_keys, bool) or not isinstance(num_keys, int | np.integer) or num_keys < 0:
        raise ValueError(f"make_plan: num_keys must be an int of at least 0, got {num_keys!r}")
    _check_intervals(lo_np, hi_np, int(num_keys))
    rows = np.flatnonzero(hi_np > lo_np)
    _check_order("lo", lo_np, rows)
    _check_order("hi", hi_np, rows)
    return IntervalPlan(
        lo=torch.from_numpy(lo_np),
        hi=torch.from_numpy(hi_np),
        num_keys=int(num_keys),
        parts=_build_parts(lo_np, hi_np, rows),
    )


def _upload(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    return x.to(device, non_blocking=True)


def _upload_tiles(table: np.ndarray, device: torch.device) -> DeviceTiles:
    num_seen = int(np.count_nonzero(table[:, -1] > table[:, 1]))
    return DeviceTiles(_upload(torch.from_numpy(table), device), num_seen)


def _to_host(name: str, bound: torch.Tensor | np.ndarray) -> np.ndarray:
    if isinstance(bound, torch.Tensor):
        if bound.device.type != "cpu":
            raise ValueError(
                f"make_plan: {name} is on {bound.device}; build the plan from host arrays, it is "
                "made before the device is needed"
            )
        bound = bound.numpy()
    if not isinstance(bound, np.ndarray) or bound.dtype != np.int32 or bound.ndim != 1:
        what = (
            f"{bound.dtype} of shape {list(bound.shape)}"
            if isinstance(bound, np.ndarray)
            else type(bound).__name__
        )
        raise ValueError(
            f"make_plan: {name} must be an int32 array or tensor of one dim, got {what}; "
            "convert it with .astype(numpy.int32)"
        )
    return bound.copy()  # the plan outlives the caller's buffer


def _check_intervals(lo: np.ndarray, hi: np.ndarray, num_keys: int) -> None:
    rules = (
        (lo < 0, "lo must be at least 0"),
        (lo > hi, "lo must not exceed hi (equal: the row sees nothing)"),
        (hi > num_keys, f"hi must not exceed num_keys={num_keys}"),
    )
    for is_wrong, rule in rules:
        if is_wrong.any():
            t = int(is_wrong.argmax())
            raise ValueError(
                f"make_plan: row {t} has the interval [{lo[t]}, {hi[t]}): {rule}; "
                "intervals count keys of the shard that the plan's calls will get"
            )


def _check_order(name: str, bound: np.ndarray, rows: np.ndarray) -> None:
    steps = np.diff(bound[rows])
    if (steps < 0).any():
        place = int((steps < 0).argmax())
        before, after = rows[place], rows[place + 1]
        raise ValueError(
            f"make_plan: {name} falls from {bound[before]} in row {before} to {bound[after]} in "
            f"row {after}; over rows that see something it must not decrease: sort queries and "
            "keys by their global position"
        )


def _build_parts(lo: np.ndarray, hi: np.ndarray, rows: np.ndarray) -> tuple[Part, ...]:
    windows: list[Part] = []
    edges: list[Part] = []
    rectangles: list[Part] = []
    if len(rows):
        cuts = np.flatnonzero(np.diff(rows) > 1) + 1
        for stretch in np.split(rows, cuts):
            for part in _cut_stretch(lo, hi, int(stretch[0]), int(stretch[-1]) + 1):
                kind = windows if part.is_first else edges if part.is_masked else rectangles
                kind.append(part)
    return (*_batch(windows), *_batch(edges), *_coarsen(rectangles))


def _cut_stretch(lo: np.ndarray, hi: np.ndarray, start: int, end: int) -> Iterator[Part]:
    """Cut the non-empty rows [start, end) into parts."""
    while start < end:
        same = min(
            int(np.searchsorted(lo[start:end], lo[start], "right")),
            int(np.searchsorted(hi[start:end], hi[start], "right")),
        )
        if same >= TILE // 2 or start + same == end:
            yield Part(start, same, int(lo[start]), int(hi[start] - lo[start]), is_first=True)
            start += same
            continue
        window = int(hi[start]) - 1
        rows = min(TILE, end - start)
        rows = int(np.searchsorted(hi[start : start + rows], window + TILE, "right"))
        stop = start + max(rows, 1)
        yield _window_part(lo, hi, start, stop, window)
        yield from _left_parts(lo, start, stop, window)
        start = stop


def _window_part(lo: np.ndarray, hi: np.ndarray, start: int, stop: int, window: int) -> Part:
    """Rows [start, stop) x keys [window, hi[stop - 1]); each row sees some of them."""
    num_keys = int(hi[stop - 1]) - window
    rows = np.arange(1, stop - start + 1)
    is_whole = lo[stop - 1] <= window  # no row starts inside the window
    is_causal = bool(is_whole and np.array_equal(hi[start:stop] - window, rows))
    is_full = bool(is_whole and hi[start] == hi[stop - 1])
    return Part(
        start, stop - start, window, num_keys, is_causal, not is_causal and not is_full, True
    )


def _left_parts(lo: np.ndarray, start: int, stop: int, window: int) -> Iterator[Part]:
    """What the rows [start, stop) see left of their tile's window: rectangles, and where lo moves
    within a group of rows (sliding windows) a masked block beside them."""
    stop = start + int(np.searchsorted(lo[start:stop], window, "left"))
    while start < stop:
        first = int(lo[start])
        group = start + int(np.searchsorted(lo[start:stop], first + TILE, "right"))
        last = int(lo[group - 1])
        yield Part(start, group - start, last, window - last)
        if last > first:
            edge = start + int(np.searchsorted(lo[start:group], last, "left"))
            yield Part(start, edge - start, first, last - first, is_masked=True)
        start = group


def _batch(parts: list[Part]) -> list[Part]:
    """Join equal tiles at equal steps into one part; blocks of a joined part never overlap.

    A causal square may join masked blocks and then is computed with a mask: one call more costs
    more than reading the mask.
    """
    joined: list[Part] = []
    for part in parts:
        steps = _steps_to(joined[-1], part) if joined else None
        if steps is None:
            joined.append(part)
            continue
        last = joined[-1]
        joined[-1] = replace(
            last,
            num_tiles=last.num_tiles + 1,
            row_step=steps[0],
            key_step=steps[1],
            is_causal=last.is_causal and part.is_causal,
            is_masked=last.is_masked or part.is_masked or last.is_causal != part.is_causal,
        )
    return joined


def _steps_to(last: Part, part: Part) -> tuple[int, int] | None:
    """Steps from one tile to the next if part continues last, else None."""
    if (part.num_rows, part.num_keys) != (last.num_rows, last.num_keys):
        return None
    row_step, row_rest = divmod(part.row_start - last.row_start, last.num_tiles)
    key_step, key_rest = divmod(part.key_start - last.key_start, last.num_tiles)
    if row_rest or key_rest or row_step < part.num_rows or key_step < part.num_keys:
        return None
    if last.num_tiles > 1 and (row_step, key_step) != (last.row_step, last.key_step):
        return None
    return row_step, key_step


def _coarsen(parts: list[Part]) -> Iterator[Part]:
    """Give each stretch of tiles under one document's long rectangles a common rectangle."""
    start = 0
    while start < len(parts):
        first = parts[start]
        stop = start + 1
        limit = min(start + COARSE_TILES, len(parts))
        while stop < limit and _is_below(parts[stop - 1], parts[stop]):
            stop += 1
        if stop - start < COARSE_TILES or first.num_keys < COARSE_TILES * TILE:
            yield first
            start += 1
            continue
        last = parts[stop - 1]
        yield replace(first, num_rows=last.row_start + last.num_rows - first.row_start)
        for part in parts[start + 1 : stop]:
            rest = part.num_keys - first.num_keys
            yield replace(part, key_start=part.key_start + first.num_keys, num_keys=rest)
        start = stop


def _is_below(upper: Part, lower: Part) -> bool:
    """Lower follows upper in the same document and sees what upper sees and more."""
    return (
        lower.row_start == upper.row_start + upper.num_rows
        and lower.key_start == upper.key_start
        and lower.num_keys > upper.num_keys
    )

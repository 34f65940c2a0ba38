# SPDX-License-Identifier: Apache-2.0
"""Fills rows of fixed width with grids of uneven width, so that any row can be made on its own.

An epoch is a permutation of a source's records, cut into groups of about equal expected width. A
group is drawn and packed as a whole, with the widths that its layout really drew, into a constant
number of rows. So row r of an endless sequence lies in group r // rows of the sequence of epochs,
and making it costs one group, whatever came before: nothing has to be replayed::

    epoch 0: | group 0 | group 1 | group 2 |  epoch 1: | group 0 | ...     (records permuted anew)
               rows      rows      rows                  rows
             [g1 g1 g1 g2 g2 . ]   one row: whole grids side by side, each its own segment

Everything that decides an order is integer arithmetic on numbers that are equal on every host.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from jaxsd.types import NOTHING, Grid

ORDER = 1
"""Raised whenever the same configuration would no longer give the same batches."""

GROUP_ROWS = 16
"""Rows packed together at most: more fill rows better, fewer repeat less work between hosts."""

_GRAIN = 16                     # expected widths are integers in sixteenths of a column
_CROPPED = 1e-3                 # share of columns that packing may crop; decides how full rows are
_IMAGINED_GROUPS = 32           # groups packed in imagination to find that out


def generator(*key: int | str) -> np.random.Generator:
    """A random generator that is a function of `key` alone; strings enter by their CRC-32."""
    key = tuple(zlib.crc32(k.encode()) if isinstance(k, str) else int(k) for k in key)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def shares(weights: dict[str, float]) -> dict[str, int]:
    """Positive weights as integers out of a million, so that mixing is exact arithmetic."""
    total = sum(weights.values())
    return {name: max(1, round(1_000_000 * w / total)) for name, w in weights.items()}


def pick(row: int, weights: tuple[int, ...]) -> tuple[int, int]:
    """Which source row `row` of the mixture comes from, and which of that source's rows it is.

    Sources take turns as evenly as their integer weights allow: among the first n rows, source i
    has its share of n to within one row for each source before it. No state, no draw.
    """
    left = sum(weights)
    now, then = row, row + 1            # how many of the rows before, and up to, this one remain
    for i, weight in enumerate(weights):
        rest_now, rest_then = now * (left - weight) // left, then * (left - weight) // left
        if then - rest_then > now - rest_now:
            return i, now - rest_now
        left -= weight
        now, then = rest_now, rest_then
    raise AssertionError('the last source takes every row that is left')


def best_fit(widths, *, rows: int, columns: int) -> list[list[tuple[int, int]]]:
    """Places grids of `widths` in `rows` rows: per row, (index of the grid, columns kept).

    Widest first, each into the fullest row that holds it; one that fits nowhere is cropped into the
    roomiest row, and left out where not a column is free (kept 0, so that it is counted).
    """
    room = [columns] * rows
    placed: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
    for i in sorted(range(len(widths)), key=lambda i: -widths[i]):
        width = min(int(widths[i]), columns)
        fits = [r for r in range(rows) if room[r] >= width]
        row = min(fits, key=room.__getitem__) if fits else max(range(rows), key=room.__getitem__)
        kept = min(width, room[row])
        placed[row].append((i, kept))
        room[row] -= kept
    return placed


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a source's records become rows: everything but the order of an epoch.

    expected: int64 [records], the width to expect of each record in 1/16 column.
    groups, rows: groups in an epoch, rows in a group.
    fill: the share of a row's columns that is in use, on average.
    long: how many of the records are expected to be wider than a row, and so to be cropped.
    """

    expected: np.ndarray
    groups: int
    rows: int
    fill: float
    long: int

    def epoch(self, rng: np.random.Generator) -> list[np.ndarray]:
        """The records of each group of an epoch that is permuted by `rng`: every record once."""
        order = rng.permutation(len(self.expected))
        before = np.concatenate([[0], np.cumsum(self.expected[order])])
        # The group of a record is where its middle falls: groups differ by at most one record.
        middle = before[:-1] + before[1:]
        group = np.minimum(middle * self.groups // (2 * before[-1]), self.groups - 1)
        return np.split(order, np.searchsorted(group, np.arange(1, self.groups)))


def expect(facts: np.ndarray, sample: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Expected widths, int64 [records] in 1/16 column, from the widths of a sample of records.

    facts: [records, F], what the index knows of each record (seconds, words, units); a width is
    taken to be linear in them. The coefficients are rounded, so that the last bits of a linear
    solver, which differ between machines, cannot reach the order of the data.
    """
    facts = np.concatenate([np.ones((len(facts), 1)), np.asarray(facts, np.float64)], axis=1)
    scale = np.maximum(facts.max(axis=0), 1e-9)
    solution = np.linalg.lstsq(facts[sample] / scale, np.asarray(widths, np.float64), rcond=1e-6)[0]
    expected = np.zeros(len(facts))
    for column, coefficient in zip(facts.T, np.round(solution, 3), strict=True):
        expected += column / column.max() * coefficient if column.max() > 0 else 0.0
    return np.maximum(np.rint(expected * _GRAIN), _GRAIN).astype(np.int64)


def plan(facts: np.ndarray, sample: np.ndarray, widths: np.ndarray, *, columns: int) -> Plan:
    """The plan for records with `facts`, of which those in `sample` were drawn with `widths`.

    Rows are filled as full as they can be while packing crops less than a thousandth of the
    columns, which is found by packing imagined widths that scatter as the sampled ones did.
    """
    whole = expect(facts, sample, widths)
    scatter = np.asarray(widths) / whole[sample]
    long = int((whole > columns * _GRAIN).sum())
    expected = np.minimum(whole, columns * _GRAIN)
    total = int(expected.sum())
    for percent in range(99, 19, -1):
        needed = max(1, -(-total * 100 // (percent * columns * _GRAIN)))
        groups = -(-needed // GROUP_ROWS)
        found = Plan(expected, groups, -(-needed // groups), 1.0, long)
        rng = generator('imagined')
        kept = wanted = tried = 0
        while tried < _IMAGINED_GROUPS:
            for members in found.epoch(rng):
                imagined = whole[members] * rng.choice(scatter, len(members))
                imagined = np.clip(np.rint(imagined), 1, columns).astype(int)
                placed = best_fit(imagined.tolist(), rows=found.rows, columns=columns)
                kept += sum(n for row in placed for _, n in row)
                wanted += int(imagined.sum())
                tried += 1
        if wanted - kept <= _CROPPED * wanted:
            break
    return dataclasses.replace(found, fill=kept / (tried * found.rows * columns))


def lay(grids: list[tuple[Grid, int]], *, streams: int, columns: int,
        extras: Mapping[str, int] = MappingProxyType({})) -> dict[str, np.ndarray]:
    """One row from grids and how many columns of each are kept: tokens and weights [K, T],
    position and segment [T]. Segments count from 1; what is left holds NOTHING in segment 0.
    extras: what columns may carry beside, by name float32 [T, n], or int32 [T] where n is 0."""
    row = {'tokens': np.full((streams, columns), NOTHING, np.int32),
           'weights': np.zeros((streams, columns), np.float32),
           'position': np.zeros(columns, np.int32), 'segment': np.zeros(columns, np.int32)}
    row |= {name: np.zeros((columns, n), np.float32) if n else np.zeros(columns, np.int32)
            for name, n in extras.items()}
    start = 0
    for number, (grid, kept) in enumerate(((g, n) for g, n in grids if n), start=1):
        to = slice(start, start + kept)
        row['tokens'][:, to] = grid.tokens[:, :kept]
        row['weights'][:, to] = grid.weights[:, :kept]
        row['position'][to] = grid.position[:kept]
        row['segment'][to] = number
        for name, values in grid.extra.items():
            row[name][to] = values[:kept]
        start += kept
    return row

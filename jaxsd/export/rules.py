# SPDX-License-Identifier: Apache-2.0
"""Rename, reshape and permute rules, written once and read in both directions.

A rule says where one family of the peer's tensors lies in our parameter tree. Both sides are
written as named axes, so that a rule is an equation rather than two pieces of code::

    rule('model.layers.{L}.self_attn.q_proj.weight', ('backbone/blocks/q/kernel',
         'L D N H', '(N H) D'))

reads: for every layer L, the peer's [N*H, D] tensor is our [L, D, N, H] array at L, transposed
and flattened. Axes in braces number the peer's tensors and index ours; one with `names` is spelled
(`gate`, `up`). `(h 2)` splits an axis, so `'L D N (h 2)' <-> '(N 2 h) D'` is the permutation
between interleaved and half rotary pairs; `1` is an axis of length one. Several parts of one rule
lie behind one another along the peer's first axis. Import is export run backwards.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Part(NamedTuple):
    """Where a stretch of one peer tensor lies in ours: its path, our axes, the peer's axes.

    rows: (start, size) of the stretch of our first axis that takes part; None: all of it.
    """

    path: str
    ours: str
    theirs: str
    rows: tuple[int, int] | None = None


class Rule(NamedTuple):
    key: str
    parts: tuple[Part, ...]
    names: Mapping[str, Sequence[str]]


class Section(NamedTuple):
    """One part of one peer tensor, with all sizes known.

    index: for each axis of our array at `path`, a number or the slice that takes part. split: the
    lengths of the named axes of what is picked, in our order. ours, theirs: for each sliced axis of
    ours and each axis of the peer's, which of `split` it is made of. The section fills rows
    start..stop of the peer's tensor, and has `shape` there.
    """

    path: str
    index: tuple
    split: tuple[int, ...]
    ours: tuple[tuple[int, ...], ...]
    theirs: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    start: int
    stop: int


class Box(NamedTuple):
    """A box of our array, `at`, and the rectangle of the peer's tensor, `there`, that fills it.

    unfold(tensor) turns what lies in the rectangle into what lies in the box.
    """

    at: tuple[slice, ...]
    there: tuple[slice, ...]
    unfold: Callable[[np.ndarray], np.ndarray]


class Piece(NamedTuple):
    """One tensor of the peer's file: its key, its shape and the sections that fill it."""

    key: str
    shape: tuple[int, ...]
    sections: tuple[Section, ...]


def rule(key: str, *parts, **names: Sequence[str]) -> Rule:
    """A rule for the peer's tensors `key`, made of `(path, ours, theirs[, rows])` parts."""
    return Rule(key, tuple(Part(*part) for part in parts), names)


def _groups(pattern: str) -> tuple[tuple[str, ...], ...]:
    """'(N 2 h) D' -> (('N', '2', 'h'), ('D',)); '1' is a group of nothing."""
    return tuple(tuple(atom for atom in group.strip('()').split() if atom != '1')
                 for group in re.findall(r'\([^)]*\)|\S+', pattern))


def _sizes(groups, shape, where: str) -> dict[str, int]:
    """The length of every named axis of `groups`, from the shape they describe."""
    if len(groups) != len(shape):
        raise ValueError(f'{where}: {groups} does not describe an array of shape {shape}')
    sizes = {}
    for group, n in zip(groups, shape, strict=True):
        if not group and n == 1:
            continue
        known = math.prod(int(atom) for atom in group if atom.isdigit())
        free = [atom for atom in group if not atom.isdigit()]
        if len(free) != 1 or n % known:
            raise ValueError(f'{where}: cannot split an axis of {n} as {group}')
        sizes[free[0]] = n // known
    return sizes


def _section(part: Part, shape: Sequence[int], at: Mapping[str, int], start: int) -> Section:
    """`part` of our array of `shape` where the numbered axes stand at `at`."""
    groups = _groups(part.ours)
    if part.rows is not None:
        shape = (part.rows[1], *shape[1:])
    sizes = _sizes(groups, shape, part.path)
    index = tuple(0 if not group else at[group[0]] if group[0] in at else
                  slice(*((0, n) if i or part.rows is None else (part.rows[0], sum(part.rows))))
                  for i, (group, n) in enumerate(zip(groups, shape, strict=True)))
    sliced = [group for group in groups if group and group[0] not in at]
    atoms = [atom for group in sliced for atom in group]

    def length(atom):
        return int(atom) if atom.isdigit() else sizes[atom]

    theirs = _groups(part.theirs)
    if sorted(atom for group in theirs for atom in group) != sorted(atoms):
        raise ValueError(f'{part.path}: {part.ours} and {part.theirs} name different axes')
    peer = tuple(math.prod(length(atom) for atom in group) for group in theirs)
    numbers = [tuple(tuple(atoms.index(atom) for atom in group) for group in side)
               for side in (sliced, theirs)]
    return Section(part.path, index, tuple(length(a) for a in atoms), *numbers, peer, start,
                   start + peer[0])


def pieces(rules: Sequence[Rule], shapes: Mapping[str, Sequence[int]]) -> Iterator[Piece]:
    """Every tensor of the peer's file in order, given the shapes of our arrays by path."""
    seen = set()
    for r in rules:
        numbered = re.findall(r'{(\w+)}', r.key)
        first = r.parts[0]
        sizes = _sizes(_groups(first.ours), shapes[first.path], first.path)
        counts = [range(len(r.names[x]) if x in r.names else sizes[x]) for x in numbered]
        for numbers in itertools.product(*counts):
            at = dict(zip(numbered, numbers, strict=True))
            key = r.key.format(**{x: r.names[x][i] if x in r.names else i for x, i in at.items()})
            if key in seen:
                raise ValueError(f'two rules make {key}')
            seen.add(key)
            sections, start = [], 0
            for part in r.parts:
                sections.append(_section(part, shapes[part.path], at, start))
                start = sections[-1].stop
            yield Piece(key, (start, *sections[0].shape[1:]), tuple(sections))


def forward(piece: Piece, ours: Mapping[str, np.ndarray], take=lambda x, index: x[index]
            ) -> np.ndarray:
    """The peer's tensor, float32, from our arrays by path. take(array, index) reads some of one."""
    out = []
    for s in piece.sections:
        order = [i for group in s.theirs for i in group]
        picked = np.asarray(take(ours[s.path], s.index), np.float32)
        out.append(picked.reshape(s.split).transpose(order).reshape(s.shape))
    return np.ascontiguousarray(np.concatenate(out) if len(out) > 1 else out[0])


def boxes(section: Section, region: Sequence[tuple[int, int]], most: int) -> Iterator[Box]:
    """What of `section` lies in `region` of our array ((first, last) per axis), box by box.

    Each rectangle is one stretch of rows and columns, so that a file is read once and only where
    it is needed, and holds about `most` numbers at most, as far as cutting it along the peer's
    first axis can make it so.
    """
    take = [(0, n) for n in section.split]      # the range of each named axis that is wanted
    crop, plain, sliced = [], set(), iter(section.ours)
    for where, (first, last) in zip(section.index, region, strict=True):
        if not isinstance(where, slice):
            if not first <= where < last:
                return
            continue
        first, last = max(first, where.start) - where.start, min(last, where.stop) - where.start
        if first >= last:
            return
        atoms = next(sliced)
        crop.append((first, last))
        if len(atoms) == 1:                     # an axis that is split is read whole, then cut
            plain.add(atoms[0])
            take[atoms[0]] = first, last
    rows, *columns = section.theirs
    cover = list(take)
    for group in columns:                       # one stretch: only its first axis may be cut
        for i in group[1:]:
            if take[i] != (0, section.split[i]):
                cover[group[0]], cover[i] = (0, section.split[group[0]]), (0, section.split[i])
    at, most_at = _cut(section, rows, cover, plain, most)
    for i in rows[at + 1:]:
        cover[i] = (0, section.split[i])
    numbers = [range(*cover[i]) for i in rows[:at]]
    steps = range(*cover[rows[at]], most_at) if rows else (0,)
    for outer in itertools.product(*numbers, steps):
        here = list(cover)
        for i, n in zip(rows, outer, strict=False):
            here[i] = n, min(n + (most_at if i == rows[at] else 1), cover[i][1])
        yield _box(section, here, crop)


def _cut(section: Section, rows, cover, plain, most: int) -> tuple[int, int]:
    """Which axis of the peer's rows to cut, and into pieces of how many; those before it go one by
    one, those behind it are whole. What lies across our axes cannot be cut."""
    wanted = [k for k, i in enumerate(rows) if cover[i] != (0, section.split[i])]
    last = max(wanted, default=0)
    if not rows or not all(i in plain for i in rows[:last + 1]):
        for i in rows:
            cover[i] = (0, section.split[i])
        return 0, max(1, section.split[rows[0]] if rows else 1)

    def one(k):     # numbers in a single step of axis rows[k]
        n = math.prod(section.split[i] for i in rows[k + 1:])
        others = [i for i in range(len(cover)) if i not in rows]
        return n * math.prod(cover[i][1] - cover[i][0] for i in others)
    while one(last) > most and last + 1 < len(rows) and rows[last + 1] in plain:
        last += 1
    return last, max(1, most // one(last))


def _box(section: Section, cover, crop) -> Box:
    """The box whose named axes have the ranges `cover`, less what `crop` cuts off ours."""
    there = []
    for k, group in enumerate(section.theirs):
        first, size = 0, 1
        for i in group:
            first = first * section.split[i] + cover[i][0]
            size *= cover[i][1] - cover[i][0]
        start = section.start if k == 0 else 0
        there.append(slice(start + first, start + first + size))
    order = [i for group in section.theirs for i in group]
    sizes = [b - a for a, b in cover]
    at, keep, shape, sliced = [], [], [], iter(zip(section.ours, crop, strict=True))
    for where in section.index:
        if not isinstance(where, slice):
            at.append(slice(where, where + 1))
            keep.append(slice(0, 1))
            shape.append(1)
            continue
        atoms, (first, last) = next(sliced)
        held = (cover[atoms[0]] if len(atoms) == 1 else
                (0, math.prod(section.split[i] for i in atoms)))
        first, last = max(first, held[0]), min(last, held[1])
        at.append(slice(where.start + first, where.start + last))
        keep.append(slice(first - held[0], last - held[0]))
        shape.append(held[1] - held[0])

    def unfold(tensor):
        there = tensor.reshape([sizes[i] for i in order])
        return there.transpose(np.argsort(order)).reshape(shape)[tuple(keep)]
    return Box(tuple(at), tuple(there), unfold)

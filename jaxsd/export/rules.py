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
from collections.abc import Iterator, Mapping, Sequence
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

    index picks it out of our array at `path`; `split` are the axes of what is picked and `order`
    those axes as the peer has them; it fills rows start..stop of the peer's tensor.
    """

    path: str
    index: tuple
    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    stop: int


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
                  slice(None) if i or part.rows is None else slice(part.rows[0], sum(part.rows))
                  for i, group in enumerate(groups))
    atoms = [atom for group in groups for atom in group if atom not in at]

    def length(atom):
        return int(atom) if atom.isdigit() else sizes[atom]

    theirs = _groups(part.theirs)
    there = [atom for group in theirs for atom in group]
    if sorted(there) != sorted(atoms):
        raise ValueError(f'{part.path}: {part.ours} and {part.theirs} name different axes')
    peer = tuple(math.prod(length(atom) for atom in group) for group in theirs)
    return Section(part.path, index, tuple(length(a) for a in atoms),
                   tuple(atoms.index(a) for a in there), peer, start, start + peer[0])


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


def forward(piece: Piece, ours: Mapping[str, np.ndarray]) -> np.ndarray:
    """The peer's tensor, float32, from our arrays by path."""
    out = [np.asarray(ours[s.path][s.index], np.float32).reshape(s.split).transpose(s.order)
           .reshape(s.shape) for s in piece.sections]
    return np.ascontiguousarray(np.concatenate(out) if len(out) > 1 else out[0])


def backward(section: Section, tensor: np.ndarray, ours: np.ndarray) -> None:
    """Writes rows start..stop of the peer's tensor where `section` puts them in our array."""
    there = [section.split[i] for i in section.order]
    back = tuple(int(i) for i in np.argsort(section.order))
    target = ours[section.index]
    ours[section.index] = np.asarray(tensor, ours.dtype).reshape(there).transpose(back).reshape(
        target.shape)

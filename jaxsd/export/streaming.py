# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint box by box straight into the arrays of a mesh.

What lies in memory of the host at one time is one box of one tensor, in the dtype of the file:
never a whole array of ours, which holds all layers, nor a whole file. A process reads what its own
devices hold and nothing else.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxsd import model
from jaxsd.config import ConfigError
from jaxsd.export import rules, safetensors
from jaxsd.export.facts import facts
from jaxsd.export.families import Family
from jaxsd.stage import flatten

BOX_BYTES = 64 << 20        # of the file, at one time
HOST_BYTES = 64 << 20       # an array up to this is put together on the host
LISTED = 8                  # how many tensors an error names before it counts the rest

Region = Sequence[tuple[int, int]]
"""A box of an array: (first, last + 1) for each axis."""


class Source(NamedTuple):
    """A checkpoint that was found whole: where each number of its config's parameters lies.

    shapes: of the parameters by path. sections: by path, the tensors' stretches that fill it.
    """

    shapes: dict[str, tuple[int, ...]]
    sections: dict[str, list[tuple[safetensors.Entry, rules.Section]]]


class Patch(NamedTuple):
    """A box of the source's array `path` that goes into an array of ours.

    start, size: the box, per axis of the source's array. order: that array's axes as ours has them.
    to: where the box begins in our array, per axis of ours.
    """

    path: str
    start: tuple[int, ...]
    size: tuple[int, ...]
    order: tuple[int, ...]
    to: tuple[int, ...]


def whole(path: str, shape: Sequence[int]) -> Patch:
    """The patch that is all of the source's array."""
    none = (0,) * len(shape)
    return Patch(path, none, tuple(shape), tuple(range(len(shape))), none)


def open_source(config, family: Family, said: Mapping, source: str) -> Source:
    """The checkpoint in folder (or file) `source`, which is one of `config`, checked, not read
    (but for a tensor that should be the copy of another).

    said: its own facts, which may speak of more than the config has (see `Family.cut`). Raises
    ValueError naming file and key for a damaged file and for missing, unused or misshapen tensors;
    nothing is allocated before that.
    """
    have = facts(config) | {'checkpoint': said}
    shapes = {path: leaf.shape for path, leaf in flatten(model.abstract(config)[1]).items()}
    plan = family.rules(have)
    found = _multiplied(source, plan.factors,
                        safetensors.entries(source, lambda key: family.dialect(key, have)))
    copies = {copy: (original, fix) for copy, original, fix in plan.copies if copy in found}
    kept = {k: e for k, e in found.items() if k not in copies}
    wanted = _wanted(source, kept, rules.pieces(plan.rules, shapes))
    covered(wanted, shapes, plan.spare)
    _matched(source, kept, wanted, plan.ignored)
    for copy, (original, fix) in copies.items():
        if not _same(found[copy], found[original]):
            raise ValueError(f'{found[copy].file}: {copy} differs from {original}; {fix}')
    sections = {path: [] for path in shapes}
    for piece in wanted:
        for section in piece.sections:
            sections[section.path].append((found[piece.key], section))
    return Source(shapes, sections)


def blocks(source: Source, path: str, region: Region, box_bytes: int = BOX_BYTES
           ) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """(where, numbers) of what the file has of `region` of the source's array, box by box."""
    for entry, section in source.sections[path]:
        for box in rules.boxes(section, region, box_bytes // 4):
            yield box.at, box.unfold(safetensors.read(entry, box.there))


def patched(source: Source, patch: Patch, region: Region, box_bytes: int = BOX_BYTES):
    """As `blocks`, in the coordinates of the array of ours that `patch` goes into."""
    theirs = [(0, 0)] * len(patch.order)
    for axis, (first, last) in enumerate(region):
        i = patch.order[axis]
        shift = patch.start[i] - patch.to[axis]
        theirs[i] = (max(first + shift, patch.start[i]),
                     min(last + shift, patch.start[i] + patch.size[i]))
    if any(first >= last for first, last in theirs):
        return
    for at, block in blocks(source, patch.path, theirs, box_bytes):
        here = tuple(slice(at[i].start - patch.start[i] + to, at[i].stop - patch.start[i] + to)
                     for i, to in zip(patch.order, patch.to, strict=True))
        yield here, block.transpose(patch.order)


def array(source: Source, patches: Sequence[Patch], target: jax.ShapeDtypeStruct, *,
          box_bytes: int = BOX_BYTES, host_bytes: int = HOST_BYTES) -> jax.Array:
    """The array that `patches` fill, spread as `target` says; zeros where they do not reach.

    A shard of more than `host_bytes` never exists on the host: its boxes are written into the
    device's memory one after another.
    """
    by_region: dict[tuple, list] = {}
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        region = tuple(s.indices(n)[:2] for s, n in zip(index, target.shape, strict=True))
        by_region.setdefault(region, []).append(device)
    shards = []
    for region, devices in by_region.items():
        shape = tuple(last - first for first, last in region)
        found = ((tuple(slice(s.start - first, s.stop - first) for s, (first, _)
                        in zip(at, region, strict=True)), block)
                 for patch in patches for at, block in patched(source, patch, region, box_bytes))
        if math.prod(shape) * target.dtype.itemsize <= host_bytes:
            held = np.zeros(shape, target.dtype)
            for at, block in found:
                held[at] = block
            shards += [jax.device_put(held, device) for device in devices]
            continue
        held = [jax.numpy.zeros(shape, target.dtype, device=device) for device in devices]
        for at, block in found:
            if block.dtype == np.float64:       # which a device does not take
                block = block.astype(np.float32)
            start = tuple(np.int32(s.start) for s in at)
            held = [_write(shard, jax.device_put(block, device), start)
                    for shard, device in zip(held, devices, strict=True)]
            jax.block_until_ready(held)         # or boxes would queue up in memory
        shards += held
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, shards)


@functools.partial(jax.jit, donate_argnums=0)
def _write(shard, block, start):
    return jax.lax.dynamic_update_slice(shard, block.astype(shard.dtype), start)


def _multiplied(source: str, factors: Sequence, found: Mapping) -> dict:
    """`found` with the tensors that are products (see `Plan.factors`) as such."""
    out = dict(found)
    for key, other, rank in factors:
        if lacking := [k for k in (key, other) if k not in out]:
            raise ValueError(f'{source} lacks {some(lacking)}')
        table, by = out[key], out.pop(other)
        for entry in (table, by):
            if len(entry.shape) != 2 or entry.shape[1] != rank:
                raise ValueError(f'{entry.file}: {safetensors.shown(entry.key)} has shape '
                                 f'{entry.shape}, the config wants (.., {rank})')
        out[key] = table._replace(shape=(table.shape[0], by.shape[0]), by=by)
    return out


def _wanted(source: str, found: Mapping, pieces: Iterable[rules.Piece]) -> list[rules.Piece]:
    """All of `pieces`, if they are in the files.

    A config.json of a few bytes can speak of more tensors than memory holds. It is believed as far
    as the files' headers bear it out: no piece is made after those that are missing fill a line.
    """
    wanted, missing = [], []
    for piece in pieces:
        if piece.key in found:
            wanted.append(piece)
        elif len(missing) < LISTED:
            missing.append(piece.key)
        else:
            raise ValueError(f'{source} lacks {some(missing)} and more')
    if missing:
        raise ValueError(f'{source} lacks {some(missing)}')
    return wanted


def _matched(source: str, found: Mapping, wanted, ignored: str) -> None:
    keys = {piece.key for piece in wanted}
    if unused := [k for k in found if k not in keys and not re.fullmatch(ignored, k)]:
        raise ValueError(f'{source} has tensors without a place in the config: {some(unused)}')
    for piece in wanted:
        entry = found[piece.key]
        if entry.shape != piece.shape:
            raise ValueError(f'{entry.file}: {safetensors.shown(entry.key)} has shape '
                             f'{entry.shape}, the config wants {piece.shape}')


def _same(a: safetensors.Entry, b: safetensors.Entry) -> bool:
    """Whether two tensors hold the same numbers, read a stretch of rows at a time."""
    if a.shape != b.shape:
        return False
    rows = max(1, BOX_BYTES // (4 * math.prod(a.shape[1:])))
    rest = [slice(0, n) for n in a.shape[1:]]
    return all(np.array_equal(*(safetensors.read(x, [slice(i, min(i + rows, a.shape[0])), *rest])
                                for x in (a, b))) for i in range(0, a.shape[0], rows))


def covered(pieces: Iterable[rules.Piece], shapes: Mapping, spare: Sequence[str]) -> None:
    """Every number of ours has exactly one place in the peer's files, padding rows apart."""
    size = dict.fromkeys(shapes, 0)
    for piece in pieces:
        for section in piece.sections:
            size[section.path] += math.prod(section.shape)
    short = [p for p, n in size.items() if n != math.prod(shapes[p]) and p not in spare]
    if short:
        raise ConfigError(f'this format has no place for {some(short)}')


def some(keys) -> str:
    """The first of `keys`, and how many more there are."""
    keys = list(keys)
    rest = f' and {len(keys) - LISTED} more' if len(keys) > LISTED else ''
    return ', '.join(map(safetensors.shown, keys[:LISTED])) + rest

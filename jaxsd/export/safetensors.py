# SPDX-License-Identifier: Apache-2.0
"""Tensors in safetensors files: one file, or several behind an index. Nothing is ever unpickled.

Reading opens headers only; a tensor, or some rows of it, is read when it is asked for. Every
problem of a file is one ValueError that names the file and the key.
"""

import json
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16, which released checkpoints use)
import numpy as np
import safetensors
from safetensors.numpy import save_file

INDEX, SINGLE = 'model.safetensors.index.json', 'model.safetensors'
DTYPES = ('F64', 'F32', 'F16', 'BF16')
JSON_BYTES = 64 << 20


def read_json(path: str) -> dict:
    """The object in `path`. Raises ValueError where it is too long, damaged or something else."""
    try:
        if os.path.getsize(path) > JSON_BYTES:
            raise ValueError(f'{path}: longer than {JSON_BYTES >> 20} MiB')
        with open(path, encoding='utf-8') as f:
            value = json.load(f)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f'{path}: cannot be read as JSON: {e}') from e
    if not isinstance(value, dict):
        raise ValueError(f'{path}: must hold a JSON object')
    return value


class Entry(NamedTuple):
    """A tensor in a file, or the stretch number `part` of its rows; `shape` is the stretch's."""

    file: str
    key: str
    shape: tuple[int, ...]
    part: int


def _files(folder: str) -> tuple[list[str], dict[str, str] | None]:
    """The files of a checkpoint and, where there is an index, the file it states for each key."""
    if os.path.isfile(folder):
        return [folder], None
    index = os.path.join(folder, INDEX)
    if os.path.exists(index):
        stated = read_json(index).get('weight_map')
        if not isinstance(stated, dict) or not all(isinstance(v, str) for v in stated.values()):
            raise ValueError(f'{index}: weight_map must name a file for each key')
        for key, name in stated.items():
            if name != os.path.basename(name) or name in ('', '.', '..'):
                raise ValueError(f'{index}: {key} points outside the folder: {name!r}')
        return [os.path.join(folder, name) for name in sorted(set(stated.values()))], stated
    names = sorted(name for name in os.listdir(folder) if name.endswith('.safetensors'))
    if SINGLE in names:
        names = [SINGLE]
    if len(names) != 1:
        found = f'{len(names)} files' if names else 'none'
        raise ValueError(f'{folder}: expected {INDEX}, {SINGLE} or one *.safetensors, '
                         f'found {found}')
    return [os.path.join(folder, names[0])], None


def _open(path: str):
    try:
        return safetensors.safe_open(path, 'numpy')
    except (OSError, safetensors.SafetensorError) as e:
        raise ValueError(f'{path}: not a whole safetensors file: {e}') from e


def entries(folder: str, names: Callable[[str], tuple[str, ...]]) -> dict[str, Entry]:
    """Every tensor below `folder` by its current name.

    names(key) is (key,) or, for a tensor that older files stack, the names of its equal stretches
    along the first axis; '' is the name of what is not wanted.
    """
    files, stated = _files(folder)
    out: dict[str, Entry] = {}
    seen = set()
    for path in files:
        with _open(path) as f:
            for key in f.keys():
                if stated is not None and stated.get(key) != os.path.basename(path):
                    raise ValueError(f'{path}: {key} is not where {INDEX} says')
                seen.add(key)
                tensor = f.get_slice(key)
                shape, dtype, current = tuple(tensor.get_shape()), tensor.get_dtype(), names(key)
                if dtype not in DTYPES:
                    raise ValueError(f'{path}: {key} is {dtype}; only '
                                     f'{", ".join(DTYPES)} can be imported')
                if len(current) > 1 and (not shape or shape[0] % len(current)):
                    raise ValueError(f'{path}: {key} of shape {shape} cannot be cut into '
                                     f'{len(current)} steps')
                for part, name in enumerate(current):
                    if not name:
                        continue
                    if name in out:
                        raise ValueError(f'{path}: {key} holds {name}, which {out[name].key} of '
                                         f'{out[name].file} holds too')
                    cut = (shape[0] // len(current), *shape[1:]) if shape else ()
                    out[name] = Entry(path, key, cut, part)
    for key in stated or ():
        if key not in seen:
            raise ValueError(f'{os.path.join(folder, INDEX)}: {key} is not in {stated[key]}')
    return out


def rows(entry: Entry, start: int, stop: int) -> np.ndarray:
    """Rows start..stop of a tensor, as float32. Scalars do not occur."""
    base = entry.part * entry.shape[0]
    with _open(entry.file) as f:
        return np.asarray(f.get_slice(entry.key)[base + start:base + stop], np.float32)


def write(folder: str, tensors: Iterable[tuple[str, np.ndarray]], *,
          shard_bytes: int | None) -> int:
    """Writes named tensors to `folder` and returns their bytes.

    At most about `shard_bytes` go to one file, the files then being listed in an index; None: one
    file, whatever its size.
    """
    files: list[list[str]] = []
    held, waiting, total = {}, 0, 0
    place = os.path.join(folder, 'part-{:05d}.safetensors')

    def flush():
        # One entry only: the library writes several in random order, and files must reproduce.
        save_file(held, place.format(len(files)), {'format': 'pt'})
        files.append(list(held))
        held.clear()

    for key, tensor in tensors:
        if held and shard_bytes is not None and waiting + tensor.nbytes > shard_bytes:
            flush()
            waiting = 0
        held[key] = tensor
        waiting += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        os.replace(place.format(0), os.path.join(folder, SINGLE))
        return total
    where = {}
    for i, keys in enumerate(files):
        name = f'model-{i + 1:05d}-of-{len(files):05d}.safetensors'
        os.replace(place.format(i), os.path.join(folder, name))
        where |= dict.fromkeys(keys, name)
    with open(os.path.join(folder, INDEX), 'w', encoding='utf-8') as f:
        json.dump({'metadata': {'total_size': total}, 'weight_map': where}, f, indent=1)
    return total

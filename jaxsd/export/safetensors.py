# SPDX-License-Identifier: Apache-2.0
"""Tensors in safetensors files: one file, or several behind an index. Nothing is ever unpickled.

Reading opens headers only; a tensor, or a rectangle of it, is read when it is asked for. Every
problem of a file is one ValueError that names the file and the key.
"""

import json
import math
import os
import stat
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import NamedTuple

import ml_dtypes  # which also teaches numpy the name bfloat16, as checkpoints call it
import numpy as np
import safetensors

Error = safetensors.SafetensorError
INDEX, SINGLE = 'model.safetensors.index.json', 'model.safetensors'
DTYPES = ('F64', 'F32', 'F16', 'BF16')
JSON_BYTES = 64 << 20
PICKLED = ('.bin', '.pt', '.pth', '.ckpt')
FOLDERS = 256               # below one, that are searched for a checkpoint to name


def shown(key: str) -> str:
    """Somebody's key as an error may show it: in one line, without what a terminal would obey."""
    return key if key.isprintable() else repr(key)


def _once(pairs, path: str) -> dict:
    """A JSON object whose keys occur once: which of two would count is anybody's guess."""
    out = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f'{path}: {shown(key)} is there twice')
        out[key] = value
    return out


def _integer(digits: str) -> int | float:
    """An integer; one beyond every float is infinite, as 1e999 is, for bounds to catch."""
    return int(digits) if len(digits) <= 300 else float(digits)


def regular(path: str) -> None:
    """Raises ValueError for what is no file or a link to none: a pipe would never answer."""
    try:
        mode = os.stat(path).st_mode
    except OSError as e:
        raise ValueError(f'{path}: cannot be read: {e.strerror}') from e
    if not stat.S_ISREG(mode):
        raise ValueError(f'{path}: cannot be read: not a regular file')


def read_json(path: str) -> dict:
    """The object in `path`. Raises ValueError where it is too long, damaged or something else."""
    regular(path)
    try:
        if os.path.getsize(path) > JSON_BYTES:
            raise ValueError(f'{path}: longer than {JSON_BYTES >> 20} MiB')
        with open(path, encoding='utf-8') as f:
            value = json.load(f, object_pairs_hook=lambda pairs: _once(pairs, path),
                              parse_int=_integer)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f'{path}: cannot be read as JSON: {e}') from e
    if not isinstance(value, dict):
        raise ValueError(f'{path}: must hold a JSON object')
    return value


def folder_of(source: str) -> str:
    """The folder of a checkpoint that is named by its folder or by its one file."""
    if not os.path.exists(source):
        raise ValueError(f'no file or folder {source}')
    if not os.path.isdir(source):
        regular(source)
    if os.path.exists(os.path.join(source, 'ledger.jsonl')):
        raise ValueError(f'{source} is a run directory: jaxsd export writes a checkpoint from it')
    return source if os.path.isdir(source) else os.path.dirname(os.path.abspath(source))


def _never(name: str, folder: str) -> str:
    return (f'{shown(name)} is pickled, which is never read, as reading it may run code: convert '
            f'it in transformers, with AutoModelForCausalLM.from_pretrained({folder!r})'
            '.save_pretrained(NEW, safe_serialization=True)')


def within(folder: str) -> str:
    """What to add where `folder` lacks the files of a checkpoint: what it holds in their place."""
    names = sorted(os.listdir(folder))
    pickled = [n for n in names if n.endswith(PICKLED)]
    for name in sorted(pickled, key=lambda n: not n.startswith('pytorch_model'))[:1]:
        return f'; {_never(name, folder)}'
    for name in names[:FOLDERS]:
        below = os.path.join(folder, name)
        if os.path.isdir(below) and os.access(below, os.R_OK | os.X_OK) and any(
                n.endswith('.safetensors') or n == INDEX for n in os.listdir(below)):
            return f'; name a checkpoint in it, such as {shown(below)}'
    return ''


class Entry(NamedTuple):
    """A tensor in a file, or the stretch number `part` of its rows; `shape` is the stretch's.

    by: None, or a tensor M such that this is x Mᵀ, x being what lies in the file; `shape` is then
    the product's.
    """

    file: str
    key: str
    shape: tuple[int, ...]
    part: int
    by: 'Entry | None' = None


def _files(folder: str) -> tuple[list[str], dict[str, str] | None]:
    """The files of a checkpoint and, where there is an index, the file it states for each key."""
    if os.path.isfile(folder):
        if folder.endswith(PICKLED):
            raise ValueError(_never(folder, os.path.dirname(os.path.abspath(folder))))
        return [folder], None
    index = os.path.join(folder, INDEX)
    if os.path.lexists(index):
        stated = read_json(index).get('weight_map')
        if not isinstance(stated, dict) or not all(isinstance(v, str) for v in stated.values()):
            raise ValueError(f'{index}: weight_map must name a file for each key')
        for key, name in stated.items():
            if name != os.path.basename(name) or name in ('', '.', '..'):
                raise ValueError(f'{index}: {shown(key)} points outside the folder: {name!r}')
            if not name.isprintable():
                raise ValueError(f'{index}: {shown(key)} is in no plain file: {name!r}')
        if SINGLE not in stated.values() and os.path.lexists(os.path.join(folder, SINGLE)):
            raise ValueError(f'{folder}: holds {SINGLE} beside other weights that {INDEX} names; '
                             'remove one of the two')
        return [os.path.join(folder, name) for name in sorted(set(stated.values()))], stated
    names = sorted(name for name in os.listdir(folder) if name.endswith('.safetensors'))
    if SINGLE in names:
        names = [SINGLE]
    config = os.path.join(folder, 'config.json')
    if len(names) > 1 and os.path.exists(config):       # kyutai's says which is not the codec
        said = read_json(config).get('moshi_name')
        names = [said] if said in names else names
    if len(names) != 1:
        found = f'{len(names)} files' if names else 'none'
        raise ValueError(f'{folder}: expected {INDEX}, {SINGLE} or one *.safetensors, '
                         f'found {found}'
                         + ('; a file can be named instead of the folder' if names
                            else within(folder)))
    return [os.path.join(folder, names[0])], None


def _open(path: str):
    regular(path)
    try:
        return safetensors.safe_open(path, 'numpy')
    except (OSError, safetensors.SafetensorError) as e:
        raise ValueError(f'{path}: not a whole safetensors file: {e}') from e


def _check_header(path: str) -> None:
    """Raises ValueError for a header that names a tensor twice. The library takes the last one."""
    with open(path, 'rb') as f:
        size = int.from_bytes(f.read(8), 'little')      # which the library has found sound
        json.loads(f.read(size), object_pairs_hook=lambda pairs: _once(pairs, path))


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
            _check_header(path)
            for key in f.keys():
                if stated is not None and stated.get(key) != os.path.basename(path):
                    raise ValueError(f'{path}: {shown(key)} is not where {INDEX} says')
                seen.add(key)
                tensor = f.get_slice(key)
                shape, dtype, current = tuple(tensor.get_shape()), tensor.get_dtype(), names(key)
                if dtype not in DTYPES:
                    raise ValueError(f'{path}: {shown(key)} is {dtype}; only '
                                     f'{", ".join(DTYPES)} can be imported')
                if len(current) > 1 and (not shape or shape[0] % len(current)):
                    raise ValueError(f'{path}: {shown(key)} of shape {shape} cannot be cut into '
                                     f'{len(current)} steps')
                for part, name in enumerate(current):
                    if not name:
                        continue
                    if name in out:
                        raise ValueError(f'{path}: {shown(key)} holds {shown(name)}, which '
                                         f'{shown(out[name].key)} of {out[name].file} holds too')
                    cut = (shape[0] // len(current), *shape[1:]) if shape else ()
                    out[name] = Entry(path, key, cut, part)
    for key in stated or ():
        if key not in seen:
            raise ValueError(f'{os.path.join(folder, INDEX)}: {shown(key)} is not in '
                             f'{stated[key]}')
    return out


def read(entry: Entry, there: Sequence[slice]) -> np.ndarray:
    """A rectangle of a tensor, one slice for each of its axes, in the dtype it is stored in; of a
    product in float32."""
    if entry.by:
        inner = slice(0, entry.by.shape[1])
        rows = entry._replace(shape=(entry.shape[0], inner.stop), by=None)
        left, right = read(rows, (there[0], inner)), read(entry.by, (there[1], inner))
        return left.astype(np.float32) @ right.astype(np.float32).T
    with _open(entry.file) as f:        # anew each time: what a mapping has touched stays resident
        if not entry.shape:
            return f.get_tensor(entry.key)
        base = entry.part * entry.shape[0]
        first = slice(base + there[0].start, base + there[0].stop)
        return f.get_slice(entry.key)[(first, *there[1:])]


def whole(entry: Entry) -> np.ndarray:
    """All of a tensor, in the dtype it is stored in."""
    return read(entry, [slice(0, n) for n in entry.shape])


def places(folder: str) -> dict[str, tuple[str, int, int]]:
    """(file, first byte, bytes) of every tensor that `write` wrote to `folder`, by key."""
    out = {}
    for path in _files(folder)[0]:
        with open(path, 'rb') as f:
            size = int.from_bytes(f.read(8), 'little')
            header = json.loads(f.read(size))
        header.pop('__metadata__')
        out |= {key: (os.path.basename(path), 8 + size + first, last - first)
                for key, (first, last) in ((k, v['data_offsets']) for k, v in header.items())}
    return out


def write(folder: str, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[np.ndarray], *,
          shard_bytes: int | None, short: Container[str] = ()) -> int:
    """Writes float32 `tensors`, which come in the order of `shapes`, and returns their bytes.

    One tensor at a time is held. At most about `shard_bytes` go to one file, the files then being
    listed in an index; None: one file, whatever its size. short: keys that are stored as bfloat16,
    rounded to the nearest (ties to even).
    """
    files: list[dict[str, int]] = [{}]
    for key, shape in shapes.items():
        size = (2 if key in short else 4) * math.prod(shape)
        if files[-1] and shard_bytes is not None and sum(files[-1].values()) + size > shard_bytes:
            files.append({})
        files[-1][key] = size
    names = [f'model-{i + 1:05d}-of-{len(files):05d}.safetensors' for i in range(len(files))]
    if len(files) == 1:
        names = [SINGLE]
    tensors = iter(tensors)
    for name, sizes in zip(names, files, strict=True):
        # By hand, because the library wants all of a file in memory: a header, then the bytes.
        header, at = {'__metadata__': {'format': 'pt'}}, 0
        for key, size in sizes.items():
            header[key] = {'dtype': 'BF16' if key in short else 'F32',
                           'shape': list(shapes[key]), 'data_offsets': [at, at + size]}
            at += size
        text = json.dumps(header, separators=(',', ':')).encode()
        text += b' ' * (-len(text) % 8)
        with open(os.path.join(folder, name), 'wb') as f:
            f.write(len(text).to_bytes(8, 'little') + text)
            for key in sizes:
                tensor = np.asarray(next(tensors), '<f4', order='C')   # scalars too
                if tensor.shape != tuple(shapes[key]):
                    raise ValueError(f'{key} has shape {tensor.shape}, not {shapes[key]}')
                if key in short:
                    tensor = tensor.astype(ml_dtypes.bfloat16).view('<u2')
                f.write(tensor.data)
    total = sum(sum(sizes.values()) for sizes in files)
    if len(files) > 1:
        where = {key: name for name, keys in zip(names, files, strict=True) for key in keys}
        with open(os.path.join(folder, INDEX), 'w', encoding='utf-8') as f:
            json.dump({'metadata': {'total_size': total}, 'weight_map': where}, f, indent=1)
    return total

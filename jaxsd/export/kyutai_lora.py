# SPDX-License-Identifier: Apache-2.0
"""Low-rank terms of kyutai's LMModel: the `lora.safetensors` that moshi-finetune writes.

A term is W + scale B A for every linear map, A [r, in] and B [out, r] (moshi modules/lora.py). The
peer packs q, k and v of a layer into one map with one A, and has one rank for all maps; our
temporal q, k and v are three maps. Where the three share one A, as terms that came from such a file
do until they are trained, a file has their rank. Otherwise it has three times that rank: the three
lie side by side, and every other map is padded with zeros, which changes no number of the model and
which import undoes.
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxsd import model
from jaxsd.config import ConfigError
from jaxsd.export import kyutai, rules, safetensors
from jaxsd.export.facts import Json, disagreements, facts
from jaxsd.stage import flatten

FILE = 'lora.safetensors'
TABLES = ('frontend/table', 'head/text_table', 'head/tables')
PACKED = 3      # maps that the peer's packed projection holds


class Linear(NamedTuple):
    """One of the peer's linear maps: its module, and where its stretches of outputs lie in ours.

    parts: (folder of the Dense, place among its stacked layers and steps, how many outputs).
    """

    module: str
    parts: tuple[tuple[str, tuple[int, ...], int], ...]


def _places(have: Mapping, shapes: Mapping) -> tuple[list[Linear], list[rules.Piece]]:
    """The peer's linear maps, and its embedding tables, by the rules of the full checkpoint."""
    linears, tables = [], []
    for piece in rules.pieces(kyutai.rules_of(have).rules, shapes):
        if piece.sections[0].path in TABLES:
            tables.append(piece)
        elif all(s.path.endswith('/kernel') for s in piece.sections):
            linears.append(Linear(piece.key.removesuffix('.weight'), tuple(
                (s.path.removesuffix('/kernel'),
                 tuple(i for i in s.index if not isinstance(i, slice)), s.stop - s.start)
                for s in piece.sections)))
    return linears, tables


def _shapes(config, lora: Mapping | None = None) -> dict:
    return {p: leaf.shape for p, leaf in flatten(model.abstract(config, lora)[1]).items()}


def _terms(linear: Linear, flat: Mapping) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A [r, in] and B [out, r] of each part."""
    for folder, at, outputs in linear.parts:
        a, b = (np.asarray(flat[f'{folder}/{name}'][at], np.float32)
                for name in ('lora_a', 'lora_b'))
        yield a.reshape(-1, a.shape[-1]).T, b.reshape(b.shape[0], outputs).T


def _packed(terms, wide: bool) -> tuple[np.ndarray, np.ndarray]:
    """One A and B for the maps of `terms`, which share their A unless `wide`."""
    a, b = zip(*terms, strict=True)
    if not wide:
        return a[0], np.concatenate(b)
    rank = a[0].shape[0]
    out = np.zeros((sum(len(x) for x in b), rank * len(b)), np.float32)
    row = 0
    for i, x in enumerate(b):
        out[row:row + len(x), i * rank:(i + 1) * rank] = x
        row += len(x)
    return np.concatenate(a), out


def write(folder: str, config, flat: Mapping, *, shard_bytes: int, lora_scale: float,
          tables: bool = False) -> dict:
    """Writes the low-rank terms among the parameters `flat` (by path) to `folder`, and config.json.

    See `runtimes.Runtime`. tables: also the embedding tables, for a stage that trains them. Raises
    ConfigError for a config that kyutai's LMModel cannot be and for parameters without terms.
    """
    del shard_bytes         # one file: terms are small
    have = facts(config)
    kyutai.check(have, 'kyutai-lora')
    linears, pieces = _places(have, _shapes(config))
    missing = [f for linear in linears for f, _, _ in linear.parts if f'{f}/lora_a' not in flat]
    if missing:
        raise ConfigError(f"format 'kyutai-lora' needs a low-rank term for every linear map; "
                          f"{missing[0]} has none: use format 'kyutai'")
    every = {linear.module: list(_terms(linear, flat)) for linear in linears}
    rank = len(next(iter(every.values()))[0][0])
    wide = any(not np.array_equal(terms[0][0], a) for terms in every.values() for a, _ in terms)
    total = rank * (PACKED if wide else 1)
    tensors = {}
    for module, terms in every.items():
        a, b = _packed(terms, wide)
        tensors[f'{module}.lora_A.weight'] = np.pad(a, ((0, total - len(a)), (0, 0)))
        tensors[f'{module}.lora_B.weight'] = np.pad(b, ((0, 0), (0, total - b.shape[1])))
    if tables:
        tensors |= {piece.key: rules.forward(piece, flat) for piece in pieces}
    save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()},
              os.path.join(folder, FILE), {'format': 'pt'})
    with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as f:
        json.dump(kyutai.spell(have) | dict(lora=True, lora_rank=total, lora_scaling=lora_scale,
                                            lora_name=FILE), f, indent=2, sort_keys=True)
        f.write('\n')
    size = sum(x.nbytes for x in tensors.values())
    return dict(bytes=size, tensors=len(tensors), numbers=size // 4, about=(
        'low-rank terms for the `LMModel` of the `moshi` package: load the model that they adapt '
        'with `moshi.models.loaders.get_moshi_lm(base, lm_kwargs, lora_weights='
        f'"{FILE}")`, lm_kwargs being config.json'))


def read(config, source: str, base: Mapping, lora: Mapping) -> dict:
    """The parameters `base` (by path) of `config` with the terms of folder (or file) `source`.

    lora: dict(rank, scale) of the stage that they belong to. Embedding tables in the file replace
    those of `base`. Raises ConfigError where the file is another model's or of another rank or
    scale, ValueError naming file and key for damage.
    """
    have = facts(config)
    kyutai.check(have, 'kyutai-lora')
    rank, have['checkpoint'] = _agree(have, source, lora)
    shapes = _shapes(config)
    linears, pieces = _places(have, shapes)
    found = safetensors.entries(source, lambda key: kyutai.dialect(key, have))
    made = {p: np.zeros(shape, np.float32) for p, shape in _shapes(config, lora).items()
            if p not in shapes}
    wanted = {piece.key: piece for piece in pieces}
    for linear in linears:
        outputs = sum(n for _, _, n in linear.parts)
        inputs = int(np.prod(made[f'{linear.parts[0][0]}/lora_a'].shape[
            len(linear.parts[0][1]):-1]))
        for name, shape in ((f'{linear.module}.lora_A.weight', (rank, inputs)),
                            (f'{linear.module}.lora_B.weight', (outputs, rank))):
            if name not in found:
                raise ValueError(f'{source} lacks {name}')
            if found[name].shape != shape:
                raise ValueError(f'{found[name].file}: {found[name].key} has shape '
                                 f'{found[name].shape}, the config wants {shape}')
            wanted[name] = None
    for key, entry in found.items():
        if key not in wanted:
            raise ValueError(f'{source} has tensors without a place in the config: '
                             f'{safetensors.shown(key)}')
        if wanted[key] is not None and entry.shape != wanted[key].shape:
            raise ValueError(f'{entry.file}: {entry.key} has shape {entry.shape}, the config wants '
                             f'{wanted[key].shape}')
    for linear in linears:
        a, b = (_whole(found[f'{linear.module}.{name}.weight']) for name in ('lora_A', 'lora_B'))
        row = 0
        for i, (folder, at, outputs) in enumerate(linear.parts):
            part_a, part_b = _narrow(a, b[row:row + outputs], lora['rank'],
                                     i if len(linear.parts) > 1 else 0, linear.module)
            for name, x in (('lora_a', part_a.T), ('lora_b', part_b.T)):
                target = made[f'{folder}/{name}']
                target[at] = x.reshape(target[at].shape)
            row += outputs
    out = dict(base) | made
    for piece in pieces:
        if piece.key in found:
            section, = piece.sections
            replace = jax.jit(lambda table, rows, at=section.index: table.at[at].set(rows))
            out[section.path] = replace(jnp.asarray(out[section.path]), _whole(found[piece.key]))
    return out


def _agree(have: Mapping, source: str, lora: Mapping) -> tuple[int, Mapping]:
    """The rank of the file's terms and the facts of the model that they adapt."""
    if not os.path.exists(source):
        raise ValueError(f'--source: no file or folder {source}')
    folder = source if os.path.isdir(source) else os.path.dirname(os.path.abspath(source))
    path = os.path.join(folder, 'config.json')
    if not os.path.lexists(path):
        raise ValueError(f'no {path}, which says what the terms are multiplied by')
    values = safetensors.read_json(path)
    j = Json(values, path)
    if not j.flag('lora'):
        raise ValueError(f"{path}: lora is not true; use format 'kyutai' for a whole model")
    rank = j.number('lora_rank', 128, high=1 << 16)
    scale = j.number('lora_scaling', 2.0, low=0, high=1 << 16, kind=float)
    said = kyutai.read({k: v for k, v in values.items() if k != 'lora'}, path)
    wrong = [*disagreements(have, kyutai.cut(have, said)).values()]
    if scale != lora['scale']:
        wrong.append(f"lora.scale is {lora['scale']}, the checkpoint has {scale}")
    if rank not in (lora['rank'], PACKED * lora['rank']):
        wrong.append(f"lora.rank is {lora['rank']}, the checkpoint has {rank}")
    if wrong:
        raise ConfigError(f'the config is not that of {path}: {"; ".join(wrong)}')
    return rank, said


def _narrow(a: np.ndarray, b: np.ndarray, rank: int, i: int, module: str
            ) -> tuple[np.ndarray, np.ndarray]:
    """Stretch `i` of A and B, of `rank`; the rest of B must be zeros, as `_packed` leaves it."""
    if len(a) == rank:
        return a, b
    mine = slice(i * rank, (i + 1) * rank)
    if np.delete(b, mine, axis=1).any():
        raise ConfigError(f'the terms of {module} are of rank {len(a)}: set lora.rank to that, not '
                          f'{rank}')
    return a[mine], b[:, mine]


def _whole(entry: safetensors.Entry) -> np.ndarray:
    return safetensors.whole(entry).astype(np.float32)

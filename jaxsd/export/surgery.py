# SPDX-License-Identifier: Apache-2.0
"""Puts the weights of one model where another has room for them: a text model starts a spoken one.

Both are configs of ours, so this knows no file format. The backbone goes over as it is. Of the
vocabulary's rows those that stand for the same ids go over, in the embedding table and in the
output map, and the others begin as the stage says (see `rows`). What has no counterpart on either
side must be declared in the stage's `graft`::

    graft=dict(rows=dict(name='mean', keep=32000),  how rows that the checkpoint lacks begin
               fresh=('head/(inputs|blocks)/.*',),  ours to draw anew
               unused=('head/out/kernel',),         theirs to leave behind
               unlike=('backbone.theta',))          facts in which the config departs from theirs
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd import model
from jaxsd.config import ConfigError, bind, plain, typed
from jaxsd.export.facts import disagreements, facts
from jaxsd.export.streaming import Patch, some, whole
from jaxsd.stage import flatten
from jaxsd.vocab import Vocab, initial

TABLE, TEXT_TABLE = 'frontend/table', 'head/text_table'             # [ids, width]
FLAT_OUT, TEXT_OUT = 'head/out/kernel', 'head/text_out/kernel'      # [width, ids]
IDS = ('vocab.size', 'vocab.rows', 'rows (size, predicted)')
STRUCTURE = (*IDS, 'head.name')
SHAPES = ('name', 'width', 'layers', 'heads', 'kv_heads', 'head_dim', 'mlp', 'experts', 'qkv_bias',
          'qk_norm', 'step_weights')    # facts of a slot that its parameters' shapes follow from


def shared_rows(ours: Vocab, theirs: Vocab, keep: int | None) -> list[tuple[int, int, int]]:
    """(row of ours, row of theirs, how many) for the stretches of ids that mean the same.

    Two lines agree id by id, a line is the text row of streams, and streams agree by name. keep:
    how many of a line's ids, so that its other rows (reserved ones, padding) are replaced.
    """
    if len(theirs.rows) == 1:
        text = ours.ranges['text'][1] if len(ours.rows) == 1 else ours.rows[0].predicted
        if keep is None and theirs.size > text and theirs.size != ours.size:
            raise ConfigError(f'the checkpoint has {theirs.size} ids and the config {text} of text:'
                              ' say in graft.rows.keep how many of them mean the same here')
        room = ours.rows[0].predicted
        return [(0, 0, min(theirs.size, room, theirs.size if keep is None else keep))]
    if len(ours.rows) == 1:
        raise ConfigError('the checkpoint has a row per stream, the config has one line: only a '
                          'config of streams can start from it')
    rows = {row.name: row for row in theirs.rows}
    out = []
    for row in ours.rows:
        other = rows.get(row.name)
        if other is not None and (other.size, other.predicted) == (row.size, row.predicted):
            out.append((row.start, other.start, row.size))
        elif other is not None and row.name == 'text':      # the initial token comes after the text
            out += [(row.start, other.start, min(row.predicted, other.predicted)),
                    (initial(row), initial(other), 1)]
    return out


def patches(ours, theirs, keep: int | None = None) -> dict[str, list[Patch]]:
    """By path of ours: what the parameters of config `theirs` have for those of config `ours`."""
    a, b = ({p: tuple(leaf.shape) for p, leaf in flatten(model.abstract(c)[1]).items()}
            for c in (ours, theirs))
    rows = shared_rows(model.make_vocab(ours), model.make_vocab(theirs), keep)
    text = min(rows[0][2], model.make_vocab(ours).rows[0].predicted)
    out: dict[str, list[Patch]] = {path: [] for path in a}
    for path, shape in a.items():
        if path == TABLE:
            out[path] = [Patch(TABLE, (start, 0), (size, shape[1]), (0, 1), (to, 0))
                         for to, start, size in rows if b[TABLE][1] == shape[1]]
        elif path == TEXT_TABLE and path in b and b[path][1] == shape[1]:
            out[path] = [Patch(path, (start, 0), (size, shape[1]), (0, 1), (to, 0))
                         for to, start, size in rows if to < shape[0]]
        elif path in (FLAT_OUT, TEXT_OUT):
            other = next((p for p in (FLAT_OUT, TEXT_OUT) if p in b), TABLE)
            order = (1, 0) if other == TABLE else (0, 1)
            whole_rows = path == other and b[path] == shape and keep is None
            size = (shape[0], shape[1] if whole_rows else text)
            if b[other][order[0]] == shape[0]:
                out[path] = [Patch(other, (0, 0), tuple(size[i] for i in order), order, (0, 0))]
        elif b.get(path) == shape:
            out[path] = [whole(path, shape)]
    return out


def declaring(wrong: Mapping[str, str], graft: Mapping, place: str) -> str:
    """An error's text about the `disagreements` wrong: what they are, and the graft to add to
    `graft` (so far) that declares them all, as it is typed for the `place` of it in a config."""
    fixed = [k for k in wrong if k not in STRUCTURE and k.partition('.')[0] in ('backbone', 'head')
             and k.partition('.')[2] in SHAPES]
    text = '; '.join(wrong.values())
    if fixed:
        text += f'; {", ".join(fixed)} must be equal'
    if len(fixed) == len(wrong):
        return text
    made = plain(graft)
    if not made.get('rows') and any(k in IDS for k in wrong):
        made['rows'] = {'name': 'mean'}
    unlike = (*made.get('unlike', ()), *(k for k in wrong if k not in (*fixed, *STRUCTURE)))
    if unlike or not made:
        made['unlike'] = unlike
    say = f'add {typed(f"--config.{place}={made!r}")}' if place else f'graft={made!r} says so'
    return f'{text}; if {"the rest" if fixed else "all"} of that is meant, {say}'


def check(ours, theirs, said: Mapping, graft: Mapping, where: str, place: str = ''
          ) -> dict[str, list[Patch]]:
    """`patches`, less what `graft` wants fresh, if everything else is matched or declared.

    said: the facts that the checkpoint states. where: names stage and checkpoint in errors, place
    the graft's own (see `declaring`). Raises ConfigError that lists what is not declared and says
    how to.
    """
    rows = plain(graft.get('rows', {}))
    keep = rows.pop('keep', None)
    if keep is not None and (type(keep) is not int or keep < 1):
        raise ConfigError(f'{where}: graft.rows.keep is a number of rows above 0, got {keep!r}')
    if rows:
        bind(rows, 'jaxsd.export.rows', f'{where}: graft.rows')
    mine = facts(ours)
    other_head = said.get('head.name') != mine['head.name']
    one_line = len(mine['vocab.rows']) == 1
    compared = {k: v for k, v in said.items() if k not in (*STRUCTURE, *graft.get('unlike', ()))
                and not (other_head and k.startswith('head.'))
                and not (one_line and k.startswith(('vocab.', 'layout.'))
                         and k not in ('vocab.bos', 'vocab.eos'))}
    if wrong := disagreements(mine, compared):
        raise ConfigError(f'{where}: {declaring(wrong, graft, place)}')
    shapes = [{p: tuple(leaf.shape) for p, leaf in flatten(model.abstract(c)[1]).items()}
              for c in (ours, theirs)]
    try:
        found = patches(ours, theirs, keep)
    except ConfigError as e:
        raise ConfigError(f'{where}: {e}') from None
    found = {path: [] if _any(graft.get('fresh', ()), path) else parts
             for path, parts in found.items()}
    lacking = [p for p, parts in found.items() if not parts and not _any(graft.get('fresh', ()), p)]
    if lacking:
        raise ConfigError(f'{where}: the checkpoint has nothing for {some(lacking)}; declare what '
                          'is to begin fresh in graft.fresh')
    short = [p for p, parts in found.items() if parts and _filled(parts) < math.prod(shapes[0][p])]
    if short and not rows:
        raise ConfigError(f'{where}: the checkpoint lacks rows of {some(short)}; say in graft.rows '
                          "how they begin: dict(name='mean'), dict(name='zero') or "
                          "dict(name='normal', sigma=0.02)")
    left = []
    for path, shape in shapes[1].items():
        taken = max(_filled(p for p in parts if p.path == path) for parts in found.values())
        if not taken:
            left.append(path)
        elif taken < math.prod(shape) and keep is None:
            left.append(f'{path}/rows')         # some of its rows: more than the config has
    left = [path for path in left if not _any(graft.get('unused', ()), path)]
    if left:
        raise ConfigError(f'{where}: the config has no place for {some(left)} of the checkpoint; '
                          'declare what is to be left behind in graft.unused')
    return found


def _filled(parts: Iterable[Patch]) -> int:
    return sum(math.prod(patch.size) for patch in parts)


def _any(patterns: Sequence[str], path: str) -> bool:
    try:
        return any(re.fullmatch(pattern, path) for pattern in patterns)
    except (re.error, TypeError) as e:
        raise ConfigError(f'graft takes regular expressions of whole paths: {e}') from None


def begin(found: Mapping, arrays: Mapping, graft: Mapping, config, key, where: Mapping) -> dict:
    """`arrays`, which the patches have filled, with their new rows and with the fresh parameters.

    Fresh parameters are those that `model.init` draws from `key`. where: shardings by path.
    """
    out = dict(arrays)
    rows = plain(graft.get('rows', {}))
    rows.pop('keep', None)
    for i, (path, parts) in enumerate(found.items()):
        if not parts or _filled(parts) == math.prod(arrays[path].shape):
            continue
        fill = bind(rows, 'jaxsd.export.rows', 'graft.rows')
        axis = 0 if path in (TABLE, TEXT_TABLE) else 1      # of ids
        new = np.ones(arrays[path].shape[axis], bool)
        for p in parts:
            new[p.to[axis]:p.to[axis] + p.size[p.order[axis]]] = False

        def filled(x, new, key, fill=fill, axis=axis):
            return jnp.swapaxes(fill(jnp.swapaxes(x, 0, axis), new, key), 0, axis)
        out[path] = jax.jit(filled, donate_argnums=0, out_shardings=where[path])(
            out[path], new, jax.random.fold_in(key, i))
    fresh = tuple(path for path, parts in found.items() if not parts)
    if fresh:
        def draw(key):
            flat = flatten(model.init(config, key))
            return {path: flat[path] for path in fresh}
        out |= jax.jit(draw, out_shardings={path: where[path] for path in fresh})(key)
    return {path: out[path] for path in found}

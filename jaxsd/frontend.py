# SPDX-License-Identifier: Apache-2.0
"""How symbols and sound enter: a Batch becomes x_BTD. One table over the vocabulary's line.

Where a config gives a frontend an encoder, the batch's features enter too (see `encoder`), and with
a prenet, another one, its frames: sound that the model itself has said.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import nnx

from jaxsd import nn
from jaxsd.sharding import Place, anywhere
from jaxsd.types import Sizes, Where, check, positive
from jaxsd.within import Within


def _dtype(dtype: str) -> str:
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise ValueError(f"frontend.dtype is 'float32', 'bfloat16' or 'float16', got {dtype!r}")
    return dtype


def _table(rngs, ids: int, width: int):
    return nnx.Param(nn.truncated(rngs.params(), (ids, width), width), axes=('vocab', 'embed'))


def _features(encoder, batch, dtype, place: Place, numbers: str = 'feats', slot: str = 'slot'):
    """What an encoder makes of the columns in which something is heard, zeros elsewhere: those
    whose slot is 1 (a 2 marks frames that are said and not read back)."""
    where = Where(batch['position'], batch['segment'])
    feats = place(batch[numbers].astype(dtype), 'batch', 'column', None)
    there = (batch[slot] == 1).astype(jnp.int32)
    x_BTD = encoder(feats, place(there, 'batch', 'column'), where)
    return jnp.where((there > 0)[..., None], x_BTD, 0.0)


class Summed(nnx.Module):
    """The sum over a column's rows of their embeddings; a cell of NOTHING adds exact zeros.

    With one row this is a plain embedding. No scaling, no norm (arXiv 2410.00037 §3.4.2).

    heard: the first words of the names of the rows that enter; () is all of them. Rows left out are
    only spoken. encoder: adds what is heard as features. prenet: an encoder that adds the frames
    that have been spoken (arXiv 2305.15255 §3.2); a narrow one keeps the next frame from being no
    more than a copy of the last.
    """

    def __init__(self, sizes: Sizes, *, rngs, dtype: str = 'bfloat16', heard: Sequence[str] = (),
                 encoder: Callable | None = None, prenet: Callable | None = None):
        self.dtype = _dtype(dtype)
        kinds = [row.name.split()[0] for row in sizes.rows]
        if not set(heard) <= set(kinds):
            raise ValueError(f'frontend.heard names {tuple(heard)}, but the rows are '
                             f'{sorted(set(kinds))}')
        self.table = _table(rngs, sizes.vocab, sizes.width)
        if encoder is not None:
            self.encoder = encoder(sizes.width, rngs=rngs)
        if prenet is not None:
            self.prenet = prenet(sizes.width, rngs=rngs)
        self.rows = len(sizes.rows)
        self.heard = tuple(k for k, kind in enumerate(kinds) if not heard or kind in heard)

    def __call__(self, batch, place: Place = anywhere):
        tokens_BKT = check(batch['tokens'], 'BKT', K=self.rows)
        if len(self.heard) < self.rows:
            tokens_BKT = tokens_BKT[:, jnp.asarray(self.heard)]
        x_BTD = nn.embedded(self.table[...], tokens_BKT, place)
        if hasattr(self, 'encoder') and 'feats' in batch:
            x_BTD = x_BTD + _features(self.encoder, batch, self.dtype, place)
        if hasattr(self, 'prenet') and 'frames' in batch:
            x_BTD = x_BTD + _features(self.prenet, batch, self.dtype, place, 'frames', 'framed')
        return x_BTD.astype(self.dtype)


class Averaged(nnx.Module):
    """The mean over a column's rows of their embeddings (arXiv 2408.16725 §3.2).

    Where something is heard, features stand in the place of every row but the first: with seven
    rows of speech beside the text they count seven eighths.
    """

    def __init__(self, sizes: Sizes, *, rngs, dtype: str = 'bfloat16',
                 encoder: Callable | None = None):
        self.dtype = _dtype(dtype)
        self.table = _table(rngs, sizes.vocab, sizes.width)
        if encoder is not None:
            self.encoder = encoder(sizes.width, rngs=rngs)
        self.rows = len(sizes.rows)

    def __call__(self, batch, place: Place = anywhere):
        tokens_BKT = check(batch['tokens'], 'BKT', K=self.rows)
        if not hasattr(self, 'encoder') or 'feats' not in batch:
            x_BTD = nn.embedded(self.table[...], tokens_BKT, place)
            return (x_BTD / self.rows).astype(self.dtype)
        text = nn.embedded(self.table[...], tokens_BKT[:, :1], place)
        rest = nn.embedded(self.table[...], tokens_BKT[:, 1:], place)
        features = (self.rows - 1) * _features(self.encoder, batch, self.dtype, place)
        rest = jnp.where((batch['slot'] > 0)[..., None], features, rest)
        return ((text + rest) / self.rows).astype(self.dtype)


class Grouped(nnx.Module):
    """A column's rows of speech as one vector: small embeddings side by side through a linear map.

    A row called text, if there is one, enters by its own embedding in columns without a group; in
    the others the group stands in its place (arXiv 2410.08035 §3). Without one, all rows are the
    group: the patch of arXiv 2305.07185.

    inside: the width of one step's embedding. steps: how many steps the group's rows are, in order;
    the rows of one step are added up (the codebooks of a frame); 0 makes every row a step. layers,
    heads, mlp: a transformer over the steps before they are set side by side; 0 layers is none.
    """

    def __init__(self, sizes: Sizes, *, rngs, inside: int, steps: int = 0, layers: int = 0,
                 heads: int = 0, mlp: int = 0, dtype: str = 'bfloat16'):
        positive('frontend', inside=inside)
        self.dtype = _dtype(dtype)
        self.text = int(sizes.rows[0].name == 'text')
        rows = sizes.rows[self.text:]
        self.rows, self.steps = len(sizes.rows), steps or len(rows)
        if not rows or len(rows) % self.steps:
            raise ValueError(f'frontend.steps {steps} must divide the {len(rows)} rows of speech')
        self.start = min(row.start for row in rows)
        self.inside = _table(rngs, sizes.vocab - self.start, inside)
        if self.text:
            self.words = _table(rngs, self.start, sizes.width)
        self.out = nn.Dense((self.steps, inside), (sizes.width,), ('stream', 'mlp', 'embed'),
                            rngs=rngs)
        self.layers = layers
        if layers:
            self.within = Within(rngs=rngs, width=inside, layers=layers, heads=heads, mlp=mlp)
            self.place = nnx.Param(nn.truncated(rngs.params(), (self.steps, inside), inside),
                                   axes=('stream', 'embed'))

    @property
    def table(self):
        return self.words if self.text else self.inside

    def __call__(self, batch, place: Place = anywhere):
        tokens_BKT = check(batch['tokens'], 'BKT', K=self.rows)
        group = tokens_BKT[:, self.text:]
        here = (group >= 0).any(1)[..., None]
        parts = [nn.embedded(self.inside[...], rows - self.start, place)
                 for rows in jnp.split(group, self.steps, axis=1)]
        x = jnp.stack(parts, axis=-2).astype(self.dtype)            # [B, T, steps, inside]
        if self.layers:
            mask = jnp.ones((self.steps, self.steps), bool)
            x = self.within(x + self.place[...].astype(self.dtype), mask)
        x_BTD = jnp.where(here, self.out(x), 0.0)
        if self.text:
            words = nn.embedded(self.words[...], tokens_BKT[:, :1], place)
            x_BTD = x_BTD + jnp.where(here, 0.0, words)
        return x_BTD.astype(self.dtype)


summed, averaged, grouped = Summed, Averaged, Grouped

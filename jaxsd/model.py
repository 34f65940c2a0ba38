# SPDX-License-Identifier: Apache-2.0
"""Frontend, backbone and head as one module; the one place where column t-1 predicts column t."""

import functools
import json

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsd import backbone, encoder, frontend, head, nn, objective, vocab
from jaxsd.config import ConfigError, bind, nested, plain
from jaxsd.sharding import Place, anywhere
from jaxsd.types import Where

del backbone, encoder, frontend, head, objective, vocab      # found by name


class Model(nnx.Module):
    """frontend(batch) -> backbone -> head. Columns are shifted here and nowhere else."""

    def __init__(self, frontend, backbone, head):
        self.frontend, self.backbone, self.head = frontend, backbone, head

    def hidden(self, batch, place: Place = anywhere):
        """h_BTD, what the backbone makes of every column of a packed batch, and its terms."""
        # A batch comes with all its columns; from here on every device has its own.
        tokens = place(batch['tokens'], 'batch', 'stream', 'column')
        x_BTD = place(self.frontend(batch | {'tokens': tokens}, place), 'batch', 'column', 'width')
        where = Where(*(place(batch[k], 'batch', 'column') for k in ('position', 'segment')))
        return self.backbone(x_BTD, where, place=place)

    def __call__(self, batch, key=None, place: Place = anywhere):
        """Log-probability and hit of every cell, float32 [B, K, T], aligned with the cell itself.

        The cell of column t is predicted from columns before t (and earlier rows of t). Column 0 is
        0, as is every row that the head does not predict.
        """
        return self.forward(batch, key, place)[:2]

    def forward(self, batch, key=None, place: Place = anywhere):
        """What an objective takes: log-probabilities, hits, and the backbone's own terms.

        Of a head that speaks frames also `frames`, what it says in every column and what it should
        have said, both float32 [B, T, M], the column being predicted as its cells are.
        """
        self = nn.together(self)
        h_BTD, beside = self.hidden(batch, place)
        target = place(next_column(batch['tokens']), 'batch', 'stream', 'column')
        logp, hit = self.head.log_prob(h_BTD, target, self.table, key, place)
        if hasattr(self.head, 'frames') and 'frames' in batch:
            before = jnp.moveaxis(_later(jnp.moveaxis(h_BTD, 1, -1)), -1, 1)
            beside = beside | dict(frames=self.head.frames(before, batch, key, place))
        return _later(logp), _later(hit), beside

    def scores(self, batch):
        """Per row, logits [B, T, V_row] for the column after each column (None: unpredicted)."""
        self = nn.together(self)
        return self.head.scores(self.hidden(batch)[0], next_column(batch['tokens']), self.table)

    def step(self, tokens_BKT, where: Where, cache, key, pick, heard=None):
        """Reads T columns, then samples the column after the last: ([B, K], the new cache).

        heard: the columns' features, a dict of feats and slot, where the frontend has an encoder.
        """
        h_BD, after = self.read(tokens_BKT, where, cache, heard)
        if 'head' not in cache:
            return self.head.sample(h_BD, self.table, key, pick), after
        column, of_head = self.head.sample(h_BD, self.table, key, pick, cache['head'])
        return column, after | dict(head=of_head)

    def read(self, tokens_BKT, where: Where, cache, heard=None):
        """Reads T columns: (what it makes of the last, [B, D], the new cache)."""
        batch = dict(tokens=tokens_BKT, **where._asdict(), **(heard or {}))
        h_BTD, after = self.backbone(self.frontend(batch), where, cache)
        return h_BTD[:, -1], after

    def empty_cache(self, rows: int, columns: int) -> dict:
        """What `step` needs to remember of `columns` columns of `rows` sequences."""
        dtype = jnp.dtype(self.frontend.dtype)
        cache = self.backbone.empty_cache(rows, columns, dtype)
        if hasattr(self.head, 'empty_cache'):       # one that remembers what it has said
            cache['head'] = self.head.empty_cache(rows, columns, dtype)
        return cache

    @property
    def table(self):
        return self.frontend.table[...]


def next_column(tokens_BKT):
    """Column t holds what column t predicts: the column after it; the last predicts nothing."""
    return jnp.concatenate([tokens_BKT[..., 1:], jnp.full_like(tokens_BKT[..., :1], -1)], axis=-1)


def _later(x_BKT):
    return jnp.concatenate([jnp.zeros_like(x_BKT[..., :1]), x_BKT[..., :-1]], axis=-1)


def make_vocab(config):
    """The vocabulary of a config: `c.vocab` applied to `c.codec`."""
    return bind(config.vocab, 'jaxsd.vocab', 'vocab')(config.codec)


def build(config, *, rngs, lora: dict | None = None) -> Model:
    """The model of a config. `lora` is a stage's dict(rank, scale) or None. Call it in a trace."""
    sizes = make_vocab(config).sizes(config.backbone.width)
    parts = [bind(nested(config[slot], slot), f'jaxsd.{slot}', slot, given=('rngs',))(
        sizes, rngs=rngs) for slot in ('frontend', 'backbone', 'head')]
    model = Model(*parts)
    if lora:
        nn.add_lora(model, lora['rank'], lora['scale'], rngs=rngs)
    return model


def abstract(config, lora: dict | None = None):
    """(graph definition, shapes, axes): nested dicts of ShapeDtypeStruct and of axis names.

    No arrays are made: a 7B model takes a fraction of a second, and none when asked for again.
    """
    slots = ('codec', 'vocab', 'frontend', 'backbone', 'head')
    # Of a notebook's own functions, one of the same name may be another by now.
    named = (bind(nested(config[slot], slot), f'jaxsd.{slot}', slot, given=('rngs',)).func
             for slot in slots[1:])
    what = (*named, json.dumps([*(plain(config[slot]) for slot in slots), plain(lora)]))
    if what not in _SEEN:
        if len(_SEEN) > 64:
            _SEEN.clear()
        _SEEN[what] = _abstract(config, lora)
    graph, *trees = _SEEN[what]
    return graph, *(jax.tree.map(lambda x: x, tree) for tree in trees)


_SEEN: dict = {}        # what `abstract` returned, by what it depends on


def _abstract(config, lora):
    made = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0), lora=lora), graph=False)
    graph, state = nnx.split(made, graph=False)
    axes = jax.tree.map(lambda v: v.get_metadata()['axes'], state,
                        is_leaf=lambda v: isinstance(v, nnx.Variable))
    return graph, nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


def init(config, key, lora: dict | None = None):
    """Fresh parameters as a nested dict, drawn from `key`. jit it with shardings to place them."""
    model = build(config, rngs=nnx.Rngs(key), lora=lora)
    return nnx.to_pure_dict(nnx.split(model, graph=False)[1])


def objective_of(config):
    """The config's objective, given the rows and ranges of its vocabulary."""
    v = make_vocab(config)
    fn = bind(config.objective, 'jaxsd.objective', 'objective', given=('sizes', 'ranges'))
    if config.objective.get('balance') and not config.backbone.get('experts'):
        raise ConfigError('objective.balance is about experts, and backbone.experts is 0')
    return functools.partial(fn, sizes=v.sizes(config.backbone.width), ranges=v.ranges)


def count(shapes) -> int:
    """How many parameters a tree of shapes holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))

# SPDX-License-Identifier: Apache-2.0
"""Facts: what a config, and a peer's config.json, can both be read as.

A flat dict such as {'backbone.heads': 32, 'backbone.theta': 1e4}. Export spells a config's facts as
the peer's config.json; import compares the two before a single tensor is read, so that weights
never run with another rotary base, window or norm than they were trained with.
"""


from collections.abc import Mapping
from typing import NamedTuple

import ml_collections as mlc

from jaxsd.config import NESTED, ConfigError, bind, nested, options_of, plain, resolve
from jaxsd.export.rules import Rule
from jaxsd.layout import duplex
from jaxsd.model import make_vocab

BLOCKS = 'backbone/blocks/'
WINDOW = (1 << 31) - 1      # the most columns that attention can count (int32)


class Plan(NamedTuple):
    """Rules of a checkpoint, paths of ours it may leave partly empty, peer keys without meaning.

    copies: peer keys that may be there as well if they say the same as another key, with the line
    that tells what to do where they do not. factors: peer keys [rows, rank] that another tensor
    [width, rank] maps to the width that a rule asks for: (key, that tensor's key, rank).
    """

    rules: tuple[Rule, ...]
    spare: tuple[str, ...] = ()
    ignored: str = '(?!)'           # regex over whole keys
    copies: tuple[tuple[str, str, str], ...] = ()       # (copy, original, what to do)
    factors: tuple[tuple[str, str, int], ...] = ()


def facts(config) -> dict:
    """What of `config` a checkpoint can speak about: slots' options, rows, specials, delays."""
    out = {}
    for slot in ('frontend', 'backbone', 'head'):
        bound = bind(nested(config[slot], slot), f'jaxsd.{slot}', slot, given=('rngs',))
        options = {k: p.default for k, p in options_of(bound.func).items()
                   if p.default is not p.empty} | bound.keywords
        out |= {f'{slot}.{k}': v for k, v in options.items()}
        out |= {f'{slot}.{k}': config[slot][k]['name'] for k in NESTED if k in config[slot]}
        out[f'{slot}.name'] = config[slot]['name']
    vocab = make_vocab(config)
    out |= {f'vocab.{name}': i for name, i in vocab.specials.items()}
    out |= {'vocab.size': vocab.size, 'vocab.rows': vocab.rows, 'columns': config.columns}
    out['rows (size, predicted)'] = tuple((row.size, row.predicted) for row in vocab.rows)
    out |= {f'codec.{k}': v for k, v in plain(config.codec).items()}
    layout = plain(config.layout)
    options = {k: p.default for k, p in
               options_of(resolve(layout['name'], 'jaxsd.layout')).items()} | layout
    late = {k: options[k] for k in ('acoustic_delay_columns', 'text_delay_columns') if k in options}
    if len(late) == 2:
        out['layout.delays'] = duplex.delays(vocab, **late)
    return out


def config_of(said: Mapping, *, like=None, columns: int = 4096, specials: Mapping | None = None
              ) -> mlc.ConfigDict:
    """The config whose facts are `said`: `facts` backwards, for what a checkpoint says of itself.

    What it leaves open (how rotary pairs lie, which ids are units) is as in the config `like`, or
    else the mechanism's default. specials: ids of bos and eos. Raises ValueError for rows and
    delays that no vocabulary has.
    """
    c = mlc.ConfigDict(dict(seed=0, columns=columns, objective=dict(name='weighted_ce'), stages=(),
                            data=dict(path='', sources=dict()), mesh=dict(), evals=dict()))
    names = dict(frontend='summed', backbone='decoder', head='flat')
    for slot, name in names.items():
        options = {k.partition('.')[2]: v for k, v in said.items() if k.startswith(f'{slot}.')}
        name = options.pop('name', name)
        same = like is not None and like[slot]['name'] == name
        legal = options_of(resolve(name, f'jaxsd.{slot}'))
        base = {k: v for k, v in plain(like[slot]).items() if k not in NESTED} if same else {}
        c[slot] = base | dict(name=name) | {     # a checkpoint that has no encoder leaves none open
            k: v for k, v in options.items() if k in legal}
        if 'dtype' in legal and not same:
            c[slot].dtype = 'float32'
    ids = {k: v for k, v in (specials or {}).items() if k in ('bos', 'eos')}
    if 'rows (size, predicted)' in said:
        # A bos past the text is its initial token, which a row of such a vocabulary has anyway.
        ids = {k: i for k, i in ids.items() if i < said['rows (size, predicted)'][0][1]}
        ids |= {k: said[f'vocab.{k}'] for k in ('pad', 'epad') if f'vocab.{k}' in said}
        c.codec, c.vocab, c.layout = _streams(said, ids)
        return c
    c.layout = dict(name='flat.sequence', fields=('text',))
    c.codec = dict(name='none', frame_hz=0.0, codebooks=1, size=0)
    c.vocab = dict(name='line', text_tokens=said['vocab.size'], markers=(), multiple=1) | ids
    if like is not None and make_vocab(like).rows == make_vocab(c).rows:
        c.codec, c.vocab, c.layout = (plain(like[k]) for k in ('codec', 'vocab', 'layout'))
    return c


def _streams(said: Mapping, ids: Mapping) -> tuple[dict, dict, dict]:
    """(codec, vocab, layout) with the rows and delays that a multistream checkpoint states."""
    rows, late = said['rows (size, predicted)'], said['layout.delays']
    spoken = sum(predicted > 0 for _, predicted in rows[1:])
    for speakers in (('mine', 'theirs'), ('mine',)):
        codebooks, rest = divmod(len(rows) - 1, len(speakers))
        if not codebooks or rest or spoken % codebooks:
            continue
        codec = dict(name='mimi', path='', frame_hz=12.5, codebooks=codebooks, size=rows[1][0] - 1)
        vocab = dict(name='streams', text_tokens=rows[0][1], speakers=speakers,
                     predicted=speakers[:spoken // codebooks]) | ids
        layout = dict(name='duplex.columns', text_delay_columns=late[0] - late[1],
                      acoustic_delay_columns=late[2] - late[1] if codebooks > 1 else 0)
        made = make_vocab(mlc.ConfigDict(dict(codec=codec, vocab=vocab)))
        if layout['acoustic_delay_columns'] < 0:
            continue
        if (tuple((row.size, row.predicted) for row in made.rows) == tuple(rows)
                and duplex.delays(made, **{k: layout[k] for k in layout if k != 'name'}) == late):
            return codec, vocab, layout
    raise ValueError(f'no vocabulary of one or two speakers has {len(rows) - 1} audio rows, '
                     f'{spoken} of them spoken, with delays {list(late)}')


def disagreements(ours: Mapping, theirs: Mapping) -> dict[str, str]:
    """The facts on which the config and the checkpoint differ, each with a sentence about it.

    A fact of theirs that is a frozenset stands for any of its values; one called `file.` is about
    how its files hold the numbers, and ours may hold them otherwise.
    """
    out = {}
    for key, value in theirs.items():
        if key.startswith('file.'):
            continue
        values = sorted(value) if isinstance(value, frozenset) else [value]
        if ours.get(key) not in values:
            out[key] = (f'{key} is {ours.get(key)!r}, the checkpoint has '
                        f'{" or ".join(map(repr, values))}')
    return out


def need(have: Mapping, want: Mapping, family: str) -> None:
    for key, values in want.items():
        if have.get(key) not in values:
            legal = ' or '.join(map(repr, values))
            raise ConfigError(f'{key} is {have.get(key)!r}; {family} can only say {legal}')


class Json:
    """A peer's config.json, read with bounds: every value is checked before anyone uses it."""

    def __init__(self, values: Mapping, path: str):
        self.values, self.path = values, path
        self.asked: set[str] = set()

    def _bad(self, key, want):
        return ValueError(f'{self.path}: {key} must be {want}, got {self.values.get(key)!r}')

    def number(self, key: str, default=None, *, low=1, high=1 << 24, kind=int):
        self.asked.add(key)
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | kind) or not low <= value <= high:
            raise self._bad(key, f'a number from {low} to {high}')
        return kind(value)

    def flag(self, key: str, default: bool = False) -> bool:
        self.asked.add(key)
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self._bad(key, 'true or false')
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """The ids that a key states, one or a list; none where it is absent, null or negative."""
        value = self.values.get(key)
        out = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and i < 1 << 24 for i in out):
            raise self._bad(key, 'an id, a list of ids or null')
        return tuple(i for i in out if i >= 0)

    def only(self, **legal) -> None:
        """Each key is absent or has one of its legal values."""
        self.asked |= set(legal)
        for key, values in legal.items():
            if key in self.values and self.values[key] not in values:
                legal = ' or '.join(map(repr, values))
                raise self._bad(key, f'{legal} (nothing else is supported)')

    def closed(self, *others: str) -> None:
        """There is no key but those that were asked for and `others`."""
        for key in self.values:
            if key not in self.asked and key not in others:
                raise ValueError(f'{self.path}: {key!r} is not known here and may mean another '
                                 'model than would be read; take it out if it does not')


def rotary_objects(j: Json) -> tuple[Mapping, Mapping]:
    """`rope_parameters` and `rope_scaling`, {} where absent. Raises ValueError for two that differ:
    which of them counts depends on who reads."""
    new, old = (j.values.get(k) or {} for k in ('rope_parameters', 'rope_scaling'))
    if not isinstance(new, Mapping) or not isinstance(old, Mapping):
        raise ValueError(f'{j.path}: rope_parameters and rope_scaling must be objects')
    if new and any(new.get(k) != x for k, x in old.items()):
        raise ValueError(f'{j.path}: rope_parameters and rope_scaling differ; leave out what the '
                         'model was not trained with')
    return new, old

# SPDX-License-Identifier: Apache-2.0
"""Facts: what a config, and a peer's config.json, can both be read as.

A flat dict such as {'backbone.heads': 32, 'backbone.theta': 1e4}. Export spells a config's facts as
the peer's config.json; import compares the two before a single tensor is read, so that weights
never run with another rotary base, window or norm than they were trained with.
"""


from collections.abc import Mapping
from typing import NamedTuple

from jaxsd.config import ConfigError, bind, options_of, plain, resolve
from jaxsd.export.rules import Rule
from jaxsd.layout import duplex
from jaxsd.model import make_vocab

BLOCKS = 'backbone/blocks/'


class Plan(NamedTuple):
    """Rules of a checkpoint, paths of ours it may leave partly empty, peer keys without meaning."""

    rules: tuple[Rule, ...]
    spare: tuple[str, ...] = ()
    ignored: str = '(?!)'           # regex over whole keys


def facts(config) -> dict:
    """What of `config` a checkpoint can speak about: slots' options, rows, specials, delays."""
    out = {}
    for slot in ('frontend', 'backbone', 'head'):
        bound = bind(config[slot], f'jaxsd.{slot}', slot, given=('rngs',))
        options = {k: p.default for k, p in options_of(bound.func).items()
                   if p.default is not p.empty} | bound.keywords
        out |= {f'{slot}.{k}': v for k, v in options.items()}
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


def disagreements(ours: Mapping, theirs: Mapping) -> list[str]:
    """Sentences for the facts on which the config and the checkpoint differ."""
    return [f'{key} is {ours.get(key)!r}, the checkpoint has {value!r}'
            for key, value in theirs.items() if ours.get(key) != value]


def need(have: Mapping, want: Mapping, family: str) -> None:
    for key, values in want.items():
        if have.get(key) not in values:
            legal = ' or '.join(map(repr, values))
            raise ConfigError(f'{key} is {have.get(key)!r}; {family} can only say {legal}')


class Json:
    """A peer's config.json, read with bounds: every value is checked before anyone uses it."""

    def __init__(self, values: Mapping, path: str):
        self.values, self.path = values, path

    def _bad(self, key, want):
        return ValueError(f'{self.path}: {key} must be {want}, got {self.values.get(key)!r}')

    def number(self, key: str, default=None, *, low=1, high=1 << 24, kind=int):
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | kind) or not low <= value <= high:
            raise self._bad(key, f'a number from {low} to {high}')
        return kind(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self._bad(key, 'true or false')
        return value

    def only(self, **legal) -> None:
        """Each key is absent or has one of its legal values."""
        for key, values in legal.items():
            if key in self.values and self.values[key] not in values:
                legal = ' or '.join(map(repr, values))
                raise self._bad(key, f'{legal} (nothing else is supported)')

# SPDX-License-Identifier: Apache-2.0
"""What an ablation asks, read from its file and checked; nothing is resolved yet."""

import dataclasses
import graphlib
import os
import re

from jaxsd import config as configs
from jaxsd.config import ConfigError, unknown

UNITS = dict(tokens='positions (rows x columns; a column of several streams is one)',
             audio_hours='hours of sound', flops='floating-point operations',
             wall_s='seconds of training')
SPEC = r'[^=,:]*\.py(:|$)'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A checked QUESTION. arms: (name, changes, budget) of the leaves; a metric: (task, name,
    better)."""

    name: str
    path: str
    question: str
    base: tuple[str, ...]
    arms: tuple[tuple[str, tuple[str, ...], float], ...]
    unit: str
    budgets: tuple[float, ...]
    seeds: tuple[int, ...]
    metrics: tuple[tuple[str, str, str], ...]
    expected: tuple[tuple[str, ...], ...] = ()
    source: str = ''
    items: int | None = None
    limits: str = ''
    law: tuple[str, str] | None = None


KEYS = ('question', 'base', 'arms', 'budget', 'seeds', 'metrics', 'expected', 'source', 'items',
        'limits', 'law')
NEEDED = KEYS[:6]


def _words(value, what: str) -> tuple[str, ...]:
    value = (value,) if isinstance(value, str) else value
    if not isinstance(value, tuple | list) or not all(isinstance(x, str) and x for x in value):
        raise ConfigError(f'{what} is a text or a tuple of texts, got {value!r}')
    return tuple(value)


def _leaves(arms, path: str) -> list[tuple[str, tuple[str, ...]]]:
    """The arms of a tree of arms; changes of an inner one come before those of its arms."""
    if not isinstance(arms, tuple | list) or not arms:
        raise ConfigError(f'{path}: arms are a tuple of (name, *changes), got {arms!r}')
    out = []
    for arm in arms:
        if not (isinstance(arm, tuple | list) and arm and isinstance(arm[0], str)
                and all(x and isinstance(x, str | tuple | list) for x in arm)):
            raise ConfigError(f'{path}: an arm is (name, *changes), got {arm!r}')
        if not re.fullmatch(r'\w[\w-]*', arm[0]):
            raise ConfigError(f'{path}: arm {arm[0]!r} must have a plain name: it becomes a '
                              'directory')
        made = [(arm[0], tuple(x for x in arm[1:] if isinstance(x, str)))]
        for inner in (x for x in arm[1:] if not isinstance(x, str)):
            made = [(f'{name}.{more}', (*changes, *rest)) for name, changes in made
                    for more, rest in _leaves(inner, path)]
        out += made
    return out


def read(path: str, budget: float | None = None) -> Question:
    """The question of a file, with another budget if one is given. Raises ConfigError."""
    asked = getattr(configs.executed(path, '--sweep'), 'QUESTION', None)
    if not isinstance(asked, dict):
        raise ConfigError(f'--sweep: {path} defines no dict QUESTION')
    for key in asked:
        if key not in KEYS:
            raise unknown(path, key, KEYS)
    if missing := [k for k in NEEDED if not asked.get(k)]:
        raise ConfigError(f'{path} lacks {", ".join(missing)}')
    if not isinstance(asked['question'], str) or not asked['question'].endswith('?'):
        raise ConfigError(f'{path}: question is a sentence that ends in a question mark, got '
                          f'{asked["question"]!r}')
    try:
        arms = _leaves(asked['arms'], path)
    except RecursionError:
        raise ConfigError(f'{path}: arms are within themselves') from None
    given = asked['budget']
    if not isinstance(given, dict) or len(given) != 1:
        raise ConfigError(f'{path}: budget names exactly one of {", ".join(UNITS)}, got {given!r}')
    (unit, amount), = given.items()
    if unit not in UNITS:
        raise unknown(f'{path}: budget', unit, UNITS)
    amount = amount if budget is None else budget
    budgets = tuple(amount) if isinstance(amount, tuple | list) else (amount,)
    if not budgets or not all(
            isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < 1e300
            for x in budgets) or len(set(budgets)) < len(budgets):
        raise ConfigError(f'{path}: budget.{unit} is a number above 0, got {amount!r}')
    many = len(budgets) > 1
    arms = [(f'{name}.{x:g}'.replace('+', '') if many else name, changes, float(x))
            for x in budgets for name, changes in arms]
    names = [name for name, _, _ in arms]
    folders = [n.lower() for n in names]        # some disks know no capitals
    if twice := sorted({n for n in names if folders.count(n.lower()) > 1}):
        raise ConfigError(f'{path}: two arms are called {twice[-1]}; every arm needs a name of its '
                          'own')
    if odd := [n for n in names if len(n) > 100 or n in ('results.json', 'report.html')]:
        raise ConfigError(f'{path}: no arm can be called {odd[0][:120]}: it becomes a directory '
                          'beside results.json and report.html, of up to 100 letters')
    seeds = asked['seeds']
    if not isinstance(seeds, tuple | list) or not all(
            isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 1 << 32
            for s in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(f'{path}: seeds are different whole numbers, as in (0, 1, 2), got '
                          f'{seeds!r}')
    if not isinstance(asked['metrics'], tuple | list):
        raise ConfigError(f'{path}: metrics are a tuple, got {asked["metrics"]!r}')
    for metric in asked['metrics']:
        if not (isinstance(metric, tuple | list) and len(metric) == 3 and all(
                isinstance(x, str) for x in metric) and metric[2] in ('higher', 'lower', 'shown')):
            raise ConfigError(f"{path}: a metric is (task, name, 'higher', 'lower' or 'shown'), "
                              f'got {metric!r}')
    if len({tuple(m[:2]) for m in asked['metrics']}) < len(asked['metrics']):
        raise ConfigError(f'{path}: a metric is named twice')
    if not any(metric[2] != 'shown' for metric in asked['metrics']):
        raise ConfigError(f'{path}: no metric decides anything: of one say what is better')
    chains = [tuple(x.strip() for x in chain.split('>'))
              for chain in _words(asked.get('expected', ()), f'{path}: expected')]
    for chain in chains:
        if len(chain) < 2:
            raise ConfigError(f"{path}: expected is 'better > worse', got {' > '.join(chain)!r}")
        if len(set(chain)) < len(chain):
            raise ConfigError(f'{path}: expected names an arm twice: {" > ".join(chain)!r}')
        for name in chain:
            if name not in names:
                raise unknown(f'{path}: expected', name, names)
    below: dict[str, set] = {}
    for chain in chains:
        for better, worse in zip(chain, chain[1:], strict=False):
            below.setdefault(worse, set()).add(better)
    try:
        tuple(graphlib.TopologicalSorter(below).static_order())
    except graphlib.CycleError as e:
        raise ConfigError(f'{path}: expected goes round in a circle: {" > ".join(e.args[1])}'
                          ) from None
    base = _words(asked['base'], f'{path}: base')
    if not re.match(SPEC, base[0]):
        raise ConfigError(f'{path}: base begins with a config file, got {base[0]!r}')
    if chains and not asked.get('source'):
        raise ConfigError(f'{path}: expected needs a source: who says so')
    law = asked.get('law')
    if law is not None and (unit != 'flops' or not isinstance(law, tuple | list) or list(law) not in
                            [list(m[:2]) for m in asked['metrics']]):
        raise ConfigError(f'{path}: law is (task, metric) of one of the metrics, over a budget of '
                          f'flops, got {law!r}')
    items = asked.get('items')
    if items is not None and (isinstance(items, bool) or not isinstance(items, int) or items < 1):
        raise ConfigError(f'{path}: items is a whole number above 0, got {items!r}')
    return Question(
        name=os.path.basename(path).removesuffix('.py'), path=path, question=asked['question'],
        base=base, arms=tuple(arms), unit=unit,
        budgets=tuple(map(float, budgets)), seeds=tuple(seeds),
        metrics=tuple(map(tuple, asked['metrics'])), law=tuple(law) if law else None,
        expected=tuple(chains), source=str(asked.get('source', '')), items=items,
        limits=' '.join(str(asked.get('limits', '')).split()))


def amounts(budgets) -> str:
    return ' and '.join(f'{x:,.10g}' if x < 1e9 else f'{x:g}' for x in budgets)

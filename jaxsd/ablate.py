# SPDX-License-Identifier: Apache-2.0
"""The `ablate` verb: a question, asked of several arms under one budget and one order of data.

A question is a file with a dict QUESTION (`configs/ablations/`), data and nothing else:

    question   a sentence that ends in a question mark
    base       a config and perhaps overrides, as after --config and as --config.path=value
    arms       (name, *changes): overrides, arguments of the config's file ('mix=pairs'), another
               file, or a tuple of further arms, which makes a grid: its names are joined by dots
    budget     dict(tokens=N), or audio_hours, flops or wall_s: the same for every arm and seed;
               of several amounts, as in (1e12, 4e12), every arm gets each
    seeds      whole numbers; each arm is trained and measured once with each
    metrics    (task of config.evals, one of its metrics, 'higher' or 'lower') is better, or
               'shown', which decides nothing
    expected   'a > b > c': arms by how good they are expected to be, source: who says so
    items      measured per task at most; limits: what the answer does not say
    law        (task, metric): over several budgets of flops, which size is best for each?

Arms are trained one after another by the verbs' own functions, each in a run directory
WORKDIR/arm/seed that every other verb accepts. What is done is recognized and not repeated.
Results go to WORKDIR/results.json.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import math
import os
import re
import shlex
import time
import traceback
from typing import NamedTuple

import jax
import numpy as np

from jaxsd import bench, data, draw, evaluate, model, train, verdict
from jaxsd import config as configs
from jaxsd import run as rundir
from jaxsd import stage as stages
from jaxsd.config import ConfigError, fingerprint, plain, unknown
from jaxsd.plan import work

log = logging.getLogger('jaxsd')

UNITS = dict(tokens='positions (rows x columns; a column of several streams is one)',
             audio_hours='hours of sound', flops='floating-point operations',
             wall_s='seconds of training')
ROUNDED = 0.05          # how far whole steps may be from the budget
SAMPLED = 16            # batches that tell how much sound a step hears
RESULTS = 'results.json'
SPEC = r'[^=,:]*\.py(:|$)'


# What is asked.

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
                and all(isinstance(x, str | tuple | list) for x in arm)):
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
    if not isinstance(asked['question'], str):
        raise ConfigError(f'{path}: question is a sentence, got {asked["question"]!r}')
    arms = _leaves(asked['arms'], path)
    names = [name for name, _ in arms]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ConfigError(f'{path}: two arms are called {twice[0]}; every arm needs a name of its '
                          'own')
    given = asked['budget']
    if not isinstance(given, dict) or len(given) != 1:
        raise ConfigError(f'{path}: budget names exactly one of {", ".join(UNITS)}, got {given!r}')
    (unit, amount), = given.items()
    if unit not in UNITS:
        raise unknown(f'{path}: budget', unit, UNITS)
    amount = amount if budget is None else budget
    budgets = tuple(amount) if isinstance(amount, tuple | list) else (amount,)
    if not budgets or len(set(budgets)) < len(budgets) or not all(
            isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf
            for x in budgets):
        raise ConfigError(f'{path}: budget.{unit} is a number above 0, got {amount!r}')
    many = len(budgets) > 1
    arms = [(f'{name}.{x:g}'.replace('+', '') if many else name, changes, float(x))
            for x in budgets for name, changes in arms]
    names = [name for name, _, _ in arms]
    seeds = asked['seeds']
    if not isinstance(seeds, tuple | list) or len(set(seeds)) < len(seeds) or not all(
            isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 1 << 32 for s in seeds):
        raise ConfigError(f'{path}: seeds are different whole numbers, as in (0, 1, 2), got '
                          f'{seeds!r}')
    for metric in asked['metrics']:
        if not (isinstance(metric, tuple | list) and len(metric) == 3 and all(
                isinstance(x, str) for x in metric) and metric[2] in ('higher', 'lower', 'shown')):
            raise ConfigError(f"{path}: a metric is (task, name, 'higher', 'lower' or 'shown'), "
                              f'got {metric!r}')
    if not any(metric[2] != 'shown' for metric in asked['metrics']):
        raise ConfigError(f'{path}: no metric decides anything: of one say what is better')
    chains = [tuple(x.strip() for x in chain.split('>'))
              for chain in _words(asked.get('expected', ()), f'{path}: expected')]
    for chain in chains:
        if len(chain) < 2:
            raise ConfigError(f"{path}: expected is 'better > worse', got {' > '.join(chain)!r}")
        for name in chain:
            if name not in names:
                raise unknown(f'{path}: expected', name, names)
    base = _words(asked['base'], f'{path}: base')
    if not re.match(SPEC, base[0]):
        raise ConfigError(f'{path}: base begins with a config file, got {base[0]!r}')
    if chains and not asked.get('source'):
        raise ConfigError(f'{path}: expected needs a source: who says so')
    law = asked.get('law')
    if law is not None and (unit != 'flops' or tuple(law) not in {tuple(m[:2]) for m in
                                                                  asked['metrics']}):
        raise ConfigError(f'{path}: law is (task, metric) of one of the metrics, over a budget of '
                          f'flops, got {law!r}')
    items = asked.get('items')
    if items is not None and (not isinstance(items, int) or items < 1):
        raise ConfigError(f'{path}: items is a whole number above 0, got {items!r}')
    return Question(
        name=os.path.basename(path).removesuffix('.py'), path=path, question=asked['question'],
        base=base, arms=tuple(arms), unit=unit,
        budgets=tuple(map(float, budgets)), seeds=tuple(seeds),
        metrics=tuple(map(tuple, asked['metrics'])), law=tuple(law) if law else None,
        expected=tuple(chains), source=str(asked.get('source', '')), items=items,
        limits=' '.join(str(asked.get('limits', '')).split()))


# Arms as configs.

@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """An arm ready to run. steps, per_step: of each stage, the latter in the budget's unit;
    differences: {path: (base, arm)}; same_order: whether it reads what the base reads, in order."""

    name: str
    budget: float
    spec: str
    overrides: tuple[tuple[str, str], ...]
    config: object
    steps: tuple[int, ...]
    per_step: tuple[float, ...]
    differences: dict
    same_order: bool

    def seeded(self, seed: int):
        """(config, overrides that made it) of the run with `seed`."""
        more = (('seed', str(seed)), *((f'stages[{i}].steps', str(n))
                                       for i, n in enumerate(self.steps)))
        config = configs.read(self.spec)
        return configs.overridden(config, (*self.overrides, *more)), (*self.overrides, *more)


def _changed(changes) -> tuple[str, list[tuple[str, str]]]:
    """(config with its arguments, overrides) after all `changes`, in their order."""
    spec, overrides = '', []
    for change in changes:
        if change.startswith('--config.'):
            path, eq, value = change.removeprefix('--config.').partition('=')
            if not eq:
                raise ConfigError(f'{change}: write --config.{path}=value')
            overrides.append((path, value))
        elif re.match(SPEC, change):
            spec = change
        elif change.startswith('-'):
            raise ConfigError(f'{change}: a change is --config.path=value, an argument of the '
                              "config's file, or a file")
        else:
            spec += f',{change}' if ':' in spec else f':{change}'
    return spec, overrides


def _reads(config) -> list:
    """What decides which records are read and in which order, but for the seed."""
    sources = plain(config.data.sources)
    return [config.data.path, [(s.name, sorted(
        (n, sources[n]['select']) for n, w in (s.data | s.apart.get('data', {})).items()
        if w > 0 and n in sources)) for s in stages.stages(config)]]


def per_step(config, stage, unit: str) -> float:
    """What a step of a stage costs in the budget's unit."""
    if unit == 'tokens':
        return float(stage.batch * config.columns)
    if unit == 'flops':
        return work.model_flops(config, stage, jax.devices())[0]
    if unit == 'wall_s':
        found = bench.run(config, stage_name=stage.name, steps=5)
        return found['step s'] + (found['data wait s'] or 0.0)
    with contextlib.closing(data.batches(config, dataclasses.asdict(stage),
                                         model.make_vocab(config))) as batches:
        heard = [sum(c['audio_s'] for c in next(batches)[1].values()) for _ in range(SAMPLED)]
    if not sum(heard):
        raise ConfigError(f'stage {stage.name} hears nothing: name another budget than audio_hours')
    return sum(heard) / SAMPLED / 3600


def whole_steps(budget: float, steps, costs) -> tuple[int, ...]:
    """The budget as whole steps of every stage, in the proportion of `steps`.

    Raises ConfigError where rounding would change the budget by more than ROUNDED.
    """
    factor = budget / sum(n * c for n, c in zip(steps, costs, strict=True))
    out = tuple(max(1, round(factor * n)) for n in steps)
    spent = sum(n * c for n, c in zip(out, costs, strict=True))
    if abs(spent - budget) > ROUNDED * budget:
        raise ConfigError(f'the budget of {budget:g} is no whole number of steps: the nearest, '
                          f'{" + ".join(map(str, out))}, would spend {spent:.4g}; name another')
    return out


def _measured_steps(workdir: str, name: str, seeds, config) -> tuple[int, ...] | None:
    """The steps that an arm was begun with: a budget of time is measured once."""
    for seed in seeds:
        path = os.path.join(workdir, name, str(seed))
        if os.path.exists(os.path.join(path, 'config.json')):
            found = rundir.read_run(path)['config'].get('stages', ())
            if len(found) == len(config.stages):
                return tuple(s['steps'] for s in found)
    return None


def arms_of(question: Question, workdir: str = '', overrides=()) -> list[Arm]:
    """Every arm resolved and checked, nothing trained. Raises ConfigError with the arm's name."""
    def resolved(changes):
        spec, own = _changed((*question.base, *(f'--config.{p}={v}' for p, v in overrides),
                              *changes))
        return spec, own, configs.overridden(configs.read(spec), own)
    for path, _ in overrides:
        _decided(path, '--config')
    base = resolved(())[2]
    out = []
    for name, changes, budget in question.arms:
        try:
            for path, _ in _changed(changes)[1]:
                _decided(path, f'arm {name}')
            spec, own, config = resolved(changes)
            for task, metric, _ in question.metrics:
                if task not in config.evals:
                    raise unknown('config.evals', task, config.evals)
                legal = evaluate.measured(config, task)
                if legal is not None and metric not in legal:
                    raise unknown(f'task {task}', metric, legal)
            v = model.make_vocab(config)
            every = stages.stages(config)
            for stage in every:
                data.check(config, dataclasses.asdict(stage), v)
            steps = (_measured_steps(workdir, name, question.seeds, config)
                     if question.unit == 'wall_s' else None)
            if steps:
                costs = (budget / sum(steps),) * len(steps)
            else:
                costs = tuple(per_step(config, s, question.unit) for s in every)
                steps = whole_steps(budget, [s.steps for s in every], costs)
            arm = Arm(name=name, budget=budget, spec=spec, overrides=tuple(own), config=config,
                      steps=steps, per_step=costs, differences=rundir.differing(base, config),
                      same_order=_reads(base) == _reads(config))
            stages.stages(arm.seeded(question.seeds[0])[0])
        except ConfigError as e:
            raise ConfigError(f'{question.path}: arm {name}: '
                              + str(e).removeprefix(f'arm {name}: ')) from None
        out.append(arm)
    return out


def _decided(path: str, who: str) -> None:
    """Raises ConfigError for an override of what the question decides for all arms."""
    if re.fullmatch(r'stages\[-?\d+\]\.steps', path):
        raise ConfigError(f'{who}: {path} would change the budget, which is the same for all arms '
                          'and decides how many steps each takes')
    if path == 'seed':
        raise ConfigError(f"{who}: seed is decided by the question's seeds")


def described(question: Question, arms: list[Arm]) -> str:
    """The question, and of every arm what differs from the base and what the budget buys it."""
    out = [question.question, f'base     {" ".join(question.base)}',
           f'budget   {_amounts(question.budgets)} {question.unit} for each arm and seed '
           f'({UNITS[question.unit]})',
           f'seeds    {", ".join(map(str, question.seeds))}',
           'decided by ' + ', '.join(f'{t} {m} ({b})' for t, m, b in question.metrics),
           'expected ' + ('; '.join(' > '.join(c) for c in question.expected) or 'nothing')
           + (f' ({question.source})' if question.source else '')]
    for arm in arms:
        names = [s.name for s in stages.stages(arm.config)]
        spent = sum(n * c for n, c in zip(arm.steps, arm.per_step, strict=True))
        about = 'about ' if question.unit in ('audio_hours', 'wall_s') else ''
        out.append(f'arm {arm.name}: '
                   + ', '.join(f'{n} steps of {s}' for n, s in zip(arm.steps, names, strict=True))
                   + f', {about}{spent:,.6g} {question.unit}; '
                   + ('the same records in the same order as the base' if arm.same_order else
                      'other records than the base, or in another order'))
        out += [f'  {k}: {_clip(a)} -> {_clip(b)}' for k, (a, b) in arm.differences.items()] or [
            '  as the base']
    return '\n'.join(out)


def _amounts(budgets) -> str:
    return ' and '.join(f'{x:,.10g}' if x < 1e9 else f'{x:g}' for x in budgets)


def _clip(x, most: int = 60) -> str:
    text = str(x)
    return text if len(text) <= most else text[:most - 3] + '...'


# Running.

class Run(NamedTuple):
    arm: Arm
    seed: int
    folder: str


def runs_of(question: Question, arms: list[Arm], workdir: str) -> list[Run]:
    """All runs, seed by seed, so that what can be compared is there early."""
    return [Run(arm, seed, os.path.join(workdir, arm.name, str(seed)))
            for seed in question.seeds for arm in arms]


def _mark(question: Question, config) -> dict:
    """Of which config a finished run is, and how it was measured."""
    tasks = {t: plain(config.evals[t]) for t, _, _ in question.metrics}
    return dict(fingerprint=fingerprint(config), items=question.items, tasks=json.loads(
        configs.to_json(tasks)))


def _measured(question: Question, run: Run) -> dict | None:
    """What arm.json says was measured, {task: {metrics, per_item}}; None unless the run is done.

    Kept apart from evaluation.json, which later evaluations of that run may change.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        with open(os.path.join(run.folder, 'arm.json'), encoding='utf-8') as f:
            kept = json.load(f)
        if kept['mark'] == _mark(question, run.arm.seeded(run.seed)[0]):
            return kept['measured']
    return None


def _begin(question: Question, workdir: str, runs: list[Run]) -> bool:
    """Whether the directory is this ablation already. Raises ConfigError, before anything runs, for
    one that holds something else, or an arm by another config."""
    if exists := os.path.exists(os.path.join(workdir, RESULTS)):
        asked = read_results(workdir)['name']
        if asked != question.name:
            raise ConfigError(f'--workdir {workdir} holds the ablation {asked}; name another '
                              'directory')
    elif os.path.exists(workdir) and (not os.path.isdir(workdir) or [
            n for n in os.listdir(workdir) if not n.startswith(f'.{RESULTS}.')]):
        raise ConfigError(f'--workdir {workdir} is not empty and no ablation (no {RESULTS}); name '
                          'another directory')
    for run in runs:
        if os.path.exists(os.path.join(run.folder, 'config.json')):
            rundir.same_run(run.folder, run.arm.seeded(run.seed)[0], 'the question has changed: ')
    return exists


def _one(question: Question, run: Run) -> None:
    """Trains and measures one arm with one seed, going on where it was interrupted."""
    config, overrides = run.arm.seeded(run.seed)
    train.run(config, run.folder, probe_of=lambda stage: evaluate.probe(config, stage),
              made=configs.made_by(run.arm.spec, overrides))
    found = evaluate.run(config, run.folder, limit=question.items,
                         tasks=tuple(dict.fromkeys(t for t, _, _ in question.metrics)))
    rundir.write_atomic(os.path.join(run.folder, 'arm.json'), json.dumps(dict(
        mark=_mark(question, config), measured={
            e['task']: {k: e.get(k, {}) for k in ('metrics', 'per_item')} for e in found})) + '\n')


def run(question: Question, arms: list[Arm], workdir: str, *, only: int | None = None) -> dict:
    """Trains and measures what is left of all runs, or run number `only`; returns the results.

    A run that fails is said in one line and the others go on. Raises ConfigError for a directory
    that holds something else, SystemExit when asked to stop (what is trained is saved).
    """
    if jax.process_count() > 1:
        raise ConfigError('ablate runs its arms in one process; --launch gives each a job')
    runs = runs_of(question, arms, workdir)
    if only is not None and not 0 <= only < len(runs):
        raise ConfigError(f'--only {only}: there are runs 0..{len(runs) - 1}')
    failures: dict[str, str] = {}
    if not _begin(question, workdir, runs):
        os.makedirs(workdir, exist_ok=True)
        _write(workdir, results(question, arms, runs, failures, {}))
    flops = {a.name: a.per_step if question.unit == 'flops' else [
        per_step(a.config, s, 'flops') for s in stages.stages(a.config)]
             for a in arms} if only is None else {}
    left = [r for i, r in enumerate(runs) if only in (None, i) and _measured(question, r) is None]
    if done := len(runs if only is None else [only]) - len(left):
        log.info('%d of %d runs are done', done, len(runs) if only is None else 1)
    spent = []
    for i, one in enumerate(left):
        log.info('arm %s, seed %d: run %d of the %d that are left', one.arm.name, one.seed, i + 1,
                 len(left))
        if only is None:
            _write(workdir, results(question, arms, runs, failures, flops))
        begun = time.perf_counter()
        try:
            _one(question, one)
        except Exception as e:
            if os.environ.get('JAXSD_TRACEBACK') == '1':
                traceback.print_exc()
            reason = (' '.join(str(e).split()) or type(e).__name__)[:500]
            failures[one.folder] = reason
            log.error('arm %s, seed %d failed: %s', one.arm.name, one.seed, reason)
        spent.append(time.perf_counter() - begun)
        log.info('arm %s, seed %d took %.1f min; %d runs left, about %.1f min', one.arm.name,
                 one.seed, spent[-1] / 60, len(left) - i - 1,
                 (len(left) - i - 1) * sum(spent) / len(spent) / 60)
    found = results(question, arms, runs, failures, flops)
    if only is None:
        _write(workdir, found)
    return found


def _write(workdir: str, found: dict) -> None:
    rundir.write_atomic(os.path.join(workdir, RESULTS), json.dumps(found, indent=1) + '\n')


def read_results(workdir: str) -> dict:
    """WORKDIR/results.json. Raises ConfigError where there is none."""
    path = os.path.join(workdir, RESULTS)
    try:
        with open(path, encoding='utf-8') as f:
            found = json.load(f)
        if not isinstance(found, dict) or 'arms' not in found or 'name' not in found:
            raise ValueError('it holds no ablation')
        return found
    except (OSError, ValueError) as e:
        raise ConfigError(f'{path} cannot be read: {e}') from None


# What came of it.

def results(question: Question, arms: list[Arm], runs: list[Run], failures: dict, flops: dict
            ) -> dict:
    """Everything that the table and the report say, from what lies in the run directories."""
    measured: dict[tuple[str, str], dict[int, tuple]] = {}
    told, seen = {a.name: [] for a in arms}, []
    for one in runs:
        kept = _measured(question, one)
        state = dict(seed=one.seed, folder=os.path.join(one.arm.name, str(one.seed)),
                     state='failed: ' + failures[one.folder] if one.folder in failures else
                     'left' if kept is None else 'done')
        if state['state'] == 'done':
            ledger = rundir.read_ledger(one.folder)
            seen.append(ledger)
            last = {e['stage']: e['consumed'] for e in ledger if 'consumed' in e}
            state['consumed'] = {k: sum(c[k] for by in last.values() for c in by.values())
                                 for k in ('tokens', 'audio_s')}
            for task, metric, _ in question.metrics:
                value = kept[task]['metrics'].get(metric)
                if value is not None and math.isfinite(value):
                    measured.setdefault((one.arm.name, f'{task} {metric}'), {})[one.seed] = (
                        value, kept[task]['per_item'].get(metric))
        told[one.arm.name].append(state)

    def of(names, label):
        """Per arm of `names`, (value, per item) for the seeds that all of them have."""
        found = [measured.get((name, label), {}) for name in names]
        seeds = sorted(set.intersection(*map(set, found)))
        return seeds, [[f[s] for s in seeds] for f in found]

    out_arms = []
    for arm in arms:
        estimates = {}
        for task, metric, _ in question.metrics:
            seeds, (found,) = of([arm.name], f'{task} {metric}')
            if found:
                mean, low, high = verdict.interval(
                    [x for x, _ in found], verdict.redrawn([p for _, p in found]))
                estimates[f'{task} {metric}'] = dict(mean=mean, low=low, high=high,
                                                     seeds=len(seeds),
                                                     by_seed=[x for x, _ in found])
        out_arms.append(dict(
            name=arm.name, config=arm.spec, overrides=[f'--config.{p}={v}' for p, v in
                                                       arm.overrides],
            differences={k: list(v) for k, v in arm.differences.items()},
            same_order=arm.same_order, runs=told[arm.name], estimates=estimates,
            stages=[dict(name=s.name, steps=n, batch=s.batch, columns=arm.config.columns,
                         flops=f) for s, n, f in zip(
                             stages.stages(arm.config), arm.steps,
                             flops.get(arm.name, [None] * len(arm.steps)), strict=True)],
            budget=arm.budget, parameters=model.count(model.abstract(arm.config)[1]),
            planned=sum(n * c for n, c in zip(arm.steps, arm.per_step, strict=True))))
    comparisons = []
    for better, worse in (p for c in question.expected for p in zip(c, c[1:], strict=False)):
        for task, metric, direction in (m for m in question.metrics if m[2] != 'shown'):
            seeds, (a, b) = of([better, worse], f'{task} {metric}')
            entry = dict(better=better, worse=worse, metric=f'{task} {metric}', seeds=len(seeds),
                         difference=None, low=None, high=None, verdict='not decided')
            if seeds:
                draws = [verdict.redrawn([p for _, p in x]) for x in (a, b)]
                mean, low, high = verdict.interval(
                    [x - y for (x, _), (y, _) in zip(a, b, strict=True)],
                    None if None in [d if d is None else 0 for d in draws] else draws[0] - draws[1])
                entry |= dict(difference=mean, low=low, high=high, verdict=verdict.of_difference(
                    low, high, seeds=len(seeds), better=direction))
            comparisons.append(entry)
    ended = [e['time_s'] for ledger in seen for e in ledger[-1:]]
    return dict(
        name=question.name, path=question.path, question=question.question,
        base=list(question.base), source=question.source, limits=question.limits,
        expected=[' > '.join(c) for c in question.expected],
        budget=dict(unit=question.unit, amounts=list(question.budgets),
                    said=_amounts(question.budgets)),
        seeds=list(question.seeds), items=question.items, rule=verdict.RULE,
        metrics=[dict(label=f'{t} {m}', better=b) for t, m, b in question.metrics],
        arms=out_arms, comparisons=comparisons,
        law=verdict.law([(a['budget'], a['parameters'], sum(s['steps'] * s['batch'] * s['columns']
                                                    for s in a['stages']),
                  a['estimates'][' '.join(question.law)]['mean']) for a in out_arms
                 if ' '.join(question.law) in a['estimates']]) if question.law else None,
        verdict=verdict.overall([c['verdict'] for c in comparisons]),
        revision=', '.join(sorted({e['revision'] for ledger in seen for e in ledger
                                   if 'revision' in e})),
        date=datetime.datetime.fromtimestamp(max(ended), datetime.UTC).strftime('%Y-%m-%d')
        if ended else '')


def _law_said(found: dict) -> str:
    if not found['exponents']:
        return ('No law: fewer than two budgets have a best size inside those tried (of three or '
                'more).')
    by = found['exponents']
    return (f'Best size: parameters grow as computation to the power {by["parameters"]:.2f}, '
            f'positions as {by["positions"]:.2f}, by {len(found["optima"])} budgets.')


# Said in a table.

def _with_interval(x: dict) -> str:
    if x.get('mean') is None:
        return '-'
    if x.get('low') is None:
        return f'{x["mean"]:.4g}'
    return f'{x["mean"]:.4g} [{x["low"]:.4g}, {x["high"]:.4g}]'


def tables(found: dict) -> list[tuple[list[str], list[list[str]]]]:
    """(heads, rows) of arms with their metrics, and of the comparisons if an order was expected."""
    labels = [m['label'] + (f' ({m["better"]} is better)' if m['better'] != 'shown' else '')
              for m in found['metrics']]
    rows = []
    for arm in found['arms']:
        done = [r for r in arm['runs'] if r['state'] == 'done']
        heard = [r['consumed']['audio_s'] / 3600 for r in done]
        rows.append([arm['name'], f'{len(done)} of {len(arm["runs"])}',
                     ' + '.join(str(s['steps']) for s in arm['stages']),
                     f'{np.mean(heard):.3g}' if heard else '-',
                     *(_with_interval(arm['estimates'].get(m['label'], {}))
                       for m in found['metrics'])])
    out = [(['arm', 'seeds', 'steps', 'hours heard', *labels], rows)]
    if found['comparisons']:
        out.append((['expected', 'metric', 'difference', 'verdict'], [
            [f'{c["better"]} > {c["worse"]}', c['metric'],
             _with_interval(c | dict(mean=c['difference'])), c['verdict']]
            for c in found['comparisons']]))
    return out


def table(found: dict) -> str:
    """The answer as text in columns."""
    parts = [found['question']]
    for heads, rows in tables(found):
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        parts.append('\n'.join('  '.join(x.ljust(w) for x, w in zip(row, widths, strict=True))
                               .rstrip() for row in [heads, *rows]))
    parts += [_law_said(found['law'])] if found['law'] else []
    parts.append(f'Verdict: {found["verdict"]}.')
    return '\n\n'.join(parts)


def document(found: dict, path: str, command: str) -> None:
    """Puts the answer into the Markdown page `path`, in place of an older one to this question, and
    a figure beside the page."""
    picture = f'{os.path.splitext(path)[0]}-{found["name"]}.png'
    panels = [(m['label'], [(a['name'], *(a['estimates'][m['label']][k] for k in (
        'mean', 'low', 'high'))) for a in found['arms'] if m['label'] in a['estimates']])
        for m in found['metrics']]
    if panels := [p for p in panels if p[1]]:
        rundir.write_atomic(picture, draw.intervals_png(panels))
    head = f'## {found["question"]}'
    body = [head, '', f'**Verdict: {found["verdict"]}.** '
            + (f'Expected: {"; ".join(found["expected"])} ({found["source"]}). '
               if found['expected'] else '')
            + f'Base `{" ".join(found["base"])}`, {found["budget"]["said"]} '
            f'{found["budget"]["unit"]} for each arm and seed. {found["date"]}, commit '
            f'{found["revision"]}.', '', f'`{command}`', '']
    if panels:
        body += [f'![Means and intervals of the arms]({os.path.basename(picture)})', '']
    for heads, rows in tables(found):
        body += ['| ' + ' | '.join(x.replace('|', '\\|') for x in row) + ' |' for row in
                 [heads, ['---'] * len(heads), *rows]] + ['']
    body += [_law_said(found['law']), ''] if found['law'] else []
    body += [f'Limits: {found["limits"]}', ''] if found['limits'] else []
    text = ''
    if os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            text = f.read()
    opening, *sections = re.split(r'(?m)^(?=## )', text)
    opening = opening or f'# Ablations\n\n{verdict.RULE}\n\n'
    section, old = '\n'.join(body), [s.startswith(head + '\n') for s in sections]
    sections = [section if is_old else s for s, is_old in zip(sections, old, strict=True)]
    sections += [] if any(old) else [section]
    parts = [s.rstrip('\n') + '\n' for s in (opening, *sections)]
    rundir.write_atomic(path, '\n'.join(parts))


# As jobs of a cluster.

def jobs(how: str, question: Question, workdir: str, runs: list[Run], flags) -> list[str]:
    """Shell lines that run everything as a Slurm array, or as one JobSet per run; `flags` of the
    verb are handed on."""
    if how == 'slurm':
        verb = shlex.join(['launch/slurm.sbatch', 'ablate', '--sweep', question.path, '--workdir',
                           workdir, *flags])
        return [f'job=$(sbatch --parsable --ntasks-per-node=1 --array=0-{len(runs) - 1} {verb} '
                '--only SLURM_ARRAY_TASK_ID)',
                f'sbatch --ntasks-per-node=1 --dependency=afterany:$job {verb}']
    out = []
    for i, one in enumerate(runs):
        name = re.sub(r'[^a-z0-9]+', '-', f'{question.name}-{one.arm.name}-{one.seed}'.lower())
        words = ', '.join(json.dumps(w) for w in ['ablate', *flags, '--only', str(i), '--sweep'])
        swap = f's|train, --config,|{words},|'
        out.append(f'HOSTS=1 SLICES=1 NAME={name} CONFIG={shlex.quote(question.path)} '
                   f'WORKDIR={shlex.quote(workdir)} envsubst < launch/gke.yaml | '
                   f'sed {shlex.quote(swap)} | kubectl apply -f -')
    return out

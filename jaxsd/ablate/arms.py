# SPDX-License-Identifier: Apache-2.0
"""The arms of a question as configs and steps, all resolved and checked before any is trained."""

import contextlib
import dataclasses
import json
import os
import re

import jax

from jaxsd import bench, data, evaluate, model
from jaxsd import config as configs
from jaxsd import run as rundir
from jaxsd import stage as stages
from jaxsd.ablate.question import SPEC, UNITS, Question, amounts
from jaxsd.config import ConfigError, plain, unknown
from jaxsd.plan import work

RESULTS = 'results.json'
ROUNDED = 0.05          # how far whole steps may be from the budget
SAMPLED = 16            # batches that tell how much sound a step hears


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
    """What a step of a stage costs in the budget's unit; of text alone, no audio_hours."""
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
    return sum(heard) / SAMPLED / 3600


def whole_steps(budget: float, steps, costs) -> tuple[int, ...]:
    """The budget as whole steps of every stage, in the proportion of `steps`.

    Raises ConfigError where rounding would change the budget by more than ROUNDED.
    """
    if not any(costs):
        raise ConfigError('no stage hears anything: name another budget than audio_hours')
    factor = budget / sum(n * c for n, c in zip(steps, costs, strict=True))
    out = tuple(max(1, round(factor * n)) for n in steps)
    spent = sum(n * c for n, c in zip(out, costs, strict=True))
    if abs(spent - budget) > ROUNDED * budget:
        raise ConfigError(f'the budget of {budget:g} is no whole number of steps: the nearest, '
                          f'{" + ".join(map(str, out))}, would spend {spent:.4g}; name another')
    return out


def read_results(workdir: str) -> dict:
    """WORKDIR/results.json. Raises ConfigError where there is none."""
    path = os.path.join(workdir, RESULTS)
    try:
        with open(path, encoding='utf-8') as f:
            found = json.load(f)
        if not isinstance(found, dict) or 'name' not in found or not all(
                {'name', 'budget', 'stages'} <= set(a) for a in found['arms']):
            raise ValueError('it holds no ablation')
        return found
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise ConfigError(f'{path} cannot be read: {e}') from None


def _measured_before(workdir: str, name: str, budget: float) -> tuple[tuple, tuple] | None:
    """(steps, what one costs) of an arm as results.json has them: a budget of time is measured
    once, so that who goes on spends what the first start decided. Raises ConfigError for another
    budget."""
    if not os.path.exists(os.path.join(workdir, RESULTS)):
        return None
    arm = next((a for a in read_results(workdir)['arms'] if a['name'] == name), None)
    if arm is None:
        return None
    if arm['budget'] != budget:
        raise ConfigError(f'--workdir {workdir} was begun with a budget of {arm["budget"]:g}, not '
                          f'{budget:g}; name another directory')
    return tuple(zip(*((s['steps'], s['per_step']) for s in arm['stages']), strict=True))


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
            for task in dict.fromkeys(task for task, _, _ in question.metrics):
                evaluate.check(config, task, v)
            _buildable(config)
            shares = [s.get('steps') for s in config.stages]
            differences = rundir.differing(base, config)
            config.stages = tuple(map(_long_enough, config.stages))
            every = stages.stages(config)
            for stage in every:
                data.check(config, dataclasses.asdict(stage), v)
            before = (_measured_before(workdir, name, budget) if question.unit == 'wall_s'
                      else None)
            if before:
                steps, costs = before
            else:
                costs = tuple(per_step(config, s, question.unit) for s in every)
                steps = whole_steps(budget, shares, costs)
            arm = Arm(name=name, budget=budget, spec=spec, overrides=tuple(own), config=config,
                      steps=steps, per_step=costs, differences=differences,
                      same_order=_reads(base) == _reads(config))
            stages.stages(arm.seeded(question.seeds[0])[0])
        except (ValueError, OSError) as e:
            raise ConfigError(f'{question.path}: arm {name}: '
                              + str(e).removeprefix(f'arm {name}: ')) from None
        out.append(arm)
    return out


def _long_enough(stage: dict) -> dict:
    """A stage for whose warm-up the budget may have steps, whatever the base's are."""
    steps, warm = stage.get('steps'), stage.get('warmup_steps', 0)
    short = isinstance(steps, int) and isinstance(warm, int) and steps <= warm
    return dict(stage, steps=warm + 1) if short else stage


def _buildable(config) -> None:
    """Raises ConfigError for a model that cannot be."""
    try:
        model.abstract(config)
    except (ValueError, TypeError, ArithmeticError) as e:
        raise ConfigError(' '.join(str(e).split())[:500]) from None


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
           f'budget   {amounts(question.budgets)} {question.unit} for each arm and seed '
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
                   + ("the base's records of every source in its order, as far as the budget goes"
                      if arm.same_order else
                      'other records than the base, or in another order'))
        out += [f'  {k}: {_clip(a)} -> {_clip(b)}' for k, (a, b) in arm.differences.items()] or [
            '  as the base']
    return '\n'.join(out)


def _clip(x, most: int = 60) -> str:
    text = str(x)
    return text if len(text) <= most else text[:most - 3] + '...'

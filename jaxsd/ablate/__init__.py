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
import datetime
import json
import logging
import math
import os
import re
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NamedTuple

import jax

from jaxsd import config as configs
from jaxsd import data, evaluate, model, train, verdict
from jaxsd import run as rundir
from jaxsd import stage as stages
from jaxsd.ablate.answer import document, table
from jaxsd.ablate.arms import RESULTS, Arm, arms_of, described, per_step, read_results
from jaxsd.ablate.question import Question, amounts, read
from jaxsd.config import ConfigError, fingerprint, plain
from jaxsd.layout import show
from jaxsd.vocab import Text

__all__ = ['arms_of', 'described', 'document', 'jobs', 'read', 'read_results', 'run', 'runs_of',
           'table']

log = logging.getLogger('jaxsd')


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
            n for n in os.listdir(workdir) if n != RESULTS and not n.startswith(f'.{RESULTS}.')]):
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
    if run.seed == question.seeds[0]:       # the one that the report shows
        _draw(config, run.folder)
    found = evaluate.run(config, run.folder, limit=question.items,
                         tasks=tuple(dict.fromkeys(t for t, _, _ in question.metrics)))
    rundir.write_atomic(os.path.join(run.folder, 'arm.json'), json.dumps(dict(
        mark=_mark(question, config), measured={
            e['task']: {k: e.get(k, {}) for k in ('metrics', 'per_item')} for e in found})) + '\n')


def _draw(config, folder: str) -> None:
    """A picture of what the arm reads, for the report."""
    v = model.make_vocab(config)
    source = sorted(stages.stages(config)[-1].data)[0]
    piece = Text(v.tokenizer).piece if v.tokenizer else None
    show.picture(data.grid(config, source, v), v, os.path.join(folder, 'grids', f'{source}.png'),
                 columns=(0, 48), pieces=piece)


def run(question: Question, arms: list[Arm], workdir: str, *, only: Sequence[int] = ()) -> dict:
    """Trains and measures what is left of all runs, or of those numbered `only`; returns the
    results, which are written where all were to be done.

    A run that fails is said in one line and the others go on. Raises ConfigError for a directory
    that holds something else, SystemExit when asked to stop (what is trained is saved).
    """
    if jax.process_count() > 1:
        raise ConfigError('ablate runs its arms in one process; --launch gives each a job')
    runs = runs_of(question, arms, workdir)
    failures: dict[str, str] = {}
    exists = _begin(question, workdir, runs)
    asked = [runs[i] for i in only] or runs
    left = [r for r in asked if _measured(question, r) is None]
    for one in {r.arm.name: r for r in left}.values():      # what a device here cannot do
        config = one.arm.seeded(one.seed)[0]
        try:
            train.ready(config, one.folder, probe_of=lambda s, c=config: evaluate.probe(c, s))
        except (ValueError, OSError) as e:
            raise ConfigError(f'arm {one.arm.name}: {e}') from None
    if not exists:
        os.makedirs(workdir, exist_ok=True)
        _write(workdir, results(question, arms, runs, failures, {}))
    flops = {a.name: a.per_step if question.unit == 'flops' else [
        per_step(a.config, s, 'flops') for s in stages.stages(a.config)]
             for a in arms} if not only else {}
    if len(left) < len(asked):
        log.info('%d of %d runs are done', len(asked) - len(left), len(asked))
    spent = []
    for i, one in enumerate(left):
        log.info('arm %s, seed %d: run %d of the %d that are left', one.arm.name, one.seed, i + 1,
                 len(left))
        if not only:
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
    if not only:
        _write(workdir, found)
    return found


def _write(workdir: str, found: dict) -> None:
    rundir.write_atomic(os.path.join(workdir, RESULTS), json.dumps(found, indent=1) + '\n')


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
            for task, metric, better in question.metrics:
                value = kept[task]['metrics'].get(metric)
                if value is None or not math.isfinite(value):
                    if better != 'shown':
                        state['state'] = f'failed: {task} {metric} is {value}'
                else:
                    measured.setdefault((one.arm.name, f'{task} {metric}'), {})[one.seed] = (
                        value, kept[task]['per_item'].get(metric))
        told[one.arm.name].append(state)

    def of(*names, label) -> list[verdict.Found]:
        """What was found for each arm of `names` with the seeds that all of them have."""
        found = [measured.get((name, label), {}) for name in names]
        seeds = sorted(set.intersection(*map(set, found)))
        return [[f[s] for s in seeds] for f in found]

    out_arms = []
    for arm in arms:
        estimates = {}
        for task, metric, _ in question.metrics:
            found, = of(arm.name, label=f'{task} {metric}')
            if found:
                estimates[f'{task} {metric}'] = verdict.estimate(found, percent='%' in metric)
        out_arms.append(dict(
            name=arm.name, config=arm.spec, overrides=[f'--config.{p}={v}' for p, v in
                                                       arm.overrides],
            differences={k: list(v) for k, v in arm.differences.items()},
            same_order=arm.same_order, runs=told[arm.name], estimates=estimates,
            stages=[dict(name=s.name, steps=n, per_step=c, batch=s.batch,
                         columns=arm.config.columns, flops=f) for s, n, c, f in zip(
                             stages.stages(arm.config), arm.steps, arm.per_step,
                             flops.get(arm.name, [None] * len(arm.steps)), strict=True)],
            budget=arm.budget, parameters=model.count(model.abstract(arm.config)[1]),
            planned=sum(n * c for n, c in zip(arm.steps, arm.per_step, strict=True))))
    comparisons = []
    for better, worse in (p for c in question.expected for p in zip(c, c[1:], strict=False)):
        for task, metric, direction in (m for m in question.metrics if m[2] != 'shown'):
            a, b = of(better, worse, label=f'{task} {metric}')
            mean, low, high = verdict.difference(a, b) if a else (None, None, None)
            comparisons.append(dict(
                better=better, worse=worse, metric=f'{task} {metric}', seeds=len(a),
                difference=mean, low=low, high=high,
                verdict=verdict.of_difference(low, high, better=direction, seeds=(
                    len(a) if len(a) == len(question.seeds) else 0))))
    against_best = []
    for task, metric, direction in (m for m in question.metrics if m[2] != 'shown'):
        label = f'{task} {metric}'
        for arm in (a for a in out_arms if label in a['estimates']):
            best = (max if direction == 'higher' else min)(
                (a for a in out_arms if label in a['estimates'] and a['budget'] == arm['budget']),
                key=lambda a: a['estimates'][label]['mean'])
            if arm is not best:
                a, b = of(arm['name'], best['name'], label=label)
                if a:
                    mean, low, high = verdict.difference(a, b)
                    against_best.append(dict(arm=arm['name'], metric=label, best=best['name'],
                                             mean=mean, low=low, high=high))
    ended = [e['time_s'] for ledger in seen for e in ledger[-1:]]
    return dict(
        name=question.name, path=question.path, question=question.question,
        base=list(question.base), source=question.source, limits=question.limits,
        expected=[' > '.join(c) for c in question.expected],
        budget=dict(unit=question.unit, amounts=list(question.budgets),
                    said=amounts(question.budgets)),
        seeds=list(question.seeds), items=question.items, rule=verdict.RULE,
        metrics=[dict(label=f'{t} {m}', better=b) for t, m, b in question.metrics],
        arms=out_arms, comparisons=comparisons, against_best=against_best,
        law=verdict.law([(a['budget'], a['parameters'], sum(s['steps'] * s['batch'] * s['columns']
                                                    for s in a['stages']),
                  a['estimates'][' '.join(question.law)]['mean']) for a in out_arms
                 if ' '.join(question.law) in a['estimates']]) if question.law else None,
        verdict=verdict.overall([c['verdict'] for c in comparisons]),
        revision=', '.join(sorted({e['revision'] for ledger in seen for e in ledger
                                   if 'revision' in e})),
        date=datetime.datetime.fromtimestamp(max(ended), datetime.UTC).strftime('%Y-%m-%d')
        if ended else '')


def jobs(how: str, question: Question, workdir: str, runs: list[Run], flags) -> list[str]:
    """Shell lines that run everything as a Slurm array, as one JobSet per run, or here, side by
    side, on a core each; `flags` of the verb are handed on. Raises ConfigError for a budget that
    each job would measure for itself."""
    if question.unit == 'wall_s':
        raise ConfigError(f'--launch {how}: every job would measure for itself how many steps '
                          'wall_s buys, and arms would get unequal budgets; name another budget')
    if how == 'local':
        if not shutil.which('taskset'):
            raise ConfigError('--launch local gives every core its runs by taskset (util-linux), '
                              'which is not here; leave --launch out')
        verb = shlex.join([sys.executable, '-m', 'jaxsd', 'ablate', '--sweep', question.path,
                           '--workdir', workdir, *flags])
        if jax.default_backend() != 'cpu':
            raise ConfigError('--launch local shares out cores, and this machine trains on '
                              f'{jax.default_backend()}; leave --launch out')
        cores = sorted(os.sched_getaffinity(0))[:len(runs)]
        shares = [','.join(map(str, range(i, len(runs), len(cores)))) for i in range(len(cores))]
        # Who fails is tried again, and said to have failed, by the last line.
        return [' & '.join(f'taskset -c {core} {verb} --only {share}'
                           for core, share in zip(cores, shares, strict=True)) + ' & wait', verb]
    if how == 'slurm':
        verb = shlex.join(['launch/slurm.sbatch', 'ablate', '--sweep', question.path, '--workdir',
                           workdir, *flags])
        return [f'job=$(sbatch --parsable --ntasks-per-node=1 --array=0-{len(runs) - 1} {verb} '
                '--only SLURM_ARRAY_TASK_ID)',
                f'sbatch --ntasks-per-node=1 --dependency=afterany:$job {verb}']
    out = []
    for i, one in enumerate(runs):
        name = re.sub(r'[^a-z0-9]+', '-', f'{question.name}-{one.arm.name}'.lower())[:40]
        name = f'{name.strip("-")}-{i}'     # short enough for names of pods, and like no other
        words = ', '.join(json.dumps(w) for w in ['ablate', *flags, '--only', str(i), '--sweep'])
        words = re.sub(r'[\\&|]', r'\\\g<0>', words)      # what sed would read as its own
        swap = f's|train, --config,|{words},|'
        out.append(f'HOSTS=1 SLICES=1 NAME={name} CONFIG={shlex.quote(question.path)} '
                   f'WORKDIR={shlex.quote(workdir)} envsubst < launch/gke.yaml | '
                   f'sed {shlex.quote(swap)} | kubectl apply -f -')
    verb = shlex.join(['ablate', '--sweep', question.path, '--workdir', workdir, *flags])
    return [*out, f'# when all have ended, for the table and the report: jaxsd {verb}']

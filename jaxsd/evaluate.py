# SPDX-License-Identifier: Apache-2.0
"""Likelihood and generation metrics as functions of a trained stage and a data source.

A task is a function `task(lm, *, split, limit, <options>) -> dict` named in `config.evals`. It
returns `metrics` (name -> number), `items` (how many things were measured), and perhaps a `note`,
a `histogram`, `per_item` (`shares`), and `judged`: the metric to look at first, and its floor, a
number or another metric (the same answers beside a wrong input). Results go to
WORKDIR/evaluation.json, one entry per task, split and stage; the untrained model is a stage of its
own. Those of a task that is `probed` also go to metrics.jsonl, while training.
"""

import functools
import inspect
import json
import logging
import math
import os
import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsd import data, journal, likelier, model, sharding, trained
from jaxsd import run as rundir
from jaxsd import stage as stages
from jaxsd.answering import (  # noqa: F401 - tasks, too
    answers,
    exchanges,
    refined,
    replies,
    sounds,
    translations,
    written,
)
from jaxsd.config import ConfigError, bind, plain, unknown
from jaxsd.dialogue import turn_taking  # noqa: F401 - a task, found by its name here
from jaxsd.likelier import cloze, matched, pairs, shares, stories
from jaxsd.recognition import asr, few_shot, listening, preserved, tts
from jaxsd.state import mesh_of
from jaxsd.types import positive

log = logging.getLogger('jaxsd')


# Likelihood.

def _totals(config, stage: stages.Stage, place: sharding.Place = sharding.anywhere):
    """A jitted (params, batch, segments) -> (whole, each), of every column.

    whole: {name: (sum, weight)}. each: the same of every segment of every row, [rows, segments],
    where the number of segments is not 0; but for what the backbone adds of whole batches. A head
    that trains on a random share of the columns scores all of them here.
    """
    graph, objective = likelier.whole(config, stage), model.objective_of(config)

    def named(logp, hit, batch, beside):
        terms, metrics = objective(logp, hit, batch, beside)
        return {**{f'loss/{k}': x for k, x in terms.items()}, **metrics}

    @functools.partial(jax.jit, static_argnums=2)
    def totals(params, batch, segments=0):
        logp, hit, beside = nnx.merge(graph, params).forward(batch, jax.random.key(0), place)
        whole = named(logp, hit, batch, beside)
        by_row = {k: x for k, x in beside.items() if k == 'frames'}

        def of_row(number, row):
            logp, hit, cells, beside = jax.tree.map(lambda x: x[None], row)
            at = (cells['segment'] == number)[:, None]
            found = named(logp, hit, cells | {'weights': cells['weights'] * at}, beside)
            return {k: x for k, x in found.items() if k != 'loss/balance'}
        if not segments:
            return whole, {}
        each = jax.lax.map(
            lambda n: jax.vmap(functools.partial(of_row, n))((logp, hit, batch, by_row)),
            jnp.arange(1, segments + 1))
        return whole, jax.tree.map(jnp.transpose, each)
    return totals


def _likelihood(config, params, vocab, source, *, split, limit, batch, totals, apart=False):
    """(metrics, per item, how many records); with `apart`, what each record adds to a metric."""
    sums: dict = {}
    weight_of = {}
    of_record: dict[str, dict[int, tuple]] = {}
    records = 0
    for arrays, used, which in data.one_pass(config, source, vocab, batch=batch, split=split,
                                             limit=limit):
        records += sum(account['records'] for account in used.values())
        most = max(map(len, which)) if apart else 0
        whole, each = jax.device_get(totals(params, arrays, most and 1 << (most - 1).bit_length()))
        for name, (s, w) in whole.items():
            sums[name] = sums.get(name, 0.0) + float(s)
            weight_of[name] = weight_of.get(name, 0.0) + float(w)
        for name, (s, w) in each.items():
            of_record.setdefault(name, {}).update(
                {record: (s[i, n], w[i, n]) for i, row in enumerate(which)
                 for n, record in enumerate(row)})
    per_item = {name: shares(*zip(*(found.get(i, (0, 0)) for i in range(max(found) + 1)),
                                  strict=True)) for name, found in of_record.items()}
    return {n: s / weight_of[n] for n, s in sums.items() if weight_of[n] > 0}, per_item, records


def likelihood(lm: trained.LM, *, split: str, limit: int | None, sources: tuple[str, ...],
               batch: int = 16) -> dict:
    """Nats per token and accuracy of every range of the line, per source; whole records, packed."""
    positive('evals.likelihood', batch=batch, sources=len(sources))
    totals = _totals(lm.config, lm.stage)
    metrics, per_item, items = {}, {}, 0
    for source in sources:
        found, each, records = _likelihood(lm.config, lm.params, lm.vocab, source, split=split,
                                           limit=limit, batch=batch, totals=totals, apart=True)
        items += records
        metrics |= {f'{source}/{name}': x for name, x in found.items()}
        per_item |= {f'{source}/{name}': x for name, x in each.items()
                     if f'{source}/{name}' in metrics}
    return dict(metrics=metrics, items=items, per_item=per_item,
                note='teacher-forced; nats per scored token')


def probe(config, stage: stages.Stage):
    """What `train` measures every probe_steps: the held-out likelihood of the `likelihood` task's
    sources, and the tasks that are `probed`, each on so many records of split test.

    None where nothing is measured. Raises ConfigError at once, not in the middle of training, for
    a source that cannot be measured.
    """
    tasks = {name: _task(config, name) for name in sorted(config.evals)}
    task = tasks.pop('likelihood', None)
    tasks = {name: t for name, t in tasks.items() if t.keywords.get('probed', 0)}
    if not task and not tasks:
        return None
    vocab, sources, batch, totals = model.make_vocab(config), (), 0, None
    if task:
        sources, batch = task.keywords['sources'], task.keywords.get('batch', 16)
        positive('evals.likelihood', batch=batch, sources=len(sources))
    for name, t in tasks.items():
        positive(f'evals.{name}', probed=t.keywords['probed'])
        if jax.process_count() > 1:
            raise ConfigError(f'evals.{name}.probed: one process generates alone; set it to 0 and '
                              'measure checkpoints with evaluate')
    for name in (*(('likelihood',) if task else ()), *tasks):
        check(config, name, vocab)
    if task:
        mesh, rules = mesh_of(config), sharding.rules_of(plain(config.mesh).get('rules', {}))
        place = sharding.placer(rules, mesh)
        batch = -(-batch // place.ways('batch')) * place.ways('batch')  # rows for every device
        totals = _totals(config, stage, place)
    graph = model.abstract(config, stage.lora)[0]

    def held_out(step, params):
        out = {}
        for source in sources:
            found, _, _ = _likelihood(config, params, vocab, source, split='test', limit=64,
                                      batch=batch, totals=totals)
            out |= {f'{source}/{k}': x for k, x in found.items() if k.startswith('loss/')}
        lm = trained.LM(config, stage, vocab, graph, params, step, '')
        for name, t in tasks.items():
            start = time.perf_counter()
            found = t(lm, split='test', limit=t.keywords['probed'])['metrics']
            out |= {f'{name}/{k}': x for k, x in found.items() if math.isfinite(x)}
            out[f'{name}/seconds'] = time.perf_counter() - start
        return out
    held_out.generates = bool(tasks)
    return held_out


def check(config, name: str, vocab) -> None:
    """Raises ConfigError for a task whose sources cannot be read, or that there are none of."""
    task = _task(config, name)
    given = {k: p.default for k, p in inspect.signature(task.func).parameters.items()
             if p.default is not p.empty} | task.keywords
    source = given.get('listener')
    if source and source not in config.data.sources:
        raise unknown(f'evals.{name}: data.sources', source, config.data.sources)
    for source in filter(None, (given.get('source'), *given.get('sources', ()))):
        try:
            next(data.one_pass(config, source, vocab, batch=1, limit=1), None)
        except ConfigError as e:
            raise ConfigError(f'evals.{name}: {e}; name other sources there, or measure '
                              'nothing with --config.evals={}') from None


def _task(config, name: str):
    """The function of evals.NAME, its options bound."""
    return bind(config.evals[name], 'jaxsd.evaluate', f'evals.{name}', given=('split', 'limit'))


# Running tasks.

ERRORS = ('WER %', 'exact %')
CROSSED = tuple(f'{kind}/{a}->{b}' for kind in ('nats', 'right %') for a in 'TS' for b in 'TS')
MEASURED = {
    asr: (*ERRORS, 'wrong-sentence WER %'), listening: (*ERRORS, 'wrong-sentence WER %'),
    preserved: ('preserved %', 'true %', 'chance %'),
    few_shot: (*ERRORS, 'wrong-sentence WER %', 'WER %/0 shots'),
    matched: ('right %', 'nats', 'nats/another'), tts: ('round-trip WER %', 'wrong-sentence WER %'),
    exchanges: ('correct %', 'chance %'),
    translations: ('BLEU', 'chrF', 'BLEU/floor', 'chrF/floor'),
    replies: (*ERRORS, 'WER %/floor', 'UER %', 'UER %/floor', 'spoken WER %', 'spoken WER %/floor'),
    stories: CROSSED, cloze: CROSSED, pairs: ('right %',),
    answers: ('correct %', 'chance %', 'waited %', 'answered %', 'latency frames p10',
              'latency frames median', 'latency frames p90', 'correct %/facts', 'correct %/sums')}
"""The metrics of the tasks whose metrics do not depend on the config."""


def measured(config, task: str) -> tuple[str, ...] | None:
    """The metrics that `config.evals[task]` can report; None where only running it tells."""
    bound = bind(plain(config.evals[task]), 'jaxsd.evaluate', f'evals.{task}',
                 given=('split', 'limit'))
    if bound.func is not likelihood:
        known = MEASURED.get(bound.func, getattr(bound.func, 'metrics', None))
        alone = known and bound.func is replies and not bound.keywords.get('listener')
        return tuple(m for m in known if 'spoken' not in m) if alone else known
    ranges = model.make_vocab(config).ranges
    kinds = [f'loss/{term}' for term in config.objective.terms] + [
        f'{kind}/{name}' for kind in ('nats', 'accuracy') for name in ranges]
    return tuple(f'{source}/{kind}' for source in bound.keywords['sources'] for kind in kinds)


UNTRAINED = 'untrained'
"""The stage that entries of the model as it was drawn are of; its step is 0."""


def run(config, workdir: str, *, stage_name=None, tasks=(), split='test', limit=None,
        untrained: bool = False) -> list[dict]:
    """Runs the named tasks (default: all of config.evals), each result going to evaluation.json as
    soon as it is there. Raises ConfigError at the end for tasks that could not be run.

    untrained: measures the stage's model as the seed draws it, the floor of everything learned.
    """
    every = plain(config.evals)
    for task in tasks:
        if task not in every:
            raise unknown('--tasks', task, every)
    rundir.same_run(workdir, config, moved=True)
    chosen = {name: _task(config, name) for name in tasks or sorted(every)}
    if not chosen:
        raise ConfigError('config.evals names no task')
    recorded(workdir)       # a file that cannot be added to is said before the work
    lm = trained.load(config, workdir, stage_name, untrained=untrained)
    entries, failed = [], {}
    for name, task in chosen.items():
        log.info('evaluating %s on split %s', name, split)
        try:
            found = task(lm, split=split, limit=limit)
        except ValueError as e:     # of this dataset or model; the others can be measured
            failed[name] = e
            continue
        entries.append(dict(task=name, split=split, stage=UNTRAINED if untrained else lm.stage.name,
                            step=lm.step, limit=limit, revision=journal.revision(), **found))
        _table(entries[-1])
        record(workdir, entries[-1:])
    if failed:
        raise ConfigError('; '.join(f'evals.{name}: {e}' for name, e in failed.items())
                          + ('; all else was measured and kept' if entries else ''))
    return entries


def record(workdir: str, entries: list[dict]) -> None:
    """Puts entries into WORKDIR/evaluation.json in place of older ones of the same task and split.

    A measurement of fewer items does not replace one of more of the same step.
    """
    path = os.path.join(workdir, 'evaluation.json')
    old = {_what(e): e for e in recorded(workdir)}
    for e in list(entries):
        before = old.get(_what(e), {})
        if before.get('step') == e.get('step') and _most(before) > _most(e):
            log.info('%s keeps %s on %s of more items', path, e['task'], e['split'])
            entries = [x for x in entries if x is not e]
    new = {_what(e) for e in entries}
    kept = [e for what, e in old.items() if what not in new]
    clean = json.loads(json.dumps(kept + entries), parse_constant=lambda _: None)   # NaN is no JSON
    rundir.write_atomic(path, json.dumps(clean, indent=1) + '\n')


def _what(entry: dict) -> tuple:
    return entry.get('task'), entry.get('split'), entry.get('stage')


def _most(entry: dict) -> float:
    """How many items were asked for at most."""
    limit = entry.get('limit', entry.get('items', 0))
    return math.inf if limit is None else limit


def recorded(workdir: str) -> list[dict]:
    """The entries of WORKDIR/evaluation.json, if there is one."""
    path = os.path.join(workdir, 'evaluation.json')
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding='utf-8') as f:
            found = json.load(f)
        if not isinstance(found, list) or not all(isinstance(e, dict) for e in found):
            raise ValueError('it is no list of entries')
        return found
    except ValueError as e:
        raise ConfigError(f'{path} cannot be read: {e}; move it away') from None


def _table(entry: dict) -> None:
    from rich.console import Console
    from rich.table import Table
    table = Table()
    table.add_column('metric')
    table.add_column('value', justify='right')
    for name, value in entry['metrics'].items():
        table.add_row(name, f'{value:.3f}')
    console = Console(file=sys.stdout, width=90)
    # Not the table's own title, which is broken to the width of two narrow columns.
    console.print(f'{entry["task"]} on {entry["split"]} ({entry["items"]} items, stage '
                  f'{entry["stage"]}, step {entry["step"]})', style='italic', highlight=False,
                  soft_wrap=True)
    console.print(table)

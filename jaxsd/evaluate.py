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
import json
import logging
import math
import os
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsd import data, frames, generate, journal, likelier, model, reply, sharding, trained
from jaxsd import run as rundir
from jaxsd import stage as stages
from jaxsd.config import ConfigError, bind, plain, unknown
from jaxsd.dialogue import turn_taking  # noqa: F401 - a task, found by its name here
from jaxsd.layout import duplex, flat, framed, template
from jaxsd.likelier import cloze, matched, pairs, shares, stories
from jaxsd.state import mesh_of
from jaxsd.types import NOTHING, positive

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
    for source, name in [*((x, 'likelihood') for x in sources),
                         *((t.keywords['source'], name) for name, t in tasks.items())]:
        try:
            next(data.one_pass(config, source, vocab, batch=1, limit=1), None)
        except ConfigError as e:
            raise ConfigError(f'evals.{name}: {e}; name other sources there, or measure '
                              'nothing with --config.evals={}') from None
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


def _task(config, name: str):
    """The function of evals.NAME, its options bound."""
    return bind(config.evals[name], 'jaxsd.evaluate', f'evals.{name}', given=('split', 'limit'))


# Recognition and synthesis.

def _said(record) -> str:
    return ' '.join(w.text for w in record.words)


def error_rates(said: list[str], heard: list[str]) -> dict[str, float]:
    """Word errors per word, pooled over sentences, and how many sentences have none, in percent."""
    import jiwer
    exact = np.mean([a == b for a, b in zip(said, heard, strict=True)])
    return {'WER %': 100 * jiwer.wer(said, heard), 'exact %': 100 * float(exact)}


JUDGED_BY_WORDS = ('WER %', 'wrong-sentence WER %')


def beside_others(said: list[str], heard: list[str]) -> dict[str, float]:
    """`error_rates`, and the words heard against the sentence after each: what a guess is worth."""
    others = error_rates(said[1:] + said[:1], heard)['WER %']
    return error_rates(said, heard) | {'wrong-sentence WER %': others}


def errors_per_item(said: list[str], heard: list[str]) -> dict[str, dict]:
    """`error_rates`, by sentence."""
    import jiwer
    found = [jiwer.process_words(a, b) for a, b in zip(said, heard, strict=True)]
    wrong = [100 * (x.substitutions + x.deletions + x.insertions) for x in found]
    return {'WER %': shares(wrong, [x.hits + x.substitutions + x.deletions for x in found]),
            'exact %': shares([100.0 * (a == b) for a, b in zip(said, heard, strict=True)])}


def asr(lm: trained.LM, *, split: str, limit: int | None, source: str) -> dict:
    """Word error rate of writing down held-out speech (jiwer), greedy.

    The floor is the same transcripts against other sentences, as in the tasks below.
    """
    records = list(data.examples(lm.config, split, source, vocab=lm.vocab, limit=limit))
    given, asked = trained.markers(lm.config, source)
    units = [flat.speech_tokens(r.units[0], lm.vocab) for r in records]
    heard = trained.transcribe(lm, units, given, asked)
    said = [_said(r) for r in records]
    return dict(metrics=beside_others(said, heard), items=len(records), judged=JUDGED_BY_WORDS,
                per_item=errors_per_item(said, heard),
                note='greedy; words pooled over sentences')


def tts(lm: trained.LM, *, split: str, limit: int | None, source: str, listener: str = 'asr'
        ) -> dict:
    """Round trip: text to units to the model's own transcript, as a word error rate.

    The floor is the same transcripts against other sentences. Generation is greedy.
    """
    records = list(data.examples(lm.config, split, source, vocab=lm.vocab, limit=limit))
    said = [_said(r) for r in records]
    spoken = trained.read_aloud(lm, said, *trained.markers(lm.config, source))
    heard = trained.transcribe(lm, spoken, *trained.markers(lm.config, listener))
    found = beside_others(said, heard)
    return dict(metrics={'round-trip WER %': found['WER %'],
                         'wrong-sentence WER %': found['wrong-sentence WER %']},
                items=len(records), judged=('round-trip WER %', 'wrong-sentence WER %'),
                per_item={'round-trip WER %': errors_per_item(said, heard)['WER %']},
                note='greedy synthesis, transcribed by the same model')


POOL = 256      # training records that examples are drawn from


def few_shot(lm: trained.LM, *, split: str, limit: int | None, source: str, shots: int = 4,
             listener: str = 'asr', most_tokens: int = 200) -> dict:
    """A task shown by examples in the line of tokens, and then asked (arXiv 2402.05755 App. B).

    The prompt is `shots` training records as `source` draws them, whole, and the held-out record up
    to its first scored column; what follows, greedily, is its answer. An answer of units is
    transcribed by the model itself, as in the task tts, by the source `listener`. WER: against the
    words of the record's own answer; exact: all of them right, which is what counts where answers
    are labels. WER/0 shots is the same without examples, the floor the answers beside others'.
    Packed rows keep records apart, so a small model that saw nothing else does worse with examples.
    """
    positive('evals.few_shot', shots=shots, most_tokens=most_tokens)
    v, text = lm.vocab, lm.text()
    if len(v.rows) > 1:
        raise ConfigError('few_shot: examples stand in one line; this config has several streams')
    pool = [data.drawn(lm.config, source, v, r).tokens[0] for r in data.examples(
        lm.config, 'train', source, limit=POOL)]
    if len(pool) < shots:
        raise ConfigError(f'few_shot: {source} has {len(pool)} training records for {shots} shots')
    asked, wanted, kinds = [], [], set()
    first, size = v.ranges['text']
    pieces, marks = range(first, first + size), set(v.specials.values())
    for i, record in enumerate(data.examples(lm.config, split, source, limit=limit)):
        grid = data.drawn(lm.config, source, v, record)
        n = int(np.flatnonzero(grid.weights[0])[0])
        chosen = np.random.default_rng(i).choice(len(pool), shots, replace=False)
        # An example after the first goes without its BOS: the line begins once.
        asked.append(([*pool[chosen[0]], *(t for k in chosen[1:] for t in pool[k][1:]),
                       *grid.tokens[0, 1:n]], list(grid.tokens[0, :n])))
        words = [[t - first for t in x.tolist() if t in pieces and t not in marks]
                 for x in (grid.tokens[0, n:], grid.tokens[0, :n])]
        kinds.add('text' if words[0] else 'speech')
        wanted.append(text.decode(words[0] or words[1]))
    if len(kinds) > 1:
        raise ConfigError(f'few_shot: answers of {source} are some text and some speech')
    (kind,) = kinds
    # Where records have no end of their own, an answer ends where the next example would begin.
    ends = pool[0][-1] == v.specials['eos']

    def answers_of(prompts):
        out = []
        for part in trained.in_parts([np.asarray(p, np.int32) for p in prompts]):
            out += generate.continue_prompts(
                lm.speaker(), part, v, kind=kind, most_tokens=most_tokens,
                stop=None if ends else int(pool[0][1]))
        return (trained.transcribe(lm, out, *trained.markers(lm.config, listener))
                if kind == 'speech' else [text.decode([t - first for t in x]) for x in out])
    shown, bare = (answers_of(prompts) for prompts in zip(*asked, strict=True))
    metrics = beside_others(wanted, shown)
    metrics['WER %/0 shots'] = error_rates(wanted, bare)['WER %']
    return dict(metrics=metrics, items=len(wanted), judged=JUDGED_BY_WORDS,
                per_item=errors_per_item(wanted, shown), note=f'greedy; {shots} examples')


def preserved(lm: trained.LM, *, split: str, limit: int | None, source: str, label: str = 'tone',
              train: int = 1000, most_tokens: int = 200) -> dict:
    """Does what is said go on in the manner in which it began? (STSP, arXiv 2402.05755 §5.2)

    The first half of a held-out record's line, as `source` draws it, is continued (temperature 0.8,
    top-p 0.95, as there), and a classifier says in which manner: a logistic regression on how often
    each id occurs, made from the second halves of `train` training records and what their `style`
    says for `label`. preserved: of the continuations; true: of the recorded second halves, what the
    classifier is good for; chance: the same continuations beside other records' labels. Only of
    speech to speech: texts with a manner of their own are another dataset's.
    """
    from sklearn.linear_model import LogisticRegression
    positive('evals.preserved', train=train, most_tokens=most_tokens)
    v = lm.vocab

    def halves(records):
        for r in records:
            said = dict(x.split('=', 1) for x in r.style[0].split()) if r.style else {}
            if label in said:
                line = data.drawn(lm.config, source, v, r).tokens[0]
                yield line[:len(line) // 2], line[len(line) // 2:], said[label]

    def counted(lines):
        return np.stack([np.sqrt(np.bincount(x, minlength=v.rows[0].predicted) / max(1, len(x)))
                         for x in lines])
    told = list(halves(data.examples(lm.config, 'train', source, limit=train)))
    asked = list(halves(data.examples(lm.config, split, source, limit=limit)))
    if not asked or len({x for _, _, x in told}) < 2:
        raise ConfigError(f'preserved: the records of {source} have no two styles of {label}')
    judge = LogisticRegression(max_iter=2000, C=100.0).fit(
        counted([x for _, x, _ in told]), [x for _, _, x in told])
    sampler = {v.rows[0].name: generate.Sampler(0.8, 0, 0.95)}
    made = []
    for n, part in enumerate(trained.in_parts([x for x, _, _ in asked])):
        made += generate.continue_prompts(lm.speaker(sampler), part, v, kind='speech',
                                          most_tokens=most_tokens, key=jax.random.key(n))
    labels = np.array([x for _, _, x in asked])
    found, true = (judge.predict(counted(x)) for x in (made, [x for _, x, _ in asked]))
    good = 100.0 * (found == labels)
    metrics = {'preserved %': float(good.mean()), 'true %': 100 * float(np.mean(true == labels)),
               'chance %': float(np.mean([100 * np.mean(found == np.roll(labels, k))
                                          for k in range(1, len(labels))] or [math.nan]))}
    return dict(metrics=metrics, items=len(asked), judged=('preserved %', 'chance %'),
                per_item={'preserved %': shares(good)},
                note=f'{label} of what is said on, by a classifier of ids; temperature 0.8')


def listening(lm: trained.LM, *, split: str, limit: int | None, source: str, batch: int = 16
              ) -> dict:
    """Word error rate of what is written while held-out speech is heard, a frame at a time, greedy.

    Recognition by delay alone (arXiv 2410.00037 §5.7): `source` is drawn with a speaker who is only
    heard and with that speaker's words some columns late. Words that its grid has no room for at
    the end are not counted.
    """
    positive('evals.listening', batch=batch)
    v, text = lm.vocab, lm.text()
    options = data.layout_of(lm.config, source)
    if options['name'] != 'duplex.columns' or options.get('text') != 'theirs':
        raise ConfigError(f'listening: data.sources.{source} must be drawn by duplex.columns with '
                          "text='theirs'")
    late = trained.layout_delays(options, v)
    records = list(data.examples(lm.config, split, source, vocab=v, limit=limit))
    records.sort(key=lambda r: r.codes.shape[-1])       # so that few columns are padding
    silent = [k for k, row in enumerate(v.rows) if row.name.startswith('mine')]

    def words(columns):
        return ' '.join(w for _, w in trained.words_at(v, text, duplex.undelay(columns, late)[0]))
    said, heard = [], []
    for part in trained.in_parts(records, batch):
        plans = [generate.conversation_plan(v, r.codes[options['theirs']], late) for r in part]
        for plan in plans:
            plan[silent] = np.where(plan[silent] == generate.FREE, NOTHING, plan[silent])
        plans += plans[-1:] * (batch - len(part))
        heard += [words(x) for x in generate.converse(lm.speaker(), plans)[:len(part)]]
        said += [words(data.drawn(lm.config, source, v, r).tokens) for r in part]
    return dict(metrics=beside_others(said, heard), items=len(records), judged=JUDGED_BY_WORDS,
                note='greedy, frame by frame; words pooled over records')


# Answers by a template.

def exchanges(lm: trained.LM, *, split: str, limit: int | None, source: str,
            questions: str = 'grammar.json') -> dict:
    """Every question of held-out dialogues alone, answered by the source's template, greedily.

    The model fills the template's own phases, so a chain of modality writes down the question,
    answers in text and speaks. correct: the last written word of the asked kind is the right one.
    chance: the same answers against the other questions' wants, of the same kind where there are.
    """
    options = plain(lm.config.data.sources[source]).get('layout') or plain(lm.config.layout)
    if options['name'] != 'template.chain' or options.get('over', 'record') == 'record':
        raise ConfigError(f'exchanges: data.sources.{source} must be drawn by template.chain over '
                          'exchanges')
    options = {k: v for k, v in options.items() if k not in ('name', 'score')}
    asked, kinds = questions_of(os.path.join(lm.config.data.path, questions))
    text, v, found, prompts, steps = lm.text(), lm.vocab, [], [], []
    mine = options.get('mine', 0)
    options['mine'] = 0 if mine == 'random' else mine
    rng = np.random.default_rng(0)
    for record in data.examples(lm.config, split, source, vocab=v, limit=limit):
        for exchange in template.exchanges(record, options['mine']):
            said = ' '.join(w.text for w in exchange['theirs'].words)
            ends = max((q for q in asked if said.endswith(q)), key=len, default=None)
            if ends is not None:
                made = template.pieces(template.only(record, exchange), vocab=v, rng=rng, **options)
                prompt, phases = generate.phases(made, v)
                found.append(asked[ends])
                prompts.append(prompt)
                steps.append(phases)
    if not found:
        raise ConfigError(f'exchanges: split {split} of {source} asks no question of {questions}')
    start, size = v.ranges['text']
    heard, bounds = [], dict(text=48, speech=400, any=448)
    for part in trained.in_parts(list(zip(prompts, steps, strict=True))):
        told = generate.follow(lm.speaker(), *map(list, zip(*part, strict=True)), v,
                               most_tokens=bounds)
        for out in told:
            ids = [t for name, ids in out.items() if 'text mine' in name for t in ids]
            heard.append(text.decode([t - start for t in ids if start <= t < start + size]))

    def right(question, answer):
        named = [w for w in answer.split() if w in kinds[question['kind']]]
        return bool(named) and named[-1] == question['want']
    good, luck = ([100.0 * right(q, a) for q, a in zip(questions, heard, strict=True)]
                  for questions in (found, others(found)))
    return dict(metrics={'correct %': float(np.mean(good)), 'chance %': float(np.mean(luck))},
                items=len(found), judged=('correct %', 'chance %'),
                per_item={'correct %': shares(good)},
                note='greedy; the written answer, one question at a time')


def others(asked: list[dict]) -> list[dict]:
    """For each question the next one of its kind, or itself where there is none."""
    return [next((q for q in asked[i + 1:] + asked[:i] if q['kind'] == mine['kind']), mine)
            for i, mine in enumerate(asked)]


# Answers written and spoken side by side.

def replies(lm: trained.LM, *, split: str, limit: int | None, source: str,
            most_columns: int = 128, listener: str | None = None) -> dict:
    """Questions as `source` draws them: are they answered in the right words, and units?

    WER: of the written answer against the true one. UER: the same of what is spoken, its codes of
    the first codebook with repeats merged. spoken WER, with a `listener` (a source whose grids hear
    one voice and write down what it says): what the model itself hears in its answer, against what
    it wrote beside it, or was asked to read. The floors score the answers against those to other
    questions.
    """
    positive('evals.replies', most_columns=most_columns)
    records = reply.examples(lm, source, split=split, limit=limit)
    grids, layout = reply.drawn(lm, source, records)
    text, v = lm.text(), lm.vocab
    found = reply.replies(lm, grids, layout, most_columns=most_columns)
    said, wanted, meant, heard, true = [], [], [], [], []
    for grid, (ids, codes) in zip(grids, found, strict=True):
        prompt, _ = reply.asked(grid)
        n = prompt.shape[1]
        said.append(text.decode(ids))
        wanted.append(text.decode(reply.written(v, grid.tokens[:, n:])))
        meant.append(said[-1] if wanted[-1] else text.decode(reply.written(v, prompt)))
        heard.append(' '.join(map(str, flat.runs(codes[0])[0])))
        whole = reply.true(lm.config, layout, grid, v)[0]
        true.append(' '.join(map(str, flat.runs(whole)[0])))
    asked = {'WER %': (wanted, said), 'UER %': (true, heard)}
    if listener is not None:
        ears = reply.as_heard(lm, meant, reply.on_the_clock(lm, [codes for _, codes in found]))
        asked['spoken WER %'] = meant, [text.decode(ids) for ids, _ in reply.replies(
            lm, *reply.drawn(lm, listener, ears), most_columns=most_columns)]
    metrics, per_item = {}, {}
    for name, (want, got) in asked.items():
        pairs = [(a, b) for a, b in zip(want, got, strict=True) if a]
        if pairs:
            want, got = map(list, zip(*pairs, strict=True))
            metrics[name] = error_rates(want, got)['WER %']
            metrics[f'{name}/floor'] = error_rates(want, got[1:] + got[:1])['WER %']
            each = errors_per_item(want, got)
            per_item[name] = each['WER %']
            if name == 'WER %':
                metrics['exact %'] = error_rates(want, got)['exact %']
                per_item['exact %'] = each['exact %']
    judged = next(x for x in ('WER %', 'spoken WER %', 'UER %') if x in metrics)
    return dict(metrics=metrics, items=len(records), judged=(judged, f'{judged}/floor'),
                per_item=per_item, note='greedy; floors: another one\'s answer')


# Sound that is no tokens.

def sounds(lm: trained.LM, *, split: str, limit: int | None, source: str,
           most_columns: int = 256) -> dict:
    """Frames that follow the true text of what `source` draws, against those that should.

    distance: mean absolute difference of log-mel numbers along the best alignment. Its floor is
    that of the same frames to another record's, and mean is that of a sound that never changes,
    the mean of all frames, which a regression that learned nothing says. length: how long they
    last, in percent of the true ones. Where something is heard, WER: of how it is written down, the
    first words of the text against as many that were heard.
    """
    positive('evals.sounds', most_columns=most_columns)
    config, v, bins = lm.config, lm.vocab, lm.config.objective.bins
    records = list(data.examples(config, split, source, vocab=v, limit=limit))
    grids = [data.drawn(config, source, v, r) for r in records]
    said = [x.reshape(-1, bins) for x in frames.spoken(lm, grids, most_columns=most_columns)]
    true = [frames.true_frames(g).reshape(-1, bins) for g in grids]
    mean = np.concatenate(true).mean(0, keepdims=True)

    def far(a, b):
        return float(np.mean([frames.distance(x, y) for x, y in zip(a, b, strict=True)]))
    metrics = {'distance': far(said, true), 'distance/floor': far(said, true[1:] + true[:1]),
               'distance/mean': far([np.repeat(mean, len(x), 0) for x in true], true),
               'length %': 100 * sum(map(len, said)) / sum(map(len, true))}
    if all('slot' in g.extra for g in grids):
        text, heard, written = lm.text(), [], []
        for part in trained.in_parts(list(zip(records, grids, strict=True)), 16):
            asked = [reply.asked(g) for _, g in part]
            asked += [asked[-1]] * (16 - len(part))
            found = reply.answer(lm.speaker(), [p for p, _ in asked], stop=reply.ended(v),
                                 heard=[h for _, h in asked], most_columns=64)
            for (record, _), columns in zip(part, found, strict=False):
                count = framed.cut(record.words, _prompt_s(config, source))[0]
                heard.append(' '.join(w.text for w in record.words[:count]))
                ids = reply.written(v, columns)
                written.append(' '.join(text.decode(ids).split()[:count]))
        metrics['WER %'] = error_rates(heard, written)['WER %']
        metrics['WER %/floor'] = error_rates(heard[1:] + heard[:1], written)['WER %']
    return dict(metrics=metrics, items=len(records), judged=('distance', 'distance/floor'),
                note='each frame read back before the next; floors: another record\'s')


def refined(lm: trained.LM, *, split: str, limit: int | None, source: str,
            steps: tuple[int, ...] = (1, 2, 8)) -> dict:
    """Latents that the flow makes of true units, against true latents: what part of the units'
    error is left, in percent, in the columns that were not given.

    left/N: after N steps. left/mean: of the mean of all latents, which knows no units; units are
    100. spread/N: the deviation of latents from column to column in percent of the true one, which
    a flow that gives the mean of what could be said falls short of.
    """
    positive('evals.refined', **{f'steps {n}': n for n in steps})
    records = list(data.examples(lm.config, split, source, vocab=lm.vocab, limit=limit))
    grids = [data.drawn(lm.config, source, lm.vocab, r) for r in records]
    asked = [g.weights[0] * g.extra['framed'] > 0 for g in grids]
    true = np.concatenate([g.extra['frames'][a] for g, a in zip(grids, asked, strict=True)])
    units = np.concatenate([g.extra['means'][a] for g, a in zip(grids, asked, strict=True)])
    whole = np.mean((units - true) ** 2)
    metrics = {'left %/mean': 100 * float(np.mean((true - true.mean(0)) ** 2) / whole),
               'spread %/units': 100 * float(units.std(0).mean() / true.std(0).mean())}
    for n in steps:
        found = frames.refined(lm, grids, steps=n)
        found = np.concatenate([x[a[g.extra['framed'] > 0]] for x, g, a in
                                zip(found, grids, asked, strict=True)])
        metrics[f'left %/{n} steps'] = 100 * float(np.mean((found - true) ** 2) / whole)
        metrics[f'spread %/{n} steps'] = 100 * float(found.std(0).mean() / true.std(0).mean())
    return dict(metrics=metrics, items=len(records), judged=(f'left %/{steps[-1]} steps', 100.0),
                note='true units, and the voice they are given; one draw')


def _prompt_s(config, source: str) -> float:
    layout = plain(config.data.sources[source]).get('layout') or plain(config.layout)
    return layout['prompt_s']


# Conversation.

def questions_of(path: str) -> tuple[dict, dict]:
    """(question text -> {want, kind}, kind -> words) of a corpus whose questions have answers."""
    try:
        with open(path, encoding='utf-8') as f:
            stored = json.load(f)
        return ({q['text']: q for part in stored['questions'].values() for q in part},
                {k: set(words) for k, words in stored['kinds'].items()})
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f'{path} does not list questions with answers: {e}') from None


class Answer(NamedTuple):
    """How one question was answered. named: the last word of the asked kind, or None. latency:
    frames from its end to the first word, or None."""

    good: bool
    waited: bool
    latency: int | None
    named: str | None = None


def score_answer(said, kind: set, want: str, *, begin: float, end: float, until: float) -> Answer:
    """Scores a question asked during frames `begin`..`end` by the (frame, word) pairs of `said`.

    The answer is what is said from the question's last frame on, before `until` (when the next
    question begins), and its last word among `kind` counts. A word that begins while the question
    is being asked is early, but for its first two frames: that was said to what came before.
    """
    answer = [(t, w) for t, w in said if end - 1 <= t < until]
    early = [w for t, w in said if begin + 2 <= t < end - 1]
    named = [w for _, w in answer if w in kind]
    return Answer(bool(named) and named[-1] == want, not early,
                  math.floor(answer[0][0] - end) + 1 if answer else None,
                  named[-1] if named else None)


def score_dialogue(said, turns, asked: dict, kinds: dict, frame_hz: float
                   ) -> list[tuple[str, Answer]]:
    """('sums' or 'facts', Answer) of each of the user's `turns` that is a question in `asked`."""
    turns = [t for t in turns if t.channel == 1 and t.text in asked]
    ends = [*(t.start_s * frame_hz for t in turns[1:]), math.inf]
    out = []
    for turn, until in zip(turns, ends, strict=False):
        q = asked[turn.text]
        of = 'sums' if ' plus ' in q['about'] or ' minus ' in q['about'] else 'facts'
        out.append((of, score_answer(said, kinds[q['kind']], q['want'], until=until,
                                     begin=turn.start_s * frame_hz, end=turn.end_s * frame_hz)))
    return out


def summary(found: list[tuple[str, Answer]]) -> tuple[dict, list[int]]:
    """(metrics, latencies of those answered) of scored questions, at least one."""
    def percent(values):
        return 100 * float(np.mean(values))
    latency = [a.latency for _, a in found if a.latency is not None]
    spread = np.percentile(latency, [10, 50, 90]) if latency else [math.nan] * 3
    metrics = {'correct %': percent([a.good for _, a in found]),
               'waited %': percent([a.waited for _, a in found]),
               'answered %': percent([a.latency is not None for _, a in found]),
               'latency frames p10': float(spread[0]), 'latency frames median': float(spread[1]),
               'latency frames p90': float(spread[2])}
    return metrics | {f'correct %/{of}': percent([a.good for o, a in found if o == of])
                      for of in sorted({of for of, _ in found})}, latency


def answers(lm: trained.LM, *, split: str, limit: int | None, source: str, batch: int = 16,
            questions: str = 'grammar.json') -> dict:
    """The user's side of held-out dialogues is played; are their questions answered, and when?

    correct: among the words written between a question's end and the next question, the last that
    is of the asked kind is the right one. waited: no word begins while the question is being asked,
    from its third frame to its last but one (`score_answer`).
    latency: frames from the question's end to the answer's first word. The model hears the user
    frame by frame and everything it says itself is its own; decoding is greedy, in text and in
    sound, so that the measure repeats.
    """
    positive('evals.answers', batch=batch)
    config, v = lm.config, lm.vocab
    asked, kinds = questions_of(os.path.join(config.data.path, questions))
    records = list(data.examples(config, split, source, vocab=v, limit=limit))
    hz = config.codec.frame_hz
    late = trained.layout_delays(plain(config.layout), v)
    speaker = lm.speaker()
    text = lm.text()
    records.sort(key=lambda r: r.codes.shape[-1])       # so that few columns are padding
    found, wants = [], []
    for part in trained.in_parts(records, batch):
        plans = [generate.conversation_plan(v, r.codes[1], late) for r in part]
        plans += plans[:1] * (batch - len(part))
        filled = generate.converse(speaker, plans)
        for r, columns in zip(part, filled, strict=False):
            said = trained.words_at(v, text, duplex.undelay(columns, late)[0])
            found += score_dialogue(said, r.turns, asked, kinds, hz)
            wants += [asked[t.text] for t in r.turns if t.channel == 1 and t.text in asked]
    if not found:
        raise ConfigError(f'answers: split {split} of {source} asks no question of {questions}')
    metrics, latency = summary(found)
    metrics['chance %'] = 100 * float(np.mean([
        a.named == q['want'] for (_, a), q in zip(found, others(wants), strict=True)]))
    each = {'correct %': [a.good for _, a in found], 'waited %': [a.waited for _, a in found],
            'answered %': [a.latency is not None for _, a in found]}
    return dict(metrics=metrics, items=len(found), judged=('correct %', 'chance %'), per_item={
        k: shares([100.0 * x for x in values]) for k, values in each.items()}, histogram=dict(
        name=f'latency in frames of {1000 / hz:.0f} ms', values=[float(x) for x in latency]),
        note='the model hears the user frame by frame; everything it says is its own; waited: no '
             'word begins from the third frame of a question to its last but one')


# Running tasks.

ERRORS = ('WER %', 'exact %')
CROSSED = tuple(f'{kind}/{a}->{b}' for kind in ('nats', 'right %') for a in 'TS' for b in 'TS')
MEASURED = {
    asr: (*ERRORS, 'wrong-sentence WER %'), listening: (*ERRORS, 'wrong-sentence WER %'),
    preserved: ('preserved %', 'true %', 'chance %'),
    few_shot: (*ERRORS, 'wrong-sentence WER %', 'WER %/0 shots'),
    matched: ('right %', 'nats', 'nats/another'), tts: ('round-trip WER %', 'wrong-sentence WER %'),
    exchanges: ('correct %', 'chance %'),
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
        return MEASURED.get(bound.func, getattr(bound.func, 'metrics', None))
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

# SPDX-License-Identifier: Apache-2.0
"""Likelihood and generation metrics as functions of a trained stage and a data source.

A task is a function `task(lm, *, split, limit, <options>) -> dict` named in `config.evals`. It
returns `metrics` (name -> number), `items` (how many things were measured), and perhaps a `note`
and a `histogram`. Results go to WORKDIR/evaluation.json, one entry per task and split; those of a
task that is `probed` also to metrics.jsonl, while training.
"""

import copy
import csv
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

from jaxsd import data, generate, model, reply, sharding, speak
from jaxsd import run as rundir
from jaxsd import stage as stages
from jaxsd.config import ConfigError, bind, plain, unknown
from jaxsd.dialogue import turn_taking  # noqa: F401 - a task, found by its name here
from jaxsd.layout import duplex, flat, template
from jaxsd.state import mesh_of
from jaxsd.types import NOTHING, Record, positive

log = logging.getLogger('jaxsd')


# Likelihood.

def _totals(config, stage: stages.Stage, place: sharding.Place = sharding.anywhere):
    """A jitted (params, batch) -> (terms, metrics) of sums and weights, of every column.

    A head that trains on a random share of the columns scores all of them here.
    """
    whole = copy.deepcopy(config)
    if 'fraction' in whole.head:
        whole.head.fraction = 1.0
    graph, objective = model.abstract(whole, stage.lora)[0], model.objective_of(config)

    @jax.jit
    def totals(params, batch):
        logp, hit, beside = nnx.merge(graph, params).forward(batch, jax.random.key(0), place)
        return objective(logp, hit, batch, beside)
    return totals


def _likelihood(config, params, vocab, source, *, split, limit, batch, totals):
    sums: dict = {}
    weight_of = {}
    for arrays, _ in data.one_pass(config, source, vocab, batch=batch, split=split, limit=limit):
        terms, metrics = jax.device_get(totals(params, arrays))
        for name, (s, w) in {**{f'loss/{k}': x for k, x in terms.items()}, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + float(s)
            weight_of[name] = weight_of.get(name, 0.0) + float(w)
    return {name: s / weight_of[name] for name, s in sums.items() if weight_of[name] > 0}


def likelihood(lm: generate.LM, *, split: str, limit: int | None, sources: tuple[str, ...],
               batch: int = 16) -> dict:
    """Nats per token and accuracy of every range of the line, per source; whole records, packed."""
    positive('evals.likelihood', batch=batch, sources=len(sources))
    totals = _totals(lm.config, lm.stage)
    metrics = {}
    for source in sources:
        found = _likelihood(lm.config, lm.params, lm.vocab, source, split=split,
                            limit=limit, batch=batch, totals=totals)
        metrics |= {f'{source}/{name}': x for name, x in found.items()}
    return dict(metrics=metrics, items=len(sources), note='teacher-forced; nats per scored token')


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
            found = _likelihood(config, params, vocab, source, split='test', limit=64,
                                batch=batch, totals=totals)
            out |= {f'{source}/{k}': x for k, x in found.items() if k.startswith('loss/')}
        lm = generate.LM(config, stage, vocab, graph, params, step, '')
        for name, t in tasks.items():
            start = time.perf_counter()
            found = t(lm, split='test', limit=t.keywords['probed'])['metrics']
            out |= {f'{name}/{k}': x for k, x in found.items() if math.isfinite(x)}
            out[f'{name}/seconds'] = time.perf_counter() - start
        return out
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


def asr(lm: generate.LM, *, split: str, limit: int | None, source: str) -> dict:
    """Word error rate of writing down held-out speech (jiwer), greedy."""
    records = list(data.examples(lm.config, split, source, vocab=lm.vocab, limit=limit))
    given, asked = generate.markers(lm.config, source)
    units = [flat.speech_tokens(r.units[0], lm.vocab) for r in records]
    heard = generate.transcribe(lm, units, given, asked)
    return dict(metrics=error_rates([_said(r) for r in records], heard), items=len(records),
                note='greedy; words pooled over sentences')


def tts(lm: generate.LM, *, split: str, limit: int | None, source: str, listener: str = 'asr'
        ) -> dict:
    """Round trip: text to units to the model's own transcript, as a word error rate.

    The floor is the same transcripts against other sentences. Generation is greedy.
    """
    records = list(data.examples(lm.config, split, source, vocab=lm.vocab, limit=limit))
    said = [_said(r) for r in records]
    spoken = generate.read_aloud(lm, said, *generate.markers(lm.config, source))
    heard = generate.transcribe(lm, spoken, *generate.markers(lm.config, listener))
    others = said[1:] + said[:1]
    return dict(metrics={'round-trip WER %': error_rates(said, heard)['WER %'],
                         'wrong-sentence WER %': error_rates(others, heard)['WER %']},
                items=len(records), note='greedy synthesis, transcribed by the same model')


# Answers by a template.

def exchanges(lm: generate.LM, *, split: str, limit: int | None, source: str,
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
    asked, kinds = _questions(lm.config, os.path.join(lm.config.data.path, questions))
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
    for part in generate.in_parts(list(zip(prompts, steps, strict=True))):
        told = generate.follow(lm.speaker(), *map(list, zip(*part, strict=True)), v,
                               most_tokens=bounds)
        for out in told:
            ids = [t for name, ids in out.items() if 'text mine' in name for t in ids]
            heard.append(text.decode([t - start for t in ids if start <= t < start + size]))

    def right(question, answer):
        named = [w for w in answer.split() if w in kinds[question['kind']]]
        return bool(named) and named[-1] == question['want']
    others = [next((found[(i + k) % len(found)] for k in range(1, len(found))
                    if found[(i + k) % len(found)]['kind'] == q['kind']), q)
              for i, q in enumerate(found)]
    return dict(metrics={
        'correct %': 100 * float(np.mean([right(q, a) for q, a in zip(found, heard, strict=True)])),
        'chance %': 100 * float(np.mean([right(q, a) for q, a in zip(others, heard, strict=True)]))
    }, items=len(found), note='greedy; the written answer, one question at a time')


# Answers written and spoken side by side.

def replies(lm: generate.LM, *, split: str, limit: int | None, source: str,
            most_columns: int = 128) -> dict:
    """Questions as `source` draws them: are they answered in the right words, and units?

    WER: of the written answer against the true one. UER: the same of what is spoken, its codes of
    the first codebook with repeats merged. The floors score the answers against those to other
    questions.
    """
    positive('evals.replies', most_columns=most_columns)
    records = reply.examples(lm, source, split=split, limit=limit)
    grids, layout = reply.drawn(lm, source, records)
    text, v = lm.text(), lm.vocab
    found = reply.replies(lm, grids, layout, most_columns=most_columns)
    said, wanted, heard, true = [], [], [], []
    for grid, (ids, codes) in zip(grids, found, strict=True):
        n = int(np.flatnonzero(grid.weights.any(0))[0])
        said.append(text.decode(ids))
        wanted.append(text.decode(reply.written(v, grid.tokens[:, n:])))
        heard.append(' '.join(map(str, flat.runs(codes[0])[0])))
        # A CTC target is written in order and not in time, and has no repeats.
        whole = (reply.collapse(grid.tokens[1:, n:].T.reshape(-1), NOTHING) - v.rows[1].start
                 if lm.config.head.name == 'ctc' else
                 flat.runs(reply.spoken(lm.config, layout, v, grid.tokens[:, n:])[0])[0])
        true.append(' '.join(str(x) for x in whole if 0 <= x < lm.config.codec['size']))
    metrics = {}
    for kind, a, b in (('', wanted, said), ('UER', true, heard)):
        kept = [i for i, x in enumerate(a) if x]
        if kept:
            rates = error_rates([a[i] for i in kept], [b[i] for i in kept])
            other = error_rates([a[i] for i in kept], [b[i] for i in kept[1:] + kept[:1]])
            if kind:
                metrics |= {'UER %': rates['WER %'], 'UER %/floor': other['WER %']}
            else:
                metrics |= rates | {'WER %/floor': other['WER %']}
    return dict(metrics=metrics, items=len(records), note='greedy; floors: another one\'s answer')


# Continuations across modalities.

def _split_story(record, unit_hz: float):
    """(words of the first turn, its units, words of the second, its units) of a two-turn record."""
    (_, _, end, _), (_, start, _, _) = record.turns[:2]
    cut_s = (end + start) / 2
    cut = round(cut_s * unit_hz)
    units = record.units[0]
    first = [w for w in record.words if w.start_s < cut_s]
    second = [w for w in record.words if w.start_s >= cut_s]
    return first, units[:cut], second, units[cut:]


def sequence_score(logp_KT, weights_KT, norm: str) -> float:
    """How likely a sequence is: sum of weight x log-probability, or that per scored column.

    weights: 0 where nothing is scored; codebooks may weigh differently (arXiv 2410.00037 §5.4).
    """
    if norm not in ('mean', 'sum'):
        raise ConfigError(f"norm is 'mean' or 'sum', got {norm!r}")
    total = float(np.sum(np.where(weights_KT > 0, logp_KT, 0.0) * weights_KT))
    return total / max(1, int((weights_KT > 0).any(0).sum())) if norm == 'mean' else total


def preferred(good, bad) -> float:
    """The share of pairs whose first member scores higher; a tie counts half."""
    good, bad = np.asarray(good), np.asarray(bad)
    return float(np.mean(np.where(good == bad, 0.5, good > bad)))


def stories(lm: generate.LM, *, split: str, limit: int | None, source: str = 'aligned',
            norm: str = 'mean', scope: str = 'continuation', alone: bool = False) -> dict:
    """Does the model know how a story goes on, across modalities? (arXiv 2402.05755 §4.1)

    The first sentence is the prompt, written (T) or spoken (S), and the second is scored in either.
    nats/A->B: mean nats per token of the true continuation. right/A->B: how often it is likelier
    per token than the second sentence of another story told by the same voice.

    norm: 'mean' per token or 'sum', which moves these figures by more than ten points. scope: what
    is scored, the 'continuation' or 'full', all but BOS. alone: only ids of the continuation's
    modality share the probability.
    """
    records = [r for r in data.examples(lm.config, split, source, vocab=lm.vocab, limit=limit)
               if len(r.turns) == 2]
    if not records:
        raise ConfigError(f'stories: split {split} of {source} has no record of two sentences')
    parts = [_split_story(r, lm.config.codec.frame_hz) for r in records]
    v = lm.vocab

    def wrong_of(i):
        """The next story in the same voice whose second sentence is another one."""
        said = records[i].turns[1].text
        order = [(i + k) % len(records) for k in range(1, len(records))]
        fits = [j for j in order if records[j].turns[1].text != said]
        same = [j for j in fits if records[j].style[:1] and
                records[j].style[0].split()[0] == records[i].style[0].split()[0]]
        return (same or fits or [i])[0]

    def tokens(kind, words, units):
        return flat.text_tokens(words, v) if kind == 'T' else flat.speech_tokens(units, v)

    marker = {'T': '[Text]', 'S': '[Speech]'}
    metrics = {}
    for a in 'TS':
        for b in 'TS':
            rows, legal = [], generate.allowed_ids(v, 'text' if b == 'T' else 'speech')
            for i, (w1, u1, w2, u2) in enumerate(parts):
                j = wrong_of(i)
                for words, units in ((w2, u2), (parts[j][2], parts[j][3])):
                    # A continuation in the same modality goes on without a new marker.
                    middle = [marker[b]] if a != b else []
                    prompt = generate.prompt(v, marker[a], tokens(a, w1, u1), *middle)
                    rows.append((prompt, tokens(b, words, units)))
            scores = pair_scores(lm, rows, norm=norm, scope=scope, legal=legal if alone else None)
            metrics[f'nats/{a}->{b}'] = -float(np.mean(scores[0::2]))
            metrics[f'right %/{a}->{b}'] = 100 * preferred(scores[0::2], scores[1::2])
    return dict(metrics=metrics, items=len(records),
                note=f'{norm} nats ({scope}) of the second sentence given the first; T text, '
                     'S speech')


def pair_scores(lm: generate.LM, rows, *, norm: str, scope: str, legal=None, batch: int = 32
                ) -> np.ndarray:
    """`sequence_score` of each (prompt, continuation): ids of one row.

    scope: 'continuation', or 'full', everything but the first id. legal: bool [V], the ids that the
    probability is shared among; a token outside them is not scored.
    """
    if scope not in ('continuation', 'full'):
        raise ConfigError(f"scope is 'continuation' or 'full', got {scope!r}")
    columns = -(-max(len(p) + len(c) for p, c in rows) // 64) * 64

    @jax.jit
    def logp_of(params, arrays):
        lm_ = nnx.merge(lm.graph, params)
        if legal is None:
            return lm_(arrays, jax.random.key(0))[0]
        logits = jnp.where(legal, lm_.scores(arrays)[0][:, :-1], -jnp.inf)
        chosen = jnp.maximum(arrays['tokens'][:, 0, 1:], 0)[..., None]
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)
        return jnp.pad(found[..., 0], ((0, 0), (1, 0)))[:, None]
    out = []
    for part in generate.in_parts(rows, batch):
        tokens = np.full((batch, 1, columns), NOTHING, np.int32)
        weights = np.zeros((batch, 1, columns), np.float32)
        for i, (prompt, continuation) in enumerate(part):
            n, m = len(prompt), len(continuation)
            tokens[i, 0, :n + m] = np.concatenate([prompt, continuation])
            weights[i, 0, n if scope == 'continuation' else 1:n + m] = 1
        if legal is not None:
            weights *= legal[np.maximum(tokens, 0)]
        arrays = dict(tokens=tokens, weights=weights, segment=(tokens[:, 0] >= 0).astype(np.int32),
                      position=np.tile(np.arange(columns, dtype=np.int32), (batch, 1)))
        logp = np.asarray(logp_of(lm.params, arrays))
        out += [sequence_score(x, w, norm) for x, w in zip(logp, weights, strict=True)][:len(part)]
    return np.array(out)


def gold_pairs(path: str) -> dict[str, list[tuple[str, str]]]:
    """{item: [(right file, wrong file) in each voice]} of a ZeroSpeech 2021 gold.csv.

    Its columns id, voice, filename and correct are read; a pair is what one voice says of one item.
    Raises ConfigError for another file and for a pair that is none.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    try:
        with open(path, newline='', encoding='utf-8') as f:
            for row in csv.DictReader(f):
                one = found.setdefault((row['id'], row['voice']), {})
                if row['correct'] not in ('0', '1') or row['correct'] in one:
                    raise ValueError(f'item {row["id"]} of voice {row["voice"]} is no pair of '
                                     'correct 1 and 0')
                one[row['correct']] = row['filename']
        lone = [key for key, one in found.items() if len(one) != 2]
        if lone or not found:
            raise ValueError(f'item {lone[0][0]} of voice {lone[0][1]} has no pair' if lone else
                             'it lists nothing')
    except (OSError, KeyError, ValueError, csv.Error) as e:
        said = f'it has no column {e}' if isinstance(e, KeyError) else e
        raise ConfigError(f'{path} lists no pairs: {said}') from None
    out: dict[str, list[tuple[str, str]]] = {}
    for (item, _), one in found.items():
        out.setdefault(item, []).append((one['1'], one['0']))
    return out


def pairs(lm: generate.LM, *, split: str, limit: int | None, path: str, source: str,
          norm: str = 'mean', alone: bool = False) -> dict:
    """Which of two recordings is likelier: words and non-words, grammatical and not (ZeroSpeech).

    path: a directory with gold.csv and the wav files that it names. Each file is written as
    `source` is drawn, and all of the row but BOS is scored. right: per item the mean over voices,
    then over items, ties counting half. norm and alone: see `stories`. `split` means nothing here.
    """
    del split
    codec = bind(lm.config.codec, 'jaxsd.codec', 'codec')()
    gold = gold_pairs(os.path.join(path, 'gold.csv'))
    items = dict(list(gold.items())[:limit])
    rows = []
    for files in items.values():
        for name in (name for pair in files for name in pair):
            file = os.path.join(path, name if name.endswith('.wav') else f'{name}.wav')
            wav = speak.read_wav(file, codec.identity['sample_rate_hz'])
            ids = data.drawn(lm.config, source, lm.vocab, Record(
                name, 'pair', '', wav.shape[-1] / codec.identity['sample_rate_hz'],
                units=(codec.encode(wav.mean(0))[0],))).tokens[0]
            rows.append((ids[:1], ids[1:]))
    legal = generate.allowed_ids(lm.vocab, 'speech') if alone else None
    scores = pair_scores(lm, rows, norm=norm, scope='full', legal=legal)
    by_item, at = [], 0
    for files in items.values():
        mine = scores[at:at + 2 * len(files)]
        by_item.append(preferred(mine[0::2], mine[1::2]))
        at += 2 * len(files)
    return dict(metrics={'right %': 100 * float(np.mean(by_item))}, items=len(items),
                note=f'{norm} over the whole row; voices averaged first, ties count half')


# Conversation.

def _questions(config, path: str) -> tuple[dict, dict]:
    """(question text -> {want, kind}, kind -> words) of a corpus whose questions have answers."""
    try:
        with open(path, encoding='utf-8') as f:
            stored = json.load(f)
        return ({q['text']: q for part in stored['questions'].values() for q in part},
                {k: set(words) for k, words in stored['kinds'].items()})
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f'{path} does not list questions with answers: {e}') from None


class Answer(NamedTuple):
    """How one question was answered. latency: frames from its end to the first word, or None."""

    good: bool
    waited: bool
    latency: int | None


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
                  math.floor(answer[0][0] - end) + 1 if answer else None)


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


def answers(lm: generate.LM, *, split: str, limit: int | None, source: str, batch: int = 16,
            questions: str = 'grammar.json') -> dict:
    """The user's side of held-out dialogues is played; are their questions answered, and when?

    correct: among the words written between a question's end and the next question, the last that
    is of the asked kind is the right one. waited: no word begins while the question is being asked.
    latency: frames from the question's end to the answer's first word. The model hears the user
    frame by frame and everything it says itself is its own; decoding is greedy, in text and in
    sound, so that the measure repeats.
    """
    positive('evals.answers', batch=batch)
    config, v = lm.config, lm.vocab
    asked, kinds = _questions(config, os.path.join(config.data.path, questions))
    records = list(data.examples(config, split, source, vocab=v, limit=limit))
    hz = config.codec.frame_hz
    late = generate.layout_delays(config, v)
    speaker = lm.speaker()
    text = lm.text()
    records.sort(key=lambda r: r.codes.shape[-1])       # so that few columns are padding
    found = []
    for part in generate.in_parts(records, batch):
        plans = [generate.conversation_plan(v, r.codes[1], late) for r in part]
        plans += plans[:1] * (batch - len(part))
        filled = generate.converse(speaker, plans)
        for r, columns in zip(part, filled, strict=False):
            said = generate.words_at(v, text, duplex.undelay(columns, late)[0])
            found += score_dialogue(said, r.turns, asked, kinds, hz)
    if not found:
        raise ConfigError(f'answers: split {split} of {source} asks no question of {questions}')
    metrics, latency = summary(found)
    return dict(metrics=metrics, items=len(found), histogram=dict(
        name=f'latency in frames of {1000 / hz:.0f} ms', values=[float(x) for x in latency]),
        note='the model hears the user frame by frame; everything it says is its own')


# Running tasks.

def run(config, workdir: str, *, stage_name=None, tasks=(), split='test', limit=None) -> list[dict]:
    """Runs the named tasks (default: all of config.evals) and writes evaluation.json."""
    every = plain(config.evals)
    for task in tasks:
        if task not in every:
            raise unknown('--tasks', task, every)
    rundir.same_run(workdir, config)
    chosen = {name: _task(config, name) for name in tasks or sorted(every)}
    if not chosen:
        raise ConfigError('config.evals names no task')
    recorded(workdir)       # a file that cannot be added to is said before the work
    lm = generate.load(config, workdir, stage_name)
    entries = []
    for name, task in chosen.items():
        log.info('evaluating %s on split %s', name, split)
        found = task(lm, split=split, limit=limit)
        entries.append(dict(task=name, split=split, stage=lm.stage.name, step=lm.step, limit=limit,
                            **found))
        _table(entries[-1])
    record(workdir, entries)
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

# SPDX-License-Identifier: Apache-2.0
"""Tasks that ask: is the answer the right one, in words, in units, in sound, in time?

See `evaluate` for what a task is.
"""

import json
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxsd import data, frames, generate, reply, trained
from jaxsd.config import ConfigError, plain
from jaxsd.layout import duplex, flat, framed, template
from jaxsd.likelier import shares
from jaxsd.recognition import error_rates, errors_per_item
from jaxsd.types import positive

# Answers by a template.

def exchanges(lm: trained.LM, *, split: str, limit: int | None, source: str,
            questions: str = 'grammar.json') -> dict:
    """Every question of held-out dialogues alone, answered by the source's template, greedily.

    The model fills the template's own phases, so a chain of modality writes down the question,
    answers in text and speaks. correct: the last written word of the asked kind is the right one.
    chance: the same answers against the other questions' wants, of the same kind where there are.
    """
    asked, kinds = questions_of(os.path.join(lm.config.data.path, questions))

    def ending(exchange):
        said = ' '.join(w.text for w in exchange['theirs'].words)
        ends = max((q for q in asked if said.endswith(q)), key=len, default=None)
        return None if ends is None else asked[ends]
    told = _answered(lm, 'exchanges', split=split, limit=limit, source=source, of=ending)
    if not told:
        raise ConfigError(f'exchanges: split {split} of {source} asks no question of {questions}')
    found, heard = map(list, zip(*told, strict=True))

    def right(question, answer):
        named = [w for w in answer.split() if w in kinds[question['kind']]]
        return bool(named) and named[-1] == question['want']
    good, luck = ([100.0 * right(q, a) for q, a in zip(questions, heard, strict=True)]
                  for questions in (found, others(found)))
    return dict(metrics={'correct %': float(np.mean(good)), 'chance %': float(np.mean(luck))},
                items=len(found), judged=('correct %', 'chance %'),
                per_item={'correct %': shares(good)},
                note='greedy; the written answer, one question at a time')


def translations(lm: trained.LM, *, split: str, limit: int | None, source: str) -> dict:
    """How near do written answers come to the true ones? BLEU and chrF by sacrebleu.

    Every exchange of `source` is answered by its template, greedily; a translation stands where an
    answer does, and the text that is scored is that of its last written step (arXiv 2306.12925
    Table 2). floor: the answers against those to the exchange after each.
    """
    import sacrebleu

    def meant(exchange):
        return ' '.join(w.text for w in exchange['mine'].words) or None
    told = _answered(lm, 'translations', split=split, limit=limit, source=source, of=meant)
    if not told:
        raise ConfigError(f'translations: split {split} of {source} has no answers in words')
    true, said = map(list, zip(*told, strict=True))
    metrics = {}
    for end, answers in (('', said), ('/floor', said[1:] + said[:1])):
        metrics[f'BLEU{end}'] = sacrebleu.corpus_bleu(answers, [true]).score
        metrics[f'chrF{end}'] = sacrebleu.corpus_chrf(answers, [true]).score
    each = [sacrebleu.sentence_chrf(a, [b]).score for a, b in zip(said, true, strict=True)]
    return dict(metrics=metrics, items=len(told), judged=('chrF', 'chrF/floor'),
                per_item={'chrF': shares(each)}, note='greedy; the written answer')


def _answered(lm: trained.LM, task: str, *, split: str, limit: int | None, source: str, of: Callable
              ) -> list[tuple]:
    """(of(exchange), the text of its last written answer) of every exchange of which `of` makes
    anything. ConfigError for a source that is not drawn by exchanges."""
    options = plain(lm.config.data.sources[source]).get('layout') or plain(lm.config.layout)
    if options['name'] != 'template.chain' or options.get('over', 'record') == 'record':
        raise ConfigError(f'{task}: data.sources.{source} must be drawn by template.chain over '
                          'exchanges')
    options = {k: v for k, v in options.items() if k not in ('name', 'score')}
    text, v, found, prompts, steps = lm.text(), lm.vocab, [], [], []
    mine = options.get('mine', 0)
    options['mine'] = 0 if mine == 'random' else mine
    rng = np.random.default_rng(0)
    for record in data.examples(lm.config, split, source, vocab=v, limit=limit):
        for exchange in template.exchanges(record, options['mine']):
            wanted = of(exchange)
            if wanted is not None:
                made = template.pieces(template.only(record, exchange), vocab=v, rng=rng, **options)
                prompt, phases = generate.phases(made, v)
                found.append(wanted)
                prompts.append(prompt)
                steps.append(phases)
    start, size = v.ranges['text']
    heard, bounds = [], dict(text=48, speech=400, any=448)
    for part in trained.in_parts(list(zip(prompts, steps, strict=True))):
        told = generate.follow(lm.speaker(), *map(list, zip(*part, strict=True)), v,
                               most_tokens=bounds)
        for out in told:
            ids = [t for name, ids in out.items() if 'text mine' in name for t in ids]
            heard.append(text.decode([t - start for t in ids if start <= t < start + size]))
    return list(zip(found, heard, strict=True))


def others(asked: list[dict]) -> list[dict]:
    """For each question the next one of its kind, or itself where there is none."""
    return [next((q for q in asked[i + 1:] + asked[:i] if q['kind'] == mine['kind']), mine)
            for i, mine in enumerate(asked)]


# Answers written and spoken side by side.

def replies(lm: trained.LM, *, split: str, limit: int | None, source: str,
            most_columns: int = 128, listener: str | None = None,
            temperature: float = 0.0) -> dict:
    """Questions as `source` draws them: are they answered in the right words, and units?

    WER: of the written answer against the true one. UER: the same of what is spoken, its codes of
    the first codebook with repeats merged. spoken WER, with a `listener` (a source whose grids hear
    one voice and write down what it says): what the model itself hears in its answer, against what
    it wrote beside it, or was asked to read. The floors score the answers against those to other
    questions. temperature: of the rows of speech, whose text is greedy: rows said at once, each at
    its likeliest, fall silent together.
    """
    positive('evals.replies', most_columns=most_columns)
    if not 0 <= temperature < float('inf'):
        raise ConfigError(f'evals.replies: temperature is 0 (greedy) or above, got {temperature}')
    records = reply.examples(lm, source, split=split, limit=limit)
    grids, layout = reply.drawn(lm, source, records)
    text, v = lm.text(), lm.vocab
    found = reply.replies(lm, grids, layout, most_columns=most_columns,
                          voice=generate.Sampler(temperature))
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
    how = f'speech drawn at temperature {temperature}' if temperature else 'greedy'
    return dict(metrics=metrics, items=len(records), judged=(judged, f'{judged}/floor'),
                per_item=per_item, note=f'{how}; floors: another one\'s answer')


# Sound that is no tokens.

def sounds(lm: trained.LM, *, split: str, limit: int | None, source: str,
           most_columns: int = 256) -> dict:
    """Frames that follow the true text of what `source` draws, against those that should.

    distance: mean absolute difference of log-mel numbers along the best alignment. Its floor is
    that of the same frames to another record's, and mean is that of a sound that never changes,
    the mean of all frames, which a regression that learned nothing says. length: how long they
    last, in percent of the true ones.
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
    return dict(metrics=metrics, items=len(records), judged=('distance', 'distance/floor'),
                note='each frame read back before the next; floors: another record\'s')


def written(lm: trained.LM, *, split: str, limit: int | None, source: str,
            most_columns: int = 64) -> dict:
    """What is heard before the frames of `source`, written down: WER of the first words of the text
    against as many that were heard, greedily. Its floor is that of another record's words."""
    positive('evals.written', most_columns=most_columns)
    config, v, text, heard, found = lm.config, lm.vocab, lm.text(), [], []
    records = list(data.examples(config, split, source, vocab=v, limit=limit))
    grids = [data.drawn(config, source, v, r) for r in records]
    if not all('slot' in g.extra for g in grids):
        raise ConfigError(f'written: nothing is heard in data.sources.{source}; give its layout a '
                          'prompt_s')
    for part in trained.in_parts(list(zip(records, grids, strict=True)), 16):
        asked = [reply.asked(g) for _, g in part]
        asked += [asked[-1]] * (16 - len(part))
        said = reply.answer(lm.speaker(), [p for p, _ in asked], stop=reply.ended(v),
                            heard=[h for _, h in asked], most_columns=most_columns)
        for (record, _), columns in zip(part, said, strict=False):
            count = framed.cut(record.words, _prompt_s(config, source))[0]
            heard.append(' '.join(w.text for w in record.words[:count]))
            found.append(' '.join(text.decode(reply.written(v, columns)).split()[:count]))
    metrics = {'WER %': error_rates(heard, found)['WER %'],
               'WER %/floor': error_rates(heard[1:] + heard[:1], found)['WER %']}
    return dict(metrics=metrics, items=len(records), judged=('WER %', 'WER %/floor'),
                per_item={'WER %': errors_per_item(heard, found)['WER %']},
                note='greedy; as many words as were heard; floor: another record\'s')


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

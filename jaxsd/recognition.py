# SPDX-License-Identifier: Apache-2.0
"""Tasks of recognition and synthesis: is what is heard written down, is what is written heard?

See `evaluate` for what a task is.
"""

import math

import jax
import numpy as np

from jaxsd import data, generate, trained
from jaxsd.config import ConfigError
from jaxsd.layout import duplex, flat
from jaxsd.likelier import shares
from jaxsd.types import NOTHING, positive


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

# SPDX-License-Identifier: Apache-2.0
"""Which of two answers belongs to which of two questions: an evaluation that any layout can take.

Layouts write an exchange into grids of different shapes, and their likelihoods cannot be compared.
What can be is a choice. Two questions of one kind with different answers are drawn as they were
asked and with their answers exchanged; the model is right where the true pair is likelier, all
scored cells together. Length, voice and wording of an answer count equally on both sides.
"""

import copy
import dataclasses

import jax
import numpy as np
from flax import nnx

from jaxsd import answering, data, likelier, model, trained
from jaxsd.config import ConfigError, bind, plain
from jaxsd.layout import template
from jaxsd.types import NOTHING, Grid, Record, Turn, positive


def exchange_of(asking: Record, asked: dict, answering: Record, answer: dict, unit_hz: float
                ) -> Record:
    """A dialogue of one question, as `asking` has it, and one answer, as `answering` has it.

    The answer begins when the answer to that question began. Channel 0 answers, as it does in the
    records; both channels are kept, in units.
    """
    q, a = asked['theirs'], answer['mine']
    begins_s = max(q.end_s, asked['mine'].start_s) - q.start_s

    def frames(record, start_s, end_s):
        first, stop = (int(np.round(x * unit_hz, 4)) for x in (start_s, end_s))
        return [u[first:stop] for u in record.units]
    units = tuple(map(np.concatenate, zip(
        frames(asking, q.start_s, q.start_s + begins_s),
        frames(answering, a.start_s, a.end_s), strict=True)))
    words = [w._replace(start_s=w.start_s - by, end_s=w.end_s - by) for stretch, by in (
        (q, q.start_s), (a, a.start_s - begins_s)) for w in stretch.words]
    turns = tuple(Turn(s.channel, start_s, start_s + s.end_s - s.start_s, ' '.join(
        w.text for w in s.words)) for s, start_s in ((q, 0.0), (a, begins_s)))
    return Record(asking.id, asking.source, asking.language, len(units[0]) / unit_hz,
                  units=units, words=tuple(words), turns=turns, style=asking.style,
                  fields=asking.fields)


def matched(found: list[tuple]) -> list[tuple]:
    """Pairs of (what, kind, want) that agree in kind and differ in want, each used once."""
    out, waiting = [], {}
    for one in found:
        queue = waiting.setdefault(one[1], [])
        other = next((x for x in queue if x[2] != one[2]), None)
        if other is None:
            queue.append(one)
        else:
            queue.remove(other)
            out.append((other, one))
    return out


def log_likelihoods(lm: trained.LM, grids: list[Grid], batch: int) -> np.ndarray:
    """float64 [N]: of all cells of each grid that are scored, each counted once."""
    whole = copy.deepcopy(lm.config)
    if 'fraction' in whole.head:
        whole.head.fraction = 1.0
    graph = model.abstract(whole, lm.stage.lora)[0]
    columns = -(-max(g.tokens.shape[1] for g in grids) // 64) * 64
    logp_of = jax.jit(lambda params, arrays: nnx.merge(graph, params)(arrays, jax.random.key(0))[0])
    out = []
    for part in trained.in_parts(grids, batch):
        tokens = np.full((batch, len(lm.vocab.rows), columns), NOTHING, np.int32)
        weights = np.zeros(tokens.shape, np.float32)
        segment = np.zeros((batch, columns), np.int32)
        for i, grid in enumerate(part):
            n = grid.tokens.shape[1]
            tokens[i, :, :n], weights[i, :, :n], segment[i, :n] = grid.tokens, grid.weights > 0, 1
        logp = np.asarray(logp_of(lm.params, dict(
            tokens=tokens, weights=weights, segment=segment,
            position=np.tile(np.arange(columns, dtype=np.int32), (batch, 1)))), np.float64)
        out += np.where(weights > 0, logp, 0.0).sum((1, 2)).tolist()[:len(part)]
    return np.array(out)


def first_sound(true: Grid, other: Grid, vocab, ends: float | None) -> float:
    """Columns from a question's end to where two answers to it first sound different.

    ends: the share of the columns that the question takes, where columns are a clock; None: it ends
    where the first cell is scored.
    """
    sound = min(start for name, (start, _) in vocab.ranges.items()
                if name not in ('text', 'markers'))
    n = min(true.tokens.shape[1], other.tokens.shape[1])
    a, b = true.tokens[:, :n], other.tokens[:, :n]
    at = np.flatnonzero(((a != b) & (np.maximum(a, b) >= sound)).any(0))
    end = (np.flatnonzero(true.weights.any(0))[0] if ends is None
           else ends * true.tokens.shape[1])
    return float((at[0] if at.size else n) - end)


def pairings(lm: trained.LM, *, split: str, limit: int | None, source: str, clock: bool = False,
             batch: int = 16, questions: str = 'grammar.json') -> dict:
    """Are the right answers to two questions likelier than each other's? Chance is 50.

    columns to sound: how many the model must say after a question before its answer can be heard
    (`first_sound`), which the layout alone decides. clock: columns are times, as in a duplex model.
    """
    positive('evals.pairings', batch=batch)
    options = plain(lm.config.data.sources[source]).get('layout') or plain(lm.config.layout)
    options |= {'mine': 0} if 'mine' in options else {}
    draw = bind(options, 'jaxsd.layout', f'data.sources.{source}.layout', given=('vocab', 'rng'))
    path, hz = f'{lm.config.data.path}/{questions}', lm.config.codec.frame_hz
    asked, _ = answering.questions_of(path)
    found = []
    for record in data.examples(lm.config, split, source, vocab=lm.vocab, limit=limit):
        if not lm.vocab.tokenizer:      # a model of speech alone: its layout reads no words
            record = dataclasses.replace(record, words=tuple(
                w._replace(ids=(0,)) for w in record.words))
        for exchange in template.exchanges(record, 0):
            said = ' '.join(w.text for w in exchange['theirs'].words)
            ends = max((q for q in asked if said.endswith(q)), key=len, default=None)
            if ends is not None and len(record.units) == 2:
                found.append(((record, exchange), asked[ends]['kind'], asked[ends]['want']))
                break
    couples = matched(found)
    if not couples:
        raise ConfigError(f'pairings: split {split} of {source} has no two questions of one kind '
                          f'of {path} with different answers')
    grids, late = [], []
    for i, couple in enumerate(couples):
        made = [exchange_of(*q[0], *a[0], hz) for q in couple for a in couple]
        drawn = [draw(r, vocab=lm.vocab, rng=np.random.default_rng(i)) for r in made]
        late.append(first_sound(drawn[0], drawn[1], lm.vocab,
                                made[0].turns[0].end_s / made[0].duration_s if clock else None))
        grids += drawn
    if any(grid.extra for grid in grids):
        raise ConfigError(f'pairings: data.sources.{source} draws features, which are not kept')
    aa, ab, ba, bb = log_likelihoods(lm, grids, batch).reshape(-1, 4).T
    right = 100 * np.where(aa + bb == ab + ba, 0.5, aa + bb > ab + ba)
    each = {'right %': right, 'columns to sound': np.array(late)}
    return dict(metrics={k: float(x.mean()) for k, x in each.items()}, items=len(couples),
                per_item={k: likelier.shares(x) for k, x in each.items()},
                note='two questions and their answers; chance is 50 %')


pairings.metrics = ('right %', 'columns to sound')

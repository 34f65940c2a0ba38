# SPDX-License-Identifier: Apache-2.0
"""Samples written by a template: typed parts in order, each with its weight.

An instruction, a recognition pair, a dialogue whose answer is first written down and then spoken:
each is a list of parts that name what stands there (somebody's speech, somebody's words, a written
field, a marker) and how much it is learned. Masks come from the parts and never from searching ids,
and whoever generates walks the same list (`pieces`).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxsd.layout.flat import (
    Piece,
    assemble,
    check_line,
    mark,
    merged,
    named,
    spoken_by,
    text_tokens,
    tracks,
)
from jaxsd.layout.spans import coin
from jaxsd.types import Grid, Record, Turn, Word
from jaxsd.vocab import Vocab

KINDS = ('mark', 'field', 'label', 'text', 'speech', 'blocks')
SPEAKERS = ('mine', 'theirs')
OVER = ('record', 'exchange', 'dialogue')


class Stretch(NamedTuple):
    """What one speaker says at a stretch: one or more turns that the other does not interrupt."""

    channel: int
    start_s: float
    end_s: float
    words: tuple[Word, ...]


def stretches(record: Record) -> list[Stretch]:
    """The turns of a record as speakers take the floor, in order.

    A turn that lies inside one of the other speaker (a backchannel) is left out; turns of one
    speaker with nothing between them are one. Words belong to the turn that their middle lies in.
    In a text-only record turns have no times and alternate: its words are theirs, mine, theirs ...
    """
    turns = record.turns
    if not record.units and record.codes is None:
        words, out = list(spoken_by(record, 0)), []
        for i, turn in enumerate(turns):
            count = len(turn.text.split())
            out.append(Stretch((1, 0)[i % 2], 0.0, 0.0, tuple(words[:count])))
            words = words[count:]
        return out
    inside = [any(a.channel != t.channel and a.start_s <= t.start_s and t.end_s <= a.end_s
                  for a in turns) for t in turns]
    out = []
    for turn in sorted((t for t, hid in zip(turns, inside, strict=True) if not hid),
                       key=lambda t: t.start_s):
        words = tuple(w for w in spoken_by(record, turn.channel)
                      if w.channel == turn.channel
                      and turn.start_s <= (w.start_s + w.end_s) / 2 <= turn.end_s)
        if out and out[-1].channel == turn.channel:
            out[-1] = Stretch(turn.channel, out[-1].start_s, turn.end_s, out[-1].words + words)
        else:
            out.append(Stretch(turn.channel, turn.start_s, turn.end_s, words))
    return out


def exchanges(record: Record, mine: int) -> list[dict[str, Stretch]]:
    """Every stretch of theirs with mine that follows it. Raises ValueError where there is none."""
    said = stretches(record)
    out = [dict(theirs=a, mine=b) for a, b in zip(said[:-1], said[1:], strict=True)
           if a.channel != mine and b.channel == mine]
    if not out:
        raise ValueError('nobody answers anybody in it')
    return out


def only(record: Record, exchange: dict[str, Stretch]) -> Record:
    """`record` as if nothing but `exchange` were said in it."""
    turns = tuple(Turn(s.channel, s.start_s, s.end_s, ' '.join(w.text for w in s.words))
                  for s in (exchange['theirs'], exchange['mine']))
    if not record.units and record.codes is None:
        words = exchange['theirs'].words + exchange['mine'].words
        return dataclasses.replace(record, words=words, turns=turns)
    return dataclasses.replace(record, turns=turns)


def blocks(text: np.ndarray, speech: np.ndarray, ratio: tuple[int, int]
           ) -> list[tuple[str, np.ndarray]]:
    """`text` and `speech` in turn, ratio[0] and ratio[1] tokens at a time, until both are told.

    ::

        t t t a a a a a a | t t t a a a a a a | t a a a a a a | a a a    (3, 6): text runs out first

    Blocks count positions and are not aligned in time (arXiv 2412.02612 §3).
    """
    out = []
    while len(text) or len(speech):
        for kind, rest, size in (('text', text, ratio[0]), ('speech', speech, ratio[1])):
            if len(rest):
                out.append((kind, rest[:size]))
        text, speech = text[ratio[0]:], speech[ratio[1]:]
    return out


def _options(parts, over: str, mine, ratio):
    for name, listed in parts.items():
        for part in listed:
            if len(part) not in (2, 3) or part[0] not in KINDS or (
                    part[0] not in ('mark', 'field') and part[1].split()[0] not in SPEAKERS):
                raise ValueError(
                    f'layout.{name}: {tuple(part)} is no part: a part is (kind, what) or (kind, '
                    f'what, weight) with a kind among {", ".join(KINDS)}, of mine or theirs')
    if over not in OVER:
        raise ValueError(f'layout.over must be one of {", ".join(OVER)}, got {over!r}')
    if mine not in (0, 1, 'random'):
        raise ValueError(f'layout.mine must be 0, 1 or random, got {mine!r}')
    if len(ratio) != 2 or min(ratio) < 1:
        raise ValueError(f'layout.ratio is (text, speech) tokens of a block, got {tuple(ratio)}')


def pieces(record: Record, *, vocab: Vocab, rng: np.random.Generator, parts: Sequence[tuple],
           opening: Sequence[tuple] = (), over: str = 'record', mine: int | str = 0,
           score: Sequence[str] = KINDS, ratio: tuple[int, int] = (13, 26), dedup: bool = True,
           unit_hz: float = 25.0, sides: Sequence = (), end: str = 'none') -> list[Piece]:
    """The pieces of `chain`, in order, before they become a grid: for it and for generation."""
    del end
    _options(dict(opening=opening, parts=parts), over, mine, ratio)
    if mine == 'random':
        mine = int(rng.integers(2))
    if over == 'record':
        turns = [{}]
    else:
        turns = exchanges(record, mine)
        if over == 'exchange':
            turns = [turns[rng.integers(len(turns))]]
    channel = {'mine': mine, 'theirs': 1 - mine}

    def field(key: str) -> np.ndarray:
        if not record.fields.get(key):
            raise ValueError(f'it has no field {key!r}: give it in the data or in the fields of '
                             'its source')
        chosen = record.fields[key][rng.integers(len(record.fields[key]))]
        if not chosen.ids:
            raise ValueError(f'the field {key!r} has no ids; tokenize fields before drawing')
        return vocab.encode('text', chosen.ids)

    def text(who: str, turn) -> np.ndarray:
        return text_tokens(turn[who].words if turn else spoken_by(record, channel[who]), vocab)

    def speech(who: str, turn) -> np.ndarray:
        within = (turn[who].start_s, turn[who].end_s) if turn else None
        return merged(tracks(record, channel[who], vocab, dedup=dedup, unit_hz=unit_hz,
                             sides=sides, within=within))

    def told(part, turn):
        kind, what, weight = (*part, 1.0)[:3]
        if kind == 'mark':
            yield mark(vocab, what, weight)
        elif kind == 'field':
            yield Piece(kind, what, field(what), weight)
        elif kind == 'label':
            who, key = what.split()
            yield Piece(kind, what, field(f'{key} {channel[who]}'), weight)
        elif kind == 'blocks':
            for now, ids in blocks(text(what, turn), speech(what, turn), ratio):
                yield Piece(now, what, ids, weight)
        else:
            yield Piece(kind, what, (text if kind == 'text' else speech)(what, turn), weight)

    out = [p for part in opening for p in told(part, {})]
    out += [p for turn in turns for part in parts for p in told(part, turn)]
    for piece in out:
        if not len(piece.tokens):
            raise ValueError(f'its {piece.kind} ({piece.name}) is empty')
    return [p if p.kind in score else p._replace(weight=0.0) for p in out]


def chain(record: Record, *, vocab: Vocab, rng: np.random.Generator, parts: Sequence[tuple],
          opening: Sequence[tuple] = (), over: str = 'record', mine: int | str = 0,
          score: Sequence[str] = KINDS, ratio: tuple[int, int] = (13, 26), dedup: bool = True,
          unit_hz: float = 25.0, sides: Sequence = (), end: str = 'none') -> Grid:
    """Parts one after another, each (kind, what) or (kind, what, weight); the weight is 1 unsaid.

    ::

        ('mark', '<eoh>')         a marker of the vocabulary
        ('field', 'task')         a written field of the record or its source; of several phrases
                                  one is drawn
        ('label', 'mine tone')    a label of somebody's style
        ('text', 'theirs')        what somebody says, in words
        ('speech', 'mine', 0)     what somebody says, in units; 0: context, not learned
        ('blocks', 'mine')        both in turn, in blocks of `ratio` tokens (`blocks`)

    `over` says what the parts tell. 'record': all that each speaker says. 'exchange': a stretch of
    theirs and mine that answers it, drawn among those of a dialogue. 'dialogue': all exchanges in
    order, the parts once for each, behind one `opening`. `mine` is the channel that answers, or
    'random'. `score` names the kinds of parts that carry loss at all, so that one template can be
    learned first for its text and then for its speech.

    `end='eos'` closes the sample with EOS, weighted like the last part.
    """
    check_line(vocab, end)
    try:
        made = pieces(record, vocab=vocab, rng=rng, parts=parts, opening=opening, over=over,
                      mine=mine, score=score, ratio=ratio, dedup=dedup, unit_hz=unit_hz,
                      sides=sides)
    except ValueError as e:
        raise named(record, e) from None
    return assemble(made, vocab, end)


def turns(record: Record, *, vocab: Vocab, rng: np.random.Generator,
          speakers: Sequence[str] = ('[S0]', '[S1]'), share: float = 0.5, spread: float = 0.0,
          dedup: bool = True, unit_hz: float = 25.0, end: str = 'none') -> Grid:
    """A dialogue turn by turn behind its speakers' markers, each sentence written or spoken.

    ::

        <s> [S1] u7 u4 u9 [S0] well then [S0's next sentence] u3 u8 [S1] ...

    Every turn of the record is a sentence of its own: spoken with a probability that is drawn once
    for a sample around `share` (a normal of deviation `spread`, cut to 0..1), else written. A
    marker stands where the speaker changes. Everything is learned (arXiv 2409.15594 §4).
    """
    check_line(vocab, end)
    if len(speakers) != 2:
        raise ValueError(f'layout.speakers names the markers of two channels, got {speakers}')
    made, last = [], None
    try:
        drawn = coin(len(record.turns), rng, share=share, spread=spread)
        for turn, (kind, _, _) in zip(record.turns, drawn, strict=True):
            words = [w for w in spoken_by(record, turn.channel) if w.channel == turn.channel
                     and turn.start_s <= (w.start_s + w.end_s) / 2 <= turn.end_s]
            if turn.channel != last:
                made.append(mark(vocab, speakers[turn.channel]))
                last = turn.channel
            said = text_tokens(words, vocab) if kind == 'text' else merged(tracks(
                record, turn.channel, vocab, dedup=dedup, unit_hz=unit_hz, sides=(),
                within=(turn.start_s, turn.end_s)))
            made.append(Piece(kind, '', said, 1.0))
        if not made:
            raise ValueError('it has no turns')
    except ValueError as e:
        raise named(record, e) from None
    return assemble(made, vocab, end)

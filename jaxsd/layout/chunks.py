# SPDX-License-Identifier: Apache-2.0
"""Two speakers in one row, chunk of time by chunk of time.

A plain language model follows a conversation when both speakers' tokens of a few frames stand side
by side, then those of the next frames. Two ways to write a chunk are here: with a marker before
each speaker and repeats left out, so that chunks have a clock but no fixed width (`synchronous`),
and with a fixed number of tokens per stream (`flattened`).
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from jaxsd.layout.flat import Piece, assemble, check_line, mark, named, units_of
from jaxsd.layout.template import SPEAKERS, stretches
from jaxsd.types import Grid, Record
from jaxsd.vocab import Vocab


def _mine(mine: int | str, rng: np.random.Generator) -> int:
    if mine not in (0, 1, 'random'):
        raise ValueError(f'layout.mine must be 0, 1 or random, got {mine!r}')
    return int(rng.integers(2)) if mine == 'random' else mine


def _both(record: Record, mine: int) -> tuple[np.ndarray, np.ndarray]:
    if len(record.units) != 2:
        raise ValueError(f'it has {len(record.units)} channels of units, a dialogue has two')
    a, b = units_of(record, mine), units_of(record, 1 - mine)
    frames = min(len(a), len(b))
    return a[:frames], b[:frames]


def _positive(**options: int):
    for name, value in options.items():
        if value < 1:
            raise ValueError(f'layout.{name} must be at least 1, got {value}')


# Chunks on a clock, without repeats.

def fresh(units: np.ndarray, chunk_frames: int, before: int = -1) -> list[np.ndarray]:
    """What is new in every chunk of `units` [U]: what differs from the unit before it, which is
    `before` for the first."""
    new = units != np.concatenate([[before], units[:-1]])
    return [units[at:at + chunk_frames][new[at:at + chunk_frames]]
            for at in range(0, len(units), chunk_frames)]


def synchronous(record: Record, *, vocab: Vocab, rng: np.random.Generator, chunk_frames: int = 4,
                speakers: Sequence[str] = ('[S0]', '[S1]'), mine: int | str = 0,
                overlaps: bool = True, unit_hz: float = 25.0) -> Grid:
    """Both speakers' new units of every `chunk_frames` frames, each behind its speaker's marker.

    ::

        raw, 4 frames   S0: 75 75 75 75 | 17 17 338 338 | 338 338 338 338
                        S1: 89 89 89 89 | 89 89  89  89 |   9   9   9   9
        row             [S0] 75 [S1] 89 | [S0] 17 338   | [S0] [S1] 9

    A unit is new when it differs from the one before it, also across the border of two chunks. The
    first marker (mine) always stands, for it is the clock; the other only before something new.
    Everything is learned, both speakers (arXiv 2409.15594 §3). What is left at the end is a
    shorter chunk. `mine` is the channel that speaks first in a chunk, or 'random'. overlaps: False
    cuts out the frames in which the turns of both go on, so that one speaks at a time.
    """
    check_line(vocab, 'none')
    _positive(chunk_frames=chunk_frames)
    try:
        mine = _mine(mine, rng)
        pair, made = _both(record, mine), []
        if not overlaps:
            speak = np.zeros((2, len(pair[0])), bool)
            for turn in record.turns:
                first, stop = (int(round(x * unit_hz)) for x in (turn.start_s, turn.end_s))
                speak[turn.channel, first:stop] = True
            pair = [units[~speak.all(0)] for units in pair]
        for chunk in zip(*(fresh(units, chunk_frames) for units in pair), strict=True):
            for i, new in enumerate(chunk):
                if not i or len(new):
                    made.append(mark(vocab, speakers[i]))
                    made.append(Piece('speech', speakers[i], vocab.encode('units', new), 1.0))
    except ValueError as e:
        raise named(record, e) from None
    return assemble(made, vocab)


def filled(new: Sequence[int], last: int, chunk_frames: int) -> np.ndarray:
    """Units [chunk_frames] of a chunk in which `new` ones were said, `last` the one before it.

    m new units share a chunk's frames, the earlier ones taking what does not divide; without a new
    one the last goes on. How a remainder is shared is not stated by the source (arXiv 2409.15594).
    """
    each = np.array_split(np.arange(chunk_frames), max(1, len(new)))
    return np.concatenate([np.full(len(part), unit, np.int32)
                           for part, unit in zip(each, new if len(new) else [last], strict=True)])


def interpolate(tokens: np.ndarray, vocab: Vocab, *, chunk_frames: int,
                speakers: Sequence[str] = ('[S0]', '[S1]')) -> np.ndarray:
    """Units [2, frames] of a row of `synchronous` [T]: every chunk `filled` to its length again,
    -1 before there is any unit."""
    clock, other = (vocab.specials[name] for name in speakers)
    start, size = vocab.ranges['units']
    chunks: list[list[list[int]]] = []
    who = 0
    for token in np.asarray(tokens).tolist():
        if token == clock:
            chunks.append([[], []])
            who = 0
        elif token == other:
            who = 1
        elif chunks and start <= token < start + size:
            chunks[-1][who].append(token - start)
    out = np.full((2, len(chunks) * chunk_frames), -1, np.int32)
    for c, chunk in enumerate(chunks):
        for who, new in enumerate(chunk):
            at = c * chunk_frames
            out[who, at:at + chunk_frames] = filled(new, out[who, at - 1] if c else -1,
                                                    chunk_frames)
    return out


# Chunks of fixed width.

def _text_of_chunks(record: Record, mine: int, chunk_frames: int, unit_hz: float
                    ) -> dict[int, list]:
    """The ids of my words by the chunk in which their turn begins."""
    out: dict[int, list] = {}
    for stretch in stretches(record):
        if stretch.channel == mine:
            chunk = int(round(stretch.start_s * unit_hz, 4) // chunk_frames)
            out.setdefault(chunk, []).extend(i for word in stretch.words for i in word.ids)
    return out


def flattened(record: Record, *, vocab: Vocab, rng: np.random.Generator,
              streams: Sequence[str] = ('theirs', 'text', 'mine'), chunk_frames: int = 10,
              chunk_text: int = 2, silences: Sequence[str] = ('[Silent text]', '[Silent speech]'),
              mine: int | str = 0, unit_hz: float = 25.0) -> Grid:
    """Every chunk holds a fixed number of tokens of each stream, one stream after the other.

    ::

        u u u u u u u u u u | t t | a a a a a a a a a a || u u ... | t t | a a ...

    `streams` names them in order: 'theirs' (heard, never learned), 'text' (what I say, in words,
    `chunk_text` tokens a chunk) and 'mine' (`chunk_frames` units). Leaving 'text' out is the last
    step of the paper. My words go in from the chunk in which I begin to speak and spill over into
    later chunks; when they are used up, and before I speak, the first of `silences` stands there,
    and the second where I say nothing (arXiv 2410.17799 §3). Nothing is deduplicated: a position
    in the row is a time. The last chunks are filled with silence until everything is told.
    """
    check_line(vocab, 'none')
    _positive(chunk_frames=chunk_frames, chunk_text=chunk_text)
    if not streams or not set(streams) <= {*SPEAKERS, 'text'}:
        raise ValueError(f'layout.streams names streams among theirs, text, mine; got '
                         f'{tuple(streams)}')
    try:
        me = _mine(mine, rng)
        quiet_text, quiet = (int(mark(vocab, name).tokens[0]) for name in silences)
        own, other = (vocab.encode('units', units) for units in _both(record, me))
        talking = np.zeros(len(own), bool)
        for s in stretches(record):
            if s.channel == me:
                talking[round(s.start_s * unit_hz):round(s.end_s * unit_hz)] = True
        own = np.where(talking, own, quiet)
        said = _text_of_chunks(record, me, chunk_frames, unit_hz) if 'text' in streams else {}
        waiting: deque[int] = deque()
        made, c = [], 0
        while c * chunk_frames < len(own) or waiting or any(k >= c for k in said):
            waiting.extend(vocab.encode('text', said.pop(c, [])).tolist())
            for name in streams:
                if name == 'text':
                    ids = [waiting.popleft() if waiting else quiet_text
                           for _ in range(chunk_text)]
                else:
                    units = own if name == 'mine' else other
                    ids = units[c * chunk_frames:(c + 1) * chunk_frames].tolist()
                    ids += [quiet] * (chunk_frames - len(ids))
                made.append(Piece(name, '', np.array(ids, np.int32), float(name != 'theirs')))
            c += 1
    except ValueError as e:
        raise named(record, e) from None
    return assemble(made, vocab)

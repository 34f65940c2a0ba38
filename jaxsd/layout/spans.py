# SPDX-License-Identifier: Apache-2.0
"""Where an utterance may change between text and speech, and how often it does.

Two choices that papers tend to mix. *Atoms* are the finest pieces that are either written or
spoken: phones, words, segments of some seconds, whole utterances. A *law* cuts a number of atoms
into spans and says which are spoken; it is a function (count, rng, *, options) that returns
(kind, first atom, the atom after the last) in order, and every atom is in one span.
"""

import math
from collections.abc import Sequence

import numpy as np

from jaxsd.types import Record, Word

LEVELS = ('phone', 'word', 'segment', 'utterance')
Span = tuple[str, int, int]


# Laws.

def uniform(count: int, rng: np.random.Generator, *, text: tuple[int, int] = (10, 30),
            speech: tuple[int, int] = (5, 15)) -> list[Span]:
    """Text and speech in turn, each span of uniform length, both ends included; either may begin.

    Equal ends, as in text=(13, 13), are a fixed ratio.
    """
    lengths = {'text': text, 'speech': speech}
    kind = ('text', 'speech')[rng.integers(2)]
    first, out = 0, []
    while first < count:
        stop = min(count, first + int(rng.integers(*lengths[kind], endpoint=True)))
        out.append((kind, first, stop))
        first, kind = stop, 'speech' if kind == 'text' else 'text'
    return out


def poisson(count: int, rng: np.random.Generator, *, mean: float = 10.0, share: float = 0.3
            ) -> list[Span]:
    """Spoken spans of Poisson(mean) atoms thrown into text until `share` of all are spoken.

    A span is cut at the end and thrown again where it would overlap another; none begins right
    behind another (arXiv 2504.02398; slamkit interleaving_tokeniser.py).
    """
    _probability('share', share)
    spoken, may_begin = np.zeros(count, bool), np.ones(count, bool)
    for _ in range(100 + 20 * count):       # what is left may be too crowded to hold any span
        starts = np.flatnonzero(may_begin)
        if spoken.sum() >= math.ceil(share * count) or not starts.size:
            break
        first = int(starts[rng.integers(starts.size)])
        stop = min(count, first + int(rng.poisson(mean)))
        if stop > first and not spoken[first:stop].any():
            spoken[first:stop] = True
            may_begin[first:stop + 1] = False
    return _stretches(spoken)


def coin(count: int, rng: np.random.Generator, *, share: float = 0.5, spread: float = 0.0
         ) -> list[Span]:
    """Every atom a span of its own, spoken with probability `share`.

    spread: `share` is drawn once, from a normal of this deviation cut to 0..1, so that some samples
    are nearly all text and some nearly all speech.
    """
    _probability('share', share)
    share = truncated(rng, share, spread, 0.0, 1.0)
    spoken = rng.random(count) < share
    return [(('text', 'speech')[int(s)], i, i + 1) for i, s in enumerate(spoken)]


def _stretches(spoken: np.ndarray) -> list[Span]:
    edges = np.flatnonzero(spoken[1:] != spoken[:-1]) + 1
    starts = [0, *edges.tolist()]
    return [(('text', 'speech')[int(spoken[a])], a, b)
            for a, b in zip(starts, [*starts[1:], len(spoken)], strict=True)]


def _probability(name: str, value: float):
    if not 0 <= value <= 1:
        raise ValueError(f'layout.spans.{name} is a probability, got {value}')


def truncated(rng: np.random.Generator, mean: float, deviation: float, least: float, most: float
              ) -> float:
    """A normal draw, thrown again until it lies within `least`..`most`; `mean` without spread."""
    while deviation > 0:
        value = rng.normal(mean, deviation)
        if least <= value <= most:
            return float(value)
    return mean


# Atoms.

def borders(words: Sequence[Word], unit_hz: float) -> np.ndarray:
    """[words + 1] frames: word w lies between borders w and w + 1, and nothing lies outside.

    Between two words the border is the middle of their silence; borders never run back.
    """
    middles = [(a.end_s + b.start_s) / 2 for a, b in zip(words[:-1], words[1:], strict=True)]
    # Rounding: times are stored in single precision, and 0.24 s must not become frame 5.9999.
    inner = np.maximum.accumulate(np.round(np.array(middles, np.float64) * unit_hz, 4))
    return np.concatenate([[-np.inf], inner, [np.inf]])


def atoms(record: Record, words: Sequence[Word], channel: int, level: str,
          rng: np.random.Generator, *, frames: int, unit_hz: float, segment_s: float
          ) -> tuple[tuple[Word, ...], np.ndarray]:
    """What is cut at `level`: the words (or phones), and the first of each atom [atoms + 1]."""
    if level == 'word':
        return tuple(words), np.arange(len(words) + 1)
    if level == 'phone':
        phones = tuple(p for p in record.phones
                       if len(record.units) <= 1 or p.channel == channel)
        if not phones:
            raise ValueError('it has no phones; layout.level may be word')
        return phones, np.arange(len(phones) + 1)
    if level == 'utterance':
        begun = [t.start_s for t in record.turns if len(record.units) <= 1 or t.channel == channel]
        middle = [(w.start_s + w.end_s) / 2 for w in words]
        firsts = np.searchsorted(middle, begun[1:])
        return tuple(words), _firsts(firsts, len(words))
    if level == 'segment':
        return tuple(words), _firsts(segments(borders(words, unit_hz)[1:-1], frames, rng,
                                              segment_s * unit_hz), len(words))
    raise ValueError(f'layout.level must be one of {", ".join(LEVELS)}, got {level!r}')


def _firsts(inner, words: int) -> np.ndarray:
    return np.unique([0, *(i for i in inner if 0 < i < words), words])


def segments(inner: np.ndarray, frames: int, rng: np.random.Generator, segment_frames: float
             ) -> list[int]:
    """The words at which new segments begin, of floor(frames / segment_frames) + 1 wished for.

    Each border is drawn around its even share (a normal whose deviation is half a segment, cut at
    a whole one) and moves to the nearest border of two words; where two meet, they are one
    (arXiv 2402.05706; usdm stage2.py).
    """
    count = int(frames // segment_frames) + 1
    width = frames / count
    out = []
    for i in range(1, count if len(inner) else 1):
        wished = truncated(rng, i * width, width / 2, (i - 1) * width, (i + 1) * width)
        out.append(1 + int(np.argmin(np.abs(inner - wished))))
    return sorted(set(out))

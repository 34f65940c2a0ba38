# SPDX-License-Identifier: Apache-2.0
"""Sound itself beside tokens: columns that carry frames of a spectrogram, or latents of a codec.

Sound that is spoken frame by frame has the mark `frame` as its token, so that where it begins and
ends is predicted as words are, and what it sounds like by regression. Sound that is told by units
first has those as tokens, and beside each what it stands for and what it was.
"""

import numpy as np

from jaxsd.layout.flat import check_line, named, spoken_by, text_tokens, units_of
from jaxsd.layout.template import stretches
from jaxsd.types import NOTHING, Grid, Record, Word
from jaxsd.vocab import Vocab


def cut(words: tuple[Word, ...], prompt_s: float) -> tuple[int, float]:
    """Where an utterance is split: (words before, seconds), in the silence nearest to `prompt_s`.

    At least a word stays on either side; with prompt_s 0 everything comes after.
    """
    if not prompt_s:
        return 0, 0.0
    if len(words) < 2:
        raise ValueError('it has no two words to split between')
    middles = [(a.end_s + b.start_s) / 2 for a, b in zip(words[:-1], words[1:], strict=True)]
    i = int(np.argmin(np.abs(np.array(middles) - prompt_s)))
    return i + 1, middles[i]


def columns(frames: np.ndarray, each: int) -> np.ndarray:
    """Frames [S, M] as columns [S // each, each x M]; what fills no whole column is left out."""
    whole = len(frames) // each
    return np.asarray(frames[:whole * each], np.float32).reshape(whole, each * frames.shape[1])


def beside(before: int, values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """`values` [n, F] in `width` columns from column `before` on, zeros elsewhere, and a 1 for
    each column that holds some."""
    dense = np.zeros((width, values.shape[1]), np.float32)
    dense[before:before + len(values)] = values
    there = np.zeros(width, np.int32)
    there[before:before + len(values)] = 1
    return dense, there


def continued(record: Record, *, vocab: Vocab, rng: np.random.Generator, prompt_s: float = 3.0,
              stack_frames: int = 1, frames_per_column: int = 1, weight_frame: float = 1.0,
              withheld: float = 0.0) -> Grid:
    """What is heard first is written down, then how it goes on, and that is spoken in frames.

    ::

        text    .  .  .  BOS  it   was  late  EOS  frame  frame  frame  END
        feats   h0 h1 h2
        frames                                      x0     x1     x2
                         | said by h | goes on     | and is spoken

    An utterance is split in the silence nearest to `prompt_s`: its features up to there are heard,
    its whole text is written, and the frames after the split are spoken (arXiv 2305.15255 §3.1; the
    learned END is ours). With prompt_s 0 nothing is heard, and the text alone is read aloud.

    stack_frames and frames_per_column: how many frames of features stand in a column that is heard
    and in one that is spoken. weight_frame: of a column of sound, beside 1 of a token. withheld:
    the share of columns, drawn anew each time, whose frames are said but not read back, so that the
    next ones must follow from the text and not only from the last (ours; the dropout of a prenet,
    arXiv 1712.05884 §2.2, serves the same end).
    """
    if not 0 <= withheld < 1:
        raise ValueError(f'layout.withheld is a share below 1, got {withheld}')
    for mark in ('frame', 'end'):
        if mark not in vocab.specials or len(vocab.rows) > 1:
            raise ValueError(f'layout framed.continued needs one row, with {mark} in '
                             'vocab.text_marks')
    try:
        if not record.feats:
            raise ValueError('it has no sound: its dataset must keep the audio')
        words, feats = spoken_by(record, 0), record.feats[0]
        _, at_s = cut(words, prompt_s)
        first = round(at_s * len(feats) / record.duration_s)
        heard = columns(feats[:first], stack_frames)
        said = columns(feats[first:], frames_per_column)
        text = text_tokens(words, vocab)
        if not len(said) or not len(text) or prompt_s and not len(heard):
            raise ValueError('there is nothing to hear, to write or to speak in it')
    except ValueError as e:
        raise named(record, e) from None
    s = vocab.specials
    tokens = [*[NOTHING] * len(heard), s['bos'], *text, s['eos'], *[s['frame']] * len(said),
              s['end']]
    weights = np.ones(len(tokens), np.float32)
    weights[:len(heard) + 1] = 0.0
    weights[-1 - len(said):-1] = weight_frame
    grid = Grid.of(tokens, weights)
    spoken = len(tokens) - 1 - len(said)
    for names, before, values in ((('feats', 'slot'), 0, heard),
                                  (('frames', 'framed'), spoken, said)):
        if len(values):
            grid.extra.update(zip(names, beside(before, values, len(tokens)), strict=True))
    if withheld:
        grid.extra['framed'][spoken:-1] += rng.random(len(said)) < withheld
    return grid


def refined(record: Record, *, vocab: Vocab, rng: np.random.Generator, unit_hz: float = 12.5,
            given: tuple[float, float] = (0.0, 0.5)) -> Grid:
    """Units, each once a frame, and beside them the latents that a flow is to make of them.

    ::

        tokens  BOS  u3   u3   u90   u41  u7
        means        v3   v3   v90   v41  v7      what the first codebook stands for
        frames       p0   p1   x2    x3   x4      what all codebooks stand for
        weight   0   0    0    1     1    1       p is given: the voice to go on in

    Of a record one stretch of one speaker is drawn, and the share of it that is given, uniform
    between the two numbers of `given` (arXiv 2401.13527 §3.3; the share is not stated there).
    """
    check_line(vocab, 'none')
    if not 0 <= given[0] <= given[1] < 1:
        raise ValueError(f'layout.given are two shares, the lesser first, got {tuple(given)}')
    try:
        if not record.latents:
            raise ValueError('it has no latents: its codec must have several codebooks, and the '
                             'head must ask for them')
        said = stretches(record)
        turn = said[rng.integers(len(said))] if len(record.latents) > 1 else None
        channel = turn.channel if turn else 0
        part = slice(*(round(x * unit_hz) for x in (turn.start_s, turn.end_s))) if turn else (
            slice(None))
        units = vocab.encode('units', units_of(record, channel)[part])
        latents = record.latents[channel][part]
        if not len(units):
            raise ValueError('there is nothing said in it')
    except ValueError as e:
        raise named(record, e) from None
    weights = np.ones(1 + len(units), np.float32)
    weights[1:1 + int(rng.uniform(*given) * len(units))] = 0.0
    grid = Grid.of(np.concatenate([[vocab.specials['bos']], units]), weights)
    for k, name in enumerate(('means', 'frames')):
        grid.extra[name], grid.extra['framed'] = beside(1, latents[:, k], 1 + len(units))
    return grid

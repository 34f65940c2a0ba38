# SPDX-License-Identifier: Apache-2.0
"""What flows through the program: a Record from disk, a Grid from a layout, a Batch on the device.

A *record* is one aligned utterance or dialogue, exactly as it was stored. A *layout* draws it as a
*grid*: rows are streams, columns are time as the model experiences it. A *batch* is packed grids
with a leading axis. Host types are numpy; nothing here imports jax.

The alphabet of shape suffixes, one for the whole project::

    B batch   T column (time)   K stream (row)   S source frame   U unit   C cached column   L layer
    D model width   F feed-forward   N query head   G kv head   H head width   E expert
    V vocabulary   M mel / feature   R rank   P depth step (one predicted row inside a column)
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

NOTHING = -1
"""The token of a cell that holds nothing: it embeds to exact zeros and is never scored."""


class Word(NamedTuple):
    """A word, or a phone, with the finest reliable alignment. `ids` are filled in by `data`."""

    text: str
    channel: int
    start_s: float
    end_s: float
    ids: tuple[int, ...] = ()


class Turn(NamedTuple):
    """One stretch of one speaker: a sentence, an answer, a backchannel."""

    channel: int
    start_s: float
    end_s: float
    text: str


class Phrase(NamedTuple):
    """Something written: a task's name, an instruction, a label. `data` fills in the ids."""

    text: str
    ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Record:
    """One aligned utterance (one channel) or dialogue (two channels), as stored.

    codes: int16 [C, K, T], K codebooks at the codec's frame rate, or None for text-only records.
    units: one int16 [U] per channel at the unit rate, not deduplicated.
    words, phones, turns: sorted by start; a text-only record has words whose times are all 0.
    style: labels of each channel, such as 'tone=low pace=fast'.
    wav: FLAC bytes of all channels, or b''.
    sides: slower streams beside the units (pitch, style), by name one int16 array per channel.
    fields: what is written beside what is said (an instruction, a task), by name; of several
    phrases under one name a layout draws one.
    feats: float32 [S, M] per channel, or what slices like it; filled in by `data` for an encoder.
    latents: float32 [T, 2, W] per channel, or what slices like it: what the codes of the first
    codebook stand for, and those of all; filled in by `data` for a head that tells one from the
    other.
    """

    id: str
    source: str
    language: str
    duration_s: float
    codes: np.ndarray | None = None
    units: tuple[np.ndarray, ...] = ()
    words: tuple[Word, ...] = ()
    phones: tuple[Word, ...] = ()
    turns: tuple[Turn, ...] = ()
    style: tuple[str, ...] = ()
    wav: bytes = b''
    sides: dict[str, tuple[np.ndarray, ...]] = dataclasses.field(default_factory=dict)
    fields: dict[str, tuple[Phrase, ...]] = dataclasses.field(default_factory=dict)
    feats: tuple = ()
    latents: tuple = ()


@dataclasses.dataclass(frozen=True)
class Grid:
    """One example drawn in time: the only thing a layout returns.

    tokens:   int32 [K, T], ids on the vocabulary's line; NOTHING where a stream is silent.
    weights:  float32 [K, T], how much predicting this cell matters; 0 is context only.
    position: int32 [T], rotary position.    segment: int32 [T], 1 everywhere a layout draws.
    extra:    arrays for encoders (`feats`, `slot`) and of sound that is no tokens (`frames`,
              `framed`, `means`), by column; see `data.extras`.

    Column 0 is never scored: nothing comes before it.
    """

    tokens: np.ndarray
    weights: np.ndarray
    position: np.ndarray
    segment: np.ndarray
    extra: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of(tokens, weights) -> 'Grid':
        """A grid of one segment from `tokens` and `weights` [K, T] (or [T] for one row)."""
        tokens = np.atleast_2d(np.asarray(tokens, np.int32))
        weights = np.atleast_2d(np.asarray(weights, np.float32)).copy()
        if tokens.shape != weights.shape:
            raise ValueError(f'tokens {tokens.shape} and weights {weights.shape} must agree')
        weights[:, :1] = 0.0
        weights[tokens == NOTHING] = 0.0
        columns = tokens.shape[1]
        return Grid(tokens, weights, np.arange(columns, dtype=np.int32),
                    np.ones(columns, np.int32))


Batch = dict[str, Any]
"""tokens int32 and weights float32 [B, K, T]; position and segment int32 [B, T]."""

Params = dict[str, Any]
"""A plain nested dict of arrays."""


class Row(NamedTuple):
    """One row of the grid as the model sees it: where its ids lie on the vocabulary's line.

    Ids `start .. start + size - 1` may stand in the row; the first `predicted` of them may be
    emitted (0: the row is heard, never spoken). The id after the predictable ones, where there is
    one, is the initial token that fills the row before its first real token.
    """

    name: str
    start: int
    size: int
    predicted: int


class Sizes(NamedTuple):
    """What every slot must know to build itself: the rows, the line's length, the model width."""

    rows: tuple[Row, ...]
    vocab: int
    width: int


class Where(NamedTuple):
    """Positions and segments [B, T]; the attention mask is derived from them, never by hand."""

    position: Any
    segment: Any


def positive(where: str, **counts: int) -> None:
    """Raises ValueError naming `where.name` for a count that is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f'{where}.{name} must be at least 1, got {count}')


def check(x, letters: str, **sizes: int):
    """Returns `x` after checking its rank against `letters` and the sizes that are given by letter.

    Raises ValueError naming the shape that came and the one that was expected.
    """
    good = x.ndim == len(letters) and all(
        sizes.get(letter, n) == n for letter, n in zip(letters, x.shape, strict=True))
    if not good:
        want = ', '.join(f'{c}={sizes[c]}' if c in sizes else c for c in letters)
        raise ValueError(f'expected an array [{want}], got shape {tuple(x.shape)}')
    return x

# SPDX-License-Identifier: Apache-2.0
"""Both speakers on one clock: one row per stream, one column per codec frame.

The top row holds what the model says in words, placed at the frames where the words begin. Below
come the codes of its own voice, then those of the other speaker. Acoustic codebooks run a column
or more late, so that a column's semantic token is chosen before its fine detail. Column 0 holds
every row's initial token: the model predicts column t from the columns before it.
"""

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from jaxsd.layout.flat import spoken_by
from jaxsd.types import NOTHING, Grid, Record, Word
from jaxsd.vocab import Vocab, initial

SPEAKERS = ('mine', 'theirs')
TEXT_RULES = ('paper', 'queue', 'shift')


def delays(vocab: Vocab, *, acoustic_delay_columns: int, text_delay_columns: int
           ) -> tuple[int, ...]:
    """How many columns late each row of `vocab` runs; the earliest row runs at 0.

    A positive text delay puts text behind the audio (recognition by delay alone); a negative one
    puts all audio behind the text (synthesis by delay alone, arXiv 2410.00037 §5.7).
    """
    if acoustic_delay_columns < 0:
        raise ValueError('layout.acoustic_delay_columns must be 0 or more, got '
                         f'{acoustic_delay_columns}')
    late = [text_delay_columns if row.name == 'text' else
            0 if row.name.endswith(' 0') else acoustic_delay_columns for row in vocab.rows]
    return tuple(d - min(0, text_delay_columns) for d in late)


def delay(tokens: np.ndarray, vocab: Vocab, late: Sequence[int]) -> np.ndarray:
    """Aligned frames [..., K, T] as the model experiences them: [..., K, T + 1].

    Column 0 and the first `late[k]` columns after it hold row k's initial token; the last `late[k]`
    tokens of the row fall off the end (arXiv 2410.00037 §3.4)::

        in0 | 0    1    2    3
         *  | s0   s1   s2   s3      late 0
         *  | *    a0   a1   a2      late 1; a3 falls off
    """
    return _shift(tokens, late, [initial(row) for row in vocab.rows]).astype(np.int32)


def _shift(cells: np.ndarray, late: Sequence[int], fills) -> np.ndarray:
    """Each row of `cells` [..., K, T] behind 1 + late[k] of its fill, cut to [..., K, T + 1]."""
    columns = cells.shape[-1]
    out = np.empty((*cells.shape[:-1], columns + 1), cells.dtype)
    for k, (fill, d) in enumerate(zip(fills, late, strict=True)):
        kept = max(0, columns - d)
        out[..., k, :columns + 1 - kept] = fill
        out[..., k, columns + 1 - kept:] = cells[..., k, :kept]
    return out


def undelay(tokens: np.ndarray, late: Sequence[int]) -> np.ndarray:
    """The inverse of `delay`: columns [..., K, T + 1] to aligned frames [..., K, T].

    Column 0 goes; what fell off the end of a row comes back as NOTHING. The first T - max(late)
    frames are complete.
    """
    out = np.full((*tokens.shape[:-1], tokens.shape[-1] - 1), NOTHING, np.int32)
    for k, d in enumerate(late):
        kept = max(0, out.shape[-1] - d)
        out[..., k, :kept] = tokens[..., k, 1 + d:1 + d + kept]
    return out


def place_words(words: Sequence[Word], columns: int, *, frame_hz: float, pad: int, epad: int,
                rule: str) -> np.ndarray:
    """The text row [columns] in local ids: each word's pieces from the frame where it begins.

    Everything else is `pad`, but for `epad` in the frame before a word, which splits "I am about to
    say a word" from "which word". The rules differ where words crowd::

        paper   arXiv 2410.00037 §3.4.4. A word in the first frame gives that frame to `epad` and
                begins one later. The paper says words seldom overlap and not what then; here the
                later one waits for the earlier one's last piece.
        queue   kyutai's fine-tuning code: a new word replaces what is left of the one before it,
                whose remaining pieces are lost. No `epad` for a word in the first frame.
        shift   the same with its keep_and_shift: a new word waits, nothing is lost.

    `queue` and `shift` drop words of no duration, as that code does. Under every rule what does not
    fit before the end is lost, and `epad` is written over `pad` only.
    """
    if rule not in TEXT_RULES:
        raise ValueError(f'layout.text_rule must be one of {", ".join(TEXT_RULES)}, got {rule!r}')
    out = np.full(columns, pad, np.int32)
    words = sorted(words, key=lambda word: word.start_s)
    if rule != 'paper':
        words = [word for word in words if word.start_s < word.end_s]
    # Rounding: times are stored in single precision, and 0.24 s must not become frame 2.9999.
    frames = [max(0, math.floor(round(word.start_s * frame_hz, 4))) for word in words]
    if rule == 'paper' and frames and frames[0] == 0:
        frames = [max(1, frame) for frame in frames]
    waiting, arriving = deque(), 0
    for t in range(columns):
        while arriving < len(words) and frames[arriving] <= t:
            if rule == 'queue':
                waiting.clear()
            waiting.extend(words[arriving].ids)
            arriving += 1
        if waiting:
            if t and out[t - 1] == pad:
                out[t - 1] = epad
            out[t] = waiting.popleft()
    return out


def columns(record: Record, *, vocab: Vocab, rng: np.random.Generator, frame_hz: float = 12.5,
            acoustic_delay_columns: int = 1, text_delay_columns: int = 0, text_rule: str = 'paper',
            mine: int | str = 0, theirs: int | str = 'other', text: str = 'mine',
            text_shift_s: float = 0.0, drop_text: float = 0.0, mask_theirs: float = 0.0,
            weight_text: float = 1.0, weight_pad: float = 0.5, weight_epad: float = 1.0,
            weight_semantic: float = 100.0, weight_acoustic: float = 1.0,
            weight_theirs: float = 0.0) -> Grid:
    """One column per codec frame: words, then my codes, then theirs (arXiv 2410.00037 §3.4).

    ::

        text      *  |  _    EP   hel  lo        words where they begin (`place_words`)
        mine 0    *  |  s0   s1   s2   s3        semantic
        mine 1    *  |  *    a0   a1   a2        acoustic, a column late
        theirs 0  *  |  s0   s1   s2   s3        heard
        theirs 1  *  |  *    a0   a1   a2

    `mine` and `theirs` choose the channel that fills each speaker's rows: a number, 'none', for
    `mine` also 'random' (drawn at every call), for `theirs` also 'other' (the one that is not mine,
    if there is one). A speaker without a channel has NOTHING after the initial tokens. A
    vocabulary with one speaker simply has no rows for the other. `text` says whose words fill the
    text row: 'mine', 'theirs' (with a text delay: streaming recognition) or 'none'; at every call
    they are moved by one draw from -text_shift_s .. text_shift_s; `drop_text` is the probability of
    losing them, and `mask_theirs` that of each heard cell to become NOTHING, so
    that a model learns what is said and not the recordings it was said in. A record without any
    words has no transcript: the text row is NOTHING, not silence.

    Text cells weigh `weight_text`, `weight_pad` or `weight_epad`; codebook 0 `weight_semantic`, the
    others `weight_acoustic`, both times `weight_theirs` for the other speaker. These are the alphas
    of §4.4; the objective normalizes per group. Rows that the vocabulary never predicts weigh 0.

    A text-only record is BOS and its pieces, dense, with NOTHING in every audio row from column 0
    on: the backbone then sees exactly what a text model would.
    """
    _check_vocab(vocab, weight_theirs)
    if text not in (*SPEAKERS, 'none'):
        raise ValueError(f'layout.text must be mine, theirs or none, got {text!r}')
    if not 0 <= text_shift_s < math.inf:
        raise ValueError(f'layout.text_shift_s must not be negative, got {text_shift_s}')
    for name, p in (('drop_text', drop_text), ('mask_theirs', mask_theirs)):
        if not 0 <= p <= 1:
            raise ValueError(f'layout.{name} is a probability, got {p}')
    for name, weight in dict(text=weight_text, pad=weight_pad, epad=weight_epad,
                             semantic=weight_semantic, acoustic=weight_acoustic,
                             theirs=weight_theirs).items():
        if not 0 <= weight < math.inf:
            raise ValueError(f'layout.weight_{name} must be finite and not negative, got {weight}')
    late = delays(vocab, acoustic_delay_columns=acoustic_delay_columns,
                  text_delay_columns=text_delay_columns)
    if record.codes is None:
        return _text_only(record, vocab, weight_text)
    if record.codes.ndim != 3:
        raise ValueError(f'record {record.id}: codes must be [C, K, T], got {record.codes.shape}')
    channel = _channels(record, mine, theirs, rng)
    dropped = rng.random() < drop_text

    frames = record.codes.shape[-1]
    pad, epad = vocab.specials['pad'], vocab.specials['epad']
    tokens = np.full((len(vocab.rows), frames), NOTHING, np.int32)
    weights = np.zeros((len(vocab.rows), frames), np.float32)
    if text != 'none' and channel[text] is not None and record.words and not dropped:
        words = spoken_by(record, channel[text])
        if text_shift_s:
            by = rng.uniform(-text_shift_s, text_shift_s)
            words = [w._replace(start_s=w.start_s + by, end_s=w.end_s + by) for w in words]
        line = place_words(words, frames, frame_hz=frame_hz, pad=pad, epad=epad, rule=text_rule)
        tokens[0] = _encode(record, vocab, 0, line)
        weights[0] = np.where(line == pad, weight_pad, np.where(line == epad, weight_epad,
                                                                weight_text))
    for k, row in enumerate(vocab.rows[1:], start=1):
        speaker, codebook = row.name.split()
        weight = weight_semantic if codebook == '0' else weight_acoustic
        if channel[speaker] is not None:
            if int(codebook) >= record.codes.shape[1]:
                raise ValueError(f'record {record.id} has {record.codes.shape[1]} codebooks, the '
                                 f'vocabulary has a row {row.name!r}: choose the codec of the data')
            tokens[k] = _encode(record, vocab, k, record.codes[channel[speaker], int(codebook)])
            if speaker == 'theirs' and mask_theirs:
                tokens[k, rng.random(frames) < mask_theirs] = NOTHING
            weights[k] = bool(row.predicted) * weight * (weight_theirs if speaker == 'theirs'
                                                         else 1.0)
    return Grid.of(delay(tokens, vocab, late), _shift(weights, late, np.zeros(len(late))))


def units(record: Record, *, vocab: Vocab, rng: np.random.Generator, mine: int | str = 0,
          weight_held: float = 0.0) -> Grid:
    """Two speakers without a text: one unit of each per column, at the rate of the units.

    ::

        mine 0    *  5  5' 5' 7  9  9'      the mark: a unit that is held
        theirs 0  *  2  2' 4  4' 4' 4'

    Where a unit differs from the one before it (an edge) it weighs 1, where it is held
    `weight_held`: with 0 the model learns what comes next and not how long it stays (the edge
    units of arXiv 2203.16502 §3.2). `mine` is a channel or 'random'.
    """
    names = [row.name for row in vocab.rows]
    if names != ['mine 0', 'theirs 0']:
        raise ValueError('duplex.units needs vocab.parallel without text, rows mine 0 and theirs 0')
    if len(record.units) != 2:
        raise ValueError(f'record {record.id} has units of {len(record.units)} channels, not of 2')
    first = int(rng.integers(2)) if mine == 'random' else mine
    if first not in (0, 1):
        raise ValueError(f"layout.mine is 0, 1 or 'random', got {mine!r}")
    both = np.stack([record.units[first], record.units[1 - first]]).astype(np.int32)
    tokens = np.array([[initial(row)] + [0] * both.shape[1] for row in vocab.rows], np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    for k, name in enumerate(names):
        tokens[k, 1:] = vocab.encode(name, both[k])
    weights[:, 1:] = np.where(tokens[:, 1:] == tokens[:, :-1], weight_held, 1.0)
    return Grid.of(tokens, weights)


def _check_vocab(vocab: Vocab, weight_theirs: float):
    if vocab.rows[0].name != 'text':
        raise ValueError('duplex.columns needs the vocabulary of vocab.streams (a row per stream)')
    speakers = {row.name.split()[0] for row in vocab.rows[1:]}
    if not speakers <= set(SPEAKERS):
        raise ValueError(f'vocab.speakers must be among mine, theirs for duplex.columns, got '
                         f'{", ".join(sorted(speakers))}')
    heard = [row for row in vocab.rows if row.name.startswith('theirs') and not row.predicted]
    if weight_theirs and heard:
        raise ValueError(f'layout.weight_theirs is {weight_theirs} but the vocabulary never '
                         "predicts theirs: add it to vocab.predicted or set the weight to 0")


def _channels(record: Record, mine: int | str, theirs: int | str, rng: np.random.Generator
              ) -> dict[str, int | None]:
    """The channel that each speaker is read from, None for a speaker who is not there."""
    count = len(record.codes)
    legal = range(count)
    if mine == 'random':
        mine = int(rng.integers(count))
    elif mine == 'none':
        mine = None
    elif mine not in legal:
        raise ValueError(f'layout.mine must be random, none or a channel in 0..{count - 1} of '
                         f'record {record.id}, got {mine!r}')
    if theirs == 'other':
        others = [c for c in legal if c != mine]
        if len(others) > 1:
            raise ValueError(f'record {record.id} has {count} channels: layout.theirs must be a '
                             "number, 'other' is not unique")
        theirs = others[0] if others else None
    elif theirs == 'none':
        theirs = None
    elif theirs not in legal:
        raise ValueError(f'layout.theirs must be other, none or a channel in 0..{count - 1} of '
                         f'record {record.id}, got {theirs!r}')
    return {'mine': mine, 'theirs': theirs}


def _encode(record: Record, vocab: Vocab, k: int, ids) -> np.ndarray:
    """Local ids of row `k` on the line; the row's initial token is no legal content."""
    row = vocab.rows[k]
    if ids.size and (ids.min() < 0 or ids.max() >= row.size - 1):
        raise ValueError(f'record {record.id}: {row.name} ids must lie in 0..{row.size - 2}, got '
                         f'{ids.min()}..{ids.max()}')
    return vocab.encode(row.name, ids)


def _text_only(record: Record, vocab: Vocab, weight_text: float) -> Grid:
    if record.units:
        raise ValueError(f'record {record.id} has audio but no codes: duplex.columns needs a codec '
                         'with several codebooks')
    ids = [vocab.specials['bos'], *(i for word in spoken_by(record, 0) for i in word.ids)]
    tokens = np.full((len(vocab.rows), len(ids)), NOTHING, np.int32)
    tokens[0] = _encode(record, vocab, 0, np.array(ids, np.int32))
    return Grid.of(tokens, np.full(tokens.shape, weight_text, np.float32))

# SPDX-License-Identifier: Apache-2.0
"""Text and speech side by side in one sequence: every column has a text cell and cells of speech.

Speech is written by a *pattern*, a list of coordinates: which frame of which codebook stands in
each cell of a stretch. One formula gives the delay patterns of the codec language models, units
dealt out over several rows, and patches of frames; `undo` reads any of them back. Texts are not
aligned with what is spoken: they begin at the left edge of the stretch and end where they end.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxsd.layout.flat import runs, spoken_by
from jaxsd.types import NOTHING, Grid, Record, Word
from jaxsd.vocab import Vocab, initial


def pattern(books: int, frames: int, late: Sequence[int], tail: str = 'grow') -> np.ndarray:
    """int [rows, columns]: the coordinate `book * frames + frame` of each cell, -1 for none.

    Row r is `late[r]` columns late. As many rows as codebooks: a delay pattern. G times as many: G
    frames stand side by side in a column, each with all its codebooks::

        late (0, 1, 2), 4 frames           1 book, late (0, 0)       2 books, late (0, 0, 0, 0)
        0  1  2  3  .  .    tail 'grow'    0  2  4                   a0  a2     frame 0, 2
        .  0  1  2  3  .    keeps all      1  3  .                   b0  b2
        .  .  0  1  2  3                                             a1  a3     frame 1, 3
        'crop' ends with column 3                                    b1  b3
    """
    rows = len(late)
    if not rows or rows % books or min(late, default=0) < 0:
        raise ValueError('a pattern needs delays of 0 or more for a multiple of '
                         f'{books} codebooks, got {tuple(late)}')
    if tail not in ('grow', 'crop'):
        raise ValueError(f"layout.tail is 'grow' or 'crop', got {tail!r}")
    group = rows // books
    columns = -(-frames // group) + (max(late) if tail == 'grow' else 0)
    side, book = np.divmod(np.arange(rows), books)
    frame = (np.arange(columns) - np.array(late)[:, None]) * group + side[:, None]
    return np.where((frame >= 0) & (frame < frames), book[:, None] * frames + frame, -1)


def lay(values: np.ndarray, at: np.ndarray, fill) -> np.ndarray:
    """`values` [books, frames] in the cells of `at`, `fill` (one, or one a row) elsewhere."""
    fill = np.broadcast_to(np.reshape(fill, (-1, 1)), at.shape)
    return np.where(at < 0, fill, values.reshape(-1)[at] if values.size else fill)


def undo(cells: np.ndarray, at: np.ndarray, books: int, frames: int) -> np.ndarray:
    """The inverse of `lay`: cells [..., rows, columns] as [..., books, frames].

    Frames that a cropped tail lost, or that the cells do not reach, come back as NOTHING.
    """
    at = at[:, :cells.shape[-1]]
    out = np.full((*cells.shape[:-2], books * frames), NOTHING, np.int32)
    out[..., at[at >= 0]] = cells[..., :at.shape[1]][..., at >= 0]
    return out.reshape(*cells.shape[:-2], books, frames)


class Said(NamedTuple):
    """What is said in one stretch: its words, its codes [books, frames] and its features [S, M].

    codes and feats have no columns where there is only text."""

    words: tuple[Word, ...]
    codes: np.ndarray
    feats: np.ndarray


def _between(record: Record, channel: int, start_s: float, end_s: float, frame_hz: float,
             kind: str) -> Said:
    """What `channel` says from start_s to end_s, in 'codes' or 'units'."""
    told = record.codes if kind == 'codes' else record.units
    if told is None or not len(told):
        raise ValueError(f'record {record.id} has audio but no {kind}')
    codes = np.atleast_2d(told[min(channel, len(told) - 1)])
    words = tuple(w for w in spoken_by(record, channel) if start_s <= w.start_s < end_s)
    # Rounding: times are stored in single precision, and 0.24 s must not become frame 2.9999.
    first, stop = (int(np.round(x * frame_hz, 4)) for x in (start_s, end_s))
    feats = np.zeros((0, 0), np.float32)
    if record.feats:
        feats = record.feats[min(channel, len(record.feats) - 1)]
        per_s = len(feats) / record.duration_s
        feats = feats[round(start_s * per_s):round(end_s * per_s)]
    return Said(words, codes[:, first:max(stop, first + 1)].astype(np.int32), feats)


def whole(record: Record, channel: int, frame_hz: float, kind: str) -> Said:
    """All that one channel says, its sound in 'codes' or 'units'."""
    if record.codes is None and not record.units:
        return Said(spoken_by(record, channel), np.zeros((1, 0), np.int32),
                    np.zeros((0, 0), np.float32))
    return _between(record, channel, 0.0, record.duration_s + 1.0, frame_hz, kind)


def exchange(record: Record, rng: np.random.Generator, frame_hz: float, kind: str
             ) -> tuple[Said, Said]:
    """A turn and the one that follows it: of a dialogue, a user's (channel 1) and mine (channel 0).

    Which, of a record with several, is drawn. A record of one voice goes on where it paused, and
    one that is only text has turns that share out its words in order.
    """
    turns = record.turns
    voices = {turn.channel for turn in turns}
    wanted = (1, 0) if len(voices) > 1 else (min(voices, default=0),) * 2
    pairs = [i for i in range(len(turns) - 1)
             if (turns[i].channel, turns[i + 1].channel) == wanted]
    if not pairs:
        raise ValueError(f'record {record.id} has no turn that another one answers')
    i = pairs[rng.integers(len(pairs))]
    if record.codes is None and not record.units:
        first = sum(len(turn.text.split()) for turn in turns[:i])
        cut = first + len(turns[i].text.split())
        words = spoken_by(record, 0)
        none = np.zeros((1, 0), np.int32), np.zeros((0, 0), np.float32)
        return (Said(words[first:cut], *none),
                Said(words[cut:cut + len(turns[i + 1].text.split())], *none))
    return tuple(_between(record, turn.channel, turn.start_s, turn.end_s, frame_hz, kind)
                 for turn in turns[i:i + 2])


def _stretches(record: Record, rng, frame_hz: float, task: str, kind: str) -> tuple[Said, Said]:
    if task not in ('reply', 'same'):
        raise ValueError(f"layout.task is 'reply' or 'same', got {task!r}")
    if task == 'reply':
        return exchange(record, rng, frame_hz, kind)
    return (whole(record, 0, frame_hz, kind),) * 2


def _check(vocab: Vocab, *marks: str, text: bool = True):
    """Raises ValueError for a vocabulary without a text row, or without marks that are needed."""
    rows = [row for row in vocab.rows if row.name != 'text']
    if text and vocab.rows[0].name != 'text' or not rows:
        raise ValueError('this layout needs the vocabulary of vocab.parallel: a text row, then '
                         'rows of speech')
    for mark in marks:
        where, name = ('vocab.marks', f'{rows[0].name} {mark[1:]}') if mark.startswith('+') else (
            'vocab.text_marks', mark)
        if name not in vocab.specials:
            raise ValueError(f'this layout needs {mark.removeprefix("+")} in {where}')


def _ids(vocab: Vocab, words: Sequence[Word]) -> list[int]:
    return [int(i) for i in vocab.encode('text', [i for word in words for i in word.ids])]


def _codes(vocab: Vocab, codes: np.ndarray, at: np.ndarray, fill: str) -> np.ndarray:
    """Codes [books, frames] in the cells of `at`, as ids of each row on the line. `fill` elsewhere.

    Codes at or past the codec's size are marks by their number. Where there is no such mark, a
    row's initial token fills.
    """
    rows = [row for row in vocab.rows if row.name != 'text']
    fills = np.array([vocab.specials.get(f'{row.name} {fill}', initial(row)) for row in rows])
    starts = np.array([row.start for row in rows])
    cells = lay(codes, at, NOTHING)
    limit = min(row.predicted for row in rows)
    if codes.size and not 0 <= codes.min() <= codes.max() < limit:
        raise ValueError(f'codes must lie in 0..{limit - 1}, got {codes.min()}..{codes.max()}')
    return np.where(at < 0, fills[:, None], cells + starts[:, None])


def _ended(vocab: Vocab, codes: np.ndarray) -> np.ndarray:
    """`codes` and one more frame of the mark 'end' in every book."""
    row = next(row for row in vocab.rows if row.name != 'text')
    end = vocab.specials[f'{row.name} end'] - row.start
    return np.concatenate([codes, np.full((len(codes), 1), end, codes.dtype)], axis=1)


def _beside(vocab: Vocab, text: list[int], codes: np.ndarray | None, late: Sequence[int]
            ) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and weights [K, n] of a stretch: text with EOS beside codes with their ends.

    The text row is padded, unscored, after EOS; the rows of speech are padded before their delay
    and after their end, scored up to where the last of them ends. Without codes they are padding.
    """
    rows = [row for row in vocab.rows if row.name != 'text']
    if len(late) != len(rows):
        raise ValueError(f'layout.late needs a delay for each of the {len(rows)} rows of speech, '
                         f'got {tuple(late)}')
    text = [*text, vocab.specials['eos']]
    spoken = np.zeros((len(rows), 0), np.int32)
    if codes is not None:
        codes = _ended(vocab, codes)
        spoken = _codes(vocab, codes, pattern(len(codes), codes.shape[1], late), 'pad')
    n = max(len(text), spoken.shape[1])
    tokens = np.empty((1 + len(rows), n), np.int32)
    tokens[0] = vocab.specials['pad']
    tokens[0, :len(text)] = text
    tokens[1:] = [[vocab.specials[f'{row.name} pad']] for row in rows]
    tokens[1:, :spoken.shape[1]] = spoken
    weights = np.zeros(tokens.shape, np.float32)
    weights[0, :len(text)] = 1.0
    weights[1:, :spoken.shape[1]] = 1.0
    return tokens, weights


def _stacked(feats: np.ndarray, stack_frames: int) -> np.ndarray:
    """Features [S, M] as [columns, stack_frames * M], the last column filled with zeros."""
    columns = -(-len(feats) // stack_frames)
    out = np.zeros((columns * stack_frames, feats.shape[1]), np.float32)
    out[:len(feats)] = feats
    return out.reshape(columns, -1)


def _with_feats(grid: Grid, feats: np.ndarray, first: int) -> Grid:
    """`grid` with features [n, F] in the columns from `first` on: extra `feats` and `slot`."""
    columns = grid.tokens.shape[1]
    dense = np.zeros((columns, feats.shape[1]), np.float32)
    dense[first:first + len(feats)] = feats
    slot = np.zeros(columns, np.int32)
    slot[first:first + len(feats)] = 1
    grid.extra.update(feats=dense, slot=slot)
    return grid


def _heard(record: Record, said: Said, stack_frames: int) -> np.ndarray:
    if not len(said.feats):
        raise ValueError(f'record {record.id} has no features to hear: its dataset must keep the '
                         'audio, and the frontend must have an encoder')
    return _stacked(said.feats, stack_frames)


def prefixed(record: Record, *, vocab: Vocab, rng: np.random.Generator, frame_hz: float = 12.5,
             late: Sequence[int] = (0, 1, 2, 3), tail: str = 'grow', end: str = 'none',
             weight_text: float = 0.0, weights: Sequence[float] = (1.0,)) -> Grid:
    """A text, then the codes that say it, one row per codebook, each later than the one before.

    ::

        text     BOS  the  cat  .   .   .   .   .   .
        audio 0   .    .    .   *   a0  a1  a2  *   *       late 0
        audio 1   .    .    .   *   *   b0  b1  b2  *       late 1
        audio 2   .    .    .   *   *   *   c0  c1  c2      late 2; tail 'crop' ends at c0

    The column of initial tokens after the text starts the sound; without a text row there is only
    the sound. end='mark' closes every row with one 'end', which is scored. weights: how much each
    codebook matters (one number for all). The delay pattern of arXiv 2306.05284 §2.2, and of
    2403.16973, which weighs the first codebooks more.

    With the vocabulary of vocab.patches every row holds any id: a text token fills its column.
    """
    del rng
    rows = [row for row in vocab.rows if row.name != 'text']
    joint = 'codes 0' in vocab.ranges
    if not joint:
        _check(vocab, *(['+end'] if end == 'mark' else []), text=False)
    if end not in ('none', 'mark') or joint and end == 'mark':
        raise ValueError("layout.end is 'none' or, with marks in the vocabulary, 'mark', got "
                         f'{end!r}')
    if len(weights) not in (1, len(rows)):
        raise ValueError(f'layout.weights needs one number, or one for each of {len(rows)} rows')
    said = whole(record, 0, frame_hz, 'codes')
    text = [vocab.specials['bos'], *_ids(vocab, said.words)] if 'text' in vocab.ranges else []
    codes = said.codes
    at = pattern(len(codes), codes.shape[1] + (end == 'mark'), late, tail)
    if joint:
        starts = np.array([vocab.ranges[f'codes {k}'][0] for k in range(len(codes))])
        spoken = lay(codes + starts[:, None], at, initial(rows[0]))
    else:
        spoken = _codes(vocab, _ended(vocab, codes) if end == 'mark' else codes, at, 'initial')
    blank = np.array([[initial(row)] for row in rows], np.int32)
    sound = np.concatenate([blank, spoken], axis=1) if codes.shape[1] else blank[:, :0]
    extra = len(vocab.rows) - len(rows)
    tokens = np.full((len(vocab.rows), len(text) + sound.shape[1]), NOTHING, np.int32)
    scores = np.zeros(tokens.shape, np.float32)
    tokens[:1 if extra else None, :len(text)] = text
    scores[:1 if extra else None, :len(text)] = weight_text
    tokens[extra:, len(text):] = sound
    if codes.shape[1]:
        scores[extra:, len(text) + 1:] = np.where(at < 0, 0.0, np.reshape(weights, (-1, 1)))
    return Grid.of(tokens, scores)


GAPS = ('gap0', 'gap1', 'gap2')
"""Marks of the places that spans were taken from, in order."""
APART_FRAMES = 5
"""At least so many frames stay between two spans, and before the first and behind the last."""


def spans(frames: int, rng: np.random.Generator, longest_frames: int) -> list[tuple[int, int]]:
    """(first, the one after the last) of one to three spans of at most `longest_frames` each.

    How many is a draw from a Poisson distribution of mean 1 between those bounds, fewer where they
    would not fit; none where not even one frame would.
    """
    count = int(np.clip(rng.poisson(1.0), 1, len(GAPS)))
    while count and frames < count * (1 + APART_FRAMES) + APART_FRAMES:
        count -= 1
    room = frames - (count + 1) * APART_FRAMES
    lengths = [int(rng.integers(1, min(longest_frames, room // count) + 1)) for _ in range(count)]
    slack = np.sort(rng.integers(0, room - sum(lengths) + 1, count)) if count else []
    out, before = [], 0
    for n, (length, free) in enumerate(zip(lengths, slack, strict=True)):
        first = int(free) + before + (n + 1) * APART_FRAMES
        out.append((first, first + length))
        before += length
    return out


def infilled(record: Record, *, vocab: Vocab, rng: np.random.Generator, frame_hz: float = 12.5,
             late: Sequence[int] = (0, 1, 2, 3), longest_frames: int = 600,
             weights: Sequence[float] = (1.0,)) -> Grid:
    """As `prefixed`, with spans taken out of the sound and said at the end: editing is continuing.

    ::

        text     BOS  the  .  .  .   .   .    .   .   .   .   .    .   .    .
        audio 0   .    .   *  a0 a1  *  gap0  a4  a5 END  *  gap0  a2  a3 OVER  *
        audio 1   .    .   *  *  b0  b1 gap0  *   b4  b5 END gap0  *   b2  b3 OVER

    Every stretch is delayed on its own. A gap's mark stands where a span was and again before it;
    'over' closes a span and 'end' what stayed (arXiv 2403.16973 §3.1, from where the spans are).
    """
    _check(vocab, '+end', '+over', *(f'+{gap}' for gap in GAPS))
    rows = vocab.rows[1:]
    if len(weights) not in (1, len(rows)):
        raise ValueError(f'layout.weights needs one number, or one for each of {len(rows)} rows')
    said = whole(record, 0, frame_hz, 'codes')
    codes = said.codes
    if not codes.shape[1]:
        raise ValueError(f'record {record.id} has no sound')
    text = [vocab.specials['bos'], *_ids(vocab, said.words)]

    def column(mark: str) -> np.ndarray:
        return np.array([[vocab.specials.get(f'{row.name} {mark}', initial(row))] for row in rows])

    def stretch(first: int, stop: int, mark: str = '') -> tuple[np.ndarray, np.ndarray]:
        part = codes[:, first:stop]
        if mark:
            part = np.concatenate([part, np.full((len(part), 1), column(mark)[0, 0]
                                                 - rows[0].start)], axis=1)
        at = pattern(len(part), part.shape[1], late)
        return _codes(vocab, part, at, 'initial'), at >= 0
    taken = spans(codes.shape[1], rng, longest_frames)
    borders = [0, *(x for span in taken for x in span), codes.shape[1]]
    pieces = [(column('initial'), False)]
    for n in range(len(taken) + 1):
        pieces.append(stretch(borders[2 * n], borders[2 * n + 1],
                              'end' if n == len(taken) else ''))
        if n < len(taken):
            pieces.append((column(GAPS[n]), False))
    for gap, (first, stop) in zip(GAPS, taken, strict=False):
        pieces += [(column(gap), False), stretch(first, stop, 'over')]
    sound = np.concatenate([tokens for tokens, _ in pieces], axis=1)
    tokens = np.full((len(vocab.rows), len(text) + sound.shape[1]), NOTHING, np.int32)
    tokens[0, :len(text)] = text
    tokens[1:, len(text):] = sound
    scores = np.zeros(tokens.shape, np.float32)
    scores[1:, len(text):] = np.concatenate(
        [np.broadcast_to(where, cells.shape) for cells, where in pieces], axis=1
    ) * np.reshape(weights, (-1, 1))
    return Grid.of(tokens, scores)


def answered(record: Record, *, vocab: Vocab, rng: np.random.Generator, frame_hz: float = 12.5,
             heard: str = 'feats', said: str = 'both', task: str = 'reply',
             late: Sequence[int] = (1, 2, 3, 4, 5, 6, 7), stack_frames: int = 1) -> Grid:
    """A question between marks, then its answer written and spoken at once (arXiv 2408.16725 §3.2).

    ::

        text     input  _  _  end answer | a    b    EOS  _    _    _     words at once
        audio 0  input  _  _  end answer | _    x0   x1   END  _    _     late 1
        audio 1  input  _  _  end answer | _    _    y0   y1   END  _     late 2
        feats           f  f

    heard 'feats' are features in columns of padding (`stack_frames` of them to a column), which the
    frontend puts in the place of the rows of speech; 'text' writes the question in the text row.
    The last column of the question names what is asked: an 'answer' in both (`said='both'`) or in
    the text alone ('text'; the rows of speech show padding there). task 'reply' answers a turn with
    the next one; 'same' says again what was heard, which in text alone is recognition and is asked
    by the mark 'asr'. Padding of the rows of speech is scored up to the last end, text up to EOS.
    """
    _check(vocab, 'input', 'answer', 'asr', '+end', '+pad', '+input', '+answer')
    if heard not in ('feats', 'text') or said not in ('both', 'text'):
        raise ValueError("layout.heard is 'feats' or 'text' and layout.said 'both' or 'text', got "
                         f'{heard!r} and {said!r}')
    asked, reply = _stretches(record, rng, frame_hz, task, 'codes')
    rows = [row for row in vocab.rows if row.name != 'text']
    feats = _heard(record, asked, stack_frames) if heard == 'feats' else None
    if said == 'both' and not reply.codes.shape[1]:
        raise ValueError(f'record {record.id} has no sound to answer with')
    inside = [vocab.specials['pad']] * len(feats) if feats is not None else _ids(vocab, asked.words)
    n = len(inside) + 3
    prompt = np.empty((len(vocab.rows), n), np.int32)
    written = said == 'text'
    prompt[0] = [vocab.specials['input'], *inside, vocab.specials['eos'],
                 vocab.specials['asr' if written and task == 'same' else 'answer']]
    prompt[1:] = [[vocab.specials[f'{row.name} pad']] for row in rows]
    if feats is not None:
        prompt[1:, 0] = [vocab.specials[f'{row.name} input'] for row in rows]
        prompt[1:, -2] = [vocab.specials[f'{row.name} end'] for row in rows]
    if not written:
        prompt[1:, -1] = [vocab.specials[f'{row.name} answer'] for row in rows]
    tokens, weights = _beside(vocab, _ids(vocab, reply.words), None if written else reply.codes,
                              late)
    grid = Grid.of(np.concatenate([prompt, tokens], axis=1),
                   np.concatenate([np.zeros(prompt.shape), weights], axis=1))
    return grid if feats is None else _with_feats(grid, feats, 1)


def together(record: Record, *, vocab: Vocab, rng: np.random.Generator, frame_hz: float = 25.0
             ) -> Grid:
    """Question and answer, each written and spoken side by side, units dealt out over the rows.

    ::

        text     *  q0  q1 EOS  | t0  t1  EOS  _   _         each text from the left edge
        audio 0  *  v0  v2 END  | u0  u2  u4   u6  u8
        audio 1  *  v1  v3  _   | u1  u3  u5   u7  END

    With S rows of speech a column takes S units of one sequence, unit j in row j mod S, and the
    end mark is dealt like a unit (arXiv 2406.12428 §3). Only the answer is scored.
    """
    _check(vocab, '+end', '+pad')
    asked, reply = exchange(record, rng, frame_hz, 'units')
    late = (0,) * (len(vocab.rows) - 1)
    parts = [_beside(vocab, _ids(vocab, x.words), x.codes if x.codes.shape[1] else None, late)
             for x in (asked, reply)]
    start = np.array([[initial(row)] for row in vocab.rows], np.int32)
    return Grid.of(np.concatenate([start, parts[0][0], parts[1][0]], axis=1),
                   np.concatenate([np.zeros(start.shape), 0 * parts[0][1], parts[1][1]], axis=1))


def grouped(record: Record, *, vocab: Vocab, rng: np.random.Generator, frame_hz: float = 25.0,
            fields: Sequence[str] = ('speech', 'speech'), task: str = 'reply',
            score: str = 'answer', kind: str = 'units') -> Grid:
    """Text and speech in one row of a language model, where one position stands for G frames.

    ::

        text     BOS  open  speech speech close | open  speech speech close EOS
        audio 0            u0     u3                   v0     v3
        audio 1            u1     u4                   v1     v4
        audio 2            u2     _                    v2     _

    A position with the mark `speech` carries a group: it is entered as one vector and predicted in
    one step from the position before (arXiv 2410.08035 §3). kind 'codes' groups frames of several
    codebooks, patches, instead of units. `fields` says how the two stretches are told, 'text' or
    'speech'; task as in `answered`. score 'all' scores both stretches, 'answer' the second.
    """
    _check(vocab, 'open', 'speech', 'close', '+pad')
    if kind not in ('units', 'codes'):
        raise ValueError(f"layout.kind is 'units' or 'codes', got {kind!r}")
    if len(fields) != 2 or not set(fields) <= {'text', 'speech'} or score not in ('all', 'answer'):
        raise ValueError("layout.fields names two of 'text', 'speech' and layout.score is 'all' or "
                         f"'answer', got {tuple(fields)} and {score!r}")
    rows = len(vocab.rows) - 1
    tokens = [np.array([[vocab.specials['bos']]] + [[NOTHING]] * rows, np.int32)]
    weights = [np.zeros((1 + rows, 1), np.float32)]
    for n, (field, part) in enumerate(zip(fields, _stretches(record, rng, frame_hz, task, kind),
                                          strict=True)):
        if field == 'text':
            top, groups = _ids(vocab, part.words), np.zeros((rows, 0), np.int32)
            first = 0
        else:
            if not part.codes.shape[1]:
                raise ValueError(f'record {record.id} has no sound for a speech field')
            at = pattern(len(part.codes), part.codes.shape[1], (0,) * rows)
            groups = _codes(vocab, part.codes, at, 'pad')
            first, top = 1, [vocab.specials['open'], *[vocab.specials['speech']] * at.shape[1],
                             vocab.specials['close']]
        if n == 1:
            top = [*top, vocab.specials['eos']]
        stretch = np.full((1 + rows, len(top)), NOTHING, np.int32)
        stretch[0] = top
        stretch[1:, first:first + groups.shape[1]] = groups
        tokens.append(stretch)
        weights.append(np.full(stretch.shape, float(n == 1 or score == 'all'), np.float32))
    return Grid.of(np.concatenate(tokens, axis=1), np.concatenate(weights, axis=1))


def upsampled(record: Record, *, vocab: Vocab, rng: np.random.Generator, frame_hz: float = 25.0,
              heard: str = 'feats', said: str = 'both', task: str = 'reply',
              stack_frames: int = 1) -> Grid:
    """A question, then its answer in text; the units that say the answer ride along, unaligned.

    ::

        text      BOS  .  .  .  answer  yes  it   is   EOS
        feats          f  f  f
        audio 0   .    .  .  .  .       u0   u2   u5   u8       in order, spread evenly
        audio 1   .    .  .  .  .       u1   u3   u6   u9
        audio 2   .    .  .  .  .       *    u4   u7   *

    With R rows of speech every column of the answer has R frames to speak in (upsampling by R);
    connectionist temporal classification finds which units they say, so that where a unit is
    written means nothing, and an initial token says that the column has a frame that holds none.
    Units that repeat are written once; said='text' leaves them out. What does not fit in R units
    a column is lost, from the end (arXiv 2409.06666 §3).
    """
    _check(vocab, 'answer')
    if heard not in ('feats', 'text') or said not in ('both', 'text'):
        raise ValueError("layout.heard is 'feats' or 'text' and layout.said 'both' or 'text', got "
                         f'{heard!r} and {said!r}')
    asked, reply = _stretches(record, rng, frame_hz, task, 'units')
    rows = vocab.rows[1:]
    feats = _heard(record, asked, stack_frames) if heard == 'feats' else None
    inside = [NOTHING] * len(feats) if feats is not None else _ids(vocab, asked.words)
    answer = [*_ids(vocab, reply.words), vocab.specials['eos']]
    top = [vocab.specials['bos'], *inside, vocab.specials['answer'], *answer]
    tokens = np.full((len(vocab.rows), len(top)), NOTHING, np.int32)
    tokens[0] = top
    weights = np.zeros(tokens.shape, np.float32)
    weights[0, -len(answer):] = 1.0
    units = runs(reply.codes[0])[0][:len(rows) * len(answer)]
    if said == 'both' and len(units):
        tokens[1:, -len(answer):] = initial(rows[0])
        column = np.arange(len(units)) * len(answer) // len(units)
        row = np.arange(len(units)) - np.searchsorted(column, column)
        at = (1 + row, len(top) - len(answer) + column)
        tokens[at], weights[at] = units + rows[0].start, 1.0
    grid = Grid.of(tokens, weights)
    return grid if feats is None else _with_feats(grid, feats, 1)

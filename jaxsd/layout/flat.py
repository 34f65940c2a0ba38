# SPDX-License-Identifier: Apache-2.0
"""Text and speech written into one row, so that a plain language model is a speech model.

A marker opens every stretch and says what follows: `[Text]` word pieces, `[Speech]` units. The
order of stretches is the task: speech alone, text then its audio, or one sentence that keeps
changing between being written and being spoken. Units that repeat are usually written once, so a
stretch of speech costs as many tokens as it has distinct sounds.
"""

from collections.abc import Sequence

import numpy as np

from jaxsd.types import Grid, Record, Word
from jaxsd.vocab import Vocab

MARKERS = {'text': '[Text]', 'speech': '[Speech]'}
ENDS = ('none', 'eos')


def runs(units) -> tuple[np.ndarray, np.ndarray]:
    """Runs of equal units [U]: each run's value, and the frame after its last one."""
    units = np.asarray(units)
    ends = np.append(np.flatnonzero(units[1:] != units[:-1]) + 1, units.size)
    ends = ends[:units.size]        # no unit, no run
    return units[ends - 1], ends


def speech_tokens(units, vocab: Vocab, dedup: bool = True) -> np.ndarray:
    """Units [U] at the unit rate as ids on the line; `dedup` writes a run of equal units once."""
    return vocab.encode('units', runs(units)[0] if dedup else units)


def text_tokens(words: Sequence[Word], vocab: Vocab) -> np.ndarray:
    """The word pieces of `words`, in order, as ids on the line."""
    return vocab.encode('text', [i for word in words for i in word.ids])


def spoken_by(record: Record, channel: int) -> tuple[Word, ...]:
    """The words of one channel; all of them when the record has only one, or no audio at all.

    Raises ValueError for a word without ids, and for a channel that the record lacks.
    """
    for word in record.words:
        if not word.ids and word.text.strip():
            raise ValueError(f'record {record.id}: the word {word.text!r} has no ids; tokenize '
                             'words before drawing the record')
    channels = max(len(record.units), 0 if record.codes is None else len(record.codes))
    if channels > 1 and not 0 <= channel < channels:
        raise ValueError(f'record {record.id} has channels 0..{channels - 1}, no channel {channel}')
    if channels <= 1:
        return record.words
    return tuple(word for word in record.words if word.channel == channel)


def _units_of(record: Record, channel: int) -> np.ndarray:
    if not record.units:
        raise ValueError(f'record {record.id} has no units: a text-only record cannot fill a '
                         'speech field')
    return record.units[channel if len(record.units) > 1 else 0]


def _check(vocab: Vocab, end: str, channel: int):
    if 'units' not in vocab.ranges:
        raise ValueError('a flat layout needs the vocabulary of vocab.line (text, markers, units)')
    if end not in ENDS:
        raise ValueError(f'layout.end must be one of {", ".join(ENDS)}, got {end!r}')
    if channel not in (0, 1):
        raise ValueError(f'layout.channel is 0 or 1, one of the two of a dialogue, got {channel}')


def _assemble(record: Record, vocab: Vocab, pieces: list, end: str) -> Grid:
    """BOS, then every (tokens, weight) of `pieces`, then perhaps EOS with the last one's weight."""
    pieces = [([vocab.specials['bos']], 0.0), *pieces]
    if end == 'eos':
        pieces.append(([vocab.specials['eos']], pieces[-1][1]))
    tokens = np.concatenate([np.asarray(t, np.int32) for t, _ in pieces])
    weights = np.concatenate([np.full(len(t), w, np.float32) for t, w in pieces])
    return Grid.of(tokens, weights)


def sequence(record: Record, *, vocab: Vocab, rng: np.random.Generator,
             fields: Sequence[str] = ('speech',),
             score: Sequence[str] = ('text', 'speech', 'markers'),
             markers: Sequence[str] = (), end: str = 'none', channel: int = 0,
             dedup: bool = True) -> Grid:
    """Whole fields one after another, each behind its marker: the markers name the task.

    ::

        ('speech',)         <s> [Speech] u262 u208 u499          speech-only pretraining
        ('text',)           <s> [Text] the cat                   text-only pretraining
        ('speech', 'text')  <s> [Speech] u3 u7 [Text] the cat    recognition
        ('text', 'speech')  <s> [Text] the cat [Speech] u3 u7    synthesis

    `score` names what carries loss: content of a kind of field, and the markers. The default scores
    everything, as in arXiv 2402.05755 §3.1; score=('text',) with ('speech', 'text') learns only
    the transcript given the audio (arXiv 2309.07937 masks so).

    `markers` names another marker for each field than that of its kind: ('[Speech]', '[ASR]') tells
    the transcript of what was said from a text that goes on from it, which interleaved samples
    open with `[Text]` (arXiv 2402.05755 App. D, "+ASR+TTS"). They must stand in `vocab.markers`.

    `end='none'` is the paper's: nothing closes a sample, and generation runs to a stated length.
    `end='eos'` closes it with EOS, scored like the last field, so that generation can stop.

    Nothing is drawn: `rng` is there because every layout receives one. A dialogue is written from
    one `channel`. Raises ValueError when a field has nothing to be filled with.
    """
    _check(vocab, end, channel)
    if not fields or not set(fields) <= set(MARKERS):
        raise ValueError(f'layout.fields must name fields among text, speech; got {tuple(fields)}')
    if not set(score) <= {*MARKERS, 'markers'}:
        raise ValueError('layout.score must name things among text, speech, markers; got '
                         f'{tuple(score)}')
    names = tuple(markers) or tuple(MARKERS[field] for field in fields)
    if len(names) != len(fields) or not set(names) <= set(vocab.specials):
        raise ValueError(f'layout.markers must name one marker of vocab.markers per field, got '
                         f'{names} for {tuple(fields)}')
    try:
        words = spoken_by(record, channel)
        content = {'text': lambda: text_tokens(words, vocab),
                   'speech': lambda: speech_tokens(_units_of(record, channel), vocab, dedup)}
        pieces = []
        for field, marker in zip(fields, names, strict=True):
            pieces.append(([vocab.specials[marker]], float('markers' in score)))
            pieces.append((content[field](), float(field in score)))
            if not len(pieces[-1][0]):
                raise ValueError(f'its {field} is empty')
    except ValueError as e:
        raise _named(record, e) from None
    return _assemble(record, vocab, pieces, end)


def interleave(record: Record, *, vocab: Vocab, rng: np.random.Generator,
               text_words: tuple[int, int] = (10, 30), speech_words: tuple[int, int] = (5, 15),
               unit_hz: float = 25.0, end: str = 'none', channel: int = 0,
               dedup: bool = True) -> Grid:
    """One utterance that keeps changing between being written and being spoken.

    ::

        <s> [Text] the cat [Speech] u3 u7 ... u200 [Text] the mat      (the units say "sat on")

    Spans of words alternate; which comes first and how many words each holds (uniform, both ends
    included) are drawn from `rng` at every call, so no two epochs cut a record alike (arXiv
    2402.05755 §3.1, App. A). A marker stands at every switch; every token but BOS has weight 1.

    A spoken span takes the runs of equal units that end within it. Between two words the border is
    the middle of their silence; the first span reaches back to the start of the recording and the
    last one on to its end. Thus a run that crosses a border belongs to the later span, and no unit
    is lost or said twice. A span so short that no run ends in it is written instead of spoken.
    """
    _check(vocab, end, channel)
    if not set(MARKERS.values()) <= set(vocab.specials):
        raise ValueError(f'flat.interleave needs {" and ".join(MARKERS.values())} in vocab.markers')
    for name, span in (('text_words', text_words), ('speech_words', speech_words)):
        if len(span) != 2 or not 1 <= span[0] <= span[1]:
            raise ValueError(f'layout.{name} must be (least, most) with 1 <= least <= most, got '
                             f'{tuple(span)}')
    try:
        words = spoken_by(record, channel)
        if not words:
            raise ValueError(f'no words on channel {channel}, nothing to interleave')
        units = _units_of(record, channel)
        values, ends = runs(units) if dedup else (units, np.arange(1, len(units) + 1))
        speech = vocab.encode('units', values)
        cuts = _cuts(words, ends, unit_hz)
        pieces, last = [], ''
        for kind, first, stop in _spans(len(words), rng, {'text': text_words,
                                                          'speech': speech_words}):
            if kind == 'speech' and cuts[first] == cuts[stop]:
                kind = 'text'
            if kind != last:
                pieces.append(([vocab.specials[MARKERS[kind]]], 1.0))
                last = kind
            tokens = (speech[cuts[first]:cuts[stop]] if kind == 'speech'
                      else text_tokens(words[first:stop], vocab))
            pieces.append((tokens, 1.0))
    except ValueError as e:
        raise _named(record, e) from None
    return _assemble(record, vocab, pieces, end)


def _named(record: Record, error: ValueError) -> ValueError:
    text = str(error)
    return error if f'record {record.id}' in text else ValueError(f'record {record.id}: {text}')


def _spans(words: int, rng: np.random.Generator, lengths: dict[str, tuple[int, int]]):
    """Draws alternating (kind, first word, word after the last) until all `words` are covered."""
    kind = ('text', 'speech')[rng.integers(2)]
    first, out = 0, []
    while first < words:
        stop = min(words, first + int(rng.integers(*lengths[kind], endpoint=True)))
        out.append((kind, first, stop))
        first, kind = stop, 'speech' if kind == 'text' else 'text'
    return out


def _cuts(words: Sequence[Word], ends: np.ndarray, unit_hz: float) -> np.ndarray:
    """[words + 1] run numbers: word w owns the runs cuts[w] .. cuts[w + 1] - 1, and all are owned.

    A run belongs to the word within whose borders it ends. (Cutting by two bisections, one for the
    first run and one for the last, would give a run that ends exactly on a border to both sides.)
    """
    middles = [(a.end_s + b.start_s) / 2 for a, b in zip(words[:-1], words[1:], strict=True)]
    # Rounding: times are stored in single precision, and 0.24 s must not become frame 5.9999.
    borders = np.maximum.accumulate(np.round(np.array(middles, np.float64) * unit_hz, 4))
    inner = np.searchsorted(ends, borders, side='right')
    return np.concatenate([[0], inner, [len(ends)]]).astype(int)

# SPDX-License-Identifier: Apache-2.0
"""Text and speech written into one row, so that a plain language model is a speech model.

A marker opens every stretch and says what follows: `[Text]` word pieces, `[Speech]` units. The
order of stretches is the task: speech alone, text then its audio, or one sentence that keeps
changing between being written and being spoken. Units that repeat are usually written once, so a
stretch of speech costs as many tokens as it has distinct sounds.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxsd.config import bind
from jaxsd.layout import spans as laws
from jaxsd.types import Grid, Record, Word
from jaxsd.vocab import Vocab

MARKERS = {'text': '[Text]', 'speech': '[Speech]'}
ENDS = ('none', 'eos')


class Piece(NamedTuple):
    """One stretch of a row: what kind of thing, whose or which, its ids and their weight."""

    kind: str               # text, speech, mark, field, label
    name: str
    tokens: np.ndarray
    weight: float


class Track(NamedTuple):
    """One stream of a channel's speech: ids on the line, when each begins and where it is cut.

    Times are in frames of the units. A border at frame b leaves what has `cut` <= b before it.
    """

    ids: np.ndarray
    begin: np.ndarray
    cut: np.ndarray


def runs(units) -> tuple[np.ndarray, np.ndarray]:
    """Runs of equal units [U]: each run's value, and the frame after its last one."""
    units = np.asarray(units)
    ends = np.append(np.flatnonzero(units[1:] != units[:-1]) + 1, units.size)
    ends = ends[:units.size]        # no unit, no run
    return units[ends - 1], ends


def _each(units, dedup: bool) -> tuple[np.ndarray, np.ndarray]:
    """`runs`, or every unit a run of its own."""
    return runs(units) if dedup else (np.asarray(units), np.arange(1, len(units) + 1))


def speech_tokens(units, vocab: Vocab, dedup: bool = True) -> np.ndarray:
    """Units [U] at the unit rate as ids on the line; `dedup` writes a run of equal units once."""
    return vocab.encode('units', _each(units, dedup)[0])


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


def units_of(record: Record, channel: int) -> np.ndarray:
    """The units [U] of one channel; those there are when the record has only one."""
    if not record.units:
        raise ValueError(f'record {record.id} has no units: a text-only record cannot fill a '
                         'speech field')
    if len(record.units) > 1 and not 0 <= channel < len(record.units):
        raise ValueError(f'record {record.id} has channels 0..{len(record.units) - 1}, no channel '
                         f'{channel}')
    return record.units[channel if len(record.units) > 1 else 0]


def tracks(record: Record, channel: int, vocab: Vocab, *, dedup: bool, unit_hz: float,
           sides: Sequence[tuple[str, float, bool]], within: tuple[float, float] | None
           ) -> list[Track]:
    """A channel's streams in the order in which those that begin together are written.

    sides: (name, rate in Hz, whether repeats are written once) of the slower streams that are told
    beside the units. within: seconds from the start of the recording; None is all.

    Units go to the stretch in which they end, so that one that crosses a border is the later one's;
    a side token, which may last a second, to the one in which it begins.
    """
    units = units_of(record, channel)
    if within is not None:
        units = units[_frame(within[0] * unit_hz):_frame(within[1] * unit_hz)]
    values, ends = _each(units, dedup)
    out = []
    for name, hz, once in sides:
        if name not in record.sides:
            raise ValueError(f'record {record.id} has no stream {name!r}: make the dataset with it '
                             'or leave it out of layout.sides')
        if name not in vocab.ranges:
            raise ValueError(f'layout.sides names {name!r}, which vocab.sides lacks')
        own = record.sides[name]
        own = own[channel if len(own) > 1 else 0]
        if within is not None:
            own = own[_frame(within[0] * hz):_frame(within[1] * hz)]
        ids, stops = _each(own, once)
        begin = np.concatenate([[0], stops[:-1]])[:len(ids)] * (unit_hz / hz)
        out.append(Track(vocab.encode(name, ids), begin, np.nextafter(begin, np.inf)))
    begin = np.concatenate([[0], ends[:-1]])[:len(ends)].astype(float)
    return [*out, Track(vocab.encode('units', values), begin, ends.astype(float))]


def _frame(frames: float) -> int:
    """A whole frame. Rounding: times are stored in single precision."""
    return max(0, round(frames))


def merged(parts: Sequence[Track], first: float = -np.inf, last: float = np.inf) -> np.ndarray:
    """What `parts` say between two borders, in frames of the units, in the order of time.

    What begins at once keeps the order of `parts` (arXiv 2402.05755 §3.2; spiritlm_tokenizer.py).
    """
    if len(parts) == 1:
        return parts[0].ids[slice(*np.searchsorted(parts[0].cut, [first, last], side='right'))]
    cut = [slice(*np.searchsorted(t.cut, [first, last], side='right')) for t in parts]
    ids = np.concatenate([t.ids[s] for t, s in zip(parts, cut, strict=True)])
    begin = np.concatenate([t.begin[s] for t, s in zip(parts, cut, strict=True)])
    return ids[np.argsort(np.round(begin, 4), kind='stable')]


def check_line(vocab: Vocab, end: str):
    """Raises ValueError for a vocabulary of streams and for an end that is none of ENDS."""
    if 'units' not in vocab.ranges:
        raise ValueError('a flat layout needs the vocabulary of vocab.line (text, markers, units)')
    if end not in ENDS:
        raise ValueError(f'layout.end must be one of {", ".join(ENDS)}, got {end!r}')


def _check(vocab: Vocab, end: str, channel: int):
    check_line(vocab, end)
    if channel not in (0, 1):
        raise ValueError(f'layout.channel is 0 or 1, one of the two of a dialogue, got {channel}')


def mark(vocab: Vocab, name: str, weight: float = 1.0) -> Piece:
    """A marker as a piece. Raises ValueError for one that the vocabulary lacks."""
    if name not in vocab.specials:
        raise ValueError(f'the layout needs {name} in vocab.markers')
    return Piece('mark', name, np.array([vocab.specials[name]], np.int32), weight)


def assemble(pieces: Sequence[Piece], vocab: Vocab, end: str = 'none') -> Grid:
    """BOS, then every piece, then perhaps EOS with the last one's weight."""
    pieces = [mark(vocab, 'bos', 0.0), *pieces]
    if end == 'eos':
        pieces.append(mark(vocab, 'eos', pieces[-1].weight))
    weights = np.repeat(np.array([p.weight for p in pieces], np.float32),
                        [len(p.tokens) for p in pieces])
    return Grid.of(np.concatenate([p.tokens for p in pieces]), weights)


def named(record: Record, error: ValueError) -> ValueError:
    """`error` with the record in its text."""
    text = str(error)
    return error if f'record {record.id}' in text else ValueError(f'record {record.id}: {text}')


def sequence(record: Record, *, vocab: Vocab, rng: np.random.Generator,
             fields: Sequence[str] = ('speech',),
             score: Sequence[str] = ('text', 'speech', 'markers'),
             markers: Sequence[str] = (), end: str = 'none', channel: int = 0,
             dedup: bool = True, unit_hz: float | None = None, sides: Sequence = ()) -> Grid:
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

    `sides` tells slower streams beside the units, by time (see `tracks`), for which `unit_hz` must
    say how fast the units are::

        (('style', 1.0, False), ('pitch', 12.5, True))    <s> [Speech] St9 Pi1 Hu5 Hu6 Hu7 Pi2

    Nothing is drawn: `rng` is there because every layout receives one. A dialogue is written from
    one `channel`. Raises ValueError when a field has nothing to be filled with.
    """
    _check(vocab, end, channel)
    if not fields or not set(fields) <= set(MARKERS):
        raise ValueError(f'layout.fields must name fields among text, speech; got {tuple(fields)}')
    if not set(score) <= {*MARKERS, 'markers'}:
        raise ValueError('layout.score must name things among text, speech, markers; got '
                         f'{tuple(score)}')
    if sides and not unit_hz:
        raise ValueError('layout.sides are told beside the units by time: say layout.unit_hz')
    names = tuple(markers) or tuple(MARKERS[field] for field in fields)
    if len(names) != len(fields) or not set(names) <= set(vocab.specials):
        raise ValueError(f'layout.markers must name one marker of vocab.markers per field, got '
                         f'{names} for {tuple(fields)}')
    try:
        words = spoken_by(record, channel)
        content = {'text': lambda: text_tokens(words, vocab),
                   'speech': lambda: merged(tracks(record, channel, vocab, dedup=dedup,
                                                   unit_hz=unit_hz or 1.0, sides=sides,
                                                   within=None))}
        pieces = []
        for field, marker in zip(fields, names, strict=True):
            pieces.append(mark(vocab, marker, float('markers' in score)))
            pieces.append(Piece(field, '', content[field](), float(field in score)))
            if not len(pieces[-1].tokens):
                raise ValueError(f'its {field} is empty')
    except ValueError as e:
        raise named(record, e) from None
    return assemble(pieces, vocab, end)


def interleave(record: Record, *, vocab: Vocab, rng: np.random.Generator, level: str = 'word',
               text_words: tuple[int, int] = (10, 30), speech_words: tuple[int, int] = (5, 15),
               spans: dict | None = None, again: float = 0.0, relations: Sequence[str] = (),
               segment_s: float = 10.0, unit_hz: float = 25.0, end: str = 'none', channel: int = 0,
               dedup: bool = True, sides: Sequence = ()) -> Grid:
    """One utterance that keeps changing between being written and being spoken.

    ::

        <s> [Text] the cat [Speech] u3 u7 ... u200 [Text] the mat      (the units say "sat on")

    Spans of words alternate; which comes first and how many words each holds (uniform, both ends
    included) are drawn from `rng` at every call, so no two epochs cut a record alike (arXiv
    2402.05755 §3.1, App. A). A marker stands at every switch; every token but BOS has weight 1.

    `level` is the finest place for a switch: 'word', 'phone', 'utterance' (a turn), or 'segment'
    (about `segment_s` long, drawn anew, snapped to words; see `spans.segments`). Phones are written
    as markers of the vocabulary (`spelled`), one for each. `spans` names another law of spans than
    alternation, such as dict(name='poisson', mean=10.0, share=0.3); see `layout.spans`.

    The relation of neighbors is continuation: what follows goes on. With probability `again` a span
    is followed by the same span in the other modality, a correspondence. `relations` names two
    markers that say which it is, and then no marker names the modality (arXiv 2402.05706 §3.1)::

        <s> a1 a2 <|continue|> how are you <|correspond|> b1 b2 </s>

    The first stands where a span begins in another modality than the last thing written.

    A spoken span takes the runs of equal units that end within it. Between two words the border is
    the middle of their silence; the first span reaches back to the start of the recording and the
    last one on to its end. Thus a run that crosses a border belongs to the later span, and no unit
    is lost or said twice. A span so short that no run ends in it is written instead of spoken.
    """
    _check(vocab, end, channel)
    _check_interleave(vocab, text_words, speech_words, again, relations)
    law = _law(**spans or dict(name='uniform', text=tuple(text_words), speech=tuple(speech_words)))
    try:
        words = spoken_by(record, channel)
        if not words:
            raise ValueError(f'no words on channel {channel}, nothing to interleave')
        parts = tracks(record, channel, vocab, dedup=dedup, unit_hz=unit_hz, sides=sides,
                       within=None)
        frames = len(units_of(record, channel))
        words, firsts = laws.atoms(record, words, channel, level, rng, frames=frames,
                                   unit_hz=unit_hz, segment_s=segment_s)
        if level == 'phone':
            words = tuple(w._replace(ids=(int(mark(vocab, spelled(w.text)).tokens[0]),))
                          for w in words)
        borders = laws.borders(words, unit_hz)
        pieces, last = [], ''
        for kind, first, stop in law(len(firsts) - 1, rng):
            first, stop = firsts[first], firsts[stop]
            order = ['text', 'speech'] if kind == 'text' else ['speech', 'text']
            if not (again and rng.random() < again):
                del order[1]
            said = [(now, _written(words[first:stop], vocab, level) if now == 'text' else
                     merged(parts, borders[first], borders[stop])) for now in order]
            said = [(now, ids) for now, ids in said if len(ids)] or [
                ('text', _written(words[first:stop], vocab, level))]
            for i, (now, ids) in enumerate(said):
                if relations and (i or last not in ('', now)):
                    pieces.append(mark(vocab, relations[i]))
                elif not relations and now != last:
                    pieces.append(mark(vocab, MARKERS[now]))
                pieces.append(Piece(now, '', ids, 1.0))
                last = now
    except ValueError as e:
        raise named(record, e) from None
    return assemble(pieces, vocab, end)


@functools.lru_cache
def _law(**spans):
    return bind(spans, 'jaxsd.layout.spans', 'layout.spans')


def spelled(phone: str) -> str:
    """The marker that writes a phone: /p/, without its stress."""
    return f'/{phone.lstrip("ˈˌ")}/'


def _written(words: Sequence[Word], vocab: Vocab, level: str) -> np.ndarray:
    """Words by their pieces; phones are markers already, whose ids are ids on the line."""
    if level == 'phone':
        return np.array([i for word in words for i in word.ids], np.int32)
    return text_tokens(words, vocab)


def _check_interleave(vocab: Vocab, text_words, speech_words, again: float, relations):
    needed = relations or MARKERS.values()
    if not set(needed) <= set(vocab.specials):
        raise ValueError(f'flat.interleave needs {" and ".join(needed)} in vocab.markers')
    if len(relations) not in (0, 2):
        raise ValueError('layout.relations names two markers, of continuation and of '
                         f'correspondence, got {tuple(relations)}')
    if not 0 <= again <= 1:
        raise ValueError(f'layout.again is a probability, got {again}')
    for name, span in (('text_words', text_words), ('speech_words', speech_words)):
        if len(span) != 2 or not 1 <= span[0] <= span[1]:
            raise ValueError(f'layout.{name} must be (least, most) with 1 <= least <= most, got '
                             f'{tuple(span)}')

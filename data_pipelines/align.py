# SPDX-License-Identifier: Apache-2.0
"""When was each word said? Forced alignment of speech with its transcript, by pocketsphinx.

Its English acoustic model and a dictionary of 134,860 words come inside the wheel. A first pass
finds the words on a grid of 10 ms, a second one the phones. On synthesized speech, whose own
events tell the truth, word onsets are 11 to 15 ms off on average.
"""

import functools
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.judge import SAMPLE_RATE_HZ, to_int16, words_of

# Clean synthesized speech does not align at all: its silence is all zeros. Noise of five steps or
# more and a third of a second of it on both sides cure that; wider beams than the default do not.
_NOISE, _PAD_S = 20.0, 0.3
_FRAME_S = 0.01
PHONES = ('AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH '
           'UW V W Y Z ZH').split()
MAX_S = 300.0           # longer utterances are refused: time and memory grow with length x words


class Aligned(NamedTuple):
    """Words and phones (ARPAbet) as (text, start_s, end_s), in the order they were said."""

    words: tuple[tuple[str, float, float], ...]
    phones: tuple[tuple[str, float, float], ...]


def identity() -> dict:
    """What a dataset's manifest says about where its times come from."""
    return {'name': 'pocketsphinx', 'version': importlib.metadata.version('pocketsphinx'),
            'kind': 'forced alignment', 'resolution_s': _FRAME_S}


@functools.lru_cache(maxsize=1)
def _decoder():
    import pocketsphinx
    decoder = pocketsphinx.Decoder(lm=None, samprate=float(SAMPLE_RATE_HZ), loglevel='FATAL')
    for i, phone in enumerate(PHONES):     # every phone is also a word: see `align`
        decoder.add_word(f'@{phone.lower()}', phone, i == len(PHONES) - 1)
    return decoder


def unknown(words: Sequence[str]) -> list[str]:
    """The words, as the dictionary would spell them, that it does not hold."""
    decoder = _decoder()
    return sorted({w for word in words for w in words_of(word) if decoder.lookup_word(w) is None})


def _pass(decoder, sound: bytes, words: Sequence[str]) -> list[tuple[str, int, int]]:
    """(word, first frame, frame after the last) of an alignment; pauses and noises left out."""
    decoder.reinit_feat()       # else its noise estimate, and so times, depend on the last sound
    # Without a pause to end in, the path often stops short of the last word or phone.
    decoder.set_align_text(' '.join([*words, '<sil>']))
    decoder.start_utt()
    decoder.process_raw(sound, False, True)
    try:
        decoder.end_utt()
    except RuntimeError:                    # the search died before the end
        return []
    # Fields are copied while iterating: the objects do not outlive the iterator.
    found = [(s.word, s.start_frame, s.end_frame + 1) for s in decoder.seg() or ()]
    return [s for s in found if not s[0].startswith(('<', '[', '+'))]


def align(wav: np.ndarray, words: Sequence[str], *, phones: bool = True,
          pronunciations: Mapping[str, str] = {}) -> Aligned:
    """Word and phone times of `words` in `wav` (float [S] at 16 kHz).

    Words keep their spelling; one that is written together but spoken as several ('twenty-one') is
    one word, and one that is nothing but punctuation is left out. `pronunciations` adds words in
    ARPAbet. `phones` are left empty when they are not wanted or the second pass finds no path.
    Raises ValueError when a word has no pronunciation (all of them are named), when there is
    nothing to align, and when the sound does not fit the words.
    """
    decoder = _decoder()
    for word, said in pronunciations.items():
        if decoder.lookup_word(word) is None:
            decoder.add_word(word, said, True)
    spelled = [(word, words_of(word)) for word in words]
    spelled = [(word, parts) for word, parts in spelled if parts]
    if not spelled:
        raise ValueError('the transcript has no words')
    if missing := unknown(words):
        raise ValueError(f'{len(missing)} words are not in the pronouncing dictionary: '
                         f'{", ".join(missing[:10])} (give their pronunciations)')
    duration_s = len(wav) / SAMPLE_RATE_HZ
    if not 0 < duration_s <= MAX_S:
        raise ValueError(f'{duration_s:.1f} s of audio cannot be aligned in one piece '
                         f'(0..{MAX_S:g} s)')
    sound = to_int16(wav, 0, noise=_NOISE, pad_s=_PAD_S).tobytes()

    def time_s(frame: int) -> float:
        return min(max(frame * _FRAME_S - _PAD_S, 0.0), duration_s)

    asked = [part for _, parts in spelled for part in parts]
    found = _pass(decoder, sound, asked)
    if [name.partition('(')[0] for name, _, _ in found] != asked:
        raise ValueError('the sound does not fit the transcript: the aligner found no path')
    timed, i = [], 0
    for word, parts in spelled:
        timed.append((word, time_s(found[i][1]), time_s(found[i + len(parts) - 1][2])))
        i += len(parts)
    if not phones:
        return Aligned(tuple(timed), ())

    # The library's own second pass lost every fourth utterance, so the phones of the pronunciations
    # that were chosen are aligned as if they were words.
    asked = [phone for name, _, _ in found for phone in decoder.lookup_word(name).split()]
    said = _pass(decoder, sound, [f'@{phone.lower()}' for phone in asked])
    if [name for name, _, _ in said] != [f'@{phone.lower()}' for phone in asked]:
        return Aligned(tuple(timed), ())
    return Aligned(tuple(timed), tuple(
        (phone, time_s(a), time_s(b)) for phone, (_, a, b) in zip(asked, said, strict=True)))

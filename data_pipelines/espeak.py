# SPDX-License-Identifier: Apache-2.0
"""Real synthesized speech with true word and phone times, from eSpeak NG through ctypes.

The pip package `espeakng-loader` carries the shared library and its voices (GPL-3.0, so it is an
optional extra and is only loaded when something is spoken). The synthesizer announces every word
and phone as it makes it, so the times are the truth and not an alignment.

Two things about the engine shape this module. English rules fuse pairs such as "in the" into one
word event, unless the words are joined by no-break spaces. And the engine does not repeat itself
within a process: the same text spoken twice differs by a few samples. A fresh process that makes
the same calls in the same order does repeat itself exactly, so a corpus that must be reproducible
speaks every shard in a process of its own. The voices whose file has a line `breath` (f2, f3, f5,
whisper and a few more) never repeat themselves, not even so: use others.
"""

import ctypes
import functools
import re
from typing import NamedTuple

import numpy as np

SAMPLE_RATE_HZ = 16000
PAUSE_S = 0.25
"""Silence between two sentences of one text."""

_ENGINE_RATE_HZ = 22050
_WORD, _END, _PHONE = 1, 5, 7
_ONES = ('zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen '
         'fifteen sixteen seventeen eighteen nineteen').split()
_TENS = 'twenty thirty forty fifty sixty seventy eighty ninety'.split()


class Spoken(NamedTuple):
    """float32 samples at 16 kHz in -1..1; words and phones as (text, start_s, end_s)."""

    wav: np.ndarray
    words: list[tuple[str, float, float]]
    phones: list[tuple[str, float, float]]


class _Name(ctypes.Union):
    _fields_ = [('number', ctypes.c_int), ('name', ctypes.c_char_p), ('string', ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [('type', ctypes.c_int), ('unique', ctypes.c_uint), ('text_position', ctypes.c_int),
                ('length', ctypes.c_int), ('audio_position_ms', ctypes.c_int),
                ('sample', ctypes.c_int), ('user', ctypes.c_void_p), ('id', _Name)]


class _Engine(NamedTuple):
    library: ctypes.CDLL
    callback: object            # held here: the engine calls it after this scope has gone
    chunks: list                # int16 arrays of the utterance in progress
    events: list                # (type, text_position, sample, name) of the utterance in progress


@functools.cache
def _engine() -> _Engine:
    """The one engine of this process, started on first use. Raises ValueError when absent."""
    try:
        import espeakng_loader
        library = ctypes.CDLL(espeakng_loader.get_library_path())
    except (ImportError, OSError) as e:
        raise ValueError(f'eSpeak NG is not usable ({e}): pip install espeakng-loader') from e
    data = espeakng_loader.get_data_path().encode()
    synchronous, phone_events_in_ipa = 2, 3
    if library.espeak_Initialize(synchronous, 0, data, phone_events_in_ipa) != _ENGINE_RATE_HZ:
        raise ValueError('eSpeak NG did not start: its data folder may be damaged; reinstall '
                         'espeakng-loader')
    chunks, events = [], []

    def receive(samples, count, event):
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while event[i].type:
            e = event[i]
            # The name may fill all eight bytes without a terminator, so read the bytes themselves.
            name = ctypes.string_at(ctypes.addressof(e.id), 8).split(b'\0')[0]
            kind = e.type
            events.append((kind, e.text_position, e.sample,
                           name.decode('utf-8', 'ignore') if kind == _PHONE else ''))
            i += 1
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int,
                                ctypes.POINTER(_Event))(receive)
    library.espeak_SetSynthCallback(callback)
    return _Engine(library, callback, chunks, events)


def spell(number: int) -> str:
    """The English words of 0..9999, such as 'two hundred seven'. Raises ValueError outside."""
    if not 0 <= number <= 9999:
        raise ValueError(f'can spell 0..9999, got {number}')
    if number < 20:
        return _ONES[number]
    for size, name in ((1000, 'thousand'), (100, 'hundred')):
        if number >= size:
            head, rest = divmod(number, size)
            return f'{spell(head)} {name}' + (f' {spell(rest)}' if rest else '')
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f' {_ONES[ones]}' if ones else '')


def normalize(text: str) -> list[str]:
    """`text` as sentences of lower-case words; each ends in '.', '?' or '!', commas may stand.

    Numbers are spelled out, so that what is written is what is said, word for word.
    Raises ValueError for text without words and for characters that have no spoken form here.
    """
    text = re.sub(r'\d+', lambda m: f' {spell(int(m[0]))} ', text.lower())
    text = text.replace('’', "'").replace('-', ' ')
    odd = sorted(set(re.findall(r"[^a-z' .,?!\n\t]", text)))
    if odd:
        raise ValueError(f'cannot speak {"".join(odd)!r} in {text!r}: write it as words')
    sentences = []
    for piece in re.findall(r'[^.?!]+[.?!]?', text):
        mark = piece[-1] if piece[-1] in '.?!' else '.'
        body = ' '.join(piece.rstrip('.?!').replace(' ,', ',').split()).strip(' ,')
        if re.search('[a-z]', body):
            sentences.append(body + mark)
    if not sentences:
        raise ValueError(f'no words in {text!r}')
    return sentences


def _synthesize(sentence: str):
    """int16 samples at the engine's rate, and words and phones in seconds, of one sentence."""
    engine = _engine()
    engine.chunks.clear()
    engine.events.clear()
    # No-break spaces inside a phrase stop the engine from fusing words; commas still pause.
    joined = sentence.replace(' ', '\u00a0').replace(',\u00a0', ', ')
    data = joined.encode()
    utf8 = 1
    if engine.library.espeak_Synth(data, len(data) + 1, 0, 1, 0, utf8, None, None) != 0:
        raise ValueError(f'eSpeak NG refused {sentence!r}')
    engine.library.espeak_Synchronize()
    wav = np.concatenate(engine.chunks) if engine.chunks else np.zeros(0, np.int16)
    events = [e for e in engine.events if e[0] in (_WORD, _PHONE, _END)]

    # Text positions are 1-based characters: map each to the written word that covers it.
    tokens = [(m.start() + 1, m[0]) for m in re.finditer(r"[a-z']+", joined)]
    owner = {}
    for i, (start, token) in enumerate(tokens):
        for at in range(start, start + len(token)):
            owner[at] = i
    onsets = {}
    for kind, position, sample, _ in events:
        if kind == _WORD and position in owner:
            onsets.setdefault(owner[position], sample)
    missing = [token for i, (_, token) in enumerate(tokens) if i not in onsets]
    if missing:
        raise ValueError(f'eSpeak NG gave no time for {missing} in {sentence!r}')
    timed = [(kind, sample, name) for kind, _, sample, name in events if kind != _WORD]
    pauses = [sample for kind, sample, name in timed if kind == _END or not name.strip('_:')]
    phones = []
    for i, (kind, sample, name) in enumerate(timed):
        if kind == _PHONE and name.strip('_:'):
            end = min(timed[i + 1][1] if i + 1 < len(timed) else len(wav), len(wav))
            if end > sample:            # some are announced and then swallowed, as the l of "table"
                phones.append((name, sample, end))
    words = []
    for i, (_, token) in enumerate(tokens):
        start = onsets[i]
        ends = [onsets[i + 1]] if i + 1 < len(tokens) else [len(wav)]
        ends += [p for p in pauses if p > start]
        words.append((token, start, min([*ends, len(wav)])))
    return wav, words, phones


def speak(text: str, *, voice: str, rate_wpm: int = 175, pitch: int = 50,
          pitch_range: int = 50) -> Spoken:
    """`text` in the given voice, with the times of its words and phones.

    voice: an eSpeak NG voice, such as 'en-us' or 'en-us+m3'. rate_wpm: 80..450 words a minute.
    pitch, pitch_range: 0..99. Raises ValueError for an unknown voice or unspeakable text.
    """
    import soxr  # a polyphase resampler that loads in milliseconds, once per shard

    if not (80 <= rate_wpm <= 450 and 0 <= pitch <= 99 and 0 <= pitch_range <= 99):
        raise ValueError(f'rate_wpm must lie in 80..450 and pitch, pitch_range in 0..99, got '
                         f'{rate_wpm}, {pitch}, {pitch_range}')
    sentences = normalize(text)
    library = _engine().library
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f'eSpeak NG has no voice {voice!r}')
    for parameter, value in ((1, rate_wpm), (3, pitch), (4, pitch_range)):
        library.espeak_SetParameter(parameter, int(value), 0)
    wavs, words, phones, offset = [], [], [], 0
    for i, sentence in enumerate(sentences):
        if i:
            silence = np.zeros(int(PAUSE_S * _ENGINE_RATE_HZ), np.int16)
            wavs.append(silence)
            offset += len(silence)
        wav, some_words, some_phones = _synthesize(sentence)
        wavs.append(wav)
        for out, items in ((words, some_words), (phones, some_phones)):
            out += [(name, (start + offset) / _ENGINE_RATE_HZ, (end + offset) / _ENGINE_RATE_HZ)
                    for name, start, end in items]
        offset += len(wav)
    wav = np.concatenate(wavs).astype(np.float32) / 32768
    return Spoken(soxr.resample(wav, _ENGINE_RATE_HZ, SAMPLE_RATE_HZ), words, phones)

# SPDX-License-Identifier: Apache-2.0
"""Talking while listening: sound comes in pieces of any size, and what I say goes out at once.

An `Ear` turns pieces into codes, a room answers a frame (or, in layouts of chunks, a chunk of
frames) with as much, a `Voice` turns codes into sound; a `Talk` is ear, voice and words of one
listener. Nothing here grows with the length of a conversation.
"""

import threading
import time
from collections.abc import Callable

import jax
import numpy as np

from jaxsd import dialogue, generate, trained
from jaxsd.codec import Codec
from jaxsd.config import ConfigError
from jaxsd.types import NOTHING

REACH_S = 0.027     # past a frame that the fitted codecs hear: half a window less half a hop
CONTEXT = 2         # frames before the newest that are decoded with them
FADE_S = 0.02       # over which decoded pieces are joined
SHIFT_S = 0.005     # by which they are moved to fit


class Ear:
    """Pieces of sound to codes, a frame behind by `REACH_S`: what the codec makes of the whole."""

    def __init__(self, codec: Codec):
        self._codec = codec
        self._frame = round(codec.identity['sample_rate_hz'] / codec.identity['frame_hz'])
        self._reach = round(REACH_S * codec.identity['sample_rate_hz'])
        # A frame of silence before the first, so that all have neighbors; then the reach.
        self._held = np.zeros(self._frame + self._reach, np.float32)

    def push(self, wav: np.ndarray) -> list[np.ndarray]:
        """Codes [books] of the frames that `wav` [S] completes."""
        self._held = np.concatenate([self._held, np.asarray(wav, np.float32)])
        out = []
        while len(self._held) >= 2 * self._frame + self._reach:
            codes = self._codec.encode(self._held[:2 * self._frame + self._reach])
            out.append(codes[:, 1])
            self._held = self._held[self._frame:]
        return out


class Voice:
    """Codes to sound, piece by piece: each is decoded behind the two frames before it, moved by up
    to 5 ms to where it fits what was said last, and faded in over 20 ms (as WSOLA joins pieces)."""

    def __init__(self, codec: Codec):
        rate = codec.identity['sample_rate_hz']
        self._codec, self._before = codec, None
        self._frame = round(rate / codec.identity['frame_hz'])
        self._fade, self._shift = round(FADE_S * rate), round(SHIFT_S * rate)
        self._tail = np.zeros(self._fade, np.float32)
        self._up = np.linspace(0, 1, self._fade, dtype=np.float32)

    def push(self, codes: np.ndarray) -> np.ndarray:
        """The next sound, float32 [S], of codes [books, n], NOTHING where it is silent; 25 ms of it
        are still held."""
        if self._before is None:
            self._before = np.repeat(codes[:, :1], CONTEXT, 1)
        codes = np.concatenate([self._before, codes], 1)
        self._before = codes[:, -CONTEXT:]
        wav = self._codec.decode(np.maximum(codes, 0))
        wav = wav * np.repeat(codes[0] != NOTHING, self._frame)
        size = len(wav) - CONTEXT * self._frame
        at = len(wav) - size - self._fade - self._shift
        shifts = range(-self._shift, self._shift + 1)
        pieces = np.lib.stride_tricks.sliding_window_view(
            wav[at - self._shift:at + self._shift + self._fade], self._fade)
        fit = pieces @ self._tail / np.sqrt(np.sum(np.square(pieces), 1) + 1e-6)
        at += shifts[int(np.argmax(fit))] if self._tail.any() else 0
        out = wav[at:at + size].copy()
        out[:self._fade] = self._up * out[:self._fade] + (1 - self._up) * self._tail
        self._tail = wav[at + size:at + size + self._fade].copy()
        return out


# Rooms: who is answered frame by frame, who chunk by chunk.

class _Columns:
    """Conversations whose rows are streams, a frame at a time: one dispatch answers all."""

    chunk = 1

    def __init__(self, lm: trained.LM, layout: dict, *, slots: int, samplers: dict, key):
        late = dialogue.delays(lm, layout)
        self.answers = self.least = 1 + max(late)
        self.rest = 2
        self._vocab, self._writes = lm.vocab, dialogue.writes(layout, lm.vocab)
        self._room = generate.Room(lm.speaker(samplers), late, slots=slots,
                                   columns=lm.config.columns, key=key)
        self.begin = self._room.begin

    def step(self, heard: dict[int, np.ndarray]) -> dict[int, tuple]:
        said = self._room.step({slot: codes[:, 0] for slot, codes in heard.items()})
        return {slot: (dialogue.local(self._vocab, rows), rows[0] if self._writes else None)
                for slot, rows in said.items()}


class _Chunks:
    """Conversations in one row each, a chunk of frames at a time, one after the other."""

    def __init__(self, lm: trained.LM, layout: dict, *, slots: int, samplers: dict, key):
        self.chunk = layout['chunk_frames']
        # Who speaks a chunk ahead answers after another one.
        self.answers = self.chunk * (1 if layout['name'] == 'chunks.flattened' else 2)
        self.rest, self.least = max(2, self.chunk), self.chunk
        self._lm, self._layout, self._speaker = lm, layout, lm.speaker(samplers)
        self._key, self._begun = key, 0
        self._talks, self._ahead = [None] * slots, [None] * slots

    def begin(self, slot: int) -> None:
        self._begun += 1
        self._talks[slot] = dialogue.by_chunks(self._lm, self._speaker, self._layout,
                                               jax.random.fold_in(self._key, self._begun))
        self._ahead[slot] = next(self._talks[slot])

    def step(self, heard: dict[int, np.ndarray]) -> dict[int, tuple]:
        out = {}
        for slot, codes in heard.items():
            said, line = self._talks[slot].send(codes)
            if self._ahead[slot] is not None:
                said, self._ahead[slot] = np.concatenate([self._ahead[slot], said], 1), None
            out[slot] = said, line
        return out


def room(lm: trained.LM, *, slots: int, samplers: dict, seed: int = 0) -> _Columns | _Chunks:
    """A room for `slots` conversations, compiled. Raises ConfigError for other layouts.

    begin(slot): the next that is heard there is the first of a new conversation.
    step: hears codes [books, chunk] in each of some slots; says, where delays allow, codes of mine
    [books, n] and the ids of its text [n] (None where none is written), on from what it said last.
    chunk, answers: frames of an exchange, and those after which what is said can be an answer.
    least, rest: frames that a conversation has to have, and of silence after which everything is
    answered, for the ear is up to two behind.
    """
    layout = dialogue.own_layout(lm)
    if layout['name'] not in dialogue.LAYOUTS:
        raise ConfigError(f'{layout["name"]} holds no two speakers who talk; '
                          f'{", ".join(dialogue.LAYOUTS)} do')
    if lm.config.codec.name == 'mimi':
        raise ConfigError('codec mimi is not heard frame by frame here; give --input a whole file')
    made = (_Columns if layout['name'].startswith('duplex.') else _Chunks)(
        lm, layout, slots=slots, samplers=samplers, key=jax.random.key(seed))
    made.begin(0)
    quiet = np.zeros((lm.config.codec.get('codebooks', 1), made.chunk), np.int64)
    for _ in range(3):      # compiles, for what comes first and for what comes after a step
        made.step({0: quiet})
    made.begin(0)
    return made


class Talk:
    """One conversation: `hear` pieces of sound, and get sound and words back."""

    def __init__(self, lm: trained.LM, codec: Codec, chunk: int):
        self._vocab, self._text = lm.vocab, lm.text() if lm.vocab.tokenizer else None
        self._ear, self._voice = Ear(codec), Voice(codec)
        self.hz, self._chunk = codec.identity['frame_hz'], chunk
        self._heard: list[np.ndarray] = []
        self._tokens = 0
        self._word: list[int] = []
        self._began = 0

    def hear(self, wav: np.ndarray) -> list[np.ndarray]:
        """Codes [books, chunk] of the chunks that `wav` completes, for a room's `step`."""
        self._heard += self._ear.push(wav)
        whole = len(self._heard) - len(self._heard) % self._chunk
        done, self._heard = self._heard[:whole], self._heard[whole:]
        return [np.stack(done[i:i + self._chunk], 1) for i in range(0, whole, self._chunk)]

    def say(self, codes: np.ndarray, line: np.ndarray | None
            ) -> tuple[np.ndarray, list[tuple[float, str]]]:
        """What a room said, as sound and as the words that are complete, with their times in
        seconds."""
        words = [] if line is None else [word for token in line for word in self._written(token)]
        return self._voice.push(codes), words

    def _written(self, token: int) -> list[tuple[float, str]]:
        """A word is complete when another one begins, or padding follows: who listens along cannot
        know that it will go on after a pause, and hears the rest as a word of its own."""
        now, done = self._tokens, []
        self._tokens += 1
        if token == NOTHING:        # where a chunk's text has no place
            return []
        found = trained.words_at(self._vocab, self._text, np.array([token]))
        piece = int(token) - self._vocab.ranges['text'][0]
        if self._word and (not found or self._text.piece(piece).startswith('\u2581')):
            done = self.last()
        if found:
            if not self._word:
                self._began = now
            self._word.append(piece)
        return done

    def last(self) -> list[tuple[float, str]]:
        """The word that is being written: complete when nothing comes any more."""
        word, self._word = self._word, []
        return [(self._began / self.hz, self._text.decode(word))] if word else []


def stream(lm: trained.LM, codec: Codec, one: _Columns | _Chunks, pieces,
           say: Callable[[np.ndarray, list[tuple[float, str]]], None]) -> dict[str, float]:
    """Talks in slot 0 of a room to `pieces` of sound until they end; `say` gets sound and words.

    Returns first_audio_ms, from the first sample heard to the first one said that may answer it,
    were the pieces to come in real time, and real_time_factor: seconds of work per second of sound.
    """
    talk = Talk(lm, codec, one.chunk)
    work_s, first_s, heard, frame_s = 0.0, 0.0, 0, 1 / talk.hz
    for piece in pieces:
        start = time.perf_counter()
        for codes in talk.hear(piece):
            heard += one.chunk
            for said in one.step({0: codes}).values():
                say(*talk.say(*said))
            if heard <= one.answers:
                first_s = time.perf_counter() - start
        work_s += time.perf_counter() - start
    if words := talk.last():
        say(np.zeros(0, np.float32), words)
    first_ms = 1000 * (one.answers * frame_s + REACH_S + FADE_S + SHIFT_S + first_s)
    return dict(first_audio_ms=first_ms if heard >= one.answers else float('nan'), frames=heard,
                real_time_factor=work_s / max(heard * frame_s, 1e-9))


class Stopped(Exception):
    """Nobody is heard any more."""


class Lobby:
    """Who talks in which slot of a room: several listeners, one dispatch for all who wait.

    Threads of listeners `enter`, `hear` and `leave`; one thread runs `serve`.
    """

    def __init__(self, lm: trained.LM, codec: Codec, *, slots: int, samplers: dict, seed: int = 0):
        self.room = room(lm, slots=slots, samplers=samplers, seed=seed)
        self._lm, self._codec, self.slots = lm, codec, slots
        self._lock = threading.Condition()
        self._free = list(range(slots))
        self._waiting: dict[int, np.ndarray] = {}
        self._answers: dict[int, tuple | None] = {}
        self._over = False

    @property
    def free(self) -> int:
        return len(self._free)

    def enter(self) -> tuple[int, Talk] | None:
        """A slot and its conversation, or None when all are taken."""
        with self._lock:
            if not self._free:
                return None
            slot = self._free.pop(0)
            self.room.begin(slot)
            return slot, Talk(self._lm, self._codec, self.room.chunk)

    def leave(self, slot: int) -> None:
        with self._lock:
            self._waiting.pop(slot, None)
            self._answers.pop(slot, None)
            self._free.append(slot)

    def hear(self, slot: int, codes: np.ndarray) -> tuple | None:
        """What a room says to what is heard, once everybody was. Raises Stopped when nothing is
        stepped any more."""
        with self._lock:
            self._waiting[slot] = codes
            self._lock.notify_all()
            self._lock.wait_for(lambda: slot in self._answers or self._over)
            if slot not in self._answers:
                raise Stopped('the model has stopped')
            return self._answers.pop(slot)

    def serve(self) -> None:
        """Steps the room whenever somebody waits, until `close`."""
        try:
            while True:
                with self._lock:
                    self._lock.wait_for(lambda: self._waiting or self._over)
                    if self._over:
                        return
                    heard, self._waiting = self._waiting, {}
                    said = self.room.step(heard)
                    self._answers |= {slot: said.get(slot) for slot in heard}
                    self._lock.notify_all()
        finally:
            self.close()        # nobody waits for what will not come

    def close(self) -> None:
        with self._lock:
            self._over = True
            self._lock.notify_all()

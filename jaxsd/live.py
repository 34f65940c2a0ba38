# SPDX-License-Identifier: Apache-2.0
"""Talking frame by frame: sound comes in pieces of any size, and what I say goes out at once.

An `Ear` turns pieces into codes, `generate.Room` answers a frame with a frame, a `Voice` turns
codes into sound; a `Talk` is the three of them for one listener. Nothing here grows with the length
of a conversation.
"""

import threading
import time
from collections.abc import Callable

import jax
import numpy as np

from jaxsd import generate, trained
from jaxsd.codec import Codec
from jaxsd.config import ConfigError, plain

REACH_S = 0.027     # past a frame that the fitted codecs hear: half a window less half a hop
CONTEXT = 2         # frames before the newest that are decoded with it
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
    """Codes to sound, frame by frame: each is decoded behind the two before it, moved by up to 5 ms
    to where it fits what was said last, and faded in over 20 ms (as WSOLA joins pieces)."""

    def __init__(self, codec: Codec):
        rate = codec.identity['sample_rate_hz']
        self._codec, self._codes = codec, None
        self._frame = round(rate / codec.identity['frame_hz'])
        self._fade, self._shift = round(FADE_S * rate), round(SHIFT_S * rate)
        self._tail = np.zeros(self._fade, np.float32)
        self._up = np.linspace(0, 1, self._fade, dtype=np.float32)

    def push(self, codes: np.ndarray) -> np.ndarray:
        """The next frame of sound, float32 [S], of codes [books]; 25 ms of it are still held."""
        now = np.asarray(codes)[:, None]
        self._codes = (np.repeat(now, CONTEXT + 1, 1) if self._codes is None else
                       np.concatenate([self._codes[:, 1:], now], 1))
        wav = self._codec.decode(self._codes)
        at = len(wav) - self._frame - self._fade - self._shift
        shifts = range(-self._shift, self._shift + 1)
        pieces = np.lib.stride_tricks.sliding_window_view(
            wav[at - self._shift:at + self._shift + self._fade], self._fade)
        fit = pieces @ self._tail / np.sqrt(np.sum(np.square(pieces), 1) + 1e-6)
        at += shifts[int(np.argmax(fit))] if self._tail.any() else 0
        out = wav[at:at + self._frame].copy()
        out[:self._fade] = self._up * out[:self._fade] + (1 - self._up) * self._tail
        self._tail = wav[at + self._frame:at + self._frame + self._fade].copy()
        return out


class Talk:
    """One conversation: `hear` pieces of sound, and get sound and words back."""

    def __init__(self, lm: trained.LM, codec: Codec):
        self._lm, self._rows = lm, lm.vocab.rows
        self._ear, self._voice, self._text = Ear(codec), Voice(codec), lm.text()
        self._mine = [k for k, row in enumerate(self._rows) if row.name.startswith('mine')]
        self.hz, self.frames = codec.identity['frame_hz'], 0
        self._word: list[int] = []
        self._began = 0

    def frames_of(self, wav: np.ndarray) -> list[np.ndarray]:
        """Codes of the frames that `wav` completes, for `generate.Room.step`."""
        return self._ear.push(wav)

    def say(self, frame_K: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[tuple[float, str]]]:
        """(sound, codes [books], words that are complete, with their times in seconds)."""
        codes = np.array([np.clip(frame_K[k] - self._rows[k].start, 0, self._rows[k].predicted - 1)
                          for k in self._mine])
        words = self._written(int(frame_K[0]))
        self.frames += 1
        return self._voice.push(codes), codes, words

    def _written(self, token: int) -> list[tuple[float, str]]:
        """A word is complete when another one begins, or padding follows: who listens along cannot
        know that it will go on after a pause, and hears the rest as a word of its own."""
        done = []
        found = trained.words_at(self._lm.vocab, self._text, np.array([token]))
        piece = token - self._lm.vocab.ranges['text'][0]
        if self._word and (not found or self._text.piece(piece).startswith('\u2581')):
            done = [(self._began / self.hz, self._text.decode(self._word))]
            self._word = []
        if found:
            if not self._word:
                self._began = self.frames
            self._word.append(piece)
        return done


def room(lm: trained.LM, *, slots: int, samplers: dict, seed: int = 0) -> generate.Room:
    """A room for `slots` conversations, compiled. Raises ConfigError for other layouts."""
    layout = plain(lm.config.layout)
    if layout['name'] != 'duplex.columns':
        raise ConfigError(f'{layout["name"]} does not talk frame by frame; duplex.columns does')
    if lm.config.codec.name == 'mimi':
        raise ConfigError('codec mimi is not heard frame by frame here; give --input a whole file')
    made = generate.Room(lm.speaker(samplers), trained.layout_delays(layout, lm.vocab),
                         slots=slots, columns=lm.config.columns, key=jax.random.key(seed))
    for _ in range(2):      # compiles, for what comes first and for what comes from a step
        made.step({})
    return made


def stream(lm: trained.LM, codec: Codec, pieces, samplers: dict, seed: int,
           say: Callable[[np.ndarray, list[tuple[float, str]]], None]) -> dict[str, float]:
    """Talks to `pieces` of sound until they end; `say` gets each frame of sound and new words.

    Returns first_audio_ms, from the first sample heard to the first one said, were the pieces to
    come in real time, and real_time_factor: seconds of work per second of sound.
    """
    one, talk = room(lm, slots=1, samplers=samplers, seed=seed), Talk(lm, codec)
    work_s, heard, first_ms = 0.0, 0, None
    frame_s = 1 / talk.hz
    for piece in pieces:
        start = time.perf_counter()
        for codes in talk.frames_of(piece):
            heard += 1
            for frame in one.step({0: codes}).values():
                wav, _, words = talk.say(frame)
                if first_ms is None:
                    work_of_frame = time.perf_counter() - start
                    first_ms = 1000 * (heard * frame_s + REACH_S + FADE_S + SHIFT_S + work_of_frame)
                say(wav, words)
        work_s += time.perf_counter() - start
    return dict(first_audio_ms=first_ms or float('nan'), frames=heard,
                real_time_factor=work_s / max(heard * frame_s, 1e-9))


class Stopped(Exception):
    """Nobody is heard any more."""


class Lobby:
    """Who talks in which slot of a room: several listeners, one dispatch for all who wait.

    Threads of listeners `enter`, `hear` and `leave`; one thread runs `serve`.
    """

    def __init__(self, lm: trained.LM, codec: Codec, *, slots: int, samplers: dict, seed: int = 0):
        self._room = room(lm, slots=slots, samplers=samplers, seed=seed)
        self._lm, self._codec, self.slots = lm, codec, slots
        self._lock = threading.Condition()
        self._free = list(range(slots))
        self._waiting: dict[int, np.ndarray] = {}
        self._answers: dict[int, np.ndarray | None] = {}
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
            self._room.begin(slot)
            return slot, Talk(self._lm, self._codec)

    def leave(self, slot: int) -> None:
        with self._lock:
            self._waiting.pop(slot, None)
            self._answers.pop(slot, None)
            self._free.append(slot)

    def hear(self, slot: int, codes: np.ndarray) -> np.ndarray | None:
        """What is said to one frame, once everybody's has been heard; see `Room.step`. Raises
        Stopped when nothing is stepped any more."""
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
                    said = self._room.step(heard)
                    self._answers |= {slot: said.get(slot) for slot in heard}
                    self._lock.notify_all()
        finally:
            self.close()        # nobody waits for what will not come

    def close(self) -> None:
        with self._lock:
            self._over = True
            self._lock.notify_all()

# SPDX-License-Identifier: Apache-2.0
"""Who speaks when: turn-taking of two channels, from token grids or from sound. numpy only.

Everything starts from *activity*, bool [2, T]: in which frames each channel is heard, mine first.
`voiced` reads it from codes, `loud` from sound. Stretches of a channel whose silences are shorter
than 0.2 s are one inter-pausal unit (IPU). Where both are silent between units of one speaker it is
a *pause*, between units of two a *gap*; where both speak, an *overlap* (arXiv 2203.16502 §4.2,
2410.00037 §5.6). What is silent before the first and after the last unit is neither, so that

    ipu + pause + gap - overlap + edge = all frames

A speaker's units with nothing but pauses between them are a *turn*. How a model copes with what the
other speaker does (`coped`) is judged by the thresholds of Full-Duplex-Bench's evaluation scripts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MERGE_S = 0.2           # shorter silences do not end a unit; shorter overlaps interrupt nobody
FILLED_S = 0.5          # shorter silences are no stop of who is interrupted (v1.5: the model)
TAKEOVER_S = 1.0        # from here on, or of more words, what is said takes the floor
TAKEOVER_WORDS = 3
BIN_S = 0.2             # of the histograms of backchannels
EVENTS = ('ipu', 'pause', 'gap', 'overlap')


class Stretch(NamedTuple):
    """Frames `start` up to `end` of a channel: a unit or a turn."""

    channel: int
    start: int
    end: int


# Activity.

def silent_codes(codes: Sequence[np.ndarray], heard: Sequence[np.ndarray]) -> frozenset[int]:
    """Which ids mean silence: those that occur more often where nothing is heard than where it is.

    codes: ids [T] of channels; heard: bool [T], what is known to be speech in them.
    """
    size = 1 + max((int(c.max()) for c in codes if len(c)), default=0)
    counts = np.zeros((2, size), np.int64)
    for ids, speech in zip(codes, heard, strict=True):
        np.add.at(counts, (speech.astype(int), ids), 1)
    return frozenset(np.flatnonzero(counts[0] > counts[1]).tolist())


def voiced(codes: np.ndarray, silent: frozenset[int]) -> np.ndarray:
    """bool [...]: where `codes` are not among the `silent` ones; what is negative is silence."""
    return (codes >= 0) & ~np.isin(codes, np.fromiter(silent, np.int64, len(silent)))


def during(spans: Sequence[tuple[float, float]], frames: int, frame_hz: float) -> np.ndarray:
    """bool [frames]: the frames that (start, end) in seconds touch for more than half."""
    out = np.zeros(frames, bool)
    for start_s, end_s in spans:
        out[max(0, math.floor(start_s * frame_hz + 0.5)):
            max(0, math.floor(end_s * frame_hz + 0.5))] = True
    return out


def loud(wav: np.ndarray, rate_hz: int, frame_hz: float, *, below_db: float = 35.0) -> np.ndarray:
    """bool [T]: the frames of `wav` [S] in which something is heard.

    Of every 10 ms, the power must be at most `below_db` under that of the loudest (their 95th
    percentile among those above -60 dB). It is for clean channels; noise is heard as speech.
    """
    # Every 10 ms begin at the nearest sample, at rates that are no multiple of 100 Hz, too.
    edges = np.arange(math.ceil(100 * len(wav) / rate_hz)) * rate_hz // 100
    power = np.add.reduceat(np.square(np.asarray(wav, float)), edges) if len(edges) else edges
    db = 10 * np.log10(power / (rate_hz / 100) + 1e-12)
    there = db > -60
    if there.any():
        there &= db > np.percentile(db[there], 95) - below_db
    frames = math.ceil(len(wav) * frame_hz / rate_hz)
    out = np.zeros(frames, bool)
    at = (np.flatnonzero(there) * frame_hz / 100).astype(int)   # of the beginning of the 10 ms
    out[at[at < frames]] = True
    return out


# Units, turns, and what lies between them.

def spans(active: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of every run of True in `active` [T]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], active.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def units(active_2T: np.ndarray, frame_hz: float) -> list[Stretch]:
    """The inter-pausal units of both channels, by their start."""
    out = []
    for channel, active in enumerate(active_2T):
        made: list[list[int]] = []
        for start, end in spans(active):
            if made and (start - made[-1][1]) / frame_hz < MERGE_S - 1e-9:
                made[-1][1] = end
            else:
                made.append([start, end])
        out += [Stretch(channel, *m) for m in made]
    return sorted(out, key=lambda s: (s.start, s.end, s.channel))


def _filled(stretches, frames: int) -> np.ndarray:
    out = np.zeros((2, frames), bool)
    for s in stretches:
        out[s.channel, s.start:s.end] = True
    return out


def turns(active_2T: np.ndarray, frame_hz: float) -> list[Stretch]:
    """Turns of both channels, by their start: units between which nobody says anything."""
    found = units(active_2T, frame_hz)
    whole = _filled(found, active_2T.shape[1])
    out: list[list[int]] = []
    for channel in (0, 1):
        mine = [u for u in found if u.channel == channel]
        for i, u in enumerate(mine):
            if i and not whole[1 - channel, mine[i - 1].end:u.start].any():
                out[-1][2] = u.end
            else:
                out.append([channel, u.start, u.end])
    return sorted((Stretch(*t) for t in out), key=lambda s: (s.start, s.end, s.channel))


class Tally(NamedTuple):
    """Events and frames of each of EVENTS, the frames at the edges, and all frames."""

    events: dict[str, int]
    frames: dict[str, int]
    edge: int
    total: int


def tally(active_2T: np.ndarray, frame_hz: float) -> Tally:
    """Counts the events of one dialogue.

    A silence after both have stopped at once, or before both begin, is a pause if one of them is
    on both sides of it.
    """
    total = active_2T.shape[1]
    found = units(active_2T, frame_hz)
    whole = _filled(found, total)
    events, frames = dict.fromkeys(EVENTS, 0), dict.fromkeys(EVENTS, 0)
    events['ipu'], frames['ipu'] = len(found), int(whole.sum())
    both = spans(whole.all(0))
    events['overlap'], frames['overlap'] = len(both), sum(b - a for a, b in both)
    edge = 0
    for start, end in spans(~whole.any(0)):
        if start == 0 or end == total:
            edge += end - start
            continue
        kind = 'pause' if (whole[:, start - 1] & whole[:, end]).any() else 'gap'
        events[kind] += 1
        frames[kind] += end - start
    return Tally(events, frames, edge, total)


def per_minute(tallies: Sequence[Tally], frame_hz: float) -> dict[str, float]:
    """Events and seconds of every kind in a minute of the corpus, counts pooled over dialogues."""
    minutes = sum(t.total for t in tallies) / frame_hz / 60
    return {f'{kind} s/min': sum(t.frames[kind] for t in tallies) / frame_hz / minutes
            for kind in EVENTS} | {
        f'{kind}s/min': sum(t.events[kind] for t in tallies) / minutes for kind in EVENTS}


def _within(turn: Stretch, others: Sequence[Stretch]) -> bool:
    """Whether `turn` lies in one of another's turns that is longer."""
    return any(o.channel != turn.channel and o.start <= turn.start and turn.end <= o.end and
               o.end - o.start > turn.end - turn.start for o in others)


def transfers(active_2T: np.ndarray, frame_hz: float) -> list[tuple[int, float]]:
    """(who takes the floor, seconds after the other's end) of every change of turns; below 0 they
    overlap. A turn inside one of the other's changes nothing."""
    every = turns(active_2T, frame_hz)
    kept = [t for t in every if not _within(t, every)]
    return [(b.channel, (b.start - a.end) / frame_hz) for a, b in zip(kept, kept[1:], strict=False)
            if a.channel != b.channel]


def kinds(active_2T: np.ndarray, frame_hz: float, words: Sequence | None = None
          ) -> list[tuple[str, Stretch]]:
    """What every turn is, in order:

    opening       nobody has spoken before
    smooth        the other has ended, or ends within 0.2 s
    interruption  it begins in the other's turn and outlasts it
    backchannel   it lies in the other's turn and takes no floor (see `takes`)
    attempt       it lies in the other's turn and is longer, and the other goes on

    words: for each channel, the frames in which words begin, where they are known.
    """
    every, out, holder = turns(active_2T, frame_hz), [], None
    for t in every:
        said = None if words is None else [w for w in words[t.channel] if t.start <= w < t.end]
        if _within(t, every):
            kind = 'attempt' if takes([(t.start, t.end)], said, frame_hz) else 'backchannel'
        elif holder is None:
            kind = 'opening'
        else:       # of the other's: a turn of one's own goes on until the other takes the floor
            kind = ('interruption' if (holder.end - t.start) / frame_hz >= MERGE_S - 1e-9
                    else 'smooth')
        if kind not in ('attempt', 'backchannel'):
            holder = t
        out.append((kind, t))
    return out


# How a model copes with what the other speaker does.

def takes(segments: Sequence[tuple[int, int]], words: Sequence | None, frame_hz: float) -> bool:
    """Whether what is said takes the floor: it lasts a second, or has more than three words.

    segments: (start, end) in frames of what is said; words: those said in it, None if unknown. A
    takeover is 0 without words, or if the span is shorter than 1 s and has at most 3 words.
    """
    if not segments or (words is not None and not len(words)):
        return False
    span_s = (max(b for _, b in segments) - min(a for a, _ in segments)) / frame_hz
    return span_s >= TAKEOVER_S - 1e-9 or (words is not None and len(words) > TAKEOVER_WORDS)


class Coped(NamedTuple):
    """What I did about one event of the other's. Latencies are seconds, None where there is none.

    kind: pause, turn, interruption or murmur. takeover: I took the floor, which who never stops
    does, too. latency_s: from their end to my first sound. stop_s: how long I went on while they
    interrupted, breaths under 0.5 s included. through: I went on until they had ended.
    """

    kind: str
    takeover: bool
    latency_s: float | None = None
    stop_s: float | None = None
    through: bool = False

    @property
    def gave_way(self) -> bool:
        """Interrupted, I left them the floor, which going on for a second keeps, and took it when
        they had ended."""
        return self.stop_s is not None and self.stop_s < TAKEOVER_S - 1e-9 and self.takeover


def coped(active_2T: np.ndarray, theirs: Sequence[tuple[float, float]], frame_hz: float, *,
          words: Sequence | None = None, murmurs: Sequence[bool] | None = None) -> list[Coped]:
    """Judges me (channel 0) by each of the other's turns, (start, end) in seconds, as it was meant.

    pause         a silence of at least 0.2 s inside their turn: do I take over before they go on?
    turn          they end: do I take over before they speak again, and how soon?
    interruption  they begin while I speak: do I stop, and take over when they have ended?
    murmur        they say 'uh huh' while I speak: taking over means that I went on, as I should

    While I speak: for 0.2 s more at least. A turn that ends less than a second before the dialogue
    does is not judged: nobody could take over.

    words: frames in which my words begin, where known. murmurs: which of their turns are
    backchannels; by default those shorter than 1 s that begin while I speak.
    """
    frames = active_2T.shape[1]
    own = [(u.start, u.end) for u in units(active_2T, frame_hz) if u.channel == 0]
    their_units = [u for u in units(active_2T, frame_hz) if u.channel == 1]
    out = []

    def said(parts):
        """My words of `parts`; one may be written a little before it is heard."""
        return None if words is None else [w for w in words
                                           if any(a - 2 <= w < b for a, b in parts)]

    meant = [(round(a * frame_hz), round(b * frame_hz)) for a, b in theirs]
    for i, (start, end) in enumerate(meant):
        until = min((a for a, _ in meant if a >= end), default=frames)
        speaking = next(((a, b) for a, b in own
                         if a < start and (b - start) / frame_hz > MERGE_S - 1e-9), None)
        short = (end - start) / frame_hz < TAKEOVER_S
        if (speaking and short) if murmurs is None else murmurs[i]:
            if speaking:
                out.append(Coped('murmur', speaking[1] >= end
                                 or any(end <= a < until for a, _ in own)))
            continue
        inside = [u for u in their_units if start <= u.start < end]
        for before, after in zip(inside, inside[1:], strict=False):
            parts = [(a, b) for a, b in own if before.start < a < after.start and b > before.end]
            out.append(Coped('pause', takes(parts, said(parts), frame_hz)))
        if (frames - end) / frame_hz < TAKEOVER_S - 1e-9:
            continue
        # What begins early counts if it goes on when they have ended.
        parts = [(a, b) for a, b in own if start <= a < until and b > end]
        if speaking and speaking[1] > end:      # I never stopped
            parts = [(end, speaking[1]), *parts]
        took = takes(parts, said(parts), frame_hz)
        latency_s = max(0.0, (parts[0][0] - end) / frame_hz) if took else None
        if not speaking:
            out.append(Coped('turn', took, latency_s))
            continue
        stopped = min(_stopped(own, speaking, frame_hz), end)
        out.append(Coped('interruption', took, latency_s, (stopped - start) / frame_hz,
                         stopped == end))
    return out


def _stopped(spans: Sequence[tuple[int, int]], speaking: tuple[int, int], hz: float) -> int:
    """The frame in which `speaking`, one of my `spans`, is over: its end, or where more than a
    murmur follows after silences under 0.5 s, the end of that."""
    begin, last = None, speaking[1]
    for a, b in spans:
        if last <= a and (a - last) / hz < FILLED_S - 1e-9:
            begin, last = a if begin is None else begin, b
    return speaking[1] if begin is None or not takes([(begin, last)], None, hz) else last


def backchannels(active_2T: np.ndarray, frame_hz: float, words: Sequence | None = None
                 ) -> tuple[list[int], bool]:
    """(the frames in which my backchannels begin, whether I took the floor), while they talk on."""
    mine, took = [], False
    for kind, t in kinds(active_2T, frame_hz, None if words is None else (words, ())):
        if t.channel == 0 and kind == 'backchannel':
            mine.append(t.start)
        took |= t.channel == 0 and kind in ('attempt', 'interruption')
    return mine, took


def timing_distance(mine: Sequence[int], human: Sequence[int], frames: int, frame_hz: float
                    ) -> float:
    """Jensen-Shannon distance (natural logarithm) of two sets of moments in bins of 0.2 s; 1
    without any of mine."""
    if not len(mine) or not len(human):
        return 1.0
    size = 1 + int(frames / (frame_hz * BIN_S))
    p, q = (np.bincount((np.asarray(x) / (frame_hz * BIN_S) + 1e-9).astype(int), minlength=size)
            for x in (mine, human))
    p, q = p / p.sum(), q / q.sum()
    m = (p + q) / 2

    def kl(a):
        at = a > 0
        return float(np.sum(a[at] * np.log(a[at] / m[at])))
    return math.sqrt(max(0.0, (kl(p) + kl(q)) / 2))


def repetition(said: Sequence[Sequence[str]], order: int = 3) -> float:
    """The share of runs of `order` words in turns that were said before in the same turn."""
    runs = [[tuple(words[i:i + order]) for i in range(len(words) - order + 1)] for words in said]
    total = sum(map(len, runs))
    return 1 - sum(len(set(r)) for r in runs) / total if total else 0.0


# A recording.

def of_sound(wav_2S: np.ndarray, rate_hz: int, frame_hz: float = 50.0) -> dict[str, float]:
    """What can be told of a recording of two clean channels alone, mine first: `per_minute`, turns
    of every kind and who has them, and for each speaker the median of floor transfers to him."""
    active = np.stack([loud(x, rate_hz, frame_hz) for x in wav_2S])
    out = per_minute([tally(active, frame_hz)], frame_hz)
    found, moved = kinds(active, frame_hz), transfers(active, frame_hz)
    for channel, who in enumerate(('mine', 'theirs')):
        for kind in dict.fromkeys(k for k, _ in found):
            out[f'{kind}/{who}'] = sum(k == kind and t.channel == channel for k, t in found)
        late = [1000 * s for c, s in moved if c == channel]
        if late:
            out[f'transfer ms/{who}'] = float(np.median(late))
    return out

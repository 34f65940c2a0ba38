# SPDX-License-Identifier: Apache-2.0
"""Two-channel dialogues from single utterances: sampled gaps and overlaps, with true labels.

Every turn of a dataset that keeps its audio is an utterance of one voice. Two voices take turns:
each begins a drawn time after the other's end, or before it; some break in, and the other stops
some time later; some pause and go on; some murmur while the other talks. Outside of its utterances
a channel is silent, as under the masks of a diarization (arXiv 2410.00037 §4.2), and the user's
channel can be made worse as in §4.4 (`augment`). What was drawn is what is labeled:

    python -m data_pipelines.demo --hours 2 --keep-wav --out data/clean
    python -m data_pipelines.simulate --source data/clean --out data/talk --hours 2

adds records of the source `simulated`, with `labels.jsonl`: of every one its placed utterances with
channel, kind and times. Everything begins and ends on frames of the codec, so that a grid can hold
the labels exactly, and with frames that hold enough to be heard in their codes, seldom a frame off
(a soft consonant may be coded as silence). The same arguments give the same bytes.
"""

import bisect
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines import augment, records
from jaxsd import dataset, turns
from jaxsd.flags import Parser
from jaxsd.types import Record, Turn, Word

RATE_HZ = augment.RATE_HZ
FLOOR = 5 / 32768       # standard deviation of silence: that of the demo corpus
PIECE_S = 0.01          # by pieces of this length sound is loud or quiet,
QUIET_DB = 25.0         # this much below the loud ones, where codes are often those of silence
TURN_S = 0.2            # shorter overlaps interrupt nobody, shorter silences separate nothing
DRAWS = 1000            # of a turn's begin, after which it is as early as may be
SHORT_S = 1.0           # utterances below are backchannels
TURNS = (4, 10)         # of a dialogue, the last one not among them
FADE_S = 0.01


class Utterance(NamedTuple):
    """One turn as sound int16 [S] of whole frames, with its words from its begin.

    filled: bool [F], the frames that are loud for half of their length or more. The last one is.
    """

    text: str
    wav: np.ndarray
    words: tuple[Word, ...]
    filled: np.ndarray


class Manners(NamedTuple):
    """How two voices take turns.

    fto_s: mean and standard deviation of the normal distribution of a turn's begin after the
    other's end, negative where they overlap (by no more than half of either).
    interruption: the probability that a turn is broken into at 0.3 to 0.7 of it, and stops 0.25 to
    0.6 s later. Who broke in is heard out, and nobody breaks into the last turn: of all turns fewer
    are.
    pause: that it goes on with another utterance after 0.25 to 1 s. backchannel: that the other
    murmurs in it, if there is room.
    """

    fto_s: tuple[float, float] = (0.2, 0.35)
    interruption: float = 0.1
    pause: float = 0.15
    backchannel: float = 0.2


class Placed(NamedTuple):
    """Utterance `index` of the long or short ones of a channel, in frames `start` up to `end`.

    kind: opening, smooth, interruption (it overlaps the other's by 0.2 s or more), pause (it goes
    on after one) or backchannel. fto: the frames that were drawn, None where nothing was.
    """

    channel: int
    index: int
    start: int
    end: int
    kind: str
    fto: int | None = None


def plan(longs: Sequence[Sequence[np.ndarray]], shorts: Sequence[Sequence[np.ndarray]], *,
         count: int, frame_hz: float, manners: Manners, rng: np.random.Generator) -> list[Placed]:
    """A dialogue of `count` turns, by start.

    longs, shorts: of each channel's utterances the frames that are filled, bool [F]. Whoever is
    broken into stops after one of those.
    """
    least = int(np.ceil(TURN_S * frame_hz - 1e-9))      # frames that are at least 0.2 s
    channel = int(rng.integers(2))

    def within(low_s, high_s):
        return max(least, int(round(rng.uniform(low_s, high_s) * frame_hz)))

    out: list[Placed] = []
    for _ in range(count):
        index = int(rng.integers(len(longs[channel])))
        length = len(longs[channel][index])
        if not out:
            start, kind, fto = within(0.2, 0.6), 'opening', None
        else:
            before = out[-1]
            long = before.end - before.start
            free = max([0, *(p.end + least for p in out if p.channel == channel)])
            start = max(free, before.start + int(round(rng.uniform(0.3, 0.7) * long)))
            end = min(start + within(0.25, 0.6), before.end)
            said = longs[before.channel][before.index]
            while end < before.end and not said[end - 1 - before.start]:
                end += 1
            if (rng.random() < manners.interruption and before.kind != 'interruption'
                    and end - start >= least and start + length > end):
                out[-1], kind, fto = before._replace(end=end), 'interruption', None
            else:
                earliest = max(free, before.end - min(length, long) // 2)
                for _ in range(DRAWS):
                    start = before.end + int(round(rng.normal(*manners.fto_s) * frame_hz))
                    if start >= earliest:
                        break
                else:
                    start = earliest
                fto = start - before.end
                kind = 'interruption' if -fto >= least else 'smooth'
        out.append(Placed(channel, index, start, start + length, kind, fto))
        if rng.random() < manners.pause:
            index = int(rng.integers(len(longs[channel])))
            start = out[-1].end + within(0.25, 1.0)
            out.append(Placed(channel, index, start, start + len(longs[channel][index]), 'pause'))
        channel = 1 - channel
    for turn in list(out):
        other = 1 - turn.channel
        if not len(shorts[other]) or rng.random() >= manners.backchannel:
            continue
        index = int(rng.integers(len(shorts[other])))
        length = len(shorts[other][index])
        own = [p for p in out if p.channel == other]
        low = max([turn.start + 1, *(p.end + least for p in own if p.start < turn.start)])
        high = min([turn.end - 1, *(p.start - least for p in own if p.start >= turn.start)])
        if high - low >= length:
            start = int(rng.integers(low, high - length + 1))
            out.append(Placed(other, index, start, start + length, 'backchannel'))
    return sorted(out, key=lambda p: p.start)


def utterances(record: Record, frame_hz: float) -> Iterator[tuple[str, Utterance]]:
    """(voice, utterance) of every turn of a record that keeps its audio, of each part of one that
    pauses. What does not fill its frames lies in their middle; where it ends, it is faded out."""
    import soundfile
    if not record.wav:
        raise ValueError(f'record {record.id} keeps no audio: make the dataset with --keep-wav')
    wav = soundfile.read(io.BytesIO(record.wav), dtype='int16', always_2d=True)[0].T
    piece, frame = round(PIECE_S * RATE_HZ), round(RATE_HZ / frame_hz)
    for turn in record.turns:
        voice = (record.style[turn.channel].split()[0] if record.style else
                 f'{record.id} {turn.channel}')
        begin = round(turn.start_s * RATE_HZ)
        sound = wav[turn.channel, begin:round(turn.end_s * RATE_HZ)]
        loud = turns.loud(sound / 32768, RATE_HZ, 1 / PIECE_S, below_db=QUIET_DB)
        parts = turns.units(loud[None], 1 / PIECE_S)
        ends_s = [(begin + u.end * piece) / RATE_HZ for u in parts]
        own = [(min(bisect.bisect(ends_s, (w.start_s + w.end_s) / 2), len(parts) - 1), w)
               for w in record.words if w.channel == turn.channel
               and turn.start_s - 1e-3 <= w.start_s < turn.end_s]
        for i, part in enumerate(parts):
            one = sound[part.start * piece:part.end * piece]
            spare = -len(one) % frame
            before = spare // 2
            filled = np.pad(np.repeat(loud[part.start:part.end], piece)[:len(one)],
                            (before, spare - before)).reshape(-1, frame).mean(1) >= 0.5
            if not filled.any():
                continue
            frames = int(np.flatnonzero(filled)[-1]) + 1
            one = faded(one[:frames * frame - before])
            one = np.pad(one, (before, frames * frame - before - len(one)))
            begin_s, long_s = (begin + part.start * piece - before) / RATE_HZ, frames / frame_hz
            said = tuple(Word(w.text, 0, max(0.0, w.start_s - begin_s),
                              min(w.end_s - begin_s, long_s))
                         for k, w in own if k == i and 0 < w.end_s - begin_s
                         and w.start_s - begin_s < long_s)
            if own and not said:        # a breath
                continue
            text = turn.text if len(parts) == 1 else ' '.join(w.text for w in said)
            yield voice, Utterance(text, one, said, filled[:frames])


def faded(wav: np.ndarray) -> np.ndarray:
    """`wav` [S] with its end faded out."""
    out, fade = wav.copy(), min(len(wav), round(FADE_S * RATE_HZ))
    out[-fade:] = out[-fade:] * np.linspace(1, 0, fade, dtype=np.float32)
    return out


def render(placed: Sequence[Placed], longs, shorts, *, frame_hz: float, rng: np.random.Generator
           ) -> tuple[np.ndarray, list[Word], list[Turn]]:
    """The sound float32 [2, S] of a plan, its words and its turns, by start."""
    frame = round(RATE_HZ / frame_hz)
    samples = (max(p.end for p in placed) + int(rng.integers(2, 6))) * frame
    wav = rng.normal(0, FLOOR, (2, samples)).astype(np.float32)
    words, said = [], []
    for p in placed:
        one = (shorts if p.kind == 'backchannel' else longs)[p.channel][p.index]
        sound = one.wav[:(p.end - p.start) * frame].astype(np.float32) / 32768
        if len(sound) < len(one.wav):       # broken off
            sound = faded(sound)
        at, begin_s, end_s = p.start * frame, p.start / frame_hz, p.end / frame_hz
        wav[p.channel, at:at + len(sound)] += sound
        # Of what is broken off, the words that are heard for half of their length or more.
        kept = [Word(w.text, p.channel, w.start_s + begin_s, min(w.end_s + begin_s, end_s))
                for w in one.words if (w.start_s + w.end_s) / 2 + begin_s <= end_s]
        words += kept
        whole = '' if len(sound) < len(one.wav) else one.text
        said.append(Turn(p.channel, begin_s, end_s, ' '.join(w.text for w in kept) or whole))
    return np.clip(wav, -1, 1), sorted(words, key=lambda w: w.start_s), said


def build(source: str, out: str, *, hours: float, manners: Manners, seed: int = 0,
          mine: str | None = None, worse: bool = False, noise: str | None = None) -> dict:
    """Writes the dataset `out`: what `source` holds and `hours` of simulated dialogues, shared out
    over its splits as its own audio is; one of a single voice gets none. mine: the voice of
    channel 0 where a split has it; drawn without. Raises ValueError in one clear line."""
    import soundfile
    noises = augment.noises_of(noise, np.random.default_rng(seed)) if worse else []
    labels: list[str] = []
    arguments = dict(manners._asdict(), fto_s=list(manners.fto_s), hours=hours, mine=mine or '',
                     worse=worse, noise=noise or '')

    def each(split, rows, units, codes):
        hz = codes.identity['frame_hz']
        voices: dict[str, list[Utterance]] = {}
        heard_s = 0.0
        for i in range(len(rows)):
            record = dataset.decode(rows[i])
            yield record
            if record.codes is not None:
                heard_s += record.duration_s
                for voice, one in utterances(record, hz):
                    voices.setdefault(voice, []).append(one)

        short = {v: [u for u in us if len(u.filled) / hz < SHORT_S] for v, us in voices.items()}
        long = {v: [u for u in us if len(u.filled) / hz >= SHORT_S] for v, us in voices.items()}
        able = sorted(v for v in voices if long[v])
        if len(able) < 2 and split == 'train':
            raise ValueError(f'--source {source}: split {split} has utterances of {len(able)} '
                             'voices; two are needed')
        if mine and mine not in able and split == 'train':
            raise ValueError(f'--mine {mine}: split {split} has no long utterance of such a voice; '
                             f'there are {", ".join(able[:20])}')
        left_s, i = (hours * 3600 * heard_s / total_s if len(able) > 1 else 0.0), 0
        while left_s > 0:
            rng = np.random.default_rng((seed, i, len(rows)))
            pair = [able[k] for k in rng.choice(len(able), 2, replace=False)]
            if mine in able:
                pair = [mine, pair[pair[0] == mine]]
            longs, shorts = ([of[v] for v in pair] for of in (long, short))
            placed = plan([[u.filled for u in us] for us in longs],
                          [[u.filled for u in us] for us in shorts],
                          count=int(rng.integers(TURNS[0], TURNS[1])), frame_hz=hz,
                          manners=manners, rng=rng)
            wav, words, said = render(placed, longs, shorts, frame_hz=hz, rng=rng)
            if worse:
                wav[augment.USER] = augment.as_heard(wav[augment.USER], wav[1 - augment.USER], rng,
                                                     noises)
            flac = io.BytesIO()
            soundfile.write(flac, wav.T, RATE_HZ, format='FLAC')
            name = f'{split}-simulated-{i:06d}'
            labels.append(json.dumps(dict(id=name, frame_hz=hz, placed=[
                dict(channel=p.channel, kind=p.kind, start=p.start, end=p.end, text=t.text)
                for p, t in zip(placed, said, strict=True)])))
            yield Record(name, 'simulated', 'en', wav.shape[1] / RATE_HZ,
                         codes=np.stack([codes.encode(c) for c in wav]),
                         units=tuple(units.encode(c)[0] for c in wav), words=tuple(words),
                         turns=tuple(said), style=tuple(pair), wav=flac.getvalue())
            left_s -= wav.shape[1] / RATE_HZ
            i += 1
        with open(os.path.join(os.path.abspath(out) + '.partial', 'labels.jsonl'), 'w',
                  encoding='utf-8') as f:
            f.write('\n'.join(sorted(labels)) + '\n')

    splits = dataset.open_dataset(source).manifest['splits']
    total_s = 3600 * sum(x['hours'] for x in splits.values())
    return augment.again(source, out, each, arguments=arguments, command=(
        f'python -m data_pipelines.simulate --hours {hours:g} --seed {seed}'))


def main(argv=None) -> int:
    usual = Manners()
    parser = Parser(prog='python -m data_pipelines.simulate', description=(
        'Adds dialogues simulated from the utterances of a dataset that keeps its audio, of two '
        'voices at least. Channel 0 is the model\'s, channel 1 the user\'s; labels.jsonl says what '
        'was placed where.'), epilog=(
            'python -m data_pipelines.demo --hours 2 --keep-wav --out data/clean && '
            'python -m data_pipelines.simulate --source data/clean --out data/talk --hours 2'))
    parser.add_argument('--source', required=True, help='dataset directory that keeps its audio')
    parser.add_argument('--out', required=True, help='dataset directory to make')
    parser.add_argument('--hours', type=float, required=True, help='of simulated dialogues')
    parser.add_argument('--fto', type=float, nargs=2, default=usual.fto_s, metavar=('MEAN', 'SD'),
                        help="seconds from the other's end to a turn's begin, a normal "
                             'distribution; what comes out below 0 overlaps, by half of a turn '
                             f'at most, which may break in, too (default: {usual.fto_s[0]} '
                             f'{usual.fto_s[1]})')
    for name, what in (('interruption', 'a turn is broken into'),
                       ('pause', 'it pauses and goes on'),
                       ('backchannel', 'the other murmurs in it')):
        parser.add_argument(f'--{name}', type=float, default=getattr(usual, name), metavar='P',
                            help=f'how probably {what} (default: %(default)s)')
    parser.add_argument('--mine', metavar='VOICE', help='always speaks on channel 0')
    parser.add_argument('--worse', action='store_true',
                        help="gain, noise and echo on the user's channel")
    parser.add_argument('--noise', help='directory of wav files for --worse; without it, '
                        'made noise')
    parser.add_argument('--seed', type=int, default=0,
                        help='the same one gives the same bytes (default: 0)')
    args = parser.parse_args(argv)
    parser.at_least(args, seed=0)
    try:
        for name in ('interruption', 'pause', 'backchannel'):
            if not 0 <= getattr(args, name) <= 1:
                raise ValueError(f'--{name} is a probability, got {getattr(args, name)}')
        mean, deviation = args.fto
        if not 0 < args.hours < float('inf'):
            raise ValueError(f'--hours is above 0, got {args.hours:g}')
        if not (-0.5 <= mean < 10 and 0 <= deviation < 10):
            raise ValueError('--fto is a mean from -0.5 and a deviation from 0, both below 10, got '
                             f'{mean:g} {deviation:g}')
        if args.noise and not args.worse:
            raise ValueError('--noise is heard with --worse alone: give both or neither')
        manners = Manners(tuple(args.fto), args.interruption, args.pause, args.backchannel)
        done = build(args.source, args.out, hours=args.hours, manners=manners, seed=args.seed,
                     mine=args.mine, worse=args.worse, noise=args.noise)
    except (ValueError, OSError) as e:
        print(f'simulate: {records.told(args.out, e)}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('simulate: interrupted', file=sys.stderr)
        return 130
    hours = sum(x['hours_by_source'].get('simulated', 0.0)
                for x in done['manifest']['splits'].values())
    with open(os.path.join(args.out, 'labels.jsonl'), encoding='utf-8') as f:
        count = sum(1 for _ in f)
    print(f'{args.out}: {count} simulated dialogues, {hours:.3f} h, and the '
          f'{done["records"] - count} records of the source')
    print(records.overrides(args.out, done['manifest'], ('simulated',)))
    return 0


if __name__ == '__main__':
    sys.exit(main())

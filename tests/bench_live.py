# SPDX-License-Identifier: Apache-2.0
"""Does a conversation of an hour go on as it began? Memory and time of a frame, minute by minute.

    python tests/bench_live.py --workdir runs/moshi [--minutes 60] [--every 5] [--judged]

Plays callers of the test split to a trained stage, one after another, as `generate --task duplex
--input -` would hear them, sound in and sound out, and drops what is said. Prints of every so many
minutes of conversation the milliseconds of a frame, or of a chunk of frames where a system talks in
chunks (median, p95; and of the processor on average, all threads together, which other work on the
machine does not change), and the resident memory of this process, and at the end the time to the
first audio and the real-time factor.

--judged: a recognizer of the corpus' sentences (`data_pipelines.judge`) listens to what was said,
and its words are compared with those that the system wrote beside its sound; of what the corpus'
own answers are as codes (a ceiling), of words of other answers and of noise (floors) likewise.
Sound beside which nothing is written is counted and not judged; all that is said stays in memory.
"""

import argparse
import itertools
import os
import pathlib
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]


def callers(lm, codec, frames: int = 1):
    """The sound of the callers of test dialogues, again and again, so many frames at a time."""
    from jaxsd import data, dialogue
    size = frames * round(codec.identity['sample_rate_hz'] / codec.identity['frame_hz'])
    layout = dialogue.own_layout(lm)
    heard = [codec.decode(dialogue.tokens_of(r, 1, layout)) for r in data.examples(
        lm.config, 'test', dialogue.own_source(lm), limit=20)]
    for wav in itertools.cycle(heard):
        for at in range(0, len(wav) - size + 1, size):
            yield wav[at:at + size]


def resident_mb() -> float:
    with open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20


def stretches(wav, words, rate_hz: int):
    """(sound, its words) of all between silences of half a second; words go to the nearest."""
    from jaxsd import turns
    pieces = []
    for start, end in turns.spans(turns.loud(wav, rate_hz, 100)):
        if pieces and start - pieces[-1][1] < 50:
            pieces[-1][1] = end
        else:
            pieces.append([start, end])
    said = [[] for _ in pieces]
    for at_s, word in words if pieces else ():
        away = [max(a - 100 * at_s, 100 * at_s - b, 0) for a, b in pieces]
        said[away.index(min(away))].append(word)
    return [(wav[a * rate_hz // 100:b * rate_hz // 100], ' '.join(w))
            for (a, b), w in zip(pieces, said, strict=True)]


def judged(lm, codec, said, sentences, pronunciations) -> None:
    """Prints how much of `said`, (sound, words) pieces of a conversation, a recognizer hears."""
    import soxr

    from data_pipelines import judge
    from jaxsd import data, dialogue
    layout, rate = dialogue.own_layout(lm), codec.identity['sample_rate_hz']
    true = [(codec.decode(dialogue.tokens_of(r, 0, layout)),
             [(w.start_s, w.text) for w in r.words if w.channel == 0])
            for r in data.examples(lm.config, 'test', dialogue.own_source(lm), limit=20)]
    mine = np.concatenate([wav for wav, _ in said]), [w for _, words in said for w in words]
    clips, texts, silent = [{}, {}], {}, 0
    for i, (name, whole) in enumerate((('said', [mine]), ('true', true))):
        for j, (wav, text) in enumerate(x for one in whole for x in stretches(*one, rate)):
            if text:
                clips[i][f'{name} {j}'] = soxr.resample(wav, rate, judge.SAMPLE_RATE_HZ)
                texts[f'{name} {j}'] = text
            else:
                silent += not i
    if len({texts[name] for name in clips[0]}) < 2:
        sys.exit('bench_live: fewer than two texts were said: nothing to judge; talk for longer')
    rows, heard = judge.judge(clips[0], texts, sentences, ceiling=clips[1],
                              pronunciations=pronunciations, task='said live')
    for name in list(clips[0])[:5]:
        print(f'wrote: {texts[name]} | heard: {heard["said live"][name]}')
    for row in rows:
        print(f'{row["task"]}: WER {row["metrics"]["wer"]:.1%} of {row["items"]} ({row["note"]})')
    print(f'{silent} more stretches of what was said had no words beside them')


def measure(lm, codec, room, pieces, *, count: int, every: int, told=lambda row: None,
            say=lambda wav, words: None):
    """(what `live.stream` says of it, rows): of every `every` pieces of a conversation of `count`,
    ms (median), p95_ms, cpu_ms (mean) and resident_mb."""
    from jaxsd import live
    rows, times = [], []
    began = cpu = None

    def timed():
        nonlocal began, cpu
        for piece in itertools.islice(pieces, count):
            if began is not None:
                done()
            if not times:
                cpu = time.process_time()
            began = time.perf_counter()
            yield piece
        if began is not None:
            done()

    def done():         # with a piece
        times.append(1e3 * (time.perf_counter() - began))
        if len(times) == every:
            rows.append(dict(ms=float(np.median(times)), p95_ms=float(np.percentile(times, 95)),
                             cpu_ms=1e3 * (time.process_time() - cpu) / every,
                             resident_mb=resident_mb()))
            told(rows[-1])
            times.clear()
    return live.stream(lm, codec, room, timed(), say), rows


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--workdir', required=True, help='a run of a system of two speakers')
    p.add_argument('--minutes', type=float, default=60)
    p.add_argument('--every', type=float, default=5, help='minutes of conversation in a row')
    p.add_argument('--judged', action='store_true', help='a recognizer listens to what was said')
    args = p.parse_args()
    sys.path.insert(0, str(ROOT))
    from jaxsd import config, dialogue, generate, live, run, speak, trained
    c = config.stored(run.read_run(args.workdir), os.path.join(args.workdir, 'config.json'))
    codec = config.bind(c.codec, 'jaxsd.codec', 'codec')()
    lm = trained.load(c, args.workdir)
    room = live.room(lm, slots=1, samplers=speak.conversing(generate.Sampler(0.8, 250)))
    what = 'frame' if room.chunk == 1 else 'chunk'
    number = itertools.count(1)

    def told(row):
        print(f'to minute {args.every * next(number):g}: {row["ms"]:.1f} ms a {what} (p95 '
              f'{row["p95_ms"]:.1f}, of the processor {row["cpu_ms"]:.1f}), '
              f'{row["resident_mb"]:.0f} MB', flush=True)
    if args.judged:
        from data_pipelines import judge
        if not dialogue.writes(dialogue.own_layout(lm), lm.vocab):
            sys.exit('bench_live: this system writes no words with which to compare what is heard')
        known = judge.sentences_of(os.path.join(c.data.path, 'grammar.json'))
    a_minute = 60 * codec.identity['frame_hz'] / room.chunk
    said = []
    found, rows = measure(
        lm, codec, room, callers(lm, codec, room.chunk), told=told,
        say=lambda *one: said.append(one) if args.judged else None,
        count=round(args.minutes * a_minute), every=round(args.every * a_minute))
    first, last = rows[0], rows[-1]
    print(f'{what}s of {1000 * room.chunk / codec.identity["frame_hz"]:.0f} ms: first audio after '
          f'{found["first_audio_ms"]:.0f} ms, real-time factor {found["real_time_factor"]:.2f}; '
          f'the last {args.every:g} minutes against the first: '
          f'{last["resident_mb"] - first["resident_mb"]:+.1f} MB, '
          f'{last["ms"] / first["ms"]:.2f} times the time of a {what}')
    if args.judged:
        judged(lm, codec, said, *known)


if __name__ == '__main__':
    main()

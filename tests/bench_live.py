# SPDX-License-Identifier: Apache-2.0
"""Does a conversation of an hour go on as it began? Memory and time of a frame, minute by minute.

    python tests/bench_live.py --workdir runs/moshi [--minutes 60] [--every 5]

Plays callers of the test split to a trained stage, one after another, as `generate --task duplex
--input -` would hear them, sound in and sound out, and drops what is said. Prints of every so many
minutes of conversation the milliseconds of a frame (median, p95; and of the processor on average,
all threads together, which other work on the machine does not change) and the resident memory of
this process, and at the end the time to the first audio and the real-time factor. Systems of chunks
get units and say units, a chunk at a time.
"""

import argparse
import itertools
import os
import pathlib
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]


def callers(lm, codec):
    """The sound of the callers of test dialogues, again and again, a frame at a time."""
    from jaxsd import data
    frame = round(codec.identity['sample_rate_hz'] / codec.identity['frame_hz'])
    heard = [codec.decode(r.codes[1]) for r in data.examples(lm.config, 'test', 'dialogue',
                                                             limit=20)]
    for wav in itertools.cycle(heard):
        for at in range(0, len(wav) - frame + 1, frame):
            yield wav[at:at + frame]


def resident_mb() -> float:
    with open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20


def measure(lm, codec, pieces, *, frames: int, every: int, told=lambda row: None):
    """(what `live.stream` says of it, rows): of every `every` frames of a conversation of `frames`,
    ms (median), p95_ms, cpu_ms (mean) and resident_mb."""
    from jaxsd import generate, live
    rows, times = [], []
    began = cpu = None

    def timed():
        nonlocal began, cpu
        for piece in itertools.islice(pieces, frames):
            if began is not None:
                times.append(1e3 * (time.perf_counter() - began))
            if len(times) == every:
                rows.append(dict(ms=float(np.median(times)), p95_ms=float(np.percentile(times, 95)),
                                 cpu_ms=1e3 * (time.process_time() - cpu) / every,
                                 resident_mb=resident_mb()))
                told(rows[-1])
                times.clear()
            if not times:
                cpu = time.process_time()
            began = time.perf_counter()
            yield piece
    found = live.stream(lm, codec, timed(), dict(mine=generate.Sampler(0.8, 250)), 0,
                        lambda wav, words: None)
    return found, rows


def by_chunks(lm, layout, *, minutes: float, every: float, told=lambda row: None):
    """Rows as of `measure`, of chunks: what `dialogue.talk` takes for units of so many minutes."""
    from jaxsd import data, dialogue, generate
    chunk_s = layout['chunk_frames'] / lm.config.codec['frame_hz']
    source = dialogue.own_source(lm)
    heard = np.concatenate([dialogue.tokens_of(r, 1, layout) for r in data.examples(
        lm.config, 'test', source, limit=20)], axis=1)
    wanted = round(60 * minutes / chunk_s) * layout['chunk_frames']
    heard = np.tile(heard, -(-wanted // heard.shape[1]))[:, :wanted]
    rows, times, began, cpu = [], [], None, None

    def after():
        nonlocal began, cpu
        if began is not None:       # the first chunk is compiled
            times.append(1e3 * (time.perf_counter() - began))
        if len(times) == round(60 * every / chunk_s) - 1:
            rows.append(dict(ms=float(np.median(times)), p95_ms=float(np.percentile(times, 95)),
                             cpu_ms=1e3 * (time.process_time() - cpu) / len(times),
                             resident_mb=resident_mb()))
            told(rows[-1])
            times.clear()
        if not times:
            cpu = time.process_time()
        began = time.perf_counter()
    sampler = generate.Sampler(0.8, 250)
    dialogue.talk(lm, [heard], layout, batch=1, samplers=dict(mine=sampler, tokens=sampler),
                  after=after)
    return chunk_s, rows


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--workdir', required=True, help='a run of a system of two speakers')
    p.add_argument('--minutes', type=float, default=60)
    p.add_argument('--every', type=float, default=5, help='minutes of conversation in a row')
    args = p.parse_args()
    sys.path.insert(0, str(ROOT))
    from jaxsd import config, dialogue, run, trained
    c = config.stored(run.read_run(args.workdir), os.path.join(args.workdir, 'config.json'))
    codec = config.bind(c.codec, 'jaxsd.codec', 'codec')()
    lm = trained.load(c, args.workdir)
    number = itertools.count(1)

    def told(row, what='frame'):
        print(f'to minute {args.every * next(number):g}: {row["ms"]:.1f} ms a {what} (p95 '
              f'{row["p95_ms"]:.1f}, of the processor {row["cpu_ms"]:.1f}), '
              f'{row["resident_mb"]:.0f} MB', flush=True)

    def over(said, rows, what='frame'):
        first, last = rows[0], rows[-1]
        print(f'{said}; the last {args.every:g} minutes against the first: '
              f'{last["resident_mb"] - first["resident_mb"]:+.1f} MB, '
              f'{last["ms"] / first["ms"]:.2f} times the time of a {what}')
    layout = dialogue.layout_of(c, dialogue.own_source(lm))
    if layout['name'].startswith('chunks'):
        chunk_s, rows = by_chunks(lm, layout, minutes=args.minutes, every=args.every,
                                  told=lambda row: told(row, 'chunk'))
        factor = np.mean([r['ms'] for r in rows]) / 1000 / chunk_s
        over(f'chunks of {1000 * chunk_s:.0f} ms: real-time factor {factor:.2f}', rows, 'chunk')
        return
    a_minute = 60 * codec.identity['frame_hz']
    found, rows = measure(lm, codec, callers(lm, codec), frames=round(args.minutes * a_minute),
                          every=round(args.every * a_minute), told=told)
    over(f'{found["frames"]} frames: first audio after {found["first_audio_ms"]:.0f} ms, '
         f'real-time factor {found["real_time_factor"]:.2f}', rows)


if __name__ == '__main__':
    main()

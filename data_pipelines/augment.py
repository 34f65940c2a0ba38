# SPDX-License-Identifier: Apache-2.0
"""A dataset again, with copies of its dialogues whose user is heard as over a loudspeaker at home.

Only the user's channel changes: louder or fainter, in noise that comes and goes, with the system's
own voice echoing in it (arXiv 2410.00037 §4.4). Texts and times stay, codes and units are made anew
by the codecs of the dataset, which must keep its audio:

    python -m data_pipelines.demo --hours 2 --keep-wav --out data/clean
    python -m data_pipelines.augment --source data/clean --out data/demo

Copies have the source `noisy`. Noise comes from wav files (`--noise DIR`, 16 kHz), or is made: hum,
hiss and rumble.
"""

import dataclasses
import io
import os
import shutil
import sys
from collections.abc import Sequence

import numpy as np

from data_pipelines import records
from jaxsd import codec as codecs
from jaxsd import dataset
from jaxsd.flags import Parser

RATE_HZ = codecs.SAMPLE_RATE_HZ
USER = 1


def _power(wav: np.ndarray) -> float:
    return float(np.mean(np.square(wav, dtype=np.float64))) + 1e-12


def louder(wav: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`wav` [S] with a gain of -24 to +15 dB."""
    return wav * np.float32(10 ** (rng.uniform(-24, 15) / 20))


def in_noise(wav: np.ndarray, rng: np.random.Generator, noises: Sequence[np.ndarray]
             ) -> np.ndarray:
    """`wav` [S] with noises one after another, -30 to +6 dB of its power; each is with probability
    1/2 a silence of up to 30 s instead."""
    parts, filled = [], 0
    while filled < len(wav):
        if rng.random() < 0.5:
            parts.append(np.zeros(1 + int(rng.uniform(0, 30) * RATE_HZ), np.float32))
        else:
            parts.append(noises[rng.integers(len(noises))])
        filled += len(parts[-1])
    noise = np.concatenate(parts)[:len(wav)]
    if not noise.any():
        return wav
    heard = _power(noise[noise != 0])
    return wav + noise * np.float32(np.sqrt(_power(wav) / heard * 10 ** (rng.uniform(-30, 6) / 10)))


def echoing(wav: np.ndarray, mine: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`wav` [S] with `mine`, at up to a fifth and 100 to 500 ms late, and the room's reverberation.

    The paper says that something like reverberation follows, and not what: here, exponentially
    decaying noise of 0.1 to 0.4 s, a tenth to a third as strong as the direct sound.
    """
    from scipy.signal import fftconvolve
    late = int(rng.uniform(0.1, 0.5) * RATE_HZ)
    echo = np.zeros_like(wav)
    echo[late:] = mine[:max(0, len(wav) - late)]
    both = wav + np.float32(rng.uniform(0, 0.2)) * echo
    tail = int(rng.uniform(0.1, 0.4) * RATE_HZ)
    room = rng.standard_normal(tail) * np.exp(-6.9 * np.arange(tail) / tail)
    room *= rng.uniform(0.1, 0.33) / np.sqrt(np.sum(room ** 2))
    return both + fftconvolve(both, room)[:len(both)].astype(np.float32)


def as_heard(user: np.ndarray, mine: np.ndarray, rng: np.random.Generator,
             noises: Sequence[np.ndarray]) -> np.ndarray:
    """The user's channel: a gain for every second dialogue, noise and an echo for three of ten."""
    if rng.random() < 0.5:
        user = louder(user, rng)
    if rng.random() < 0.3:
        user = in_noise(user, rng, noises)
    if rng.random() < 0.3:
        user = echoing(user, mine, rng)
    return np.clip(user, -1, 1).astype(np.float32)


def made_noises(rng: np.random.Generator) -> list[np.ndarray]:
    """Ten seconds each of hum, hiss and rumble."""
    from scipy.signal import lfilter
    t = np.arange(10 * RATE_HZ) / RATE_HZ
    hiss = rng.standard_normal(len(t))
    hum = sum(np.sin(2 * np.pi * 50 * k * t) / k for k in (1, 2, 3, 5))
    rumble = lfilter([1], [1, -0.99], hiss)
    return [(0.1 * x / np.std(x)).astype(np.float32) for x in (hum, hiss, rumble)]


def noises_of(folder: str | None, rng) -> list[np.ndarray]:
    import soundfile
    if folder is None:
        return made_noises(rng)
    out = []
    for name in sorted(os.listdir(folder)):
        if name.endswith('.wav'):
            wav, rate = soundfile.read(os.path.join(folder, name), dtype='float32')
            if rate != RATE_HZ:
                raise ValueError(f'--noise {folder}: {name} is of {rate} Hz, not {RATE_HZ}')
            out.append(wav if wav.ndim == 1 else wav.mean(1))
    if not out:
        raise ValueError(f'--noise {folder} holds no wav file')
    return out


def _copy(record, rng, noises, units, codes):
    """`record` with another user: its audio, codes and units."""
    import soundfile
    if not record.wav:
        raise ValueError(f'record {record.id} keeps no audio: make the dataset with --keep-wav')
    wav = soundfile.read(io.BytesIO(record.wav), dtype='float32', always_2d=True)[0].T.copy()
    wav[USER] = as_heard(wav[USER], wav[1 - USER], rng, noises)
    flac = io.BytesIO()
    soundfile.write(flac, wav.T, RATE_HZ, format='FLAC')
    said = [codes.encode(wav[USER]), units.encode(wav[USER])[0]]
    new = np.stack([said[0] if c == USER else record.codes[c] for c in range(len(wav))])
    return dataclasses.replace(
        record, id=f'{record.id}-noisy', source='noisy', wav=flac.getvalue(), codes=new,
        units=tuple(said[1] if c == USER else record.units[c] for c in range(len(wav))))


def again(source: str, out: str, each, *, command: str, arguments: dict) -> dict:
    """Writes the dataset `out` with the tokenizers of `source` and the records that
    each(split, rows, units, codes) yields; returns what was measured.

    rows: what `records.source_of` gives of the split; units, codes: the codecs. Raises ValueError
    in one clear line.
    """
    manifest = dataset.open_dataset(source).manifest
    by_hash = {about['sha256']: os.path.join(source, name)
               for name, about in manifest['files'].items()}
    made = [by_hash.get((manifest[kind] or {}).get('sha256')) for kind in ('units', 'codes')]
    if None in made:
        raise ValueError(f'--source {source} does not hold the files of its units and its codes: '
                         'make it with both')
    command = f'{command} after {manifest["command"]}'
    staging = records.begin(out, {'command': command} | arguments)
    try:
        for name in manifest['files']:
            if not name.startswith('index-'):
                shutil.copyfile(os.path.join(source, name), os.path.join(staging, name))
        units, codes = map(codecs.fitted, made)
        return records.write(
            out, {split: each(split, records.source_of(source, split), units, codes)
                  for split in manifest['splits']},
            units=manifest['units'], codes=manifest['codes'], aligner=manifest['aligner'],
            command=command, license=manifest['license'],
            sample_rate_hz=manifest['sample_rate_hz'])
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def build(source: str, out: str, *, noise: str | None = None, seed: int = 0) -> dict:
    """Writes the dataset `out`; returns what was measured. Raises ValueError in one clear line."""
    noises = noises_of(noise, np.random.default_rng(seed))

    def every(split, rows, units, codes):
        for i in range(len(rows)):
            record = dataset.decode(rows[i])
            yield record
            if record.codes is not None and len(record.codes) == 2:
                yield _copy(record, np.random.default_rng((seed, i, len(rows))), noises, units,
                            codes)
    return again(source, out, every, command=f'python -m data_pipelines.augment --seed {seed}',
                 arguments={'noise': noise or ''})


def main(argv=None) -> int:
    parser = Parser(prog='python -m data_pipelines.augment', description=(
        'Adds copies of dialogues whose user is heard with gain, noise and echo.'))
    parser.add_argument('--source', required=True, help='dataset directory that keeps its audio')
    parser.add_argument('--out', required=True, help='dataset directory to make')
    parser.add_argument('--noise', help='directory of wav files; without it, made noise')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args(argv)
    parser.at_least(args, seed=0)
    try:
        done = build(args.source, args.out, noise=args.noise, seed=args.seed)
    except (ValueError, OSError) as e:
        print(f'augment: {records.told(args.out, e)}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('augment: interrupted', file=sys.stderr)
        return 130
    print(f'{args.out}: {done["records"]} records')
    return 0


if __name__ == '__main__':
    sys.exit(main())

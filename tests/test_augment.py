# SPDX-License-Identifier: Apache-2.0
"""Is the user's side of a dialogue made worse as the paper says, and nothing else?"""

import dataclasses
import io
import json

import numpy as np
import pytest
import soundfile

from data_pipelines import augment, records, simulate
from jaxsd import codec, dataset

RATE = augment.RATE_HZ


def tone(seconds: float, hz: float = 300.0) -> np.ndarray:
    return (0.1 * np.sin(2 * np.pi * hz * np.arange(int(seconds * RATE)) / RATE)
            ).astype(np.float32)


def power(x) -> float:
    return float(np.mean(np.square(x, dtype=np.float64)))


def test_gains_lie_between_24_below_and_15_above():
    wav, rng = tone(0.1), np.random.default_rng(0)
    db = [10 * np.log10(power(augment.louder(wav, rng)) / power(wav)) for _ in range(300)]
    assert -24.01 <= min(db) < -22 and 13 < max(db) <= 15.01
    assert abs(np.mean(db) - -4.5) < 2


def test_noise_comes_and_goes_at_its_level():
    """Relative to the speech, -30 to +6 dB where it is heard; about half of the slots are silent,
    for up to half a minute."""
    wav, noises, shares, db = tone(8.0), [np.ones(RATE, np.float32)], [], []
    for i in range(80):
        added = augment.in_noise(wav, np.random.default_rng(i), noises) - wav
        there = np.abs(added) > 1e-7
        shares.append(there.mean())
        if there.any():
            db.append(10 * np.log10(power(added[there]) / power(wav)))
    assert -30.1 < min(db) < -27 and 3 < max(db) < 6.1
    assert 0.05 < np.mean(shares) < 0.4         # a second of noise to half a minute of silence
    assert min(shares) == 0.0


def test_an_echo_is_my_voice_late_and_faint():
    """Silence of the user: what is heard is mine, 100 to 500 ms late and at most a fifth of it."""
    mine = np.zeros(RATE, np.float32)
    mine[0] = 1.0
    late, strong = [], []
    for i in range(60):
        heard = augment.echoing(np.zeros_like(mine), mine, np.random.default_rng(i))
        at = int(np.argmax(np.abs(heard)))
        late.append(at / RATE)
        strong.append(np.abs(heard[at]))
        assert np.abs(heard[:at]).max() < 1e-6
    assert 0.1 <= min(late) < 0.13 and 0.47 < max(late) <= 0.5
    assert max(strong) < 0.27 and min(strong) < 0.03


def test_how_often_each_happens():
    """Half the users change in level only or not at all, three of ten hear noise, as many echo."""
    wav, mine = tone(0.3), tone(0.3, 700.0)
    noises = [np.full(RATE, 0.1, np.float32)]
    same = sum(np.array_equal(augment.as_heard(wav, mine, np.random.default_rng(i), noises), wav)
               for i in range(400))
    assert abs(same / 400 - 0.5 * (1 - 0.3 * 0.5) * 0.7) < 0.08     # half of noise is silence here
    loud = augment.as_heard(20 * wav, mine, np.random.default_rng(0), noises)
    assert np.abs(loud).max() <= 1.0


def test_a_dataset_gets_copies_of_its_dialogues(corpus, tmp_path):
    """Everything there was, and per dialogue one more whose user alone is other, encoded anew."""
    out = tmp_path / 'noisy'
    assert augment.main(['--source', str(corpus), '--out', str(out), '--seed', '3']) == 0
    options = dict(name='rvq', path=str(out / 'codec.safetensors'), frame_hz=12.5, codebooks=8,
                   size=256)
    before = dataset.open_dataset(str(corpus), options | dict(path=str(
        corpus / 'codec.safetensors')))
    after = dataset.open_dataset(str(out), options)
    count = {kind: len(before.select('train', (kind,), '')) for kind in ('dialogue', 'story')}
    assert len(after.select('train', ('noisy',), '')) == count['dialogue'] > 0
    for kind, n in count.items():
        assert len(after.select('train', (kind,), '')) == n
    clean = {r.id: r for r in (before.record('train', int(i))
                               for i in before.select('train', ('dialogue',), ''))}
    changed = 0
    rvq = codec.rvq(**{k: v for k, v in options.items() if k != 'name'})
    for i in after.select('train', ('noisy',), ''):
        r = after.record('train', int(i))
        was = clean[r.id.removesuffix('-noisy')]
        np.testing.assert_array_equal(r.codes[0], was.codes[0])
        np.testing.assert_array_equal(r.units[0], was.units[0])
        assert r.words == was.words and r.turns == was.turns and r.codes.shape == was.codes.shape
        wav = soundfile.read(io.BytesIO(r.wav), dtype='float32')[0].T
        true = soundfile.read(io.BytesIO(was.wav), dtype='float32')[0].T
        np.testing.assert_array_equal(wav[0], true[0])
        changed += not np.array_equal(wav[1], true[1])
        if not changed:
            np.testing.assert_array_equal(rvq.encode(wav[1]), r.codes[1])
    assert changed >= count['dialogue'] // 3
    with open(out / 'manifest.json') as f:
        manifest = json.load(f)
    assert 'augment' in manifest['command']


def test_what_fails_leaves_nothing_that_blocks_the_next_try(corpus, tmp_path):
    def each(split, rows, units, codes):
        raise ValueError('this source will not do')
        yield
    with pytest.raises(ValueError, match='will not do'):
        augment.again(str(corpus), str(tmp_path / 'x'), each, arguments={}, command='made')
    assert not any(tmp_path.iterdir())


def test_what_is_missing_is_said(corpus, tmp_path, capsys):
    assert augment.main(['--source', str(tmp_path), '--out', str(tmp_path / 'x')]) == 1
    assert 'no dataset at ' in capsys.readouterr().err
    record = dataset.open_dataset(str(corpus)).record('train', 0)
    text = dataclasses.replace(record, codes=None, units=(), words=(), phones=(), turns=())
    records.write(str(tmp_path / 'text'), {'train': [text]}, units=None, codes=None, aligner={},
                  license='none', command='made', sample_rate_hz=RATE)
    argv = ['--source', str(tmp_path / 'text'), '--out', str(tmp_path / 'x')]
    for program, more in ((augment, []), (simulate, ['--hours', '1'])):
        assert program.main([*argv, *more]) == 1
        said = capsys.readouterr().err
        assert 'does not hold the files of its units and its codes' in said
        assert said.count('\n') == 1
    (tmp_path / 'noise').mkdir()
    with pytest.raises(ValueError, match='holds no wav file'):
        augment.noises_of(str(tmp_path / 'noise'), None)

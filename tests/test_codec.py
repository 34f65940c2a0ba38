# SPDX-License-Identifier: Apache-2.0
"""Codecs on real speech: shapes, identity, damage, and whether words survive the round trip."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxsd import codec

WHO = ('tom', 'anna', 'my brother', 'the teacher', 'a doctor')
WHAT = ('found a red key', 'has three dogs', 'sold nine green bottles', 'bought a yellow hat')
WHERE = ('in the garden', 'at the market', 'under the bridge')
SENTENCES = [f'{a} {b} {c}' for a in WHO for b in WHAT for c in WHERE]
UNITS = dict(frame_hz=25.0, size=200)
CODES = dict(frame_hz=12.5, codebooks=4, size=64)


@pytest.fixture(scope='module')
def speech():
    """(sentence, wave) pairs in two voices: 60 to learn from, and 8 others in the same voices."""
    from data_pipelines import espeak
    order = np.random.default_rng(0).permutation(len(SENTENCES))
    said = [(SENTENCES[i], espeak.speak(SENTENCES[i], voice=('en-us', 'en-us+m3')[n % 2],
                                        rate_wpm=150 + 5 * (n % 7)).wav)
            for n, i in enumerate([*order[:52], *order[:8], *order[52:]])]
    return said[:60], said[60:]


@pytest.fixture(scope='module')
def files(speech, tmp_path_factory):
    folder = tmp_path_factory.mktemp('codecs')
    wavs = [wav for _, wav in speech[0]]
    codec.fit_kmeans(wavs, path=str(folder / 'units'), **UNITS)
    codec.fit_rvq(wavs, path=str(folder / 'codes'), **CODES)
    return folder


@pytest.fixture(scope='module')
def units(files):
    return codec.kmeans(path=str(files / 'units'), **UNITS)


@pytest.fixture(scope='module')
def codes(files):
    return codec.rvq(path=str(files / 'codes'), **CODES)


@pytest.mark.parametrize('samples, columns', [(0, 0), (1, 1), (1279, 1), (1280, 1), (1281, 2),
                                              (700_000, 547)])
def test_shapes(units, codes, samples, columns):
    wav = np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)
    grid = codes.encode(wav)
    assert grid.dtype == np.int16 and grid.shape == (4, columns)
    assert units.encode(wav).shape == (1, -(-samples // 640))
    if samples < 2000:
        sound = codes.decode(grid)
        assert sound.dtype == np.float32 and sound.shape == (columns * 1280,)
        assert np.isfinite(sound).all() and (samples == 0 or np.abs(sound).max() <= 1)


def test_frames_stand_still(codes, speech):
    """A code depends on its own 80 ms and the window around it, not on where a block begins."""
    wav = np.concatenate([w for _, w in speech[0]])[:1280 * 600]     # 4800 mel frames: two blocks
    whole = codes.encode(wav)
    part = codes.encode(wav[1280 * 480:1280 * 560])
    assert (whole[:, 482:558] == part[:, 2:-2]).mean() > 0.999
    assert (whole[:, :100] == codes.encode(wav[:1280 * 102])[:, :100]).all()


def test_log_mel_frame_by_frame(files):
    """Against the definition, in double precision: frame i is centered on its own 160 samples."""
    import librosa
    from scipy.signal import get_window
    wav = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    bands = librosa.filters.mel(sr=16000, n_fft=1024, n_mels=80)
    ours = codec._log_mel(wav, load_file(files / 'units')['mel'], 640).reshape(-1, 80)
    padded = np.pad(wav.astype(np.float64), 432)
    assert ours.shape == (100, 80)
    for i in (0, 1, 57, 99):
        spectrum = np.fft.fft(padded[160 * i:160 * i + 1024] * get_window('hann', 1024))[:513]
        np.testing.assert_allclose(ours[i], np.log(bands @ np.abs(spectrum)), atol=1e-4)


def test_griffin_lim_restores_the_spectrum(speech):
    wav = np.pad(speech[1][0][1][:16000], 432)
    frames = (len(wav) - 1024) // 160 + 1
    wanted = np.abs(codec._stft(wav, frames))
    made = np.abs(codec._stft(np.pad(codec._griffin_lim(wanted), 432), frames))
    error = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
    assert error < 0.25, error


def test_each_codebook_takes_up_some_of_the_rest(codes, files, speech):
    tensors = load_file(files / 'codes')
    frames = np.concatenate([codec._log_mel(w, tensors['mel'], 1280) for _, w in speech[1]])
    rest = (frames - tensors['mean']) @ tensors['basis']
    left = [np.mean(rest ** 2)]
    grid = np.concatenate([codes.encode(w) for _, w in speech[1]], 1)
    for book, row in zip(tensors['codebooks'], grid, strict=True):
        rest = rest - book[row]
        left.append(np.mean(rest ** 2))
    assert all(b < 0.95 * a for a, b in zip(left, left[1:], strict=False)), left
    assert left[-1] < 0.3 * left[0]


def test_words_survive(units, codes, speech):
    """A recognizer of the task hears resynthesized speech far better than noise."""
    from data_pipelines import judge
    said, wavs = zip(*speech[1], strict=True)
    noise = [np.random.default_rng(0).normal(0, 0.1, len(w)).astype(np.float32) for w in wavs]
    parts = {'original': list(wavs), 'units': [units.decode(units.encode(w)) for w in wavs],
             'codes': [codes.decode(codes.encode(w)) for w in wavs], 'noise': noise}
    heard = iter(judge.recognize([w for part in parts.values() for w in part], SENTENCES,
                                 processes=1))
    rates = {name: judge.wer(said, [next(heard) for _ in part]) for name, part in parts.items()}
    assert rates['original'] < 0.1 and rates['noise'] > 0.9, rates
    assert rates['units'] < 0.4 and rates['codes'] < 0.4, rates


def test_a_seed_is_a_file(files, speech, tmp_path):
    wavs = [wav for _, wav in speech[0]]
    again = codec.fit_rvq(iter(wavs), path=str(tmp_path / 'codes'), **CODES)
    assert (tmp_path / 'codes').read_bytes() == (files / 'codes').read_bytes()
    assert again.identity == codec.rvq(path=str(files / 'codes'), **CODES).identity
    other = codec.fit_rvq(wavs, path=str(tmp_path / 'codes'), **CODES, seed=1)
    assert other.identity['sha256'] != again.identity['sha256']
    assert [p.name for p in tmp_path.iterdir()] == ['codes']


def test_identity(units, files):
    import hashlib
    want = hashlib.sha256((files / 'units').read_bytes()).hexdigest()
    assert units.identity == {'name': 'kmeans', 'frame_hz': 25.0, 'codebooks': 1, 'size': 200,
                              'sample_rate_hz': 16000, 'sha256': want}
    assert codec.fitted(str(files / 'units')).identity == units.identity
    json.dumps(units.identity)


@pytest.mark.parametrize('option, value, said', [
    ('size', 500, 'size=200.*size=500'), ('frame_hz', 50.0, 'frame_hz=25.0.*frame_hz=50.0'),
    ('codebooks', 8, 'codebooks=1.*codebooks=8'),
    ('sample_rate_hz', 24000, 'sample_rate_hz=16000.*sample_rate_hz=24000')])
def test_options_that_disagree_with_the_file(files, option, value, said):
    with pytest.raises(ValueError, match=said):
        codec.kmeans(path=str(files / 'units'), **{**UNITS, option: value})


def test_another_kind_of_codec(files):
    with pytest.raises(ValueError, match="name='rvq'.*name='kmeans'"):
        codec.kmeans(path=str(files / 'codes'), frame_hz=12.5, size=64, codebooks=4)


def test_damaged_files(files, tmp_path):
    whole = (files / 'units').read_bytes()
    tensors = load_file(files / 'units')
    header = {'jaxsd_codec': json.dumps({'name': 'kmeans', 'frame_hz': 25.0, 'codebooks': 1,
                                         'size': 200, 'sample_rate_hz': 16000})}
    cases = {'cut': whole[:len(whole) // 2], 'header': whole[:40], 'empty': b'',
             'text': b'hello' * 9, 'huge': (1 << 60).to_bytes(8, 'little') + whole[8:]}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    save_file(tensors, tmp_path / 'nameless')
    save_file({**tensors, 'codebooks': tensors['codebooks'] * np.nan}, tmp_path / 'nan', header)
    save_file({**tensors, 'mean': tensors['mean'][:80]}, tmp_path / 'short', header)
    save_file({k: v for k, v in tensors.items() if k != 'decoder'}, tmp_path / 'missing', header)
    save_file(tensors, tmp_path / 'wild', {'jaxsd_codec': '{"name": "kmeans", "frame_hz": 0, '
                                           '"codebooks": 1, "size": 1, "sample_rate_hz": 16000}'})
    names = [p.name for p in tmp_path.iterdir()]
    assert len(names) == 10
    for name in [*names, 'absent', '.']:
        with pytest.raises(ValueError, match='codec: ') as e:
            codec.kmeans(path=str(tmp_path / name), **UNITS)
        assert '\n' not in str(e.value) and str(tmp_path) in str(e.value)


def test_a_wav_that_was_cut_short(tmp_path):
    """Only where its header promises more sound than there is: a pipe's header promises nothing."""
    import soundfile
    path = tmp_path / 'a.wav'
    soundfile.write(path, np.zeros(801), 16000, subtype='PCM_U8')       # an odd number of bytes
    whole = path.read_bytes()
    at = whole.index(b'data')
    more = b'LIST' + (5).to_bytes(4, 'little') + b'notes\0'
    sizes = [n.to_bytes(4, 'little') for n in (0, 0xFFFFFFFF, 0x7FFFF000)]
    for good in (whole, whole + b'tail', whole[:at] + more + whole[at:], b'RIFF', b'', b'x' * 4000,
                 *(whole[:at + 4] + n + whole[at + 8:-9] for n in sizes)):
        path.write_bytes(good)
        codec.whole_wav(str(path))
    for cut in (whole[:-9], whole[:at] + more + whole[at:-9], whole[:at + 8]):
        path.write_bytes(cut)
        there = len(cut) - cut.index(b'data') - 8
        with pytest.raises(ValueError, match=f'a.wav was cut short: its header says 801 bytes of '
                                             f'sound, {there} are there'):
            codec.whole_wav(str(path))


def test_bad_waves_and_codes(units, codes):
    for wav in (np.zeros((2, 100), np.float32), np.zeros(100, np.int16),
                np.array([0.0, np.nan], np.float32)):
        with pytest.raises(ValueError, match='codec: '):
            units.encode(wav)
    for grid in (np.zeros((1, 5), np.int16), np.zeros(5, np.int16), np.zeros((4, 5), np.float32),
                 np.full((4, 5), 64), np.full((4, 5), -1)):
        with pytest.raises(ValueError, match='codec: '):
            codes.decode(grid)


def test_too_little_audio(tmp_path):
    with pytest.raises(ValueError, match='25 frames.*200 centroids'):
        codec.fit_kmeans([np.zeros(16000, np.float32)], path=str(tmp_path / 'x'), **UNITS)
    with pytest.raises(ValueError, match='12.5, 25 or 50'):
        codec.fit_kmeans([], path=str(tmp_path / 'x'), frame_hz=40.0, size=10)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(files, speech, tmp_path, monkeypatch):
    before = (files / 'units').read_bytes()
    (tmp_path / 'units').write_bytes(before)

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(codec.os, 'fsync', full)
    with pytest.raises(OSError, match='No space'):
        codec.fit_kmeans([w for _, w in speech[0][:20]], path=str(tmp_path / 'units'),
                         frame_hz=25.0, size=8)
    assert [p.name for p in tmp_path.iterdir()] == ['units']
    assert (tmp_path / 'units').read_bytes() == before


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / 'weights').write_bytes(b'x')
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(ValueError, match=r'needs torch and transformers.*jaxsd\[mimi\]'):
        codec.mimi(path=str(tmp_path / 'weights'))
    with pytest.raises(ValueError, match='no Mimi weights at'):
        codec.mimi(path=str(tmp_path / 'absent'))
    monkeypatch.setitem(sys.modules, 'sklearn.cluster', None)
    with pytest.raises(ValueError, match=r'librosa and scikit-learn.*jaxsd\[audio\]'):
        codec.fit_kmeans([], path=str(tmp_path / 'x'), **UNITS)


def test_speaking_wakes_neither_jax_nor_scikit_learn(files):
    code = ('import sys, numpy as np; from jaxsd import codec; '
            f'c = codec.rvq(path={str(files / "codes")!r}, frame_hz=12.5, codebooks=4, size=64); '
            'c.decode(c.encode(np.zeros(3000, np.float32))); '
            'print([m for m in ("jax", "sklearn", "librosa", "torch") if m in sys.modules])')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == '[]'


def test_finite_scalars_as_the_released_tokenizer_numbers_them():
    """Levels (5, 1, 4, 7) of eight in each of four channels are 5 + 8 + 4 * 64 + 7 * 512."""
    eights = (8, 8, 8, 8)
    z = np.array([[0.3, -1.2, 0.0, 2.0], [0.0] * 4, [-9.0] * 4, [9.0] * 4])
    assert codec.fsq_codes(z, eights).tolist() == [3853, 2340, 0, 4095]
    # Odd numbers of levels have zero in the middle; every code is reached.
    assert codec.fsq_codes(np.zeros((1, 2)), (5, 3)).tolist() == [2 + 5 * 1]
    grid = np.stack(np.meshgrid(*[np.linspace(-3, 3, 101)] * 2, indexing='ij'), -1).reshape(-1, 2)
    assert set(codec.fsq_codes(grid, (5, 4)).tolist()) == set(range(20))


def test_one_thread_until_the_last_has_left():
    """Two that encode at once: who is done first does not give the other more threads, whose sums
    would come out in another order."""
    import threadpoolctl

    def threads():
        return {x['num_threads'] for x in threadpoolctl.threadpool_info()
                if x['user_api'] == 'blas'}
    with threadpoolctl.threadpool_limits(2, user_api='blas'):
        before = threads()
        first, second = codec._one_thread(), codec._one_thread()
        first.__enter__()
        second.__enter__()
        assert threads() == {1}
        first.__exit__(None, None, None)
        assert threads() == {1}
        second.__exit__(None, None, None)
        assert threads() == before

# SPDX-License-Identifier: Apache-2.0
"""Sound to small integers and back: the only module that knows audio.

A codec writes speech as codes, K rows of integers at a fixed frame rate, and speaks codes again.
Three are here under one interface. `kmeans` gives one stream of units and `rvq` a stack of residual
codebooks; both are learned in seconds from a few minutes of log-mel frames by `fit_kmeans` and
`fit_rvq`, need no download and are heard through Griffin-Lim. `mimi` is the released neural codec,
its weights given by a local path. A codec's identity (its name, rates, codebooks and the hash of
its weights) is stored beside every dataset it wrote, so that no model trains on another's codes.

The embedded codecs are acoustic and speaker-dependent: they carry words on the kind of speech they
were fitted on, and stand in for HuBERT units or Mimi only in being real, learned and invertible.
Nothing here imports jax; scipy and scikit-learn are imported by the functions that need them.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import struct
import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np

SAMPLE_RATE_HZ = 16000
_FFT, _HOP, _MELS = 1024, 160, 80
_EDGE = (_FFT - _HOP) // 2              # a window is centered on its hop
_FLOOR = 1e-3                           # smaller magnitudes are silence and must earn no centroids
_WIDTH = 64                             # principal components kept of a stack of frames
_RIDGE = 1e-4                           # of the decoder's regression, relative to its mean energy
_BLOCK = 4096                           # mel frames computed at once: bounds memory on long audio
_PIPED = 0x7FFFF000                     # a wav's stated size from here on is made up
_MAX_BYTES = 1 << 28                    # no fitted codec is larger


@dataclasses.dataclass(frozen=True)
class Codec:
    """A codec ready to use.

    identity: {'name', 'frame_hz', 'codebooks', 'size', 'sample_rate_hz', 'sha256'}.
    encode:   float32 [S] mono at `sample_rate_hz`, in -1..1 -> int16 [K, T],
              T = ceil(S / samples per frame), the last frame filled with zeros.
    decode:   integers [K, T] -> float32 [S], S = T * samples per frame.
    latents:  integers [k, T] of the first k codebooks -> float32 [T, W], what they stand for.
    sound:    float32 [T, W] -> float32 [S]; decode is the sound of all codebooks' latents.
    All raise ValueError for another shape, a value that is not finite or a code out of range.
    """

    identity: dict
    encode: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]
    latents: Callable[[np.ndarray], np.ndarray]
    sound: Callable[[np.ndarray], np.ndarray]


class Latents:
    """Codes [K, T] as what they stand for, [T, 2, W]: the first codebook alone, and all of them.

    Made when sliced.
    """

    def __init__(self, codec: Codec, codes: np.ndarray):
        self._latents, self._codes = codec.latents, codes

    def __len__(self) -> int:
        return self._codes.shape[1]

    def __getitem__(self, frames: slice) -> np.ndarray:
        codes = self._codes[:, frames]
        return np.stack([self._latents(codes[:1]), self._latents(codes)], axis=1)


# ----------------------------------------------------------------------------------- log-mel frames

@functools.lru_cache
def _threads():
    try:
        import threadpoolctl  # comes with scikit-learn
    except ImportError:
        return None
    return threadpoolctl.ThreadpoolController()


_ALONE = threading.Lock()
_limited = dict(by=0, until=contextlib.ExitStack())


@contextlib.contextmanager
def _one_thread():
    """A context in which BLAS uses one thread, in all threads, until the last has left it.

    The products here are small: on a busy machine its threads made encoding ten times slower, and
    they sum in another order. Work is spread over processes instead.
    """
    with _ALONE:
        if not _limited['by'] and _threads():
            _limited['until'].enter_context(_threads().limit(limits=1))
        _limited['by'] += 1
    try:
        yield
    finally:
        with _ALONE:
            _limited['by'] -= 1
            if not _limited['by']:
                _limited['until'].close()


def _samples_per_frame(frame_hz: float, sample_rate_hz: int) -> int:
    samples = sample_rate_hz / frame_hz
    if samples != int(samples):
        raise ValueError(f'codec: frame_hz={frame_hz} does not divide {sample_rate_hz} Hz evenly')
    return int(samples)


def _checked_wav(wav) -> np.ndarray:
    wav = np.asarray(wav)
    if wav.ndim != 1 or wav.dtype.kind != 'f':
        raise ValueError(f'codec: encode takes one channel of floats [S], got {wav.dtype} '
                         f'{wav.shape}')
    if not np.isfinite(wav).all():
        raise ValueError('codec: the wave holds values that are not finite')
    return wav.astype(np.float32, copy=False)


def _checked_codes(codes, codebooks: int, size: int) -> np.ndarray:
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.shape[0] != codebooks or codes.dtype.kind not in 'iu':
        raise ValueError(f'codec: decode takes integers [{codebooks}, T], got {codes.dtype} '
                         f'{codes.shape}')
    if codes.size and (codes.min() < 0 or codes.max() >= size):
        raise ValueError(f'codec: codes must lie in 0..{size - 1}, '
                         f'got {codes.min()}..{codes.max()}')
    return codes.astype(np.int64)


@functools.lru_cache
def _window() -> np.ndarray:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FFT) / _FFT)).astype(np.float32)


def _stft(x, frames: int) -> np.ndarray:
    """complex64 [frames, 513] of a wave already padded by the window's edge on both sides."""
    import scipy.fft
    windows = np.lib.stride_tricks.sliding_window_view(x, _FFT)[::_HOP][:frames]
    return scipy.fft.rfft(windows * _window(), axis=-1)


def _log_mel(wav: np.ndarray, mel: np.ndarray, samples: int) -> np.ndarray:
    """float32 [T, stack * M]: log-mel magnitudes, stacked to as many 10 ms frames as `samples`."""
    columns = -(-wav.size // samples)
    total = columns * samples // _HOP
    x = np.zeros(total * _HOP + 2 * _EDGE, np.float32)
    x[_EDGE:_EDGE + wav.size] = wav
    out = np.empty((total, _MELS), np.float32)
    for first in range(0, total, _BLOCK):
        n = min(_BLOCK, total - first)
        spectrum = _stft(x[first * _HOP:(first + n - 1) * _HOP + _FFT], n)
        out[first:first + n] = np.log(np.maximum(np.abs(spectrum) @ mel.T, _FLOOR))
    return out.reshape(columns, samples // _HOP * _MELS)


@functools.lru_cache
def _mel(sample_rate_hz: int) -> np.ndarray:
    try:
        import librosa
    except ImportError as e:
        raise ValueError(f'log-mel frames need librosa ({e}); install jaxsd[audio]') from e
    return librosa.filters.mel(sr=sample_rate_hz, n_fft=_FFT, n_mels=_MELS).astype(np.float32)


class LogMel:
    """One channel of a record's audio as [S, 80]: log-mel magnitudes every 10 ms, made when sliced.

    Divided by 4 and moved by 1/2, which leaves them near -1..1. A slice reads no more of the audio
    than it shows, so that one question of a long dialogue costs what it lasts.
    """

    def __init__(self, flac: bytes, channel: int, samples: int):
        self._flac, self._channel = flac, channel
        self._samples, self.shape = samples, (-(-samples // _HOP), _MELS)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, frames: slice) -> np.ndarray:
        """float32 [frames, 80]. Raises ValueError for audio that cannot be read."""
        import io

        import soundfile
        first, stop, step = frames.indices(len(self))
        if step != 1:
            raise ValueError('log-mel frames are sliced in order')
        if stop <= first:
            return np.zeros((0, _MELS), np.float32)
        begin, end = first * _HOP - _EDGE, stop * _HOP + _EDGE
        heard = slice(max(0, begin), min(self._samples, end))
        try:
            wav = soundfile.read(io.BytesIO(self._flac), dtype='float32', always_2d=True,
                                 start=heard.start, stop=heard.stop)[0]
        except (OSError, RuntimeError) as e:
            raise ValueError(f'the audio of a record cannot be read: {e}') from None
        x = np.zeros(end - begin, np.float32)
        x[heard.start - begin:heard.stop - begin] = wav[:, self._channel]
        with _one_thread():
            mel = np.abs(_stft(x, stop - first)) @ _mel(SAMPLE_RATE_HZ).T
        return (np.log(np.maximum(mel, _FLOOR)) / 4 + 0.5).astype(np.float32)


def flac(wav: np.ndarray) -> bytes:
    """A wave [S] of 16 kHz as records keep it."""
    import io

    import soundfile
    out = io.BytesIO()
    soundfile.write(out, wav, SAMPLE_RATE_HZ, format='FLAC')
    return out.getvalue()


def log_mel(flac: bytes) -> tuple[LogMel, ...]:
    """The log-mel frames of each channel. Raises ValueError for anything but audio of 16 kHz."""
    import io

    import soundfile
    try:
        about = soundfile.info(io.BytesIO(flac))
    except (OSError, RuntimeError) as e:
        raise ValueError(f'the audio of a record cannot be read: {e}') from None
    if about.samplerate != SAMPLE_RATE_HZ:
        raise ValueError(f'log-mel frames are of {SAMPLE_RATE_HZ} Hz, this audio of '
                         f'{about.samplerate}')
    return tuple(LogMel(flac, c, about.frames) for c in range(about.channels))


def _overlap_add(windows: np.ndarray) -> np.ndarray:
    """float32 [(T - 1) * hop + 1024]: the sum of windows [T, 1024] laid a hop apart."""
    frames, hops = len(windows), -(-_FFT // _HOP)
    padded = np.zeros((frames, hops * _HOP), np.float32)
    padded[:, :_FFT] = windows
    out = np.zeros((frames + hops - 1, _HOP), np.float32)
    for i in range(hops):
        out[i:i + frames] += padded[:, i * _HOP:(i + 1) * _HOP]
    return out.reshape(-1)[:(frames - 1) * _HOP + _FFT]


def _griffin_lim(magnitude: np.ndarray, iterations: int = 32, momentum: float = 0.99) -> np.ndarray:
    """A wave whose spectrum has `magnitude` [T, 513]: fast Griffin-Lim (Perraudin et al. 2013).

    The first phases come from a fixed seed, so the same codes always sound the same.
    """
    import scipy.fft
    window = _window()
    norm = np.maximum(_overlap_add(np.broadcast_to(window * window, (len(magnitude), _FFT))), 1e-3)
    phase = np.random.default_rng(0).random(magnitude.shape, np.float32) * np.float32(2 * np.pi)
    spectrum = magnitude * np.exp(1j * phase)
    before = 0.0
    step = np.float32(momentum / (1 + momentum))
    for i in range(iterations + 1):
        wav = _overlap_add(scipy.fft.irfft(spectrum, _FFT, axis=-1) * window) / norm
        if i == iterations:
            return wav[_EDGE:len(wav) - _EDGE]
        again = _stft(wav, len(magnitude))
        spectrum = again - step * before
        before = again
        spectrum *= magnitude / np.maximum(np.abs(spectrum), 1e-8)


def _spoken(log_mel: np.ndarray, unmel: np.ndarray) -> np.ndarray:
    """float32 [T * hop]: the wave of log-mel frames [T, 80], peaks kept inside -1..1."""
    if not len(log_mel):
        return np.zeros(0, np.float32)
    mel = np.exp(log_mel)
    mel[mel <= _FLOOR * 1.5] = 0.0
    wav = _griffin_lim(np.maximum(mel @ unmel.T, 0.0).astype(np.float32))
    return (wav / max(1.0, float(np.abs(wav).max()) / 0.99)).astype(np.float32)


def heard(frames: np.ndarray) -> np.ndarray:
    """float32 [S * 160]: a wave of frames [S, 80] as `LogMel` has them, by Griffin-Lim."""
    frames = np.asarray(frames, np.float32)
    if frames.ndim != 2 or frames.shape[1] != _MELS or not np.isfinite(frames).all():
        raise ValueError(f'log-mel frames are finite [S, {_MELS}], got {frames.shape}')
    unmel = np.linalg.pinv(_mel(SAMPLE_RATE_HZ).astype(np.float64)).astype(np.float32)
    with _one_thread():
        return _spoken((np.clip(frames, -2.0, 2.0) - 0.5) * 4, unmel)


# ------------------------------------------------------------------------------------------ fitting

def _cluster(x: np.ndarray, size: int, seed: int) -> np.ndarray:
    """float32 [size, D]: k-means centroids of `x` [N, D], the same for the same seed."""
    import warnings

    from sklearn.cluster import KMeans
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')     # fewer distinct frames than centroids: harmless
        found = KMeans(size, n_init=1, max_iter=25, random_state=seed).fit(x)
    return found.cluster_centers_.astype(np.float32)


def _nearest(x: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """int64 [N]: the row of `codebook` nearest to each row of `x`."""
    return np.argmin(np.sum(codebook ** 2, -1) - 2.0 * (x @ codebook.T), -1)


def _quantize(x: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """int64 [K, N]: each codebook takes up what the ones before it left over."""
    codes = []
    for codebook in codebooks:
        codes.append(_nearest(x, codebook))
        x = x - codebook[codes[-1]]
    return np.stack(codes)


def _sum_of(codes: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """float32 [T, D]: the sum of the centroids that `codes` [K, T] name."""
    return sum(book[row] for book, row in zip(codebooks, codes, strict=True))


def _neighbors(x: np.ndarray) -> np.ndarray:
    """float32 [T, 3 D + 1]: every frame beside the one before and after it, and a one."""
    padded = np.pad(x, ((1, 1), (0, 0)), 'edge')
    return np.concatenate([padded[:-2], x, padded[2:], np.ones((len(x), 1), np.float32)], 1)


def _decoder(quantized: Iterable[np.ndarray], frames: Iterable[np.ndarray]) -> np.ndarray:
    """float32 [3 D + 1, F]: ridge regression of log-mel frames on three neighboring code vectors.

    Hearing the neighbors smooths the seams between frames: on held-out synthesized speech a task
    recognizer's errors fell by half against speaking the bare centroids.
    """
    gram, target = 0.0, 0.0
    for x, y in zip(quantized, frames, strict=True):
        x = _neighbors(x).astype(np.float64)
        gram, target = gram + x.T @ x, target + x.T @ y
    ridge = _RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    return np.linalg.solve(gram + ridge, target).astype(np.float32)


def _fit(name: str, wavs: Iterable[np.ndarray], path: str, frame_hz: float, codebooks: int,
         size: int, seed: int) -> Codec:
    try:
        import librosa
        import sklearn.cluster  # noqa: F401 - before the limit, which holds for what is loaded
        import threadpoolctl
    except ImportError as e:
        raise ValueError(f'codec: fitting needs librosa and scikit-learn ({e}); '
                         'install jaxsd[audio]') from e
    samples = _samples_per_frame(frame_hz, SAMPLE_RATE_HZ)
    if samples % _HOP:
        raise ValueError(f'codec: frame_hz={frame_hz} is not a whole number of 10 ms frames; '
                         'use 12.5, 25 or 50')
    if size > 1 << 15:
        raise ValueError(f'codec: size={size} does not fit int16 codes; use at most 32768')
    mel = librosa.filters.mel(sr=SAMPLE_RATE_HZ, n_fft=_FFT, n_mels=_MELS).astype(np.float32)
    with threadpoolctl.threadpool_limits(1):
        frames = [_log_mel(_checked_wav(wav), mel, samples) for wav in wavs if len(wav)]
        x = np.concatenate(frames) if frames else np.zeros((0, 1), np.float32)
        if len(x) < size:
            raise ValueError(f'codec: {len(x)} frames ({len(x) / frame_hz:.1f} s of audio) cannot '
                             f'give {size} centroids; fit on more audio or a smaller size')
        mean = x.mean(0)
        _, basis = np.linalg.eigh(np.cov((x - mean).T).astype(np.float64))
        basis = np.ascontiguousarray(basis[:, ::-1][:, :_WIDTH], np.float32)
        rest = (x - mean) @ basis
        books = []
        for k in range(codebooks):
            books.append(_cluster(rest, size, seed + k))
            rest = rest - books[-1][_nearest(rest, books[-1])]
        books = np.stack(books)
        spoken = (_sum_of(_quantize((f - mean) @ basis, books), books) for f in frames)
        decoder = _decoder(spoken, frames)
    _save(path, {'mel': mel, 'mean': mean, 'basis': basis, 'codebooks': books, 'decoder': decoder},
          {'name': name, 'frame_hz': frame_hz, 'codebooks': codebooks, 'size': size,
           'sample_rate_hz': SAMPLE_RATE_HZ})
    return _load(name, path, frame_hz, codebooks, size, SAMPLE_RATE_HZ)


def fit_kmeans(wavs: Iterable[np.ndarray], *, path: str, frame_hz: float, size: int,
               seed: int = 0) -> Codec:
    """Learns one codebook of `size` units from `wavs` (float32 [S] at 16 kHz), writes it to `path`.

    Ten to twenty minutes of speech are plenty. The file is a function of the audio and the seed.
    Raises ValueError when there are fewer frames than centroids.
    """
    return _fit('kmeans', wavs, path, frame_hz, 1, size, seed)


def fit_rvq(wavs: Iterable[np.ndarray], *, path: str, frame_hz: float, codebooks: int, size: int,
            seed: int = 0) -> Codec:
    """Learns `codebooks` of `size` each, every one on the residual of those before it.

    Otherwise like `fit_kmeans`.
    """
    return _fit('rvq', wavs, path, frame_hz, codebooks, size, seed)


# -------------------------------------------------------------------------------------------- files

def whole_wav(path: str) -> None:
    """Raises ValueError where a wav file holds less sound than its header says.

    libsndfile reads such a file in silence, at its shorter length. Who writes into a pipe cannot
    know the length and states one of about 2 or 4 GiB, which says nothing. Files of other formats
    pass: flac and mp3 have frames of their own.
    """
    with open(path, 'rb') as f:
        riff = f.read(12)
        if riff[:4] != b'RIFF' or riff[8:] != b'WAVE':
            return
        while len(head := f.read(8)) == 8:
            name, stated = struct.unpack('<4sI', head)
            if name == b'data':
                there = os.fstat(f.fileno()).st_size - f.tell()
                if there < stated < _PIPED:
                    raise ValueError(f'{path} was cut short: its header says {stated} bytes of '
                                     f'sound, {there} are there')
                return
            f.seek(stated + stated % 2, os.SEEK_CUR)


def _save(path: str, tensors: dict[str, np.ndarray], facts: dict) -> None:
    from safetensors.numpy import save
    # One metadata key: the order of several is not fixed, and the file's hash is its identity.
    blob = save(tensors, metadata={'jaxsd_codec': json.dumps(facts, sort_keys=True)})
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        with open(temporary, 'wb') as f:
            f.write(blob)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _read(path: str) -> tuple[dict, dict[str, np.ndarray], str]:
    """The facts, the tensors and the sha256 of a fitted codec's file. Raises ValueError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load
    try:
        if os.path.getsize(path) > _MAX_BYTES:
            raise ValueError(f'codec: {path} is too large for a fitted codec')
        with open(path, 'rb') as f:
            blob = f.read(_MAX_BYTES)
    except OSError as e:
        raise ValueError(f'codec: cannot read {path}: {e.strerror}') from e
    try:
        tensors = load(blob)
        header = json.loads(blob[8:8 + int.from_bytes(blob[:8], 'little')])
        facts = json.loads(header['__metadata__']['jaxsd_codec'])
        if facts['name'] not in ('kmeans', 'rvq') or facts['sample_rate_hz'] != SAMPLE_RATE_HZ:
            raise ValueError(f'it says {facts}')
        samples = _samples_per_frame(facts['frame_hz'], SAMPLE_RATE_HZ)
        stack, width = samples // _HOP * _MELS, tensors['basis'].shape[1]
        shapes = {'mel': (_MELS, _FFT // 2 + 1), 'mean': (stack,), 'basis': (stack, width),
                  'codebooks': (facts['codebooks'], facts['size'], width),
                  'decoder': (3 * width + 1, stack)}
    except (SafetensorError, KeyError, TypeError, IndexError, ArithmeticError, ValueError) as e:
        raise ValueError(f'codec: {path} is not a codec file or is damaged '
                         f'({type(e).__name__}: {e})'.replace('\n', ' ')) from e
    for key, shape in shapes.items():
        found = tensors.get(key)
        if found is None or found.shape != shape or found.dtype != np.float32 \
                or not np.isfinite(found).all():
            raise ValueError(f'codec: {path} is damaged: {key} should be finite float32 {shape}')
    return facts, tensors, hashlib.sha256(blob).hexdigest()


def fitted(path: str) -> Codec:
    """The codec of a file that `fit_kmeans` or `fit_rvq` wrote, whichever it is. Raises ValueError.

    For pipelines, which take a file for what it is; a config states what it expects and uses
    `kmeans` or `rvq`.
    """
    facts, _, _ = _read(path)
    return _load(facts['name'], path, facts['frame_hz'], facts['codebooks'], facts['size'],
                 facts['sample_rate_hz'])


def _load(name: str, path: str, frame_hz: float, codebooks: int, size: int,
          sample_rate_hz: int) -> Codec:
    facts, tensors, sha256 = _read(path)
    asked = {'name': name, 'frame_hz': frame_hz, 'codebooks': codebooks, 'size': size,
             'sample_rate_hz': sample_rate_hz}
    for key, value in asked.items():
        if facts.get(key) != value:
            raise ValueError(f'codec: {path} was fitted with {key}={facts.get(key)!r}, '
                             f'the config says {key}={value!r}')
    mel, mean, basis, books, decoder = (
        tensors[k] for k in ('mel', 'mean', 'basis', 'codebooks', 'decoder'))
    samples = _samples_per_frame(frame_hz, sample_rate_hz)
    unmel = np.linalg.pinv(mel.astype(np.float64)).astype(np.float32)

    def encode(wav: np.ndarray) -> np.ndarray:
        wav = _checked_wav(wav)
        with _one_thread():
            x = (_log_mel(wav, mel, samples) - mean) @ basis
            return _quantize(x, books).astype(np.int16)

    def latents(codes: np.ndarray) -> np.ndarray:
        codes = _checked_codes(codes, min(len(codes), codebooks), size)
        return _sum_of(codes, books[:len(codes)])

    def sound(x: np.ndarray) -> np.ndarray:
        if x.ndim != 2 or x.shape[1] != basis.shape[1] or not np.isfinite(x).all():
            raise ValueError(f'codec: latents are finite [T, {basis.shape[1]}], got {x.shape}')
        if not len(x):
            return np.zeros(0, np.float32)
        with _one_thread():
            return _spoken((_neighbors(x) @ decoder).reshape(-1, _MELS), unmel)

    def decode(codes: np.ndarray) -> np.ndarray:
        return sound(latents(_checked_codes(codes, codebooks, size)))

    return Codec({**asked, 'sha256': sha256}, encode, decode, latents, sound)


# --------------------------------------------------------------------------------------- the codecs

def fsq_codes(z: np.ndarray, levels: Sequence[int]) -> np.ndarray:
    """Finite scalar quantization: codes [T] of an encoder's output [T, len(levels)].

    Every channel is squeezed into its number of levels and rounded; the first channel counts ones,
    the next one its levels, and so on. Even numbers of levels are shifted by a half, so that zero
    is a level (arXiv 2309.15505; EMOVA's tokenizer has 8 x 8 x 8 x 8 at 25 Hz).
    """
    levels = np.asarray(levels)
    half = (levels - 1) * (1 - 1e-3) / 2
    offset = np.where(levels % 2, 0.0, 0.5)
    shift = np.tan(offset / half)
    # Rounding of what is halfway is that of the released code: to the even level.
    at = np.rint(np.tanh(np.asarray(z, np.float64) + shift) * half - offset) + levels // 2
    return (at @ np.cumprod([1, *levels[:-1]])).astype(np.int64)


def kmeans(*, path: str, frame_hz: float, size: int, codebooks: int = 1,
           sample_rate_hz: int = SAMPLE_RATE_HZ) -> Codec:
    """The single-codebook units of a file written by `fit_kmeans`.

    Raises ValueError for an unreadable or damaged file, and for an option that disagrees with what
    the file was fitted with.
    """
    return _load('kmeans', path, frame_hz, codebooks, size, sample_rate_hz)


def rvq(*, path: str, frame_hz: float, codebooks: int, size: int,
        sample_rate_hz: int = SAMPLE_RATE_HZ) -> Codec:
    """The residual codebooks of a file written by `fit_rvq`. Raises as `kmeans` does."""
    return _load('rvq', path, frame_hz, codebooks, size, sample_rate_hz)


_KYUTAI = tuple((re.compile(a), b) for a, b in (    # kyutai's names, in order, to transformers'
    (r'^((?:en|de)coder)\.model\.', r'\1.layers.'),
    (r'^(down|up)sample\.conv(?:tr)?\.conv(?:tr)?\.conv(?:tr)?\.', r'\1sample.conv.'),
    (r'\.conv(?:tr)?\.conv(?:tr)?\.', '.conv.'),
    (r'_transformer\.transformer\.', '_transformer.'),
    (r'\.self_attn\.(?:out_projs\.0|out_proj)\.', '.self_attn.o_proj.'),
    (r'\.self_attn\.(?:in_projs\.0\.weight|in_proj_weight)$', '.self_attn.qkv'),
    (r'\.linear([12])\.', r'.mlp.fc\1.'),
    (r'\.norm1\.', '.input_layernorm.'), (r'\.norm2\.', '.post_attention_layernorm.'),
    (r'\.layer_scale_1\.', '.self_attn_layer_scale.'), (r'\.layer_scale_2\.', '.mlp_layer_scale.'),
    (r'\.rvq_first\.', '.semantic_residual_vector_quantizer.'),
    (r'\.rvq_rest\.', '.acoustic_residual_vector_quantizer.'),
    (r'\.vq\.layers\.(\d+)\._codebook\.', r'.layers.\1.codebook.'),
    (r'\.embedding_sum$', '.embed_sum'), (r'\._initialized$', '.initialized')))


def _from_kyutai(tensors: dict, heads: int) -> dict:
    """Mimi's tensors under kyutai's names, as transformers names and lays them out.

    kyutai turns neighboring channels of a head together, transformers turns halves (rotary).
    """
    out = {}
    for key, value in tensors.items():
        for pattern, name in _KYUTAI:
            key = pattern.sub(name, key)
        if not key.endswith('.qkv'):
            out[key] = value
            continue
        for letter, part in zip('qkv', value.chunk(3), strict=True):
            if letter != 'v':
                part = part.reshape(heads, -1, 2, part.shape[1]).transpose(1, 2).reshape(part.shape)
            out[f'{key.removesuffix("qkv")}{letter}_proj.weight'] = part.contiguous()
    return out


def _mimi_model(path: str):
    """transformers' model with the weights at `path`, complete. Raises whatever goes wrong."""
    from transformers import MimiConfig, MimiModel
    given = dict(output_loading_info=True)
    if os.path.isdir(path):
        model, info = MimiModel.from_pretrained(path, local_files_only=True, **given)
    else:
        from safetensors.torch import load_file
        config = MimiConfig()
        state = _from_kyutai(load_file(path), config.num_attention_heads)
        model, info = MimiModel.from_pretrained(None, config=config, state_dict=state, **given)
    for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'):
        if info.get(kind):
            raise ValueError(f'{len(info[kind])} {kind.replace("_", " ")}, first '
                             f'{sorted(map(str, info[kind]))[0]}')
    return model


def mimi(*, path: str, codebooks: int = 8, frame_hz: float = 12.5, size: int = 2048,
         sample_rate_hz: int = 24000) -> Codec:
    """The released Mimi (arXiv 2410.00037 section 3.3), run by package `transformers`.

    path: kyutai's safetensors file, or a directory of `config.json` and `model.safetensors`. Waves
    are padded with zeros to whole frames, which keeps the codes equal to kyutai's own. Runs on an
    accelerator when torch sees one. Raises ValueError when the packages or the weights are missing,
    damaged, incomplete or another model's.
    """
    weights = os.path.join(path, 'model.safetensors') if os.path.isdir(path) else path
    if not os.path.isfile(weights):
        raise ValueError(f'codec: no Mimi weights at {weights}')
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as e:
        raise ValueError(f'codec: mimi needs torch and transformers ({e}); '
                         'install jaxsd[mimi]') from e
    try:
        model = _mimi_model(path)
    except Exception as e:      # torch, safetensors and transformers each fail in their own ways
        said = (str(e).splitlines() or [''])[0]
        raise ValueError(f'codec: no Mimi can be read from {path} '
                         f'({type(e).__name__}: {said})') from e
    has = model.config
    for key, asked, found in (('frame_hz', frame_hz, has.frame_rate),
                              ('size', size, has.codebook_size),
                              ('sample_rate_hz', sample_rate_hz, has.sampling_rate)):
        if asked != found:
            raise ValueError(f'codec: {path} has {key}={found}, the config says {key}={asked}')
    if not 1 <= codebooks <= has.num_quantizers:
        raise ValueError(f'codec: {path} has {has.num_quantizers} codebooks, '
                         f'the config says codebooks={codebooks}')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = model.to(device).eval()
    samples = _samples_per_frame(frame_hz, sample_rate_hz)

    def encode(wav: np.ndarray) -> np.ndarray:
        wav = _checked_wav(wav)
        if not wav.size:
            return np.zeros((codebooks, 0), np.int16)
        x = torch.from_numpy(np.pad(wav, (0, -wav.size % samples)))[None, None].to(device)
        with torch.no_grad():
            codes = model.encode(x, num_quantizers=codebooks).audio_codes
        return codes[0].cpu().numpy().astype(np.int16)

    def decode(codes: np.ndarray) -> np.ndarray:
        codes = _checked_codes(codes, codebooks, size)
        if not codes.size:
            return np.zeros(0, np.float32)
        with torch.no_grad():
            wav = model.decode(torch.from_numpy(codes)[None].to(device)).audio_values
        return wav[0, 0].float().cpu().numpy()

    def missing(x: np.ndarray) -> np.ndarray:
        raise ValueError('codec: the latents of mimi are not taken out of its model here')

    identity = {'name': 'mimi', 'frame_hz': frame_hz, 'codebooks': codebooks, 'size': size,
                'sample_rate_hz': sample_rate_hz}
    with open(weights, 'rb') as f:
        identity['sha256'] = hashlib.file_digest(f, 'sha256').hexdigest()
    return Codec(identity, encode, decode, missing, missing)

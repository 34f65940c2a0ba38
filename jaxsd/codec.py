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

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable

import numpy as np

SAMPLE_RATE_HZ = 16000
_FFT, _HOP, _MELS = 1024, 160, 80
_EDGE = (_FFT - _HOP) // 2              # a window is centred on its hop
_FLOOR = 1e-3                           # smaller magnitudes are silence and must earn no centroids
_WIDTH = 64                             # principal components kept of a stack of frames
_RIDGE = 1e-4                           # of the decoder's regression, relative to its mean energy
_BLOCK = 4096                           # mel frames computed at once: bounds memory on long audio
_MAX_BYTES = 1 << 28                    # no fitted codec is larger


@dataclasses.dataclass(frozen=True)
class Codec:
    """A codec ready to use.

    identity: {'name', 'frame_hz', 'codebooks', 'size', 'sample_rate_hz', 'sha256'}.
    encode:   float32 [S] mono at `sample_rate_hz`, in -1..1 -> int16 [K, T],
              T = ceil(S / samples per frame), the last frame filled with zeros.
    decode:   integers [K, T] -> float32 [S], S = T * samples per frame.
    Both raise ValueError for another shape, a value that is not finite or a code out of range.
    """

    identity: dict
    encode: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]


# ----------------------------------------------------------------------------------- log-mel frames

@functools.lru_cache
def _threads():
    import threadpoolctl
    return threadpoolctl.ThreadpoolController()


def _one_thread():
    """A context in which BLAS uses one thread.

    The products here are small: on a busy machine its threads made encoding ten times slower, and
    they sum in another order. Work is spread over processes instead.
    """
    return _threads().limit(limits=1)


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


def _quantise(x: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """int64 [K, N]: each codebook takes up what the ones before it left over."""
    codes = []
    for codebook in codebooks:
        codes.append(_nearest(x, codebook))
        x = x - codebook[codes[-1]]
    return np.stack(codes)


def _sum_of(codes: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """float32 [T, D]: the sum of the centroids that `codes` [K, T] name."""
    return sum(book[row] for book, row in zip(codebooks, codes, strict=True))


def _neighbours(x: np.ndarray) -> np.ndarray:
    """float32 [T, 3 D + 1]: every frame beside the one before and after it, and a one."""
    padded = np.pad(x, ((1, 1), (0, 0)), 'edge')
    return np.concatenate([padded[:-2], x, padded[2:], np.ones((len(x), 1), np.float32)], 1)


def _decoder(quantised: Iterable[np.ndarray], frames: Iterable[np.ndarray]) -> np.ndarray:
    """float32 [3 D + 1, F]: ridge regression of log-mel frames on three neighbouring code vectors.

    Hearing the neighbours smooths the seams between frames: on held-out synthesised speech a task
    recogniser's errors fell by half against speaking the bare centroids.
    """
    gram, target = 0.0, 0.0
    for x, y in zip(quantised, frames, strict=True):
        x = _neighbours(x).astype(np.float64)
        gram, target = gram + x.T @ x, target + x.T @ y
    ridge = _RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    return np.linalg.solve(gram + ridge, target).astype(np.float32)


def _fit(name: str, wavs: Iterable[np.ndarray], path: str, frame_hz: float, codebooks: int,
         size: int, seed: int) -> Codec:
    import librosa
    import sklearn.cluster  # noqa: F401 - loaded before the limit, which holds for what is loaded
    import threadpoolctl
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
        spoken = (_sum_of(_quantise((f - mean) @ basis, books), books) for f in frames)
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
            return _quantise(x, books).astype(np.int16)

    def decode(codes: np.ndarray) -> np.ndarray:
        codes = _checked_codes(codes, codebooks, size)
        with _one_thread():
            frames = _neighbours(_sum_of(codes, books)) @ decoder if codes.size else codes[0]
            return _spoken(frames.reshape(-1, _MELS), unmel)

    return Codec({**asked, 'sha256': sha256}, encode, decode)


# --------------------------------------------------------------------------------------- the codecs

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


def mimi(*, path: str, codebooks: int = 8, frame_hz: float = 12.5, size: int = 2048,
         sample_rate_hz: int = 24000) -> Codec:
    """The released Mimi (arXiv 2410.00037 section 3.3) with weights at the local `path`.

    A file is read by package `moshi` (kyutai's safetensors), a directory by `transformers`
    (`config.json` and `model.safetensors`); both give the same codes, as waves are padded with
    zeros to whole frames first. Runs on an accelerator when torch sees one.
    Raises ValueError when a package or the weights are missing or damaged, or are another codec's.
    """
    folder = os.path.isdir(path)
    weights = os.path.join(path, 'model.safetensors') if folder else path
    if not os.path.isfile(weights):
        raise ValueError(f'codec: no Mimi weights at {weights}')
    package = 'transformers' if folder else 'moshi'
    try:
        import torch
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        if folder:
            from transformers import MimiModel
        else:
            from moshi.models import loaders
    except ImportError as e:
        raise ValueError(f'codec: mimi needs torch and {package} to read {path} ({e}); '
                         'install jaxsd[mimi]') from e
    try:
        if folder:
            model = MimiModel.from_pretrained(path, local_files_only=True).to(device).eval()
            config = model.config
            found = (config.frame_rate, config.codebook_size, config.sampling_rate)
            most = config.num_quantizers
        else:
            model = loaders.get_mimi(weights, device=device, num_codebooks=codebooks).eval()
            found = (model.frame_rate, model.cardinality, model.sample_rate)
            most = model.total_codebooks
    except Exception as e:      # each package has its own many errors for a damaged file
        said = str(e).split('\n')[0]
        raise ValueError(f'codec: {path} is not a Mimi that {package} can read '
                         f'({type(e).__name__}: {said})') from e
    for key, asked, has in zip(('frame_hz', 'size', 'sample_rate_hz'),
                               (frame_hz, size, sample_rate_hz), found, strict=True):
        if asked != has:
            raise ValueError(f'codec: Mimi at {path} has {key}={has}, '
                             f'the config says {key}={asked}')
    if not 1 <= codebooks <= most:
        raise ValueError(f'codec: Mimi at {path} has {most} codebooks, '
                         f'the config says codebooks={codebooks}')
    samples = _samples_per_frame(frame_hz, sample_rate_hz)

    def encode(wav: np.ndarray) -> np.ndarray:
        wav = _checked_wav(wav)
        if not wav.size:
            return np.zeros((codebooks, 0), np.int16)
        x = torch.from_numpy(np.pad(wav, (0, -wav.size % samples)))[None, None].to(device)
        with torch.no_grad():
            codes = (model.encode(x, num_quantizers=codebooks).audio_codes if folder
                     else model.encode(x))
        return codes[0].cpu().numpy().astype(np.int16)

    def decode(codes: np.ndarray) -> np.ndarray:
        codes = _checked_codes(codes, codebooks, size)
        if not codes.size:
            return np.zeros(0, np.float32)
        x = torch.from_numpy(codes)[None].to(device)
        with torch.no_grad():
            wav = model.decode(x).audio_values if folder else model.decode(x)
        return wav[0, 0].float().cpu().numpy()

    digest = hashlib.sha256()
    with open(weights, 'rb') as f:
        while block := f.read(1 << 22):
            digest.update(block)
    identity = {'name': 'mimi', 'frame_hz': frame_hz, 'codebooks': codebooks, 'size': size,
                'sample_rate_hz': sample_rate_hz, 'sha256': digest.hexdigest()}
    return Codec(identity, encode, decode)

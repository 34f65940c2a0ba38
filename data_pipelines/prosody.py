# SPDX-License-Identifier: Apache-2.0
"""How something is said, as two slow streams of classes beside the units: pitch and style.

Plain signal processing stands in for the learned tokenizers of the papers: `pitch` (12.5 Hz, 64
classes) is the fundamental frequency on a logarithmic scale, `style` (1 Hz, 100 classes) says how
loud a second is, how high, and how much its pitch moves. Both are functions of the sound alone.
"""

import math

import numpy as np

PITCH_HZ, PITCHES = 12.5, 64
STYLE_HZ, STYLES = 1.0, 100

_LEAST_HZ, _MOST_HZ = 60.0, 400.0
_WINDOW_S = 0.1                 # six periods of the lowest voice
_VOICED = 0.5                   # of a perfect repetition
_QUIET = 1e-3                   # of full scale, root mean square
_LOUD_DB = (-50.0, -35.0, -28.0, -22.0)
_HIGH = (13.0, 25.0, 38.0, 50.0)
_MOVED = (2.0, 5.0, 9.0)


def pitch(wav: np.ndarray, rate_hz: int) -> np.ndarray:
    """int16 [ceil(seconds x 12.5)] of float32 [S]: 0 where nothing is voiced, else 1 .. 63.

    Classes are equal steps from 60 to 400 Hz, found by the strongest repetition (autocorrelation).
    """
    hop, window = rate_hz / PITCH_HZ, round(_WINDOW_S * rate_hz)
    count = math.ceil(len(wav) / hop)
    padded = np.pad(np.asarray(wav, np.float64), (window // 2, window))
    starts = np.floor((np.arange(count) + 0.5) * hop).astype(int)
    x = padded[starts[:, None] + np.arange(window)]
    x = x - x.mean(1, keepdims=True)
    size = 1 << (2 * window - 1).bit_length()
    power = np.abs(np.fft.rfft(x, size)) ** 2
    repeated = np.fft.irfft(power, size)[:, :window]
    # How much signal overlaps itself at each lag, so that long lags are not at a disadvantage.
    squares = np.cumsum(np.pad(x ** 2, ((0, 0), (1, 0))), axis=1)
    lags = np.arange(window)
    head, tail = squares[:, window - lags], squares[:, -1:] - squares[:, lags]
    strength = 2 * repeated / np.maximum(head + tail, 1e-12)
    low, high = math.ceil(rate_hz / _MOST_HZ), math.floor(rate_hz / _LEAST_HZ)
    inside = strength[:, low:high + 1]
    best = inside.max(1, initial=0.0)
    # The shortest lag that repeats nearly as well as the best: not twice the period.
    lag = low + np.argmax(inside >= 0.9 * best[:, None], axis=1)
    peak = np.array([lag[i] + int(np.argmax(strength[i, lag[i]:lag[i] + low])) for i in
                     range(count)], int)
    share = np.log(rate_hz / np.clip(peak, low, high) / _LEAST_HZ) / math.log(_MOST_HZ / _LEAST_HZ)
    level = np.sqrt((x ** 2).mean(1))
    classes = 1 + np.clip(np.floor(share * (PITCHES - 1)), 0, PITCHES - 2)
    return np.where((best >= _VOICED) & (level >= _QUIET), classes, 0).astype(np.int16)


def style(wav: np.ndarray, rate_hz: int) -> np.ndarray:
    """int16 [ceil(seconds)] of float32 [S]: loudness (5) by height (5) by movement of pitch (4)."""
    pitches = pitch(wav, rate_hz)
    out = []
    for second in range(math.ceil(len(wav) / rate_hz)):
        x = np.asarray(wav[second * rate_hz:(second + 1) * rate_hz], np.float64)
        part = pitches[math.floor(second * PITCH_HZ):math.floor((second + 1) * PITCH_HZ)]
        voiced = part[part > 0]
        loud = np.digitize(10 * math.log10(max(float((x ** 2).mean()), 1e-12)), _LOUD_DB)
        height = np.digitize(voiced.mean(), _HIGH) if voiced.size else 0
        moved = np.digitize(voiced.std(), _MOVED) if voiced.size else 0
        out.append((loud * 5 + height) * 4 + moved)
    return np.array(out, np.int16)


def streams(wavs: np.ndarray, rate_hz: int) -> dict[str, tuple[np.ndarray, ...]]:
    """{'pitch': ..., 'style': ...} of float32 [C, S], one array per channel: a record's sides."""
    return {'pitch': tuple(pitch(w, rate_hz) for w in wavs),
            'style': tuple(style(w, rate_hz) for w in wavs)}

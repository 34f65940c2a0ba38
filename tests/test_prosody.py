# SPDX-License-Identifier: Apache-2.0
"""Do the slow streams say how high, how loud and how lively something is said?"""

import math

import numpy as np
import pytest

from data_pipelines import prosody

RATE_HZ = 16_000


def voice(hz, seconds: float = 1.0, level: float = 0.2) -> np.ndarray:
    """A buzz of eight harmonics whose fundamental goes through `hz`."""
    n = round(seconds * RATE_HZ)
    track = np.interp(np.arange(n), np.linspace(0, n, np.size(hz)), np.atleast_1d(hz))
    phase = 2 * np.pi * np.cumsum(track) / RATE_HZ
    return (level * sum(np.sin(k * phase) / k for k in range(1, 9))).astype(np.float32)


@pytest.mark.parametrize('hz', [65, 90, 120, 180, 250, 390])
def test_pitch_is_logarithmic_in_frequency(hz):
    found = prosody.pitch(voice(hz), RATE_HZ)
    assert len(found) == 13
    wanted = 1 + 63 * math.log(hz / 60) / math.log(400 / 60)
    assert np.abs(found[1:-1] - wanted).max() <= 2


def test_nothing_is_voiced_in_silence_and_noise():
    rng = np.random.default_rng(0)
    for wav in (np.zeros(8000), rng.normal(0, 1e-4, 8000), rng.normal(0, 0.1, 8000)):
        assert np.mean(prosody.pitch(wav.astype(np.float32), RATE_HZ) > 0) < 0.2
    assert prosody.pitch(np.zeros(0, np.float32), RATE_HZ).shape == (0,)
    assert prosody.style(np.zeros(0, np.float32), RATE_HZ).shape == (0,)


def test_style_is_loudness_height_and_movement():
    low, high = voice(80), voice(350)
    lively = voice([100, 200, 90, 220, 100])
    quiet = voice(80, level=0.01)
    def parts(wav):
        s = int(prosody.style(wav, RATE_HZ)[0])
        return s // 20, s // 4 % 5, s % 4
    assert parts(low)[1] < parts(high)[1]
    assert parts(quiet)[0] < parts(low)[0] and parts(quiet)[1] == parts(low)[1]
    assert parts(lively)[2] > parts(low)[2] == 0
    styles = prosody.style(np.concatenate([low, high, quiet[:4000]]), RATE_HZ)
    assert styles.shape == (3,) and 0 <= styles.min() and styles.max() < prosody.STYLES


def test_streams_are_a_function_of_each_channel():
    both = np.stack([voice(100), voice(200)])
    made = prosody.streams(both, RATE_HZ)
    for name, alone in (('pitch', prosody.pitch), ('style', prosody.style)):
        for channel in (0, 1):
            np.testing.assert_array_equal(made[name][channel], alone(both[channel], RATE_HZ))

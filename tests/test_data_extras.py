# SPDX-License-Identifier: Apache-2.0
"""Batches that hold more than tokens: features of what is heard, and steps apart."""

import io
import os

import librosa
import numpy as np
import pytest
import soundfile

from jaxsd import codec, data, model
from jaxsd import config as configs
from jaxsd.config import ConfigError, override, plain
from jaxsd.types import NOTHING

CONFIGS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'configs')


def made(corpus, name, arg='tiny'):
    c = configs.read(f'{CONFIGS}/{name}.py:{arg}')
    c.data.path = str(corpus)
    c.codec.path = str(corpus / os.path.basename(c.codec.path))
    c.vocab.tokenizer = str(corpus / 'text.model')
    return c, model.make_vocab(c)


def take(count, c, stage, v, **options):
    batches = data.batches(c, stage, v, threads=0, **options)
    out = [next(batches) for _ in range(count)]
    batches.close()
    return out


def test_log_mel_frames_of_a_record(corpus):
    """A hundred a second and channel, near -1..1, loud where words are."""
    c, v = made(corpus, 'mini_omni')
    record = next(data.examples(c, 'train', 'voice', vocab=v))
    assert len(record.feats) == 2
    for channel, lazy in enumerate(record.feats):
        feats = lazy[:]
        wav = soundfile.read(io.BytesIO(record.wav), dtype='float32')[0][:, channel]
        mel = librosa.filters.mel(sr=16_000, n_fft=1024, n_mels=80)
        power = np.abs(librosa.stft(np.pad(wav, 432), n_fft=1024, hop_length=160, center=False))
        want = np.log(np.maximum(mel @ power, 1e-3)).T / 4 + 0.5
        np.testing.assert_allclose(feats[:len(want)], want, atol=1e-4)
        for cut in (slice(0, 9), slice(17, 60), slice(len(lazy) - 5, None), slice(7, 7)):
            np.testing.assert_allclose(lazy[cut], feats[cut], atol=1e-5)    # only as much is read
        assert len(lazy) == len(feats) and lazy.shape == feats.shape
        assert feats.dtype == np.float32 and feats.shape[1] == 80
        assert abs(len(feats) - 100 * record.duration_s) < 2 and np.abs(feats).max() < 3
        loud = np.zeros(len(feats), bool)
        for word in record.words:
            if word.channel == channel:
                loud[int(100 * word.start_s):int(100 * word.end_s)] = True
        assert feats[loud].mean() > feats[~loud].mean() + 0.3
    with pytest.raises(ValueError, match='cannot be read'):
        codec.log_mel(b'no sound at all')


def test_features_are_packed_with_their_columns(corpus):
    """Those of a grid where the grid lies, zeros elsewhere; a column has some where its rows of
    speech are padding inside a question."""
    c, v = made(corpus, 'mini_omni')
    stage = dict(plain(c.stages)[2], data=dict(voice=1.0))      # one source: each is rehearsed
    arrays, _ = take(1, c, stage, v)[0]
    assert arrays['feats'].shape == (8, c.columns, 640) and arrays['slot'].shape == (8, c.columns)
    heard = arrays['slot'] > 0
    assert heard.any() and not heard.all() and not arrays['feats'][~heard].any()
    assert np.abs(arrays['feats'][heard]).sum(-1).min() > 0
    for k, row in enumerate(v.rows):
        name = 'pad' if k == 0 else f'{row.name} pad'
        assert (arrays['tokens'][:, k][heard] == v.specials[name]).all()
    assert (arrays['segment'][heard] > 0).all()
    grid = data.grid(c, 'voice', v)
    assert grid.extra['feats'].shape == (grid.tokens.shape[1], 640)
    empty, *_ = next(data.one_pass(c, 'text_qa', v, batch=2, split='train', limit=2))
    assert empty['feats'].shape == (2, c.columns, 640) and not empty['slot'].any()


def test_features_of_another_width_are_refused(corpus):
    c, v = made(corpus, 'mini_omni')
    override(c, 'frontend.encoder.features', '80')
    with pytest.raises(ValueError, match='draws 640 features per column, .* is 80'):
        data.check(c, plain(c.stages)[2], v)


def test_steps_apart_read_their_own_mixture_and_nothing_else(corpus):
    """Half the steps, evenly, and the other half read what they would without them; resumed in the
    middle, and told by the fingerprint."""
    c, v = made(corpus, 'moshi', 'tiny')
    stage = dict(name='one', batch=4, data=dict(stories=1.0), layout={},
                 apart=dict(share=0.5, data=dict(written=1.0)))
    taken = take(8, c, stage, v)
    kinds = [bool(a['apart'][0]) for a, _ in taken]
    assert sum(kinds) == 4 and all(sum(kinds[i:i + 2]) == 1 for i in range(0, 8, 2))
    for kind, (arrays, account) in zip(kinds, taken, strict=True):
        assert arrays['apart'].shape == (4,) and (arrays['apart'] == kind).all()
        assert set(account) == ({'written'} if kind else {'stories'})
        assert kind == (arrays['tokens'][:, 1:] == NOTHING).all()       # text alone, or with sound
    alone = take(4, c, {k: x for k, x in stage.items() if k != 'apart'}, v)
    for (a, _), (b, _) in zip([x for x, k in zip(taken, kinds, strict=True) if not k], alone,
                              strict=True):
        np.testing.assert_array_equal(a['tokens'], b['tokens'])
        assert 'apart' not in b
    for (a, _), (b, _) in zip(take(5, c, stage, v, start_step=3), taken[3:], strict=True):
        np.testing.assert_array_equal(a['tokens'], b['tokens'])
    marks = data.fingerprint(c, stage, v)
    other = data.fingerprint(c, dict(stage, apart=dict(share=0.25, data=dict(written=1.0))), v)
    assert {k for k in marks if marks[k] != other[k]} == {'mixture'}
    with pytest.raises(ConfigError, match="no option 'nowhere'"):
        data.check(c, dict(stage, apart=dict(share=0.5, data=dict(nowhere=1.0))), v)

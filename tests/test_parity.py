# SPDX-License-Identifier: Apache-2.0
"""Does our model, given a released implementation's weights, say what that implementation says?

The golden folders hold what PyTorch answered (tests/peers/make_goldens.py); nothing here needs it.
Each comparison is repeated with one convention broken, to see that it could have failed.
"""

import shutil

import jax
import ml_dtypes  # noqa: F401  (bfloat16 for numpy)
import numpy as np
import pytest
import released
from safetensors.numpy import load_file, save_file

from jaxsd import export
from jaxsd.export import kyutai_lora

TOLERANCE = 5e-5


def arrays(name: str) -> dict:
    with np.load(released.GOLDEN / name / 'arrays.npz', allow_pickle=False) as f:
        return dict(f)


def imported(config, name: str) -> dict:
    format = 'kyutai-hf' if name == 'kyutai_hf' else 'kyutai' if name[:6] == 'kyutai' else 'hf'
    return export.import_params(config, str(released.GOLDEN / name), format)


@pytest.mark.parametrize('name', released.DECODERS)
def test_decoder_logits(name):
    config, golden = released.decoder(name), arrays(name)
    logits, = released.scores(config, imported(config, name), golden['tokens'][:, None])
    assert np.abs(logits - golden['logits']).max() <= TOLERANCE


@pytest.mark.parametrize('name', released.DECODERS)
def test_decoder_greedy(name):
    """Sixteen greedy tokens. Ours reads the whole prefix anew for each; rounding cannot decide,
    because the peer's narrowest choice was far wider (made.json)."""
    config, golden = released.decoder(name), arrays(name)
    params = imported(config, name)
    prompt, steps = golden['prompt'], golden['greedy'].shape[1]
    tokens = np.pad(prompt, ((0, 0), (0, steps)))
    for t in range(prompt.shape[1], tokens.shape[1]):
        logits, = released.scores(config, params, tokens[:, None])
        tokens[:, t] = logits[:, t - 1].argmax(-1)
    np.testing.assert_array_equal(tokens[:, prompt.shape[1]:], golden['greedy'])


@pytest.mark.parametrize('name', ('llama', 'mixtral'))
def test_training_loss_is_the_peers(name):
    """Through our shift and our objective, the peer having shifted its labels itself: once."""
    config, golden = released.decoder(name), arrays(name)
    ours = released.loss(config, imported(config, name), golden['tokens'], golden['labels'])
    assert ours == pytest.approx(float(golden['loss']), abs=1e-5)


@pytest.mark.parametrize('name, change', [
    ('llama', dict(theta=501.0)), ('llama', dict(norm_eps=1e-3)),
    ('llama', dict(pairs='interleaved')), ('mistral', dict(window_columns=4)),
    ('mistral', dict(window_columns=None)), ('llama3', dict(rope_scaling='none')),
    ('llama3', dict(rope_scaling=dict(name='linear', factor=8.0))),
    ('mixtral', dict(experts_per_column=3)), ('helium', dict(pairs='half'))])
def test_a_broken_convention_shows(name, change):
    """The golden logits tell a wrong base, epsilon, pairing or window from the right one."""
    config, golden = released.decoder(name), arrays(name)
    params = imported(config, name)
    logits, = released.scores(released.decoder(name, **change), params, golden['tokens'][:, None])
    assert np.abs(logits - golden['logits']).max() > 20 * TOLERANCE


def test_multistream_logits():
    config, golden = released.multistream(), arrays('kyutai')
    text, audio = released.aligned_scores(config, imported(config, 'kyutai'), golden['codes'])
    np.testing.assert_array_equal(np.isnan(audio), np.isnan(golden['logits']))
    assert np.isnan(audio).any() and not np.isnan(text).any()
    assert np.abs(text - golden['text_logits']).max() <= TOLERANCE
    assert np.nanmax(np.abs(audio - golden['logits'])) <= TOLERANCE


@pytest.mark.parametrize('change', [
    dict(window_columns=6), dict(pairs='half'), dict(norm_eps=1e-2)])
def test_a_broken_multistream_convention_shows(change):
    config, golden = released.multistream(), arrays('kyutai')
    params = imported(config, 'kyutai')
    text, _ = released.aligned_scores(released.multistream(**change), params, golden['codes'])
    assert np.abs(text - golden['text_logits']).max() > 20 * TOLERANCE


def test_multistream_stream():
    """Frame by frame with the user's codes coming in: the tokens that the peer's LMGen chose."""
    config, golden = released.multistream(), arrays('kyutai')
    said = released.spoken(config, imported(config, 'kyutai'), golden['heard'])
    np.testing.assert_array_equal(said, golden['said'])


def test_scheduled_steps():
    """Depth steps that share sets of weights, a delay of two, another norm: logits and a stream."""
    config, golden = released.scheduled(), arrays('kyutai_scheduled')
    params = imported(config, 'kyutai_scheduled')
    text, audio = released.aligned_scores(config, params, golden['codes'])
    np.testing.assert_array_equal(np.isnan(audio), np.isnan(golden['logits']))
    assert np.abs(text - golden['text_logits']).max() <= TOLERANCE
    assert np.nanmax(np.abs(audio - golden['logits'])) <= TOLERANCE
    other = released.scheduled()
    other.head.step_weights = (0, 1, 0)
    _, audio = released.aligned_scores(other, params, golden['codes'])
    assert np.nanmax(np.abs(audio - golden['logits'])) > 20 * TOLERANCE
    np.testing.assert_array_equal(released.spoken(config, params, golden['heard']), golden['said'])


def test_low_rank_terms_of_a_released_file():
    """What moshi-finetune saves, on its base: as second terms, and folded."""
    config, golden = released.scheduled(), arrays('kyutai_scheduled')
    base = export.flatten(imported(config, 'kyutai_scheduled'))
    flat = kyutai_lora.read(config, str(released.GOLDEN / 'kyutai_scheduled' / 'lora'), base,
                            released.LORA)
    params = export.unflatten(flat)
    text, audio = released.aligned_scores(config, params, golden['codes'], released.LORA)
    assert np.abs(text - golden['lora_text_logits']).max() <= TOLERANCE
    assert np.nanmax(np.abs(audio - golden['lora_logits'])) <= TOLERANCE
    assert np.nanmax(np.abs(golden['logits'] - golden['lora_logits'])) > .1
    folded = export.unflatten(export.fold_lora(flat, released.LORA['scale']))
    np.testing.assert_array_equal(released.spoken(config, folded, golden['heard']),
                                  golden['lora_said'])


def test_multistream_in_halves():
    """transformers' Moshi: logits column by column, and what its own `generate` continues with."""
    config, golden = released.in_halves(), arrays('kyutai_hf')
    params = imported(config, 'kyutai_hf')
    columns = released.columns_of(config, golden['codes'])
    text, *audio = released.scores(config, params, columns)[:4]
    assert np.abs(text[:, :-1] - golden['text_logits']).max() <= TOLERANCE
    assert np.abs(np.stack(audio, 1)[:, :, :-1] - golden['logits']).max() <= TOLERANCE
    said = released.continued(config, params, golden['codes'][:, :, :4], golden['blank'], 16)
    np.testing.assert_array_equal(said[0], golden['said_text'])
    np.testing.assert_array_equal(said[1], golden['said'])


def test_old_dialect_gives_the_same(tmp_path):
    """Published checkpoints stack the steps of a projection; they import to the same numbers."""
    config = released.multistream()
    state = load_file(released.GOLDEN / 'kyutai' / 'model.safetensors')
    old = released.stacked(state)
    assert 'depformer.layers.1.self_attn.in_proj_weight' in old
    assert len(old) == len(state) - 2 * 2 * 3
    save_file(old, tmp_path / 'model.safetensors')
    shutil.copy(released.GOLDEN / 'kyutai' / 'config.json', tmp_path)
    jax.tree.map(np.testing.assert_array_equal, imported(config, 'kyutai'),
                 export.import_params(config, str(tmp_path), 'kyutai'))

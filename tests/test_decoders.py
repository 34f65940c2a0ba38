# SPDX-License-Identifier: Apache-2.0
"""Do the released text decoders come and go whole, and what happens to those we cannot be?"""

import json

import jax
import ml_dtypes  # noqa: F401  (bfloat16 for numpy)
import numpy as np
import pytest
import released
from safetensors.numpy import load_file

from jaxsd import export, model
from jaxsd.config import ConfigError
from jaxsd.export import decoders

LLAMA3 = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192)
PUBLISHED = {       # the sizes in config.json of released models, and how many parameters they have
    'Llama-2-7b': (6_738_415_616, dict(
        model_type='llama', hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, vocab_size=32000, rms_norm_eps=1e-5)),
    'Llama-3.1-8B': (8_030_261_248, dict(
        model_type='llama', hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, rms_norm_eps=1e-5,
        rope_theta=500000.0, rope_scaling=LLAMA3)),
    'Llama-3.2-1B': (1_235_814_400, dict(
        model_type='llama', hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, vocab_size=128256,
        rms_norm_eps=1e-5, rope_theta=500000.0, rope_scaling=LLAMA3 | dict(factor=32.0),
        tie_word_embeddings=True)),
    'Mistral-7B-v0.1': (7_241_732_096, dict(
        model_type='mistral', hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=32000, rms_norm_eps=1e-5,
        rope_theta=10000.0, sliding_window=4096)),
    'Mixtral-8x7B-v0.1': (46_702_792_704, dict(
        model_type='mixtral', hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=32000, rms_norm_eps=1e-5,
        rope_theta=1000000.0, sliding_window=None, num_local_experts=8, num_experts_per_tok=2)),
    'Qwen2.5-0.5B': (494_032_768, dict(
        model_type='qwen2', hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, vocab_size=151936, rms_norm_eps=1e-6,
        rope_theta=1000000.0, use_sliding_window=False, sliding_window=32768, max_window_layers=24,
        tie_word_embeddings=True)),
    'Qwen2.5-7B': (7_615_616_512, dict(
        model_type='qwen2', hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, rms_norm_eps=1e-6,
        rope_theta=1000000.0, use_sliding_window=False, sliding_window=131072,
        max_window_layers=28)),
    'Qwen3-8B': (8_190_735_360, dict(
        model_type='qwen3', hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        rms_norm_eps=1e-6, rope_theta=1000000, rope_scaling=None, use_sliding_window=False,
        sliding_window=None, max_window_layers=36, attention_bias=False)),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes(name):
    """Read from config.json, built without arrays, counted."""
    parameters, values = PUBLISHED[name]
    config = released.of_facts(decoders.read(values, name))
    assert model.count(model.abstract(config)[1]) == parameters
    assert model.make_vocab(config).size == values['vocab_size']


def read(golden: str, **changes) -> dict:
    stated = json.loads((released.GOLDEN / golden / 'config.json').read_text())
    return decoders.read(stated | changes, 'config.json')


@pytest.mark.parametrize('name', released.DECODERS)
def test_released_files_come_back(name, tmp_path):
    """Export of an imported golden: the peer's own keys, shapes and numbers, none more; import of
    that: the same bits. And what config.json spells is read as what the peer's said."""
    config = released.decoder(name)
    params = export.import_params(config, str(released.GOLDEN / name), 'hf')
    export.save(config, params, str(tmp_path / 'out'), 'hf')
    theirs = load_file(released.GOLDEN / name / 'model.safetensors')
    ours = load_file(tmp_path / 'out' / 'model.safetensors')
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], np.asarray(value, np.float32), err_msg=key)
    again = export.import_params(config, str(tmp_path / 'out'), 'hf')
    jax.tree.map(np.testing.assert_array_equal, params, again)
    spelled = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert decoders.read(spelled, 'config.json') == read(name)


VARIANTS = {        # the golden whose config is changed, what changes in it, which model_type it is
    'no bias, window': ('llama', dict(window_columns=9), 'mistral'),
    'experts, window': ('mixtral', dict(window_columns=9), 'mixtral'),
    'experts, interleaved': ('mixtral', dict(pairs='interleaved'), 'mixtral'),
    'norms, window': ('qwen3', dict(window_columns=9), 'qwen3'),
    'norms, interleaved': ('qwen3', dict(pairs='interleaved'), 'qwen3'),
    'linear': ('llama', dict(rope_scaling=dict(name='linear', factor=4)), 'llama'),
    'early gain': ('llama', dict(pairs='interleaved', norm_gain='early'), 'helium'),
}


@pytest.mark.parametrize('name', VARIANTS)
def test_there_and_back(name, tmp_path):
    golden, changes, kind = VARIANTS[name]
    config = released.decoder(golden, **changes)
    params = released.random_params(config, 1)
    export.save(config, params, str(tmp_path / 'out'), 'hf')
    back = export.import_params(config, str(tmp_path / 'out'), 'hf')
    jax.tree.map(np.testing.assert_array_equal, params, back)
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['model_type'] == kind


def test_interleaved_norms_are_permuted_with_their_queries(tmp_path):
    """A gain belongs to one coordinate of a head: [a0 b0 a1 b1] is [a0 a1 b0 b1] in the file."""
    config = released.decoder('qwen3', pairs='interleaved')
    params = released.random_params(config, 1)
    export.save(config, params, str(tmp_path / 'out'), 'hf')
    gain = params['backbone']['blocks']['norm_q']['weight'][1]
    np.testing.assert_array_equal(
        load_file(tmp_path / 'out' / 'model.safetensors')['model.layers.1.self_attn.q_norm.weight'],
        np.concatenate([gain[::2], gain[1::2]]))


def test_silent_files_mean_the_defaults_of_their_class():
    def silent(kind, **stated):
        sizes = dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, intermediate_size=80,
                     num_attention_heads=16)
        return decoders.read(dict(model_type=kind) | sizes | stated, 'x')
    first = silent('llama')         # the first Llama's file names neither base nor key heads
    assert (first['backbone.theta'], first['backbone.kv_heads']) == (1e4, 16)
    assert silent('mistral')['backbone.window_columns'] == 4096
    assert silent('mistral', sliding_window=None)['backbone.window_columns'] is None
    assert silent('qwen3')['backbone.head_dim'] == 128
    assert silent('qwen3', head_dim=None)['backbone.head_dim'] == 4
    mixtral = silent('mixtral')
    assert (mixtral['backbone.theta'], mixtral['backbone.experts'], mixtral['backbone.kv_heads'],
            mixtral['backbone.window_columns']) == (1e6, 8, 8, None)
    helium = silent('helium', hidden_size=2048)
    assert (helium['backbone.theta'], helium['backbone.norm_eps']) == (1e5, 1e-8)
    window = dict(use_sliding_window=True, sliding_window=7)
    assert silent('qwen2', **window)['backbone.window_columns'] is None     # from layer 28 on
    assert silent('qwen2', **window, max_window_layers=0)['backbone.window_columns'] == 7


def test_both_spellings_of_rotary_positions():
    """transformers 5 has base and scaling in one place, 4 in two, and older files say `type`."""
    want = read('llama3')
    scaling = dict(LLAMA3, original_max_position_embeddings=32)
    new = dict(rope_theta=None, rope_scaling=None, rope_parameters=dict(scaling, rope_theta=500.0))
    old = dict(rope_scaling={'type' if k == 'rope_type' else k: v for k, v in scaling.items()})
    assert want['backbone.rope_scaling'] == dict(
        name='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_columns=32)
    assert read('llama3', **new) == read('llama3', **old) == want


@pytest.mark.parametrize('golden, changes, message', [
    ('llama3', dict(rope_scaling=dict(rope_type='yarn', factor=2.0)),
     r"rotary scaling 'yarn' is not supported \(linear, llama3 are\)"),
    ('llama3', dict(rope_scaling=dict(type='dynamic', factor=2.0)), "scaling 'dynamic' is not"),
    ('llama3', dict(rope_scaling=dict(rope_type=['llama3'])), 'is not supported'),
    ('llama3', dict(rope_scaling=dict(rope_type='llama3', factor=8.0)),
     'low_freq_factor must be a number'),
    ('llama3', dict(rope_scaling=dict(rope_type='linear', factor=float('nan'))),
     'factor must be a number'),
    ('llama', dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.5)),
     'partial_rotary_factor must be None or 1'),
    ('llama', dict(rope_parameters=dict(rope_type='default', rope_theta=5e2),
                   rope_scaling=dict(rope_type='linear', factor=4.0)), 'and rope_scaling differ'),
    ('llama', dict(partial_rotary_factor=0.5), 'partial_rotary_factor must be'),
    ('llama', dict(mlp_bias=True), 'mlp_bias must be False'),
    ('llama', dict(model_type=['llama']), 'model_type must be one of'),
    ('qwen3', dict(attention_bias=True), 'attention_bias must be False'),
    ('qwen3', dict(use_sliding_window=True, sliding_window=7, max_window_layers=1,
                   layer_types=None), 'on some layers only is not supported'),
    ('qwen2', dict(use_sliding_window=True, sliding_window=7, max_window_layers=0,
                   layer_types=['sliding_attention', 'full_attention']), 'on some layers only'),
    ('qwen2', dict(use_sliding_window=True, layer_types=7), 'on some layers only'),
    ('mixtral', dict(num_local_experts=1 << 20), 'num_local_experts must be a number from 1 to'),
    ('mixtral', dict(num_experts_per_tok=6), 'num_experts_per_tok must be a number from 1 to 5'),
    ('mixtral', dict(sliding_window=0), 'sliding_window must be'),
    ('helium', dict(head_dim=8), 'head_dim times num_attention_heads must be hidden_size'),
])
def test_what_cannot_be_read_is_one_line(golden, changes, message):
    with pytest.raises(ValueError, match=message) as e:
        read(golden, **changes)
    assert '\n' not in str(e.value) and str(e.value).startswith('config.json: ')


@pytest.mark.parametrize('golden, changes, message', [
    ('llama', dict(norm_gain='early'), "pairs is 'half'; format 'hf' with norm_gain 'early'"),
    ('helium', dict(window_columns=5), 'backbone.window_columns is 5'),
    ('helium', dict(head_dim=8), 'backbone.head_dim is 8'),
    ('helium', dict(experts=2), 'backbone.experts is 2'),
    ('mixtral', dict(qkv_bias=True), 'backbone.qkv_bias is True'),
    ('mixtral', dict(qk_norm='head'), "backbone.qk_norm is 'head'"),
    ('qwen3', dict(qkv_bias=True), 'backbone.qkv_bias is True')])
def test_what_no_released_decoder_is(golden, changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        export.save(released.decoder(golden, **changes), {}, str(tmp_path / 'out'), 'hf')


@pytest.mark.parametrize('golden, other, message', [
    ('llama', dict(name='llama', norm_gain='early', pairs='interleaved'), 'backbone.norm_gain'),
    ('helium', dict(name='helium', norm_gain='late'), 'backbone.norm_gain'),
    ('helium', dict(name='helium', rope_scaling=dict(name='linear', factor=2.0)), 'rope_scaling'),
    ('llama3', dict(name='llama3', rope_scaling='none'), 'backbone.rope_scaling is .none.'),
    ('mixtral', dict(name='mixtral', experts_per_column=1), 'backbone.experts_per_column'),
    ('qwen3', dict(name='qwen3', qk_norm='none'), 'backbone.qk_norm')])
def test_a_config_of_another_kind_is_refused(golden, other, message):
    """Before a tensor is read: weights never run under another mechanism than they were trained."""
    with pytest.raises(ConfigError, match=message):
        export.import_params(released.decoder(**other), str(released.GOLDEN / golden), 'hf')


@pytest.mark.parametrize('option', [
    dict(rope_scaling=dict(name='linear', factor=2.0)), dict(qk_norm='head'), dict(experts=2)])
def test_the_multistream_format_cannot_say_these(option, tmp_path):
    with pytest.raises(ConfigError, match=f'backbone.{next(iter(option))}'):
        export.save(released.multistream(**option), {}, str(tmp_path / 'out'), 'kyutai')

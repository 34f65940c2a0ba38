# SPDX-License-Identifier: Apache-2.0
"""The released implementations and ours in one process: the same weights say the same.

Runs in an environment of its own (`make test-peers`), which holds PyTorch, transformers and moshi
beside jax. Weights are random and go both ways: what a peer saves we import, what we export a peer
loads with its own loader.
"""

import json
import os

import numpy as np
import pytest
import released

from jaxsd import export, generate, model

pytestmark = pytest.mark.peers
TOLERANCE = 1e-4


@pytest.fixture(scope='module')
def torch():
    os.environ['NO_TORCH_COMPILE'] = '1'
    import torch
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    return torch


@pytest.fixture(scope='module')
def peers(torch):
    """tests/peers/make_goldens.py, which makes peers with random weights."""
    import make_goldens
    return make_goldens


@pytest.fixture(scope='module')
def show():
    """Prints what was measured, for whoever runs with -s or reads the end of the log."""
    figures = {}
    yield figures.__setitem__
    print()
    for name, value in figures.items():
        print(f'max |difference| of logits, {name}: {value:.1e}')


def far(a, b, at_most=TOLERANCE) -> float:
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    worst = float(np.nanmax(np.abs(a - b)))
    assert worst <= at_most
    return worst


def tokens_for(config, seed: int, columns: int = 40) -> np.ndarray:
    size = model.make_vocab(config).size
    return np.random.default_rng(seed).integers(0, size, (2, columns)).astype(np.int32)


def greedy(config, params, prompt, steps: int):
    """Greedy continuation by our streaming engine, [B, steps]."""
    v = model.make_vocab(config)
    graph, _, _ = model.abstract(config)
    stream = generate.Stream(generate.ready(graph, params, v, {}), rows=len(prompt),
                             columns=prompt.shape[1] + steps, key=released.jax.random.key(0))
    free = np.full((len(prompt), 1), generate.FREE, np.int32)
    first = stream.first([p[None] for p in prompt], free)
    rest = stream.more(np.full((steps - 1, len(prompt), 1), generate.FREE, np.int32))
    return np.concatenate([np.asarray(first), np.asarray(rest)[:, :, 0].T], 1)


LLAMA3 = dict(rope_type='llama3', factor=4., low_freq_factor=1., high_freq_factor=3.,
              original_max_position_embeddings=24)
SHAPES = {      # other shapes than the goldens', so that no size can be mistaken for another
    'llama': dict(hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=6,
                  num_key_value_heads=3, head_dim=24, rope_theta=1e5, rms_norm_eps=1e-6),
    'llama linear': dict(tie_word_embeddings=True, num_key_value_heads=4,
                         rope_scaling=dict(rope_type='linear', factor=3.)),
    'llama3': dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=3, head_dim=32,
                   rope_scaling=LLAMA3, tie_word_embeddings=False),
    'llama3 base': dict(num_key_value_heads=1, rope_theta=9e4, rope_scaling=dict(
        LLAMA3, factor=32., original_max_position_embeddings=40)),
    'mistral': dict(hidden_size=64, num_hidden_layers=3, sliding_window=7, num_key_value_heads=2),
    'mistral tied': dict(head_dim=24, sliding_window=30, tie_word_embeddings=True,
                         rope_scaling=dict(rope_type='linear', factor=2.)),
    'mixtral': dict(hidden_size=48, num_hidden_layers=3, num_local_experts=8, head_dim=16,
                    intermediate_size=24, sliding_window=7),
    'mixtral three': dict(num_local_experts=4, num_experts_per_tok=3, num_key_value_heads=4,
                          tie_word_embeddings=True),
    'qwen2': dict(hidden_size=96, num_key_value_heads=1, tie_word_embeddings=False),
    'qwen2 window': dict(use_sliding_window=True, sliding_window=6, max_window_layers=0),
    'qwen3': dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, head_dim=24,
                  num_key_value_heads=1, tie_word_embeddings=True),
    'qwen3 window': dict(use_sliding_window=True, sliding_window=6, max_window_layers=0,
                         num_key_value_heads=4),
    'helium': dict(hidden_size=48, num_attention_heads=2, head_dim=24, num_hidden_layers=3),
    'helium tied': dict(num_key_value_heads=4, rope_theta=1e5, tie_word_embeddings=True,
                        intermediate_size=56),
}


def our_config(path: str):
    """A config of ours from what a peer's config.json says."""
    with open(os.path.join(path, 'config.json')) as f:
        return released.of_facts(export.FAMILIES['hf'].read(json.load(f), path))


def continued(torch, peer, tokens):
    """Sixteen tokens that the peer finds likeliest after the first eight."""
    return peer.generate(torch.tensor(tokens[:, :8]).long(), do_sample=False, max_new_tokens=16,
                         eos_token_id=None, pad_token_id=0)[:, 8:].numpy()


@pytest.mark.parametrize('case', SHAPES)
def test_decoder_from_peer(case, torch, peers, show, tmp_path):
    peer = peers.decoder(case.split()[0], 31, **SHAPES[case])
    peer.save_pretrained(tmp_path, max_shard_size='60kB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 2      # read through the index
    config = our_config(str(tmp_path))
    params = export.import_params(config, str(tmp_path), 'hf')
    tokens = tokens_for(config, 1)
    labels = np.where(np.arange(tokens.shape[1]) % 5 == 3, -100, tokens)
    out = peer(torch.tensor(tokens).long(), labels=torch.tensor(labels).long())
    assert out.logits.std() > .5
    ours, = released.scores(config, params, tokens[:, None])
    show(f'{case} to us', far(ours, out.logits.numpy()))
    assert released.loss(config, params, tokens, labels) == pytest.approx(float(out.loss), abs=1e-5)
    np.testing.assert_array_equal(greedy(config, params, tokens[:, :8], 16),
                                  continued(torch, peer, tokens))
    export.save(config, params, str(tmp_path / 'back'), 'hf')
    again = export.import_params(config, str(tmp_path / 'back'), 'hf')
    for a, b in zip(released.jax.tree.leaves(params), released.jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


OURS = {        # a config of ours and the class of transformers that it becomes
    'llama': (released.decoder('llama', head_dim=32), 'Llama'),
    'llama linear': (released.decoder('llama', rope_scaling=dict(name='linear', factor=3.)),
                     'Llama'),
    'llama3': (released.decoder('llama3', mlp=56), 'Llama'),
    'mistral': (released.decoder('mistral', window_columns=9), 'Mistral'),
    'mixtral': (released.decoder('mixtral', experts=3, mlp=24), 'Mixtral'),
    'mixtral window': (released.decoder('mixtral', window_columns=6, experts_per_column=1),
                       'Mixtral'),
    'qwen2': (released.decoder('qwen2'), 'Qwen2'),
    'qwen2 window': (released.decoder('qwen2', window_columns=6), 'Qwen2'),
    'qwen3': (released.decoder('qwen3', kv_heads=1), 'Qwen3'),
    'qwen3 window': (released.decoder('qwen3', window_columns=6), 'Qwen3'),
    'helium': (released.decoder('helium', kv_heads=4), 'Helium'),
    'helium slowed': (released.decoder('helium', rope_scaling=dict(
        name='llama3', factor=4., low_freq_factor=1., high_freq_factor=3., original_columns=24)),
        'Helium'),
    'interleaved pairs': (released.decoder('llama', pairs='interleaved'), 'Llama'),
    'interleaved biases': (released.decoder('qwen2', pairs='interleaved'), 'Qwen2'),
    'interleaved norms': (released.decoder('qwen3', pairs='interleaved'), 'Qwen3'),
}


@pytest.mark.parametrize('case', OURS)
def test_decoder_to_peer(case, torch, show, tmp_path):
    import transformers
    config, name = OURS[case]
    params = released.random_params(config, 4)
    export.save(config, params, str(tmp_path / 'out'), 'hf', shard_bytes=100_000)
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / 'out', output_loading_info=True)
    assert not any(info.values()), info
    assert peer.dtype == torch.float32
    assert (peer.generation_config.bos_token_id, peer.generation_config.eos_token_id) == (1, 2)
    assert type(peer).__name__ == f'{name}ForCausalLM'
    tokens = tokens_for(config, 2)
    theirs = peer(torch.tensor(tokens).long()).logits.numpy()
    ours, = released.scores(config, params, tokens[:, None])
    show(f'{case} to the peer', far(ours, theirs))
    np.testing.assert_array_equal(greedy(config, params, tokens[:, :8], 16),
                                  continued(torch, peer, tokens))


MULTISTREAM = {     # what changes in the peer's config.json, what changes in ours
    'kyutai': ({}, {}),
    'kyutai grouped keys': (dict(kv_repeat=2, depformer_kv_repeat=1), dict(kv_heads=2)),
    'kyutai half pairs': (dict(positional_embedding='rope_concat', context=9),
                          dict(pairs='half', window_columns=9)),
    'kyutai shared steps': (dict(depformer_weights_per_step=False, depformer_multi_linear=False),
                            dict(head=dict(step_weights='shared'))),
    'kyutai delays': (dict(delays=[0, 0, 3, 3, 3, 0, 3, 3, 3], num_layers=3, max_period=10000.,
                           norm='rms_norm', depformer_num_layers=1, hidden_scale=4),
                      dict(layers=3, theta=1e4, norm_eps=1e-5, mlp=168,
                           head=dict(norm_eps=1e-5, layers=1))),
}


def multistream(case):
    config = released.multistream(**MULTISTREAM[case][1])
    if case == 'kyutai delays':
        config.layout.acoustic_delay_columns = 3
    return config


@pytest.mark.parametrize('case', MULTISTREAM)
def test_multistream_from_peer(case, torch, peers, show, tmp_path):
    import safetensors.torch
    values = peers.KYUTAI | MULTISTREAM[case][0]
    peer = peers.lm_model(42, **values)
    safetensors.torch.save_model(peer, str(tmp_path / 'model.safetensors'))
    (tmp_path / 'config.json').write_text(json.dumps(values))
    config = multistream(case)
    params = export.import_params(config, str(tmp_path), 'kyutai')
    codes = peers.codes_for(values, seed=5, batch=2, frames=20)
    out = peer(torch.tensor(codes).long())
    text, audio = released.aligned_scores(config, params, codes)
    assert out.logits.numpy()[out.mask.numpy()].std() > .5
    show(f'{case} to us', max(far(text, out.text_logits.numpy()), far(audio, out.logits.numpy())))
    if not values['depformer_weights_per_step']:
        return      # the peer's own streaming refuses: its depth cache has no capacity then
    heard = np.random.default_rng(6).integers(0, values['card'], (2, 4, 20)).astype(np.int32)
    said, gap = peers.stream(peer, heard)
    assert gap > TOLERANCE, f'{case}: a greedy choice hangs on {gap}; take another seed'
    np.testing.assert_array_equal(released.spoken(config, params, heard), said)


@pytest.mark.parametrize('case', [*MULTISTREAM, 'kyutai both'])
def test_multistream_to_peer(case, torch, peers, show, tmp_path):
    from moshi.models import loaders
    config = (released.multistream(vocab=dict(predicted=('mine', 'theirs')))
              if case == 'kyutai both' else multistream(case))
    params = released.random_params(config, 8)
    export.save(config, params, str(tmp_path / 'out'), 'kyutai')
    peer = loaders.CheckpointInfo.from_hf_repo(
        'nowhere/local', moshi_weights=tmp_path / 'out' / 'model.safetensors',
        mimi_weights=tmp_path / 'none', tokenizer=tmp_path / 'none',
        config_path=tmp_path / 'out' / 'config.json').get_moshi(dtype=torch.float32).eval()
    codes = peers.codes_for(peers.KYUTAI, seed=9, batch=2, frames=20)
    out = peer(torch.tensor(codes).long())
    text, audio = released.aligned_scores(config, params, codes)
    assert out.logits.numpy()[out.mask.numpy()].std() > .5
    show(f'{case} to the peer',
         max(far(text, out.text_logits.numpy()), far(audio, out.logits.numpy())))


def test_goldens_are_what_the_peers_say(torch, peers):
    """The committed arrays, made anew from the committed weights by the installed peers."""
    import transformers
    from moshi.models import loaders
    for name in released.DECODERS:
        golden = dict(np.load(released.GOLDEN / name / 'arrays.npz'))
        peer = transformers.AutoModelForCausalLM.from_pretrained(
            released.GOLDEN / name, dtype=torch.float32)
        far(peer(torch.tensor(golden['tokens']).long()).logits.numpy(), golden['logits'], 5e-5)
    golden = dict(np.load(released.GOLDEN / 'kyutai' / 'arrays.npz'))
    values = json.loads((released.GOLDEN / 'kyutai' / 'config.json').read_text())
    peer = loaders.get_moshi_lm(released.GOLDEN / 'kyutai' / 'model.safetensors', values,
                                dtype=torch.float32).eval()
    out = peer(torch.tensor(golden['codes']).long())
    far(out.logits.numpy(), golden['logits'], 5e-5)
    far(out.text_logits.numpy(), golden['text_logits'], 5e-5)
    np.testing.assert_array_equal(peers.stream(peer, golden['heard'])[0], golden['said'])

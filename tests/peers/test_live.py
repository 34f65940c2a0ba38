# SPDX-License-Identifier: Apache-2.0
"""The released implementations and ours in one process: the same weights say the same.

Runs in an environment of its own (`make test-peers`), which holds PyTorch, transformers and moshi
beside jax. Weights are random and go both ways: what a peer saves we import, what we export a peer
loads with its own loader.
"""

import json
import os
import re

import numpy as np
import pytest
import released
import test_surgery

from jaxsd import export, generate, model
from jaxsd.export import kyutai_lora
from jaxsd.layout import duplex
from jaxsd.types import Record, Word

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
    prompt = torch.tensor(tokens[:, :8]).long()     # which may hold what is named as padding
    return peer.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                         max_new_tokens=16, eos_token_id=None, pad_token_id=0)[:, 8:].numpy()


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


def test_a_tied_checkpoint_with_a_head_of_its_own(torch, peers, tmp_path):
    """transformers runs with the head that is there; we refuse, and agree once the file says so."""
    import transformers
    from safetensors.numpy import load_file, save_file
    peer = peers.decoder('llama', 33, tie_word_embeddings=True)
    peer.save_pretrained(tmp_path)
    state = load_file(tmp_path / 'model.safetensors')
    rng = np.random.default_rng(1)
    state['lm_head.weight'] = rng.standard_normal((96, 64)).astype(
        state['model.embed_tokens.weight'].dtype)
    save_file(state, tmp_path / 'model.safetensors', {'format': 'pt'})
    tokens = tokens_for(our_config(str(tmp_path)), 1)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(
        torch.tensor(tokens).long()).logits.numpy()
    with pytest.raises(ValueError, match='lm_head.weight differs from model.embed_tokens.weight'):
        export.load(str(tmp_path))
    values = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(values | dict(tie_word_embeddings=False)))
    far(export.load(str(tmp_path)).scores(tokens), theirs)


OURS = {        # a config of ours and the class of transformers that it becomes
    'llama': (released.decoder('llama', head_dim=32), 'Llama'),
    'llama linear': (released.decoder('llama', rope_scaling=dict(name='linear', factor=3.)),
                     'Llama'),
    'llama3': (released.decoder('llama3', mlp=56), 'Llama'),
    'mistral': (released.decoder('mistral', window_columns=9), 'Mistral'),
    'mistral grouped': (released.decoder('mistral', window_columns=6, kv_heads=2, mlp=56),
                     'Mistral'),
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


def test_balance_of_experts_as_the_peer_counts_it(torch, peers, show, tmp_path):
    """The auxiliary loss of a mixture, padding left out, and its gradient in every router."""
    peer = peers.decoder('mixtral', 31, **SHAPES['mixtral'])
    peer.save_pretrained(tmp_path)
    config = our_config(str(tmp_path))
    params = export.import_params(config, str(tmp_path), 'hf')
    tokens, real = tokens_for(config, 3), np.ones((2, 40), np.int32)
    real[0, 29:] = 0
    with torch.enable_grad():
        loss = peer(torch.tensor(tokens).long(), attention_mask=torch.tensor(real).long(),
                    output_router_logits=True).aux_loss
        loss.backward()
    theirs = np.stack([p.grad.numpy().T for name, p in peer.named_parameters()
                       if name.endswith('gate.weight')])
    batch = dict(tokens=tokens[:, None], segment=real,
                 position=np.broadcast_to(np.arange(40, dtype=np.int32), real.shape))

    @released.jax.jit
    @released.jax.value_and_grad
    def ours(params):
        total, columns = released.bound(config, params).forward(batch)[2]['balance']
        return total / columns
    value, gradient = ours(params)
    gradient = np.asarray(gradient['backbone']['blocks']['experts']['router']['kernel'])
    assert float(value) == pytest.approx(float(loss), rel=1e-5)
    assert theirs.shape == gradient.shape and np.abs(theirs).max() > 1e-3
    show('the gradient of the balance of experts', far(gradient, theirs, 1e-5))


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
    'kyutai schedule': (dict(depformer_weights_per_step_schedule=[0, 1, 1, 2]),
                        dict(head=dict(step_weights=(0, 1, 1, 2)))),
    'kyutai one set by schedule': (
        dict(depformer_weights_per_step_schedule=[0] * 4, depformer_dim=48, depformer_num_heads=3,
             depformer_dim_feedforward=198, depformer_num_layers=1),
        dict(head=dict(step_weights=(0,) * 4, width=48, heads=3, mlp=132, layers=1))),
}
BOTH = ('mine', 'theirs')


def multistream(case):
    config = released.multistream(**MULTISTREAM[case][1])
    if case == 'kyutai delays':
        config.layout.acoustic_delay_columns = 3
    return config


def older(torch, peer, values, config, params, codes, folder):
    """Tensors as the published checkpoints stack them: the same to the peer's loader, and to us."""
    from moshi.models import loaders
    from safetensors.numpy import save_file
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(values))
    state = released.stacked({k: v.numpy() for k, v in peer.state_dict().items()})
    assert 'transformer.layers.0.self_attn.in_proj_weight' in state
    save_file(state, folder / 'model.safetensors')
    theirs = loaders.get_moshi_lm(folder / 'model.safetensors', dict(values), dtype=torch.float32)
    ids = torch.tensor(codes).long()
    assert torch.equal(theirs.eval()(ids).text_logits, peer(ids).text_logits)
    released.jax.tree.map(np.testing.assert_array_equal, params,
                          export.import_params(config, str(folder), 'kyutai'))


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
    older(torch, peer, values, config, params, codes, tmp_path / 'older')
    export.save(config, params, str(tmp_path / 'back'), 'kyutai')
    back = safetensors.torch.load_file(tmp_path / 'back' / 'model.safetensors')
    assert set(back) == set(peer.state_dict())
    assert all(torch.equal(back[k], v) for k, v in peer.state_dict().items())
    if not values['depformer_weights_per_step']:
        return      # the peer's own streaming refuses: its depth cache has no capacity then
    heard = np.random.default_rng(6).integers(0, values['card'], (2, 4, 20)).astype(np.int32)
    said, gap = peers.stream(peer, heard)
    assert gap > TOLERANCE, f'{case}: a greedy choice hangs on {gap}; take another seed'
    np.testing.assert_array_equal(released.spoken(config, params, heard), said)


@pytest.mark.parametrize('case', [*MULTISTREAM, 'kyutai both'])
def test_multistream_to_peer(case, torch, peers, show, tmp_path):
    from moshi.models import loaders
    config = (released.multistream(vocab=dict(predicted=BOTH))
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
    if case in ('kyutai shared steps', 'kyutai both'):
        return      # the peer's own streaming refuses, as above; and there nobody is left to hear
    heard = np.random.default_rng(12).integers(0, 32, (2, 4, 16)).astype(np.int32)
    said, gap = peers.stream(peer, heard)
    assert said.shape[-1] >= 12 and gap > TOLERANCE, f'{case}: a choice hangs on {gap}'
    np.testing.assert_array_equal(released.spoken(config, params, heard), said)


@pytest.mark.parametrize('changes', [{}, dict(num_hidden_layers=3, num_key_value_heads=4,
                                              tie_word_embeddings=True)])
def test_a_text_model_becomes_the_temporal_transformer(changes, torch, peers, show, tmp_path):
    """A Helium of transformers inside moshi's LMModel: where nothing but text is heard and new ids
    begin as zeros, text is what the text model says after one empty column."""
    from moshi.models import loaders
    text = peers.decoder('helium', 54, **changes)
    text.save_pretrained(tmp_path / 'text')
    config = released.multistream(vocab=dict(text_tokens=96))
    config.backbone = dict(released.decoder('helium').backbone) | dict(
        layers=text.config.num_hidden_layers, kv_heads=text.config.num_key_value_heads)
    params = test_surgery.begun(config, f'hf:{tmp_path}/text', rows=dict(name='zero'),
                                fresh=test_surgery.FRESH)
    export.save(config, export.unflatten(params), str(tmp_path / 'out'), 'kyutai')
    peer = loaders.get_moshi_lm(tmp_path / 'out' / 'model.safetensors', json.loads(
        (tmp_path / 'out' / 'config.json').read_text()), dtype=torch.float32).eval()
    tokens = torch.tensor(np.random.default_rng(2).integers(0, 96, (2, 30)))
    codes = torch.full((2, 9, 30), -1)
    codes[:, 0] = tokens
    first = text.get_input_embeddings()(tokens)
    theirs = text(inputs_embeds=torch.cat([torch.zeros_like(first[:, :1]), first], 1)).logits
    show(f'a text model of {len(text.model.layers)} layers in the peer\'s LMModel',
         far(peer(codes).text_logits[:, 0].numpy(), theirs[:, :-1].numpy()))


SHORT = {       # one of each family: our config, our format
    'llama': (released.decoder('llama'), 'hf'), 'kyutai': (released.multistream(), 'kyutai'),
    'in halves': (released.in_halves(), 'kyutai-hf')}


@pytest.mark.parametrize('case', SHORT)
def test_bfloat16_to_peer(case, torch, peers, show, tmp_path):
    """Half the bytes: the peer has it as bfloat16 by default, and in float32 says what we say."""
    import transformers
    from moshi.models import loaders
    config, format = SHORT[case]
    export.save(config, released.random_params(config, 15), str(tmp_path / 'out'), format,
                dtype='bf16')
    params = export.import_params(config, str(tmp_path / 'out'), format)
    if format == 'kyutai':
        def load(dtype):
            return loaders.get_moshi_lm(tmp_path / 'out' / 'model.safetensors', json.loads(
                (tmp_path / 'out' / 'config.json').read_text()), dtype=dtype).eval()
        assert {p.dtype for p in load(torch.bfloat16).parameters()} == {torch.bfloat16}
        codes = peers.codes_for(peers.KYUTAI, seed=9, batch=2, frames=20)
        out = load(torch.float32)(torch.tensor(codes).long())
        text, audio = released.aligned_scores(config, params, codes)
        worst = max(far(text, out.text_logits.numpy()), far(audio, out.logits.numpy()))
    else:
        kind = (transformers.AutoModelForCausalLM if format == 'hf' else
                transformers.MoshiForConditionalGeneration)
        assert kind.from_pretrained(tmp_path / 'out').dtype == torch.bfloat16
        peer = kind.from_pretrained(tmp_path / 'out', dtype=torch.float32)
        if format == 'hf':
            tokens = tokens_for(config, 2)
            ours, = released.scores(config, params, tokens[:, None])
            worst = far(ours, peer(torch.tensor(tokens).long()).logits.numpy())
        else:
            codes = np.random.default_rng(4).integers(0, 32, (2, 7, 20)).astype(np.int32)
            theirs = peers.moshi_logits(peer, peers.delayed(peers.MOSHI, codes))
            ours = released.scores(config, params, released.columns_of(config, codes))
            worst = max(far(ours[0][:, :-1], theirs[0]),
                        far(np.stack(ours[1:4], 1)[:, :, :-1], theirs[1]))
    show(f'{case} in bfloat16 to the peer', worst)


CUT = {     # of eight steps that speak for both, the four that speak for one
    'cut': ({}, 'own'),
    'cut schedule': (dict(depformer_weights_per_step_schedule=[0, 1, 1, 2, 3, 3, 3, 3]),
                     (0, 1, 1, 2)),
}


@pytest.mark.parametrize('case', CUT)
def test_both_speakers_cut_to_one(case, torch, peers, show, tmp_path):
    """Against the whole model's first steps, and a peer that is cut by hand as theirs are."""
    import safetensors.torch
    values = peers.KYUTAI | dict(dep_q=8) | CUT[case][0]
    peer = peers.lm_model(43, **values)
    state = peer.state_dict()
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()},
                                str(tmp_path / 'model.safetensors'))
    (tmp_path / 'config.json').write_text(json.dumps(values))
    config = released.multistream(head=dict(step_weights=CUT[case][1]))
    params = export.import_params(config, str(tmp_path), 'kyutai')
    codes = peers.codes_for(values, seed=5, batch=2, frames=20)
    out = peer(torch.tensor(codes).long())
    text, audio = released.aligned_scores(config, params, codes)
    show(f'{case} to us', max(far(text, out.text_logits.numpy()),
                              far(audio, out.logits.numpy()[:, :4])))
    schedule = values.get('depformer_weights_per_step_schedule')
    sets = max(schedule[:4]) + 1 if schedule else 4
    small = peers.lm_model(1, **values | dict(dep_q=4) | (
        dict(depformer_weights_per_step_schedule=schedule[:4]) if schedule else {}))
    limits = {r'linears\.(\d+)\.': 4, r'depformer_emb\.(\d+)\.': 3, r'depformer_in\.(\d+)\.': sets,
              r'depformer\.layers.*(?:projs|gating)\.(\d+)\.': sets}
    small.load_state_dict({k: v for k, v in state.items() if not any(
        (m := re.match(pattern, k)) and int(m[1]) >= n for pattern, n in limits.items())})
    heard = np.random.default_rng(6).integers(0, values['card'], (2, 4, 14)).astype(np.int32)
    said, gap = peers.stream(small, heard)
    assert gap > TOLERANCE, f'{case}: a greedy choice hangs on {gap}; take another seed'
    np.testing.assert_array_equal(released.spoken(config, params, heard), said)


ODD = {     # shapes that nobody has published; with a single depth step the peer's forward refuses
    'one speaker': dict(n_q=4, delays=[0, 0, 1, 1, 1]),
    'two codebooks': dict(n_q=4, dep_q=2, delays=[0] * 5),
    'two codebooks, text behind': dict(n_q=4, dep_q=2, delays=[2, 0, 0, 0, 0], context=None),
    'one stream': dict(n_q=2, dep_q=2, delays=[3, 0, 1], num_layers=1),
    'text behind': dict(delays=[2, 0, 1, 1, 1, 0, 1, 1, 1], context=2),
    'text ahead': dict(delays=[0, 2, 4, 4, 4, 2, 4, 4, 4], context=1),
    'odd widths': dict(dim=40, num_heads=5, hidden_scale=2.7, depformer_dim=15,
                       depformer_num_heads=5, depformer_dim_feedforward=47,
                       depformer_num_layers=3, card=7, text_card=11),
    'four times as wide': dict(dim=40, num_heads=2, hidden_scale=4, depformer_dim=15,
                               depformer_num_heads=3, depformer_dim_feedforward=60),
    'steps in turn': dict(depformer_weights_per_step_schedule=[1, 0, 2, 0], kv_repeat=4,
                          depformer_kv_repeat=1),
    'low rank': dict(depformer_low_rank_embeddings=5),
    'low rank, both, schedule': dict(
        dep_q=8, depformer_low_rank_embeddings=24, depformer_dim=24, depformer_num_heads=3,
        depformer_dim_feedforward=99, card=19,
        depformer_weights_per_step_schedule=[0, 1, 1, 2, 3, 3, 3, 3]),
}


@pytest.mark.parametrize('case', ODD)
def test_odd_shapes(case, torch, peers, show, tmp_path):
    """From the folder alone, for recordings shorter than delays and longer than the context; what
    goes back says the same in the peer's loader, and the peer's stream is ours."""
    import safetensors.torch
    from moshi.models import loaders
    values = peers.KYUTAI | ODD[case]
    peer = peers.lm_model(61, **values)
    safetensors.torch.save_file({k: v.contiguous() for k, v in peer.state_dict().items()},
                                str(tmp_path / 'model.safetensors'))
    (tmp_path / 'config.json').write_text(json.dumps(values))
    lm = export.load(str(tmp_path))
    lm.save(str(tmp_path / 'back'))
    said = json.loads((tmp_path / 'back' / 'config.json').read_text())
    back = loaders.get_moshi_lm(tmp_path / 'back' / 'model.safetensors', dict(said),
                                dtype=torch.float32).eval()
    whole = 'low rank' not in case      # which goes back as one tensor
    for name, tensor in back.state_dict().items():
        assert not whole or torch.equal(tensor, peer.state_dict()[name]), name
    worst = []
    for frames in (1, 2, 3, 20):
        codes = peers.codes_for(values, seed=5, batch=2, frames=frames)
        theirs, ours = peer(torch.tensor(codes).long()), lm.scores(codes)
        again = back(torch.tensor(codes).long())
        assert np.isfinite(ours['audio'][theirs.mask.numpy()]).all()
        for found in (theirs, again):
            for mine, other in ((ours['text'], found.text_logits[:, 0]),
                                (ours['audio'], found.logits)):
                np.testing.assert_array_equal(np.isnan(mine), np.isnan(other.numpy()))
                worst.append(float(np.nan_to_num(np.abs(mine - other.numpy())).max()))
    show(case, max(worst))
    assert max(worst) <= TOLERANCE and theirs.text_logits[theirs.text_mask].std() > .4
    # Without a context the peer's cache has no capacity. Before late text begins, its generation
    # speaks by text that it throws away, its training (as we) by the initial token.
    if (values['n_q'] == values['dep_q'] or values['context'] is None
            or values['delays'][0] > values['delays'][1]):
        return
    heard = np.random.default_rng(6).integers(
        0, values['card'], (2, values['n_q'] - values['dep_q'], 20)).astype(np.int32)
    said, gap = peers.stream(peer, heard)
    assert gap > TOLERANCE, f'{case}: a greedy choice hangs on {gap}; take another seed'
    np.testing.assert_array_equal(released.spoken(lm.config, lm.params, heard), said)


def trained(name: str, corpus, tmp_path, *formats: str) -> None:
    """The tiny system after some steps of training on the small corpus, exported to folders."""
    from test_interchange import system

    from jaxsd import cli
    config = system(name, corpus, tmp_path, (
        "c.columns = 64; c.stages = (dict(c.stages[0]) | dict(steps=6, lr=1e-2, warmup_steps=0, "
        "batch=8),); c.layout.update(dict(acoustic_delay_columns=1) if 'duplex' in c.layout.name "
        "else {})"))
    where = ['--config', config, '--workdir', str(tmp_path / 'run')]
    assert cli.main(['train', *where]) == 0
    for format in formats:
        assert cli.main(['export', *where, '--format', format, '--out',
                         str(tmp_path / format)]) == 0


def test_what_converses_and_was_trained_here_to_peers(corpus, torch, peers, show, tmp_path):
    """moshi, transformers and we say the same of a tiny system that the command line trained."""
    import transformers
    from moshi.models import loaders
    trained('moshi', corpus, tmp_path, 'kyutai', 'kyutai-hf')
    lm = export.load(str(tmp_path / 'kyutai'))
    rows = model.make_vocab(lm.config).rows
    rng = np.random.default_rng(1)
    codes = np.stack([rng.integers(0, row.predicted or row.size - 1, (2, 16)) for row in rows],
                     1).astype(np.int32)
    at = tmp_path / 'kyutai'
    peer = loaders.CheckpointInfo.from_hf_repo(
        '', at / 'model.safetensors', at / 'no mimi', at / 'tokenizer.model', at / 'config.json'
        ).get_moshi(dtype=torch.float32).eval()
    out, ours = peer(torch.tensor(codes).long()), lm.scores(codes)
    assert out.text_logits.std() > .2
    show('trained here, to moshi', max(far(ours['text'], out.text_logits.numpy()[:, 0]),
                                       far(ours['audio'], out.logits.numpy())))
    peer = transformers.MoshiForConditionalGeneration.from_pretrained(tmp_path / 'kyutai-hf')
    said = dict(audio_vocab_size=rows[1].size - 1, vocab_size=rows[0].predicted,
                num_codebooks=(len(rows) - 1) // 2)
    theirs = peers.moshi_logits(peer, peers.delayed(said, codes))
    ours = released.scores(lm.config, lm.params, released.columns_of(lm.config, codes))
    spoken = [x for x in ours[1:] if x is not None]
    show('trained here, to transformers', max(
        far(ours[0][:, :-1], theirs[0]), far(np.stack(spoken, 1)[:, :, :-1], theirs[1])))


def test_one_row_that_was_trained_here_to_peer(corpus, torch, show, tmp_path):
    import transformers
    trained('spirit_lm', corpus, tmp_path, 'hf')
    lm = export.load(str(tmp_path / 'hf'))
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    tokens = tokens_for(lm.config, 1)
    theirs = peer(torch.tensor(tokens).long()).logits.numpy()
    assert theirs.std() > .2
    show('trained here, one row, to transformers', far(lm.scores(tokens), theirs))


TERMS = {   # what changes in the peer's config.json, our config, rank and scale
    'terms': ({}, released.multistream(), dict(rank=3, scale=2.0)),
    'terms, schedule': (None, released.scheduled(), dict(rank=2, scale=.5)),
}


@pytest.mark.parametrize('case', TERMS)
def test_terms_from_peer(case, torch, peers, show, tmp_path):
    """Low-rank terms as moshi-finetune saves them, on a base as it is published."""
    import safetensors.torch
    changes, config, lora = TERMS[case]
    values = peers.SCHEDULED if changes is None else peers.KYUTAI | changes
    peer = peers.lm_model(44, **values)
    base = {k: v.clone().contiguous() for k, v in peer.state_dict().items()}
    terms = peers.add_lora(peer, 45, **lora)
    for name, state, said in (('base', base, {}), ('lora', terms, dict(
            lora=True, lora_rank=lora['rank'], lora_scaling=lora['scale']))):
        (tmp_path / name).mkdir()
        safetensors.torch.save_file({k: v.detach().contiguous() for k, v in state.items()},
                                    str(tmp_path / name / f'{name}.safetensors'))
        (tmp_path / name / 'config.json').write_text(json.dumps(values | said))
    flat = kyutai_lora.read(config, str(tmp_path / 'lora'), export.flatten(
        export.import_params(config, str(tmp_path / 'base'), 'kyutai')), lora)
    params = export.unflatten(flat)
    codes = peers.codes_for(values, seed=5, batch=2, frames=20)
    out = peer(torch.tensor(codes).long())
    text, audio = released.aligned_scores(config, params, codes, lora)
    show(f'{case} to us', max(far(text, out.text_logits.numpy()), far(audio, out.logits.numpy())))
    heard = np.random.default_rng(7).integers(
        0, values['card'], (2, values['n_q'] - values['dep_q'], 15)).astype(np.int32)
    said, gap = peers.stream(peer, heard)
    assert gap > TOLERANCE, f'{case}: a greedy choice hangs on {gap}; take another seed'
    np.testing.assert_array_equal(released.spoken(config, params, heard, lora), said)
    export.save(config, params, str(tmp_path / 'back'), 'kyutai-lora', lora_scale=lora['scale'])
    back = safetensors.torch.load_file(tmp_path / 'back' / 'lora.safetensors')
    assert set(back) == set(terms)
    assert all(torch.equal(back[k], v) for k, v in terms.items())


@pytest.mark.parametrize('case', TERMS)
def test_terms_to_peer(case, torch, peers, show, tmp_path):
    """Our terms, whose q, k and v have factors of their own, in the peer's own loader."""
    from moshi.models import loaders
    _, config, lora = TERMS[case]
    lora = lora | dict(scale=.5)        # random terms are large; this keeps logits to a few units
    params = released.random_params(config, 9, lora)
    flat = export.flatten(params)
    base = {k: v for k, v in flat.items() if 'lora_' not in k}
    export.save(config, export.unflatten(base), str(tmp_path / 'base'), 'kyutai')
    export.save(config, params, str(tmp_path / 'lora'), 'kyutai-lora', lora_scale=lora['scale'])
    info = loaders.CheckpointInfo.from_hf_repo(
        'nowhere/local', moshi_weights=tmp_path / 'base' / 'model.safetensors',
        lora_weights=tmp_path / 'lora' / 'lora.safetensors', mimi_weights=tmp_path / 'none',
        tokenizer=tmp_path / 'none', config_path=tmp_path / 'lora' / 'config.json')
    values = peers.SCHEDULED if 'schedule' in case else peers.KYUTAI
    codes = peers.codes_for(values, seed=9, batch=2, frames=20)
    text, audio = released.aligned_scores(config, params, codes, lora)
    for fused in (False, True):
        peer = info.get_moshi(dtype=torch.float32, fuse_lora=fused)
        out = peer(torch.tensor(codes).long())
        show(f'{case} to the peer{", fused" * fused}',
             max(far(text, out.text_logits.numpy()), far(audio, out.logits.numpy())))
    back = kyutai_lora.read(config, str(tmp_path / 'lora'), base, lora)
    for path, leaf in flat.items():
        np.testing.assert_array_equal(back[path], leaf, err_msg=path)


HALVES = {      # what changes in the peer's config, our config
    'in halves': ({}, released.in_halves()),
    'in halves, grouped': (dict(num_key_value_heads=1, head_dim=20, num_hidden_layers=3,
                                rms_norm_eps=1e-6, sliding_window=9),
                           released.in_halves(kv_heads=1, head_dim=20, layers=3, norm_eps=1e-6,
                                              window_columns=9, pairs='interleaved')),
}


@pytest.mark.parametrize('case', HALVES)
def test_halves_from_peer(case, torch, peers, show, tmp_path):
    changes, config = HALVES[case]
    peer = peers.moshi(51, **changes)
    peer.save_pretrained(tmp_path / 'peer', max_shard_size='200kB')
    assert len(list((tmp_path / 'peer').glob('*.safetensors'))) > 2      # read through the index
    params = export.import_params(config, str(tmp_path / 'peer'), 'kyutai-hf')
    codes = np.random.default_rng(3).integers(0, 32, (2, 7, 20)).astype(np.int32)
    theirs = peers.moshi_logits(peer, peers.delayed(peers.MOSHI, codes))
    ours = released.scores(config, params, released.columns_of(config, codes))
    assert theirs[0].std() > .5 and theirs[1].std() > .3
    show(f'{case} to us', max(far(ours[0][:, :-1], theirs[0]),
                              far(np.stack(ours[1:4], 1)[:, :, :-1], theirs[1])))
    text, said, blank, gap = peers.moshi_continues(peer, codes[:, :, :5], 16)
    assert gap > TOLERANCE, f'{case}: a greedy choice hangs on {gap}; take another seed'
    ours = released.continued(config, params, codes[:, :, :5], blank, 16)
    np.testing.assert_array_equal(ours[0], text)
    np.testing.assert_array_equal(ours[1], said)
    export.save(config, params, str(tmp_path / 'back'), 'kyutai-hf')
    again = export.import_params(config, str(tmp_path / 'back'), 'kyutai-hf')
    released.jax.tree.map(np.testing.assert_array_equal, params, again)
    import transformers
    export.load(str(tmp_path / 'peer')).save(str(tmp_path / 'whole'))       # codec and all
    same, info = transformers.MoshiForConditionalGeneration.from_pretrained(
        tmp_path / 'whole', output_loading_info=True)
    assert not any(info.values()), info
    for key, value in peer.state_dict().items():
        assert torch.equal(value, same.state_dict()[key]), key


@pytest.mark.parametrize('case', HALVES)
def test_halves_to_peer(case, torch, peers, show, tmp_path):
    """transformers loads all of it, the codec that goes along included, and lacks nothing."""
    import transformers
    config = HALVES[case][1].copy_and_resolve_references()
    mimi = transformers.MimiModel(transformers.MimiConfig(**peers.MIMI))
    mimi.save_pretrained(tmp_path / 'mimi')
    config.codec = dict(name='mimi', path=str(tmp_path / 'mimi'), frame_hz=12.5, codebooks=3,
                        size=32)
    params = released.random_params(config, 10)
    export.save(config, params, str(tmp_path / 'out'), 'kyutai-hf', shard_bytes=200_000)
    peer, info = transformers.MoshiForConditionalGeneration.from_pretrained(
        tmp_path / 'out', output_loading_info=True)
    assert not any(info.values()), info
    assert peer.dtype == torch.float32
    for key, value in mimi.state_dict().items():
        assert torch.equal(value, peer.audio_encoder.state_dict()[key]), key
    said = peer.generation_config
    assert (said.temperature, said.top_k, said.bos_token_id) == (.7, 25, 40)
    assert said.depth_decoder_config['top_k'] == 250
    codes = np.random.default_rng(4).integers(0, 32, (2, 7, 20)).astype(np.int32)
    theirs = peers.moshi_logits(peer, peers.delayed(peers.MOSHI, codes))
    ours = released.scores(config, params, released.columns_of(config, codes))
    show(f'{case} to the peer', max(far(ours[0][:, :-1], theirs[0]),
                                    far(np.stack(ours[1:4], 1)[:, :, :-1], theirs[1])))
    text, said, blank, gap = peers.moshi_continues(peer, codes[:, :, :5], 16)
    assert gap > TOLERANCE, f'{case}: a greedy choice hangs on {gap}; take another seed'
    ours = released.continued(config, params, codes[:, :, :5], blank, 16)
    np.testing.assert_array_equal(ours[0], text)
    np.testing.assert_array_equal(ours[1], said)


def finetune_loss(torch, logits, target, mask, weights):
    """sum(w ce) / sum(w) over cells, w being `weights` where `mask` holds (finetune/loss.py)."""
    target = torch.tensor(target).long()
    w = torch.where(mask, weights, torch.zeros_like(weights))
    ce = torch.nn.functional.cross_entropy(
        torch.nan_to_num(logits).flatten(0, -2), torch.where(mask, target, 0).flatten(),
        reduction='none').reshape(target.shape)
    return (w * ce).sum() / w.sum()


@pytest.mark.parametrize('first_codebook', [100.0, 1.0])
def test_loss_of_fine_tuning(first_codebook, torch, peers, tmp_path):
    """The peer's logits under moshi-finetune's weights: text padding and its end half, the first
    codebook times 100. Ours from the grid that our layout draws of the same recordings."""
    from flax import nnx
    config = released.multistream()
    config.objective = dict(name='weighted_ce', terms=dict(text=('text',), audio=('mine',)))
    params = released.random_params(config, 12)
    export.save(config, params, str(tmp_path / 'out'), 'kyutai')
    from moshi.models import loaders
    peer = loaders.get_moshi_lm(tmp_path / 'out' / 'model.safetensors', json.loads(
        (tmp_path / 'out' / 'config.json').read_text()), dtype=torch.float32)
    v, rng, T = model.make_vocab(config), np.random.default_rng(13), 30
    codes, grids = [], []
    for i in range(3):
        words = tuple(Word(f'w{j}', 0, .4 * j + .1, .4 * j + .3, ids=tuple(
            int(x) for x in rng.integers(4, 48, 2))) for j in range(5) if i < 2)
        record = Record(id=str(i), source='', language='en', duration_s=T / 12.5, words=words,
                        codes=rng.integers(0, 32, (2, 4, T)).astype(np.int16))
        grids.append(duplex.columns(
            record, vocab=v, rng=rng, text_rule='queue', weight_pad=.5, weight_epad=.5,
            weight_semantic=first_codebook))
        text = duplex.place_words(words, T, frame_hz=12.5, pad=3, epad=0, rule='queue'
                                  ) if words else np.full(T, -1)
        codes.append(np.concatenate([text[None], *record.codes]))
    codes = np.stack(codes)
    assert {0, 3, -1} < set(codes[:, 0].ravel().tolist())
    out = peer(torch.tensor(codes).long())
    target = codes[:, :1]
    weights = torch.tensor(np.where(np.isin(target, (0, 3)), .5, 1.0), dtype=torch.float32)
    text_loss = finetune_loss(torch, out.text_logits, target, out.text_mask, weights)
    weights = torch.ones(3, 4, T)
    weights[:, 0] = first_codebook
    audio_loss = finetune_loss(torch, out.logits, codes[:, 1:5], out.mask, weights)

    batch = {k: np.stack([getattr(g, k) for g in grids])
             for k in ('tokens', 'weights', 'position', 'segment')}
    graph, _, _ = model.abstract(config)
    logp, hit = released.jax.jit(lambda p, b: nnx.merge(graph, p)(b))(params, batch)
    terms, _ = model.objective_of(config)(logp, hit, batch)
    ours = {k: float(total / weight) for k, (total, weight) in terms.items()}
    np.testing.assert_allclose([ours['text'], ours['audio']], [float(text_loss), float(audio_loss)],
                               rtol=2e-5)
    print(f'fine-tuning loss, first codebook x {first_codebook:.0f}: {sum(ours.values()):.6f}, '
          f'the peer {float(text_loss + audio_loss):.6f}')


def test_goldens_are_what_the_peers_say(torch, peers):
    """The committed arrays, made anew from the committed weights by the installed peers."""
    import transformers
    from moshi.models import loaders
    for name in released.DECODERS:
        golden = dict(np.load(released.GOLDEN / name / 'arrays.npz'))
        peer = transformers.AutoModelForCausalLM.from_pretrained(
            released.GOLDEN / name, dtype=torch.float32)
        out = peer(torch.tensor(golden['tokens']).long(),
                   labels=torch.tensor(golden['labels']).long())
        far(out.logits.numpy(), golden['logits'], 5e-5)
        assert float(out.loss) == pytest.approx(float(golden['loss']), abs=1e-5)
        np.testing.assert_array_equal(continued(torch, peer, golden['prompt']), golden['greedy'])
    golden = dict(np.load(released.GOLDEN / 'kyutai' / 'arrays.npz'))
    values = json.loads((released.GOLDEN / 'kyutai' / 'config.json').read_text())
    peer = loaders.get_moshi_lm(released.GOLDEN / 'kyutai' / 'model.safetensors', values,
                                dtype=torch.float32).eval()
    out = peer(torch.tensor(golden['codes']).long())
    far(out.logits.numpy(), golden['logits'], 5e-5)
    far(out.text_logits.numpy(), golden['text_logits'], 5e-5)
    np.testing.assert_array_equal(peers.stream(peer, golden['heard'])[0], golden['said'])
    golden = dict(np.load(released.GOLDEN / 'kyutai_scheduled' / 'arrays.npz'))
    folder = released.GOLDEN / 'kyutai_scheduled'
    for prefix, where in (('', folder), ('lora_', folder / 'lora')):
        values = json.loads((where / 'config.json').read_text())
        peer = loaders.get_moshi_lm(
            folder / 'model.safetensors', values, dtype=torch.float32,
            lora_weights=folder / 'lora' / 'lora.safetensors' if prefix else None).eval()
        out = peer(torch.tensor(golden['codes']).long())
        far(out.logits.numpy(), golden[prefix + 'logits'], 5e-5)
        far(out.text_logits.numpy(), golden[prefix + 'text_logits'], 5e-5)
        np.testing.assert_array_equal(peers.stream(peer, golden['heard'])[0],
                                      golden[prefix + 'said'])
    golden = dict(np.load(released.GOLDEN / 'kyutai_hf' / 'arrays.npz'))
    peer = transformers.MoshiForConditionalGeneration.from_pretrained(
        released.GOLDEN / 'kyutai_hf', dtype=torch.float32)
    text, audio = peers.moshi_logits(peer, peers.delayed(peers.MOSHI, golden['codes']))
    far(text, golden['text_logits'], 5e-5)
    far(audio, golden['logits'], 5e-5)

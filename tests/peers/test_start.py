# SPDX-License-Identifier: Apache-2.0
"""Peers' own folders, loaded without a config of ours, padded, extended, and handed back to them.

Runs where `test_live.py` runs (`make test-peers`).
"""

import json
import os

import jax
import numpy as np
import pytest
import released
from test_surgery import NORMAL, spoken

from jaxsd import export
from jaxsd.export import loading
from jaxsd.stage import flatten, unflatten

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
    import make_goldens
    return make_goldens


def text(rows, columns, seed=3):
    return np.random.default_rng(seed).integers(0, 96, (rows, columns)).astype(np.int32)


@pytest.mark.parametrize('name, changes', [
    ('llama', dict(num_hidden_layers=3, head_dim=24, rope_theta=1e5)),
    ('mistral', dict(sliding_window=7)), ('qwen2', dict(tie_word_embeddings=False))])
def test_a_padded_batch(name, changes, torch, peers, tmp_path):
    """Left padding, as transformers pads for generation: the peer's own mask and positions."""
    peer = peers.decoder(name, 51, **changes)
    peer.save_pretrained(tmp_path)
    lm = export.load(str(tmp_path))
    tokens, mask = text(2, 20), np.ones((2, 20), bool)
    mask[1, :6] = False
    position = np.maximum(mask.cumsum(1) - 1, 0)
    theirs = peer(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long(),
                  position_ids=torch.tensor(position).long()).logits.numpy()
    ours = lm.scores(tokens, mask=mask)
    assert np.isnan(ours[~mask]).all()
    worst = np.abs(ours[mask] - theirs[mask]).max()
    print(f'{name}, padded: {worst:.1e}')
    assert worst <= TOLERANCE and theirs[mask].std() > .5


@pytest.mark.parametrize('said, generation', [
    (dict(bos_token_id=5, eos_token_id=[7, 8, 61], pad_token_id=9), None),
    (dict(bos_token_id=None, eos_token_id=None), dict(pad_token_id=3)),
    (dict(bos_token_id=4, eos_token_id=11), dict(
        eos_token_id=[11, 12], pad_token_id=6, repetition_penalty=1.7, max_new_tokens=9)),
])
def test_transformers_generates_as_before(said, generation, torch, peers, tmp_path):
    """By its own defaults, greedily: from the peer's folder and from what we make of it."""
    import transformers
    peers.decoder('llama', 54).save_pretrained(tmp_path / 'in')
    values = json.loads((tmp_path / 'in' / 'config.json').read_text()) | said
    (tmp_path / 'in' / 'config.json').write_text(json.dumps(values))
    os.remove(tmp_path / 'in' / 'generation_config.json')
    if generation is not None:
        (tmp_path / 'in' / 'generation_config.json').write_text(json.dumps(generation))
    export.load(str(tmp_path / 'in')).save(str(tmp_path / 'out'))
    prompt, made = torch.tensor(text(4, 6)).long(), []
    for name in ('in', 'out'):
        lm = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name,
                                                               dtype=torch.float32)
        kept = {k: getattr(lm.generation_config, k) for k in (
            'bos_token_id', 'eos_token_id', 'pad_token_id', 'repetition_penalty',
            'max_new_tokens')}
        more = {} if generation and 'max_new_tokens' in generation else dict(max_new_tokens=40)
        made.append((kept, lm.generate(prompt, attention_mask=torch.ones_like(prompt), **more
                                       ).tolist()))
    assert made[0] == made[1]
    print(made[0][0])
    assert made[0][0]['eos_token_id'] == ((generation or {}).get('eos_token_id')
                                          or said['eos_token_id'])


def test_a_byte_level_tokenizer_goes_along(peers, tmp_path):
    import tokenizers
    import transformers
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(['the cat sat on the mat'] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=80, special_tokens=['<|start|>', '<|end|>'], show_progress=False))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token='<|start|>', eos_token='<|end|>',
        chat_template='{{ messages[0].content }}<|end|>')
    peers.decoder('qwen2', 55).save_pretrained(tmp_path / 'in')
    theirs.save_pretrained(tmp_path / 'in')
    export.load(str(tmp_path / 'in')).save(str(tmp_path / 'out'))
    theirs, ours = (transformers.AutoTokenizer.from_pretrained(tmp_path / x) for x in ('in', 'out'))
    said = 'the mat sat on a cat'
    assert ours(said).input_ids == theirs(said).input_ids and len(ours(said).input_ids) > 4
    assert (ours.bos_token, ours.eos_token, len(ours)) == ('<|start|>', '<|end|>', len(theirs))
    assert ours.apply_chat_template([dict(role='user', content=said)], tokenize=False) == (
        f'{said}<|end|>')


def test_many_streams_from_the_folder_alone(torch, peers, tmp_path):
    import safetensors.torch
    values = peers.KYUTAI | dict(num_layers=3, delays=[0, 0, 2, 2, 2, 0, 2, 2, 2])
    peer = peers.lm_model(52, **values)
    safetensors.torch.save_model(peer, str(tmp_path / 'model.safetensors'))
    (tmp_path / 'config.json').write_text(json.dumps(values))
    codes = peers.codes_for(values, seed=5, batch=2, frames=14)
    out = peer(torch.tensor(codes).long())
    scores = export.load(str(tmp_path)).scores(codes)
    np.testing.assert_array_equal(np.isnan(scores['audio']), np.isnan(out.logits.numpy()))
    worst = max(np.abs(scores['text'] - out.text_logits.numpy()[:, 0]).max(),
                np.nanmax(np.abs(scores['audio'] - out.logits.numpy())))
    print(f'many streams: {worst:.1e}')
    assert worst <= TOLERANCE


@pytest.mark.parametrize('name', ['llama', 'mistral', 'qwen2'])
def test_an_extended_vocabulary_goes_back(name, torch, peers, tmp_path):
    """The peer's text model with markers and units added is a plain model of the peer's, which says
    of the old ids what it said before."""
    import transformers
    peer = peers.decoder(name, 53)
    peer.save_pretrained(tmp_path / 'text')
    config = spoken(name)
    target = flatten(loading.placed(config, jax.devices()[:1]))
    begun = export.open_start(config, str(tmp_path / 'text'), graft=dict(rows=NORMAL))
    params = unflatten(begun.params(target, jax.random.key(0)))
    export.save(config, params, str(tmp_path / 'spoken'), 'hf')
    after, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / 'spoken', output_loading_info=True)
    assert not any(info.values()), info
    assert after.config.vocab_size == 128 and type(after) is type(peer)
    ids = torch.tensor(text(2, 20)).long()
    worst = (after(ids).logits[..., :96] - peer(ids).logits).abs().max().item()
    print(f'{name}, extended: {worst:.1e}')
    assert worst <= TOLERANCE / 2      # a product with more columns is rounded otherwise
    every = np.random.default_rng(1).integers(0, 128, (2, 20)).astype(np.int32)
    ours, = released.scores(config, params, every[:, None])
    assert np.abs(after(torch.tensor(every).long()).logits.numpy() - ours).max() <= TOLERANCE

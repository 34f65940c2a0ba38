# SPDX-License-Identifier: Apache-2.0
"""Is an exported checkpoint whole, does it come back to the bit, and what does a bad one get?"""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import released
from safetensors.numpy import load_file, save_file

from jaxsd import checkpoint, codec, export, model
from jaxsd import stage as stages
from jaxsd.config import ConfigError, fingerprint, read
from jaxsd.export import kyutai, kyutai_lora, loading, rules, streaming
from jaxsd.export.folder import fresh

BOTH = ('mine', 'theirs')
CASES = {
    'llama': (released.decoder('llama'), 'hf'),
    'mistral': (released.decoder('mistral'), 'hf'),
    'qwen2': (released.decoder('qwen2'), 'hf'),
    'qwen2 window': (released.decoder('qwen2', window_columns=9), 'hf'),
    'interleaved pairs': (released.decoder('llama', pairs='interleaved'), 'hf'),
    'interleaved biases': (released.decoder('qwen2', pairs='interleaved'), 'hf'),
    'kyutai': (released.multistream(), 'kyutai'),
    'kyutai grouped': (released.multistream(kv_heads=2), 'kyutai'),
    'kyutai half': (released.multistream(pairs='half', window_columns=None), 'kyutai'),
    'kyutai shared': (released.multistream(head=dict(step_weights='shared')), 'kyutai'),
    'kyutai both': (released.multistream(vocab=dict(predicted=BOTH), mlp=168),
                    'kyutai'),
    'kyutai schedule': (released.multistream(head=dict(step_weights=(0, 1, 1, 2))), 'kyutai'),
    'kyutai one set by schedule': (released.multistream(head=dict(step_weights=(0,) * 4)),
                                   'kyutai'),
    'kyutai-hf': (released.multistream(), 'kyutai-hf'),
    'kyutai-hf half': (released.multistream(pairs='half', kv_heads=2, head_dim=24, norm_eps=1e-6),
                       'kyutai-hf'),
}


def equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """One good export of each format, by name; tests copy before they damage."""
    out = {}
    for name in ('llama', 'qwen2', 'kyutai'):
        config, format = CASES[name]
        out[name] = tmp_path_factory.mktemp('good') / name
        export.save(config, released.random_params(config, 3), str(out[name]), format)
    return out


def test_a_full_disk_leaves_nothing(file_limit, tmp_path):
    config, format = CASES['llama']
    out = tmp_path / 'out'
    for size in (0, 9000):      # nothing can be written; the tensors cannot
        with file_limit(size), pytest.raises(OSError, match=f'{out} cannot be written: '):
            export.save(config, released.random_params(config, 1), str(out), format)
        assert not os.listdir(tmp_path)


def test_a_place_that_no_folder_can_take(tmp_path, monkeypatch):
    """It is known before the block begins, which may write for hours; nothing is left behind."""
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').write_text('keep')
    (tmp_path / 'link').symlink_to(tmp_path / 'empty')
    (tmp_path / 'dangling').symlink_to(tmp_path / 'nothing')
    os.mkfifo(tmp_path / 'pipe')
    monkeypatch.chdir(tmp_path / 'empty')
    before = sorted(os.listdir(tmp_path))
    for out, match in (
            ('.', r'^\. is in use'), (str(tmp_path / 'empty'), 'empty is in use'),
            (str(tmp_path / 'link'), 'is a symbolic link; name a new folder'),
            (f'{tmp_path}/link/', 'is a symbolic link'),
            (str(tmp_path / 'dangling'), 'is a symbolic link'),
            (str(tmp_path / 'file'), 'is not an empty folder'), ('', "^'' names no folder"),
            (str(tmp_path / 'pipe'), 'is not an empty folder'),
            (str(tmp_path / 'a\0b'), 'names no folder'), ('a\nb', r"'a\\nb' names no folder"),
            ('/proc', 'is not an empty folder'),
            (str(tmp_path / 'file' / 'below'), 'below cannot be written: '),
            (str(tmp_path / ('n' * 255)), 'cannot be written: File name too long$')):
        with pytest.raises((ValueError, OSError), match=match) as e, fresh(out):
            pytest.fail(f'{out} was taken')
        assert '\n' not in str(e.value)
    assert sorted(os.listdir(tmp_path)) == before and not os.listdir(tmp_path / 'empty')
    with fresh('../new/') as folder:
        open(os.path.join(folder, 'x'), 'w').close()
    assert os.listdir(tmp_path / 'new') == ['x']


def test_what_a_kill_leaves_is_named_and_kept(tmp_path, caplog):
    out = tmp_path / 'out'
    killed = subprocess.run([sys.executable, '-c', (
        'import os, signal, sys\nfrom jaxsd.export.folder import fresh\n'
        'with fresh(sys.argv[1]) as folder:\n'
        '    open(os.path.join(folder, "half"), "w").close()\n'
        '    os.kill(os.getpid(), signal.SIGKILL)'), str(out)])
    assert killed.returncode == -signal.SIGKILL
    left, = tmp_path.iterdir()
    assert re.fullmatch(r'\.out\..+\.partial', left.name)
    (tmp_path / '.other.x.partial').mkdir()      # of another export
    config, format = CASES['llama']
    with caplog.at_level('WARNING', 'jaxsd'):
        export.save(config, released.random_params(config, 1), str(out), format)
    assert [r.getMessage().partition(' is of an export that was cut short')[0]
            for r in caplog.records] == [str(left)]
    assert {p.name for p in tmp_path.iterdir()} == {'out', left.name, '.other.x.partial'}
    assert (left / 'half').exists()


@pytest.mark.parametrize('name', CASES)
def test_there_and_back(name, tmp_path):
    config, format = CASES[name]
    params = released.random_params(config, 1)
    out = str(tmp_path / 'out')
    made = export.save(config, params, out, format)
    assert made['bytes'] == 4 * sum(x.size for x in jax.tree.leaves(params))
    back = export.import_params(config, out, format)
    equal(params, back)
    again = export.save(config, back, str(tmp_path / 'again'), format)
    assert again == made
    assert ((tmp_path / 'again' / 'model.safetensors').read_bytes()
            == (tmp_path / 'out' / 'model.safetensors').read_bytes())


GOLDENS = {name: CASES[name] for name in ('llama', 'mistral', 'qwen2', 'kyutai')} | {
    'kyutai_scheduled': (released.scheduled(), 'kyutai'),
    'kyutai_hf': (released.in_halves(), 'kyutai-hf'),
}


@pytest.mark.parametrize('name', GOLDENS)
def test_released_files_come_back(name, tmp_path):
    """Export of an imported golden: the peer's own keys, shapes and numbers, none more."""
    config, format = GOLDENS[name]
    params = export.import_params(config, str(released.GOLDEN / name), format)
    export.save(config, params, str(tmp_path / 'out'), format)
    theirs = load_file(released.GOLDEN / name / 'model.safetensors')
    ours = load_file(tmp_path / 'out' / 'model.safetensors')
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], np.asarray(value, np.float32), err_msg=key)
    spelled = json.loads((tmp_path / 'out' / 'config.json').read_text())
    stated = json.loads((released.GOLDEN / name / 'config.json').read_text())
    if format == 'kyutai':
        # Of no effect without positions; and two scales can mean the same feed-forward.
        ignored = {'depformer_context', 'depformer_max_period'} | (
            {'hidden_scale', 'depformer_dim_feedforward'} if name == 'kyutai_scheduled' else set())
        read = export.FAMILIES[format].read
        assert read(stated, '') == read(spelled, '')
        assert {k: v for k, v in stated.items() if k not in ignored} == {
            k: v for k, v in spelled.items() if k not in ignored | {'existing_text_end_padding_id'}}
    else:
        shared = set(spelled) & set(stated) - {
            'max_window_layers', 'audio_encoder_config', 'depth_decoder_config', 'architectures'}
        assert len(shared) > 12
        assert {k: stated[k] for k in shared} == {k: spelled[k] for k in shared}


@pytest.mark.parametrize('name', GOLDENS)
def test_released_files_come_back_in_their_own_dtype(name, tmp_path):
    """Released checkpoints are bfloat16: the same tensors, byte for byte, and the way back."""
    config, format = GOLDENS[name]
    params = export.import_params(config, str(released.GOLDEN / name), format)
    made = export.save(config, params, str(tmp_path / 'out'), format, dtype='bf16')
    theirs = load_file(released.GOLDEN / name / 'model.safetensors')
    ours = load_file(tmp_path / 'out' / 'model.safetensors')
    assert made['bytes'] == sum(x.nbytes for x in theirs.values())
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype == ml_dtypes.bfloat16
        assert ours[key].tobytes() == value.tobytes(), key
    equal(params, export.import_params(config, str(tmp_path / 'out'), format))
    card = (tmp_path / 'out' / 'README.md').read_text()
    numbers = sum(x.size for x in theirs.values())
    assert '| numbers | bfloat16, rounded' in card and f'| parameters | {numbers:,} |' in card
    spelled = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert spelled.get('torch_dtype') == (None if format == 'kyutai' else 'bfloat16')


def test_numbers_between_two_of_bfloat16(tmp_path):
    """Rounded by the definition, on the bits: to the nearest, ties to the even one."""
    config, format = CASES['llama']
    params = released.random_params(config, 9)
    table = params['frontend']['table']
    bits = table.view(np.uint32)
    bits[0, :4] = 0x3f808000, 0x3f818000, 0x3f808001, 0xbf817fff       # two ties, above, below
    export.save(config, params, str(tmp_path / 'out'), format, dtype='bf16')
    wanted = ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    assert wanted[0, :4].tolist() == [0x3f80, 0x3f82, 0x3f81, 0xbf81]
    ours = load_file(tmp_path / 'out' / 'model.safetensors')['model.embed_tokens.weight']
    np.testing.assert_array_equal(ours.view(np.uint16), wanted)
    with pytest.raises(ConfigError, match="dtype has no option 'q8_0'.*bf16, f32"):
        export.save(config, params, str(tmp_path / 'no'), format, dtype='q8_0')
    with pytest.raises(ConfigError, match="^format 'peft' has no option 'dtype'"):
        export.save(config, params, str(tmp_path / 'no'), 'peft', dtype='bf16')


def test_interleaved_pairs_become_halves():
    """The permutation of q and k by hand, for one head of four: pairs (0, 1), (2, 3)."""
    plan = [rules.rule('q', ('q', 'D N (h 2)', '(N 2 h) D'))]
    piece, = rules.pieces(plan, {'q': (1, 1, 4)})
    assert rules.forward(piece, {'q': np.array([[[10., 11., 20., 21.]]])}).ravel().tolist() == [
        10., 20., 11., 21.]


def test_packed_rows_lie_behind_one_another():
    plan = [rules.rule('in.{L}', ('q', 'L D N', 'N D'), ('k', 'L D N', 'N D'))]
    ours = {'q': np.arange(4.).reshape(2, 1, 2), 'k': np.arange(10., 12.).reshape(2, 1, 1)}
    made = {p.key: rules.forward(p, ours).ravel().tolist()
            for p in rules.pieces(plan, {k: v.shape for k, v in ours.items()})}
    assert made == {'in.0': [0., 1., 10.], 'in.1': [2., 3., 11.]}


def test_shards_and_index(tmp_path):
    config, format = CASES['llama']
    params = released.random_params(config, 2)
    made = export.save(config, params, str(tmp_path / 'out'), format, shard_bytes=100_000)
    shards = [name for name in made['files'] if name.startswith('model-')]
    assert len(shards) > 2 and 'model.safetensors' not in made['files']
    index = json.loads((tmp_path / 'out' / 'model.safetensors.index.json').read_text())
    assert set(index['weight_map'].values()) == set(shards)
    assert index['metadata']['total_size'] == made['bytes']
    equal(params, export.import_params(config, str(tmp_path / 'out'), format))


def test_what_lies_beside(folder):
    """The model card, the ids and the generation defaults."""
    config, _ = CASES['llama']
    card = (folder['llama'] / 'README.md').read_text()
    assert fingerprint(config) in card and 'LlamaForCausalLM' in card and 'kmeans' in card
    ids = json.loads((folder['llama'] / 'vocabulary.json').read_text())
    assert ids['ranges']['units'] == {'start': 62, 'size': 34} and ids['specials']['[Speech]'] == 61
    generation = json.loads((folder['llama'] / 'generation_config.json').read_text())
    assert (generation['bos_token_id'], generation['eos_token_id']) == (1, 2)


def test_tokenizer_travels(tmp_path):
    (tmp_path / 'text.model').write_bytes(b'pieces')
    config, format = released.multistream(), 'kyutai'
    config.vocab.tokenizer = str(tmp_path / 'text.model')
    export.save(config, released.random_params(config, 1), str(tmp_path / 'out'), format)
    assert (tmp_path / 'out' / 'tokenizer.model').read_bytes() == b'pieces'
    (tmp_path / 'text.model').unlink()
    with pytest.raises(ConfigError, match='vocab.tokenizer: cannot copy'):
        export.save(config, released.random_params(config, 1), str(tmp_path / 'two'), format)
    assert os.listdir(tmp_path) == ['out']       # nothing half-written, no partial folder


def test_a_fitted_codec_travels(tmp_path):
    """The one that was trained with, apart from the weights; another of the same name does not."""
    config, format = CASES['llama']
    config, units = copy.deepcopy(config), str(tmp_path / 'units.safetensors')
    rng = np.random.default_rng(0)
    codec.fit_kmeans([rng.standard_normal(16000).astype(np.float32)], path=units, frame_hz=25.0,
                     size=4)
    config.codec.path, params = units, released.random_params(config, 1)
    for name, sha, found in (('one', codec.fitted(units).identity['sha256'], ['units.safetensors']),
                             ('other', '0' * 64, [])):
        export.save(config, params, str(tmp_path / name), format,
                    history={'codec': {'name': 'kmeans', 'sha256': sha}})
        assert sorted(f.name for f in (tmp_path / name).glob('codec/*')) == found
        card = (tmp_path / name / 'README.md').read_text()
        assert str(tmp_path) not in card and ('path codec/units' in card) == bool(found)
    assert (tmp_path / 'one/codec/units.safetensors').read_bytes() == open(units, 'rb').read()


def test_low_rank_terms_are_folded(tmp_path):
    """Kernels become W + scale A B, layer by layer and step by step."""
    config = released.multistream()
    lora = dict(rank=2, scale=.5)
    params = released.random_params(config, 5, lora)
    flat = export.flatten(params)
    assert flat['head/blocks/qkv/lora_a'].shape == (2, 4, 32, 2)
    assert flat['head/blocks/out/lora_b'].shape == (2, 4, 2, 32)
    folded = export.fold_lora(flat, .5)
    for path in ('head/blocks/out', 'backbone/blocks/q', 'head/text_out'):
        a, b, w = (np.asarray(flat[f'{path}/{x}'], np.float64)
                   for x in ('lora_a', 'lora_b', 'kernel'))
        lead = {'head/blocks/out': 2, 'backbone/blocks/q': 1, 'head/text_out': 0}[path]
        product = (a.reshape(*a.shape[:lead], -1, 2) @ b.reshape(*b.shape[:lead], 2, -1))
        np.testing.assert_allclose(folded[f'{path}/kernel'], w + .5 * product.reshape(w.shape),
                                   rtol=1e-5, atol=1e-6)
    export.save(config, params, str(tmp_path / 'out'), 'kyutai', lora_scale=.5)
    back = export.flatten(export.import_params(config, str(tmp_path / 'out'), 'kyutai'))
    equal({k: np.asarray(v) for k, v in folded.items()}, back)
    with pytest.raises(ValueError, match='lora scale'):
        export.save(config, params, str(tmp_path / 'two'), 'kyutai')


# Low-rank terms alone ----------------------------------------------------------------------------

TERMS = dict(rank=2, scale=.5)


def share(params):
    """Gives q, k and v of every layer one first factor, as terms from a peer's file have."""
    blocks = params['backbone']['blocks']
    for name in 'kv':
        blocks[name]['lora_a'] = blocks['q']['lora_a'].copy()
    return params


def adapting(*rules):
    """A stage that trains low-rank terms and what `rules` say."""
    return stages.Stage(name='adapt', steps=1, batch=1, data={}, lr=1., lora=TERMS,
                        train=(('.*/lora_[ab]', 1.0), *rules, ('.*', None)))


def base_of(flat):
    return {k: v for k, v in flat.items() if not k.endswith(('/lora_a', '/lora_b'))}


@pytest.fixture(scope='module')
def terms(tmp_path_factory):
    """(config, parameters by path, folder) of terms of a small multistream model."""
    config = released.scheduled()
    params = share(released.random_params(config, 7, TERMS))
    out = tmp_path_factory.mktemp('terms') / 'out'
    export.save(config, params, str(out), 'kyutai-lora', lora_scale=.5)
    return config, export.flatten(params), out


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('config', [
    released.scheduled(), released.multistream(kv_heads=2, head=dict(step_weights='shared'))],
    ids=['schedule', 'grouped'])
def test_terms_there_and_back(config, shared, tmp_path):
    params = released.random_params(config, 6, TERMS)
    flat = export.flatten(share(params) if shared else params)
    out = tmp_path / 'out'
    made = export.save(config, params, str(out), 'kyutai-lora', lora_scale=.5, tables=shared)
    values = json.loads((out / 'config.json').read_text())
    assert values['lora'] is True and values['lora_scaling'] == .5
    assert values['lora_rank'] == (2 if shared else 6)
    assert made['files'] == ['README.md', 'config.json', 'generation_config.json',
                             'lora.safetensors', 'provenance.json',
                             'vocabulary.json']
    other = {k: v + shared for k, v in base_of(flat).items()}   # whose tables the file replaces
    back = kyutai_lora.read(config, str(out), other, TERMS)
    for path in flat:
        np.testing.assert_array_equal(
            back[path], flat[path] if path not in other or shared and path in kyutai_lora.TABLES
            else other[path], err_msg=path)
    if not shared:
        with pytest.raises(ConfigError, match='lora.rank is 3, the checkpoint has 6'):
            kyutai_lora.read(config, str(out), other, TERMS | dict(rank=3))


def test_terms_in_the_older_dialect(terms, tmp_path):
    config, flat, out = terms
    shutil.copytree(out, tmp_path / 'old')
    path = tmp_path / 'old' / 'lora.safetensors'
    state = released.stacked(load_file(path))
    assert 'depformer.layers.0.self_attn.in_proj.lora_A.weight' in state
    save_file(state, path)
    equal(flat, kyutai_lora.read(config, str(tmp_path / 'old'), base_of(flat), TERMS))


def test_terms_alone_are_no_model(terms):
    with pytest.raises(ValueError, match='low-rank terms and no model.*format .kyutai-lora.') as e:
        export.load(str(terms[2]))
    assert '\n' not in str(e.value)


def test_terms_for_both_speakers_fit_one(tmp_path):
    both = released.multistream(vocab=dict(predicted=BOTH))
    params = share(released.random_params(both, 8, TERMS))
    export.save(both, params, str(tmp_path / 'out'), 'kyutai-lora', lora_scale=.5)
    config = released.multistream()
    base = export.flatten(released.random_params(config, 9))
    back = kyutai_lora.read(config, str(tmp_path / 'out'), base, TERMS)
    np.testing.assert_array_equal(back['head/outs/lora_b'], params['head']['outs']['lora_b'][:4])
    np.testing.assert_array_equal(back['head/blocks/qkv/lora_a'],
                                  params['head']['blocks']['qkv']['lora_a'][:, :4])


@pytest.mark.parametrize('damage, match', [
    (lambda s, v: s.pop('linears.1.lora_B.weight'), 'lacks linears.1.lora_B.weight'),
    (lambda s, v: s.update({'linears.1.lora_A.weight': np.zeros((3, 24), np.float32)}),
     r'linears.1.lora_A.weight has shape \(3, 24\), the config wants \(2, 24\)'),
    (lambda s, v: s.update(extra=np.zeros(3, np.float32)), 'without a place in the config: extra'),
    (lambda s, v: s.update({'emb.0.weight': np.zeros((16, 32), np.float32)}),
     r'emb.0.weight has shape \(16, 32\)'),
    (lambda s, v: s.update({'transformer.layers.0.self_attn.in_proj.lora_A.weight':
                            np.zeros((2, 32), np.float32)}), 'holds too'),
    (lambda s, v: v.update(lora=False), "lora is not true; use format 'kyutai'"),
    (lambda s, v: v.update(lora_rank=1 << 60), 'lora_rank must be a number from 1 to'),
    (lambda s, v: v.update(lora_rank=6), r'the config wants \(6, '),
    (lambda s, v: v.update(lora_rank=4), 'lora.rank is 2, the checkpoint has 4'),
    (lambda s, v: v.update(lora_scaling=2.0), 'lora.scale is 0.5, the checkpoint has 2.0'),
    (lambda s, v: v.update(context=4), 'backbone.window_columns is 9, the checkpoint has 4')])
def test_bad_terms(terms, tmp_path, damage, match):
    config, flat, out = terms
    shutil.copytree(out, tmp_path / 'bad')
    state = load_file(tmp_path / 'bad' / 'lora.safetensors')
    values = json.loads((out / 'config.json').read_text())
    damage(state, values)
    save_file(state, tmp_path / 'bad' / 'lora.safetensors')
    (tmp_path / 'bad' / 'config.json').write_text(json.dumps(values))
    with pytest.raises(ValueError, match=match) as e:
        kyutai_lora.read(config, str(tmp_path / 'bad'), base_of(flat), TERMS)
    assert '\n' not in str(e.value)


def test_terms_cut_short(terms, tmp_path):
    config, flat, out = terms
    shutil.copytree(out, tmp_path / 'bad')
    with open(tmp_path / 'bad' / 'lora.safetensors', 'r+b') as f:
        f.truncate(20_000)
    with pytest.raises(ValueError, match='lora.safetensors: not a whole safetensors file'):
        kyutai_lora.read(config, str(tmp_path / 'bad'), base_of(flat), TERMS)
    os.remove(tmp_path / 'bad' / 'config.json')
    with pytest.raises(ValueError, match='config.json, which says what the terms are multiplied'):
        kyutai_lora.read(config, str(tmp_path / 'bad'), base_of(flat), TERMS)


def test_terms_that_no_file_can_hold(tmp_path):
    config = released.scheduled()
    with pytest.raises(ConfigError, match='needs a low-rank term for every linear map'):
        export.save(config, released.random_params(config, 1), str(tmp_path / 'out'), 'kyutai-lora')
    assert os.listdir(tmp_path) == []
    params = released.random_params(config, 1, TERMS)
    for more, moved in (((), []), ((('frontend/table', .5),), ['frontend/table'])):
        assert export.only_adapted(adapting(*more), params, 'kyutai-lora') == moved
    with pytest.raises(ConfigError, match='also trained head/text_out/kernel, which format'):
        export.only_adapted(adapting(('head/text_out/kernel', 1.0)), params, 'kyutai-lora')


def test_a_stage_of_terms_from_files_and_back(terms, tmp_path):
    """The base into one stage, terms into the next, and out again, by way of a run directory."""
    config, flat, out = terms
    config = config.copy_and_resolve_references()
    config.data = dict(path='/nowhere', sources=dict(all=dict(select=('story',))))
    stage = dict(steps=2, batch=2, data=dict(all=1.0), lr=1e-3)
    config.stages = (dict(name='first', **stage), dict(
        name='adapt', start='first', lora=TERMS, train=(('.*/lora_[ab]', 1.0), ('.*', None)),
        **stage))
    work = str(tmp_path / 'run')
    with pytest.raises(ConfigError, match="starts from 'first', but there is no checkpoint"):
        export.import_run(config, str(out), work, 'kyutai-lora')
    with pytest.raises(ConfigError, match='stage first has no low-rank terms'):
        export.import_run(config, str(out), work, 'kyutai-lora', stage_name='first')
    export.save(config, export.unflatten(base_of(flat)), str(tmp_path / 'base'), 'kyutai')
    export.import_run(config, str(tmp_path / 'base'), work, 'kyutai', stage_name='first')
    export.import_run(config, str(out), work, 'kyutai-lora')
    export.export_run(config, work, str(tmp_path / 'again'), 'kyutai-lora')
    told = json.loads((tmp_path / 'again' / 'provenance.json').read_text())['sources']
    assert [x['name'] for x in told] == ['out', 'base']
    assert ((tmp_path / 'again' / 'lora.safetensors').read_bytes()
            == (out / 'lora.safetensors').read_bytes())
    assert '| stage | adapt |' in (tmp_path / 'again' / 'README.md').read_text()


# The layout of transformers ----------------------------------------------------------------------

@pytest.mark.parametrize('changes, match', [
    (dict(model_type='mimi'), "model_type must be 'moshi'"),
    (dict(depth_decoder_config=3), 'depth_decoder_config must be an object'),
    (dict(sliding_window=8), 'backbone.window_columns is 7, the checkpoint has 8'),
    (dict(num_codebooks=1 << 50), 'num_codebooks must be a number from 2 to'),
    (dict(num_codebooks=4), 'depth_decoder_config: num_codebooks must be 4'),
    (dict(ffn_dim=127), 'ffn_dim must be even'), (dict(hidden_act='gelu'), 'hidden_act'),
    (dict(rope_parameters=dict(rope_type='yarn', rope_theta=1.)), "rotary scaling 'yarn'"),
    (dict(rope_parameters=dict(rope_theta=1.), rope_scaling=dict(type='linear', factor=2.)),
     'and rope_scaling differ'),
    (dict(rms_norm_eps='tiny'), 'rms_norm_eps must be'),
])
def test_bad_config_in_halves(tmp_path, changes, match):
    shutil.copytree(released.GOLDEN / 'kyutai_hf', tmp_path / 'bad')
    edited(str(tmp_path / 'bad'), **changes)
    refuse(released.in_halves(), str(tmp_path / 'bad'), 'kyutai-hf', match)


@pytest.mark.parametrize('fn, match', [
    (lambda s: s.pop('depth_decoder.lm_heads.weight'), 'lacks depth_decoder.lm_heads.weight'),
    (lambda s: s.update({'depth_decoder.lm_heads.weight': s['depth_decoder.lm_heads.weight'][:2]}),
     r'lm_heads.weight has shape \(2, 32, 16\), the config wants \(3, 32, 16\)'),
    (lambda s: s.update({'decoder.model.layers.0.self_attn.q_proj.weight': s.pop(
        'decoder.model.layers.0.self_attn.q_proj.linear.weight')}), 'q_proj.linear.weight'),
])
def test_tensors_that_do_not_fit_in_halves(tmp_path, fn, match):
    shutil.copytree(released.GOLDEN / 'kyutai_hf', tmp_path / 'bad')
    change_tensors(str(tmp_path / 'bad'), fn)
    refuse(released.in_halves(), str(tmp_path / 'bad'), 'kyutai-hf', match)


def test_the_codec_goes_along(tmp_path):
    """A Mimi in a folder is bundled; what transformers says of generation lies beside."""
    config = released.in_halves()
    mimi = tmp_path / 'mimi'
    mimi.mkdir()
    (mimi / 'config.json').write_text(json.dumps(dict(codebook_size=32, num_quantizers=8, extra=1)))
    save_file({'encoder.w': np.arange(3, dtype=np.float32)}, mimi / 'model.safetensors')
    config.codec = dict(name='mimi', path=str(mimi), frame_hz=12.5, codebooks=3, size=32)
    params = released.random_params(config, 1)
    out = tmp_path / 'out'
    export.save(config, params, str(out), 'kyutai-hf')
    state = load_file(out / 'model.safetensors')
    assert state['audio_encoder.encoder.w'].tolist() == [0., 1., 2.]
    said = json.loads((out / 'config.json').read_text())
    assert said['audio_encoder_config'] == dict(model_type='mimi', codebook_size=32,
                                                num_quantizers=8, extra=1)
    said = json.loads((out / 'generation_config.json').read_text())
    assert said['bos_token_id'] == 40 and said['depth_decoder_config']['max_length'] == 4
    equal(params, export.import_params(config, str(out), 'kyutai-hf'))
    (mimi / 'config.json').write_text(json.dumps(dict(codebook_size=64)))
    with pytest.raises(ConfigError, match='another codebook_size'):
        export.save(config, params, str(tmp_path / 'two'), 'kyutai-hf')
    config.codec.path = str(mimi / 'model.safetensors')
    with pytest.raises(ConfigError, match='codec.path'):
        export.save(config, params, str(tmp_path / 'two'), 'kyutai-hf')
    assert sorted(os.listdir(tmp_path)) == ['mimi', 'out']


@pytest.mark.parametrize('spec, format', [('configs/spirit_lm.py:tiny', 'hf'),
                                          ('configs/moshi.py:tiny', 'kyutai')])
def test_every_demo_system_can_leave(spec, format, tmp_path):
    root = released.GOLDEN.parents[1]
    config = read(f'{root}/{spec}')
    config.vocab.tokenizer = ''
    params = released.random_params(config, 1)
    export.save(config, params, str(tmp_path / 'out'), format)
    equal(params, export.import_params(config, str(tmp_path / 'out'), format))


def test_padding_rows_of_the_line_stay_home(tmp_path):
    """A line padded for sharding has rows that no stream owns; they come back as zeros."""
    config = released.multistream(vocab=dict(multiple=128))
    vocab = model.make_vocab(config)
    used = vocab.rows[-1].start + vocab.rows[-1].size
    assert vocab.size > used
    params = released.random_params(config, 1)
    export.save(config, params, str(tmp_path / 'out'), 'kyutai')
    back = export.import_params(config, str(tmp_path / 'out'), 'kyutai')
    params['frontend']['table'][used:] = 0
    equal(params, back)


@pytest.mark.parametrize('old', [False, True])
@pytest.mark.parametrize('steps, kept', [
    ('own', 'own'), ('shared', 'shared'), ((0, 1, 1, 2, 3, 3, 3, 3), (0, 1, 1, 2)),
    ((0, 1, 2, 3, 4, 4, 4, 4), 'own'), ((0, 1, 1, 1, 1, 1, 1, 0), (0, 1, 1, 1))])
def test_who_speaks_for_both_can_speak_for_one(steps, kept, old, tmp_path, caplog):
    """Import leaves out the depth steps of the other speaker, in either dialect."""
    whole = released.multistream(vocab=dict(predicted=BOTH), head=dict(step_weights=steps))
    mine = released.multistream(head=dict(step_weights=kept))
    params = released.random_params(whole, 1)
    export.save(whole, params, str(tmp_path / 'out'), 'kyutai')
    if old:
        path = tmp_path / 'out' / 'model.safetensors'
        save_file(released.stacked(load_file(path)), path)
    with caplog.at_level('INFO', 'jaxsd'):
        back = export.import_params(mine, str(tmp_path / 'out'), 'kyutai')
    assert 'the first 4 of 8 depth steps' in caplog.text
    head, sets = params['head'], back['head']['inputs']['kernel'].shape[0]
    head['tables'] = head['tables'][:3]
    head['outs']['kernel'] = head['outs']['kernel'][:4]
    head['inputs']['kernel'] = head['inputs']['kernel'][:sets]
    for name in ('qkv', 'out', 'gate_up', 'down'):
        head['blocks'][name]['kernel'] = head['blocks'][name]['kernel'][:, :sets]
    equal(params, back)
    refuse(released.multistream(), str(tmp_path / 'out'), 'kyutai', 'head.step_weights'
           ) if kept != 'own' else None


def test_who_speaks_for_one_cannot_speak_for_both(folder):
    whole = released.multistream(vocab=dict(predicted=BOTH))
    refuse(whole, str(folder['kyutai']), 'kyutai', 'rows .size, predicted. is')


def test_a_step_too_many_is_not_left_behind(folder, tmp_path):
    """Only what the checkpoint's own config.json speaks of may be left out."""
    bad = copied(folder, tmp_path, 'kyutai')
    edited(bad, dep_q=5)
    change_tensors(bad, lambda s: s.update({'linears.5.weight': s['linears.0.weight']}))
    refuse(CASES['kyutai'][0], bad, 'kyutai', 'without a place in the config: linears.5.weight')


def low_rank(folder, rank: int) -> dict:
    """Makes the depth embeddings of a checkpoint products of random factors, which it returns."""
    rng, factors = np.random.default_rng(7), {}

    def change(state):
        for key in [k for k in state if re.match(r'depformer_(text_)?emb\b', k)]:
            rows, width = state[key].shape
            factors[key] = [rng.standard_normal((n, rank)).astype(np.float32)
                            for n in (rows, width)]
            state[key], state[key.replace('.weight', '.low_rank.weight')] = factors[key]
    change_tensors(folder, change)
    edited(folder, depformer_low_rank_embeddings=rank)
    return factors


@pytest.mark.parametrize('predicted', [('mine',), BOTH])
def test_depth_embeddings_of_low_rank(predicted, tmp_path):
    """E Wᵀ by hand, box by box too; they leave whole; who speaks for both is cut as ever."""
    whole, config = released.multistream(vocab=dict(predicted=predicted)), released.multistream()
    params = released.random_params(whole, 1)
    export.save(whole, params, str(tmp_path / 'in'), 'kyutai')
    factors = low_rank(str(tmp_path / 'in'), 5)
    assert len(factors) == (4 if predicted == ('mine',) else 8)
    path = str(tmp_path / 'in')
    back = export.import_params(config, path, 'kyutai')
    tables = [np.einsum('vr,dr->vd', *(x.astype(np.float64) for x in factors[k])) for k in (
        'depformer_text_emb.weight', *(f'depformer_emb.{p}.weight' for p in range(3)))]
    np.testing.assert_allclose(back['head']['text_table'], tables[0], atol=2e-6)
    np.testing.assert_allclose(back['head']['tables'], np.stack(tables[1:]), atol=2e-6)
    assert np.abs(tables[0]).max() > 1
    equal(back['backbone'], params['backbone'])
    source = streaming.open_source(config, *loading.agreeing(config, path, 'kyutai'), path)
    some = np.full((3, 33, 32), np.nan, np.float32)
    region = [(1, 3), (4, 30), (6, 19)]
    for at, block in streaming.blocks(source, 'head/tables', region, box_bytes=600):
        assert block.size <= 150
        some[at] = block
    seen = np.zeros(some.shape, bool)
    seen[1:3, 4:30, 6:19] = True
    np.testing.assert_array_equal(np.isfinite(some), seen)
    np.testing.assert_allclose(some[seen], np.stack(tables[1:])[seen], atol=2e-6)
    export.save(config, back, str(tmp_path / 'out'), 'kyutai')
    said = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert said.get('depformer_low_rank_embeddings') is None
    assert load_file(tmp_path / 'out' / 'model.safetensors')['depformer_emb.0.weight'].shape == (
        33, 32)
    equal(back, export.import_params(config, str(tmp_path / 'out'), 'kyutai'))


@pytest.mark.parametrize('fn, rank, match', [
    (lambda s: s.pop('depformer_emb.1.low_rank.weight'), 5,
     'lacks depformer_emb.1.low_rank.weight$'),
    (lambda s: s.pop('depformer_emb.1.weight'), 5, 'lacks depformer_emb.1.weight$'),
    (lambda s: s.update({'depformer_emb.1.low_rank.weight': np.zeros((32, 4), np.float32)}), 5,
     r'depformer_emb.1.low_rank.weight has shape \(32, 4\), the config wants \(.., 5\)'),
    (lambda s: s.update({'depformer_emb.1.low_rank.weight': np.zeros((31, 5), np.float32)}), 5,
     r'depformer_emb.1.weight has shape \(33, 31\), the config wants \(33, 32\)'),
    (lambda s: None, 6, r'depformer_text_emb.weight has shape \(49, 5\), the config wants \(.., 6'),
    (lambda s: None, None, 'without a place in the config: depformer_emb.0.low_rank.weight, '),
])
def test_factors_that_do_not_fit(folder, tmp_path, fn, rank, match):
    bad = copied(folder, tmp_path, 'kyutai')
    low_rank(bad, 5)
    change_tensors(bad, fn)
    edited(bad, depformer_low_rank_embeddings=rank)
    refuse(CASES['kyutai'][0], bad, 'kyutai', match)


# What bad input gets -----------------------------------------------------------------------------

def copied(folder, tmp_path, name):
    tmp_path.mkdir(exist_ok=True)
    shutil.copytree(folder[name], tmp_path / 'bad')
    return str(tmp_path / 'bad')


def refuse(config, bad, format, match):
    with pytest.raises(ValueError, match=match) as e:
        export.import_params(config, bad, format)
    assert '\n' not in str(e.value)


def edited(bad, **changes):
    path = os.path.join(bad, 'config.json')
    with open(path) as f:
        values = json.load(f) | changes
    with open(path, 'w') as f:
        json.dump(values, f)


@pytest.mark.parametrize('changes, match', [
    (dict(rope_theta=1e4), 'backbone.theta is 500.0, the checkpoint has 10000.0'),
    (dict(rms_norm_eps=1e-6), 'backbone.norm_eps'),
    (dict(tie_word_embeddings=True), "head.name is 'flat', the checkpoint has 'tied'"),
    (dict(vocab_size=64), 'vocab.size is 96, the checkpoint has 64'),
    (dict(hidden_size=1 << 60), 'hidden_size must be a number from 1 to'),
    (dict(num_attention_heads=0), 'num_attention_heads must be'),
    (dict(num_hidden_layers='two'), 'num_hidden_layers must be'),
    (dict(model_type='gpt2'), "model_type must be one of llama, mistral, .*, got 'gpt2'"),
    (dict(rope_parameters=7), 'must be objects'),
    (dict(attention_bias=True), 'attention_bias must be False'),
    (dict(hidden_act='gelu'), "hidden_act must be 'silu'"),
])
def test_bad_decoder_config(folder, tmp_path, changes, match):
    bad = copied(folder, tmp_path, 'llama')
    edited(bad, **changes)
    refuse(CASES['llama'][0], bad, 'hf', match)


@pytest.mark.parametrize('changes, match', [
    (dict(context=8), 'backbone.window_columns is 7, the checkpoint has 8'),
    (dict(context=1 << 31), 'context must be a number from 1 to 2147483647, got 2147483648'),
    (dict(delays=[0] * 9), 'layout.delays is'), (dict(delays=[0]), 'delays must be n_q'),
    (dict(dep_q=3), 'rows .size, predicted. is'), (dict(hidden_scale=4), 'backbone.mlp is 176'),
    (dict(norm='layer_norm'), 'norm must be'), (dict(gating='none'), "gating must be 'silu'"),
    (dict(norm=['x']), r"config.json: norm must be .*, got \['x'\]"),
    (dict(norm={}), 'config.json: norm must be .*, got {}'),
    (dict(positional_embedding='sin'), "positional_embedding must be 'rope'"),
    (dict(depformer_low_rank_embeddings=8), r'lacks depformer_text_emb.low_rank.weight'),
    (dict(depformer_low_rank_embeddings=0), 'depformer_low_rank_embeddings must be a number from'),
    (dict(depformer_weights_per_step_schedule=[0, 1, 1, 1]),
     r"head.step_weights is 'own', the checkpoint has \(0, 1, 1, 1\)"),
    (dict(depformer_weights_per_step_schedule=[0, 1, 1]), 'each of the dep_q = 4 steps'),
    (dict(depformer_weights_per_step_schedule=[0, 1, 1, 3]), 'leaves out none'),
    (dict(depformer_weights_per_step_schedule=[0, 1, 1, 1 << 60]), 'leaves out none'),
    (dict(depformer_weights_per_step_schedule=[0, 1, 1, [2]]), 'must be a list'),
    (dict(depformer_weights_per_step_schedule=3), 'must be a list'),
    (dict(kv_repeat=2), 'depformer_kv_repeat'), (dict(n_q=1 << 40), 'n_q must be'),
    (dict(existing_text_padding_id=4), 'vocab.pad is 3'),
    (dict(dep_q=0), 'config.json: dep_q must be a number from 1 to 8, got 0'),
    (dict(condition_provider=1), 'config.json: condition_provider must be None .*, got 1'),
    (dict(text_card_out=47), 'config.json: text_card_out must be None or 48 .*, got 47'),
    (dict(skip_self_attn=True), "config.json: 'skip_self_attn' is not known here"),
    ({'a\nb': '\n' * 999}, r"config.json: 'a\\nb' is not known here"),
])
def test_bad_multistream_config(folder, tmp_path, changes, match):
    bad = copied(folder, tmp_path, 'kyutai')
    edited(bad, **changes)
    refuse(CASES['kyutai'][0], bad, 'kyutai', match)


def test_what_changes_no_model_is_passed_over(folder):
    """Keys that the moshi package's loader takes out or overrides, and defaults spelled out."""
    with open(os.path.join(folder['kyutai'], 'config.json')) as f:
        values = json.load(f)
    more = dict(text_card_out=48, condition_provider=None, tokenizer_name='x.model', mimi_name='y',
                depformer_context=4, depformer_max_period=1, depformer_causal=True, model_id={},
                lm_gen_config={'temp': .8}, lora_rank=8, extra_heads_dim=6)
    assert kyutai.read(values | more, 'x') == kyutai.read(values, 'x')


def test_a_checkpoint_without_config_is_the_released_one(folder, tmp_path):
    bad = copied(folder, tmp_path, 'kyutai')
    os.remove(os.path.join(bad, 'config.json'))
    refuse(CASES['kyutai'][0], bad, 'kyutai', 'backbone.width is 64, the checkpoint has 4096')
    bad = copied(folder, tmp_path / 'hf', 'llama')
    os.remove(os.path.join(bad, 'config.json'))
    refuse(CASES['llama'][0], bad, 'hf', 'config.json')


@pytest.mark.parametrize('kept', [.999, .5, 4 / 489_000, 0])
def test_truncated_tensors(folder, tmp_path, kept):
    bad = copied(folder, tmp_path, 'llama')
    path = os.path.join(bad, 'model.safetensors')
    with open(path, 'r+b') as f:
        f.truncate(int(os.path.getsize(path) * kept))
    refuse(CASES['llama'][0], bad, 'hf', 'model.safetensors: not a whole safetensors file')


def test_damaged_json(folder, tmp_path):
    bad = copied(folder, tmp_path, 'llama')
    for text in ('{"model_type": ', '[1]', '\x80', '[' * 100_000):
        with open(os.path.join(bad, 'config.json'), 'w', encoding='latin-1') as f:
            f.write(text)
        refuse(CASES['llama'][0], bad, 'hf', 'config.json: (cannot be read as|must hold a) JSON')


EVIL = 'a\nb\x1b[31m'       # a second line, in red


def test_keys_that_a_terminal_would_obey(folder, tmp_path):
    bad, quoted = copied(folder, tmp_path / '1', 'llama'), r'a\\nb\\x1b\[31m'
    change_tensors(bad, lambda s: s.update({EVIL: np.zeros(3, np.float32)}))
    refuse(CASES['llama'][0], bad, 'hf', f"without a place in the config: '{quoted}'$")
    change_tensors(bad, lambda s: s.update({EVIL: np.zeros(3, np.int32)}))
    refuse(CASES['llama'][0], bad, 'hf', f"model.safetensors: '{quoted}' is I32")
    index = os.path.join(bad, 'model.safetensors.index.json')
    for stated, match in (({EVIL: '../x'}, f"'{quoted}' points outside"),
                          ({'x': EVIL}, f"x is in no plain file: '{quoted}'$"),
                          ({'x': 'a\0b'}, r"x is in no plain file: 'a\\x00b'$")):
        with open(index, 'w') as f:
            json.dump({'weight_map': stated}, f)
        refuse(CASES['llama'][0], bad, 'hf', f'index.json: {match}')
    bad = copied(folder, tmp_path / '2', 'llama')
    with open(os.path.join(bad, 'config.json'), 'w') as f:
        f.write('{%s: 1, %s: 2}' % ((json.dumps(EVIL),) * 2))
    refuse(CASES['llama'][0], bad, 'hf', f"config.json: '{quoted}' is there twice$")


@pytest.mark.parametrize('make, match', [
    (os.mkfifo, 'cannot be read: not a regular file$'),
    (os.mkdir, 'cannot be read: not a regular file$'),
    (lambda path: os.symlink('/nowhere', path), 'cannot be read: No such file or directory$'),
])
@pytest.mark.parametrize('name', ['config.json', 'model.safetensors', 'vocabulary.json',
                                  'model.safetensors.index.json'])
def test_what_is_no_file(name, make, match, folder, tmp_path):
    """A pipe that nobody writes into, a folder, a link to nothing: named, and not waited for."""
    bad = copied(folder, tmp_path, 'llama')
    path = os.path.join(bad, name)
    if os.path.exists(path):
        os.remove(path)
    make(path)
    with pytest.raises(ValueError, match=f'^{path}: {match}') as e:
        export.load(bad)
    assert '\n' not in str(e.value)


def test_pipes_beside_the_weights_are_passed_over(folder, tmp_path):
    bad = copied(folder, tmp_path, 'llama')
    os.remove(os.path.join(bad, 'README.md'))
    for name in ('README.md', 'LICENSE'):
        os.mkfifo(os.path.join(bad, name))
    assert export.load(bad).history['sources'][0]['license'] == 'not stated'
    pipe = str(tmp_path / 'pipe')
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match='pipe: cannot be read: not a regular file$'):
        export.load(pipe)


@pytest.mark.parametrize('digits', ['9' * 5000, '-' + '9' * 5000, '9' * 400, '1e999'])
def test_a_number_of_thousands_of_digits(digits, folder, tmp_path):
    bad = copied(folder, tmp_path, 'llama')
    path = os.path.join(bad, 'config.json')
    with open(path) as f:
        text = f.read().replace('"hidden_size": 64', f'"hidden_size": {digits}')
    with open(path, 'w') as f:
        f.write(text)
    refuse(CASES['llama'][0], bad, 'hf', 'config.json: hidden_size must be a number .* got -?inf$')


def change_tensors(bad, fn):
    path = os.path.join(bad, 'model.safetensors')
    state = load_file(path)
    fn(state)
    save_file(state, path)


@pytest.mark.parametrize('fn, match', [
    (lambda s: s.pop('model.norm.weight'), 'lacks model.norm.weight'),
    (lambda s: [s.pop(k) for k in list(s) if 'layers.1' in k], 'lacks .* and more$'),
    (lambda s: s.update(extra=np.zeros(3, np.float32)), 'without a place in the config: extra'),
    (lambda s: s.update({'model.norm.weight': np.zeros(63, np.float32)}),
     r'model.norm.weight has shape \(63,\), the config wants \(64,\)'),
    (lambda s: s.update({'model.norm.weight': np.zeros((), np.float32)}), r'has shape \(\)'),
    (lambda s: s.update({'model.norm.weight': np.zeros(64, np.int32)}),
     'model.norm.weight is I32; only F64, F32'),
])
def test_tensors_that_do_not_fit(folder, tmp_path, fn, match):
    bad = copied(folder, tmp_path, 'llama')
    change_tensors(bad, fn)
    refuse(CASES['llama'][0], bad, 'hf', match)


@pytest.mark.parametrize('box_bytes', [64 << 20, 1000])
def test_known_leftovers_are_passed_over(box_bytes, folder, tmp_path, monkeypatch):
    """Rotary tables of old files, and the copy that a tied head sometimes brings along."""
    monkeypatch.setattr(streaming, 'BOX_BYTES', box_bytes)
    config, format = CASES['qwen2']
    bad = copied(folder, tmp_path, 'qwen2')
    change_tensors(bad, lambda s: s.update(
        {'lm_head.weight': s['model.embed_tokens.weight'].copy(),
         'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(8, np.float32)}))
    equal(released.random_params(config, 3), export.import_params(config, bad, format))

    def last(state):
        state['lm_head.weight'][-1, -1] += 1
    change_tensors(bad, last)
    match = ('model.safetensors: lm_head.weight differs from model.embed_tokens.weight; .* set '
             'tie_word_embeddings to false')
    refuse(config, bad, format, match)
    with pytest.raises(ValueError, match=match):
        export.load(bad)
    change_tensors(bad, lambda s: s.update({'lm_head.weight': s['lm_head.weight'][:-1]}))
    refuse(config, bad, format, match)
    change_tensors(bad, lambda s: s.update(
        {'lm_head.weight': s['model.embed_tokens.weight'] + np.float32(.5)}))
    edited(bad, tie_word_embeddings=False)      # as the line says
    lm = export.load(bad)
    np.testing.assert_array_equal(np.asarray(lm.params['head']['out']['kernel']).T,
                                  np.asarray(lm.params['frontend']['table']) + np.float32(.5))


@pytest.mark.parametrize('index, match', [
    ({'weight_map': {'model.norm.weight': '../evil.safetensors'}}, 'points outside the folder'),
    ({'weight_map': {'model.norm.weight': '/etc/passwd'}}, 'points outside the folder'),
    ({'weight_map': {'model.norm.weight': 'gone.safetensors'}},
     'holds model.safetensors beside other weights that model.safetensors.index.json names'),
    ({'weight_map': {'model.norm.weight': 'model.safetensors'}}, 'is not where'),
    ({'weight_map': 3}, 'weight_map must name'), ({}, 'weight_map must name'),
])
def test_bad_index(folder, tmp_path, index, match):
    bad = copied(folder, tmp_path, 'llama')
    with open(os.path.join(bad, 'model.safetensors.index.json'), 'w') as f:
        json.dump(index, f)
    refuse(CASES['llama'][0], bad, 'hf', match)


def test_an_index_of_files_that_are_not_there(folder, tmp_path):
    bad = copied(folder, tmp_path, 'llama')
    os.remove(os.path.join(bad, 'model.safetensors'))
    with open(os.path.join(bad, 'model.safetensors.index.json'), 'w') as f:
        json.dump({'weight_map': {'model.norm.weight': 'gone.safetensors'}}, f)
    refuse(CASES['llama'][0], bad, 'hf', 'gone.safetensors: cannot be read')


def test_the_weights_that_a_config_names_beside_a_codec(tmp_path):
    shutil.copytree(released.GOLDEN / 'kyutai', tmp_path / 'both')
    both = str(tmp_path / 'both')
    shutil.copy(os.path.join(both, 'model.safetensors'), os.path.join(both, 'codec.safetensors'))
    os.rename(os.path.join(both, 'model.safetensors'), os.path.join(both, 'm@200.safetensors'))
    with pytest.raises(ValueError, match='found 2 files; a file can be named'):
        export.load(both)
    edited(both, moshi_name='m@200.safetensors')
    want = export.load(str(released.GOLDEN / 'kyutai'))
    for a, b in zip(jax.tree.leaves(export.load(both).params), jax.tree.leaves(want.params),
                    strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('case, changes, match', [
    ('llama', dict(head_dim=7), 'config.json: backbone: rotary positions need an even head_dim'),
    ('llama', dict(num_key_value_heads=3), 'config.json: backbone.kv_heads 3 must divide'),
    ('llama', dict(eos_token_id=99999), 'config.json: vocab.eos must be an id of the text')])
def test_numbers_that_no_model_has_name_their_file(folder, tmp_path, case, changes, match):
    bad = copied(folder, tmp_path, case)
    edited(bad, **changes)
    with pytest.raises(ValueError, match=match) as e:
        export.load(bad)
    assert '\n' not in str(e.value)


def test_index_that_promises_too_much(tmp_path):
    config, format = CASES['llama']
    out = str(tmp_path / 'out')
    export.save(config, released.random_params(config, 2), out, format, shard_bytes=100_000)
    path = os.path.join(out, 'model.safetensors.index.json')
    with open(path) as f:
        index = json.load(f)
    index['weight_map']['extra'] = index['weight_map']['model.norm.weight']
    with open(path, 'w') as f:
        json.dump(index, f)
    refuse(config, out, format, 'extra is not in model-')


def header_of(path):
    with open(path, 'rb') as f:
        size = int.from_bytes(f.read(8), 'little')
        return f.read(size).decode().rstrip(), f.read()


def put_header(path, header, content):
    header = header.encode() + b' ' * (-len(header.encode()) % 8)
    with open(path, 'wb') as f:
        f.write(len(header).to_bytes(8, 'little') + header + content)


def test_a_tensor_or_a_value_that_is_there_twice(folder, tmp_path):
    """In the header of a file, in two files, in config.json: none is chosen silently."""
    bad = copied(folder, tmp_path / 'header', 'llama')
    path = os.path.join(bad, 'model.safetensors')
    header, content = header_of(path)
    norm = json.dumps({'model.norm.weight': json.loads(header)['model.norm.weight']})
    put_header(path, header[:-1] + ',' + norm[1:], content)
    refuse(CASES['llama'][0], bad, 'hf', 'model.safetensors: model.norm.weight is there twice')
    bad = copied(folder, tmp_path / 'json', 'llama')
    path = os.path.join(bad, 'config.json')
    with open(path) as f:
        text = f.read()
    with open(path, 'w') as f:
        f.write(text.replace('{', '{"rope_theta": 1.0,', 1))
    refuse(CASES['llama'][0], bad, 'hf', 'config.json: rope_theta is there twice')
    config, format = CASES['llama']
    bad = str(tmp_path / 'shards')
    export.save(config, released.random_params(config, 2), bad, format, shard_bytes=100_000)
    first, second = sorted(n for n in os.listdir(bad) if n.startswith('model-0'))[:2]
    state = load_file(os.path.join(bad, second)) | load_file(os.path.join(bad, first))
    save_file(state, os.path.join(bad, second))
    refuse(config, bad, format, f'{second}: .* is not where')


@pytest.mark.parametrize('size', [1 << 62, 200 << 20, 7])
def test_a_header_that_promises_too_much(size, folder, tmp_path):
    """Its length is compared with the file before anything of that size is read."""
    bad = copied(folder, tmp_path, 'llama')
    path = os.path.join(bad, 'model.safetensors')
    header, content = header_of(path)
    with open(path, 'wb') as f:
        f.write(size.to_bytes(8, 'little') + header.encode() + content)
    refuse(CASES['llama'][0], bad, 'hf', 'model.safetensors: not a whole safetensors file')


@pytest.mark.parametrize('offsets', [[0, 1 << 50], [-4, 252], [256, 0], [4, 260]])
def test_offsets_that_lie(offsets, folder, tmp_path):
    bad = copied(folder, tmp_path, 'llama')
    path = os.path.join(bad, 'model.safetensors')
    header, content = header_of(path)
    values = json.loads(header)
    values['model.norm.weight']['data_offsets'] = offsets
    put_header(path, json.dumps(values), content)
    refuse(CASES['llama'][0], bad, 'hf', 'model.safetensors: not a whole safetensors file')


def test_both_dialects_at_once(folder, tmp_path):
    bad = copied(folder, tmp_path, 'kyutai')
    key = 'transformer.layers.0.self_attn.'
    change_tensors(bad, lambda s: s.update({key + 'in_proj_weight': s[key + 'in_projs.0.weight']}))
    refuse(CASES['kyutai'][0], bad, 'kyutai', 'holds too')


@pytest.mark.parametrize('config, format, match', [
    (released.multistream(), 'hf', "head.name is 'depth'; format 'hf' can only say 'flat'"),
    (released.decoder('llama'), 'kyutai', "head.name is 'flat'"),
    (released.multistream(norm_gain='late'), 'kyutai', 'backbone.norm_gain'),
    (released.multistream(norm_eps=1e-6), 'kyutai', 'backbone.norm_eps is 1e-06'),
    (released.multistream(head_dim=24), 'kyutai', 'backbone.head_dim'),
    (released.multistream(qkv_bias=True), 'kyutai', 'backbone.qkv_bias'),
    (released.multistream(head=dict(step_weights='shared')), 'kyutai-hf', "can only say 'own'"),
    (released.multistream(vocab=dict(predicted=BOTH)), 'kyutai-hf', 'vocab.predicted'),
    (released.multistream(window_columns=None), 'kyutai-hf', 'window_columns'),
    (released.decoder('llama'), 'kyutai-hf', "head.name is 'flat'"),
    (released.decoder('llama'), 'pickle', '^format has no option'),
])
def test_what_a_format_cannot_say(config, format, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        export.save(config, {}, str(tmp_path / 'out'), format)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('format, options, match', [
    ('nosuch', {}, r"^format has no option 'nosuch' \(legal: gguf, hf, .*peft, stablehlo\)$"),
    (['hf'], {}, r"^format has no option \['hf'\]"),
    ('hf', dict(dtype=['f32']), r"^dtype has no option \['f32'\].* \(legal: bf16, f32\)$"),
    ('hf', dict(dtype={}), r'^dtype has no option {} \(legal: bf16, f32\)$'),
])
def test_options_that_are_none(format, options, match, tmp_path):
    config = released.decoder('llama')
    with pytest.raises(ConfigError, match=match):
        export.save(config, {}, str(tmp_path / 'out'), format, **options)
    assert os.listdir(tmp_path) == []


def test_export_never_overwrites(tmp_path):
    config, format = CASES['llama']
    params = released.random_params(config, 1)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'mine.txt').write_text('keep')
    with pytest.raises(ValueError, match='not an empty folder'):
        export.save(config, params, str(tmp_path / 'out'), format)
    with pytest.raises(ValueError, match='not those of the config'):
        export.save(released.decoder('llama', mlp=80), params, str(tmp_path / 'new'), format)
    assert sorted(os.listdir(tmp_path)) == ['out'] and os.listdir(tmp_path / 'out') == ['mine.txt']


def test_import_wants_a_source(tmp_path):
    refuse(CASES['llama'][0], str(tmp_path / 'nowhere'), 'hf', 'no file or folder .*nowhere')
    refuse(CASES['kyutai'][0], str(tmp_path / 'nowhere'), 'kyutai', 'no file or folder .*nowhere')
    (tmp_path / 'empty').mkdir()
    shutil.copy(released.GOLDEN / 'llama' / 'config.json', tmp_path / 'empty')
    refuse(CASES['llama'][0], str(tmp_path / 'empty'), 'hf', 'found none')


# Run directories ---------------------------------------------------------------------------------

def run_config(name):
    """A golden's config with two stages, whose dataset is nowhere."""
    config = CASES[name][0].copy_and_resolve_references()
    config.data = dict(path='/nowhere', sources=dict(all=dict(select=('story',))))
    stage = dict(steps=2, batch=2, data=dict(all=1.0), lr=1e-3)
    config.stages = (dict(name='first', **stage), dict(name='last', start='first', **stage))
    return config


@pytest.mark.parametrize('name', ['llama', 'kyutai'])
def test_a_run_from_a_checkpoint_and_back(name, folder, tmp_path, caplog):
    config, format = run_config(name), CASES[name][1]
    run, out = str(tmp_path / 'run'), str(tmp_path / 'out')
    begun = export.import_run(config, str(folder[name]), run, format, stage_name='first')
    assert begun == dict(stage='first', trains=False)       # here, where the dataset is not
    assert 'no dataset' in caplog.text or 'nowhere' in caplog.text
    made = export.export_run(config, run, out, format, stage_name='first')
    assert ((tmp_path / 'out' / 'model.safetensors').read_bytes()
            == (folder[name] / 'model.safetensors').read_bytes())
    assert made['tensors'] == len(load_file(folder[name] / 'model.safetensors'))
    told = export.told(made)
    assert f' in {len(os.listdir(out))} files (README.md, config.json, ' in told
    assert told.startswith(f'{made["tensors"]} tensors of ') and told.endswith('), no tokenizer')
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert fingerprint(config) in card and '| stage | first |' in card and '| step | 0 |' in card
    with pytest.raises(ConfigError, match='already has checkpoints of stage first'):
        export.import_run(config, str(folder[name]), run, format, stage_name='first')
    with pytest.raises(ValueError, match='no checkpoint'):
        export.export_run(config, run, str(tmp_path / 'two'), format)
    other = run_config(name)
    other.seed = 7
    with pytest.raises(ConfigError, match='another run: seed'):
        export.export_run(other, run, str(tmp_path / 'two'), format, stage_name='first')


def test_import_makes_no_run_of_a_bad_checkpoint(folder, tmp_path):
    bad = copied(folder, tmp_path, 'llama')
    change_tensors(bad, lambda s: s.pop('model.norm.weight'))
    with pytest.raises(ValueError, match='lacks model.norm.weight'):
        export.import_run(run_config('llama'), bad, str(tmp_path / 'run'), 'hf')
    with pytest.raises(ConfigError, match='holds no run'):
        export.export_run(run_config('llama'), str(tmp_path / 'run'), str(tmp_path / 'o'), 'hf')
    assert os.listdir(tmp_path) == ['bad']


def test_an_import_that_was_cut_short(folder, file_limit, tmp_path):
    """Its run directory is there and its weights are not: nobody begins from others by accident."""
    run = str(tmp_path / 'run')
    given = run_config('llama'), str(folder['llama']), run, 'hf'
    with file_limit(100), pytest.raises(OSError, match='File too large'):
        export.import_run(*given, stage_name='first')
    assert not os.listdir(run)
    with file_limit(8000), pytest.raises(checkpoint.CheckpointError, match='could not be written'):
        export.import_run(*given, stage_name='first')

    def resume(stage):
        with checkpoint.Checkpoints(run, stage, config=given[0], keep=1) as saved:
            return saved.resume({})
    with pytest.raises(checkpoint.CheckpointError, match='weights were to be imported into first'):
        resume('first')
    assert resume('last') is None
    export.import_run(*given, stage_name='first')
    export.export_run(given[0], run, str(tmp_path / 'out'), 'hf', stage_name='first')


def test_a_stage_has_its_own_delays(folder, tmp_path):
    """The delays that a stage trained with are those that its checkpoint states."""
    config = run_config('kyutai')
    layout = dict(name='duplex.columns', acoustic_delay_columns=2)
    config.stages = tuple(dict(s) | (dict(layout=layout) if s['name'] == 'first' else {})
                          for s in config.stages)
    bad = copied(folder, tmp_path, 'kyutai')
    with pytest.raises(ConfigError, match='layout.delays'):
        export.import_run(config, bad, str(tmp_path / 'run'), 'kyutai', stage_name='first')
    edited(bad, delays=[0, 0, 2, 2, 2, 0, 2, 2, 2])
    export.import_run(config, bad, str(tmp_path / 'run'), 'kyutai', stage_name='first')
    export.export_run(config, str(tmp_path / 'run'), str(tmp_path / 'out'), 'kyutai',
                      stage_name='first')
    spelled = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert spelled['delays'] == [0, 0, 2, 2, 2, 0, 2, 2, 2]

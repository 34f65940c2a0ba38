# SPDX-License-Identifier: Apache-2.0
"""Does a text model go on as the spoken model that it becomes, and is all that changes declared?"""

import shlex

import jax
import ml_collections as mlc
import numpy as np
import pytest
import released

from jaxsd import config as configs
from jaxsd import export, model
from jaxsd import stage as stages
from jaxsd.config import ConfigError
from jaxsd.export import loading
from jaxsd.stage import Stage, flatten, unflatten
from jaxsd.types import NOTHING

KEY = jax.random.key(3)


def golden(name):
    return f'hf:{released.GOLDEN / name}'


def spoken(name, *, text=96, units=30, **slots):
    """The golden decoder with a line that has markers and units after its 96 ids of text."""
    c = released.decoder(name)
    c.codec.size = units
    c.vocab = dict(name='line', text_tokens=text, multiple=64)
    for slot, value in slots.items():
        c[slot] = value
    return c


def conversing(**backbone):
    """A config of streams whose temporal transformer has the golden Llama's sizes."""
    c = released.multistream(vocab=dict(text_tokens=96))
    c.backbone = dict(released.decoder('llama').backbone) | backbone
    return c


FRESH = (r'head/(inputs|tables|text_table|blocks|outs)(/.*)?',)
NORMAL = dict(name='normal', sigma=0.5)


def begun(config, start, **graft):
    """Flat parameters of `config` that begin with the checkpoint `start`, on the host."""
    target = flatten(loading.placed(config, jax.devices()[:1]))
    params = export.open_start(config, start, graft=graft).params(target, KEY)
    assert {p: x.shape for p, x in params.items()} == {p: x.shape for p, x in target.items()}
    return {p: np.asarray(x) for p, x in params.items()}


def text_params(name):
    return flatten(export.import_params(released.decoder(name), str(released.GOLDEN / name), 'hf'))


def tokens(rows=2, columns=20, ids=96):
    return np.random.default_rng(0).integers(0, ids, (rows, 1, columns)).astype(np.int32)


# A line that grows -------------------------------------------------------------------------------

@pytest.mark.parametrize('rows', [dict(name='zero'), dict(name='mean'), NORMAL])
def test_new_rows_begin_as_declared_and_old_ones_stay(rows):
    config, old = spoken('llama'), text_params('llama')
    new = begun(config, golden('llama'), rows=rows)
    assert model.make_vocab(config).size == 128
    for path, table in (('frontend/table', lambda x: x), ('head/out/kernel', np.transpose)):
        kept, added = table(new[path])[:96], table(new[path])[96:]
        np.testing.assert_array_equal(kept, table(old[path]))
        if rows['name'] == 'zero':
            assert not added.any()
        elif rows['name'] == 'mean':
            np.testing.assert_allclose(added, np.tile(kept.mean(0), (32, 1)), atol=1e-6)
        else:
            assert added.shape == (32, 64) and abs(added.std() - .5) < .03
            assert abs(added.mean()) < .03
            assert len(np.unique(added)) > 2000
    for path in old:
        if path not in ('frontend/table', 'head/out/kernel'):
            np.testing.assert_array_equal(new[path], old[path])
    if rows is NORMAL:      # the two arrays are not drawn alike, and one key draws one thing
        assert not np.allclose(new['frontend/table'][96:], new['head/out/kernel'].T[96:])
        again = begun(config, golden('llama'), rows=rows)
        np.testing.assert_array_equal(again['frontend/table'], new['frontend/table'])


@pytest.mark.parametrize('name', ['llama', 'qwen2'])
def test_the_text_model_inside_is_unchanged_to_the_bit(name):
    """Its weights; and logits over the old vocabulary but for the order of sums, which on some CPUs
    depends on how wide a product is. Untied and tied."""
    old, config = text_params(name), spoken(name)
    new = begun(config, golden(name), rows=NORMAL)
    for path, x in old.items():
        same = new[path][tuple(map(slice, x.shape))]
        np.testing.assert_array_equal(same, x)
    before, = released.scores(released.decoder(name), unflatten(old), tokens())
    after, = released.scores(config, unflatten(new), tokens())
    assert after.shape[-1] == 128
    np.testing.assert_allclose(after[..., :96], before, atol=2e-5)


def test_a_tied_table_becomes_an_output_map():
    old = text_params('qwen2')
    config = spoken('qwen2', head=dict(name='flat'))
    new = begun(config, golden('qwen2'), rows=dict(name='zero'))
    np.testing.assert_array_equal(new['head/out/kernel'][:, :96], old['frontend/table'].T)
    assert not new['head/out/kernel'][:, 96:].any()


def test_reserved_rows_are_replaced():
    """keep: only so many of the checkpoint's ids mean something here."""
    config = spoken('llama', text=90)
    new = begun(config, golden('llama'), rows=dict(name='zero', keep=90))
    old = text_params('llama')
    np.testing.assert_array_equal(new['frontend/table'][:90], old['frontend/table'][:90])
    assert not new['frontend/table'][90:].any() and not new['head/out/kernel'][:, 90:].any()


def test_ids_beyond_the_text_are_declared():
    """Are ids 40..95 of the checkpoint reserved, or units of the same line? Nobody can tell."""
    config = spoken('llama', text=40, units=20)
    assert model.make_vocab(config).size == 64
    with pytest.raises(ConfigError, match=r'has 96 ids and the config 40 of text: .*rows.keep'):
        begun(config, golden('llama'), rows=NORMAL)
    old = text_params('llama')['frontend/table']
    new = begun(config, golden('llama'), rows=dict(name='zero', keep=40))['frontend/table']
    np.testing.assert_array_equal(new[:40], old[:40])
    assert not new[40:].any()
    new = begun(config, golden('llama'), rows=dict(name='zero', keep=96))['frontend/table']
    np.testing.assert_array_equal(new, old[:64])


# A text model that learns to converse ------------------------------------------------------------

@pytest.mark.parametrize('pairs', ['half', 'interleaved'])
def test_a_text_model_becomes_the_temporal_transformer(pairs):
    """Text alone, nothing in the audio rows: the logits of the text model. With rotary pairs laid
    as they were to the bit, otherwise (q and k permuted) up to rounding."""
    config = conversing(pairs=pairs)
    new = begun(config, golden('llama'), rows=NORMAL, fresh=FRESH)
    old = text_params('llama')
    np.testing.assert_array_equal(new['frontend/table'][:96], old['frontend/table'])
    np.testing.assert_array_equal(new['head/text_out/kernel'], old['head/out/kernel'])
    audio = new['frontend/table'][97:]
    assert abs(audio.std() - .5) < .02
    if pairs == 'half':         # what is drawn anew is what a fresh model has
        init = flatten(jax.jit(lambda key: model.init(config, key))(KEY))
        for path in new:
            if path.startswith('head/') and not path.startswith('head/text_out'):
                np.testing.assert_array_equal(new[path], init[path])
    text = tokens()
    columns = np.concatenate([text, np.full((2, 8, 20), NOTHING, np.int32)], 1)
    before, = released.scores(released.decoder('llama'), unflatten(old), text)
    after = released.scores(config, unflatten(new), columns)[0]
    if pairs == 'half':
        np.testing.assert_array_equal(after, before)
    else:
        assert not np.array_equal(new['backbone/blocks/q/kernel'], old['backbone/blocks/q/kernel'])
        np.testing.assert_allclose(after, before, atol=2e-5)


def test_streams_meet_by_name(tmp_path):
    """One speaker's model, with less text, begins one of two speakers: rows lie elsewhere."""
    one = released.multistream(vocab=dict(speakers=('mine',)))
    params = released.random_params(one, 6)
    export.save(one, params, str(tmp_path / 'one'), 'kyutai')
    two = released.multistream(vocab=dict(text_tokens=60))
    new = begun(two, f'kyutai:{tmp_path / "one"}', rows=dict(name='zero'),
                unlike=('layout.delays',))
    table = flatten(params)['frontend/table']
    ours, theirs = (model.make_vocab(c).ranges for c in (two, one))
    np.testing.assert_array_equal(new['frontend/table'][:48], table[:48])
    assert not new['frontend/table'][48:60].any()
    np.testing.assert_array_equal(new['frontend/table'][60], table[48])     # the initial token
    for name in ('mine 0', 'mine 3'):
        (a, n), (b, _) = ours[name], theirs[name]
        np.testing.assert_array_equal(new['frontend/table'][a:a + n], table[b:b + n])
    assert not new['frontend/table'][ours['theirs 0'][0]:].any()
    np.testing.assert_array_equal(new['head/text_out/kernel'][:, :48],
                                  flatten(params)['head/text_out/kernel'])
    old = flatten(params)['head/text_table']
    np.testing.assert_array_equal(new['head/text_table'], np.concatenate(
        [old[:48], np.zeros_like(new['head/text_table'][:12]), old[48:]]))
    np.testing.assert_array_equal(new['head/blocks/qkv/kernel'],
                                  flatten(params)['head/blocks/qkv/kernel'])


# What has to be said -----------------------------------------------------------------------------

@pytest.mark.parametrize('config, graft, match', [
    (spoken('llama'), {}, 'vocab.size is 128, the checkpoint has 96'),
    (spoken('llama'), dict(unlike=('backbone.theta',)),
     r'lacks rows of frontend/table, head/out/kernel; say in graft.rows how'),
    (conversing(), dict(rows=NORMAL),
     r'nothing for head/blocks/.* and \d more; declare what is to begin fresh in graft.fresh'),
    (conversing(theta=9e9), dict(rows=NORMAL, fresh=FRESH),
     r'backbone.theta is 9000000000.0, the checkpoint has 500.0; if .*backbone.theta.,\)} says so'),
    (conversing(), dict(rows=NORMAL, fresh=(*FRESH, 'head/.*')),
     'no place for head/out/kernel of the checkpoint; declare .* graft.unused'),
    (spoken('qwen2', head=dict(name='flat')), dict(rows=dict(name='men')), "'men'"),
    (spoken('llama'), dict(rows=dict(name='normal')), 'graft.rows .* needs sigma'),
    (spoken('llama'), dict(rows=dict(name='zero', keep=0)), 'graft.rows.keep is a number'),
    (spoken('llama'), dict(rows=NORMAL, fresh=('(',)), 'regular expressions'),
])
def test_what_is_not_declared_is_listed(config, graft, match):
    start = golden('qwen2' if config.head.name == 'flat' and config.backbone.get('qkv_bias')
                   else 'llama')
    with pytest.raises(ConfigError, match=match) as e:
        export.open_start(config, start, graft=graft, where=f'stage one starts from {start}')
    assert '\n' not in str(e.value)


def test_what_to_declare_is_typed_out():
    """Pasted into a shell, the end of the error declares all that it lists and nothing else."""
    config = spoken('llama')
    config.vocab.update(bos=5, eos=6)
    config.backbone.theta = 9e4
    with pytest.raises(ConfigError, match='size is 128.* if all of that is meant, add "-') as e:
        export.open_start(config, golden('llama'), place='stages[0].graft')
    argument, = shlex.split(str(e.value).partition(' meant, add ')[2])
    path, _, value = argument.removeprefix('--config.').partition('=')
    tiny = configs.read(f'{released.GOLDEN.parents[1]}/configs/spirit_lm.py:tiny')
    given = configs.overridden(tiny, [(path, value)])
    found = stages.stages(given)[0].graft
    assert found['rows'] == dict(name='mean')
    assert set(found['unlike']) == {'vocab.bos', 'vocab.eos', 'backbone.theta'}
    begun(config, golden('llama'), **found)
    # What is declared already stays, and no graft makes room for another width.
    with pytest.raises(ConfigError, match=r"'sigma': 0.5}, 'unlike': .*eos', 'backbone.theta'\)}"):
        export.open_start(config, golden('llama'), graft=dict(
            rows=NORMAL, unlike=('vocab.bos', 'vocab.eos')))
    config = released.decoder('llama')
    config.backbone.layers += 1
    with pytest.raises(ConfigError, match='; backbone.layers must be equal$'):
        export.open_start(config, golden('llama'), place='stages[0].graft')


def test_a_declared_difference_is_the_config_s():
    """Spirit-LM raises the rotary base of the text model that it continues."""
    config = spoken('llama')
    config.backbone.theta = 9e4
    config.backbone.window_columns = 8
    new = begun(config, golden('llama'), rows=NORMAL,
                unlike=('backbone.theta', 'backbone.window_columns'))
    np.testing.assert_array_equal(new['backbone/blocks/q/kernel'],
                                  text_params('llama')['backbone/blocks/q/kernel'])


def test_the_head_alone_may_begin_fresh():
    config = spoken('llama')
    new = begun(config, golden('llama'), rows=NORMAL, fresh=('head/out/kernel',),
                unused=('head/out/kernel',))
    init = jax.jit(lambda key: flatten(model.init(config, key))['head/out/kernel'])(KEY)
    np.testing.assert_array_equal(new['head/out/kernel'], init)


def test_rows_are_the_same_on_every_mesh():
    config = spoken('llama')
    config.mesh = mlc.ConfigDict(dict(fsdp=2, tensor=2, data=2))
    target = flatten(loading.placed(config))
    many = export.open_start(config, golden('llama'), graft=dict(rows=NORMAL)).params(target, KEY)
    one = begun(spoken('llama'), golden('llama'), rows=NORMAL)
    for path, x in many.items():
        assert x.sharding == target[path].sharding
        np.testing.assert_array_equal(np.asarray(x), one[path])


def test_a_stage_s_graft_is_checked():
    legal = dict(rows=NORMAL, fresh=FRESH, unused=(), unlike=())
    assert Stage(name='a', steps=1, batch=1, data={}, lr=1.0, graft=legal).graft == legal

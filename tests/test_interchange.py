# SPDX-License-Identifier: Apache-2.0
"""From somebody's checkpoint to a trained one that their program loads: the README's commands."""

import json
import pathlib
import shlex

import jax
import ml_collections as mlc
import numpy as np
import pytest
import released

from jaxsd import checkpoint, cli, export, model, run, sharding, state, train
from jaxsd import config as configs
from jaxsd import stage as stages
from jaxsd.config import ConfigError, fingerprint
from jaxsd.export import begin, kyutai, kyutai_lora, loading, surgery
from jaxsd.export.facts import config_of, facts
from jaxsd.stage import flatten

ROOT = pathlib.Path(__file__).resolve().parents[1]
GRAFT = "dict(rows=dict(name='mean'))"


def system(name, corpus, tmp_path, edit='pass', file='system.py', arg='tiny'):
    """A config file: the tiny system on the small corpus, then the Python statement `edit`."""
    (tmp_path / file).write_text(
        'from jaxsd.config import read\n\n\n'
        'def get_config(arg=None):\n'
        f'    c = read("{ROOT}/configs/{name}.py:{arg}")\n'
        f'    c.data.path = "{corpus}"\n'
        f'    c.codec.path = "{corpus}/" + c.codec.path.split("/")[-1]\n'
        f'    c.vocab.tokenizer = "{corpus}/text.model"\n'
        f'    {edit}\n    return c\n')
    return str(tmp_path / file)


def graft(options, **more):
    """The statement that gives the first stage a graft and other options."""
    rest = ''.join(f', {k}={v!r}' for k, v in more.items())
    return f'c.stages = (dict(c.stages[0]) | dict(graft={options}{rest}), *c.stages[1:])'


@pytest.fixture
def text_model(tmp_path):
    """A released text model: 320 ids, the tiny flat system's sizes, a card that states a license.
    """
    ours = configs.read(f'{ROOT}/configs/spirit_lm.py:tiny')
    said = {k: v for k, v in facts(ours).items() if k.startswith('backbone.')}
    config = config_of(said | {'vocab.size': 320, 'head.name': 'flat'})
    params = released.random_params(config, 11)
    folder = tmp_path / 'text-model'
    export.save(config, params, str(folder), 'hf', shard_bytes=100_000)
    (folder / 'README.md').write_text('---\nlicense: apache-2.0\n---\n# A text model\n')
    return folder, config, params


def test_a_text_model_is_imported_trained_and_exported(corpus, text_model, tmp_path, capsys):
    folder, _, params = text_model
    config = system('spirit_lm', corpus, tmp_path, graft(GRAFT))
    work, out = str(tmp_path / 'wo rk'), str(tmp_path / 'out')
    assert cli.main(['import', '--format', 'hf', '--source', str(folder), '--config', config,
                     '--workdir', work]) == 0
    said, _, paste = capsys.readouterr().out.rstrip().partition('; next: jaxsd ')
    assert said.endswith('stand for stage pretrain at step 0')
    assert cli.main(shlex.split(paste)) == 0
    assert cli.main(['export', '--format', 'hf', '--config', config, '--workdir', work,
                     '--out', out]) == 0
    told = capsys.readouterr().out
    assert f' in {len(list((tmp_path / "out").iterdir()))} files (README.md, ' in told
    assert told.endswith('with the text tokenizer tokenizer.json and tokenizer.model and '
                         'tokenizer_config.json\n')
    ours, lm = configs.read(config), export.load(out)
    assert model.make_vocab(lm.config).ranges == model.make_vocab(ours).ranges
    table = np.asarray(lm.params['frontend']['table'])
    moved = np.abs(table[:320] - params['frontend']['table'])
    assert 0 < moved.max() < .1         # two steps away from where it began
    assert np.isfinite(lm.scores(np.arange(8)[None])).all()

    card = (tmp_path / 'out' / 'README.md').read_text()
    for said in (fingerprint(ours), 'license: "apache-2.0"', '| began from | hf checkpoint '
                 'text-model, license apache-2.0 |', '| step | 2 |', 'tokens, ', 'kmeans',
                 'LlamaForCausalLM'):
        assert said in card, said
    told = json.loads((tmp_path / 'out' / 'provenance.json').read_text())
    assert told['fingerprint'] == fingerprint(ours)
    assert told['sources'] == [{'format': 'hf', 'name': 'text-model', 'license': 'apache-2.0'}]
    assert [s['stage'] for s in told['stages']] == ['pretrain']
    counted = [e for e in run.read_ledger(work) if e['event'] == 'consumed'][-1]['consumed']
    assert told['stages'][0]['consumed'] == counted
    assert len(told['codec']['sha256']) == 64
    generation = json.loads((tmp_path / 'out' / 'generation_config.json').read_text())
    assert (generation['bos_token_id'], generation['eos_token_id']) == (1, 2)
    assert (tmp_path / 'out' / 'tokenizer.model').read_bytes() == (
        corpus / 'text.model').read_bytes()
    assert lm.history['sources'][0]['license'] == 'apache-2.0'      # and it is passed on


@pytest.mark.slow
@pytest.mark.parametrize('format', ['kyutai', 'kyutai-hf'])
def test_a_conversing_model_is_imported_trained_and_exported(format, corpus, tmp_path):
    config = system('moshi', corpus, tmp_path)
    ours = configs.read(config)
    params = released.random_params(ours, 12)
    folder, work, out = (str(tmp_path / x) for x in ('released', 'work', 'out'))
    export.save(export.of_stage(ours, stages.stages(ours)[0]), params, folder, format)
    first = stages.stages(ours)[0].name
    assert cli.main(['import', '--format', format, '--source', folder, '--config', config,
                     '--workdir', work, '--stage', first]) == 0
    assert cli.main(['train', '--config', config, '--workdir', work, '--stage', first]) == 0
    assert cli.main(['export', '--format', format, '--config', config, '--workdir', work,
                     '--stage', first, '--out', out]) == 0
    lm = export.load(out)
    assert lm.format == format and lm.config.codec.name == 'rvq'
    codes = np.zeros((1, len(model.make_vocab(ours).rows), 5), int)
    scores = lm.scores(codes)
    assert np.isfinite(scores['text']).all() and np.isfinite(scores['audio'][:, 0]).all()
    moved = np.abs(np.asarray(lm.params['head']['text_table'])
                   - params['head']['text_table'])
    assert 0 < moved.max() < .1
    told = json.loads((tmp_path / 'out' / 'provenance.json').read_text())
    assert told['sources'] == [{'format': format, 'name': 'released', 'license': 'not stated'}]
    assert told['stages'][0]['step'] == 2 and told['stages'][0]['consumed']


def test_terms_trained_on_a_conversing_model_leave_with_it(tmp_path):
    """A stage begins with a released LMModel and trains low-rank terms on it; what is exported,
    read from its folder alone, says what the trained model says."""
    config, lora = released.multistream(), dict(rank=2, scale=2.0)
    config.objective = dict(name='weighted_ce', terms=dict(text=('text',), audio=('mine',)))
    config.stages = (dict(name='adapt', start=f'kyutai:{released.GOLDEN}/kyutai', steps=4, batch=2,
                          lr=3e-2, data={}, lora=lora,
                          train=(('.*/lora_[ab]', 1.0), ('.*', None))),)
    stage, mesh = stages.find(config, None), sharding.make_mesh({}, jax.devices()[:1])
    step, target, by_path = train.step_on(config, stage, mesh)
    begun = begin.start_params(config, stage, str(tmp_path), target)
    assert begun.origins[0]['format'] == 'kyutai'
    codes = np.random.default_rng(3).integers(0, 32, (2, 9, 20)).astype(np.int32)
    before, _ = released.aligned_scores(config, begun.params, codes, lora)
    tokens = released.columns_of(config, codes)
    weights = (np.arange(21) > np.array(released.late(config))[:, None]).astype(np.float32)
    batch = dict(tokens=tokens, weights=np.broadcast_to(weights, tokens.shape),
                 position=np.broadcast_to(np.arange(21, dtype=np.int32), (2, 21)),
                 segment=np.ones((2, 21), np.int32))
    held, losses = state.fresh_state(config, stage, target, by_path, begun.params), []
    for _ in range(stage.steps):
        held, sums = step(held, batch)
        losses.append(float(sums['loss']))
    assert losses[-1] < losses[0] - .2
    text, audio = released.aligned_scores(config, held['params'], codes, lora)
    assert np.abs(text - before).max() > .1         # so the terms count
    export.save(export.of_stage(config, stage), held['params'], str(tmp_path / 'out'), 'kyutai',
                lora_scale=lora['scale'])
    scores = export.load(str(tmp_path / 'out')).scores(codes)
    np.testing.assert_allclose(scores['text'], text[:, 0], atol=5e-5)
    np.testing.assert_allclose(scores['audio'], audio, atol=5e-5)       # NaN where it masks, too
    assert np.isnan(scores['audio'][:, 1:, -1]).all() and np.isfinite(scores['audio'][:, 0]).all()


@pytest.mark.parametrize('format, values', [
    ('kyutai', kyutai.RELEASED), ('kyutai-hf', dict(model_type='moshi'))])
def test_the_published_config_is_that_of_the_released_checkpoints(format, values, tmp_path):
    """At full size, number by number: moshi without a config.json, and transformers' defaults."""
    (tmp_path / 'config.json').write_text(json.dumps(values))
    ours = configs.read(f'{ROOT}/configs/moshi.py:mine')
    for name in ('posttrain', 'duplex', 'instruct', 'adapt'):
        loading.agreeing(export.of_stage(ours, stages.find(ours, name)), str(tmp_path), format)
    whole = configs.read(f'{ROOT}/configs/moshi.py')
    if format == 'kyutai':      # which predicts both speakers in training
        with pytest.raises(ConfigError, match='rows .size, predicted. is'):
            loading.agreeing(whole, str(tmp_path), format)


def test_the_published_config_begins_as_the_text_model(tmp_path):
    """At full size: what a Helium of 7B lacks is what `text=` declares, and nothing else."""
    ours = configs.read(f'{ROOT}/configs/moshi.py:text=hf:{tmp_path}')
    stage = stages.stages(ours)[0]
    said = export.FAMILIES['hf'].read(dict(
        model_type='helium', vocab_size=32_000, hidden_size=4096, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, head_dim=128, intermediate_size=11_264,
        rms_norm_eps=1e-8, rope_theta=1e4, tie_word_embeddings=False), '')
    found = surgery.check(export.of_stage(ours, stage), config_of(said, like=ours), said,
                          stage.graft, 'pretrain')
    assert stage.start == f'hf:{tmp_path}'
    assert {p for p, parts in found.items() if not parts} == {
        p for p in found if p.startswith('head/') and p != 'head/text_out/kernel'}


@pytest.mark.slow
def test_low_rank_terms_are_imported_trained_and_exported(corpus, tmp_path):
    """The base into one stage, somebody's terms for it into the next, which trains nothing else."""
    config = system('moshi', corpus, tmp_path, (
        "c.stages = (c.stages[0], dict(c.stages[1]) | dict(name='adapt', start='listen', lora=dict("
        "rank=2, scale=2.0), train=(('.*/lora_[ab]', 1.0), ('.*', None))))"))
    ours = configs.read(config)
    lora = dict(rank=2, scale=2.0)
    params = released.random_params(ours, 13, lora)
    base = export.unflatten({k: v for k, v in flatten(params).items() if 'lora_' not in k})
    where = {x: str(tmp_path / x) for x in ('base', 'terms', 'work', 'after', 'folded')}
    export.save(ours, base, where['base'], 'kyutai')
    export.save(ours, params, where['terms'], 'kyutai-lora', lora_scale=2.0)
    run_of = ['--config', config, '--workdir', where['work']]
    assert cli.main(['import', '--format', 'kyutai', '--source', where['base'], *run_of,
                     '--stage', 'listen']) == 0
    assert cli.main(['import', '--format', 'kyutai-lora', '--source', where['terms'], *run_of,
                     '--stage', 'adapt']) == 0
    assert cli.main(['train', *run_of, '--stage', 'adapt']) == 0
    assert cli.main(['export', '--format', 'kyutai-lora', *run_of, '--out', where['after']]) == 0
    assert cli.main(['export', '--format', 'kyutai', *run_of, '--out', where['folded']]) == 0

    adapted = kyutai_lora.read(ours, where['after'], flatten(base), lora)
    moved = {p: np.abs(np.asarray(adapted[p]) - x).max() for p, x in flatten(params).items()}
    assert all(0 < far < .1 if 'lora_' in p else far == 0 for p, far in moved.items()), moved
    whole = flatten(export.load(where['folded']).params)
    for path, kernel in export.fold_lora(adapted, 2.0).items():
        np.testing.assert_allclose(np.asarray(whole[path]), kernel, rtol=1e-6, atol=1e-6,
                                   err_msg=path)
    for folder in ('after', 'folded'):
        told = json.loads((tmp_path / folder / 'provenance.json').read_text())
        assert {(s['format'], s['name']) for s in told['sources']} == {
            ('kyutai', 'base'), ('kyutai-lora', 'terms')}
        assert told['stages'][-1]['stage'] == 'adapt' and told['stages'][-1]['step'] == 2


@pytest.mark.parametrize('kind, backbone', [
    ('helium', {}),
    pytest.param('llama', dict(norm_gain='late', pairs='half', norm_eps=1e-5, kv_heads=2),
                 marks=pytest.mark.slow),
    pytest.param('qwen2', dict(norm_gain='late', pairs='half', norm_eps=1e-6, qkv_bias=True),
                 marks=pytest.mark.slow)])
def test_a_text_model_grows_into_a_conversing_one(kind, backbone, corpus, tmp_path):
    """`configs/moshi.py:text=...` declares what a text model lacks; its sizes are the backbone's.
    """
    config = system('moshi', corpus, tmp_path, f'c.backbone = dict(c.backbone) | {backbone}',
                    arg=f'tiny,text=hf:{tmp_path}/text-model')
    ours = configs.read(config)
    said = {k: v for k, v in facts(ours).items() if k.startswith('backbone.')}
    text = config_of(said | {'backbone.window_columns': None, 'vocab.size': 320,
                             'head.name': 'tied' if kind == 'qwen2' else 'flat'})
    params = released.random_params(text, 14)
    export.save(text, params, str(tmp_path / 'text-model'), 'hf')
    spelled = json.loads((tmp_path / 'text-model' / 'config.json').read_text())
    assert spelled['model_type'] == kind
    work, stage = str(tmp_path / 'work'), stages.stages(ours)[0]
    assert cli.main(['train', '--config', config, '--workdir', work, '--stage', stage.name]) == 0
    first = next(e for e in run.read_ledger(work) if e['event'] == 'start')
    assert [o['name'] for o in first['origins']] == ['text-model']
    target = state.abstract_state(ours, stage, state.mesh_of(ours))[1]['params']
    made = flatten(checkpoint.restore_params(checkpoint.folder_of(work, stage.name), target)[0])
    theirs = flatten(params)
    for path, x in made.items():        # two steps away from the text model, or drawn anew
        x = np.asarray(x)
        if path.startswith('backbone/'):
            assert 0 < np.abs(x - theirs[path]).max() < .1, path
        assert x.std() > 0 or 'norm' in path, path
    table = np.asarray(made['frontend/table'])
    assert np.abs(table[:320] - theirs['frontend/table']).max() < .1
    assert table[320:].std() == pytest.approx(32**-.5, rel=.1)
    written = theirs.get('head/out/kernel', theirs['frontend/table'].T)
    assert np.abs(np.asarray(made['head/text_out/kernel']) - written).max() < .1


# Naming it in the stage --------------------------------------------------------------------------

@pytest.mark.parametrize('prefix', ['hf:', ''])
def test_a_stage_starts_from_it(prefix, corpus, text_model, tmp_path):
    """Recognized by its folder or told by its format; what it was is in the ledger's words."""
    folder, _, params = text_model
    ours = configs.read(system('spirit_lm', corpus, tmp_path,
                               graft(GRAFT, start=f'{prefix}{folder}')))
    stage = stages.stages(ours)[0]
    target = state.abstract_state(ours, stage, state.mesh_of(ours))[1]
    begun = begin.start_params(ours, stage, str(tmp_path / 'work'), target)
    assert begun.start == f'{prefix}{folder}'
    table = begun.params['frontend']['table']
    assert table.sharding == target['params']['frontend']['table'].sharding
    np.testing.assert_array_equal(np.asarray(table)[:320], params['frontend']['table'])
    jax.tree.map(lambda x, t: (x.shape, x.dtype) == (t.shape, t.dtype) or pytest.fail(str(t)),
                 begun.params, target['params'])


@pytest.mark.slow
def test_training_tells_what_it_started_from(corpus, text_model, tmp_path):
    """Without an import: `train`, then `export`; and the next stage remembers too."""
    config = system('spirit_lm', corpus, tmp_path, graft(GRAFT, start=str(text_model[0])))
    work, out = str(tmp_path / 'work'), str(tmp_path / 'out')
    assert cli.main(['train', '--config', config, '--workdir', work]) == 0
    first = next(e for e in run.read_ledger(work) if e['event'] == 'start')
    assert first['start'] == str(text_model[0])
    assert first['origins'] == [dict(format='hf', name='text-model', license='apache-2.0')]
    assert cli.main(['export', '--format', 'hf', '--config', config, '--workdir', work,
                     '--out', out]) == 0
    assert json.loads((tmp_path / 'out' / 'provenance.json').read_text())['sources'] == (
        first['origins'])


def test_low_rank_terms_begin_fresh_on_it(corpus, text_model, tmp_path):
    folder, _, params = text_model
    ours = configs.read(system('spirit_lm', corpus, tmp_path, graft(
        GRAFT, start=f'hf:{folder}', lora=dict(rank=2, scale=1.0),
        train=(('.*/lora_[ab]', 1.0), ('.*', None)))))
    stage = stages.stages(ours)[0]
    target = state.abstract_state(ours, stage, state.mesh_of(ours))[1]
    begun = flatten(begin.start_params(ours, stage, str(tmp_path / 'work'), target).params)
    q = flatten(params)['backbone/blocks/q/kernel']
    np.testing.assert_array_equal(np.asarray(begun['backbone/blocks/q/kernel']), q)
    assert np.asarray(begun['backbone/blocks/q/lora_a']).any()
    assert not np.asarray(begun['backbone/blocks/q/lora_b']).any()


@pytest.mark.parametrize('damage, match', [
    (lambda folder: None, r"size is .*, the checkpoint has 320; .* add .*stages\[0\].graft="),
    (lambda folder: (folder / 'model-00001-of-00002.safetensors').write_bytes(b'x'),
     'not a whole safetensors file'),
    (lambda folder: (folder / 'config.json').unlink(), 'no .*config.json'),
])
def test_what_does_not_fit_makes_no_directory(damage, match, corpus, text_model, tmp_path):
    folder = text_model[0]
    graft_or_none = GRAFT if 'safetensors' in match or 'config' in match else '{}'
    damage(folder)
    if not list(folder.glob('model-00001-of-00002*')):
        pytest.fail('the text model has other shards than this test damages')
    ours = configs.read(system('spirit_lm', corpus, tmp_path,
                               graft(graft_or_none, start=f'hf:{folder}')))
    with pytest.raises(ValueError, match=match) as e:
        train.run(ours, str(tmp_path / 'work'))
    assert '\n' not in str(e.value) and not (tmp_path / 'work').exists()


def test_a_start_that_is_nothing(corpus, tmp_path):
    ours = configs.read(system('spirit_lm', corpus, tmp_path, graft('{}', start='/nowhere')))
    with pytest.raises(ConfigError, match='there is no checkpoint in /nowhere; name a folder'):
        train.run(ours, str(tmp_path / 'work'))


def test_a_history_is_followed_through_stages_and_runs(tmp_path):
    """Stage c of this run from b, b from another run's stage a, which began with a checkpoint."""
    config = mlc.ConfigDict(dict(seed=0))
    stage = stages.Stage(name='c', steps=9, batch=1, data={}, lr=1.0, start='b')
    origin = dict(format='hf', name='x', license='mit')
    used = {'all': {'tokens': 5, 'audio_s': 7.0}}
    folder = tmp_path / 'one' / 'checkpoints' / 'a'
    lines = {'one': [dict(event='start', stage='a', step=0, start='hf:/x', origins=[origin]),
                     dict(event='consumed', stage='a', consumed_to=4, consumed=used)],
             'two': [dict(event='start', stage='b', step=0, start=f'step 4 of {folder}'),
                     dict(event='consumed', stage='b', consumed_to=6, consumed={}),
                     dict(event='start', stage='c', step=0, start='step 6 of b'),
                     dict(event='consumed', stage='c', consumed_to=9, consumed=used)]}
    for name, entries in lines.items():
        (tmp_path / name).mkdir()
        for entry in entries:
            run.ledger(str(tmp_path / name), entry)
    told = export.history(config, str(tmp_path / 'two'), stage,
                          dict(step=9, data=dict(codec=dict(name='rvq', sha256='0' * 64, x=1))))
    assert told == dict(
        sources=[origin], codec=dict(name='rvq', sha256='0' * 64),
        stages=[dict(stage='a', step=4, consumed=used), dict(stage='b', step=6, consumed={}),
                dict(stage='c', step=9, consumed=used)])

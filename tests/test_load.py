# SPDX-License-Identifier: Apache-2.0
"""Does a folder load without a config of ours, say what its own program says, and go back?"""

import json
import os
import shutil
import time

import jax
import ml_collections as mlc
import numpy as np
import pytest
import released
from safetensors.numpy import load_file, save_file

from data_pipelines import demo
from jaxsd import export
from jaxsd.config import ConfigError, read
from jaxsd.export import kyutai
from jaxsd.export.facts import config_of, facts
from jaxsd.export.loading import other_tokenizer, stated_license

TOLERANCE = 5e-5
ROOT = released.GOLDEN.parents[1]


def arrays(name: str) -> dict:
    with np.load(released.GOLDEN / name / 'arrays.npz', allow_pickle=False) as f:
        return dict(f)


@pytest.fixture(scope='module')
def llama():
    return export.load(str(released.GOLDEN / 'llama'))


@pytest.fixture(scope='module')
def multistream():
    return export.load(str(released.GOLDEN / 'kyutai'))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_a_run_directory_and_a_missing_one_are_named(tmp_path):
    with pytest.raises(ValueError, match='^no file or folder .*nope'):
        export.load(str(tmp_path / 'nope'))
    (tmp_path / 'config.json').write_text('{}')
    (tmp_path / 'ledger.jsonl').write_text('')
    with pytest.raises(ValueError, match='is a run directory: jaxsd export'):
        export.load(str(tmp_path))


def test_pickled_weights_and_the_folder_above_are_named(tmp_path):
    """What to do is said, also where the file itself is named; a file of training is not meant."""
    for name in ('pytorch_model-00001-of-00002.bin', 'training_args.bin', 'a.bin'):
        (tmp_path / 'in').mkdir(exist_ok=True)
        (tmp_path / 'in' / name).write_bytes(b'never read')
    said = (r"pytorch_model-00001-of-00002.bin is pickled, which is never read, .* AutoModelForCau"
            rf"salLM.from_pretrained\('{tmp_path}/in'\).save_pretrained\(NEW, safe_serialization=")
    for format in ('', 'hf'):
        with pytest.raises(ValueError, match=said):
            export.load(str(tmp_path / 'in'), format=format)
    shutil.copy(released.GOLDEN / 'llama' / 'config.json', tmp_path / 'in')
    for path in (tmp_path / 'in', tmp_path / 'in' / 'pytorch_model-00001-of-00002.bin'):
        with pytest.raises(ValueError, match=said):
            export.load(str(path))
    shutil.copytree(released.GOLDEN / 'llama', tmp_path / 'models' / 'llama')
    (tmp_path / 'models' / 'empty').mkdir()
    for format in ('', 'hf'):
        with pytest.raises(ValueError, match='; name a checkpoint in it, such as .*models/llama$'):
            export.load(tmp_path / 'models', format=format)


def test_a_format_that_the_folder_is_not_of(llama):
    for format, name, of in (('kyutai', 'llama', "'hf'.*: its model_type is 'llama'"),
                             ('kyutai-hf', 'llama', "'hf'"), ('hf', 'kyutai', "'kyutai'")):
        with pytest.raises(ValueError, match=f"config.json is of format {of}") as e:
            export.load(str(released.GOLDEN / name), format=format)
        assert f'not {format!r}' in str(e.value)
    # Before what the config says of it, which is of no use for another format.
    with pytest.raises(ValueError, match="config.json is of format 'hf', not 'kyutai'"):
        export.import_params(released.decoder('llama'), str(released.GOLDEN / 'llama'), 'kyutai')
    same(export.load(f'hf:{released.GOLDEN}/llama').params, llama.params)


# What the peers say ------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['mistral', 'qwen2'])
def test_a_decoder_is_recognized_and_says_the_same(name):
    lm, golden = export.load(str(released.GOLDEN / name)), arrays(name)
    assert len(repr(lm)) < 200 and 'M parameters, rows: 1, ids of text: ' in repr(lm)
    scores = lm.scores(golden['tokens'])
    assert lm.format == 'hf' and scores.dtype == np.float32
    assert scores.shape == (*golden['tokens'].shape, 96)
    assert np.abs(scores - golden['logits']).max() <= TOLERANCE
    ours = facts(released.decoder(name))
    said = facts(lm.config)
    assert {k: said[k] for k in ours if k.startswith(('backbone.', 'head.'))
            and k != 'backbone.remat'} == {
        k: v for k, v in ours.items() if k.startswith(('backbone.', 'head.'))
        and k != 'backbone.remat'}


def test_many_streams_are_aligned_as_the_peer_aligns_them(multistream):
    golden = arrays('kyutai')
    scores = multistream.scores(golden['codes'])
    assert multistream.format == 'kyutai' and set(scores) == {'text', 'audio'}
    np.testing.assert_array_equal(np.isnan(scores['audio']), np.isnan(golden['logits']))
    assert np.isnan(scores['audio']).any() and not np.isnan(scores['text']).any()
    assert np.abs(scores['text'] - golden['text_logits'][:, 0]).max() <= TOLERANCE
    assert np.nanmax(np.abs(scores['audio'] - golden['logits'])) <= TOLERANCE


def test_the_layout_of_transformers_is_aligned_alike():
    """It is fed delayed columns; here every frame comes as it sounds, and NaN is what falls off."""
    lm, golden = export.load(str(released.GOLDEN / 'kyutai_hf')), arrays('kyutai_hf')
    assert lm.format == 'kyutai-hf' and facts(lm.config)['backbone.pairs'] == 'half'
    scores, T = lm.scores(golden['codes']), golden['codes'].shape[-1]
    assert np.abs(scores['text'] - golden['text_logits'][:, :T]).max() <= TOLERANCE
    for q, late in enumerate((0, 1, 1)):
        kept = golden['logits'][:, q, late:T]
        assert np.abs(scores['audio'][:, q, :T - late] - kept).max() <= TOLERANCE
        assert np.isnan(scores['audio'][:, q, T - late:]).all()


def test_scheduled_steps_are_recognized():
    lm, golden = export.load(str(released.GOLDEN / 'kyutai_scheduled')), arrays('kyutai_scheduled')
    assert lm.config.head.step_weights == (0, 1, 1)
    scores = lm.scores(golden['codes'])
    assert np.nanmax(np.abs(scores['audio'] - golden['logits'])) <= TOLERANCE


def test_parameters_and_config_are_those_of_an_import(llama, multistream):
    same(llama.params, export.import_params(released.decoder('llama'),
                                            str(released.GOLDEN / 'llama'), 'hf'))
    same(multistream.params, export.import_params(released.multistream(),
                                                  str(released.GOLDEN / 'kyutai'), 'kyutai'))
    assert facts(multistream.config)['layout.delays'] == (0, 0, 1, 1, 1, 0, 1, 1, 1)
    assert llama.config.vocab.bos == 1 and llama.config.vocab.eos == 2
    assert llama.config.columns == 128


# Padding -----------------------------------------------------------------------------------------

def test_padding_and_packing_change_nothing(llama):
    """Rows of other lengths, on the left or the right, and pieces behind one another: as alone."""
    tokens = arrays('llama')['tokens']
    T = tokens.shape[1]
    alone = llama.scores(tokens[:1, :10]), llama.scores(tokens[1:])
    mask = np.ones((3, T), bool)
    mask[0, 10:], mask[2, :T - 10] = False, False
    rows = np.stack([tokens[0], tokens[1], np.r_[tokens[0, 10:], tokens[0, :10]]])
    rows[~mask] = -100          # what padding holds means nothing
    scores = llama.scores(rows, mask=mask)
    np.testing.assert_allclose(scores[0, :10], alone[0][0], atol=1e-5)
    np.testing.assert_allclose(scores[1], alone[1][0], atol=1e-5)
    np.testing.assert_allclose(scores[2, T - 10:], alone[0][0], atol=1e-5)
    assert np.isnan(scores[~mask]).all()
    packed = np.concatenate([tokens[:1, :10], tokens[1:, :8]], 1)
    scores = llama.scores(packed, segment=np.r_[[1] * 10, [2] * 8][None])
    np.testing.assert_allclose(scores[0, :10], alone[0][0], atol=1e-5)
    np.testing.assert_allclose(scores[0, 10:], alone[1][0, :8], atol=1e-5)


def test_padding_and_packing_of_many_streams(multistream):
    codes = arrays('kyutai')['codes']
    long, short = multistream.scores(codes[:1, :, :9]), multistream.scores(codes[1:, :, :4])
    row = np.concatenate([codes[:1, :, :9], codes[1:, :, :4], codes[:1, :, :2] * 0 - 7], 2)
    scores = multistream.scores(row, segment=np.r_[[1] * 9, [2] * 4, [0] * 2][None])
    for name, axis in (('text', 1), ('audio', 2)):
        want = np.concatenate([long[name], short[name]], axis)
        found = np.take(scores[name], range(13), axis)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(want))
        np.testing.assert_allclose(found, want, atol=2e-5)
        assert np.isnan(np.take(scores[name], range(13, 15), axis)).all()
    one = multistream.scores(codes[:1, :, :1])      # shorter than its delays
    assert np.isnan(one['audio'][0, 1:]).all() and not np.isnan(one['audio'][0, 0]).any()


@pytest.mark.parametrize('tokens, options, match', [
    (np.zeros((2, 3, 4), int), {}, r'must be \[B, T\]'),
    (np.zeros((2, 3)), {}, 'must be integers'),
    (np.full((1, 2), 96), {}, r'tokens lie in 0..95, got 96'),
    (np.full((1, 2), -1), {}, 'lie in 0..95, got -1'),
    (np.zeros((1, 2), int), dict(mask=np.ones((2, 2))), r'mask must be \[B, T\] = \[1, 2\]'),
    (np.zeros((1, 2), int), dict(mask=np.ones((1, 2)), segment=np.ones((1, 2))), 'not both'),
])
def test_tokens_that_cannot_be_scored(llama, tokens, options, match):
    with pytest.raises(ValueError, match=match) as e:
        llama.scores(tokens, **options)
    assert '\n' not in str(e.value)


def test_ids_of_streams_are_checked(multistream):
    codes = np.zeros((1, 9, 3), int)
    codes[0, 2, 1] = 33         # one more than the initial token
    with pytest.raises(ValueError, match=r'row mine 1 lie in -1..32, got 33'):
        multistream.scores(codes)
    with pytest.raises(ValueError, match=r'must be \[B, 9, T\]'):
        multistream.scores(codes[:, :8])


# There and back ----------------------------------------------------------------------------------

def test_saving_gives_the_same_files(llama, multistream, tmp_path):
    for lm in (llama, multistream):
        out = str(tmp_path / lm.format)
        made = lm.save(out)
        assert made['bytes'] == 4 * sum(x.size for x in jax.tree.leaves(lm.params))
        again = export.load(out)
        same(again.params, lm.params)
        stated = json.loads((released.GOLDEN / ('llama' if lm is llama else 'kyutai')
                             / 'config.json').read_text())
        spelled = json.loads((tmp_path / lm.format / 'config.json').read_text())
        shared = set(stated) & set(spelled) - {'torch_dtype'}
        assert len(shared) > 12 and {k: stated[k] for k in shared} == {
            k: spelled[k] for k in shared}
    with pytest.raises(ConfigError, match="format 'kyutai' can only say 'depth'"):
        llama.save(str(tmp_path / 'other'), format='kyutai')
    assert not (tmp_path / 'other').exists()


def speaking(folder, generation=None, **said):
    """The golden Llama in `folder`, whose config.json says that; 'absent' is left out."""
    shutil.copytree(released.GOLDEN / 'llama', folder)
    values = json.loads((folder / 'config.json').read_text()) | said
    (folder / 'config.json').write_text(json.dumps(
        {k: v for k, v in values.items() if v != 'absent'}))
    if generation is not None:
        (folder / 'generation_config.json').write_text(json.dumps(generation))


@pytest.mark.parametrize('said, generation, ids', [
    (dict(bos_token_id=None, eos_token_id=[7, 8]), None, (None, 7)),
    (dict(bos_token_id=5, eos_token_id=9, pad_token_id=3),
     dict(eos_token_id=[9, 11], pad_token_id=3, do_sample=True, temperature=.6, top_p=.9,
          repetition_penalty=1.1), (5, 9)),
    (dict(bos_token_id='absent', eos_token_id='absent'), None, (None, None)),
    (dict(bos_token_id='absent', eos_token_id=None), dict(bos_token_id=4, eos_token_id=[6, 7]),
     (4, 6)),
])
def test_how_to_generate_goes_back_as_it_came(said, generation, ids, tmp_path):
    """Lists, null and what is not there; nothing that the source does not state."""
    speaking(tmp_path / 'in', generation, **said)
    lm = export.load(str(tmp_path / 'in'))
    for name, want, default in zip(('bos', 'eos'), ids, (1, 2), strict=True):
        assert lm.config.vocab.get(name) == want
        assert export.loading.model.make_vocab(lm.config).specials[name] == (want or default)
    lm.save(str(tmp_path / 'out'))
    stated, spelled = (json.loads((tmp_path / x / 'config.json').read_text())
                       for x in ('in', 'out'))
    for key in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
        assert spelled.get(key, 'absent') == stated.get(key, 'absent')
    found = tmp_path / 'out' / 'generation_config.json'
    assert (json.loads(found.read_text()) if found.exists() else None) == generation
    told = json.loads((tmp_path / 'out' / 'vocabulary.json').read_text())['specials']
    assert told == {k: i for k, i in zip(('bos', 'eos'), ids, strict=True) if i is not None}
    lm.config.vocab.eos = 12        # somebody's decision, which is then what is written
    lm.save(str(tmp_path / 'two'))
    assert json.loads((tmp_path / 'two' / 'config.json').read_text())['eos_token_id'] == 12
    assert json.loads((tmp_path / 'two' / 'generation_config.json').read_text())[
        'eos_token_id'] == 12


def test_the_codec_that_came_along_goes_back(tmp_path):
    """transformers bundles one: without its tensors a folder loads with random ones."""
    shutil.copytree(released.GOLDEN / 'kyutai_hf', tmp_path / 'in')
    state = load_file(tmp_path / 'in' / 'model.safetensors')
    codec = {'audio_encoder.encoder.w': np.arange(6, dtype=np.float32).reshape(2, 3),
             'audio_encoder.n': np.ones((), np.float32)}
    save_file(state | codec, tmp_path / 'in' / 'model.safetensors')
    lm = export.load(str(tmp_path / 'in'))
    lm.save(str(tmp_path / 'out'))
    found = load_file(tmp_path / 'out' / 'model.safetensors')
    assert set(found) == {*state, *codec}
    for key, value in codec.items():
        np.testing.assert_array_equal(found[key], value)
    stated, spelled = (json.loads((tmp_path / x / 'config.json').read_text())[
        'audio_encoder_config'] for x in ('in', 'out'))
    assert stated['hidden_size'] == 32 and spelled == stated
    same(export.load(str(tmp_path / 'out')).params, lm.params)
    lm.save(str(tmp_path / 'kyutai'), 'kyutai')         # where a codec is a file of its own
    assert not [k for k in load_file(tmp_path / 'kyutai' / 'model.safetensors') if 'audio_' in k]


def test_how_moshi_samples_goes_back(tmp_path):
    shutil.copytree(released.GOLDEN / 'kyutai', tmp_path / 'in')
    path = tmp_path / 'in' / 'config.json'
    said = dict(model_type='hibiki', lm_gen_config={'temp': .7, 'top_k': 9}, model_id={'sig': 'x'})
    path.write_text(json.dumps(json.loads(path.read_text()) | said | dict(
        mimi_name='gone', tokenizer_name='text.model')))
    for name, content in (('none', ''), ('out', 'pieces')):
        if content:
            (tmp_path / 'in' / 'text.model').write_text(content)
        export.load(str(tmp_path / 'in')).save(str(tmp_path / name))
        spelled = json.loads((tmp_path / name / 'config.json').read_text())
        assert {k: spelled[k] for k in said} == said and 'mimi_name' not in spelled
        assert ('tokenizer_name' in spelled) == bool(content)
    assert (tmp_path / 'out' / spelled['tokenizer_name']).read_text() == 'pieces'


def test_how_to_generate_goes_to_other_runtimes(tmp_path):
    """The file of the source, else what its config.json states, else our own ids."""
    for i, (generation, want) in enumerate((
            (dict(eos_token_id=[9, 11], top_p=.9), dict(eos_token_id=[9, 11], top_p=.9)),
            (None, dict(bos_token_id=5, eos_token_id=[7, 8])))):
        speaking(tmp_path / f'in {i}', generation, bos_token_id=5, eos_token_id=[7, 8])
        lm = export.load(str(tmp_path / f'in {i}'))
        lm.save(str(tmp_path / f'out {i}'), 'gguf')
        assert json.loads((tmp_path / f'out {i}' / 'generation_config.json').read_text()) == want
    export.save(lm.config, lm.params, str(tmp_path / 'ours'), 'gguf')
    assert json.loads((tmp_path / 'ours' / 'generation_config.json').read_text()) == dict(
        bos_token_id=5, eos_token_id=7)


FILES = {name: f'{{"is": "{name}"}}\n'.encode() for name in (
    'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
    'chat_template.jinja', 'vocab.json', 'merges.txt')}


def test_a_tokenizer_of_another_kind_goes_along(tmp_path, caplog):
    """Byte for byte while the vocabulary is the checkpoint's; else a line and the card say so."""
    speaking(tmp_path / 'in')
    for name, content in FILES.items():
        (tmp_path / 'in' / name).write_bytes(content)
    lm = export.load(str(tmp_path / 'in'))
    lm.save(str(tmp_path / 'out'))
    assert {name: (tmp_path / 'out' / name).read_bytes() for name in FILES} == FILES
    assert not caplog.records and '| tokenizer |' not in (tmp_path / 'out/README.md').read_text()
    lm.config.vocab = dict(lm.config.vocab.to_dict(), text_tokens=90, markers=('[Text]',),
                           multiple=96)
    lm.save(str(tmp_path / 'two'))
    said = ('none here: text ids are those of tokenizer.json of in; tokenizers with added tokens '
            'are written for sentencepiece models only')
    assert [r.getMessage() for r in caplog.records] == [f'tokenizer: {said}']
    assert f'| tokenizer | {said} |' in (tmp_path / 'two' / 'README.md').read_text()
    assert not {*FILES} & {*os.listdir(tmp_path / 'two')}


def test_ids_that_are_none(tmp_path):
    speaking(tmp_path / 'one', eos_token_id='</s>')
    with pytest.raises(ValueError, match='config.json: eos_token_id must be an id, a list of ids'):
        export.load(str(tmp_path / 'one'))
    speaking(tmp_path / 'two', dict(bos_token_id=[1.5]))
    with pytest.raises(ValueError, match='generation_config.json: bos_token_id must be an id'):
        export.load(str(tmp_path / 'two'))


def test_an_import_wants_the_ids_that_the_checkpoint_states(tmp_path):
    speaking(tmp_path / 'in', bos_token_id=None, eos_token_id=[7, 8])
    config = released.decoder('llama')
    with pytest.raises(ConfigError, match='vocab.eos is 2, the checkpoint has 7 or 8'):
        export.import_params(config, str(tmp_path / 'in'), 'hf')
    with pytest.raises(ConfigError, match=r"eos is 2, .*'unlike': \('vocab.eos',\)} says so$"):
        export.open_start(config, str(tmp_path / 'in'), graft=dict(rows=dict(name='mean')))
    export.open_start(config, str(tmp_path / 'in'),
                      graft=dict(rows=dict(name='mean'), unlike=('vocab.eos',)))
    config.vocab.eos = 8
    same(export.import_params(config, str(tmp_path / 'in'), 'hf'),
         export.import_params(released.decoder('llama'), str(released.GOLDEN / 'llama'), 'hf'))


def test_an_export_of_ours_keeps_the_names_of_its_ids(tmp_path):
    config = released.decoder('llama')
    config.vocab.tokenizer = str(tmp_path / 'text.model')
    demo.fit_text(config.vocab.tokenizer, ['a key', 'a cup'])
    params = released.random_params(config, 3)
    export.save(config, params, str(tmp_path / 'out'), 'hf')
    lm = export.load(str(tmp_path / 'out'))
    same(lm.params, params)
    ours, said = (export.loading.model.make_vocab(c) for c in (config, lm.config))
    assert (said.ranges, said.specials, said.size) == (ours.ranges, ours.specials, ours.size)
    assert lm.config.codec.name == 'kmeans' and lm.config.codec.frame_hz == 25.0
    assert lm.config.vocab.tokenizer == str(tmp_path / 'out' / 'tokenizer.model')


@pytest.mark.parametrize('said', [
    {'codec': {'name': 'os:system', 'frame_hz': 1, 'size': 34}}, {'codec': 3}, {'ranges': []},
    {'ranges': {'text': {'start': 0, 'size': 1 << 60}}}, {'specials': {'bos': 'x'}},
    {'ranges': {k: {'start': 0, 'size': 32} for k in ('text', 'markers', 'units')}},
    {'codec': {'name': 'kmeans', 'frame_hz': 10**400, 'size': 34}},
    {'ranges': {'text': {'start': 0, 'size': 60}, 'markers': {'start': 60, 'size': 2},
                'units': {'start': 62, 'size': 34.0}}},
])
def test_a_vocabulary_that_does_not_fit_is_not_believed(said, tmp_path):
    """It is somebody's file: it may name ids, and neither run code nor change a shape."""
    shutil.copytree(released.GOLDEN / 'llama', tmp_path / 'lm')
    good = {'ranges': {'text': {'start': 0, 'size': 60}, 'markers': {'start': 60, 'size': 2},
                       'units': {'start': 62, 'size': 34}},
            'specials': {'[Text]': 60, '[Speech]': 61},
            'codec': {'name': 'kmeans', 'frame_hz': 25, 'size': 34}}
    path = tmp_path / 'lm' / 'vocabulary.json'
    path.write_text(json.dumps(good))
    config = export.loading._bare(str(tmp_path / 'lm'))[3]
    assert config.codec.size == 34 and config.vocab.markers == ('[Text]', '[Speech]')
    path.write_text(json.dumps(good | said))
    config = export.loading._bare(str(tmp_path / 'lm'))[3]
    assert config.codec.name == 'none' or config.codec.size == 34
    assert type(config.codec.size) is int and config.codec.frame_hz < 1e5
    assert export.loading.model.make_vocab(config).size == 96


def test_parameters_spread_over_a_mesh(tmp_path):
    config = released.decoder('llama')
    params = released.random_params(config, 3)
    export.save(config, params, str(tmp_path / 'out'), 'hf', shard_bytes=100_000)
    lm = export.load(str(tmp_path / 'out'), mesh=dict(data=2, fsdp=2, tensor=2), dtype='bfloat16')
    q = lm.params['backbone']['blocks']['q']['kernel']
    assert len(q.sharding.device_set) == 8 and q.addressable_shards[0].data.shape == (2, 32, 2, 16)
    same(lm.params, params)
    assert lm.config.frontend.dtype == 'bfloat16'


# What is recognized ------------------------------------------------------------------------------

def test_a_file_without_config_is_the_released_model():
    """moshi's loaders assume the sizes of Moshi; so does the config file that describes it."""
    said = kyutai.read(kyutai.RELEASED, 'none')
    ours = read(f'{ROOT}/configs/moshi.py')
    ours.vocab.predicted = ('mine',)
    theirs, mine = facts(config_of(said)), facts(ours)
    for key in (*said, 'vocab.rows', 'frontend.name', 'backbone.name'):
        if key != 'backbone.remat' and not key.startswith('file.'):
            assert theirs[key] == mine[key], key


@pytest.mark.parametrize('n_q, dep_q, delays', [
    (8, 4, [0, 0, 1, 1, 1, 0, 1, 1, 1]), (8, 8, [0, 0, 1, 1, 1, 0, 1, 1, 1]),
    (8, 8, [0, 16, 18, 18, 18, 18, 18, 18, 18]), (2, 1, [0, 0, 0]), (1, 1, [3, 0])])
def test_delays_tell_the_speakers(n_q, dep_q, delays):
    """Two speakers of half the codebooks, or one; text that runs ahead or behind."""
    said = kyutai.read(kyutai.RELEASED | dict(n_q=n_q, dep_q=dep_q, delays=delays), 'none')
    found = facts(config_of(said))
    assert found['layout.delays'] == tuple(delays)
    assert [row.predicted for row in found['vocab.rows']] == [
        32000, *[2048] * dep_q, *[0] * (n_q - dep_q)]


def test_delays_that_nobody_has():
    said = kyutai.read(kyutai.RELEASED | dict(n_q=3, dep_q=3, delays=[0, 1, 2, 4]), 'none')
    with pytest.raises(ValueError, match=r'no vocabulary .* with delays \[0, 1, 2, 4\]'):
        config_of(said)


@pytest.mark.parametrize('values, match', [
    (dict(model_type='gpt2'), "no format that can be read here has model_type 'gpt2'"),
    (dict(architectures=['Foo']), r"model_type \['Foo'\]"), ({}, 'model_type None'),
    (dict(model_type=['llama']), r"config.json: no format .* has model_type \['llama'\]"),
    (dict(model_type={'a': 1}), "config.json: no format .* has model_type {'a': 1}"),
])
def test_a_folder_of_no_known_kind(values, match, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(values))
    with pytest.raises(ValueError, match=match):
        export.load(str(tmp_path))


def test_a_config_whose_sizes_the_file_does_not_have(tmp_path):
    """Huge sizes are compared with the file's own before anything is allocated."""
    for name, changes in (('llama', dict(hidden_size=1 << 24)), ('llama', dict(vocab_size=1 << 24)),
                          ('kyutai', dict(dim=1 << 20, hidden_scale=4.0)), ('kyutai', None)):
        bad = tmp_path / str(len(os.listdir(tmp_path)))
        shutil.copytree(released.GOLDEN / name, bad)
        if changes is None:
            os.remove(bad / 'config.json')
        else:
            values = json.loads((bad / 'config.json').read_text())
            (bad / 'config.json').write_text(json.dumps(values | changes))
        with pytest.raises(ValueError, match='has shape|lacks') as e:
            export.load(str(bad))
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('name, changes', [
    ('mixtral', dict(num_hidden_layers=4096, num_local_experts=4096)),
    ('kyutai', dict(n_q=256, dep_q=256, delays=[0] * 257, num_layers=4096,
                    depformer_num_layers=4096)),
])
def test_a_config_that_speaks_of_millions_of_tensors(name, changes, tmp_path):
    """The files' headers bound the work: listing what it names would take hours and gigabytes."""
    shutil.copytree(released.GOLDEN / name, tmp_path / 'lm')
    path = tmp_path / 'lm' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    begun = time.monotonic()
    with pytest.raises(ValueError, match='lm lacks .* and more$') as e:
        export.load(str(tmp_path / 'lm'))
    assert time.monotonic() - begun < 30 and '\n' not in str(e.value)


def test_another_tokenizer_than_the_config_reads_by(tmp_path):
    c = mlc.ConfigDict(dict(vocab=dict(tokenizer='')))
    theirs, ours = tmp_path / 'there', tmp_path / 'text.model'
    theirs.mkdir()
    (theirs / 'tokenizer.json').write_text('{}')
    assert other_tokenizer(c, str(theirs)) == ''            # a config without text
    c.vocab.tokenizer = str(ours)
    assert other_tokenizer(c, str(theirs)) == ''            # whose file is not at hand
    ours.write_bytes(b'pieces')
    assert other_tokenizer(c, str(theirs)) == 'tokenizer.json'
    (theirs / 'spm_32k.model').write_bytes(b'piecez')
    assert other_tokenizer(c, str(theirs)) == 'tokenizer.json'
    (theirs / 'tokenizer.json').unlink()
    assert other_tokenizer(c, str(theirs)) == 'spm_32k.model'
    (theirs / 'spm_32k.model').write_bytes(b'pieces')       # the same file by another name
    assert other_tokenizer(c, str(theirs)) == ''


@pytest.mark.parametrize('files, want', [
    ({}, 'not stated'),
    ({'README.md': '---\ntags: [a]\nlicense: apache-2.0\n---\n# X\nlicense: none\n'}, 'apache-2.0'),
    ({'README.md': '---\nlicense: other\nlicense_name: "llama3"\n---\n'}, 'llama3'),
    ({'README.md': '# no header\nlicense: mit\n', 'LICENSE': '\n  # MIT License\n\nmore'},
     'MIT License'),
])
def test_the_license_as_stated(files, want, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert stated_license(str(tmp_path)) == want

# SPDX-License-Identifier: Apache-2.0
"""Does whatever a user gets wrong end in one line that names it, with nothing half-written?"""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jaxsd import cli, evaluate
from jaxsd import config as configs
from jaxsd import run as rundir

ROOT = pathlib.Path(__file__).resolve().parents[1]
VERBS = ('show', 'train', 'evaluate', 'generate', 'export', 'import', 'report')


def flags(corpus, system='spirit_lm', *more):
    """The flags of a tiny config on the small corpus. Two checkpoints: steps 1 and 2."""
    units = 'units' if system == 'spirit_lm' else 'codec'
    return ['--config', f'{ROOT}/configs/{system}.py:tiny', f'--config.data.path={corpus}',
            f'--config.codec.path={corpus}/{units}.safetensors',
            f'--config.vocab.tokenizer={corpus}/text.model', '--config.stages[0].save_steps=1',
            *more]


@pytest.fixture(scope='module')
def spirit(corpus, tmp_path_factory):
    work = tmp_path_factory.mktemp('spirit') / 'run'
    assert cli.main(['train', *flags(corpus), '--workdir', str(work)]) == 0
    return work


@pytest.fixture(scope='module')
def moshi(corpus, tmp_path_factory):
    work = tmp_path_factory.mktemp('moshi') / 'run'
    argv = [*flags(corpus, 'moshi'), '--stage', 'listen']       # the first of its three
    assert cli.main(['train', *argv, '--workdir', str(work)]) == 0
    return work


@pytest.fixture
def config(corpus, tmp_path):
    """config(edit) -> flags of a config file: spirit_lm:tiny, then the Python statement `edit`."""
    def make(edit, system='spirit_lm'):
        file = tmp_path / 'system.py'
        file.write_text(f'from configs import {system}\n'
                        f'def get_config(arg=None):\n    c = {system}.get_config("tiny")\n'
                        f'    c.data.path = "{corpus}"\n'
                        f'    c.codec.path = "{corpus}/" + c.codec.path.split("/")[-1]\n'
                        f'    c.vocab.tokenizer = "{corpus}/text.model"\n'
                        f'    {edit}\n    return c\n')
        return ['--config', str(file)]
    return make


def contents(path):
    """Everything below `path`, by name."""
    path = pathlib.Path(path)
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None
            for p in sorted(path.rglob('*'))} if path.exists() else None


@pytest.fixture
def refused(capsys):
    """refused(argv, *says): one line on standard error with all of `says`, exit status 1."""
    def check(argv, *says, status=1):
        capsys.readouterr()
        try:
            code = cli.main([str(a) for a in argv])
        except SystemExit as e:
            code = e.code
        said = capsys.readouterr().err
        assert code == status, said
        assert said.count('\n') == 1 and said.endswith('\n'), said
        assert said.startswith('jaxsd ' if status == 1 else 'jaxsd') and 'Traceback' not in said
        assert 'JAXSD_TRACEBACK' not in said, said      # our own words, not those of a library
        for text in says:
            assert str(text) in said, said
        return said
    return check


# Flags.

@pytest.mark.parametrize(('argv', 'says'), [
    ([], 'required: VERB'), (['trian'], "invalid choice: 'trian' (choose from 'show', 'train'"),
    (['train'], 'required: --config, --workdir'),
    (['train', '--workdir', 'w'], 'required: --config'),
    (['train', '--config', 'x', '--work', 'w'], 'required: --workdir'),
    (['train', '--config', 'x', '--workdir', 'w', '--steps', '3'],
     'unrecognized arguments: --steps'),
    (['train', '--config', 'x', '--workdir'], '--workdir: expected one argument'),
    (['show', '--config', 'x', '--index', 'one'], "--index: invalid int value: 'one'"),
    (['show', '--config', 'x', '--columns', '0'], "--columns: '0' is not a whole number above 0"),
    (['evaluate', '--config', 'x', '--workdir', 'w', '--limit', '-1'],
     "--limit: '-1' is not a whole"),
    (['generate', '--config', 'x', '--workdir', 'w', '--task', 'tts', '--output', 'o', '--count',
      '0'], "--count: '0' is not a whole number"),
    (['generate', '--config', 'x', '--workdir', 'w', '--task', 'sing', '--output', 'o'],
     "--task: invalid choice: 'sing' (choose from 'asr', 'tts'"),
    (['generate', '--config', 'x', '--workdir', 'w', '--task', 'tts'], 'required: --output'),
    (['export', '--config', 'x', '--workdir', 'w', '--format', 'pickle', '--out', 'o'],
     "--format: invalid choice: 'pickle' (choose from 'hf', 'kyutai', 'kyutai-hf', 'kyutai-lora', "
     "'stablehlo', 'onnx', 'gguf', 'peft')"),
    (['import', '--config', 'x', '--workdir', 'w', '--format', 'gguf', '--source', 'o'],
     "--format: invalid choice: 'gguf' (choose from 'hf', 'kyutai', 'kyutai-hf', 'kyutai-lora')"),
    (['report', '--workdir', 'w'], 'required: --out')])
def test_wrong_flags(refused, argv, says):
    said = refused(argv, says, '--help', status=2)
    assert said.startswith(f'jaxsd {argv[0]}: ' if argv and argv[0] in VERBS else 'jaxsd: ')


def test_help_comes_at_once_and_wakes_nothing():
    code = '''if True:
        import resource, sys
        from jaxsd import cli
        try:
            cli.main([*sys.argv[1:], '--help'])
        except SystemExit as e:
            assert not e.code
        heavy = {'jax', 'flax', 'tensorflow_datasets', 'grain', 'soundfile'} & set(sys.modules)
        assert not heavy, heavy
        assert resource.getrusage(resource.RUSAGE_SELF).ru_utime < 1, 'slow'
    '''
    for verb in ([], *([v] for v in VERBS)):
        done = subprocess.run([sys.executable, '-c', code, *verb], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert 'usage: jaxsd' in done.stdout and all(v in done.stdout for v in verb or VERBS)
        assert verb in ([], ['report']) or '--config.stages[0].lr=1e-4' in done.stdout
        assert verb == ['report'] or 'FILE.py:demo,share=0.1' in done.stdout


def test_a_config_is_refused_before_anything_is_woken(tmp_path):
    code = '''if True:
        import sys
        from jaxsd import cli
        print(cli.main(['train', '--config', sys.argv[1], '--config.sede=1', '--workdir', 'w']))
        print('jax' in sys.modules)
    '''
    done = subprocess.run([sys.executable, '-c', code, f'{ROOT}/configs/moshi.py'], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.stdout.split() == ['1', 'False']
    assert "did you mean 'seed'" in done.stderr and not contents(tmp_path)


# Configs.

@pytest.mark.parametrize(('override', 'says'), [
    ('sede=1', "the config has no option 'sede'; did you mean 'seed'? (legal: backbone"),
    ('stages[0].stepz=1', "stages[0] has no option 'stepz'; did you mean 'steps'? (legal: "),
    ('stages[7].steps=1', 'stages has items 0..0, no item 7'),
    ('columns=wide', "--config.columns takes int, got 'wide'"),
    ('columns', '--config.columns: write --config.columns=value'),
    ('vocab.name=lines', "did you mean 'line'? (legal: "), ('mesh.fsdp=64', 'does not fit 8 cpu'),
    ('mesh.fsdp=0', 'sizes are positive or -1'), ('codec.size=400', 'codec.size is 400, but the'),
    ('codec.frame_hz=50.0', 'codec.frame_hz is 50.0, but the'),
    ('data.path=', 'data.path is empty'),
    ('data.path=nowhere', 'nowhere'), ('vocab.tokenizer=nowhere', 'nowhere'),
    ('stages[0].steps=0', 'stages[0].steps must be positive'),
    ('stages[0].accumulate=3', 'stages[0].accumulate 3 must divide'),
    ('seed=-1', 'seed is a whole number in 0..4294967295, got -1'),
    ('columns=1', 'columns is a whole number in 2..'),
    ('vocab.multiple=0', 'vocab.multiple must be at least 1'),
    ('stages[0].betas=(0.9,)', 'stages[0].betas are two numbers'),
    ('stages[0].clip=0', 'stages[0].clip must be finite and above 0, got 0.0'),
    ("stages[0].lora={'rank': 'a', 'scale': 1.0}", 'stages[0].lora takes a positive rank'),
    ('backbone.layers=0', 'backbone.layers must be at least 1, got 0'),
    ('backbone.window_columns=wide', "backbone.window_columns takes int or None, got 'wide'"),
    ('backbone.pairs=x', "backbone.pairs is 'half' or 'interleaved'"),
    ('backbone.head_dim=7', 'an even head_dim'), ('frontend.dtype=float33', 'frontend.dtype is'),
    ("mesh.rules={'mlp': 'nope'}", "mesh.rules.mlp names ['nope']; legal: data, fsdp"),
    ("evals={'likelihood': 3}", 'evals.likelihood needs a name'), ("layout={'name': 3}", 'a name'),
    ('objective.terms={}', 'objective.terms is empty'),
    ("objective.terms={'ce': 'tokens'}", "objective.terms.ce names rows tokens, but the rows are"),
    ("objective.terms={'ce': 3}", 'objective.terms.ce names rows 3, but the rows are'),
    ("objective.terms={'ce': ('tokens', 'txt')}", "names rows ('tokens', 'txt'), but the rows are"),
    ('vocab.markers=()', 'flat.interleave needs [Text] and [Speech] in vocab.markers'),
    ("vocab.markers=('[ASR]', '[TTS]')", 'needs [Text] and [Speech] in vocab.markers'),
    ('vocab.markers=[Text]', "vocab.markers takes tuple, got '[Text]'"),
    ("vocab.markers=('[Text]', 3)", 'vocab.markers takes Sequence[str], got'),
    ('vocab.bos=-1', 'vocab.bos must be an id of the text, in 0..319, got -1'),
    ('vocab.eos=400', 'vocab.eos must be an id of the text, in 0..319, got 400'),
    ('layout.channel=4', 'layout.channel is 0 or 1'),
    ('layout.unit_hz=0', 'layout.unit_hz is 0.0, but codec.frame_hz is 25.0'),
    ("layout.text_words=('a', 3)", 'layout.text_words takes tuple[int, int], got'),
    ('stages[0].start=/etc', "starts from '/etc', but there is no checkpoint in /etc; name a"),
    ('evals.likelihood.batch=0', 'evals.likelihood.batch must be at least 1, got 0'),
    ('evals.likelihood.sources=()', 'evals.likelihood.sources must be at least 1, got 0'),
    ('codec.path=nowhere', 'codec.path: no file nowhere'),
    ('head.chunk_colums=3', "did you mean 'chunk_columns'?"),
    ('stages[0].batch=12', 'must divide over 8'),
    ('stages[0].schedule=steps', 'is one of constant, cosine, linear, rsqrt')])
def test_overrides(refused, corpus, tmp_path, override, says):
    refused(['train', *flags(corpus), f'--config.{override}', '--workdir', tmp_path / 'run'], says)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('edit', 'says'), [
    ('c.sead = 1', "has no option 'sead'; did you mean 'seed'? (legal: backbone"),
    ('del c.mesh', 'lacks mesh'), ('raise KeyError("mix")', "failed: KeyError: 'mix'"),
    ('del c.codec["size"]', "codec (name='kmeans') needs size"),
    ('c.codec["sise"] = 3', "codec (name='kmeans') has no option 'sise'; did you mean 'size'?"),
    ('del c.head["name"]', 'head needs a name'),
    ('c.head = dict(name="falt")',
     "jaxsd.head has no option 'falt'; did you mean 'flat'? (legal: "),
    ('c.head["widht"] = 1', "head (name='flat') has no option 'widht'"),
    ('c.backbone["layer"] = 1', "has no option 'layer'; did you mean 'layers'? (legal: "),
    ('c.layout["text_wrods"] = 1',
     "layout (name='flat.interleave') has no option 'text_wrods'; did"),
    ('c.data.sources.asr.layout["scores"] = 1',
     "data.sources.asr.layout (name='flat.sequence') has"),
    ('c.data.sources.aligned.select = ("novel",)', "data.sources.aligned.select names 'novel'; "),
    ('c.data.sources.aligned.selects = ()',
     "data.sources.aligned has no option 'selects'; did you"),
    ('c.stages[0]["setps"] = 3', "stages[0] has no option 'setps'; did you mean 'steps'? (legal: "),
    ('c.stages[0]["steps"] = "3"', "stages[0].steps takes int, got '3'"),
    ('del c.stages[0]["lr"]', 'stages[0] needs lr'), ('c.stages = ()', 'stages is empty'),
    ('c.stages[0]["data"] = dict(alinged=1.)',
     "no option 'alinged'; did you mean 'aligned'? (legal"),
    ('c.stages[0]["start"] = "nowhere"', "starts from 'nowhere', but there is no checkpoint in"),
    ('c.stages[0]["train"] = (("head/.*", 1.),)', 'no rule of train covers backbone/'),
    ('c.stages[0]["train"] = ((".*", None),)', 'train freezes every parameter'),
    ('c.stages[0]["train"] = (("(", 1.),)', 'train takes pairs of a regular expression'),
    ('c.stages[0]["save_steps"] = 0', 'stages[0].save_steps must be positive'),
    ('c.objective = dict(name="weighted_ce", terms=dict(x=("mine",)))', "the rows are ['tokens']"),
    ('c.evals.likelihood.sources = ("alinged",)',
     "evals.likelihood: data.sources has no option 'alinged'; did you mean 'aligned'?"),
    ('c.data.sources.mine = dict(select=("novel",)); c.evals.likelihood.sources = ("mine",)',
     "evals.likelihood: data.sources.mine.select names 'novel'; "),
    ('del c.evals.likelihood["sources"]', "evals.likelihood (name='likelihood') needs sources"),
    ('c.layout["unit_hz"] = 50.0', 'layout.unit_hz is 50.0, but codec.frame_hz is 25.0'),
    ('c.mesh = dict(fspd=8)', 'mesh names fspd; legal: data, fsdp, context, tensor, expert'),
    ('c.mesh = dict(data=-1, rules=dict(wdth=None))', "mesh.rules names ['wdth']; legal: layer")])
def test_config_files(refused, config, tmp_path, edit, says):
    refused(['train', *config(edit), '--workdir', tmp_path / 'run'], says)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('override', 'says'), [
    ('vocab.epad=3', 'vocab.pad and vocab.epad must differ, both are 3'),
    ('vocab.pad=320', 'vocab.pad must be an id of the text, in 0..319, got 320'),
    ('layout.acoustic_delay_columns=-1', 'layout.acoustic_delay_columns must be 0 or more'),
    ('layout.acoustic_delay_columns=1000000000', 'but a row has only 192 columns'),
    ('layout.text_delay_columns=-192', 'layout.text_delay_columns is -192, but a row has only'),
    ('layout.weight_pad=-1', 'layout.weight_pad must be finite and not negative, got -1'),
    ('layout.weight_semantic=1e999', 'layout.weight_semantic must be finite'),
    ('layout.frame_hz=25', 'layout.frame_hz is 25.0, but codec.frame_hz is 12.5')])
def test_overrides_of_many_streams(refused, corpus, tmp_path, override, says):
    argv = [*flags(corpus, 'moshi'), f'--config.{override}', '--stage', 'duplex']
    refused(['train', *argv, '--workdir', tmp_path / 'run'], says)
    assert not (tmp_path / 'run').exists()


def test_a_record_that_another_kind_of_record_hides(refused, config, tmp_path):
    """The first record of every kind is drawn, so that a dialogue is no surprise after stories."""
    edit = ('c.data.sources.aligned.select = ("story", "text"); '
            'c.stages[0]["data"] = dict(aligned=1.0)')
    refused(['train', *config(edit), '--workdir', tmp_path / 'run'], 'text-only record')
    assert not (tmp_path / 'run').exists()


def test_weights_of_another_model(refused, corpus, moshi, tmp_path):
    argv = [*flags(corpus), f'--config.stages[0].start={moshi}/checkpoints/listen']
    refused(['train', *argv, '--workdir', tmp_path / 'run'], 'holds', 'but this config has')
    assert not (tmp_path / 'run').exists()


def test_a_missing_config_file(refused, tmp_path):
    refused(['show', '--config', tmp_path / 'none.py'], 'no file', tmp_path / 'none.py')
    refused(['show', '--config', f'{ROOT}/configs/moshi.py:tinny'],
            "unknown config argument 'tinny'; legal: tiny, demo")
    refused(['show', '--config', f'{ROOT}/README.md'], 'README.md is no Python file')
    refused(['show', '--config', f'{ROOT}/configs/moshi:demo'],
            f'did you mean {ROOT}/configs/moshi.py')
    refused(['show', '--config', f'{ROOT}/configs'], 'configs is a directory')


# Datasets.

@pytest.fixture
def damaged(corpus, tmp_path):
    """damaged(change) -> a copy of the corpus whose train shard's bytes `change` has changed."""
    def make(change):
        copy = shutil.copytree(corpus, tmp_path / 'corpus')
        shard = next((copy / 'speech').glob('*train*'))
        shard.write_bytes(change(shard.read_bytes()))
        return copy
    return make


def test_a_truncated_shard(refused, damaged, tmp_path):
    copy = damaged(lambda data: data[:len(data) // 2])
    refused(['train', *flags(copy), '--workdir', tmp_path / 'run'], 'speech-train', 'bytes',
            'copy or make the dataset again')
    assert not (tmp_path / 'run').exists()


def test_a_flipped_byte_in_a_shard(refused, damaged, corpus, tmp_path):
    """No checkpoint is made; once the file is whole the same command goes on."""
    def flip(data):     # in many records, for no config reads them all
        data, length = bytearray(data), len(data.rstrip(b'\0'))
        for k in range(1, 16):
            data[length * k // 16] ^= 4
        return bytes(data)
    copy = damaged(flip)
    argv = ['train', *flags(copy), '--workdir', tmp_path / 'run']
    refused(argv, copy / 'speech', 'make the dataset again')
    assert not (tmp_path / 'run' / 'checkpoints').exists()
    shutil.rmtree(copy)
    shutil.copytree(corpus, copy)
    assert cli.main([str(a) for a in argv]) == 0


def test_no_manifest(refused, corpus, tmp_path):
    (tmp_path / 'set').mkdir()
    refused(['show', *flags(corpus), f'--config.data.path={tmp_path / "set"}'],
            f'no dataset at {tmp_path / "set"}: make one with')
    (tmp_path / 'set' / 'manifest.json').write_text('{')
    refused(['show', *flags(corpus), f'--config.data.path={tmp_path / "set"}'], 'manifest.json')


@pytest.mark.parametrize(('more', 'says'), [
    (['--source', 'asrr'],
     "data.sources has no option 'asrr'; did you mean 'asr'? (legal: aligned"),
    (['--split', 'tset'], "has no split 'tset' (it has: test, train, voice)"),
    (['--index', '100000'], '--index 100000: source aligned has records 0..'),
    (['--index', '-1'], '--index -1: source aligned has records 0..'),
    (['--png', '/dev/null/all.png'], '/dev/null')])
def test_what_to_show(refused, corpus, more, says):
    refused(['show', *flags(corpus), *more], says)


# Run directories.

def test_a_directory_that_holds_another_run(refused, corpus, spirit):
    before = contents(spirit)
    for verb, more in (('train', []), ('evaluate', []), ('export', ['--format', 'hf', '--out',
                                                                    'o']),
                       ('generate', ['--task', 'asr', '--output', 'o']),
                       ('import', ['--format', 'hf', '--source', str(corpus)])):
        file, *overrides = flags(corpus)[1:]
        fix = (f'give --config {shlex.join([file, *overrides])}' if verb == 'train' else
               'leave --config out')
        says = ('already has checkpoints' if verb == 'import' else
                f'holds another run: seed: 0 there, 5 here; {fix} or name another directory')
        refused([verb, *flags(corpus), '--config.seed=5', '--workdir', spirit, *more], spirit, says)
    assert contents(spirit) == before and not os.path.exists('o')


def test_a_command_to_paste_survives_a_shell(tmp_path):
    graft = "--config.stages[0].graft={'rows': {'name': 'mean'}}"
    made = dict(file='con fig.py:tiny', overrides=[graft])
    config = configs.read(f'{ROOT}/configs/spirit_lm.py:tiny')
    rundir.open_run(str(tmp_path / 'run'), config, made=made)
    with pytest.raises(ValueError, match='holds another run') as e:
        rundir.open_run(str(tmp_path / 'run'), configs.overridden(config, [('seed', '5')]),
                        made=made)
    pasted = str(e.value).partition('; give ')[2].removesuffix(' or name another directory')
    assert shlex.split(pasted) == ['--config', 'con fig.py:tiny', graft]


def test_a_run_is_read_without_its_config(spirit, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'said.txt'
    argv = ['generate', '--workdir', str(spirit), '--task', 't2t', '--input', 'the', '--output']
    assert cli.main([*argv, str(out)]) == 0
    file, *overrides = (w for w in json.loads((spirit / 'config.json').read_text())['overrides'])
    assert json.loads((spirit / 'config.json').read_text())['file'].endswith('spirit_lm.py:tiny')
    again = tmp_path / 'again.txt'
    assert cli.main([*argv, str(again), '--config', f'{ROOT}/configs/spirit_lm.py:tiny', file,
                     *overrides]) == 0
    assert out.read_text() == again.read_text()
    assert cli.main(['generate', '--workdir', str(tmp_path), *argv[3:], str(out)]) == 1
    assert f'--workdir {tmp_path} holds no run' in capsys.readouterr().err


def test_paths_that_lead_nowhere_from_here(refused, spirit, corpus, tmp_path, monkeypatch):
    """They start from the current directory; a run says where it was made, or takes others."""
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    file = f'{ROOT}/configs/spirit_lm.py:tiny'
    flag = ('--config.data.path=PATH --config.codec.path=PATH --config.vocab.tokenizer=PATH)')
    refused(['show', '--config', file], 'no dataset at data/demo', f'(looked for in {elsewhere}; '
            f'give {flag}')
    made = configs.overridden(configs.read(file), [('stages[0].save_steps', '1')])
    rundir.open_run('run', made, made=configs.made_by(file, []) | {'directory': '/home/maker'})
    shutil.copytree(spirit / 'checkpoints', 'run/checkpoints')
    argv = ['evaluate', '--workdir', 'run', '--tasks', 'likelihood', '--limit', '2']
    refused(argv, 'no dataset at data/demo', f'(looked for in {elsewhere}; run this in /home/maker,'
            f' where the run was made, or give {flag}')
    assert cli.main([*argv, *[f for f in flags(corpus)[2:] if 'stages' not in f]]) == 0
    refused([*argv, '--config.codec.frame_hz=50.0'], 'holds another run: codec.frame_hz: 25.0 ther')
    assert os.path.isdir(rundir.read_run(str(spirit))['directory'])


def test_the_config_of_the_contributing_page(corpus, tmp_path, capsys):
    text = (ROOT / 'CONTRIBUTING.md').read_text().partition('```python\n')[2].partition('```')[0]
    (tmp_path / 'my_system.py').write_text(text.replace('data/demo', str(corpus)))
    work = str(tmp_path / 'run')
    assert cli.main(['train', '--config', f'{tmp_path}/my_system.py:tiny', '--workdir', work,
                     '--config.columns=128']) == 0
    assert cli.main(['evaluate', '--workdir', work, '--limit', '4']) == 0
    assert 'told/loss/tokens' in capsys.readouterr().out


def test_all_that_is_missing_is_said_at_once(refused, config):
    argv = config('c.backbone, c.head = dict(name="decoder"), {}; del c.layout["name"]')
    refused(['show', *argv], 'layout needs a name; backbone', 'needs width, layers', 'head needs a')


def test_a_directory_that_is_no_run(refused, corpus, tmp_path):
    argv = [*flags(corpus), '--workdir', tmp_path]
    (tmp_path / 'thesis.txt').write_text('years of work')
    refused(['train', *argv], 'is not empty and no run of ours (it holds thesis.txt)')
    refused(['evaluate', *argv], 'holds no run (no config.json)')
    refused(['generate', *argv, '--task', 'asr', '--output', tmp_path / 'o'], 'holds no run')
    (tmp_path / 'config.json').write_text('{"model": "theirs"}')
    refused(['train', *argv], 'was not written by this program')
    refused(['train', *flags(corpus), '--workdir', tmp_path / 'thesis.txt'], 'is a file')
    refused(['report', '--workdir', tmp_path / 'none', '--out', tmp_path / 'r.html'], 'no such')
    (tmp_path / 'empty').mkdir()
    refused(['report', '--workdir', tmp_path / 'empty', '--out', tmp_path / 'r.html'],
            'holds no run (no config.json)')
    refused(['report', '--workdir', tmp_path, '--out', 'r.html', '--config.seed=1'], 'no --config')
    assert sorted(os.listdir(tmp_path)) == ['config.json', 'empty', 'thesis.txt']
    assert (tmp_path / 'thesis.txt').read_text() == 'years of work'


def test_a_run_without_checkpoints(refused, corpus, tmp_path):
    argv = [*flags(corpus), '--workdir', tmp_path / 'run']
    c = configs.read(f'{ROOT}/configs/spirit_lm.py:tiny')
    for path, value in cli._split_overrides(flags(corpus))[1]:
        configs.override(c, path, value)
    rundir.open_run(str(tmp_path / 'run'), c)
    for verb, more in (('evaluate', []), ('export', ['--format', 'hf', '--out', tmp_path / 'o']),
                       ('generate', ['--task', 'asr', '--output', tmp_path / 'o'])):
        refused([verb, *argv, *more], 'holds no checkpoint; train this stage first')
    assert not (tmp_path / 'o').exists()


def test_a_stage_whose_beginning_is_missing(refused, corpus, tmp_path):
    refused(['train', *flags(corpus, 'moshi'), '--stage', 'duplex', '--workdir', tmp_path / 'run'],
            "stage duplex starts from 'listen'", 'train that stage first')
    assert not (tmp_path / 'run').exists()


# Checkpoints.

def arrays(step):
    """The files that hold the arrays of a checkpoint."""
    return [p for p in (step / 'state').rglob('*') if p.is_file() and p.parent.name == 'd']


def flip(step):
    """One bit of every file of arrays, so that it matters to whoever reads some of them."""
    for file in arrays(step):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 16
        file.write_bytes(data)


def cut(step):
    for file in arrays(step):
        os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize('damage', [flip, cut])
def test_a_damaged_checkpoint(refused, caplog, corpus, spirit, tmp_path, damage):
    """The older step is taken, with a warning; where none is sound, that is said."""
    work = shutil.copytree(spirit, tmp_path / 'run')
    steps = work / 'checkpoints' / 'pretrain'
    argv = ['evaluate', *flags(corpus), '--workdir', str(work), '--tasks', 'likelihood', '--limit',
            '3']
    damage(steps / '2')
    assert cli.main(argv) == 0
    warned = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
    assert any(re.search('checkpoint of step 2 in .* cannot be used, trying an older', w)
               for w in warned)
    assert {e['step'] for e in json.loads((work / 'evaluation.json').read_text())} == {1}
    damage(steps / '1')
    before = contents(work)
    refused(argv, 'no usable checkpoint among steps 2, 1', 'put back a copy of one')
    refused(['train', *flags(corpus), '--workdir', work], 'no usable checkpoint among steps 2, 1')
    assert contents(work) == before


def test_a_checkpoint_of_another_config(refused, corpus, spirit, tmp_path):
    other = flags(corpus, 'spirit_lm', '--config.seed=5')
    c = configs.read(other[1])
    for path, value in cli._split_overrides(other)[1]:
        configs.override(c, path, value)
    work = tmp_path / 'run'
    rundir.open_run(str(work), c)
    shutil.copytree(spirit / 'checkpoints', work / 'checkpoints')
    before = contents(work)
    refused(['train', *other, '--workdir', work],
            'was made by another config: seed: 0 there, 5 here')
    assert contents(work) == before


# What is asked of a trained model.

@pytest.mark.parametrize(('verb', 'more', 'says'), [
    ('train', ['--stage', 'pertrain'],
     "--stage has no option 'pertrain'; did you mean 'pretrain'?"),
    ('train', ['--profile', '3'], "--profile takes FIRST,LAST, got '3'"),
    ('train', ['--profile', '3,2'], 'FIRST must come before LAST'),
    ('evaluate', ['--stage', 'x'], "--stage has no option 'x' (legal: pretrain)"),
    ('evaluate', ['--tasks', 'asr,tss'],
     "--tasks has no option 'tss'; did you mean 'tts'? (legal: "),
    ('evaluate', ['--tasks', 'asr', '--split', 'tset'], "has no split 'tset' (it has: test, train"),
    ('evaluate', ['--tasks', 'asr', '--config.evals.asr.source=arsa'], "has no option 'arsa'"),
    ('export', ['--format', 'hf', '--out', '{full}'], 'is not an empty folder; name a new one'),
    ('export', ['--format', 'hf', '--out', '{out}', '--stage', 'x'], "--stage has no option 'x'"),
    ('export', ['--format', 'hf', '--out', '{out}', '--dtype', 'f16'],
     "dtype has no option 'f16'; did you mean 'bf16'?"),
    ('export', ['--format', 'peft', '--out', '{out}'], "this stage has none; use format 'hf'"),
    ('import', ['--format', 'hf', '--source', '{full}/none'], 'no file or folder'),
    ('generate', ['--task', 'duplex'], '--task duplex does not fit this config: it has one stream'),
    ('generate', ['--task', 'tts', '--stage', 'x'], "--stage has no option 'x'"),
    ('generate', ['--task', 'tts', '--split', 'tset'], "has no split 'tset'"),
    ('generate', ['--task', 'tts', '--temperature', '-1'], '--temperature is 0 (greedy) or above'),
    ('generate', ['--task', 'tts', '--temperature', 'nan'], '--temperature is 0 (greedy) or above'),
    ('generate', ['--task', 'tts', '--top-p', '1.5'], '--top-p lies above 0 and up to 1'),
    ('generate', ['--task', 'tts', '--top-p', '0'], '--top-p lies above 0 and up to 1'),
    ('generate', ['--task', 'tts', '--top-k', '-3'], '--top-k is a count of tokens'),
    ('generate', ['--task', 'tts', '--seed', '-1'], '--seed lies in 0..'),
    ('generate', ['--task', 'tts', '--input', ' '], '--input is empty'),
    ('generate', ['--task', 'tts', '--input', 'the Größe 木'], "has no pieces for 'Größe', '木'"),
    ('generate', ['--task', 'tts', '--input', 'the ' * 2001], '--input has 2001 words, allowed'),
    ('generate', ['--task', 'asr', '--input', '{full}/cut.wav'], 'cut.wav was cut short: its'),
    ('generate', ['--task', 'asr', '--input', '{full}/cut.flac'], 'cut.flac cannot be read as aud'),
    ('generate', ['--task', 'asr', '--input', '{full}/cut.mp3'], 'cut.mp3 was cut short: its'),
    ('generate', ['--task', 'asr', '--input', '{full}/no.wav'], 'no.wav cannot be read as audio'),
    ('generate', ['--task', 'asr', '--input', '{full}/text.wav'],
     'text.wav cannot be read as audio'),
    ('generate', ['--task', 'asr', '--input', '{full}/empty.wav'], 'empty.wav', ),
    ('generate', ['--task', 'asr', '--input', '{full}/still.wav'], 'holds no sound'),
    ('generate', ['--task', 'asr', '--input', '{full}/three.wav'], 'three.wav has 3 channels'),
    ('generate', ['--task', 'asr', '--input', '{full}/long.wav'], 'its length is 601.0 s, allowed'),
    ('generate', ['--task', 'asr', '--input', '{full}/nan.wav'], 'samples that are not finite'),
    ('generate', ['--task', 'tts', '--input', 'the', '--output', '{full}'],
     'is a directory; name a'),
    ('generate', ['--task', 'asr', '--input', '{full}/still.wav', '--output', '{out}.wav'],
     '--task asr writes text, no sound'),
    ('generate', ['--task', 'tts', '--input', 'the', '--output', '{out}.mp3'], 'written as wav'),
    ('generate', ['--task', 'tts', '--output', '{out}.wav'], 'examples go to a folder'),
    ('generate', ['--task', 'tts', '--output', '{full}/text.wav'], 'is a file; name a directory')])
def test_what_is_asked_of_a_run(refused, corpus, spirit, inputs, tmp_path, verb, more, says):
    before = contents(spirit), contents(inputs)
    more = [m.format(full=inputs, out=tmp_path / 'out') for m in more]
    if verb == 'generate' and '--output' not in more:
        more += ['--output', str(tmp_path / 'out')]
    work = tmp_path / 'imported' if verb == 'import' else spirit
    refused([verb, *flags(corpus), '--workdir', work, *more], says)
    assert (contents(spirit), contents(inputs)) == before
    assert not os.listdir(tmp_path)


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
    import soundfile
    folder = tmp_path_factory.mktemp('inputs')
    (folder / 'text.wav').write_text('this is no sound')
    (folder / 'empty.wav').write_bytes(b'')
    soundfile.write(folder / 'still.wav', np.zeros((0, 1)), 16000)
    soundfile.write(folder / 'three.wav', np.zeros((1600, 3)), 16000)
    hum = np.sin(np.arange(32000) / 9)
    for kind in ('wav', 'flac', 'mp3'):
        soundfile.write(folder / f'cut.{kind}', hum, 16000)
        whole = (folder / f'cut.{kind}').read_bytes()
        (folder / f'cut.{kind}').write_bytes(whole[:len(whole) // 2])
    soundfile.write(folder / 'long.wav', np.zeros(601 * 100), 100, subtype='PCM_U8')
    soundfile.write(folder / 'nan.wav', np.full(1600, np.nan), 16000, subtype='FLOAT')
    return folder


def test_what_is_asked_of_many_streams(refused, corpus, moshi, tmp_path):
    argv = [*flags(corpus, 'moshi'), '--workdir', moshi]
    out = tmp_path / 'out'
    for task in ('asr', 'tts', 's2s', 't2t'):
        refused(['generate', *argv, '--task', task, '--output', out],
                f'--task {task} does not fit this config: it has several streams; use duplex')
    refused(['export', *argv, '--stage', 'listen', '--format', 'hf', '--out', out],
            "head.name is 'depth'; format 'hf' can only say 'flat'")
    assert not os.listdir(tmp_path)


def test_files_beside_a_run_that_cannot_be_added_to(refused, corpus, spirit, tmp_path):
    work = shutil.copytree(spirit, tmp_path / 'run')
    for text in ('[{', '{"task": 1}', '[3]'):
        (work / 'evaluation.json').write_text(text)
        refused(['evaluate', *flags(corpus), '--workdir', work, '--tasks', 'likelihood'],
                'evaluation.json cannot be read', 'move it away')
        assert (work / 'evaluation.json').read_text() == text
        with pytest.raises(configs.ConfigError):
            evaluate.record(str(work), [dict(task='x', split='y')])


# The machine.

def test_no_devices(corpus, tmp_path):
    argv = ['train', *flags(corpus), '--workdir', str(tmp_path / 'run')]
    done = subprocess.run([sys.executable, '-m', 'jaxsd', *argv], capture_output=True, text=True,
                          env=os.environ | {'JAX_PLATFORMS': 'cuda'})
    assert done.returncode == 1 and done.stderr.count('\n') == 1, done.stderr
    assert 'cuda' in done.stderr and done.stderr.startswith('jaxsd train: ')
    assert not (tmp_path / 'run').exists()


def test_half_a_cluster(refused, monkeypatch, corpus, tmp_path):
    monkeypatch.setenv('JAXSD_COORDINATOR', 'localhost:1')
    argv = ['train', *flags(corpus), '--workdir', tmp_path / 'run']
    refused(argv, 'JAXSD_COORDINATOR needs JAXSD_PROCESSES and JAXSD_PROCESS_INDEX')
    monkeypatch.setenv('JAXSD_PROCESSES', '2')
    monkeypatch.setenv('JAXSD_PROCESS_INDEX', '2')
    refused(argv, "got '2' and '2'")


@pytest.mark.parametrize('size_kb', [0, 300])
def test_a_full_disk(corpus, tmp_path, size_kb):
    """Full at once, or after the first files of a run: one line, and what is there is whole.

    A real file system where mounting is allowed, else a limit on the size of a file.
    """
    disk = tmp_path / 'disk'
    disk.mkdir()
    argv = [sys.executable, '-m', 'jaxsd', 'train', *flags(corpus), '--workdir', f'{disk}/run']
    inside = subprocess.run(['unshare', '-rm', 'mount', '-t', 'tmpfs', 'none', str(disk)],
                            capture_output=True).returncode == 0
    look = ('find "$0" -type f -printf "left %P %s\\n"; '
            'find "$0" -name config.json -exec cat {} +; exit $code')
    fill = f'head -c {(320 - size_kb) * 1024} /dev/zero > "$0/filler"'
    script = (f'mount -t tmpfs -o size=320k none "$0" && {{ {fill}; "$@"; code=$?; {look}; }}'
              if inside else f'(ulimit -f {size_kb}; exec "$@"); code=$?; {look}')
    done = subprocess.run([*(('unshare', '-rm') if inside else ()), 'bash', '-c', script, str(disk),
                           *argv], capture_output=True, text=True,
                          env=os.environ | {'XLA_FLAGS': ''})
    assert done.returncode == 1, done.stderr
    assert done.stderr.count('\n') == 1 and done.stderr.startswith('jaxsd train: '), done.stderr
    assert re.search('[Nn]o space left|File too large|EFBIG', done.stderr), done.stderr
    left = dict(re.findall(r'^left (\S+) (\d+)$', done.stdout, re.M))
    assert not [name for name in left if name.endswith('.tmp') or 'orbax-checkpoint-tmp' in name]
    if size_kb:
        assert 'run/config.json' in left and '"jaxsd_run": 1' in done.stdout
    else:
        assert set(left) <= {'filler'}


@pytest.mark.slow
@pytest.mark.parametrize('total_kb', [300, 600, 900, 1300, 2000])
def test_a_disk_that_fills_while_training(corpus, tmp_path, total_kb):
    """Whichever of metrics, ledger and checkpoints meets the end: one line, and no half a step."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['unshare', '-rm', 'mount', '-t', 'tmpfs', 'none', str(disk)],
                      capture_output=True).returncode:
        return      # mounting is not allowed here: the test above has what a limit can show
    argv = [sys.executable, '-m', 'jaxsd', 'train', *flags(corpus), '--workdir', f'{disk}/run',
            '--config.stages[0].steps=12', '--config.stages[0].save_steps=4',
            '--config.stages[0].log_steps=1']
    script = (f'mount -t tmpfs -o size={total_kb}k none "$0" && {{ "$@"; code=$?; '
              'find "$0" -printf "left %P\\n"; exit $code; }')
    done = subprocess.run(['unshare', '-rm', 'bash', '-c', script, str(disk), *argv],
                          capture_output=True, text=True, env=os.environ | {'XLA_FLAGS': ''})
    print(total_kb, done.stderr)
    assert done.returncode == 1 and 'Traceback' not in done.stdout + done.stderr
    assert done.stderr.count('\n') == 1 and done.stderr.startswith('jaxsd train: '), done.stderr
    assert re.search('[Nn]o space left', done.stderr), done.stderr
    assert str(disk) in done.stderr
    assert not re.search(r'^left .*(orbax-checkpoint-tmp|\.tmp$)', done.stdout, re.M), done.stdout


def test_a_full_disk_names_the_file(refused, file_limit, corpus, spirit, tmp_path):
    out = tmp_path / 'page.html'
    grid = ['show', *flags(corpus, 'moshi'), '--source', 'dialogue', '--png', tmp_path / 'grid.png']
    for argv in (grid, ['report', '--workdir', spirit, '--out', out]):
        with file_limit(4096):
            refused(argv, 'File too large', argv[-1])
        assert not os.listdir(tmp_path)


# What is no fault of the user's.

def test_bugs_are_not_hidden(monkeypatch, capsys, corpus):
    argv = ['show', *flags(corpus)]

    def broken(args, config):
        raise TypeError('a bug')
    monkeypatch.setitem(cli.VERBS, 'show', broken)
    with pytest.raises(TypeError):
        cli.main(argv)

    def library(args, config):          # the words of a library do not say what the user did
        np.zeros(2) + np.zeros(3)
    monkeypatch.setitem(cli.VERBS, 'show', library)
    assert cli.main(argv) == 1
    said = capsys.readouterr().err
    assert said.startswith('jaxsd show: ValueError in test_cli (JAXSD_TRACEBACK=1 shows where): ')
    assert 'could not be broadcast' in said

    def device(args, config):
        import jax
        jax.jit(lambda x: jax.pure_callback(lambda _: 1 / 0, x, x))(jax.numpy.zeros(2))
        jax.block_until_ready(jax.jit(lambda x: jax.pure_callback(lambda _: 1 / 0, x, x))(
            jax.numpy.zeros(2)))
    monkeypatch.setitem(cli.VERBS, 'show', device)
    assert cli.main(argv) == 1
    said = capsys.readouterr().err
    assert 'JaxRuntimeError in ' in said and '(JAXSD_TRACEBACK=1 shows where): ' in said

    monkeypatch.setenv('JAXSD_TRACEBACK', '1')
    monkeypatch.setitem(cli.VERBS, 'show', library)
    with pytest.raises(ValueError, match='could not be broadcast'):
        cli.main(argv)


def test_a_python_without_the_packages():
    done = subprocess.run([sys.executable, '-S', '-m', 'jaxsd'], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert 'has no ml_collections; run make env' in done.stderr


def test_status_of_a_process(tmp_path):
    """The exit status is that of `main`, and a line is short whatever a file says."""
    file = tmp_path / 'system.py'
    file.write_text('raise ValueError("x\\n" * 100000)')
    done = subprocess.run([sys.executable, '-m', 'jaxsd', 'show', '--config', str(file)],
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count('\n') == 1 and len(done.stderr) < 2100

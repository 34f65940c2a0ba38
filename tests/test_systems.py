# SPDX-License-Identifier: Apache-2.0
"""Does the page of systems show a figure only where there is one, and what every config says?"""

import json
import pathlib
import re
import shutil

import pytest

from jaxsd import cli, data, evaluate, model, systems
from jaxsd import config as configs
from jaxsd import run as rundir
from jaxsd.config import ConfigError, plain

ROOT = pathlib.Path(__file__).resolve().parents[1]
SPEC = str(ROOT / 'configs' / 'twist.py')


@pytest.fixture
def here(corpus, tmp_path, monkeypatch):
    """A folder with the corpus where the configs look for it."""
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'demo').symlink_to(corpus)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(folder, arg='demo', *, step=500, dataset=None, right=87.25):
    """A run directory as training and evaluation leave it, of three minutes."""
    spec = f'{SPEC}:{arg}'
    c, work = configs.read(spec), str(folder / 'runs' / 'twist')
    mark = data.fingerprint(c, plain(c.stages)[-1], model.make_vocab(c))['dataset']
    rundir.open_run(work, c, made=configs.made_by(spec, ()))
    begun = dict(stage='text', step=0, revision='abc123', dataset=dataset or mark, began_s=1e9,
                 devices=2, device_kind='abacus')
    (folder / 'runs' / 'twist' / 'ledger.jsonl').write_text('\n'.join(map(json.dumps, (
        dict(time_s=1e9, event='start', **begun),
        dict(time_s=1e9 + 10, event='ready', stage='text', restore_s=0, compile_s=9, data_s=0),
        dict(time_s=1e9 + 200, event='finished', stage='text', step=300,
             spent=dict(data_s=0, save_s=4, probe_s=6))))) + '\n')
    first = dict(split='test', items=7, judged=['right %', 50], revision='def456')
    evaluate.record(work, [
        dict(task='matched', stage='speech', step=step, metrics={'right %': right, 'nats': 2.0},
             **first),
        dict(task='matched', stage='untrained', step=0, metrics={'right %': 51.0}, **first),
        dict(task='likelihood', split='test', stage='speech', step=step, items=1, metrics={})])


def page(folder) -> str:
    assert cli.main(['systems', '--config', SPEC, '--runs', str(folder / 'runs'), '--out',
                     str(folder / 'page.md')]) == 0
    return (folder / 'page.md').read_text()


def test_a_demo_that_was_run(here):
    run(here)
    text = page(here)
    assert '| [TWIST](#twist) | matched: right % | 87.2 | 51.0 | 50.0 | 3 |' in text
    assert '| matched | right % | 87.2 | 51.0 | 50.0 | 7 |' in text
    assert 'trained at commit abc123 on 2001-09-09 and measured at def456.' in text
    assert (':demo`, trained at abc123, 2001-09-09, in 3 minutes on 2 × abacus; measured at def456'
            in text)
    assert '*Minutes* are those of training (2 × abacus), beside other work.' in text
    assert '†' not in text
    assert '[2305.13009](https://arxiv.org/abs/2305.13009)' in text
    count = model.count(model.abstract(configs.read(SPEC))[1])
    assert f'Parameters: {count:,} at published size' in text
    assert '| speech | init | 400,000 × 64 | everything | speech 100 % |' in text
    assert '| demo: speech | text | 500 × 16 | everything | speech 100 % |' in text
    assert re.search(r'speech\nK=1  T=\d+  columns .*\n(.*\n)?BOS u\d+', text)
    assert 'likelihood' not in text


@pytest.mark.parametrize('why, options', [
    ('not run', None), ('not trained to the end', dict(step=499)),
    ('a run of .*:tiny', dict(arg='tiny'))])
def test_a_dash_and_why(here, why, options):
    """What is not whole or of another size is not shown."""
    if options is not None:
        run(here, **options)
    text = page(here)
    assert '| [TWIST](#twist) | matched, sentences, words | – | – | – | – |' in text
    assert '87.2' not in text
    assert re.search(f'\nDemo: .*{why}', text)


def test_another_corpus_is_marked(here):
    run(here, dataset='0a1b')
    text = page(here)
    assert '| [TWIST](#twist) † | matched: right % | 87.2 | 51.0 |' in text
    assert '† was trained and measured on another corpus (0a1b)' in text
    assert 'trained at abc123, on corpus 0a1b, 2001-09-09' in text


def test_a_run_shown_before_is_shown_again(here):
    """It may have been trained elsewhere; the page keeps it while its config says the same."""
    run(here, dataset='0a1b')
    text = page(here)
    shutil.rmtree(here / 'runs')
    assert page(here) == text == page(here)
    run(here, right=99.5)                               # a newer one takes its place
    assert '| matched | right % | 99.5 |' in page(here)
    record = here / 'page.json'
    kept = json.loads(record.read_text())
    shutil.rmtree(here / 'runs')
    record.write_text(json.dumps({'twist': kept['twist'] | dict(config='another'),
                                  'elsewhere': kept['twist']}))
    assert '99.5' not in page(here)
    assert json.loads(record.read_text()) == {'elsewhere': kept['twist']}   # not of this page
    record.write_text('[1]')
    with pytest.raises(ConfigError, match='page.json is no record of runs .*; move it away'):
        systems.write([SPEC], 'runs', 'page.md')


def test_a_recipe_has_a_row_of_its_own(here):
    """Its run lies beside that of the file it is a recipe of, and neither is taken for the other's.
    """
    run(here, 'demo,recipe=slam')
    spec = f'{SPEC}:recipe=slam'

    def page():
        systems.write([SPEC, spec], str(here / 'runs'), str(here / 'page.md'))
        return (here / 'page.md').read_text()
    assert '| [TWIST](#twist) (`:demo,recipe=slam`) | matched: right % | 87.2 |' in page()
    (here / 'runs' / 'twist').rename(here / 'runs' / 'twist,recipe=slam')
    (here / 'page.json').unlink()
    text = page()
    assert '| [TWIST](#twist) | matched, sentences, words | – |' in text
    assert '| [TWIST (recipe=slam)](#twist-recipeslam) | matched: right % | 87.2 |' in text
    assert '| demo: speech | text | 500 × 16 |' in text and '\n## TWIST (recipe=slam)\n' in text
    assert set(json.loads((here / 'page.json').read_text())) == {'twist,recipe=slam'}


def test_a_changed_config_has_no_figures(here):
    run(here, 'demo,cold')      # a demo by other arguments is one
    assert '87.2' in page(here) and ':demo,cold`' in page(here)
    stored = json.loads((here / 'runs' / 'twist' / 'config.json').read_text())
    stored['config']['seed'] = 1
    stored['fingerprint'] = configs.fingerprint(stored['config'])
    (here / 'runs' / 'twist' / 'config.json').write_text(json.dumps(stored))
    (here / 'page.json').unlink()       # it remembers the run that was
    assert 'holds another run: seed: 1 there, 0 here' in page(here)


def test_every_config_says_its_size_and_evidence():
    for path in sorted((ROOT / 'configs').glob('[!_]*.py')):
        doc = configs.made_by(str(path), ())['doc']
        assert systems.told(doc, 'Size') and systems.told(doc, 'Evidence'), path.name
        assert re.search(r'^  look .*--source \w+', doc, re.MULTILINE), path.name
        assert set(plain(configs.read(f'{path}:demo').evals)) - {'likelihood'}, path.name


def test_a_docstring_is_read_up_to_the_next_word():
    doc = 'T: x\n\n  look   a\nSize       1 B,\n           by hand.\nEvidence   none\n\nmore'
    assert systems.told(doc, 'Size') == '1 B, by hand.' and systems.told(doc, 'Evidence') == 'none'
    assert systems.told(doc, 'Other') == ''


def test_a_config_without_a_size_is_named(here):
    (here / 'x.py').write_text('"""X: y."""\n')
    with pytest.raises(ConfigError, match='x.py: its docstring has no line Size'):
        systems.write([str(here / 'x.py')], 'runs', 'page.md')
    assert not (here / 'page.md').exists()

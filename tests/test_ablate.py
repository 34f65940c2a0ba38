# SPDX-License-Identifier: Apache-2.0
"""Is an ablation fair, does it survive being killed, and is its answer what the numbers say?"""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import yaml

from configs import _parts as parts
from jaxsd import ablate, cli, data, evaluate, model, verdict
from jaxsd import run as rundir
from jaxsd import stage as stages
from jaxsd.ablate.arms import ROUNDED, whole_steps
from jaxsd.config import ConfigError
from jaxsd.layout import flat

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHIPPED = sorted((ROOT / 'configs' / 'ablations').glob('[!_]*.py'))
ASKED = dict(
    question='Does a name matter?', base=f'{ROOT}/configs/spirit_lm.py:tiny',
    arms=(('one',), ('other',)), budget=dict(tokens=6 * 2048), seeds=(5,),
    metrics=(('likelihood', 'aligned/loss/tokens', 'lower'), ('asr', 'WER %', 'lower')),
    items=3, expected=('one > other',), source='nobody')


def on(corpus):
    return [f'--config.data.path={corpus}', f'--config.codec.path={corpus}/units.safetensors',
            f'--config.vocab.tokenizer={corpus}/text.model', '--config.stages[0].save_steps=2',
            "--config.evals.likelihood.sources=('aligned',)"]


def pairs(corpus):
    return [tuple(x.removeprefix('--config.').split('=', 1)) for x in on(corpus)]


@pytest.fixture
def asked(tmp_path):
    """asked(key=value, ...) -> the path of a question file; a key that is None is left out."""
    def make(**changes):
        path = tmp_path / 'naming.py'
        if 'arms' in changes:
            changes = dict(expected=None) | changes
        kept = {k: v for k, v in (ASKED | changes).items() if v is not None}
        path.write_text(f'QUESTION = {kept!r}\n')
        return str(path)
    return make


def answer(work):
    with open(work / 'results.json') as f:
        found = json.load(f)
    return [a['estimates'] for a in found['arms']], found['comparisons'], found['verdict']


def asked_and_answered(folder, corpus):
    """(directory, arguments) of the ablation ASKED, run in `folder`."""
    (folder / 'naming.py').write_text(f'QUESTION = {ASKED!r}\n')
    argv = ['ablate', '--sweep', str(folder / 'naming.py'), '--workdir', str(folder / 'work'),
            *on(corpus)]
    assert cli.main(argv) == 0
    return folder / 'work', argv


@pytest.fixture(scope='module')
def straight(corpus, tmp_path_factory):
    return asked_and_answered(tmp_path_factory.mktemp('naming'), corpus)


def test_arms_that_differ_in_name_alone_get_the_same_numbers(straight):
    work, argv = straight
    (one, other), comparisons, said = answer(work)
    assert one == other and len(one) == 2
    assert {c['difference'] for c in comparisons} == {0.0} and said.startswith('not decided')
    losses = [[json.loads(line).get('loss') for line in open(work / arm / '5' / 'metrics.jsonl')]
              for arm in ('one', 'other')]
    assert losses[0] == losses[1] and len(losses[0]) == 7       # and a line of what was held out
    assert rundir.read_run(str(work / 'one' / '5'))['config']['seed'] == 5
    assert cli.main(['evaluate', '--workdir', str(work / 'one' / '5'), '--tasks', 'likelihood']
                    ) == 0      # a run directory like any other
    before = {p: p.stat().st_mtime for p in work.glob('*/*/ledger.jsonl')}
    assert cli.main([*argv, '--doc', str(work / 'page.md')]) == 0
    assert before == {p: p.stat().st_mtime for p in work.glob('*/*/ledger.jsonl')}
    drawn, = work.glob('one/*/grids/*.png')
    assert drawn.read_bytes().startswith(b'\x89PNG')
    assert (work / 'report.html').read_text().count('alt="Drawn grid: ') == 2
    page = (work / 'page.md').read_text()
    assert '(page-naming.png)' in page
    assert (work / 'page-naming.png').read_bytes().startswith(b'\x89PNG')
    assert '## Does a name matter?' in page and '| one | 1 of 1 | 6 |' in page and argv[2] in page


def test_the_directory_of_an_ablation_is_its_own(straight, corpus, asked, tmp_path, capsys):
    work, argv = straight
    before = {p: p.stat().st_mtime for p in work.rglob('*') if p.is_file()}

    def refused(path, folder, *more):
        assert cli.main(['ablate', '--sweep', path, '--workdir', str(folder), *on(corpus), *more]
                        ) == 1
        return capsys.readouterr().err
    renamed = tmp_path / 'renaming.py'
    renamed.write_text(f'QUESTION = {ASKED!r}\n')
    assert 'holds the ablation naming; name another directory' in refused(str(renamed), work)
    assert 'the question has changed: ' in refused(asked(seeds=(5, 6), arms=(
        ('one', '--config.stages[0].lr=1e-5'), ('other',))), work)
    assert 'stages[0].steps' in refused(asked(), work, '--budget', '4096')
    assert '--only 2: there are runs 0..1' in refused(asked(), work, '--only', '2')
    for wrong in ('NO_SUCH_VARIABLE', '', '1,', '9' * 5000):
        assert 'write the number of a run' in refused(asked(), work, '--only', wrong)
    for flag in ('--launch=local', '--doc=x.md'):
        assert '--only does not go with' in refused(asked(), work, '--only', '0', flag, '--dry-run')
    assert 'no such directory' in refused(asked(), work, '--doc', 'nowhere/x.md', '--dry-run')
    assert 'is a directory' in refused(asked(), work, '--doc', str(tmp_path), '--dry-run')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'mine.txt').write_text('')
    assert 'is not empty and no ablation' in refused(asked(), tmp_path / 'full')
    assert before == {p: p.stat().st_mtime for p in work.rglob('*') if p.is_file()}


def test_one_run_of_a_sweep_is_the_same_run(straight, tmp_path, capsys):
    """Jobs of an array train one run each; the verb without --only then has only to add up."""
    work = tmp_path / 'work'
    argv = [*straight[1][:4], str(work), *straight[1][5:]]
    assert cli.main([*argv, '--only', '1']) == 0
    assert [p.parent.parent.name for p in work.glob('*/*/arm.json')] == ['other']
    stamp = (work / 'other' / '5' / 'ledger.jsonl').stat().st_mtime
    assert cli.main(argv) == 0
    assert answer(work) == answer(straight[0])
    assert (work / 'other' / '5' / 'ledger.jsonl').stat().st_mtime == stamp


def test_a_warm_up_may_be_longer_than_the_steps_of_the_base(asked, corpus):
    question = ablate.read(asked(arms=(('one', '--config.stages[0].warmup_steps=5'),),
                                 metrics=ASKED['metrics'][:1]))
    arm, = ablate.arms_of(question, overrides=[*pairs(corpus)])
    assert arm.steps == (6,) and arm.differences == {'stages[0].warmup_steps': (0, 5)}


@pytest.mark.slow
def test_runs_side_by_side_are_the_same_runs(straight, tmp_path, capfd):
    """Each core gets its share; what one of them cannot do, the last line tries again and says."""
    work, page = tmp_path / 'work', tmp_path / 'page.md'
    argv = [*straight[1][:4], str(work), *straight[1][5:], '--launch', 'local', '--doc', str(page)]
    assert cli.main(argv) == 0
    assert answer(work) == answer(straight[0]) and '## Does a name matter?' in page.read_text()
    assert '2 of 2 runs are done' in ''.join(capfd.readouterr())


def pretended(question, arms, work, values):
    """Results of runs of which values[arm][seed] (and per item, about it) is said to be measured.
    """
    runs = ablate.runs_of(question, arms, str(work))
    for run in runs:
        if run.seed in values[run.arm.name]:
            folder, x = pathlib.Path(run.folder), values[run.arm.name][run.seed]
            folder.mkdir(parents=True)
            (folder / 'ledger.jsonl').write_text(json.dumps(dict(
                time_s=1.79e9, event='finished', stage='pretrain', revision='abc')) + '\n')
            items = evaluate.shares(x + np.array([-.02, .01, .01]))
            (folder / 'arm.json').write_text(json.dumps(dict(
                mark=ablate._mark(question, run.arm.seeded(run.seed)[0]), measured=dict(
                    likelihood=dict(metrics={'aligned/loss/tokens': x},
                                    per_item={'aligned/loss/tokens': items})))))
    return ablate.results(question, arms, runs, {}, {})


def test_measurements_become_the_verdict(asked, corpus, tmp_path):
    """Lower is better; seeds differ by more than arms. Where one seed of an arm is missing or gave
    no number, nothing is decided."""
    question = ablate.read(asked(
        arms=(('a',), ('b',), ('c',)), seeds=(0, 1, 2, 3), expected=('a > b', 'c > a'),
        source='nobody', metrics=ASKED['metrics'][:1]))
    arms = ablate.arms_of(question, '', pairs(corpus))
    values = dict(a={0: 2.0, 1: 3.0, 2: 7.0, 3: 1.0}, b={0: 2.5, 1: 3.45, 2: 7.55},
                  c={0: 2.2, 1: 3.2, 2: 7.2, 3: 1.21})
    for last, state in ((None, 'left'), (float('nan'), 'failed: likelihood aligned/loss/tokens is '
                                                       'nan'), (1.49, 'done')):
        b = values['b'] if last is None else values['b'] | {3: last}
        found = pretended(question, arms, tmp_path / f'w{last}', values | dict(b=b))
        first, second = found['comparisons']
        assert found['arms'][1]['runs'][3]['state'] == state
        assert (first['better'], first['worse']) == ('a', 'b')
        assert first['low'] < first['difference'] < first['high'] < -.3
        # a is better: its loss is lower
        assert (first['seeds'], first['verdict']) == (
            (4, 'confirmed') if last == 1.49 else (3, 'not decided'))
    assert second['difference'] == pytest.approx(.2025) and second['seeds'] == 4
    assert second['verdict'] == found['verdict'] == 'contradicted'
    estimates = {a['name']: a['estimates']['likelihood aligned/loss/tokens']
                 for a in found['arms']}
    assert estimates['b']['by_seed'] == [2.5, 3.45, 7.55, 1.49]
    best = {x['arm']: x for x in found['against_best']}
    assert best.keys() == {'b', 'c'} and {x['best'] for x in best.values()} == {'a'}
    assert best['b']['mean'] == pytest.approx(.4975) and best['c']['mean'] == pytest.approx(.2025)
    assert best['c']['low'] == pytest.approx(.1945, abs=1e-3)
    page = tmp_path / 'page.md'
    page.write_text('# Ours\n\nAn interval of 95 % is what it was.\n\n## Another?\n\nYes.\n')
    ablate.document(found, str(page), 'again')
    text = page.read_text()
    assert verdict.RULE in text and 'what it was' not in text and '## Another?' in text
    higher = ablate.read(asked(
        arms=(('a',), ('b',)), seeds=(0, 1), metrics=(('likelihood', 'aligned/loss/tokens',
                                                       'higher'),)))
    found = pretended(higher, ablate.arms_of(higher, '', pairs(corpus)), tmp_path / 'v', dict(
        a={0: 2.0, 1: 3.0}, b={0: 2.5, 1: 3.5}))
    assert [(x['arm'], x['best']) for x in found['against_best']] == [('a', 'b')]


def test_the_best_is_of_the_same_budget(asked, corpus, tmp_path):
    question = ablate.read(asked(
        arms=(('a',), ('b',)), budget=dict(flops=(1e10, 2e10)), seeds=(0,),
        metrics=ASKED['metrics'][:1]))
    found = pretended(question, ablate.arms_of(question, '', pairs(corpus)), tmp_path / 'w', {
        'a.1e10': {0: 3.0}, 'b.1e10': {0: 2.0}, 'a.2e10': {0: 1.0}, 'b.2e10': {0: 1.5}})
    assert {(x['arm'], x['best']) for x in found['against_best']} == {
        ('a.1e10', 'b.1e10'), ('b.2e10', 'a.2e10')}


def test_a_budget_of_time_is_measured_once(asked, corpus, tmp_path, monkeypatch):
    """Who goes on spends what the first start decided, for arms not begun, too."""
    monkeypatch.setattr(ablate.arms, 'per_step', lambda config, stage, unit: .1)
    question = ablate.read(asked(budget=dict(wall_s=3.0), metrics=ASKED['metrics'][:1]))
    arms = ablate.arms_of(question, str(tmp_path), pairs(corpus))
    assert [a.steps for a in arms] == [(30,), (30,)]
    (tmp_path / 'results.json').write_text(json.dumps(ablate.results(
        question, arms, ablate.runs_of(question, arms, str(tmp_path)), {}, {})))
    monkeypatch.setattr(ablate.arms, 'per_step', lambda config, stage, unit: .2)
    again = ablate.arms_of(question, str(tmp_path), pairs(corpus))
    assert [(a.steps, a.per_step) for a in again] == [((30,), (.1,))] * 2
    with pytest.raises(ConfigError, match='was begun with a budget of 3, not 6'):
        ablate.arms_of(ablate.read(question.path, 6.0), str(tmp_path), pairs(corpus))


def test_what_items_add_gives_the_metric(straight):
    for entry in evaluate.recorded(str(straight[0] / 'one' / '5')):
        for name, x in entry.get('per_item', {}).items():
            assert sum(x['sum']) / sum(x.get('of', [1] * len(x['sum']))) == pytest.approx(
                entry['metrics'][name], rel=1e-5)


@pytest.mark.slow
def test_killed_in_mid_arm_it_ends_with_the_same_table(straight, corpus, tmp_path):
    work = tmp_path / 'work'
    argv = [*straight[1][:4], str(work), *straight[1][5:]]
    process = subprocess.Popen([sys.executable, '-m', 'jaxsd', *argv], cwd=ROOT,
                               stdout=subprocess.DEVNULL)
    metrics, limit = work / 'other' / '5' / 'metrics.jsonl', time.monotonic() + 200
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (work / 'one' / '5' / 'arm.json').exists()
    assert not (work / 'other' / '5' / 'arm.json').exists()
    assert cli.main(argv) == 0
    assert answer(work) == answer(straight[0])
    events = {arm: [e['event'] for e in rundir.read_ledger(str(work / arm / '5'))
                    if e['event'] in ('start', 'resume')] for arm in ('one', 'other')}
    assert events['one'] == ['start'] and events['other'][0] == 'start' and (
        len(events['other']) == 2)


DRAWN: list[str] = []


def noted(record, *, vocab, rng, fields: tuple = ('speech',)):
    """A layout that notes what it draws."""
    DRAWN.append(record.id)
    return flat.sequence(record, vocab=vocab, rng=rng, fields=fields)


def test_arms_that_differ_in_layout_read_the_same_records_in_the_same_order(asked, corpus):
    question = ablate.read(asked(
        base=(ASKED['base'], "--config.stages[0].data={'aligned': 1.0}"), arms=[
            (f, f"--config.data.sources.aligned.layout={{'name': 'test_ablate:noted', "
                f"'fields': ('{f}',)}}") for f in ('speech', 'text')]))
    order = []
    for arm in ablate.arms_of(question, '', pairs(corpus)):
        assert arm.same_order and arm.seeded(1)[0].seed == 1
        config = arm.seeded(0)[0]
        stage, v = stages.find(config, None), model.make_vocab(config)
        batches = data.batches(config, vars(stage), v, threads=0)
        DRAWN.clear()
        for _ in range(4 if arm.name == 'speech' else 1):
            next(batches)
        order.append(list(DRAWN))
    few = min(map(len, order))
    assert few > 5 and order[0][:few] == order[1][:few]
    assert sorted(set(order[0])) != list(dict.fromkeys(order[0]))       # not merely as stored


@pytest.mark.parametrize('changes, says', [
    (dict(arms=(('one', '--config.backbone.widht=8'),)), "arm one: --config.backbone.widht: "),
    (dict(arms=(('one', 'mixx=pairs'),)), "arm one: unknown config argument 'mixx'; legal: tiny"),
    (dict(arms=(('one', '--width=3'),)), 'arm one: --width=3: a change is --config.path=value'),
    (dict(arms=(('one',), ('one',))), 'two arms are called one'),
    (dict(arms=(('a', (('b',), ('c',))), ('a', (('b',),)))), 'two arms are called a.b'),
    (dict(arms=(('a/b',),)), "arm 'a/b' must have a plain name"),
    (dict(arms='one'), 'arms are a tuple'),
    (dict(arms=(('one', '--config.stages[0].steps=9'),)),
     'stages[0].steps would change the budget'),
    (dict(arms=(('one', '--config.seed=9'),)), "arm one: seed is decided by the question's seeds"),
    (dict(metrics=(('likelihood', 'aligned/los/tokens', 'lower'),)),
     "task likelihood has no option 'aligned/los/tokens'; did you mean 'aligned/loss/tokens'"),
    (dict(metrics=(('asrr', 'WER %', 'lower'),)),
     "config.evals has no option 'asrr'; did you mean"),
    (dict(metrics=(('asr', 'WER %', 'best'),)), "a metric is (task, name, 'higher', 'lower'"),
    (dict(budget=dict(tokens=1, flops=1)), 'budget names exactly one of tokens, audio_hours'),
    (dict(budget=dict(token=1)), "has no option 'token'; did you mean 'tokens'"),
    (dict(budget=dict(tokens=3000)), 'arm one: the budget of 3000 is no whole number of steps'),
    (dict(colour='red'), "has no option 'colour' (legal: arms, base, budget, expected"),
    (dict(base='mix=pairs'), "base begins with a config file, got 'mix=pairs'"),
    (dict(arms=(('one', '--config.backbone.attention=nope'),)),
     'arm one: backbone.attention is one of auto'),
    (dict(arms=(('one', '--config.backbone.width=-8'),)), 'arm one: '),
    (dict(metrics=5), 'metrics are a tuple, got 5'), (dict(law=5), 'law is (task, metric)'),
    (dict(seeds=([1],)), 'seeds are different'),
    (dict(budget=dict(tokens=([1],))), 'budget.tokens is a number above 0'),
    (dict(seeds=(1, 1)), 'seeds are different whole numbers'), (dict(seeds=None), 'lacks seeds'),
    (dict(expected=('one > two',)), "expected has no option 'two'"),
    (dict(law=('asr', 'WER %')), 'law is (task, metric) of one of the metrics, over a budget of'),
    (dict(question='Names matter.'), 'ends in a question mark'),
    (dict(expected=('one > one',)), "expected names an arm twice: 'one > one'"),
    (dict(items=True), 'items is a whole number above 0, got True'),
    (dict(arms=(('One',), ('one',))), 'two arms are called one'),
    (dict(budget=dict(tokens=(1228800, 1228801))), 'two arms are called other.1.2288e06'),
    (dict(budget=dict(tokens=10 ** 400)), 'budget.tokens is a number above 0'),
    (dict(metrics=(('asr', 'WER %', 'lower'), ('asr', 'WER %', 'higher'))), 'is named twice'),
    (dict(expected=('one > other', 'other > one')), 'expected goes round in a circle: '),
    (dict(arms=(('one', '--config.evals.asr.source=nope'),)),
     "arm one: evals.asr: data.sources has no option 'nope'"),
    (dict(arms=(('one', "--config.evals.likelihood.sources=('nope',)"),)),
     "task likelihood has no option 'aligned/loss/tokens'"),
    (dict(arms=(('results', (('json',),)),)), 'no arm can be called'),
    (dict(arms=(('results.json',),)), 'must have a plain name'),
    (dict(arms=(('x' * 101,),)), 'of up to 100 letters'), (dict(arms=(('one', ''),)), 'an arm is'),
    (dict(arms=(('one', '--config.vocab.tokenizer=/nope'),)), 'arm one: '),
    (dict(arms=(('one', '--config.mesh.fsdp=3'),)), 'arm one: mesh'),
    (dict(arms=(('one', '--config.stages[0].start=nope'),)), 'arm one: '),
    (dict(arms=(('one', '--config.evals.likelihood.batch=0'),)), 'arm one: evals.likelihood'),
    (dict(source=''), 'expected needs a source'), (dict(items=0), 'items is a whole number')])
def test_a_bad_question_ends_in_one_line_before_anything_runs(asked, corpus, tmp_path, capsys,
                                                              changes, says):
    work = tmp_path / 'work'
    assert cli.main(['ablate', '--sweep', asked(**changes), '--workdir', str(work),
                     *on(corpus)]) == 1
    said = capsys.readouterr().err
    assert says in said and said.count('\n') == 1 and said.startswith('jaxsd ablate: ')
    assert not work.exists()


def test_an_arm_that_fails_does_not_stop_the_others(asked, corpus, tmp_path, capsys):
    bad = ('bad', *(f'--config.stages[0].{x}' for x in ('lr=1e30', 'bad_steps=1', 'clip=1e30')))
    path, work = asked(arms=(bad, ('good',)), budget=dict(tokens=2 * 2048), seeds=(0,),
                       metrics=ASKED['metrics'][:1]), tmp_path / 'work'
    assert cli.main(['ablate', '--sweep', path, '--workdir', str(work), *on(corpus)]) == 1
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and '1 of 2 runs failed; arm bad, seed 0 failed: ' in said
    states = {a['name']: a['runs'][0]['state'] for a in ablate.read_results(str(work))['arms']}
    assert states['good'] == 'done' and states['bad'].startswith('failed: ')
    assert ablate.read_results(str(work))['verdict'] == 'no ordering was expected'


@pytest.fixture
def demo(corpus, tmp_path, monkeypatch):
    """A directory in which `data/demo` is the small corpus."""
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'demo').symlink_to(corpus)
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('path', SHIPPED, ids=lambda p: p.stem)
def test_what_is_shipped_resolves(path, demo):
    question = ablate.read(f'configs/ablations/{path.name}')
    assert question.question.endswith('?') and question.limits and len(question.arms) > 1
    if question.unit == 'tokens':       # what the others cost takes longer to count
        arms = ablate.arms_of(question)
        assert sum(not a.differences for a in arms) <= 1
        for arm in arms:
            spent = sum(n * c for n, c in zip(arm.steps, arm.per_step, strict=True))
            assert spent == pytest.approx(arm.budget, rel=ROUNDED)
            assert f'arm {arm.name}: ' in ablate.described(question, arms)


@pytest.mark.slow
@pytest.mark.parametrize('path', SHIPPED, ids=lambda p: p.stem)
def test_what_is_shipped_resolves_by_any_budget(path, demo):
    question = ablate.read(f'configs/ablations/{path.name}')
    # Published sizes read a corpus of the user's own: here it is the demo's.
    own = () if path.stem != 'isoflop_pod' else (
        ('data.path', parts.DEMO), ('codec', repr(parts.demo_units())),
        *((f'vocab.{k}', str(v)) for k, v in parts.DEMO_TEXT.items()),
        *((f'data.sources.{name}.select', "('story',)") for name in ('aligned', 'speech')))
    arms = ablate.arms_of(question, overrides=own)
    assert len(arms) == len(question.arms)
    for arm in arms:
        model.abstract(arm.config)
        assert all(n >= 20 for n in arm.steps), arm.steps


# Jobs.

def test_jobs_are_those_of_the_launchers(asked, corpus, tmp_path, capsys, monkeypatch):
    path, work = asked(), tmp_path / 'work'
    common = ['ablate', '--sweep', path, '--workdir', str(work), *on(corpus)]
    assert cli.main([*common, '--launch', 'slurm', '--dry-run', '--budget', '4096']) == 0
    array, last = capsys.readouterr().out.splitlines()[-2:]
    assert '--array=0-1 launch/slurm.sbatch ablate --sweep' in array and '--budget=4096.0' in array
    assert array.endswith('--only SLURM_ARRAY_TASK_ID)') and 'afterany:$job' in last
    assert cli.main([*common, '--launch', 'local', '--dry-run', '--budget', '4096']) == 0
    here, last = capsys.readouterr().out.splitlines()[-2:]
    cores = sorted(os.sched_getaffinity(0))[:2]
    assert here == ''.join(f'taskset -c {c} {last} --only {share} & ' for c, share in zip(
        cores, ('0', '1') if cores[1:] else ('0,1',), strict=True)) + 'wait'
    assert shlex.split(last)[1:3] == ['-m', 'jaxsd']
    (tmp_path / 'a|b&c\\d "e"').symlink_to(corpus)
    odd = f'--config.data.path={tmp_path}' + '/a|b&c\\d "e"'
    assert cli.main([*common, odd, '--launch', 'gke', '--dry-run']) == 0
    *_, line, last_line = capsys.readouterr().out.splitlines()
    words = shlex.split(line)
    assert {'HOSTS=1', f'CONFIG={path}', 'NAME=naming-other-1'} <= set(words)
    assert last_line.startswith('# when all have ended')
    sed, text = words[words.index('sed') + 1], (ROOT / 'launch' / 'gke.yaml').read_text()
    for name, value in (w.split('=', 1) for w in words if re.match('[A-Z]+=', w)):
        text = text.replace(f'${{{name}}}', value)      # as envsubst does
    text = subprocess.run(['sed', sed], input=text, capture_output=True, text=True,
                          check=True).stdout
    command = re.search(r'command: (\[.*\])', text)[1]
    assert yaml.safe_load(command)[3:] == ['ablate', *on(corpus), odd, '--only', '1', '--sweep',
                                           path, '--workdir', str(work)]
    assert cli.main([*common, '--launch', 'gke', '--doc', 'x.md']) == 1
    assert '--doc: with --launch there is no answer yet' in capsys.readouterr().err
    lines = ablate.jobs('gke', ablate.read(asked(arms=(('a_b',), ('a-b',), ('c' * 80,)))), 'w', [
        ablate.Run(types.SimpleNamespace(name=n), 0, '') for n in ('a_b', 'a-b', 'c' * 80)], [])
    names = [re.search('NAME=([a-z0-9-]+) ', line)[1] for line in lines[:-1]]
    assert len(set(names)) == 3 and max(map(len, names)) < 50
    monkeypatch.setenv('PATH', os.path.dirname(shutil.which('bash')))
    assert cli.main([*common[:2], asked(), *common[3:], '--launch', 'slurm']) == 1
    assert '--launch slurm: a line of it failed with status 127' in capsys.readouterr().err
    timed = asked(budget=dict(wall_s=5.0))
    with pytest.raises(ConfigError, match='every job would measure for itself'):
        ablate.jobs('slurm', ablate.read(timed), 'w', [], [])
    assert not work.exists()


def test_who_is_asked_to_stop_asks_what_it_launched(tmp_path):
    """Each of them ends in its own time, and what would follow them does not begin."""
    each = (f"{sys.executable} -c 'import signal, sys, time; signal.signal(signal.SIGTERM,"
            " lambda *_: (time.sleep(.5), open(sys.argv[1] + \".saved\", \"w\"), sys.exit(0)));"
            " open(sys.argv[1], \"w\"); time.sleep(60)'")
    lines = [' & '.join(f'{each} {tmp_path}/{n}' for n in 'ab') + ' & wait', f'touch {tmp_path}/no']
    code = f'from jaxsd import cli; cli._launched("local", {lines!r})'
    parent = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT)
    until = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < until:
        time.sleep(.1)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(20) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'a.saved', 'b', 'b.saved']


# Numbers.

def test_a_budget_is_spent_in_proportion_and_never_silently_changed():
    assert whole_steps(1000, [10], [10.0]) == (100,)
    assert whole_steps(1000, [300, 100], [1.0, 2.0]) == (600, 200)
    assert whole_steps(103, [7], [1.0]) == (103,)
    assert whole_steps(10, [20, 5], [0.0, 1.0]) == (40, 10)     # a stage of text hears nothing
    with pytest.raises(ConfigError, match='no stage hears anything'):
        whole_steps(10, [20, 5], [0.0, 0.0])
    with pytest.raises(ConfigError, match='no whole number of steps: the nearest, 1, would spend'):
        whole_steps(1.4, [7], [1.0])


def test_intervals_against_closed_forms():
    from scipy import stats
    for n, t in enumerate(verdict.T_975, start=1):
        assert t == pytest.approx(stats.t.ppf(.975, n), abs=1e-3)
    values = [1.0, 1.5, 2.6]
    mean, low, high = verdict.interval(values, None)
    exact = stats.t.interval(.95, 2, np.mean(values), stats.sem(values))
    assert (mean, low, high) == pytest.approx((np.mean(values), *exact), rel=1e-3)
    x = np.random.default_rng(1).normal(5, 2, 400)
    draws = verdict.redrawn([evaluate.shares(x)] * 2)
    mean, low, high = verdict.interval([x.mean()] * 2, draws)
    half = 1.96 * x.std() / 20
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=.1 * half)
    w = np.random.default_rng(2).integers(3, 9, 400)    # a rate, by the delta method
    draws = verdict.redrawn([evaluate.shares(x * w, w)])
    rate = (x * w).sum() / w.sum()
    half = 1.96 * np.sqrt((w ** 2 * (x - rate) ** 2).mean()) / w.mean() / 20
    assert np.percentile(draws, [2.5, 97.5]) == pytest.approx([rate - half, rate + half],
                                                              abs=.1 * half)
    assert verdict.interval([3.0], None) == (3.0, None, None)
    assert verdict.redrawn([None, evaluate.shares(x)]) is None


def test_items_are_drawn_alike_for_all_arms():
    """A difference that is the same for every item has no luck of items in it."""
    x = np.random.default_rng(1).normal(5, 2, 100)
    a, b = verdict.redrawn([evaluate.shares(x)]), verdict.redrawn([evaluate.shares(x + 1)])
    assert np.ptp(b - a) < 1e-6 < np.ptp(a)


def test_a_difference_is_better_minus_worse_of_the_same_seeds():
    rng = np.random.default_rng(3)
    worse = rng.normal(60, 9, (3, 200)) + np.array([[0.], [20.], [-20.]])      # seeds differ much
    better = worse + 2 + rng.normal(0, .1, worse.shape)
    a, b = ([(x.mean(), evaluate.shares(x)) for x in found] for found in (better, worse))
    mean, low, high = verdict.difference(a, b)
    assert mean == pytest.approx(2, abs=.05) and 1.9 < low < 2 < high < 2.1
    swapped = verdict.difference(b, a)
    assert swapped == pytest.approx((-mean, -high, -low), abs=1e-9)
    assert verdict.of_difference(low, high, seeds=3, better='higher') == 'confirmed'
    # Seeds are no longer beside themselves, or items: what is common to both no longer cancels.
    _, low, high = verdict.difference(a, [b[2], b[0], b[1]])
    assert low < 0 < high
    turned = [(x.mean(), evaluate.shares(x)) for x in worse[:, ::-1]]
    _, low, high = verdict.difference(a, turned)
    assert high - low > 1
    assert verdict.difference(a[:1], [(1.0, None)]) == (a[0][0] - 1, None, None)
    # Other items, or of one seed others, and ties of seeds without items.
    fewer = [(x.mean(), evaluate.shares(x)) for x in worse[:, :-1]]
    for other in (fewer, [*b[:2], fewer[2]], [*b[:2], (b[2][0], None)]):
        mean, low, high = verdict.difference(a, other)
        assert abs(mean - 2) < 3 and low is None is high
    assert verdict.difference([(61., None)] * 2, [(60., None)] * 2) == (1.0, None, None)
    assert verdict.difference([(61., None), (62., None)], [(60., None)] * 2)[1] is not None


def test_a_share_of_items_stays_between_0_and_100():
    found = [(90.0, evaluate.shares([100.] * 9 + [0.])), (99.0, evaluate.shares([99.] * 10))]
    free, cut = verdict.estimate(found), verdict.estimate(found, percent=True)
    assert free['high'] > 100 == cut['high'] and cut['low'] == free['low'] == max(0, free['low'])
    rates = [(x, evaluate.shares([x], [1])) for x in (90., 130.)]   # words inserted: above 100
    assert verdict.estimate(rates, percent=True) == verdict.estimate(rates)
    assert cut['by_seed'] == [90.0, 99.0] and cut['seeds'] == 2


@pytest.mark.parametrize('low, high, better, says', [
    (.1, .3, 'higher', 'confirmed'), (.1, .3, 'lower', 'contradicted'),
    (-.3, -.1, 'lower', 'confirmed'), (-.1, .3, 'higher', 'not decided'),
    (None, None, 'higher', 'not decided'), (0.0, 0.0, 'higher', 'not decided')])
def test_the_rule(low, high, better, says):
    assert verdict.of_difference(low, high, seeds=3, better=better) == says
    assert verdict.of_difference(low, high, seeds=1, better=better) == 'not decided'


def test_the_whole_verdict():
    yes, no, open_ = 'confirmed', 'contradicted', 'not decided'
    assert verdict.overall([yes, yes]) == yes and verdict.overall([yes, no, open_]) == no
    assert verdict.overall([yes, open_]) == 'not decided at this budget'


def test_a_law_against_one_that_is_known():
    """The best size grows as C^0.6, on parabolas: loss = (ln N - 0.6 ln C - 1)^2 + 5 / ln C."""
    def loss(size, flops):
        return (np.log(size) - .6 * np.log(flops) - 1) ** 2 + 5 / np.log(flops)
    points = [(c, float(n), c / (6 * n), loss(n, c)) for c in (1e12, 4e12, 1.6e13)
              for n in np.exp(.6 * np.log(c) + 1 + np.array([-1.5, -.5, .6, 1.4]))]
    found = verdict.law(points)
    assert found['exponents'] == pytest.approx(dict(parameters=.6, positions=.4), rel=1e-6)
    assert found['optima'][1]['parameters'] == pytest.approx(np.e * 4e12 ** .6, rel=1e-6)
    assert found['optima'][1]['loss'] == pytest.approx(5 / np.log(4e12), rel=1e-6)
    assert verdict.law([p for p in points if p[0] == 1e12])['exponents'] is None
    monotone = [(c, n, c / n, n) for c in (1e12, 2e12) for n in (1., 2., 3.)]
    assert verdict.law(monotone)['optima'] == []


def test_several_budgets_make_an_arm_for_each(asked):
    question = ablate.read(asked(budget=dict(flops=(1e12, 4e12)), expected=None,
                                 law=('likelihood', 'aligned/loss/tokens')))
    assert [(n, b) for n, _, b in question.arms] == [
        ('one.1e12', 1e12), ('other.1e12', 1e12), ('one.4e12', 4e12), ('other.4e12', 4e12)]

# SPDX-License-Identifier: Apache-2.0
"""The survey's claims in small, as experiments that print their figures. Slow: `make test-all`.

Each trains demo-sized models on data/demo (built where it is missing) by the same commands that a
user types, and compares numbers from the same code, data, seed and number of tokens.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time

import pytest

from jaxsd import config as configs
from jaxsd import data, model
from jaxsd import stage as stages

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
pytestmark = pytest.mark.slow


def run(*argv):
    """`python -m ...` as a user runs it, on one device."""
    env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
    subprocess.run([sys.executable, '-m', *argv], check=True, cwd=ROOT, env=env)


@pytest.fixture(scope='module')
def demo():
    if not os.path.exists(os.path.join(ROOT, 'data/demo/manifest.json')):
        run('data_pipelines.demo', '--out', 'data/demo', '--hours', '16')


@pytest.mark.usefixtures('demo')
@pytest.mark.parametrize('spec, stage', [('spirit_lm', 'pretrain'), ('moshi', 'listen'),
                                         ('moshi', 'duplex')])
def test_the_host_keeps_up(spec, stage, tmp_path):
    """Waiting for data and handing over steps: under 2 % of a demo's step on an idle machine. The
    pipeline alone, in one process, could feed five of its steps at once."""
    index = ['listen', 'duplex'].index(stage) if spec == 'moshi' else 0
    run('jaxsd', 'train', '--config', f'configs/{spec}.py:demo', '--workdir', str(tmp_path / 'run'),
        '--stage', stage, f'--config.stages[{index}].steps=60',
        f'--config.stages[{index}].warmup_steps=10', f'--config.stages[{index}].start=init',
        f'--config.stages[{index}].probe_steps=0')
    with open(tmp_path / 'run' / 'metrics.jsonl') as f:
        lines = [e for e in map(json.loads, f) if 'step_s' in e]
    shares = [e['data_wait_fraction'] + e['dispatch_fraction'] for e in lines][1:]
    print(f'{spec} {stage}: {100 * statistics.median(shares):.2f} % of '
          f'{lines[-1]["step_s"]:.3f} s per step')
    assert statistics.median(shares) < 0.02
    c = configs.read(os.path.join(ROOT, f'configs/{spec}.py:demo'))
    c.data.path = os.path.join(ROOT, c.data.path)
    drawn = data.batches(c, dataclasses.asdict(stages.find(c, stage)), model.make_vocab(c))
    with contextlib.closing(drawn):
        next(drawn)
        began, count = time.perf_counter(), 30
        for _ in range(count):
            next(drawn)
        times = lines[-1]['step_s'] * count / (time.perf_counter() - began)
    print(f'{spec} {stage}: batches are drawn {times:.1f} times as fast as steps take them')
    assert times >= 5


@pytest.mark.usefixtures('demo')
def test_interleaving_joins_the_modalities(tmp_path):
    """Spirit-LM Table 4: interleaved training beats pairs and single modalities across modalities.

    Only the mixture differs. The second sentence of unseen stories is scored given the first one in
    the other modality: mean nats per token, and how often the true one is the likelier. (After so
    few steps the latter can be equal in one direction; over both it is not.)
    """
    found = {}
    for mix in ('interleaved', 'pairs', 'unimodal'):
        config, work = f'configs/spirit_lm.py:demo,mix={mix}', str(tmp_path / mix)
        run('jaxsd', 'train', '--config', config, '--workdir', work,
            '--config.stages[0].steps=250', '--config.stages[0].probe_steps=0')
        run('jaxsd', 'evaluate', '--config', config, '--workdir', work, '--tasks', 'stories',
            '--config.stages[0].steps=250', '--config.stages[0].probe_steps=0')
        with open(os.path.join(work, 'evaluation.json')) as f:
            found[mix] = json.load(f)[0]['metrics']
    for mix, metrics in found.items():
        print(mix, {k: round(v, 3) for k, v in metrics.items()})
    ways = ('S->T', 'T->S')
    for other in ('pairs', 'unimodal'):
        for way in ways:
            assert found['interleaved'][f'nats/{way}'] < found[other][f'nats/{way}'], (way, other)
        assert (sum(found['interleaved'][f'right %/{way}'] for way in ways)
                > sum(found[other][f'right %/{way}'] for way in ways)), other


TALK = dict(name='duplex', steps=1440, batch=8, lr=3e-3, schedule='cosine', warmup_steps=20,
            final_lr=0.05, weight_decay=0.05, data=dict(dialogue=1.0), save_steps=240, log_steps=20)


def test_who_has_heard_interruptions_gives_way_and_answers(tmp_path):
    """Moshi §4.2, 4.4: a model that is to be interrupted should have heard interruptions.

    Two corpora of 14 hours of simulated dialogues, of the same voices and gaps; in one every second
    turn that can be is broken into (the last cannot, nor one that breaks in). Both models are
    measured on the held-out dialogues of a third, in which the listener also murmurs, and whose
    callers are played. Who is interrupted should stop, wait and answer (success), have the floor
    when the caller has ended (takeover, as Full-Duplex-Bench measures it), and go on while one
    murmurs. Who has heard no overlap falls silent at any sound of the caller.
    """
    clean, talk = tmp_path / 'clean', tmp_path / 'talk'
    run('data_pipelines.demo', '--out', str(clean), '--hours', '2', '--keep-wav')
    for name, interruption, backchannel in (('interruptions', '0.5', '0'), ('none', '0', '0'),
                                            ('played', '0.5', '0.5')):
        run('data_pipelines.simulate', '--source', str(clean), '--out', str(tmp_path / name),
            '--hours', '14', '--seed', '1', '--fto', '0.4', '0.1', '--pause', '0',
            '--interruption', interruption, '--backchannel', backchannel, '--mine', 'voice=en-us')
    found = {}
    for name in ('interruptions', 'none'):
        os.symlink(tmp_path / name, talk)
        argv = ['--config', 'configs/moshi.py:demo', '--workdir', str(tmp_path / f'run-{name}'),
                f'--config.data.path={talk}', f'--config.codec.path={talk}/codec.safetensors',
                f'--config.vocab.tokenizer={talk}/text.model', f'--config.stages=({TALK!r},)',
                "--config.data.sources.dialogue.select=('simulated',)",
                "--config.evals={'turns': {'name': 'turn_taking', 'source': 'dialogue'}}"]
        run('jaxsd', 'train', *argv)
        os.unlink(talk)
        os.symlink(tmp_path / 'played', talk)
        run('jaxsd', 'evaluate', *argv, '--tasks', 'turns')
        os.unlink(talk)
        with open(tmp_path / f'run-{name}' / 'evaluation.json') as f:
            found[name] = json.load(f)[0]['metrics']
        print(name, {k: round(v, 3) for k, v in found[name].items()
                     if 'interruption' in k or 'murmur' in k})
    for kind in ('interruption', 'murmur'):
        assert all(x.get(f'events/{kind}', 0) >= 200 for x in found.values()), kind
    for metric in ('success %/interruption', 'takeover %/interruption', 'went on %/murmur'):
        (p, n), (q, m) = ((found[name][metric] / 100, found[name][f'events/{metric.split("/")[1]}'])
                          for name in ('interruptions', 'none'))
        assert p - q > 2 * (p * (1 - p) / n + q * (1 - q) / m) ** 0.5, metric

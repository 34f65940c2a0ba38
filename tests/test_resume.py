# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment, a run goes on to the same bits; shared by processes, it is the same run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from small import virtual

from jaxsd import checkpoint, goodput, journal

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STEPS = 24


def command(system, corpus, work, *options):
    codec = 'units' if system == 'spirit_lm' else 'codec'
    return [sys.executable, '-m', 'jaxsd', 'train', '--config', f'configs/{system}.py:tiny',
            '--workdir', str(work), f'--config.data.path={corpus}',
            f'--config.vocab.tokenizer={corpus}/text.model',
            f'--config.codec.path={corpus}/{codec}.safetensors', *options]


def quick(system, steps=STEPS):
    """Several sources in every batch, a checkpoint every fourth step, every step logged."""
    mix = ("{'aligned': 0.5, 'asr': 0.3, 'speech': 0.2}" if system == 'spirit_lm'
           else "{'stories': 0.5, 'users': 0.5}")
    return (f'--config.stages[0].steps={steps}', '--config.stages[0].save_steps=4',
            '--config.stages[0].lr=0.003', f'--config.stages[0].data={mix}',
            *(('--stage', 'listen') if system == 'moshi' else ()))


def environment(devices=1, **more):
    return os.environ | {'XLA_FLAGS': virtual(devices)} | more


def losses(work) -> dict[int, float]:
    path, out = os.path.join(work, 'metrics.jsonl'), {}
    if os.path.exists(path):
        with open(path) as f:
            for line in f:
                if line.endswith('\n') and 'loss' in (entry := json.loads(line)):
                    assert entry['step'] not in out, 'a step was logged twice'
                    out[entry['step']] = entry['loss']
    return out


@pytest.mark.parametrize('system', ('spirit_lm',
                                    pytest.param('moshi', marks=pytest.mark.slow)))
def test_killed_and_resumed_is_the_same_run_to_the_bit(system, corpus, tmp_path):
    """kill -9 in mid-run, with packing and mixing: losses and parameters are bit-identical."""
    straight, broken = tmp_path / 'straight', tmp_path / 'broken'
    run = dict(cwd=ROOT, env=environment(), check=True, stdout=subprocess.DEVNULL)
    subprocess.run(command(system, corpus, straight, *quick(system)), **run)

    process = subprocess.Popen(command(system, corpus, broken, *quick(system)), cwd=ROOT,
                               env=environment(), stdout=subprocess.DEVNULL)
    stage = 'pretrain' if system == 'spirit_lm' else 'listen'
    folder = checkpoint.folder_of(str(broken), stage)
    limit = time.monotonic() + 120
    while not (checkpoint.steps(folder) and max(losses(broken), default=0) >= 6):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at = max(losses(broken))
    assert killed_at < STEPS, 'the run was over before it was killed'
    subprocess.run(command(system, corpus, broken, *quick(system)), **run)

    assert losses(broken) == losses(straight)
    assert sorted(losses(straight)) == list(range(1, STEPS + 1))
    a, b = (checkpoint.read_meta(checkpoint.folder_of(str(w), stage)) for w in (straight, broken))
    assert a['step'] == b['step'] == STEPS
    assert a['leaves'] == b['leaves']       # shapes, dtypes and checksums of every array
    ledgers = []
    for work in (straight, broken):
        with open(work / 'ledger.jsonl') as f:
            ledgers.append([json.loads(line) for line in f])
    assert [e['event'] for e in ledgers[1] if e['event'] in ('start', 'resume')] == ['start',
                                                                                    'resume']
    consumed = [[e['consumed'] for e in ledger if e['event'] == 'consumed'][-1]
                for ledger in ledgers]
    assert consumed[0] == consumed[1] and len(consumed[0]) == (3 if system == 'spirit_lm' else 2)
    told = goodput.account(ledgers[1], journal.last_seen_s(str(broken)))
    assert sum(told.values()) == pytest.approx(
        ledgers[1][-1]['time_s'] - ledgers[1][0]['began_s'], abs=0.01)
    assert min(told[k] for k in ('stepping', 'init', 'restore', 'save', 'idle', 'lost')) > 0
    assert goodput.account(ledgers[0])['lost'] == goodput.account(ledgers[0])['idle'] == 0
    print(f'{system}: killed after step {killed_at}; {STEPS} losses and '
          f'{len(a["leaves"])} arrays identical to the bit')


def start(count, corpus, work, log, *options):
    """`count` processes over gloo that share one run, a device each; their errors go to `log`.i."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    out = []
    for i in range(count):
        with open(f'{log}.{i}', 'w') as f:
            out.append(subprocess.Popen(
                command('spirit_lm', corpus, work, *options), cwd=ROOT, stdout=f, stderr=f,
                env=environment(1, JAXSD_COORDINATOR=f'127.0.0.1:{port}',
                                JAXSD_PROCESSES=str(count), JAXSD_PROCESS_INDEX=str(i))))
    return out


def wait_for(step, work, processes, limit_s=240):
    limit = time.monotonic() + limit_s
    while max(losses(work), default=0) < step:
        assert not any(p.poll() for p in processes) and time.monotonic() < limit
        time.sleep(0.005)


def alone(corpus, work, *options, devices=2):
    subprocess.run(command('spirit_lm', corpus, work, *options), cwd=ROOT, check=True,
                   env=environment(devices), stdout=subprocess.DEVNULL)
    return losses(work)


def same_losses(a, b, steps):
    assert sorted(a) == sorted(b) == list(range(1, steps + 1))
    assert max(abs(a[k] - b[k]) for k in a) < 1e-5


@pytest.mark.slow
def test_two_processes_are_one_run(corpus, tmp_path):
    """Real processes over gloo: the losses of one process with as many devices."""
    options = quick('spirit_lm', steps=6)
    both = start(2, corpus, tmp_path / 'two', tmp_path / 'log', *options)
    assert [p.wait(timeout=240) for p in both] == [0, 0]
    same_losses(losses(tmp_path / 'two'), alone(corpus, tmp_path / 'one', *options), 6)


@pytest.mark.slow
def test_processes_stop_together_and_miss_the_lost(corpus, tmp_path):
    """One hears SIGTERM: both save one step and leave with 0. One is killed with -9: the other is
    gone within a minute and says who is missing. The same command goes on each time, and all the
    steps together are those of a run that nothing happened to."""
    work, steps = tmp_path / 'run', 120
    options = quick('spirit_lm', steps)
    folder = checkpoint.folder_of(str(work), 'pretrain')

    both = start(2, corpus, work, tmp_path / 'stopped', *options)
    wait_for(3, work, both)
    both[1].terminate()
    assert [p.wait(timeout=120) for p in both] == [0, 0]
    stopped = [json.loads(line) for line in (work / 'ledger.jsonl').open()][-1]
    assert stopped['event'] == 'stopped' and stopped['step'] == checkpoint.steps(folder)[-1]
    assert stopped['step'] < steps

    for victim in (1, 0):
        log = tmp_path / f'killed-{victim}'
        before = max(losses(work))
        both = start(2, corpus, work, log, *options)
        wait_for(before + 5, work, both)
        both[victim].kill()
        killed = time.monotonic()
        other = both[1 - victim]
        status = other.wait(timeout=60)
        print(f'process {1 - victim} left {time.monotonic() - killed:.1f} s after process '
              f'{victim} was killed, with {status}')
        said = (tmp_path / f'killed-{victim}.{1 - victim}').read_text()
        assert status == 75, said
        assert f'no answer from process {victim} of 2 (pid {both[victim].pid} on ' in said
    same_losses(alone(corpus, work, *options), alone(corpus, tmp_path / 'one', *options), steps)
    told = [json.loads(line)['event'] for line in (work / 'ledger.jsonl').open()]
    assert [e for e in told if e in ('start', 'resume', 'stopped', 'finished')] == [
        'start', 'stopped', 'resume', 'resume', 'resume', 'finished']


@pytest.mark.slow
def test_saved_by_two_goes_on_with_any_number(corpus, tmp_path):
    """1, 2, 4 and 8 processes resume what two saved: the same batches, the same global losses."""
    options = quick('spirit_lm', steps=12)
    saved = tmp_path / 'saved'
    both = start(2, corpus, saved, tmp_path / 'log', *options)
    wait_for(1, saved, both)
    folder = checkpoint.folder_of(str(saved), 'pretrain')
    while not checkpoint.steps(folder):
        time.sleep(0.002)
    for p in both:
        p.kill()
    for p in both:
        p.wait()
    assert checkpoint.steps(folder)[-1] < 12
    straight = alone(corpus, tmp_path / 'one', *options)
    for count in (1, 2, 4, 8):
        work = tmp_path / f'on-{count}'
        shutil.copytree(saved, work)
        some = start(count, corpus, work, tmp_path / f'log-{count}', *options)
        assert [p.wait(timeout=500) for p in some] == [0] * count
        same_losses(losses(work), straight, 12)
        told = [json.loads(line) for line in (work / 'ledger.jsonl').open()]
        [resumed] = [e for e in told if e['event'] == 'resume']
        assert resumed['processes'] == count and resumed['step'] in (4, 8)


@pytest.mark.parametrize(('number', 'status'), ((signal.SIGTERM, 0), (signal.SIGINT, 130)))
def test_terminated_saves_and_goes_on(corpus, tmp_path, number, status):
    """SIGTERM: the step in hand is saved, the exit status is 0, the same command finishes. So does
    Ctrl-C, whose exit status tells a script not to go on."""
    work = tmp_path / 'run'
    options = (*quick('spirit_lm', 400), '--config.stages[0].save_steps=1000')
    process = subprocess.Popen(command('spirit_lm', corpus, work, *options), cwd=ROOT,
                               env=environment(), stdout=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while max(losses(work), default=0) < 3:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.005)
    process.send_signal(number)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == status and 'asked to stop: saved step' in said
    saved = checkpoint.steps(checkpoint.folder_of(str(work), 'pretrain'))
    assert len(saved) == 1 and 3 <= saved[0] < 400
    assert max(losses(work)) == saved[0]
    told = [json.loads(line) for line in (work / 'ledger.jsonl').open()][-1]
    assert told['event'] == 'stopped' and told['step'] == saved[0]

# SPDX-License-Identifier: Apache-2.0
"""Does launch/slurm.sbatch train on two nodes, go on after a stop and after a kill, and finish?

Runs on the cluster of cluster.sh, a real Slurm on this machine: make test-slurm.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from jaxsd import goodput, journal
from jaxsd import run as rundir

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 100
pytestmark = pytest.mark.slurm


def options(corpus, work):
    return ['train', '--config', 'configs/spirit_lm.py:tiny', '--workdir', str(work),
            f'--config.data.path={corpus}', f'--config.vocab.tokenizer={corpus}/text.model',
            f'--config.codec.path={corpus}/units.safetensors', f'--config.stages[0].steps={STEPS}',
            '--config.stages[0].save_steps=10']


def losses(work) -> dict[int, float]:
    path = work / 'metrics.jsonl'
    lines = path.read_text().splitlines(keepends=True) if path.exists() else ()
    entries = [json.loads(line) for line in lines if line.endswith('\n')]
    return {e['step']: e['loss'] for e in entries if 'loss' in e}


def job(number: str) -> dict[str, str]:
    out = subprocess.run(['scontrol', '--oneliner', 'show', 'job', number], text=True,
                         capture_output=True, check=True).stdout
    return dict(word.split('=', 1) for word in out.split() if '=' in word)


def wait_for(what, number, log, limit_s=420):
    limit = time.monotonic() + limit_s
    while not what():
        state = job(number)['JobState']
        said = log.read_text()[-3000:] if log.exists() else ''
        assert state not in ('FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL'), f'{state}\n{said}'
        assert time.monotonic() < limit, f'{state}\n{said}'
        time.sleep(0.1)


def process(number: str, index: int) -> int:
    """The pid of process `index` of a job."""
    for folder in pathlib.Path('/proc').glob('[0-9]*'):
        try:
            words = (folder / 'environ').read_bytes().split(b'\0')
            command = (folder / 'cmdline').read_bytes().split(b'\0')
        except OSError:
            continue
        if (f'SLURM_JOB_ID={number}'.encode() in words and b'jaxsd' in command
                and f'SLURM_PROCID={index}'.encode() in words and command[1] == b'-m'):
            return int(folder.name)
    raise AssertionError(f'job {number} has no process {index}')


def test_two_nodes_stop_die_and_finish(corpus, tmp_path):
    assert 'SLURM_CONF' in os.environ, 'no cluster here: run make test-slurm'
    work, log = tmp_path / 'run', tmp_path / 'log'
    number = subprocess.run(
        ['sbatch', '--parsable', '--nodes=2', '--ntasks-per-node=1', '--gpus-per-node=0',
         '--cpus-per-task=1', f'--output={log}', 'launch/slurm.sbatch', *options(corpus, work)],
        cwd=ROOT, check=True, text=True, capture_output=True, env=os.environ | dict(
            PYTHON=sys.executable, XLA_FLAGS='--xla_force_host_platform_device_count=1')
    ).stdout.strip()

    def restarted(times):
        return lambda: int(job(number)['Restarts']) >= times

    # As Slurm does before the time limit and before it gives the nodes to another job.
    wait_for(lambda: max(losses(work), default=0) >= 4, number, log)
    subprocess.run(['scancel', '--signal=TERM', number], check=True)
    wait_for(restarted(1), number, log)
    told = [json.loads(line) for line in (work / 'ledger.jsonl').open()]
    assert told[-1]['event'] == 'stopped' and told[0]['processes'] == 2
    stopped = told[-1]['step']
    assert max(losses(work)) == stopped < STEPS
    assert f'asked to stop: saved step {stopped} ' in log.read_text()

    wait_for(lambda: max(losses(work)) >= stopped + 14, number, log)
    victim = process(number, 1)
    os.kill(victim, signal.SIGKILL)
    wait_for(restarted(2), number, log)
    said = log.read_text()
    assert re.search(rf'process 0 of 2 stops: no answer from process 1 of 2 \(pid {victim} on', said
                     ) or re.search(r'task 1: Killed', said), said[-3000:]

    wait_for(lambda: job(number)['JobState'] == 'COMPLETED', number, log)
    told = [json.loads(line) for line in (work / 'ledger.jsonl').open()]
    assert [e['event'] for e in told if e['event'] in ('start', 'resume', 'stopped', 'finished')
            ] == ['start', 'stopped', 'resume', 'resume', 'finished']
    one = tmp_path / 'one'
    subprocess.run([sys.executable, '-m', 'jaxsd', *options(corpus, one)], cwd=ROOT, check=True,
                   env=os.environ | dict(XLA_FLAGS='--xla_force_host_platform_device_count=2'))
    a, b = losses(work), losses(one)
    assert sorted(a) == sorted(b) == list(range(1, STEPS + 1))
    assert max(abs(a[k] - b[k]) for k in a) < 1e-5
    told = rundir.read_ledger(str(work))
    seconds = goodput.account(told)
    assert sum(seconds.values()) == pytest.approx(told[-1]['time_s'] - told[0]['began_s'], abs=0.01)
    assert seconds['lost'] > 0 and seconds['idle'] > 0
    print(f'job {number}: stopped after step {stopped}, process 1 killed, {STEPS} losses as of one '
          f'process\n{journal.rounded(seconds)}, goodput {goodput.share(seconds):.3f}; at a '
          'failure every 3 h (goodput, seconds between checkpoints): '
          f'{goodput.forecast(told, failure_every_s=10_800, idle_s=40.0)}')
    print([{k: v for k, v in e.items() if k.endswith('_s') or k in ('spent', 'saves')}
           for e in told if e['event'] in ('ready', 'stopped', 'finished')])

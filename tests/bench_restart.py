# SPDX-License-Identifier: Apache-2.0
"""What does a death cost? Trains, kills with -9, resumes, and prints where the time went.

    python tests/bench_restart.py --config configs/moshi.py:demo --stage listen --data data/demo

Prints the account of the run in seconds by cause, what starting and saving cost, and the goodput
that this would leave at one failure every three hours. The second life finds its compiled step in
the cache, as a job that a scheduler starts again does.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STEPS, SAVE_STEPS, KILLED_AT = 40, 4, 13


def ledger(work: str) -> list[dict]:
    path = os.path.join(work, 'ledger.jsonl')
    with open(path) as f:
        return [json.loads(line) for line in f]


def stepped(work: str) -> int:
    path = os.path.join(work, 'metrics.jsonl')
    if not os.path.exists(path):
        return 0
    with open(path) as f:
        return max((json.loads(line)['step'] for line in f if line.endswith('\n')), default=0)


def measure(config: str, stage: str, options: list[str]) -> dict:
    from jaxsd import goodput, journal
    with tempfile.TemporaryDirectory() as folder:
        work = os.path.join(folder, 'run')
        command = [sys.executable, '-m', 'jaxsd', 'train', '--config', config, '--workdir', work,
                   '--stage', stage, f'--config.stages[0].steps={STEPS}',
                   f'--config.stages[0].save_steps={SAVE_STEPS}', '--config.stages[0].log_steps=1',
                   '--config.stages[0].probe_steps=0', *options]
        first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while stepped(work) < KILLED_AT:
            if first.poll() is not None:
                raise SystemExit(f'ended with {first.returncode} before it could be killed')
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
        first.wait()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        told = ledger(work)
        seconds = goodput.account(told, journal.last_seen_s(work))
        found, every_s = goodput.forecast(told, failure_every_s=3 * 3600.0, idle_s=40.0)
        again = [e for e in told if e['event'] == 'ready'][-1]
        end = told[-1]
        import jax
        return dict(
            config=config, stage=stage, parameters=told[0]['parameters'],
            seconds=journal.rounded(seconds), goodput=round(goodput.share(seconds), 4),
            starting_again_s={k: v for k, v in again.items() if k.endswith('_s') and k != 'time_s'},
            save_s=round((end['spent']['save_s'] - end['commit_s'] - end['first_save_s'])
                         / (end['saves'] - 1), 3), first_save_s=end['first_save_s'],
            commit_s=end['commit_s'], at_a_failure_every_3_h=round(found, 4),
            saving_every_s=round(every_s), device_kind=told[0]['device_kind'], jax=jax.__version__)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', default='configs/moshi.py:demo')
    parser.add_argument('--stage', default='listen', help='the first stage of the config')
    parser.add_argument('--data', default='data/demo', metavar='DIR', help='a demo dataset')
    args, options = parser.parse_known_args(argv)
    data = os.path.abspath(args.data)
    options += [f'--config.data.path={data}', f'--config.vocab.tokenizer={data}/text.model',
                f'--config.codec.path={data}/codec.safetensors']
    print(json.dumps(measure(args.config, args.stage, options), indent=1))
    return 0


if __name__ == '__main__':
    sys.path.insert(0, ROOT)
    sys.exit(main())

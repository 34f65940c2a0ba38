# SPDX-License-Identifier: Apache-2.0
"""Do the launchers hand the command on word by word, and does the quickstart go on where it was?"""

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

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parents[1] / 'launch'
VERB = ['train', '--config', 'configs/a b.py:demo', "--config.data.path='x y'", '--workdir',
        'runs/$1']


def run(script, *args, folder=LAUNCH, **env):
    return subprocess.run(['bash', str(folder / script), *args], capture_output=True, text=True,
                          timeout=60, env=os.environ | {k: str(v) for k, v in env.items()},
                          preexec_fn=_interruptible)


def _interruptible():
    """As in a terminal: what runs in the background may ignore Ctrl-C, and then bash must, too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_launchers_are_short():
    long = {p.name: n for p in LAUNCH.iterdir() if (n := len(p.read_text().splitlines())) >= 60}
    assert not long, f'{long}: a launcher only calls the CLI'


def test_local_names_every_process():
    out = run('local.sh', '3', *VERB, DRY_RUN=1, PYTHON=sys.executable)
    assert out.returncode == 0, out.stderr
    lines = [shlex.split(line) for line in out.stdout.splitlines()]
    settings = [dict(word.split('=', 1) for word in words[:3]) for words in lines]
    assert [s['JAXSD_PROCESS_INDEX'] for s in settings] == ['0', '1', '2']
    assert {s['JAXSD_PROCESSES'] for s in settings} == {'3'}
    assert len({s['JAXSD_COORDINATOR'] for s in settings}) == 1
    assert all(words[3:] == [sys.executable, '-m', 'jaxsd', *VERB] for words in lines)


STAND_IN = '''#!/bin/bash
[ "$1" = -c ] && exec {python} "$@"
echo "process $JAXSD_PROCESS_INDEX of $JAXSD_PROCESSES: $*"
[ "$JAXSD_PROCESS_INDEX" = "{bad}" ] && {{ sleep 1; exit 7; }}
[ "{bad}" = none ] || exec sleep 50
'''


@pytest.mark.parametrize('bad, status', [('none', 0), ('0', 7), ('1', 7)])
def test_local_starts_them_and_ends_them_together(tmp_path, bad, status):
    python = tmp_path / 'python'
    python.write_text(STAND_IN.format(python=sys.executable, bad=bad))
    python.chmod(0o755)
    out = run('local.sh', '2', 'train', PYTHON=python, LOGS=tmp_path / 'logs', GRACE_S=1)
    assert out.returncode == status                 # in time: a survivor that hangs is killed
    assert 'process 0 of 2: -m jaxsd train' in out.stdout
    assert 'process 1 of 2' in (tmp_path / 'logs' / 'process-1.log').read_text()


@pytest.mark.parametrize('args', [(), ('0', 'train'), ('two', 'train'), ('2',)])
def test_local_says_how_it_is_used(args):
    out = run('local.sh', *args)
    assert out.returncode == 2 and out.stderr.startswith('usage:')


def test_local_hands_a_signal_on(tmp_path):
    """Stopped by a signal that it passes on, it ends as its processes do: well, if they do."""
    python = tmp_path / 'python'
    python.write_text(f'''#!/bin/bash
[ "$1" = -c ] && exec {sys.executable} "$@"
trap 'echo "saved by $JAXSD_PROCESS_INDEX"; exit 0' TERM
touch {tmp_path}/up-$JAXSD_PROCESS_INDEX
while true; do sleep 0.1; done
''')
    python.chmod(0o755)
    local = subprocess.Popen(['bash', str(LAUNCH / 'local.sh'), '2', 'train'], text=True,
                             stdout=subprocess.PIPE, env=os.environ | dict(
                                 PYTHON=str(python), LOGS=str(tmp_path)))
    limit = time.monotonic() + 60
    while not all((tmp_path / f'up-{i}').exists() for i in (0, 1)):
        assert local.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    local.terminate()
    assert 'saved by 0' in local.communicate(timeout=60)[0] and local.returncode == 0
    assert 'saved by 1' in (tmp_path / 'process-1.log').read_text()


def test_slurm_hands_on():
    out = run('slurm.sbatch', *VERB, DRY_RUN=1, PYTHON='/env/bin/python')
    words = shlex.split(out.stdout)
    assert words[0] == 'srun'
    assert words[-len(VERB) - 3:] == ['/env/bin/python', '-m', 'jaxsd', *VERB]
    assert run('slurm.sbatch').returncode == 2


def test_tpu_hands_on():
    out = run('tpu_vm.sh', *VERB, DRY_RUN=1, TPU='slice', ZONE='z', REPO='my repo',
              JAXSD_HEARTBEAT_TIMEOUT_S=50)
    words = shlex.split(out.stdout)
    assert words[:7] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'slice', '--zone']
    remote = shlex.split(words[words.index('--command') + 1])
    assert remote[:3] == ['cd', 'my repo', '&&'] and remote[-len(VERB):] == VERB
    assert {'JAXSD_DISTRIBUTED=1', 'JAXSD_HEARTBEAT_TIMEOUT_S=50'} <= set(remote[3:])
    assert run('tpu_vm.sh', 'train', DRY_RUN=1, TPU='slice').returncode != 0


def test_gke_names_every_variable_it_needs():
    text = (LAUNCH / 'gke.yaml').read_text()
    head = text[:text.index('apiVersion')]
    used = set(re.findall(r'\$\{(\w+)\}', text))
    assert used and all(f'{name}=' in head for name in used)


GKE = dict(NAME='moshi', IMAGE='gcr.io/p/jaxsd:1', HOSTS=64, SLICES=2, CHIPS_PER_HOST=4,
           ACCELERATOR='tpu-v5p-slice', TOPOLOGY='4x8x8', CONFIG='configs/moshi.py',
           WORKDIR='gs://b/runs/moshi')


def gke(**changes) -> dict:
    """launch/gke.yaml as envsubst would fill it in."""
    import yaml
    text = (LAUNCH / 'gke.yaml').read_text()
    text = text[text.index('apiVersion'):]
    for name, value in (GKE | changes).items():
        text = text.replace(f'${{{name}}}', str(value))
    return yaml.safe_load(text)


def complaints(body: dict) -> list[str]:
    """What the schema of the JobSet project says; a field that it does not name is an error."""
    import jsonschema
    schema = json.loads((LAUNCH.parent / 'tests' / 'golden' / 'jobset.schema.json').read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return [f'{e.json_path}: {e.message}'
            for e in jsonschema.Draft202012Validator(schema).iter_errors(body)]


def test_gke_is_a_jobset():
    body = gke()
    assert not complaints(body)
    [job] = body['spec']['replicatedJobs']
    assert (job['replicas'], job['template']['spec']['parallelism']) == (2, 64)
    pod = job['template']['spec']['template']['spec']
    [container] = pod['containers']
    assert container['command'][:4] == ['python', '-m', 'jaxsd', 'train']
    assert container['resources']['limits'] == {'google.com/tpu': '4'}
    # A pod that was stopped must fail, or the job would count as done; a wrong config must not
    # be tried a hundred times over.
    [rule] = job['template']['spec']['podFailurePolicy']['rules']
    assert rule['onExitCodes']['containerName'] == container['name']
    stopped = {e['name']: e['value'] for e in container['env']}['JAXSD_STOPPED_STATUS']
    assert int(stopped) not in (0, *rule['onExitCodes']['values'])
    [wrong] = complaints(gke(HOSTS='many'))[:1]
    assert "'many' is not of type 'integer'" in wrong
    for old, new in (('maxRestarts', 'maxRestart'), ('containerPort', 'port'),
                     ('nodeSelector', 'nodeSelectors'), ('FailJobSet', 'Fail')):
        assert new in str(complaints(json.loads(json.dumps(body).replace(f'"{old}"', f'"{new}"'))))


def test_xpk_hands_on():
    out = run('xpk.sh', *VERB, DRY_RUN=1, CLUSTER='c', IMAGE='i', TPU_TYPE='v5p-512', NAME='moshi')
    words = shlex.split(out.stdout)
    assert words[:3] == ['xpk', 'workload', 'create']
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options['--tpu-type'] == 'v5p-512' and options['--num-slices'] == '1'
    assert options['--restart-on-exit-codes'] == '75'
    assert shlex.split(options['--command'])[3:] == VERB
    assert run('xpk.sh', 'train', DRY_RUN=1, CLUSTER='c', IMAGE='i', NAME='x').returncode != 0
    assert run('xpk.sh', CLUSTER='c').returncode == 2


def test_the_quickstart_skips_what_is_done(tmp_path):
    python, log = tmp_path / 'python', tmp_path / 'log'
    python.write_text(f'#!/bin/bash\necho "$*" >> {log}\ncase "$*" in '
                      '*"evaluate --config configs/moshi"*) exit "${BAD:-0}";; esac\n')
    python.chmod(0o755)
    folder = tmp_path / 'launch'        # a tree of its own: it looks for data/demo beside itself
    folder.mkdir()
    shutil.copy(LAUNCH / 'quickstart.sh', folder)
    settings = dict(PYTHON=python, RUNS=tmp_path / 'runs', folder=folder)
    first = run('quickstart.sh', **settings, BAD=3)
    assert first.returncode == 3 and 'Done' not in first.stdout
    begun = log.read_text().splitlines()
    assert begun[0].startswith('-m data_pipelines.demo --out data/demo')
    log.unlink()
    second = run('quickstart.sh', **settings)
    assert second.returncode == 0 and 'report.html' in second.stdout.splitlines()[-1]
    rest = log.read_text().splitlines()
    assert rest[0] == begun[-1] and not set(rest[1:]) & set(begun)      # from the failed part on
    log.unlink()
    assert run('quickstart.sh', **settings).returncode == 0
    assert not log.exists()                                             # nothing is done twice
    (tmp_path / 'runs' / '.quickstart' / 'data').touch()
    assert run('quickstart.sh', **settings).returncode == 0
    assert len(log.read_text().splitlines()) == len(begun) + len(rest) - 2     # all but the data
    made = tmp_path / 'data' / 'demo'
    made.mkdir(parents=True)
    (made / 'manifest.json').write_text('{"command": "python -m data_pipelines.demo --hours 3 "}')
    assert run('quickstart.sh', **settings, HOURS=3).returncode == 0
    other = run('quickstart.sh', **settings, HOURS=30)
    assert other.returncode == 1 and 'move it away' in other.stderr


@pytest.mark.parametrize(('name', 'status'), (('INT', 130), ('TERM', 143)))
@pytest.mark.parametrize('script', ('quickstart.sh', 'demos.sh'))
def test_who_was_stopped_is_not_done(tmp_path, script, name, status):
    """Training that was asked to stop has saved and leaves with 0: nothing comes after it, and it
    goes on when started again."""
    shutil.copytree(LAUNCH, tmp_path / 'launch')
    for path in ('configs/twist.py', 'data/demo/manifest.json'):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text('"--hours 12 "')
    python, log = tmp_path / 'python', tmp_path / 'log'
    python.write_text(f'#!/bin/bash\necho "$*" >> {log}\n'
                      f'[[ "$*" == *" train "* ]] && kill -{name} $PPID; exit 0\n')
    python.chmod(0o755)
    for _ in range(2):
        log.unlink(missing_ok=True)
        out = run(script, folder=tmp_path / 'launch', PYTHON=python, RUNS=tmp_path / 'runs')
        assert out.returncode == status, out.stderr
        assert ' train ' in log.read_text().splitlines()[-1]


def test_demos_go_on_and_skip_what_is_done(tmp_path):
    """Every stage by one train, measured twice; a system that fails holds nobody up."""
    for name in ('_parts', 'moshi', 'twist', 'voxtlm'):
        (tmp_path / 'configs').mkdir(exist_ok=True)
        (tmp_path / 'configs' / f'{name}.py').touch()
    (tmp_path / 'data' / 'demo').mkdir(parents=True)
    (tmp_path / 'data' / 'demo' / 'manifest.json').touch()
    (tmp_path / 'data' / 'pairs').mkdir()
    shutil.copytree(LAUNCH, tmp_path / 'launch')
    python = tmp_path / 'python'
    python.write_text('#!/bin/bash\necho "$*" >> calls\n'
                      '[[ -e broken && "$*" == *evaluate*twist* ]] && exit 1\n'
                      '[[ -e stopped && "$*" == *train*twist* ]] && exit $JAXSD_STOPPED_STATUS\n'
                      'exit 0\n')
    python.chmod(0o755)

    def called(**env):
        (tmp_path / 'calls').unlink(missing_ok=True)
        out = run('demos.sh', folder=tmp_path / 'launch', PYTHON=python, LIMIT=5, **env)
        lines = (tmp_path / 'calls').read_text().splitlines()
        assert lines[-1] == ('-m jaxsd systems --config configs/moshi.py configs/twist.py '
                             'configs/voxtlm.py configs/twist.py:recipe=slam '
                             'configs/twist.py:recipe=sims --runs runs/demos --out '
                             'docs/systems.md')
        return out, lines[:-1]
    (tmp_path / 'broken').touch()
    out, lines = called()
    assert out.returncode == 1
    assert out.stderr == 'demos: failed: twist twist,recipe=slam twist,recipe=sims\n'
    assert lines == [
        '-m jaxsd train --config configs/moshi.py:demo,share=0.25 --workdir runs/demos/moshi',
        '-m jaxsd evaluate --workdir runs/demos/moshi --limit 5',
        '-m jaxsd evaluate --workdir runs/demos/moshi --limit 5 --untrained',
        '-m jaxsd train --config configs/twist.py:demo --workdir runs/demos/twist',
        '-m jaxsd evaluate --workdir runs/demos/twist --limit 5',
        '-m jaxsd train --config configs/voxtlm.py:demo --workdir runs/demos/voxtlm',
        '-m jaxsd evaluate --workdir runs/demos/voxtlm --limit 5',
        '-m jaxsd evaluate --workdir runs/demos/voxtlm --limit 5 --untrained',
        *(line for recipe in ('slam', 'sims') for line in (
            f'-m jaxsd train --config configs/twist.py:demo,recipe={recipe} '
            f'--workdir runs/demos/twist,recipe={recipe}',
            f'-m jaxsd evaluate --workdir runs/demos/twist,recipe={recipe} --limit 5'))]
    (tmp_path / 'broken').rename(tmp_path / 'stopped')      # its trainer alone, to go on later
    out, lines = called()
    assert out.returncode == 1 and len(lines) == 3 and all(' train ' in x for x in lines)
    (tmp_path / 'stopped').unlink()
    out, lines = called()
    assert out.returncode == 0 and len(lines) == 9 and all('twist' in x for x in lines)
    later = time.time() + 5
    os.utime(tmp_path / 'configs' / 'moshi.py', (later, later))     # it was changed since
    out, lines = called(SYSTEMS='voxtlm')
    assert out.returncode == 0 and lines == [] and '-- done before: voxtlm' in out.stdout
    (tmp_path / 'data' / 'pairs').rmdir()
    assert called(SYSTEMS='voxtlm')[1] == ['-m data_pipelines.minimal_pairs --out data/pairs']
    (tmp_path / 'data' / 'pairs').mkdir()
    assert len(called()[1]) == 3

# SPDX-License-Identifier: Apache-2.0
"""Does the loop do, count and write down what it says; and what if something goes wrong in it?"""

import collections
import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import batch
from small import config as small_config

from jaxsd import checkpoint, data, journal, model, sharding, train
from jaxsd import config as configs
from jaxsd import stage as stages
from jaxsd.config import ConfigError, plain
from jaxsd.stage import Stage, flatten

ROOT = pathlib.Path(__file__).resolve().parents[1]


def tiny(corpus, system='spirit_lm', **options):
    """The system's tiny config on the small corpus with one stage of these options."""
    c = configs.read(f'{ROOT}/configs/{system}.py:tiny')
    c.data.path = str(corpus)
    c.codec.path = str(corpus / os.path.basename(c.codec.path))
    c.vocab.tokenizer = str(corpus / 'text.model')
    c.stages = (dict(plain(c.stages)[0]) | options,)
    return c


def lines(work, name='metrics.jsonl'):
    with open(os.path.join(work, name)) as f:
        return [json.loads(line) for line in f]


def accounts(c, steps):
    """What each of the first batches holds, counted cell by cell from its arrays and records."""
    stage, v = plain(c.stages)[0], model.make_vocab(c)
    with_arrays = data.batches(c, stage, v, threads=0)
    out = []
    for _ in range(steps):
        arrays, account = next(with_arrays)
        assert sum(a['tokens'] for a in account.values()) == (arrays['tokens'] >= 0).sum()
        out.append(account)
    with_arrays.close()
    return out


# One run, looked at from all sides: 5 + 2 steps, held-out numbers, a trace, a resume.

PROBED = []


@pytest.fixture(scope='module')
def done(corpus, tmp_path_factory):
    """(config, workdir, console lines) of seven steps on eight devices."""
    work = str(tmp_path_factory.mktemp('train') / 'run')
    c = tiny(corpus, steps=7, save_steps=3, log_steps=2, probe_steps=4, schedule='cosine',
             warmup_steps=3, lr=1e-3)
    heard = logging.Handler()
    said = []
    heard.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger('jaxsd')
    log.addHandler(heard)
    log.setLevel(logging.INFO)

    def probe(step, params):
        start = time.perf_counter()
        saved = checkpoint.steps(checkpoint.folder_of(work, 'pretrain'))
        PROBED.append((step, saved))
        time.sleep(0.4)
        return {'aligned/loss': float(jax.numpy.abs(flatten(params)['head/out/kernel']).sum()),
                'turns/seconds': time.perf_counter() - start}
    try:
        loss = train.run(c, work, probe_of=lambda stage: probe, profile_steps=(2, 4))
    finally:
        log.removeHandler(heard)
    return c, work, said, loss


def test_every_line_says_what_was_done(done):
    c, work, _, loss = done
    entries = [e for e in lines(work) if 'loss' in e]
    assert [e['step'] for e in entries] == [2, 4, 6, 7]
    assert entries[-1]['loss'] == loss
    true = accounts(c, 7)
    stage = stages.stages(c)[0]
    for e in entries:
        so_far = [x for account in true[:e['step']] for x in account.values()]
        assert e['stage'] == 'pretrain' and e['skipped_steps'] == 0
        assert e['tokens'] == sum(x['tokens'] for x in so_far)
        assert e['audio_hours'] * 3600 == pytest.approx(sum(x['audio_s'] for x in so_far), abs=1e-3)
        assert e['loss'] == pytest.approx(sum(e['terms'].values()), rel=1e-6)
        assert e['lr'] == pytest.approx(float(stages.learning_rate(stage)(e['step'] - 1)), rel=1e-6)
        assert e['grad_norm'] > 0 and e['step_s'] > 0 and e['time_s'] > 1.7e9
        assert 0 <= e['data_wait_fraction'] + e['dispatch_fraction'] <= 1.01
        assert {f'{k}/{r}' for k in ('nats', 'accuracy') for r in ('text', 'units')} <= set(
            e['metrics'])
    for a, b in zip(entries[:-1], entries[1:], strict=True):    # rates are of the steps between
        steps_s = b['step_s'] * (b['step'] - a['step'])
        assert b['tokens_per_s'] * steps_s == pytest.approx(b['tokens'] - a['tokens'], rel=1e-6)
        assert b['audio_hours_per_h'] * steps_s == pytest.approx(
            3600 * (b['audio_hours'] - a['audio_hours']), rel=1e-6)


def test_a_step_takes_no_longer_than_the_clock_says(done):
    """Neither compiling nor saving nor held-out numbers are part of a step's time."""
    _, work, said, _ = done
    entries = [e for e in lines(work) if 'loss' in e]
    compiled_s = next(float(m[1]) for m in (re.match(r'compiled in ([\d.]+) s', x) for x in said)
                      if m)
    assert compiled_s >= 0
    for a, b in zip(entries[:-1], entries[1:], strict=True):
        assert b['step_s'] * (b['step'] - a['step']) <= b['time_s'] - a['time_s'] + 0.01


def test_the_console_line_has_its_form(done):
    _, work, said, _ = done
    number = r'-?[\d.]+(?:e-?\d+)?'
    form = re.compile(
        rf'completed step: (\d+), seconds: {number}, TFLOP/s/device: {number}, MFU: unknown, '
        rf'tokens/s/device: (\d+), audio-hours/h: {number}, data-wait: {number}%, '
        rf'loss: ({number}), of: 7 steps, left: ({number}) min')
    found = [m for m in map(form.fullmatch, said) if m]
    entries = [e for e in lines(work) if 'loss' in e]
    assert [int(m[1]) for m in found] == [2, 4, 6, 7]
    for m, e in zip(found, entries, strict=True):
        assert float(m[3]) == pytest.approx(e['loss'], abs=1e-4)
        assert int(m[2]) == pytest.approx(e['tokens_per_s'] / 8, abs=1)
        assert float(m[4]) == pytest.approx((7 - e['step']) * e['step_s'] / 60, abs=0.06)


def test_the_ledger_counts_what_was_read(done):
    c, work, _, _ = done
    ledger = lines(work, 'ledger.jsonl')
    first = ledger[0]
    assert first['event'] == 'start' and first['stage'] == 'pretrain' and first['step'] == 0
    assert first['start'] == 'init' and first['devices'] == 8 and first['mesh'] == {'fsdp': 8}
    assert first['parameters'] == first['trained_parameters'] == model.count(model.abstract(c)[1])
    counted = [e for e in ledger if e['event'] == 'consumed']
    assert [e['consumed_to'] for e in counted] == [3, 6, 7]
    true = accounts(c, 7)
    for e in counted:
        wanted = collections.defaultdict(collections.Counter)
        for account in true[:e['consumed_to']]:
            for source, counts in account.items():
                wanted[source].update(counts)
        assert e['consumed'].keys() == wanted.keys() and len(wanted) > 2
        for source, counts in wanted.items():
            assert e['consumed'][source] == pytest.approx(dict(counts), abs=1e-4)
    meta = checkpoint.read_meta(checkpoint.folder_of(work, 'pretrain'))
    assert meta['data']['next_step'] == 7 and meta['data']['consumed'] == counted[-1]['consumed']


def test_held_out_numbers_come_after_the_save(done):
    """So that an error among them loses no step; the last step always has them."""
    _, work, _, _ = done
    held_out = [e for e in lines(work) if 'held_out' in e]
    assert [e['step'] for e in held_out] == [4, 7]
    assert all(e['held_out']['aligned/loss'] > 0 for e in held_out)
    assert PROBED[0][0] == 4 and 3 in PROBED[0][1]
    assert [step for step, _ in PROBED] == [4, 7]
    # The steps stand still for as long as the probes say, and that is no step's time.
    stated = sum(e['held_out']['turns/seconds'] for e in held_out)
    spent = [e['spent'] for e in lines(work, 'ledger.jsonl') if 'spent' in e][-1]
    assert stated - 0.01 < spent['probe_s'] < stated + 0.2


def test_events_and_trace_are_there(done):
    from tensorboardX.proto import event_pb2
    _, work, _, _ = done
    path, = pathlib.Path(work, 'tensorboard', 'pretrain').iterdir()
    raw, seen = path.read_bytes(), collections.defaultdict(dict)
    while raw:      # TFRecord: length, its checksum, the event, its checksum
        size = int.from_bytes(raw[:8], 'little')
        event = event_pb2.Event.FromString(raw[12:12 + size])
        for value in event.summary.value:
            seen[value.tag][event.step] = value.simple_value
        raw = raw[16 + size:]
    wanted = {e['step']: e['loss'] for e in lines(work) if 'loss' in e}
    assert seen['loss'] == pytest.approx(wanted, rel=1e-6)
    assert seen['held_out/aligned/loss'].keys() == {4, 7}
    assert seen['metrics/nats/text'].keys() == wanted.keys()
    assert list(pathlib.Path(work, 'profile').rglob('*.xplane.pb'))


def test_a_finished_run_does_nothing_and_another_config_is_refused(done, caplog):
    c, work, _, _ = done
    before = {p: p.read_bytes() for p in sorted(pathlib.Path(work).rglob('*')) if p.is_file()}
    caplog.set_level(logging.INFO, 'jaxsd')
    assert train.run(c, work) is None
    assert 'stage pretrain is done (7 steps)' in caplog.text
    other = configs.checked(c.copy_and_resolve_references())
    other.seed = 1
    with pytest.raises(ConfigError, match=r'holds another run: seed: 0 there, 1 here'):
        train.run(other, work)
    assert before == {p: p.read_bytes() for p in sorted(pathlib.Path(work).rglob('*'))
                      if p.is_file()}


def test_who_is_killed_after_the_last_save_gets_the_last_numbers(done, tmp_path):
    c, work, _, _ = done
    again = shutil.copytree(work, tmp_path / 'run')

    def cut(name, told):
        (again / name).write_text(''.join((again / name).open().readlines()[:-1]))
        assert told in lines(work, name)[-1] and told not in lines(again, name)[-1]
    heard = []

    def probe(step, params):
        heard.append(step)
        return {'aligned/loss': float(jax.numpy.abs(flatten(params)['head/out/kernel']).sum())}
    cut('ledger.jsonl', 'saves')
    train.run(c, str(again), probe_of=lambda stage: probe)
    assert heard == []          # it has them
    cut('metrics.jsonl', 'held_out')
    for _ in range(2):          # and once only
        train.run(c, str(again), probe_of=lambda stage: probe)
        assert heard == [7]
    assert lines(again)[:-1] == lines(work)[:-1]
    was, new = lines(work)[-1], lines(again)[-1]
    assert new['held_out']['aligned/loss'] == was['held_out']['aligned/loss']
    ends = [e['step'] for e in lines(again, 'ledger.jsonl') if e['event'] == 'finished']
    assert ends == [7]


def test_a_run_that_another_program_trains_in_is_refused(done):
    c, work, _, _ = done
    holder = subprocess.Popen(
        [sys.executable, '-c', 'import sys; from jaxsd import run\nwith run.held(sys.argv[1]):\n'
         '    print("held", flush=True)\n    sys.stdin.read()', work],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == 'held\n'
    with pytest.raises(ConfigError, match='is being trained in by another process'):
        train.run(c, work)
    holder.kill()
    holder.wait()
    assert train.run(c, work) is None


class Noise(nnx.Module):
    """A model whose scores are the random numbers that a step hands to it."""

    def __init__(self):
        self.w = nnx.Param(jnp.zeros(()), axes=())

    def forward(self, batch, key, place):
        return jax.random.normal(key, batch['tokens'].shape) + self.w[...], None, {}


def test_every_step_and_microbatch_draws_anew():
    """Means of n independent numbers spread as n ** -0.5, in how many microbatches they are drawn.
    """
    graph, state = nnx.split(Noise(), graph=False)
    params = nnx.to_pure_dict(state)
    b = {'tokens': jnp.zeros((4, 2, 3), jnp.int32)}

    def objective(logp, hit, batch, beside=None):
        return {'all': (jnp.sum(logp), jnp.float32(logp.size))}, {}
    for accumulate in (1, 4):
        stage = stages.Stage(name='s', steps=999, batch=4, data=dict(x=1.0), lr=0.0,
                             accumulate=accumulate)
        by_path = {'w': 1.0}
        tx = stages.optimizer(stage, by_path)
        step = jax.jit(train.make_step(graph, objective, stage, by_path))
        begun = dict(params=params, opt=tx.init(stages.split(params, by_path)[0]), step=0,
                     bad_steps=0, skipped_steps=0)
        found = [float(step(begun | dict(step=n), b)[1]['loss']) for n in range(400)]
        assert len(set(found)) == 400
        assert np.std(found) == pytest.approx(24 ** -0.5, rel=0.15), accumulate


def test_host_overhead(done):
    """Waiting for data and handing over steps; a loose bound, for the machine may be busy.

    The figure that counts is that of a demo: tests/test_claims.py asserts it.
    """
    _, work, _, _ = done
    entries = [e for e in lines(work) if 'loss' in e][1:]
    share = np.median([e['data_wait_fraction'] + e['dispatch_fraction'] for e in entries])
    print(f'data wait + dispatch: {100 * share:.2f} % of {entries[-1]["step_s"]:.3f} s per step')
    assert share < 0.5


# The step.

@functools.cache
def prepared(system='flat', **options):
    c = small_config(system)
    stage = Stage(**dict(name='s', steps=9, batch=4, data=dict(x=1.0), lr=1e-2) | options)
    graph, target, by_path = train.abstract_state(c, stage, sharding.make_mesh(
        {}, jax.devices()[:1]))
    state = train.fresh_state(c, stage, target, by_path)
    return c, jax.jit(train.make_step(graph, model.objective_of(c), stage, by_path)), state


def spoiled(params):
    flat = flatten(params)
    flat['head/out/kernel'] = flat['head/out/kernel'].at[0, 0].set(np.inf)
    return stages.unflatten(flat)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    c, step, state = prepared(schedule='cosine', warmup_steps=4)
    state, _ = step(state, batch(c, rows=4))
    good = jax.tree.map(np.asarray, state)
    bad_batch = batch(c, rows=4)
    bad_batch['weights'] = np.full_like(bad_batch['weights'], np.inf)
    for n in (1, 2):
        state, sums = step(state, bad_batch)
        assert not np.isfinite(sums['loss'])
        assert int(sums['bad_steps']) == int(sums['skipped_steps']) == n
        assert int(state['step']) == 1 + n
        for a, b in zip(jax.tree.leaves((good['params'], good['opt'])),
                        jax.tree.leaves((state['params'], state['opt'])), strict=True):
            assert np.asarray(b).tobytes() == a.tobytes()
    state, sums = step(state, batch(c, rows=4, seed=1))
    assert np.isfinite(sums['loss'])
    assert (int(sums['bad_steps']), int(sums['skipped_steps'])) == (0, 2)
    assert float(sums['lr']) == pytest.approx(1e-2 / 4)     # the schedule waited for it
    assert not np.array_equal(flatten(state['params'])['head/out/kernel'],
                              flatten(good['params'])['head/out/kernel'])


def test_one_infinite_parameter_stops_every_step():
    c, step, state = prepared()
    state = state | dict(params=spoiled(state['params']))
    for n in (1, 2, 3):
        state, sums = step(state, batch(c, rows=4, seed=n))
        assert int(sums['bad_steps']) == n


@pytest.mark.parametrize('system', ('flat', 'streams'))
def test_accumulated_gradients_are_those_of_one_batch_and_of_the_loss(system):
    """Microbatches of very unequal weight. After one step the first moments are the gradient."""
    gradients = dict(clip=1e9, betas=(0.0, 0.0))
    c, step, state = prepared(system, **gradients)
    b = batch(c, rows=4)
    b['weights'] = b['weights'] * np.array([1, 0.01, 7, 0], np.float32)[:, None, None]
    b = jax.tree.map(jax.numpy.asarray, b)
    graph, objective = model.abstract(c)[0], model.objective_of(c)

    def loss(params):
        logp, hit = nnx.merge(graph, params)(b, jax.random.key(0))
        return sum(s / w for s, w in objective(logp, hit, b)[0].values())
    wanted, grads = jax.jit(jax.value_and_grad(loss))(state['params'])
    grads = flatten(jax.tree.map(np.asarray, grads))
    norm = math.sqrt(sum(float((g.astype(float) ** 2).sum()) for g in grads.values()))
    _, in_parts, _ = prepared(system, accumulate=4, **gradients)
    for one in (step, in_parts):
        after, sums = one(state, b)
        assert float(sums['loss']) == pytest.approx(float(wanted), rel=1e-6)
        assert float(sums['grad_norm']) == pytest.approx(norm, rel=1e-6)
        for p, m in flatten(after['opt'][1].mu).items():
            np.testing.assert_allclose(m, grads[p], rtol=1e-4,
                                       atol=1e-6 * np.abs(grads[p]).max(), err_msg=p)


def test_flops_by_hand():
    """Llama's shapes: every matrix twice per column, attention over half a row, three passes."""
    c, stage = small_config('flat'), Stage(name='all', steps=1, batch=1, data={}, lr=1e-3)
    D, F, L, V = 16, 24, 2, model.make_vocab(c).sizes(16).rows[0].predicted
    matrices = L * (4 * D * D + 3 * D * F) + D * V
    attention = 2 * L * 2 * (c.columns / 2) * D     # scores and values, over half a row on average
    assert journal.model_tflops(c, 100, stage) == pytest.approx(
        3 * 100 * (2 * matrices + attention) / 1e12, rel=1e-6)
    frozen = dataclasses.replace(stage, train=(('head/.*', 1.0), ('.*', None)))
    assert journal.model_tflops(c, 100, frozen) == pytest.approx(
        100 * (4 * matrices + 2 * D * V + 3 * attention) / 1e12, rel=1e-6)
    experts = small_config('flat', 'mixtral')       # a router, two of four, half as many keys
    matrices += L * (-D * D + 4 * D + 3 * D * F)
    assert journal.model_tflops(experts, 100, stage) == pytest.approx(
        3 * 100 * (2 * matrices + attention) / 1e12, rel=1e-6)


# When something goes wrong.

def test_a_run_that_diverges_ends_in_one_line_and_says_where(corpus, tmp_path):
    c = tiny(corpus, steps=9, lr=1e38, log_steps=1, save_steps=2, bad_steps=3, weight_decay=0.0)
    work = str(tmp_path / 'run')
    with pytest.raises(train.TrainingError) as e:
        train.run(c, work)
    m = re.fullmatch(r'stage pretrain, step (\d): loss or gradient not finite for 3 steps in a '
                     r'row; lower the learning rate or look at the data', str(e.value))
    entries = lines(work)
    bad = [x['step'] for x in entries if x['loss'] is None or x['grad_norm'] is None]
    assert bad == list(range(int(m[1]) - 2, int(m[1]) + 1))
    assert [x['step'] for x in entries] == list(range(1, int(m[1]) + 1))
    assert entries[-1]['skipped_steps'] == 3
    with pytest.raises(train.TrainingError, match=f'step {m[1]}: '):    # and so again, by the seed
        train.run(c, work)
    assert [x['step'] for x in lines(work)] == [x['step'] for x in entries]


def test_an_error_in_the_held_out_numbers_or_the_data_loses_no_saved_step(corpus, tmp_path):
    c = tiny(corpus, steps=4, log_steps=1, save_steps=2, probe_steps=2)
    work = str(tmp_path / 'run')

    def broken(step, params):
        raise RuntimeError('the held-out split is gone')
    with pytest.raises(RuntimeError, match='held-out split is gone'):
        train.run(c, work, probe_of=lambda stage: broken)
    folder = checkpoint.folder_of(work, 'pretrain')
    assert checkpoint.steps(folder) == [2]
    # A signal, and being called from another thread, as a notebook may.
    out = []
    worker = threading.Thread(target=lambda: out.append(train.run(c, work)))
    worker.start()
    worker.join()
    assert checkpoint.steps(folder)[-1] == 4 and np.isfinite(out[0])
    assert [e['step'] for e in lines(work) if 'loss' in e] == [1, 2, 3, 4]
    assert [e['event'] for e in lines(work, 'ledger.jsonl')
            if e['event'] in ('start', 'resume')] == ['start', 'resume']


def test_lines_of_a_killed_run_are_written_anew(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    kept = ['{"stage": "a", "step": 900}', '{"stage": "b", "step": 3}']
    path.write_text('\n'.join([kept[0], '7', kept[1], '{"stage": "b", "step": 4}',
                               '{"stage": "b", "st']))
    writers = journal.Writers(str(tmp_path), 3, 'b')
    writers.write(dict(stage='b', step=4, loss=1.5))
    writers.close()
    assert path.read_text().splitlines() == kept + ['{"stage": "b", "step": 4, "loss": 1.5}']


def test_a_full_disk_ends_the_writing_in_one_line(tmp_path):
    """And does not hang it: on a real file system of 64 KiB, or under a file size limit."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['unshare', '-rm', 'sh', '-c', 'mount -t tmpfs -o size=64k none "$0" && exec "$@"',
             str(disk)]
    inside = subprocess.run([*mount, 'true'], capture_output=True).returncode == 0
    program = '''
import resource, signal, sys
from jaxsd import journal
if sys.argv[2] == 'False':
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
writers = journal.Writers(sys.argv[1], 0, 's')
try:
    for n in range(1, 5000):
        writers.write(dict(stage='s', step=n, loss=1.0, terms=dict(text=2.0)))
except OSError as e:
    print(e)
writers.close()
'''
    out = subprocess.run([*(mount if inside else ()), sys.executable, '-c', program, str(disk),
                          str(inside)], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert out.returncode == 0, out.stderr
    assert out.stdout.count('\n') == 1 and str(disk) in out.stdout
    assert ('No space left on device' if inside else 'File too large') in out.stdout


@pytest.mark.parametrize('changes, mesh, words', [
    (dict(batch=12), {'fsdp': 8}, 'batch 12 / accumulate 1 must divide over 8'),
    (dict(batch=16, accumulate=4), {'fsdp': 8}, 'batch 16 / accumulate 4 must divide over 8'),
    ({}, {'fsdp': 3}, 'fsdp 3 does not fit 8 cpu'),
    ({}, {'fdsp': 8}, 'mesh names fdsp; legal: data, fsdp, context, tensor, expert, rules, slices'),
    ({}, {'fsdp': 1, 'tensor': 8}, 'of size 4 does not divide over mesh axis tensor'),
    (dict(data=dict(aligend=1.0)), {'fsdp': 8}, "'aligend'; did you mean 'aligned'"),
    (dict(start='nowhere'), {'fsdp': 8}, "starts from 'nowhere', but there is no checkpoint"),
    (dict(train=(('head/.*', 1.0),)), {'fsdp': 8}, 'no rule of train covers'),
])
def test_what_cannot_run_makes_no_directory(corpus, tmp_path, changes, mesh, words):
    c = tiny(corpus, **changes)
    c.mesh = mesh
    with pytest.raises(ValueError, match=words) as e:
        train.run(c, str(tmp_path / 'run'))
    assert '\n' not in str(e.value) and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('columns, mesh, attention, words', [
    (100, {'context': 8}, 'auto', 'columns 100 must divide over 8 context devices'),
    (96, {'context': 8}, 'splash', "backbone.attention is 'splash', but that runs on TPU"),
    (96, {'data': 4, 'fsdp': 2, 'slices': 3}, 'xla', 'mesh.data 4 must be a multiple of mesh.sl')])
def test_columns_and_engines_are_checked_before_a_directory_is_made(corpus, tmp_path, columns, mesh,
                                                                    attention, words):
    c = tiny(corpus)
    c.columns, c.mesh, c.backbone.attention = columns, mesh, attention
    with pytest.raises(ValueError, match=words):
        train.run(c, str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_rows_of_a_process_follow_its_devices():
    """One process: everything. Devices that hold separate rows cannot be one consecutive part."""
    rows = sharding.batch_sharding(sharding.RULES, sharding.make_mesh(dict(fsdp=4, tensor=2)))
    assert train.share_of_rows(rows, 8) == (0, 1)

    class Half:     # what a process with some of the devices would be told
        def __init__(self, *starts):
            self.starts = starts

        def addressable_devices_indices_map(self, shape):
            return {i: (slice(s, s + 2),) for i, s in enumerate(self.starts)}
    assert train.share_of_rows(Half(4, 4, 6, 6), 8) == (1, 2)
    assert train.share_of_rows(Half(2, 2), 8) == (1, 4)
    with pytest.raises(ConfigError, match='separate rows'):
        train.share_of_rows(Half(0, 4), 8)


def test_counts_grow_exactly_over_a_resume():
    """Seconds in whatever pieces: the sum of a resumed run is that of a straight one."""
    rng = np.random.default_rng(0)
    parts = [{'x': dict(tokens=int(n), audio_s=float(s))} for n, s in
             zip(rng.integers(1, 99, 50), rng.uniform(0, 9, 50), strict=True)]
    stage = Stage(name='s', steps=1, batch=1, data=dict(x=1.0), lr=1.0)
    straight = journal.Consumed(stage, {}, 0)
    before = {}
    for i, part in enumerate(parts):
        straight.add(part)
        if i % 7 == 0:
            resumed = journal.Consumed(stage, before, 0)
        resumed.add(part)
        if i % 7 == 6:
            before = json.loads(json.dumps(resumed.total()))
    assert resumed.total() == straight.total()
    assert straight.total()['x']['tokens'] == sum(p['x']['tokens'] for p in parts)

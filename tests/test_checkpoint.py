# SPDX-License-Identifier: Apache-2.0
"""Can a run be killed, damaged, moved to other devices or mistaken for another?"""

import concurrent.futures
import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections as mlc
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small import virtual

from jaxsd import checkpoint, run
from jaxsd.checkpoint import CheckpointError, CheckpointMismatch, Checkpoints
from jaxsd.config import ConfigError, fingerprint

CONFIG = mlc.ConfigDict({'seed': 0, 'stages': ({'name': 'pretrain', 'lr': 1e-3},), 'mesh': {}})
STAGE = 'pretrain'
REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def mesh_of(data, fsdp):
    devices = jax.devices()[:data * fsdp]
    return jax.make_mesh((data, fsdp), ('data', 'fsdp'), devices=devices,
                         axis_types=(AxisType.Auto,) * 2)


def make_state(mesh, seed=0, width=16):
    """Parameters of several types, the moments of a masked optimizer, a step; sharded on `mesh`."""
    rng = np.random.default_rng(seed)
    params = {'head': {'kernel': rng.normal(size=(8, width)).astype(np.float32)},
              'backbone': {'blocks': {'kernel': rng.normal(size=(3, 64, 64)).astype(np.float32),
                                      'gate': rng.normal(size=(8,)).astype(jnp.bfloat16)}}}
    tx = optax.masked(optax.adamw(1e-3), {'head': {'kernel': True},
                                          'backbone': {'blocks': {'kernel': True, 'gate': False}}})
    state = {'params': params, 'opt': tx.init(params), 'step': np.int32(seed),
             'frozen': np.array([True, False])}

    def place(x):
        x = np.asarray(x)
        spec = P(*([None] * (x.ndim - 1) + ['fsdp'])) if x.ndim > 1 else P()
        return jax.device_put(x, NamedSharding(mesh, spec))
    return jax.tree.map(place, state)


def target_of(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save_steps(workdir, *at, keep=9, config=CONFIG, **kw):
    run.open_run(workdir, config)
    with Checkpoints(workdir, STAGE, config=config, keep=keep) as checkpoints:
        for step in at:
            checkpoints.save(step, make_state(mesh_of(1, 8), step, **kw),
                             data_state={'next': step, 'sources': {'a': [1, 2]}})
    return checkpoints.folder


def files_of(folder):
    return sorted(os.path.join(d, n) for d, _, names in os.walk(folder) for n in names)


def flip(path, at, mask=0x10):
    with open(path, 'r+b') as f:
        f.seek(at)
        old = f.read(1)[0]
        f.seek(at)
        f.write(bytes([old ^ mask]))


def data_file(step):
    """The file that holds most of the numbers."""
    return max((f for f in files_of(os.path.join(step, 'state')) if '/d/' in f),
               key=os.path.getsize)


def python(code, *args, devices=8, prefix=(), **kw):
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': REPO + os.pathsep + REPO + '/tests',
                        'XLA_FLAGS': virtual(devices)}
    return subprocess.run([*prefix, sys.executable, '-c', code, *map(str, args)], env=env,
                          capture_output=True, text=True, timeout=120, **kw)


# Checksums.

def reference_checksum(x):
    """The same definition in plain Python integers."""
    words = x.view(f'u{x.dtype.itemsize}') if x.dtype.kind not in 'iu' else x
    total, full = 0, (1 << 32) - 1
    for i, bits in enumerate(words.ravel().tolist()):
        w = i * 0x9E3779B1 & full
        w = (w ^ w >> 15) * 0x85EBCA77 & full
        w = (w ^ w >> 13) | 1
        total += bits * w
    return total & full


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', 'int32', 'int16', 'int8',
                                   'uint8', 'uint32', 'bool', 'float8_e4m3fn'])
@pytest.mark.parametrize('shape', [(), (3,), (2, 3, 5)])
def test_checksum_sees_every_byte(dtype, shape):
    bits, dtype = 1 if dtype == 'bool' else 8, jnp.dtype(dtype)
    rng = np.random.default_rng(3)
    raw = rng.integers(0, 1 << bits, size=int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)

    def value(raw):
        return raw.view(dtype).reshape(shape)
    good = int(checkpoint.checksum(value(raw)))
    assert good == reference_checksum(value(raw))
    for i in range(raw.size):
        for mask in (0x01, 0x80, 0xff) if bits == 8 else (1,):
            bad = raw.copy()
            bad[i] ^= mask
            assert int(checkpoint.checksum(value(bad))) != good, (i, mask)


def test_checksum_sees_order_and_zeroed_chunks():
    x = np.arange(1, 4097, dtype=np.float32).reshape(64, 64)
    zeroed = x.copy()
    zeroed[32:] = 0
    swapped = x.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert len({int(checkpoint.checksum(y)) for y in (x, zeroed, swapped, x.T)}) == 4


def test_checksum_is_the_same_on_every_mesh():
    x = np.random.default_rng(0).normal(size=(8, 24)).astype(np.float32)
    sums = {int(checkpoint.checksum(jax.device_put(x, NamedSharding(mesh_of(*shape), spec))))
            for shape in ((1, 1), (1, 8), (2, 4), (8, 1))
            for spec in (P(), P('data', 'fsdp'), P('fsdp'), P(None, ('data', 'fsdp')))}
    assert sums == {reference_checksum(x)}


# Round trips.

def test_restored_on_other_meshes_bit_for_bit(tmp_path):
    folder = save_steps(tmp_path / 'run', 10, 20)
    for shape in ((1, 8), (2, 4), (8, 1), (1, 1)):
        target = target_of(make_state(mesh_of(*shape)))
        state, meta = checkpoint.restore(folder, target, config=CONFIG)
        assert_equal(state, make_state(mesh_of(1, 8), 20))
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding,
                                                                         target)
    assert meta['step'] == 20 and meta['data'] == {'next': 20, 'sources': {'a': [1, 2]}}
    assert meta['fingerprint'] == fingerprint(CONFIG) == fingerprint(meta['config'])
    assert set(meta['versions']) >= {'jax', 'flax', 'orbax', 'jaxsd'}
    older, _ = checkpoint.restore(folder, target, step=10)
    assert_equal(older, make_state(mesh_of(1, 8), 10))
    assert checkpoint.read_meta(folder, 10)['data']['next'] == 10
    assert checkpoint.read_meta(folder) == meta


def test_restored_by_a_process_with_one_device(tmp_path):
    folder = save_steps(tmp_path / 'run', 5)
    done = python('''
import hashlib, sys, jax, numpy as np, test_checkpoint as t
assert jax.device_count() == 1
state, _ = t.checkpoint.restore(sys.argv[1], t.target_of(t.make_state(t.mesh_of(1, 1))))
print(hashlib.sha256(b''.join(np.asarray(x).tobytes() for x in jax.tree.leaves(state))).hexdigest())
''', folder, devices=1)
    leaves = jax.tree.leaves(make_state(mesh_of(1, 8), 5))
    want = hashlib.sha256(b''.join(np.asarray(x).tobytes() for x in leaves)).hexdigest()
    assert done.stdout.split() == [want], done.stderr


def test_parameters_alone(tmp_path):
    folder = save_steps(tmp_path / 'run', 1, 2)
    target = target_of(make_state(mesh_of(2, 4)))['params']
    params, meta = checkpoint.restore_params(folder, target)
    assert_equal(params, make_state(mesh_of(1, 8), 2)['params'])
    os.truncate(data_file(os.path.join(folder, '2')), 100)
    params, meta = checkpoint.restore_params(folder, target)
    assert meta['step'] == 1
    assert_equal(params, make_state(mesh_of(1, 8), 1)['params'])
    target['head']['kernel'] = jax.ShapeDtypeStruct(
        (8, 17), jnp.float32, sharding=target['head']['kernel'].sharding)
    with pytest.raises(CheckpointMismatch, match=r'float32\[8, 16\] for params/head/kernel'):
        checkpoint.restore_params(folder, target)


def test_state_may_be_donated_while_it_is_written(tmp_path):
    run.open_run(tmp_path, CONFIG)
    state = make_state(mesh_of(1, 8), 4)
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + x if x.dtype != bool else ~x, s),
                      donate_argnums=0)
    with Checkpoints(tmp_path, STAGE, config=CONFIG, keep=1) as checkpoints:
        checkpoints.save(4, state, data_state={})
        for _ in range(5):
            state = advance(state)
    restored, _ = checkpoint.restore(checkpoints.folder, target_of(state))
    assert_equal(restored, make_state(mesh_of(1, 8), 4))


def test_resumes_retains_and_saves_a_step_once(tmp_path):
    folder = save_steps(tmp_path, 1, 2, 3, 4, keep=2)
    assert checkpoint.steps(folder) == [3, 4]
    target = target_of(make_state(mesh_of(1, 8)))
    with Checkpoints(tmp_path, STAGE, config=CONFIG, keep=2) as checkpoints:
        state, meta = checkpoints.resume(target)
        before = os.stat(os.path.join(folder, '4')).st_mtime_ns
        checkpoints.save(4, state, data_state=meta['data'])
        assert os.stat(os.path.join(folder, '4')).st_mtime_ns == before
        with pytest.raises(CheckpointError, match='step 3 cannot follow step 4'):
            checkpoints.save(3, state, data_state={})
        checkpoints.save(5, state, data_state={}, wait=True)
        assert checkpoint.steps(folder) == [4, 5]
    with Checkpoints(tmp_path, 'another', config=CONFIG, keep=2) as checkpoints:
        assert checkpoints.resume(target) is None
    with pytest.raises(ConfigError, match='at least 1'):
        Checkpoints(tmp_path, STAGE, config=CONFIG, keep=0)


def test_only_arrays_on_devices_are_saved(tmp_path):
    run.open_run(tmp_path, CONFIG)
    with Checkpoints(tmp_path, STAGE, config=CONFIG, keep=1) as checkpoints:
        for bad in ('words', 3, np.zeros(3), jax.random.key(0)):
            with pytest.raises(ValueError, match='state: params/x must be an array'):
                checkpoints.save(1, {'params': {'x': bad}}, data_state={})
    assert not checkpoint.steps(checkpoints.folder)


# Damage.

def damage_truncate(step):
    path = data_file(step)
    os.truncate(path, os.path.getsize(path) // 2)


def damage_flip_data(step):
    path = data_file(step)
    flip(path, os.path.getsize(path) // 2)


def damage_remove_data(step):
    os.remove(data_file(step))


def damage_flip_meta(step):
    path = os.path.join(step, 'meta', 'meta.json')
    text = open(path).read()
    open(path, 'w').write(text.replace('"next": 30', '"next": 31'))


def damage_remove_meta(step):
    shutil.rmtree(os.path.join(step, 'meta'))


def damage_empty(step):
    shutil.rmtree(step)
    os.mkdir(step)


@pytest.mark.parametrize('damage', [damage_truncate, damage_flip_data, damage_remove_data,
                                    damage_flip_meta, damage_remove_meta, damage_empty])
def test_damage_falls_back_to_an_older_step(tmp_path, damage, caplog):
    folder = save_steps(tmp_path, 10, 20, 30)
    damage(os.path.join(folder, '30'))
    there = files_of(folder)
    state, meta = checkpoint.restore(folder, target_of(make_state(mesh_of(2, 4))))
    assert meta['step'] == 20
    assert_equal(state, make_state(mesh_of(1, 8), 20))
    [warning] = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert 'step 30' in warning and '\n' not in warning
    assert 'TensorStore details' not in warning     # the root of it, not Orbax's wrapping
    assert files_of(folder) == there
    with pytest.raises(CheckpointError, match='step 30'):
        checkpoint.restore(folder, target_of(state), step=30)


def test_no_flipped_byte_anywhere_is_believed(tmp_path):
    folder = save_steps(tmp_path / 'run', 1, 2)
    target = target_of(make_state(mesh_of(1, 1)))
    rng, fell_back = np.random.default_rng(0), 0
    for path in files_of(os.path.join(folder, '2')):
        size = os.path.getsize(path)
        for at in {size - 1, *rng.integers(0, max(size, 1), 2)} if size else ():
            flip(path, int(at))
            state, meta = checkpoint.restore(folder, target)
            flip(path, int(at))
            assert_equal(state, make_state(mesh_of(1, 1), meta['step']))
            assert meta['data']['next'] == meta['step']
            fell_back += meta['step'] == 1
    assert fell_back > 10


def test_an_array_under_another_name_is_not_there(tmp_path):
    """Each leaf's name in Orbax's own list, one letter off: an older step serves, at every leaf."""
    folder = save_steps(tmp_path / 'run', 1, 2)
    state = make_state(mesh_of(1, 1))
    path = os.path.join(folder, '2', 'state', '_METADATA')
    with open(path, 'rb') as f:
        whole = f.read()
    names = checkpoint._named(state)
    for name in names:
        key = f'"key": "{name}"'.encode()
        at = whole.index(key) + len(key) - 2
        flip(path, at)
        found, meta = checkpoint.restore(folder, target_of(state))
        flip(path, at)
        assert meta['step'] == 1, name
        assert_equal(found, make_state(mesh_of(1, 1), 1))
    assert len(names) > 5


def test_values_silently_wrong_on_disk_are_refused(tmp_path):
    """A file that decodes perfectly well, to other numbers: only the checksum can tell."""
    folder = save_steps(tmp_path / 'run', 1, 2)
    other = save_steps(tmp_path / 'other', 1, 3)
    shutil.rmtree(os.path.join(folder, '2', 'state'))
    shutil.copytree(os.path.join(other, '3', 'state'), os.path.join(folder, '2', 'state'))
    with pytest.raises(CheckpointError, match='does not match its checksum'):
        checkpoint.restore(folder, target_of(make_state(mesh_of(1, 1))), step=2)
    assert checkpoint.restore(folder, target_of(make_state(mesh_of(1, 1))))[1]['step'] == 1


def test_after_a_fallback_the_run_goes_on(tmp_path):
    folder = save_steps(tmp_path, 10, 20)
    damage_truncate(os.path.join(folder, '20'))
    target = target_of(make_state(mesh_of(1, 8)))
    with Checkpoints(tmp_path, STAGE, config=CONFIG, keep=1) as checkpoints:
        state, meta = checkpoints.resume(target)
        assert meta['step'] == 10
        assert checkpoint.steps(folder) == [10, 20]
        checkpoints.save(15, state, data_state={}, wait=True)
        assert checkpoint.steps(folder) == [15]
        checkpoints.save(20, make_state(mesh_of(1, 8), 20), data_state={})
    state, meta = checkpoint.restore(folder, target)
    assert_equal(state, make_state(mesh_of(1, 8), 20))
    assert [n.split('.')[:2] for n in os.listdir(folder) if 'unusable' in n] == [['unusable', '20']]


def test_never_starts_over_where_a_checkpoint_was_expected(tmp_path):
    folder = save_steps(tmp_path, 10, 20)
    target = target_of(make_state(mesh_of(1, 8)))
    with pytest.raises(CheckpointError, match='already holds steps up to 20; resume'):
        with Checkpoints(tmp_path, STAGE, config=CONFIG, keep=3) as checkpoints:
            checkpoints.save(1, make_state(mesh_of(1, 8)), data_state={})
    for step in ('10', '20'):
        damage_remove_meta(os.path.join(folder, step))
    with Checkpoints(tmp_path, STAGE, config=CONFIG, keep=3) as checkpoints:
        with pytest.raises(CheckpointError, match='no usable checkpoint among steps 20, 10') as e:
            checkpoints.resume(target)
    assert '\n' not in str(e.value)
    shutil.rmtree(folder)
    with Checkpoints(tmp_path, STAGE, config=CONFIG, keep=3) as checkpoints:
        with pytest.raises(CheckpointError, match='by the ledger step 10 was saved'):
            checkpoints.resume(target)
    with pytest.raises(CheckpointError, match='holds no checkpoint; train'):
        checkpoint.read_meta(folder)


# Another config.

def test_a_checkpoint_of_another_config_is_named(tmp_path):
    folder = save_steps(tmp_path, 10)
    target = target_of(make_state(mesh_of(1, 8)))
    other = CONFIG.copy_and_resolve_references()
    other.seed, other.stages = 7, ({'name': 'pretrain', 'lr': 2e-3},)
    with pytest.raises(CheckpointMismatch, match=r'seed: 0 there, 7 here; stages\[0\].lr: 0.001'):
        checkpoint.restore(folder, target, config=other)
    with pytest.raises(CheckpointMismatch, match=r'float32\[8, 16\] for .*head/kernel, but this '
                                                 r'config has float32\[8, 32\]') as e:
        checkpoint.restore(folder, target_of(make_state(mesh_of(1, 8), width=32)))
    assert '\n' not in str(e.value)
    more = target | {'ema': target['step']}
    with pytest.raises(CheckpointMismatch, match=r'nothing for ema, but .* int32\[\]'):
        checkpoint.restore(folder, more)
    fewer = {k: v for k, v in target.items() if k != 'frozen'}
    with pytest.raises(CheckpointMismatch, match=r'bool\[2\] for frozen, but .* nothing'):
        checkpoint.restore(folder, fewer)
    with pytest.raises(ValueError, match='step has no sharding'):
        checkpoint.restore(folder, target | {'step': jax.ShapeDtypeStruct((), jnp.int32)})
    with pytest.raises(CheckpointError, match='no checkpoint of step 3; it holds 10'):
        checkpoint.restore(folder, target, step=3)


# The disk and the kill.

def test_full_disk_is_one_clear_line_and_keeps_the_previous_step(tmp_path):
    """On a real 4 MiB file system where mounting is allowed, else under a file size limit."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    inside = subprocess.run(['unshare', '-rm', 'mount', '-t', 'tmpfs', 'none', str(disk)],
                            capture_output=True).returncode == 0
    prefix = ('unshare', '-rm', 'sh', '-c', 'mount -t tmpfs -o size=4m none "$0" && exec "$@"',
              str(disk)) if inside else ()
    done = python('''
import os, resource, signal, sys, jax, numpy as np, test_checkpoint as t
disk, inside = sys.argv[1], sys.argv[2] == 'True'
if not inside:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))
small, big = {'x': jax.numpy.ones(9)}, {'x': jax.device_put(
    np.random.default_rng(0).integers(0, 1 << 30, 3 << 20, dtype=np.int32))}
t.run.open_run(disk, t.CONFIG)
def unfinished():
    return [n for n in os.listdir(c.folder) if 'tmp' in n]
with t.Checkpoints(disk, 'a', config=t.CONFIG, keep=1) as c:
    c.save(1, small, data_state={})
    c.save(2, big, data_state={})
    try:
        c.save(3, small, data_state={})
    except t.CheckpointError as e:
        print('next save:', e)
    print(t.checkpoint.steps(c.folder), unfinished())
    c.save(3, small, data_state={}, wait=True)
    print(t.checkpoint.steps(c.folder), unfinished())
    if inside:
        try:
            t.run.write_atomic(disk + '/config.json', 'x' * (5 << 20))
        except OSError as e:
            print('file:', e)
        before = open(disk + '/ledger.jsonl').read()
        try:
            t.run.ledger(disk, {'notes': 'x' * (5 << 20)})
        except OSError as e:
            print('ledger:', e, open(disk + '/ledger.jsonl').read() == before)
        print(t.run.open_run(disk, t.CONFIG), [n for n in os.listdir(disk) if 'tmp' in n])
try:
    with t.Checkpoints(disk, 'a', config=t.CONFIG, keep=1) as c:
        c.resume(t.target_of(small))
        c.save(4, big, data_state={})
        raise KeyError('under way')
except KeyError as e:
    print('not hidden:', e)
try:
    with t.Checkpoints(disk, 'a', config=t.CONFIG, keep=1) as c:
        c.resume(t.target_of(small))
        c.save(4, big, data_state={})
except t.CheckpointError as e:
    print('at exit:', e)
    print(t.checkpoint.steps(c.folder), unfinished())
    sys.exit(3)
''', disk, inside, prefix=prefix)
    lines = done.stdout.splitlines()
    assert done.returncode == 3, done.stdout + done.stderr
    reason = 'no space left on the disk' if inside else ''
    assert lines[0].startswith('next save:') and 'step 2 could not be written' in lines[0]
    assert reason in lines[0] and 'kept is of step 1' in lines[0]
    assert lines[1:3] == ['[1] []', '[3] []']
    if inside:
        assert 'No space left on device' in lines[3] and 'config.json' in lines[3]
        assert 'No space left on device' in lines[4] and lines[4].endswith(' True')
        assert lines[5] == 'True []'
    assert lines[-3] == "not hidden: 'under way'" and 'step 4 could not be' in done.stderr
    assert lines[-2].startswith('at exit:') and 'step 4 could not be written' in lines[-2]
    assert reason in lines[-2] and lines[-1] == '[3] []'
    assert 'Traceback' not in done.stderr, done.stderr


def test_kill_during_a_save_leaves_the_run_usable(tmp_path):
    folder = save_steps(tmp_path, 1)
    done = python('''
import os, sys, signal, time, jax, jax.numpy as jnp, test_checkpoint as t
c = t.Checkpoints(sys.argv[1], t.STAGE, config=t.CONFIG, keep=3)
c.resume(t.target_of(t.make_state(t.mesh_of(1, 8))))
c.save(2, {'x': jax.random.normal(jax.random.key(0), (1 << 24,))}, data_state={})
while not any('tmp' in n for n in os.listdir(c.folder)):
    time.sleep(.001)
os.kill(os.getpid(), signal.SIGKILL)
''', tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any('orbax-checkpoint-tmp' in n for n in os.listdir(folder))
    os.mkdir(os.path.join(folder, 'notes.tmp'))
    target = target_of(make_state(mesh_of(1, 8)))
    assert checkpoint.restore(folder, target)[1]['step'] == 1
    assert any('orbax-checkpoint-tmp' in n for n in os.listdir(folder))     # a reader only reads
    with Checkpoints(tmp_path, STAGE, config=CONFIG, keep=3) as checkpoints:
        assert sorted(os.listdir(folder)) == ['1', 'notes.tmp']
        state, _ = checkpoints.resume(target)
        checkpoints.save(2, state, data_state={})
    assert checkpoint.steps(folder) == [1, 2]


TWO = """
import sys, jax
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize('127.0.0.1:' + sys.argv[1], 2, int(sys.argv[2]),
                           heartbeat_timeout_seconds=20, shutdown_timeout_seconds=60)
import os, numpy as np, test_checkpoint as t
x = np.random.default_rng(0).normal(size=(64, 4096)).astype(np.float32)
mesh = t.mesh_of(1, 2)
sharding = t.NamedSharding(mesh, t.P(None, 'fsdp'))
state = {'x': jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])}
t.run.open_run(sys.argv[3], t.CONFIG)
try:
    t.run.open_run(sys.argv[3], {'seed': 1})
except t.ConfigError as e:
    print('REFUSED', e)
with t.Checkpoints(sys.argv[3], t.STAGE, config=t.CONFIG, keep=2) as c:
    assert c.resume(t.target_of(state)) is None
    for step in (1, 2, 3):
        c.save(step, state, data_state={'next': step})
if jax.process_index() == 1:        # only this process will miss what is cut off
    mine = [f for f in t.files_of(c.folder + '/3/state') if '/ocdbt.process_1/d/' in f]
    os.truncate(max(mine, key=os.path.getsize), 1000)
t.run.all_processes(True)
with t.Checkpoints(sys.argv[3], t.STAGE, config=t.CONFIG, keep=2) as c:
    found, meta = c.resume(t.target_of(state))
    c.save(4, found, data_state={})
[shard] = found['x'].addressable_shards
print('RESULT', meta['step'], meta['data'], (np.asarray(shard.data) == x[shard.index]).all())
"""


def test_two_processes_agree_on_the_step_when_one_cannot_read_it(tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda i: python(TWO, port, i, tmp_path / 'run', devices=1), (0, 1)))
    assert 'REFUSED --workdir' in both[0].stdout
    assert 'REFUSED process 0 refused' in both[1].stdout
    for done in both:
        assert "RESULT 2 {'next': 2} True" in done.stdout, done.stdout + done.stderr
    folder = checkpoint.folder_of(tmp_path / 'run', STAGE)
    assert checkpoint.steps(folder) == [2, 4]
    assert [e['checkpoint'] for e in run.read_ledger(tmp_path / 'run')] == [1, 4]
    x = np.random.default_rng(0).normal(size=(64, 4096)).astype(np.float32)
    target = {'x': jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(
        mesh_of(2, 4), P('fsdp', 'data')))}
    assert_equal(checkpoint.restore(folder, target)[0], {'x': jnp.asarray(x)})


# The run directory.

def test_a_directory_is_made_recognized_or_left_alone(tmp_path):
    workdir = tmp_path / 'new' / 'run'
    assert run.open_run(workdir, CONFIG) is False
    assert run.open_run(workdir, CONFIG) is True
    assert run.read_run(workdir)['fingerprint'] == fingerprint(CONFIG)
    other = CONFIG.copy_and_resolve_references()
    other.seed, other.columns, other.mesh = 1, 8, {'fsdp': -1}
    other.stages = ({'name': 'pretrain', 'lr': 1.0},)
    before = open(workdir / 'config.json').read()
    with pytest.raises(ConfigError, match='holds another run: columns: nothing there, 8 here') as e:
        run.open_run(workdir, other)
    assert '\n' not in str(e.value) and 'more keys' in str(e.value)
    assert os.listdir(workdir) == ['config.json'] and open(workdir / 'config.json').read() == before

    foreign = tmp_path / 'thesis'
    foreign.mkdir()
    (foreign / 'chapter1.tex').write_text('')
    with pytest.raises(ConfigError, match='no run of ours .it holds chapter1.tex'):
        run.open_run(foreign, CONFIG)
    (foreign / 'config.json').write_text('{"seed": 0}')
    with pytest.raises(ConfigError, match='not written by this program'):
        run.open_run(foreign, CONFIG)
    assert sorted(os.listdir(foreign)) == ['chapter1.tex', 'config.json']
    with pytest.raises(ConfigError, match='is a file'):
        run.open_run(foreign / 'chapter1.tex', CONFIG)

    killed = tmp_path / 'killed'
    killed.mkdir()
    (killed / '.config.json.77.tmp').write_text('{"se')
    assert run.open_run(killed, CONFIG) is False


@pytest.mark.parametrize('content', ['', '{', '[]', '\x00\xff', '{"jaxsd_run": 1}'])
def test_a_damaged_config_is_named(tmp_path, content):
    run.open_run(tmp_path, CONFIG)
    (tmp_path / 'config.json').write_text(content)
    with pytest.raises(ConfigError, match='config.json'):
        run.open_run(tmp_path, CONFIG)


def test_a_config_edited_by_hand_is_named(tmp_path):
    run.open_run(tmp_path, CONFIG)
    stored = json.loads((tmp_path / 'config.json').read_text())
    stored['config']['seed'] = 5
    (tmp_path / 'config.json').write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match='changed after it was written'):
        run.read_run(tmp_path)


def test_ledger_survives_a_line_cut_short(tmp_path):
    assert run.last_ledger(tmp_path) is None
    run.ledger(tmp_path, {'event': 'start', 'tokens': 1})
    with open(tmp_path / 'ledger.jsonl', 'a') as f:
        f.write('{"event": "half')
    assert run.last_ledger(tmp_path)['event'] == 'start'
    run.ledger(tmp_path, {'event': 'resume', 'name': 'é'})
    assert [e['event'] for e in run.read_ledger(tmp_path)] == ['start', 'resume']
    assert run.last_ledger(tmp_path)['time_s'] > 1e9


def test_write_atomic_leaves_the_old_file_or_the_new(tmp_path):
    path = tmp_path / 'x.json'
    run.write_atomic(path, 'old')
    with pytest.raises(TypeError):
        run.write_atomic(path, 3)
    assert path.read_text() == 'old'
    run.write_atomic(path, b'new')
    assert path.read_text() == 'new' and os.listdir(tmp_path) == ['x.json']

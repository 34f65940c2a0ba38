# SPDX-License-Identifier: Apache-2.0
"""Does importing a large checkpoint take little memory, and do several processes export as one?"""

import concurrent.futures
import json
import os
import pathlib
import socket
import subprocess
import sys

import at_scale
import jax
import numpy as np
import pytest
import released
from safetensors.numpy import load_file, save_file
from small import virtual

from jaxsd import export
from jaxsd.export import loading, streaming
from jaxsd.stage import flatten

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.parametrize('mesh, host_bytes', [(dict(fsdp=4, tensor=2), 0),
                                              (dict(data=2, fsdp=4), 1 << 20)])
def test_a_shard_is_filled_box_by_box(mesh, host_bytes, tmp_path):
    """On the host and on the devices, by boxes of a few numbers: what reading it whole gives."""
    for config, format in ((released.decoder('llama', pairs='interleaved'), 'hf'),
                           (released.multistream(), 'kyutai')):
        config.mesh = mesh | dict(rules=dict(kv_heads=None, vocab=None))
        params = released.random_params(config, 5)
        folder = str(tmp_path / format)
        export.save(config, params, folder, format)
        source = loading.open_source(config, *loading.agreeing(config, folder, format), folder)
        target = flatten(loading.placed(config))
        for path in ('backbone/blocks/q/kernel', 'backbone/blocks/gate_up/kernel',
                     'backbone/norm/weight', 'frontend/table', 'head/blocks/qkv/kernel'):
            if path not in target:
                continue
            patch = streaming.whole(path, source.shapes[path])
            made = streaming.array(source, [patch], target[path], box_bytes=700,
                                 host_bytes=host_bytes)
            assert made.sharding == target[path].sharding
            np.testing.assert_array_equal(np.asarray(made), flatten(params)[path], err_msg=path)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float64'])
def test_every_stored_precision_becomes_float32(dtype, tmp_path):
    config = released.decoder('qwen2')
    export.save(config, released.random_params(config, 5), str(tmp_path / 'out'), 'hf')
    path = tmp_path / 'out' / 'model.safetensors'
    stored = {k: v.astype(dtype) for k, v in load_file(path).items()}
    save_file(stored, path)
    whole = export.import_params(config, str(tmp_path / 'out'), 'hf')
    out = str(tmp_path / 'out')
    source = loading.open_source(config, *loading.agreeing(config, out, 'hf'), out)
    table = flatten(loading.placed(config, jax.devices()[:1]))['frontend/table']
    made = streaming.array(source, [streaming.whole('frontend/table', table.shape)], table,
                         host_bytes=0, box_bytes=700)
    want = stored['model.embed_tokens.weight'].astype(np.float32)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(made), want)
    np.testing.assert_array_equal(whole['frontend']['table'], want)


# Several processes -------------------------------------------------------------------------------

TWO = """
import sys, jax
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize('127.0.0.1:' + sys.argv[1], 2, int(sys.argv[2]),
                           heartbeat_timeout_seconds=60, shutdown_timeout_seconds=60)
from jaxsd import export
lm = export.load(sys.argv[3], mesh=dict(fsdp=2))
q = lm.params['backbone']['blocks']['q']['kernel']
assert not q.is_fully_addressable and q.addressable_shards[0].data.shape[1] == q.shape[1] // 2
export.save(lm.config, lm.params, sys.argv[4], lm.format, shard_bytes=100_000)
try:
    export.save(lm.config, lm.params, sys.argv[4], lm.format)
except ValueError as e:
    print('REFUSED', e)
"""


def processes(script, *argv):
    """`script` as two processes of one device each; their CompletedProcesses."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = os.environ | dict(XLA_FLAGS='', JAX_PLATFORMS='cpu',
                            PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / 'tests')]))

    def one(i):
        return subprocess.run([sys.executable, '-c', script, str(port), str(i), *map(str, argv)],
                              env=env, capture_output=True, text=True, timeout=600)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(one, (0, 1)))


@pytest.mark.slow
def test_two_processes_export_what_one_does(tmp_path):
    config = released.decoder('llama')
    export.save(config, released.random_params(config, 3), str(tmp_path / 'in'), 'hf')
    both = processes(TWO, tmp_path / 'in', tmp_path / 'out')
    assert [done.returncode for done in both] == [0, 0], both[0].stderr + both[1].stderr
    assert 'REFUSED' in both[0].stdout and 'is not an empty folder' in both[0].stdout
    assert 'REFUSED process 0 refused' in both[1].stdout
    lm = export.load(str(tmp_path / 'in'))
    export.save(lm.config, lm.params, str(tmp_path / 'alone'), lm.format, shard_bytes=100_000)
    names = sorted(os.listdir(tmp_path / 'alone'))
    assert names == sorted(os.listdir(tmp_path / 'out')) and len(names) > 6
    for name in names:
        if name.startswith('model'):
            assert ((tmp_path / 'out' / name).read_bytes()
                    == (tmp_path / 'alone' / name).read_bytes()), name


# At full scale -----------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize('mesh', [{}, dict(fsdp=2, tensor=2)])
def test_memory_of_a_large_import(mesh, tmp_path):
    """More than 4 GB onto one device and onto four, in a process of its own. Prints the figures."""
    folder = tmp_path / 'large'
    size = at_scale.make(str(folder), 4.2)
    assert size > 4e9
    devices = int(np.prod(list(mesh.values()), dtype=int))
    env = os.environ | dict(
        JAX_PLATFORMS='cpu', XLA_FLAGS=virtual(devices))
    done = subprocess.run([sys.executable, str(ROOT / 'tests' / 'at_scale.py'), 'import',
                           str(folder), json.dumps(mesh)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found['model_bytes'] == size <= found['array_bytes']     # gains lie on every device
    assert found['devices'] == devices
    assert found['process_bytes'] < found['bound_bytes']

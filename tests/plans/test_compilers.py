# SPDX-License-Identifier: Apache-2.0
"""Plans by the compilers of TPUs and GPUs, none of which is here. Minutes: `make test-plans`.

Each plan is a process of its own: what compiles for absent machines wants its environment set
before jax is imported.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.plans
ROOT = pathlib.Path(__file__).resolve().parents[2]


def plan(*argv, ok=True):
    env = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_PLATFORMS')}
    done = subprocess.run([sys.executable, '-m', 'jaxsd', 'plan', *argv], cwd=ROOT, env=env,
                          capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert (done.returncode == 0) == ok, done.stderr
    return done


SMALL = ('--config', 'configs/spirit_lm.py', '--config.backbone.layers=8')


@pytest.mark.parametrize('topology', ['v5e:2x4', 'v5p:2x2x2', 'v6e:2x4', 'v4:2x2x2', 'h200:8'])
def test_a_scanned_model_on_eight_devices(topology):
    """Weights are gathered in every layer, forward and backward, and their gradients scattered."""
    said = plan(*SMALL, '--topology', topology, '--config.mesh.fsdp=4', '--config.mesh.tensor=2',
                '--config.stages[0].batch=8').stdout
    assert 'fits    yes' in said
    weights = 8 * (4 * 4096 ** 2 + 3 * 4096 * 11008)        # of the scanned layers
    gathered = sum(map(float, re.findall(r'all-gather: ([\d.]+) GB', said))) * 1e9
    least = 2 * weights * 2 / 2 * 3 / 4                     # twice, bf16, half of it by tensor
    assert 0.9 * least < gathered < 3.5 * least
    assert 20 < float(re.search(r'MFU ([\d.]+)%', said)[1]) < 95


def test_what_does_not_fit_is_said_by_the_compiler():
    failed = plan(*SMALL, '--topology', 'v5e:2x4', '--config.stages[0].batch=64', ok=False)
    assert re.search(r'fits    NO: .*\d+\.\d+G of 15\.\d+G', failed.stdout)
    assert 'not everything fits' in failed.stderr and len(failed.stderr.splitlines()) == 1


def test_two_slices():
    """Each chip receives the other slice's sum of its part of the gradient: the layers' in two
    bytes, those of embeddings and head in four. The rest stays within a slice."""
    said = plan('--config', 'configs/spirit_lm.py', '--config.backbone.layers=2', '--topology',
                'v5e:2x4*2', '--config.mesh.data=2', '--config.mesh.slices=2',
                '--config.stages[0].batch=16').stdout
    layers, tables = 2 * (4 * 4096 ** 2 + 3 * 4096 * 11008), 2 * 32_512 * 4096
    received = sum(map(float, re.findall(r'between-slices: ([\d.]+) GB', said))) * 1e9
    assert received == pytest.approx((2 * layers + 4 * tables) / 8, rel=0.02)


def test_a_shape_that_the_compiler_refuses_is_one_line():
    failed = plan(*SMALL, '--topology', 'v5e:3x5', ok=False)
    assert len(failed.stderr.splitlines()) == 1 and 'v5e:3x5' in failed.stderr

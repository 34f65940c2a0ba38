# SPDX-License-Identifier: Apache-2.0
"""What every test stands on: eight virtual CPU devices, a compilation cache, and a small corpus.

Nothing here imports jax: the devices and the cache are environment variables that must be set
before the first import, and that processes started by a test inherit.
"""

import contextlib
import fcntl
import gc
import hashlib
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEVICES = 8
CORPUS_HOURS = 0.05


def _own_folder(name: str) -> pathlib.Path:
    """A folder in the temporary directory that belongs to this user and nobody else can write."""
    folder = pathlib.Path(tempfile.gettempdir()) / f'jaxsd-tests-{os.getuid()}'
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise RuntimeError(f'{folder} belongs to someone else; set TMPDIR to a folder of your own')
    (folder / name).mkdir(mode=0o700, exist_ok=True)
    return folder / name


os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join(
    [flag for flag in os.environ.get('XLA_FLAGS', '').split()
     if not flag.startswith('--xla_force_host_platform_device_count')]
    # On a busy machine one device of eight may wait longer than the 40 s after which XLA aborts.
    + ['--xla_cpu_collective_call_terminate_timeout_seconds=900',
       # Most programs of a test run once: compiling them is most of the suite's time.
       '--xla_backend_optimization_level=1', '--xla_cpu_parallel_codegen_split_count=1',
       f'--xla_force_host_platform_device_count={DEVICES}'])
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_own_folder('compiled')))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.02')
os.environ['PYTHONPATH'] = os.pathsep.join(
    filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))


def _corpus_key() -> str:
    """Changes whenever something that writes the corpus does."""
    digest = hashlib.sha256(f'{CORPUS_HOURS} wav {sys.version_info[:2]}'.encode())
    for path in [*sorted((ROOT / 'data_pipelines').glob('*.py')), ROOT / 'jaxsd' / 'codec.py',
                 ROOT / 'jaxsd' / 'types.py']:
        digest.update(path.name.encode() + b'\0' + path.read_bytes() + b'\0')
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _lock(path: pathlib.Path):
    """Holds `path` against other test processes; the system lets go if this process dies."""
    with open(path, 'w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


@pytest.fixture
def file_limit():
    """`with file_limit(size):` no file can grow past `size` bytes, which stands for a full disk."""
    @contextlib.contextmanager
    def limit(size: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return limit


@pytest.fixture(scope='module', autouse=True)
def forget():
    """Compiled programs are given back after each file: together they would take more mappings of
    memory than Linux allows a process (vm.max_map_count), and the next one to compile is killed."""
    yield
    if jax := sys.modules.get('jax'):
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope='session')
def corpus() -> pathlib.Path:
    """A dataset directory with three minutes of synthesised speech. Read it; do not write to it.

    Built once for all test processes and kept until the code that makes it changes.
    """
    shelf = _own_folder('corpora')
    folder = shelf / _corpus_key()
    with _lock(shelf / f'{folder.name}.lock'):
        if not folder.exists():
            half = shelf / f'{folder.name}.building'
            shutil.rmtree(half, ignore_errors=True)     # left by a build that was killed
            command = [sys.executable, '-m', 'data_pipelines.demo', '--hours', str(CORPUS_HOURS),
                       '--keep-wav', '--out', str(half)]
            made = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT)
            if made.returncode:
                pytest.fail(f'{" ".join(command)} ended with {made.returncode}:\n'
                            + made.stdout[-4000:], pytrace=False)
            os.replace(half, folder)
    return folder

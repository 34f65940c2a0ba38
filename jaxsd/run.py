# SPDX-License-Identifier: Apache-2.0
"""The run directory: what was asked for, and what was done, told without asking anyone.

A run directory belongs to one config. `config.json` says which; `ledger.jsonl` gains one line per
start, resume and stage; checkpoints, metrics and samples lie beside them. A directory that holds
anything else is never touched, and every file is written whole or not at all.
"""

import contextlib
import fcntl
import itertools
import json
import os
import re
import time
from importlib import metadata

import jax
import numpy as np
from jax.experimental import multihost_utils

import jaxsd
from jaxsd.config import ConfigError, fingerprint, plain, to_json, typed, unplaced

FORMAT = 1
CONFIG_BYTES = 1 << 24      # bounds what a damaged config.json may allocate


def write_atomic(path: str, content: bytes | str):
    """Writes the whole of `content` to `path`, or leaves what was there. Raises OSError."""
    folder, name = os.path.split(os.path.abspath(path))
    partial = os.path.join(folder, f'.{name}.{os.getpid()}.tmp')
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(partial, 'wb') as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException as e:
        if os.path.exists(partial):
            os.remove(partial)
        if isinstance(e, OSError):
            raise OSError(e.errno, f'{e.strerror} while writing', path) from None
        raise


def open_run(workdir: str, config, first: dict | None = None, made: dict | None = None) -> bool:
    """Makes `workdir` the run of `config`, or recognizes it: True where the run existed before.

    A missing or empty directory becomes a run (config.json is written). Raises ConfigError for a
    directory that holds another run, naming the differing keys, or anything else; such a directory
    is not touched. Process 0 looks and writes, the others hear its verdict.

    first: a ledger entry that is written before `workdir` is a run that anyone else would accept.
    made: {file, overrides, doc, directory}: which file and flags the config came from, and where.
    """
    return bool(on_first_process(lambda: _open_run(workdir, config, first, made or {})))


def _open_run(workdir: str, config, first: dict | None, made: dict) -> bool:
    path = os.path.join(workdir, 'config.json')
    if os.path.exists(workdir) and not os.path.isdir(workdir):
        raise ConfigError(f'--workdir {workdir} is a file; name a directory')
    # A name like .config.json.123.tmp is what a kill in the middle of the first write leaves.
    there = [n for n in (os.listdir(workdir) if os.path.isdir(workdir) else ())
             if not re.fullmatch(r'\.config\.json\.\d+\.tmp', n)]
    if not there:
        os.makedirs(workdir, exist_ok=True)
        noted = os.path.join(workdir, 'ledger.jsonl')
        try:
            if first:
                ledger(workdir, first)
            write_atomic(path, json.dumps({
                'jaxsd_run': FORMAT, 'fingerprint': fingerprint(config),
                'versions': versions(), **made, 'config': json.loads(to_json(config))},
                indent=1) + '\n')
        except BaseException:
            if os.path.exists(noted):       # else the directory would be no run and not empty
                os.remove(noted)
            raise
        return False
    if 'config.json' not in there:
        raise ConfigError(f'--workdir {workdir} is not empty and no run of ours (it holds '
                          f'{min(there)}); name another directory')
    stored = read_run(workdir)
    by = ' '.join(map(typed, ['--config', stored.get('file', ''), *stored.get('overrides', ())]))
    same_run(workdir, config, f'give {by} or ' if 'file' in stored else '')
    if first:
        ledger(workdir, first)
    return True


@contextlib.contextmanager
def held(workdir: str):
    """Keeps others from training in `workdir` meanwhile: they would move each other's files.

    Raises ConfigError where one does. The system lets go when process 0 ends, however it ends;
    a filesystem without locks keeps nobody away.
    """
    file = None

    def lock():
        nonlocal file
        file = open(os.path.join(workdir, 'config.json'), encoding='utf-8')
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigError(f'--workdir {workdir} is being trained in by another process; wait '
                              'until it has ended, or stop it') from None
        except OSError:
            pass
        return 0
    on_first_process(lock)
    try:
        yield
    finally:
        if file:
            file.close()


def same_run(workdir: str, config, fix: str = 'leave --config out or ', *,
             moved: bool = False) -> None:
    """Raises ConfigError unless `workdir` is a run of `config`, naming the keys that differ.

    moved: data, codec and tokenizer may lie elsewhere than when it was trained.
    """
    there, here = (unplaced(c) if moved else c for c in (read_run(workdir)['config'], config))
    if fingerprint(there) != fingerprint(here):
        trained = ({k: v for k, v in plain(c).items() if k != 'evals'} for c in (there, here))
        raise ConfigError(f'--workdir {workdir} holds another run: {differences(*trained)}; {fix}'
                          'name another directory')


def read_run(workdir: str) -> dict:
    """The run's config.json: fingerprint, config, versions. ConfigError if it is no run of ours."""
    path = os.path.join(workdir, 'config.json')
    try:
        with open(path, encoding='utf-8') as f:
            stored = json.loads(f.read(CONFIG_BYTES))
    except FileNotFoundError:
        raise ConfigError(f'--workdir {workdir} holds no run (no config.json)') from None
    except (OSError, ValueError) as e:
        raise ConfigError(f'{path} cannot be read: {e}') from None
    if not isinstance(stored, dict) or stored.get('jaxsd_run') != FORMAT:
        raise ConfigError(f'{path} was not written by this program; name another directory')
    if stored.get('fingerprint') != fingerprint(stored.get('config')):
        raise ConfigError(f'{path} was changed after it was written: its fingerprint is '
                          f'{stored.get("fingerprint")}, its content says '
                          f'{fingerprint(stored.get("config"))}')
    return stored


def differences(old, new, *, at_most: int = 3) -> str:
    """The first keys in which two configs differ, as `seed: 0 there, 1 here; ...`."""
    found = differing(old, new)
    show = [f'{k}: {str(a)[:40]} there, {str(b)[:40]} here'
            for k, (a, b) in itertools.islice(found.items(), at_most)]
    more = f' (and {len(found) - at_most} more keys)' if len(found) > at_most else ''
    return '; '.join(show) + more


def differing(old, new) -> dict[str, tuple]:
    """{path: (old value, new value)} of every leaf in which two configs differ, by path; a leaf
    that one of them lacks is 'nothing' there."""
    missing = object()

    def flat(x, path=''):
        if isinstance(x, dict) and x:
            return {k: v for key in x for k, v in flat(x[key], f'{path}.{key}').items()}
        if isinstance(x, list) and x:
            return {k: v for i, y in enumerate(x) for k, v in flat(y, f'{path}[{i}]').items()}
        return {path.lstrip('.'): x}

    a, b = flat(json.loads(to_json(old))), flat(json.loads(to_json(new)))
    return {k: (a.get(k, 'nothing'), b.get(k, 'nothing')) for k in sorted(a | b)
            if a.get(k, missing) != b.get(k, missing)}


def ledger(workdir: str, entry: dict):
    """Appends one JSON line to the run's ledger.jsonl and waits until the disk has it (process 0).

    A line that a crash cut short stays alone on its line. Raises OSError on a full disk, leaving
    the ledger as it was.
    """
    if jax.process_index():
        return
    line = json.dumps({'time_s': round(time.time(), 3), **entry}) + '\n'
    f = os.open(os.path.join(workdir, 'ledger.jsonl'), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(f).st_size
        data = (b'' if not size or os.pread(f, 1, size - 1) == b'\n' else b'\n') + line.encode()
        try:
            while data:
                data = data[os.write(f, data):]
            os.fsync(f)
        except OSError:
            os.ftruncate(f, size)
            raise
    finally:
        os.close(f)


def read_ledger(workdir: str) -> list[dict]:
    """Every whole line of the run's ledger, oldest first; lines cut short by a crash are left out.
    """
    path = os.path.join(workdir, 'ledger.jsonl')
    entries = []
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as f:
            for line in f:
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if isinstance(entry, dict):
                    entries.append(entry)
    return entries


def last_ledger(workdir: str) -> dict | None:
    """The newest whole entry of the run's ledger, or None."""
    return next(reversed(read_ledger(workdir)), None)


def began_s() -> float:
    """When this process began (Unix time): what its imports took belongs to a run, too."""
    try:
        with open('/proc/self/stat') as stat, open('/proc/uptime') as uptime:
            ticks = int(stat.read().rpartition(')')[2].split()[19])
            age_s = float(uptime.read().split()[0]) - ticks / os.sysconf('SC_CLK_TCK')
    except (OSError, ValueError, IndexError):       # no Linux
        age_s = 0.0
    return time.time() - max(0.0, age_s)


def versions() -> dict[str, str]:
    names = {'jax': 'jax', 'jaxlib': 'jaxlib', 'flax': 'flax', 'optax': 'optax',
             'orbax': 'orbax-checkpoint', 'numpy': 'numpy'}
    return {'jaxsd': jaxsd.__version__} | {k: metadata.version(v) for k, v in names.items()}


def on_first_process(fn) -> int:
    """Runs `fn` on process 0 and hands its small integer to all; all raise if it does."""
    error, code = None, -1
    if jax.process_index() == 0:
        try:
            code = int(fn())
        except (OSError, ValueError) as e:
            error = e
    if jax.process_count() > 1:
        code = int(multihost_utils.broadcast_one_to_all(np.int32(code)))
    if error is not None:
        raise error
    if code < 0:
        raise ConfigError('process 0 refused; its own message says why')
    return code


def all_processes(good: bool) -> bool:
    """True where `good` holds on every process: what lets them leave a step together."""
    if jax.process_count() > 1:
        return bool(np.all(multihost_utils.process_allgather(np.array(good))))
    return good

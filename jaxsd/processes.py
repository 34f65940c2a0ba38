# SPDX-License-Identifier: Apache-2.0
"""Several processes as one run: how they find each other, and how the rest end when one is lost.

jax's coordination service does most of it: it hears SIGTERM for all, and its heartbeats end a run
whose process went silent, with a message that names it. Here it is told how long to wait, and the
error that a broken collective raises becomes one line and an exit status: whoever is left calls the
roll, and those who do not answer are the lost ones.
"""

import logging
import os
import re
import signal
import socket
import sys
import time

import jax
from jax._src import distributed

from jaxsd.config import ConfigError

log = logging.getLogger('jaxsd')

AGAIN = 75
"""Exit status that asks for the same command again (EX_TEMPFAIL): a process was lost."""

WAITS = {       # environment variable: (argument of jax.distributed.initialize, seconds)
    'JAXSD_START_TIMEOUT_S': ('initialization_timeout', 300),
    # Half a minute of silence is an outage; a run should be over within a minute of a death.
    'JAXSD_HEARTBEAT_TIMEOUT_S': ('heartbeat_timeout_seconds', 40),
    'JAXSD_SHUTDOWN_TIMEOUT_S': ('shutdown_timeout_seconds', 300),
}
ROLL_CALL_S = 5.0
_LAST_WORDS_S = 2.0
_BROKEN = re.compile('gloo|nccl|coordination|connection|socket|heartbeat|barrier|UNAVAILABLE|'
                     'DEADLINE_EXCEEDED|ABORTED', re.IGNORECASE)
_names: dict[int, str] = {}         # what process 0 was called, known before it can be lost


def connect() -> None:
    """Joins the other processes of a run before any device is touched.

    JAXSD_DISTRIBUTED=1 lets jax find them by itself, on TPU pods, GKE and Slurm; where it cannot,
    JAXSD_COORDINATOR=host:port with JAXSD_PROCESSES and JAXSD_PROCESS_INDEX says it outright. WAITS
    names the time-outs. Raises ConfigError for settings that say nothing. Where not all are there
    in time, jax ends the process.
    """
    coordinator = os.environ.get('JAXSD_COORDINATOR')
    if not coordinator and os.environ.get('JAXSD_DISTRIBUTED') != '1':
        return
    waits = {argument: _seconds(name, default) for name, (argument, default) in WAITS.items()}
    if os.environ.get('JAX_PLATFORMS', '') == 'cpu':
        jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    if coordinator:
        count, index = (os.environ.get(k, '') for k in ('JAXSD_PROCESSES', 'JAXSD_PROCESS_INDEX'))
        if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
            raise ConfigError('JAXSD_COORDINATOR needs JAXSD_PROCESSES and JAXSD_PROCESS_INDEX, a '
                              f'count and a number below it; got {count!r} and {index!r}')
        log.info('process %s of %s waits up to %d s for the others at %s', index, count,
                 waits['initialization_timeout'], coordinator)      # jax only aborts
        jax.distributed.initialize(coordinator, int(count), int(index), **waits)
    else:
        try:
            jax.distributed.initialize(**waits)
        except ValueError as e:
            raise ConfigError(f'JAXSD_DISTRIBUTED=1, but jax cannot find the other processes here '
                              f'({e}); set JAXSD_COORDINATOR, JAXSD_PROCESSES and '
                              'JAXSD_PROCESS_INDEX') from None
    here = distributed.global_state
    here.client.key_value_set(f'jaxsd/name/{here.process_id}',
                              f'pid {os.getpid()} on {socket.gethostname()}')
    _names[0] = here.client.blocking_key_value_get('jaxsd/name/0',
                                                   1000 * waits['initialization_timeout'])


def _seconds(name: str, default: int) -> int:
    text = os.environ.get(name, '') or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f'{name} must be a whole number of seconds above 0, got {text!r}')
    return int(text)


def stopped_status(number: int = signal.SIGTERM) -> int:
    """The exit status of a run that was asked to stop by a signal and saved: 0, after Ctrl-C 130,
    so that no script goes on to what comes after; or JAXSD_STOPPED_STATUS.

    Schedulers that start only failed jobs again need another one, say 75.
    """
    text = os.environ.get('JAXSD_STOPPED_STATUS', '') or (
        '130' if number == signal.SIGINT else '0')
    if not text.isdecimal() or int(text) > 255:
        raise ConfigError(f'JAXSD_STOPPED_STATUS must be an exit status, 0..255, got {text!r}')
    return int(text)


def end(error: BaseException, trace: str = '') -> int:
    """The exit status 1 after an error; among several processes this leaves at once instead.

    An ordinary exit would wait for processes that may never get there, and then abort. If `error`
    tells of a broken connection, a line says which processes do not answer, and the status is
    AGAIN: what was lost is a process, and the same command goes on from the last checkpoint.
    """
    here = distributed.global_state
    if (here.num_processes or 1) == 1:
        return 1
    sys.stderr.write(trace)
    lost = _lost(here) if _BROKEN.search(str(error)) else []
    if lost:
        sys.stderr.write(f'process {here.process_id} of {here.num_processes} stops: no answer from '
                         f'{", ".join(lost)}; the same command goes on from the last checkpoint\n')
    if here.process_id == 0:
        time.sleep(_LAST_WORDS_S)       # the others hear through this one; let them finish
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(AGAIN if lost else 1)


def _lost(here) -> list[str]:
    """The processes that do not answer. Everyone who is left has met the same error and asks."""
    there, names = {here.process_id}, dict(_names)
    host, port = here.coordinator_address.rsplit(':', 1)
    try:
        # jax aborts soon after it has lost the coordinator: quicker to ask the system first.
        socket.create_connection((host, int(port)), timeout=ROLL_CALL_S).close()
        names |= {_index(k): name for k, name in here.client.key_value_dir_get('jaxsd/name/')}
        here.client.key_value_set(f'jaxsd/here/{here.process_id}', '', allow_overwrite=True)
        limit = time.monotonic() + ROLL_CALL_S
        while len(there) < here.num_processes and time.monotonic() < limit:
            there |= {_index(k) for k, _ in here.client.key_value_dir_get('jaxsd/here/')}
            time.sleep(0.2)
    except Exception as e:          # jax raises many kinds where process 0 is gone
        log.debug('the coordinator does not answer: %s', e)
    # Without the coordinator nobody can be asked, and it is what is known to be lost.
    missing = [i for i in range(here.num_processes) if i not in there] if 0 in there else [0]
    return [f'process {i} of {here.num_processes} ({names.get(i, "unknown")})' for i in missing]


def _index(key: str) -> int:
    return int(key.rsplit('/', 1)[1])

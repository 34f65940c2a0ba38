# SPDX-License-Identifier: Apache-2.0
"""Is a wrong setting told in one line? What a lost process does is in tests/test_resume.py."""

import signal
import subprocess
import sys

import pytest

from jaxsd import processes
from jaxsd.config import ConfigError


@pytest.mark.parametrize('settings, said', [
    (dict(JAXSD_DISTRIBUTED='1', JAXSD_HEARTBEAT_TIMEOUT_S='soon'),
     "JAXSD_HEARTBEAT_TIMEOUT_S must be a whole number of seconds above 0, got 'soon'"),
    (dict(JAXSD_DISTRIBUTED='1', JAXSD_START_TIMEOUT_S='0'), 'JAXSD_START_TIMEOUT_S must be'),
    (dict(JAXSD_COORDINATOR='x:1'), 'JAXSD_COORDINATOR needs JAXSD_PROCESSES'),
    (dict(JAXSD_COORDINATOR='x:1', JAXSD_PROCESSES='2', JAXSD_PROCESS_INDEX='2'),
     "a count and a number below it; got '2' and '2'"),
])
def test_wrong_settings(settings, said, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        processes.connect()


def test_the_status_of_a_stopped_run(monkeypatch):
    monkeypatch.delenv('JAXSD_STOPPED_STATUS', raising=False)
    assert processes.stopped_status() == 0
    assert processes.stopped_status(signal.SIGINT) == 130
    monkeypatch.setenv('JAXSD_STOPPED_STATUS', '75')
    assert processes.stopped_status() == processes.stopped_status(signal.SIGINT) == 75
    for wrong in ('256', '-1', 'yes'):
        monkeypatch.setenv('JAXSD_STOPPED_STATUS', wrong)
        with pytest.raises(ConfigError, match=f"JAXSD_STOPPED_STATUS.*'{wrong}'"):
            processes.stopped_status()


def test_where_jax_finds_no_cluster(monkeypatch):
    """In a process of its own, for jax joins others only before it has touched a device."""
    monkeypatch.setenv('JAXSD_DISTRIBUTED', '1')
    done = subprocess.run([sys.executable, '-m', 'jaxsd', 'train', '--config',
                           'configs/spirit_lm.py:tiny', '--workdir', 'nowhere'],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count('\n') == 1, done.stderr
    assert 'jax cannot find the other processes here' in done.stderr
    assert 'set JAXSD_COORDINATOR, JAXSD_PROCESSES and JAXSD_PROCESS_INDEX' in done.stderr

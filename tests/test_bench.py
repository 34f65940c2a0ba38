# SPDX-License-Identifier: Apache-2.0
"""Does `bench` time the step that training runs, on what training reads?"""

import json

import pytest
from test_cli import flags

from jaxsd import cli


@pytest.mark.parametrize('at_hand', [True, False])
def test_figures_of_a_step(corpus, at_hand, tmp_path, capsys, caplog):
    argv = flags(corpus, 'moshi') if at_hand else [*flags(corpus, 'moshi'),
                                                   '--config.data.path=/nowhere']
    out = tmp_path / 'figures.json'
    assert cli.main(['bench', *argv, '--steps', '3', '--out', str(out)]) == 0
    said, found = capsys.readouterr(), json.loads(out.read_text())
    assert 'positions/s' in said.out and ('random ids' in caplog.text) != at_hand
    rows, columns = found['positions/s'] / found['steps/s'] / 192, 192
    assert rows == pytest.approx(round(rows)) and columns == 192 and rows >= 1
    assert 0 < found['step s'] <= found['slowest step s'] and found['compile s'] > 0
    assert (found['data wait s'] is not None) == (found['audio-hours/h'] is not None) == at_hand
    assert found['MFU %'] is None and found['TFLOP/s/device'] > 0
    assert found['peak memory GB'] > 0.05

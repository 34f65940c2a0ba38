# SPDX-License-Identifier: Apache-2.0
"""Does Weights & Biases get what a run's files hold? Offline, read back from the file it keeps.

Needs wandb, so it runs where the peers are (`make test-peers`).
"""

import json
import pathlib
import struct

import pytest

from jaxsd import cli

pytestmark = pytest.mark.peers
BLOCK = 1 << 15


def kept(folder) -> list:
    """The records of every run kept in `folder`: protobufs in a LevelDB log behind 7 bytes."""
    from wandb.proto import wandb_internal_pb2
    out = []
    for path in sorted(pathlib.Path(folder).glob('wandb/offline-run-*/*.wandb')):
        data, at, whole = path.read_bytes(), 7, b''
        while at + 7 <= len(data):
            if (left := BLOCK - at % BLOCK) < 7:    # too few for a header: the block's padding
                at += left
                continue
            size, kind = struct.unpack_from('<HB', data, at + 4)
            whole += data[at + 7:at + 7 + size]
            at += 7 + size
            if kind in (1, 4):                      # a whole record, or the last part of one
                record = wandb_internal_pb2.Record()
                record.ParseFromString(whole)
                out.append(record)
                whole = b''
    return out


def test_a_run_is_sent_as_its_files_have_it(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.chdir(tmp_path)
    run = tmp_path / 'demo'
    run.mkdir()
    (run / 'config.json').write_text(json.dumps(dict(config=dict(seed=7), fingerprint='f00d')))
    lines = [dict(stage='listen', step=10, loss=2.5, terms=dict(text=1.5)),
             dict(stage='listen', step=10, held_out={'a/loss': 3.0}),   # one point with the above
             dict(stage='speak', step=5, loss=1.25)]
    (run / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n{"cut')
    (run / 'evaluation.json').write_text(json.dumps(
        [dict(task='asr', stage='speak', metrics={'WER %': 4.5})]))
    assert cli.main(['report', '--workdir', str(run), '--out', str(tmp_path / 'r.html'),
                     '--wandb', 'talk']) == 0
    records = kept(tmp_path)
    (about,) = [r.run for r in records if r.HasField('run')]
    assert (about.project, about.display_name, about.run_id) == ('talk', 'demo', 'demo-f00d')
    assert [json.loads(u.value_json) for u in about.config.update if u.key == 'seed'] == [7]
    points = [{tuple(i.nested_key) or (i.key,): json.loads(i.value_json) for i in r.history.item}
              for r in records if r.HasField('history')]
    found = [{k: v for k, v in p.items() if not k[0].startswith('_')} for p in points]
    joined = [{'.'.join(k): v for k, v in p.items()} for p in found]
    assert [p['listen.loss'] for p in joined if 'listen.loss' in p] == [2.5]
    assert joined[0]['listen.terms.text'] == 1.5 and joined[0]['listen.step'] == 10
    assert joined[1]['speak.loss'] == 1.25 and len(joined) == 2
    said = {u.key or '.'.join(u.nested_key): json.loads(u.value_json)
            for r in records if r.HasField('summary') for u in r.summary.update}
    assert said['asr/speak/WER %'] == 4.5


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    (tmp_path / 'results.json').write_text('{}')
    assert cli.main(['report', '--workdir', str(tmp_path), '--out', str(tmp_path / 'r.html'),
                     '--wandb', 'talk']) != 0
    assert 'holds no run' in capsys.readouterr().err

# SPDX-License-Identifier: Apache-2.0
"""Does the page of a trained stage answer recordings, several at once, and refuse what it must?"""

import base64
import http.client
import io
import json
import socket
import threading
import time

import numpy as np
import pytest
import soundfile
from test_evaluate import made

from jaxsd import codec, data, generate, live, talk, trained
from jaxsd.config import ConfigError, plain


@pytest.fixture(scope='module')
def system(corpus):
    lm = made(corpus, 'moshi')
    rvq = codec.rvq(**{k: v for k, v in lm.config.codec.items() if k != 'name'})
    codes = next(data.examples(lm.config, 'train', 'stories')).codes[0][:, 5:30]
    return lm, rvq, rvq.decode(codes)


@pytest.fixture(scope='module')
def server(system):
    lm, rvq, _ = system
    with talk.Server(lm, rvq, ('127.0.0.1', 0), slots=2, samplers={}) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()


def recording(wav, rate=16000, **options) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, wav, rate, **dict(format='WAV', subtype='PCM_16') | options)
    return out.getvalue()


def asked(server, method='POST', path='/talk', body=None, **headers):
    """(status, content) of one request, whose content is lines of JSON after a POST that worked."""
    there = http.client.HTTPConnection('127.0.0.1', server.server_address[1], timeout=60)
    there.request(method, path, body, headers)
    answer = there.getresponse()
    content = answer.read()
    there.close()
    if answer.status == 200 and method == 'POST':
        return 200, [json.loads(line) for line in content.splitlines()]
    return answer.status, content


def test_the_page_is_complete(server):
    """One file, which asks for nothing from elsewhere."""
    status, page = asked(server, 'GET', '/')
    text = page.decode()
    assert status == 200 and '<title>Talk</title>' in text
    for outside in ('http:', 'https:', 'src="', '@import', 'url('):
        assert outside not in text
    assert asked(server, 'GET', '/x')[0] == 404 and server.server_address[0] == '127.0.0.1'


def test_a_recording_is_answered(system, server):
    """What comes back are the words and codes of the same conversation without a page."""
    lm, rvq, wav = system
    status, lines = asked(server, body=recording(wav))
    assert status == 200
    about, frames, over = lines[0], lines[1:-1], lines[-1]
    assert about == dict(hz=12.5, rate_hz=16000, frames=25, lead=432, held=400)
    assert over['done'] and over['real_time_factor'] > 0
    ear = live.Ear(rvq)
    sent = soundfile.read(io.BytesIO(recording(wav)), dtype='float32')[0]
    codes = np.array(ear.push(np.concatenate([sent, np.zeros((2 + 38) * 1280, np.float32)]))).T
    plan = generate.conversation_plan(lm.vocab, codes,
                                      trained.layout_delays(plain(lm.config.layout), lm.vocab))
    said = generate.converse(lm.speaker(), [plan])[0]
    assert [f['mine'] for f in frames] == (said[1, 1:len(frames) + 1]
                                           - lm.vocab.rows[1].start).tolist()
    assert len(frames) == codes.shape[1]
    assert all(len(base64.b64decode(f['pcm'])) == 2 * 1280 for f in frames)
    wanted = ''.join(w for _, w in trained.words_at(lm.vocab, lm.text(),
                                                        said[0, 1:len(frames) + 1]))
    words = ''.join(w for f in lines[1:] for _, w in f['words'])
    assert words and wanted == words
    # Another rate and two channels, the last of which is heard.
    other = np.stack([0 * wav, wav], 1)
    assert asked(server, body=recording(other, format='FLAC'))[1][1:-1] == frames
    here = f'localhost.:{server.server_address[1]}'         # as the page itself would post it
    assert asked(server, body=recording(wav), Host=here, Origin=f'http://{here}')[0] == 200


def test_two_people_at_once_and_a_third(system, server):
    _, _, wav = system
    alone = asked(server, body=recording(wav))[1][1:-1]
    found = {}
    threads = [threading.Thread(target=lambda i=i: found.setdefault(i, asked(
        server, body=recording(wav)))) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    for i in range(2):
        assert found[i][0] == 200 and found[i][1][1:-1] == alone
    held = [server.lobby.enter() for _ in range(2)]
    status, content = asked(server, body=recording(wav))
    assert status == 503 and 'all 2 slots are taken' in json.loads(content)['error']
    for slot, _ in held:
        server.lobby.leave(slot)
    assert asked(server, body=recording(wav))[0] == 200


def test_a_dropped_connection_frees_its_slot(system, server):
    """In the middle of the answer, and in the middle of the recording."""
    _, _, wav = system
    body = recording(np.tile(wav, 20))
    for sent in (len(body), len(body) // 2):
        there = socket.create_connection(server.server_address)
        there.sendall(b'POST /talk HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n'
                      % len(body) + body[:sent])
        if sent == len(body):
            assert there.recv(64).startswith(b'HTTP/1.1 200')
            assert server.lobby.free == 1
        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
        there.close()           # at once, with a reset
        until = time.monotonic() + 30
        while server.lobby.free < 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert server.lobby.free == 2
    assert asked(server, body=recording(wav))[0] == 200


def test_a_model_that_stopped_is_no_answer(system, monkeypatch):
    """Whoever talks then and later hears of it."""
    lm, rvq, wav = system
    with talk.Server(lm, rvq, ('127.0.0.1', 0), slots=2, samplers={}) as broken:
        def step(heard):
            raise SystemExit('as a thread ends')
        monkeypatch.setattr(broken.lobby.room, 'step', step)
        threading.Thread(target=broken.serve_forever, daemon=True).start()
        for _ in range(2):
            status, lines = asked(broken, body=recording(wav))
            assert status == 200 and len(lines) == 2
            assert lines[1] == dict(
                error='the model has stopped: the page has to be started again')
        broken.shutdown()


@pytest.mark.parametrize(('body', 'headers', 'status', 'said'), [
    (b'', {}, 411, 'no recording came'),
    (b'x' * 3000, {}, 400, 'the recording cannot be read as audio'),
    (recording(np.zeros(16000))[:9000], {}, 400, 'the recording was cut short'),
    (recording(np.zeros(100)), {}, 400, 'too short to answer'),
    (recording(np.zeros((16000, 3))), {}, 400, 'the recording has 3 channels'),
    (recording(np.zeros(8000 * 601), 8000), {}, 400, 'allowed are up to 600 s'),
    (b'x', {'Content-Length': str(1 << 40)}, 413, 'up to 64 are taken'),
    (recording(np.zeros(400_000), 1_000_003), {}, 400, 'the recording has 1,000,003 samples a'),
    (b'x', {'Content-Length': '9' * 5000}, 411, 'no recording came'),
    (b'x', {'Host': 'elsewhere.example'}, 403, '127.0.0.1 and localhost only'),
    (b'x', {'Host': '[::1'}, 400, 'the Host of this request is none'),
    (b'x', {'Origin': 'http://elsewhere.example'}, 403, 'come from this page only'),
    (b'x', {'Origin': 'null'}, 403, 'come from this page only'),
], ids=['nothing', 'noise', 'cut', 'blink', 'many', 'long', 'large', 'rate', 'digits', 'rebound',
        'no host', 'other site', 'hidden site'])
def test_what_cannot_be_answered_is_said_in_one_line(server, body, headers, status, said):
    found, content = asked(server, body=body, **headers)
    error = json.loads(content)['error']
    assert found == status and said in error and '\n' not in error and '/tmp' not in error
    assert server.lobby.free == 2


def test_too_much_is_refused_before_all_of_it_has_come(server):
    """Whoever sends it reads the answer, and not that the connection broke."""
    body = bytes(talk.MOST_BYTES + (1 << 20))
    status, content = asked(server, body=body)
    assert status == 413 and 'has 65 MiB; up to 64 are taken' in json.loads(content)['error']


def test_this_machine_by_its_longer_address(system):
    lm, rvq, wav = system
    try:
        socket.create_server(('::1', 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip('this machine has no IPv6')
    with talk.Server(lm, rvq, ('::1', 0), slots=1, samplers={}) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        there = http.client.HTTPConnection('::1', made.server_address[1], timeout=60)
        there.request('POST', '/talk', recording(wav))
        assert there.getresponse().status == 200 and made.local
        there.close()
        made.shutdown()


def test_what_cannot_be_served_is_said(corpus, tmp_path):
    lm = made(corpus, 'moshi', tmp_path / 'run')
    options = dict(stage_name=None, host='127.0.0.1', slots=1, temperature=None, top_k=None,
                   top_p=None, seed=0)
    with pytest.raises(ConfigError, match='--port lies in 0..65535'):
        talk.run(lm.config, lm.workdir, port=1 << 16, **options)
    with socket.create_server(('127.0.0.1', 0)) as taken:
        with pytest.raises(ConfigError, match='in use'):
            talk.run(lm.config, lm.workdir, port=taken.getsockname()[1], **options)
    with pytest.raises(ConfigError, match='--host no such host: '):
        talk.run(lm.config, lm.workdir, port=0, **options | dict(host='no such host'))

# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser without a window: a recording goes in, sound, words and a timeline
come out. Chromium is driven over a pipe by its own protocol; nothing else is needed.

    make test-browser       # needs chromium on the PATH, or CHROMIUM=path
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import soundfile

sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))
from test_evaluate import made

from jaxsd import codec, data, talk

pytestmark = pytest.mark.browser


class Browser:
    """Chromium's pages, each a session of its protocol."""

    def __init__(self, folder):
        path = os.environ.get('CHROMIUM') or shutil.which('chromium') or shutil.which(
            'google-chrome')
        assert path, 'no chromium here: install it or set CHROMIUM'
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()

        # Chromium reads from 3 and writes to 4; python would have to fork to put them there.
        move = 'exec 1000<&"$0" 1001>&"$1" 3<&1000 4>&1001; shift; exec "$@"'
        self.process = subprocess.Popen(
            ['bash', '-c', move, str(theirs_in), str(theirs_out), path, '--headless=new',
             '--no-sandbox', '--disable-gpu', '--remote-debugging-pipe',
             '--autoplay-policy=no-user-gesture-required', '--mute-audio',
             f'--user-data-dir={folder}', 'about:blank'],
            pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
        self._last, self._rest = 0, b''

    def call(self, method, session=None, **params):
        self._last += 1
        message = dict(id=self._last, method=method, params=params)
        if session:
            message['sessionId'] = session
        os.write(self._out, json.dumps(message).encode() + b'\0')
        while True:
            while b'\0' not in self._rest:
                part = os.read(self._in, 1 << 16)
                assert part, 'the browser is gone'
                self._rest += part
            line, _, self._rest = self._rest.partition(b'\0')
            answer = json.loads(line)
            if answer.get('id') == self._last:
                assert 'error' not in answer, answer['error']
                return answer['result']

    def page(self, address):
        target = self.call('Target.createTarget', url=address)['targetId']
        session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        self.until(session, 'document.readyState === "complete"'
                            ' && !!document.getElementById("file")')
        return session

    def value(self, session, script):
        return self.call('Runtime.evaluate', session, expression=script, returnByValue=True,
                         awaitPromise=True)['result'].get('value')

    def until(self, session, script, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.value(session, script):
                return
            time.sleep(0.1)
        raise AssertionError(f'never true: {script}; status: '
                             + str(self.value(session, 'document.body.innerText')))

    def upload(self, session, path):
        root = self.call('DOM.getDocument', session)['root']['nodeId']
        node = self.call('DOM.querySelector', session, nodeId=root, selector='#file')['nodeId']
        self.call('DOM.setFileInputFiles', session, nodeId=node, files=[str(path)])

    def close(self):
        self.call('Browser.close')
        self.process.wait(20)


@pytest.fixture(scope='module')
def address(corpus, tmp_path_factory):
    lm = made(corpus, 'moshi')
    rvq = codec.rvq(**{k: v for k, v in lm.config.codec.items() if k != 'name'})
    codes = next(data.examples(lm.config, 'train', 'stories')).codes[0][:, 5:42]
    folder = tmp_path_factory.mktemp('recordings')
    soundfile.write(folder / 'good.wav', rvq.decode(codes), 16000)
    (folder / 'bad.wav').write_bytes(b'no sound' * 100)
    soundfile.write(folder / 'long.wav', np.zeros(8000 * 601), 8000)
    with talk.Server(lm, rvq, ('127.0.0.1', 0), slots=2, samplers={}) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_address[1]}/', folder, server
        server.shutdown()


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp('profile'))
    yield made
    made.close()


ANSWERED = 'document.getElementById("status").textContent.startsWith("Answered")'
INK = '''(() => { const c = document.getElementById("line"), d = c.getContext("2d");
  const ink = (y, h) => d.getImageData(50, y, c.width - 50, h).data
    .filter((x, i) => i % 4 == 3 && x).length;
  return [ink(0, 60), ink(62, 46), ink(110, 60)]; })()'''


def test_upload_hear_see(address, browser):
    """Sound of 3 s: the answer can be played, both lanes and the words are drawn."""
    where, folder, _ = address
    page = browser.page(where)
    browser.upload(page, folder / 'good.wav')
    browser.until(page, ANSWERED)
    browser.until(page, 'document.getElementById("answer").duration > 2.5')
    assert browser.value(page, 'document.getElementById("words").textContent.length') > 0
    assert all(ink > 50 for ink in browser.value(page, INK))


def test_two_people_and_what_is_no_sound(address, browser):
    """Both are answered; a bad file and one that is too long say what is wrong, and the page goes
    on; who closes the page in the middle frees the slot."""
    where, folder, server = address
    pages = [browser.page(where) for _ in range(2)]
    for page in pages:
        browser.upload(page, folder / 'good.wav')
    for page in pages:
        browser.until(page, ANSWERED)
    for name, said in (('bad.wav', 'cannot be read as audio'), ('long.wav', 'up to 600 s')):
        browser.upload(pages[0], folder / name)
        browser.until(pages[0], 'document.getElementById("status").className === "bad"')
        assert said in browser.value(pages[0], 'document.getElementById("status").textContent')
    browser.upload(pages[0], folder / 'good.wav')
    browser.call('Page.navigate', pages[0], url='about:blank')
    browser.upload(pages[1], folder / 'good.wav')
    browser.until(pages[1], ANSWERED)
    end = time.monotonic() + 30
    while server.lobby.free < 2 and time.monotonic() < end:
        time.sleep(0.1)
    assert server.lobby.free == 2

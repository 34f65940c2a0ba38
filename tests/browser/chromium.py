# SPDX-License-Identifier: Apache-2.0
"""Chromium without a window, driven over a pipe by its own protocol; nothing else is needed."""

import base64
import json
import os
import shutil
import subprocess
import time


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
        self._last, self._rest, self.events = 0, b'', []

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
            if 'method' in answer:
                self.events.append(answer)
            if answer.get('id') == self._last:
                assert 'error' not in answer, answer['error']
                return answer['result']

    def page(self, address, *, width=1280, height=900, scheme='light'):
        """A session of a page that is loaded, `width` CSS pixels wide, in a color scheme. What it
        logs and asks of the network goes to `events`."""
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        self.events.clear()
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.call(f'{domain}.enable', session)
        self.call('Emulation.setDeviceMetricsOverride', session, width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)
        self.call('Emulation.setEmulatedMedia', session, features=[
            dict(name='prefers-color-scheme', value=scheme)])
        self.call('Page.navigate', session, url=address)
        self.until(session, f'location.href === {json.dumps(address)}'
                            ' && document.readyState === "complete"')
        return session

    def value(self, session, script):
        found = self.call('Runtime.evaluate', session, expression=script, returnByValue=True,
                          awaitPromise=True)
        assert 'exceptionDetails' not in found, found['exceptionDetails']
        return found['result'].get('value')

    def complaints(self, session):
        """What the page logged as an error or a warning, and the exceptions nobody caught."""
        return [e['params'] for e in self.events if e.get('sessionId') == session and (
            e['method'] == 'Runtime.exceptionThrown'
            or e['method'] == 'Log.entryAdded' and e['params']['entry']['level'] in (
                'error', 'warning')
            or e['method'] == 'Runtime.consoleAPICalled' and e['params']['type'] in (
                'error', 'warning', 'assert'))]

    def asked(self, session):
        """Addresses that the page asked for, without what it holds itself."""
        return [e['params']['request']['url'] for e in self.events
                if e.get('sessionId') == session and e['method'] == 'Network.requestWillBeSent'
                and not e['params']['request']['url'].startswith(('data:', 'blob:'))]

    def picture(self, session, path):
        """Writes the whole page, as far as it is long, to `path` as a PNG."""
        size = self.call('Page.getLayoutMetrics', session)['cssContentSize']
        shot = self.call('Page.captureScreenshot', session, captureBeyondViewport=True,
                         clip=dict(x=0, y=0, width=size['width'], height=size['height'], scale=1))
        path.write_bytes(base64.b64decode(shot['data']))

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

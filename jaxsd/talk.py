# SPDX-License-Identifier: Apache-2.0
"""The `talk` verb: a page on this machine on which people talk with a trained stage.

One process, the standard library's server, no assets from elsewhere. A recording is posted to
`/talk`; what the model says comes back line by line, as JSON, while it is said: sound, codes and
words, which the page plays and draws. Everybody has a slot of one `live.Lobby`; who leaves, or
whose connection breaks, gives it back.
"""

import base64
import errno
import http.server
import importlib.resources
import json
import logging
import socket
import tempfile
import threading
import time
import urllib.parse

import numpy as np

from jaxsd import live, speak, trained
from jaxsd import run as rundir
from jaxsd.config import ConfigError, bind

log = logging.getLogger('jaxsd')

MOST_BYTES = 64 << 20       # of a recording: ten minutes of two channels at 48 kHz in 16 bits
LINGER_S = 5.0              # for which what was refused is still read
AFTER_S = 3.0               # of silence after a recording, in which it may be answered
IDLE_S = 30.0               # after which a connection that says nothing is closed
LOCAL = ('127.0.0.1', 'localhost', '::1')
HEADERS = {'Content-Security-Policy': "default-src 'self'; style-src 'unsafe-inline'; "
                                      "script-src 'unsafe-inline'; media-src blob:; img-src data:",
           'X-Content-Type-Options': 'nosniff', 'Cache-Control': 'no-store'}


class _Refused(Exception):
    """An answer of status `args[0]` that says `args[1]`."""


class _Page(http.server.BaseHTTPRequestHandler):
    """GET / is the page, POST /talk a conversation."""

    protocol_version = 'HTTP/1.1'
    timeout = IDLE_S

    def log_message(self, *args):
        log.debug('%s %s', self.client_address[0], args[0] % args[1:])

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _own(self) -> None:
        """Refuses names by which only another site's page would reach this machine."""
        host, origin = self.headers.get('Host', ''), self.headers.get('Origin')
        try:
            name = (urllib.parse.urlsplit(f'//{host}').hostname or '').rstrip('.')
        except ValueError:
            raise _Refused(400, 'the Host of this request is none') from None
        if self.server.local and name not in LOCAL:
            raise _Refused(403, f'this page answers to {" and ".join(LOCAL[:2])} only')
        if origin is not None and origin.partition('//')[2] != host:
            raise _Refused(403, 'recordings come from this page only')

    def _answer(self, work) -> None:
        try:
            self._own()
            work()
        except _Refused as e:
            self.close_connection = True        # what was posted may not have been read
            self._send(e.args[0], 'application/json', json.dumps(dict(error=e.args[1])).encode())
            self._hear_out()

    def _hear_out(self) -> None:
        """Reads what is still being posted: closed at once, the connection would break before the
        answer is read."""
        until = time.monotonic() + LINGER_S
        try:
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER_S)
            while time.monotonic() < until and self.connection.recv(1 << 16):
                pass
        except OSError:
            pass

    def do_GET(self):
        self._answer(self._page)

    def do_POST(self):
        self._answer(self._talk)

    def _page(self):
        if self.path != '/':
            raise _Refused(404, 'there is one page, /')
        page = importlib.resources.files('jaxsd').joinpath('talk.html').read_bytes()
        self._send(200, 'text/html; charset=utf-8', page)

    def _recording(self) -> np.ndarray:
        """float32 [S] of what was posted: its last channel, the user's of a dialogue."""
        if self.path != '/talk':
            raise _Refused(404, 'recordings go to /talk')
        length = self.headers.get('Content-Length', '')
        if not length.isdecimal() or not length.strip('0') or len(length) > 18:
            raise _Refused(411, 'no recording came whose length was told (Content-Length)')
        if int(length) > MOST_BYTES:
            raise _Refused(413, f'the recording has {int(length) / 2**20:.0f} MiB; up to '
                                f'{MOST_BYTES >> 20} are taken')
        with tempfile.NamedTemporaryFile(suffix='.sound') as f:
            left = int(length)
            while left and (part := self.rfile.read(min(left, 1 << 16))):
                f.write(part)
                left -= len(part)
            f.flush()
            if left:
                raise _Refused(400, 'the recording ended before all of it came')
            try:
                wav = speak.read_wav(f.name, self.server.codec.identity['sample_rate_hz'])[-1]
            except ValueError as e:
                raise _Refused(400, str(e).replace(f'--input {f.name}', 'the recording')
                               .replace(f.name, 'the recording')) from None
        if len(wav) < self.server.lobby.room.least * self.server.frame:
            least_s = self.server.lobby.room.least / self.server.codec.identity['frame_hz']
            raise _Refused(400, f'the recording is too short to answer: it needs {least_s:.2f} s')
        return wav

    def _talk(self):
        wav = self._recording()
        lobby = self.server.lobby
        entered = lobby.enter()
        if entered is None:
            raise _Refused(503, f'all {lobby.slots} slots are taken; try again in a moment')
        slot, talk = entered
        try:
            try:
                over = self._converse(slot, talk, wav)
            except live.Stopped as e:
                log.error('%s: start the page again', e)
                over = dict(error=f'{e}: the page has to be started again')
            finally:
                lobby.leave(slot)       # before the last line, after which they may come again
            self._line(over)
            self.wfile.write(b'0\r\n\r\n')
        except OSError:                 # they left
            self.close_connection = True
            log.info('a connection broke; its slot is free again')

    def _converse(self, slot: int, talk: live.Talk, wav: np.ndarray) -> dict:
        """Answers `wav` line by line; returns what the last line says."""
        lobby, frame = self.server.lobby, self.server.frame
        self.send_response(200)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header('Content-Type', 'application/x-ndjson')
        self.send_header('Transfer-Encoding', 'chunked')
        self.end_headers()
        rate = self.server.codec.identity['sample_rate_hz']
        self._line(dict(hz=talk.hz, rate_hz=rate, frames=-(-len(wav) // frame),
                        lead=round(live.REACH_S * rate),
                        held=round((live.FADE_S + live.SHIFT_S) * rate)))
        start, heard, first_ms = time.perf_counter(), 0, None
        after = lobby.room.rest + round(AFTER_S * talk.hz)
        wav = np.concatenate([wav, np.zeros(after * frame, np.float32)])
        for at in range(0, len(wav), frame):
            for codes in talk.hear(wav[at:at + frame]):
                heard += codes.shape[1]
                said = lobby.hear(slot, codes)
                if said is None:
                    continue
                sound, words = talk.say(*said)
                if first_ms is None:
                    first_ms = 1000 * (time.perf_counter() - start)
                pcm = (np.clip(sound, -1, 1) * 32767).astype('<i2').reshape(-1, frame)
                for i, part in enumerate(pcm):
                    self._line(dict(pcm=base64.b64encode(part.tobytes()).decode(),
                                    mine=int(said[0][0, i]), words=words if i == 0 else []))
        return dict(done=True, words=talk.last(), first_audio_compute_ms=round(first_ms or 0.0, 1),
                    real_time_factor=round((time.perf_counter() - start) * talk.hz
                                           / max(heard, 1), 3))

    def _line(self, value: dict) -> None:
        data = json.dumps(value).encode() + b'\n'
        self.wfile.write(b'%x\r\n%s\r\n' % (len(data), data))
        self.wfile.flush()


class Server(http.server.ThreadingHTTPServer):
    """The page of a trained stage, at `address` (host, port; port 0 chooses one)."""

    daemon_threads = True

    def __init__(self, lm: trained.LM, codec, address: tuple[str, int], *, slots: int,
                 samplers: dict, seed: int = 0):
        self.codec, self.local = codec, address[0] in LOCAL
        self.frame = round(codec.identity['sample_rate_hz'] / codec.identity['frame_hz'])
        self.address_family = socket.AF_INET6 if ':' in address[0] else socket.AF_INET
        self.lobby = None       # an address in use closes the server before there is one
        super().__init__(address, _Page)
        try:
            self.lobby = live.Lobby(lm, codec, slots=slots, samplers=samplers, seed=seed)
        except BaseException:
            super().server_close()
            raise
        threading.Thread(target=self.lobby.serve, daemon=True).start()

    def server_close(self):
        if self.lobby is not None:
            self.lobby.close()
        super().server_close()

    def handle_error(self, request, client_address):
        log.info('a connection of %s broke', client_address[0])


def run(config, workdir: str, *, stage_name, host: str, port: int, slots: int, temperature,
        top_k, top_p, seed: int) -> None:
    """Serves the page until interrupted. Raises ConfigError for what cannot be talked with."""
    rundir.same_run(workdir, config, moved=True)
    sampler = speak.sampler_of(0.8, 250, 1.0, temperature, top_k, top_p)
    if not 0 <= port < 1 << 16:
        raise ConfigError(f'--port lies in 0..65535, got {port}')
    codec = bind(config.codec, 'jaxsd.codec', 'codec')()
    lm = trained.load(config, workdir, stage_name)
    log.info('compiling for %d at once', slots)
    try:
        server = Server(lm, codec, (host, port), slots=slots, samplers=speak.conversing(sampler),
                        seed=seed)
    except OSError as e:
        flag = f'--port {port} on {host}' if e.errno in (errno.EADDRINUSE, errno.EACCES) else (
            f'--host {host}')
        raise ConfigError(f'{flag}: {e.strerror or e}') from None
    log.info('talk at http://%s:%d/ (up to %d at once; Ctrl-C ends it)',
             f'[{host}]' if ':' in host else host, server.server_address[1], slots)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log.info('ended')

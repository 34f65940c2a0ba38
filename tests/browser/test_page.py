# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser without a window: a recording goes in, sound, words and a timeline
come out.

    make test-browser       # needs chromium on the PATH, or CHROMIUM=path
"""

import base64
import json
import os
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
import soundfile

sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))
from test_evaluate import made

from jaxsd import codec, data, talk

pytestmark = pytest.mark.browser


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
def in_chunks(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp('chunks')
    lm = made(corpus, 'omniflatten', folder / 'run', 'three')
    units = codec.kmeans(**{k: v for k, v in lm.config.codec.items() if k != 'name'})
    said = next(data.examples(lm.config, 'train', 'three')).units[1][None, :77]
    path = folder / 'good.wav'
    soundfile.write(path, units.decode(said), 16000)
    with talk.Server(lm, units, ('127.0.0.1', 0), slots=2, samplers={}) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_address[1]}/', path
        server.shutdown()


ANSWERED = 'document.getElementById("status").textContent.startsWith("Answered")'
SEEN = '''(() => { const old = draw; window.seen = {};
  const pen = CanvasRenderingContext2D.prototype, rect = pen.fillRect, text = pen.fillText;
  pen.fillRect = function(...x) { seen.bars.push([...x, this.fillStyle]); rect.apply(this, x); };
  pen.fillText = function(...x) { seen.texts.push(x); text.apply(this, x); };
  draw = () => { seen = {bars: [], texts: []}; old(); };
  const url = URL.createObjectURL;
  URL.createObjectURL = blob => { window.answer_wav = blob; return url.call(URL, blob); }; })()'''
HEARD = '''answer_wav.arrayBuffer()
  .then(x => new OfflineAudioContext(2, 1, about.rate_hz).decodeAudioData(x))
  .then(x => [0, 1].map(i => [...x.getChannelData(i)]))'''


def answered(where, path):
    """What the server says to a recording: (first line, samples [T], [(second, word)])."""
    request = urllib.request.Request(f'{where}talk', path.read_bytes())
    with urllib.request.urlopen(request, timeout=60) as response:
        first, *rest = map(json.loads, response.read().splitlines())
    frames = [x for x in rest if 'pcm' in x]
    pcm = b''.join(base64.b64decode(x['pcm']) for x in frames)
    return first, np.frombuffer(pcm, '<i2') / 32768, [w for x in rest for w in x['words']]


def level(samples, rate_hz, hz):
    """Of every frame, 0 at -50 dB and 1 at full power; what is left over is a frame, too."""
    size = round(rate_hz / hz)
    power = [np.mean(samples[i:i + size] ** 2) for i in range(0, len(samples), size)]
    return np.clip(1 + np.log10(np.array(power) + 1e-9) / 5, 0, 1)


def test_upload_hear_see(address, browser):
    upload_hear_see(browser, address[0], address[1] / 'good.wav')


def test_a_system_of_chunks_is_heard_and_seen_as_well(in_chunks, browser):
    upload_hear_see(browser, *in_chunks)


def upload_hear_see(browser, where, path):
    """What can be played and what is drawn, bar by bar and word by word, is what was said."""
    first, spoken, words = answered(where, path)
    user, rate_hz = soundfile.read(path)
    assert rate_hz == first['rate_hz'] and len(words) > 3 and np.abs(spoken).max() > .01
    page = browser.page(where)
    browser.value(page, SEEN)
    browser.upload(page, path)
    browser.until(page, ANSWERED)
    assert browser.value(page, 'document.getElementById("words").textContent') == ' '.join(
        w for _, w in words)
    late = np.concatenate([np.zeros(first['lead']), user])      # as `generate` writes both
    for got, wanted in zip(browser.value(page, HEARD), (spoken[first['held']:], late), strict=True):
        size = min(len(got), len(wanted))
        assert len(got) == len(spoken) - first['held'] and not np.any(got[size:])
        np.testing.assert_allclose(got[:size], wanted[:size], atol=1e-4)
    seen = browser.value(page, 'seen')
    for color, sound, top in (('#2a78d0', user, 0), ('#c2571a', spoken, 110)):
        bars = np.array([x[:4] for x in seen['bars'] if x[4] == color])
        wanted = level(sound, rate_hz, first['hz'])
        assert wanted.max() > .2
        np.testing.assert_allclose(bars[:, 3] - 1, 60 * wanted, atol=.1)
        np.testing.assert_allclose(bars[:, 1] + bars[:, 3] / 2, top + 30.5, atol=.1)
        np.testing.assert_allclose(bars[:, 0], 50 + 6 * np.arange(len(wanted)))
    placed = [(w, x) for w, x, y in seen['texts'] if 70 < y < 110 and x >= 50]
    assert placed == [(w, pytest.approx(50 + 6 * first['hz'] * t)) for t, w in words]
    assert {text for text, *_ in seen['texts']} >= {'you', 'words', 'model', '0 s', '1 s'}
    assert not browser.complaints(page) and set(browser.asked(page)) <= {
        where, f'{where}talk', f'{where}favicon.ico'}


def test_who_speaks_again_is_answered_once(address, browser):
    """A second recording in the middle of an answer: the first is let go, sound and all."""
    where, folder, server = address
    _, spoken, words = answered(where, folder / 'good.wav')
    user = soundfile.read(folder / 'good.wav')[0]
    soundfile.write(folder / 'tiled.wav', np.tile(user, 20), 16000)
    page = browser.page(where)
    browser.value(page, SEEN)
    browser.upload(page, folder / 'tiled.wav')
    browser.until(page, 'mine && mine.length > 3 && current.nodes.length > 3')
    browser.value(page, 'window.ended = 0; current.nodes.at(-1).onended = () => ended++; 0')
    browser.upload(page, folder / 'good.wav')
    browser.until(page, ANSWERED)
    assert browser.value(page, 'document.getElementById("words").textContent') == ' '.join(
        w for _, w in words)
    assert browser.value(page, 'mine.length * mine[0].length') == len(spoken)
    browser.until(page, 'ended === 1', seconds=2)       # its last piece was minutes away
    before = browser.value(page, 'mine.length')
    browser.upload(page, folder / 'good.wav')           # the same file is a recording again
    browser.until(page, '!document.getElementById("answer").hidden === false')
    browser.until(page, ANSWERED)
    assert browser.value(page, 'mine.length') == before
    end = time.monotonic() + 30
    while server.lobby.free < 2 and time.monotonic() < end:
        time.sleep(0.1)
    assert server.lobby.free == 2 and not browser.complaints(page)


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

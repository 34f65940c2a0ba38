# SPDX-License-Identifier: Apache-2.0
"""The report of an ablation and of a run in a real browser: at the width of a phone and of a desk,
light and dark, whole, quiet, and alone."""

import os
import pathlib
import shutil
import sys

import numpy as np
import pytest
import soundfile

sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))
from test_ablate import asked_and_answered

from jaxsd import cli

pytestmark = pytest.mark.browser

LUMINANCE = '''(() => { const of = (e, key) => getComputedStyle(e)[key].match(/[\\d.]+/g)
    .slice(0, 3).map(x => x / 255).map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
  const card = document.querySelector("article");
  return [of(card, "backgroundColor"), of(card, "color"),
          of(card.querySelector(".soft"), "color")]; })()'''
WIDE = '''[...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, details, svg"))
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map(e => e.outerHTML.slice(0, 120))'''
PICTURES = '''Promise.all([...document.images].map(i => i.decode())).then(
  () => [...document.images].map(i => i.naturalWidth))'''
SOUNDS = '''Promise.all([...document.querySelectorAll("audio")].map(a =>
  a.duration > 0 ? a.duration : new Promise(done => {
    a.onloadedmetadata = () => done(a.duration); a.onerror = () => done(-1);
    a.preload = "auto"; a.load(); })))'''
DRAWN = '''[...document.querySelectorAll("svg")].map(s => [
  s.getBoundingClientRect().width, s.querySelectorAll("path").length,
  [...s.querySelectorAll("path")].every(p => p.getTotalLength() < 1e5)])'''
OVERLAPS = '''[...document.querySelectorAll("svg")].flatMap(s => {
  const all = [...s.querySelectorAll("text")].filter(t => t.textContent.trim())
    .map(t => [t.textContent, t.getBoundingClientRect()]);
  return all.flatMap(([a, p], i) => all.slice(i + 1).filter(([b, q]) =>
    Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 &&
    Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 3).map(([b]) => a + " | " + b));
})'''


@pytest.fixture(scope='module')
def page_of(corpus, tmp_path_factory):
    """The address of a report of an ablation, the folder, and how many clips it plays."""
    folder = tmp_path_factory.mktemp('report')
    asked_and_answered(folder, corpus)
    samples = folder / 'work' / 'one' / '5' / 'samples'
    samples.mkdir()
    tone = .3 * np.sin(np.arange(24000) * .2)
    shutil.rmtree(folder / 'work' / 'other' / '5' / 'grids')        # and what a page says then
    soundfile.write(samples / 'tone.wav', np.stack([tone, tone[::-1]], 1), 16000)
    out = folder / 'page.html'
    assert cli.main(['report', '--workdir', str(folder / 'work'), '--out', str(out)]) == 0
    return out.as_uri(), folder


@pytest.mark.parametrize('scheme', ('light', 'dark'))
@pytest.mark.parametrize('width', (390, 1280))
def test_a_report_is_read(page_of, browser, width, scheme):
    address, folder = page_of
    page = browser.page(address, width=width, scheme=scheme)
    assert browser.value(page, 'document.documentElement.scrollWidth') <= width
    assert browser.value(page, WIDE) == []
    back, ink, soft = browser.value(page, LUMINANCE)
    assert (back < .05) == (scheme == 'dark') and (ink > back) == (scheme == 'dark')
    for color in (ink, soft):       # WCAG 2: 4.5 for text
        dark, light = sorted((back, color))
        assert (light + .05) / (dark + .05) > 4.5
    pictures = browser.value(page, PICTURES)
    assert len(pictures) >= 1 and min(pictures) > 100
    assert browser.value(page, SOUNDS) == [pytest.approx(1.5, abs=.01)]
    drawn = browser.value(page, DRAWN)
    assert len(drawn) > 6
    for wide, paths, sane in drawn:
        assert (wide == 0 or wide > 200) and paths > 3 and sane     # 0: in what is folded
    assert browser.value(page, OVERLAPS) == []
    assert not browser.complaints(page) and browser.asked(page) == [address]
    picture = pathlib.Path(folder) / f'{width}-{scheme}.png'
    browser.picture(page, picture)
    assert picture.stat().st_size > 20_000
    browser.call('Page.navigate', page, url='about:blank')

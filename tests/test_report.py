# SPDX-License-Identifier: Apache-2.0
"""Does the page show what the runs hold, survive what they lack, and let nothing out or in?"""

import html.parser
import io
import json
import math
import os
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import soundfile
from matplotlib.image import imread, imsave

from jaxsd import draw, report
from jaxsd.report import ablation, wandb

NASTY = '<script>alert("x")</script><img src=x onerror=alert(1)> & "quotes" \'too\''
CARD = '''"""Two speakers: a system made up for a test (arXiv 0000.00000).

One column per 80 ms frame.

  look     python -m jaxsd show --config configs/made_up.py
Evidence   none of it is real;
           this is the second line.
"""
raise SystemExit('a report executes nothing')
'''


def tone(seconds: float, channels: int = 1, rate_hz: int = 16000) -> np.ndarray:
    t = np.arange(int(seconds * rate_hz)) / rate_hz
    sweep = .3 * np.sin(2 * np.pi * (300 + 400 * t) * t) * (np.sin(6 * t) > 0)
    return np.stack([np.roll(sweep, 4000 * c) for c in range(channels)], axis=1)


def lines(steps: int, stage: str, terms=('text', 'semantic', 'acoustic')):
    for step in range(10, steps + 1, 10):
        loss = 1.2 + 3 * math.exp(-step / 80) + .03 * math.sin(step)
        yield dict(stage=stage, step=step, loss=loss, terms={
            t: loss * (.5 + .4 * i) for i, t in enumerate(terms)}, metrics={
                'nats/text': loss / 2, 'accuracy/text': 1 / loss},
            lr=1e-3 * min(1, step / 50), grad_norm=1 + 1 / step, skipped_steps=0, step_s=.31,
            data_wait_fraction=.004, dispatch_fraction=.002, tokens_per_s=5200.5,
            audio_hours_per_h=410.2, tokens=step * 1600, audio_hours=step / 100,
            time_s=1.79e9 + step)
        if step % 50 == 0:
            yield dict(stage=stage, step=step, held_out={
                'loss': loss + .1, 'text': loss * .55, 'dialogue': loss + .2},
                       time_s=1.79e9 + step)


@pytest.fixture
def run(tmp_path):
    """A complete run directory: every file that the page can show."""
    folder = tmp_path / 'made_up'
    for name in ('grids', 'samples', 'export', 'checkpoints/learn'):
        (folder / name).mkdir(parents=True)
    config = tmp_path / 'made_up.py'
    config.write_text(CARD)
    (folder / 'config.json').write_text(json.dumps({
        'jaxsd_run': 1, 'fingerprint': 'abc123def456', 'config': {
            'seed': 0, 'columns': 512, 'layout': {'name': 'duplex.columns', 'weight_pad': .5},
            'backbone': {'name': 'decoder', 'layers': 4, 'width': 256},
            'stages': [{'name': 'learn', 'steps': 400, 'lr': 1e-3}]}}))
    (folder / 'metrics.jsonl').write_text(''.join(
        json.dumps(line) + '\n' for line in [*lines(400, 'learn'), *lines(100, 'adapt')]))
    (folder / 'ledger.jsonl').write_text(''.join(json.dumps(e) + '\n' for e in (
        dict(time_s=1.79e9, event='start', stage='learn', step=0, revision='1234abc', devices=1,
             device_kind='cpu', mesh={'fsdp': 1}, file=f'{config}:demo'),
        dict(time_s=1.79e9, event='consumed', stage='learn', consumed_to=200, consumed={
            'dialogue': dict(audio_s=3600., tokens=100_000, records=50)}),
        dict(time_s=1.7901e9, event='consumed', stage='learn', consumed_to=400, consumed={
            'dialogue': dict(audio_s=9000., tokens=250_000, records=123)}))))
    (folder / 'evaluation.json').write_text(json.dumps([
        dict(task='asr', split='test', metrics={'wer': .0214, 'exact': .91}, items=64, step=400,
             stage='learn', note='Closed vocabulary.', per_item={
                 'exact': dict(sum=[1.] * 58 + [0.] * 6), 'wer': dict(sum=['x'], of=3)}),
        dict(task='asr', split='voice', metrics={'wer': .0731, 'exact': .8}, items=64, step=400,
             stage='learn', note='Closed vocabulary.'),
        dict(task='duplex', split='test', metrics={'answered': .84}, items=40, step=400,
             stage='learn', note='', histogram=dict(
                 name='latency_frames', values=[int(4 + 3 * abs(math.sin(i))) for i in range(40)])
             )]))
    picture = np.tile(np.linspace(0, 1, 400), (60, 1))
    imsave(folder / 'grids' / 'example.png', picture, cmap='viridis')
    (folder / 'grids' / 'toy.txt').write_text('text   BOS  _    EP   hel\nmine     *  412   17\n')
    soundfile.write(folder / 'samples' / 'answer.wav', tone(2.5, 2), 16000)
    soundfile.write(folder / 'samples' / 'unlisted.wav', tone(1), 16000)
    (folder / 'samples' / 'samples.json').write_text(json.dumps([
        dict(file='answer.wav', title='What is two plus three?', text='It is five.',
             channels=['mine', 'theirs'])]))
    (folder / 'samples' / 'true').mkdir()
    soundfile.write(folder / 'samples' / 'true' / 'answer.wav', tone(1), 16000)
    (folder / 'samples' / 'heard.json').write_text(json.dumps(
        {'heard': {'judged': {'answer.wav': 'it is fife'}, 'judged ceiling': {}}}))
    (folder / 'export' / 'model.safetensors').write_bytes(b'0' * 2048)
    (folder / 'checkpoints' / 'learn' / 'x.safetensors').write_bytes(b'0')
    return folder


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and gathers what a page refers to and says."""

    VOID = {'meta', 'img', 'br', 'hr', 'link', 'input'}

    def __init__(self, path):
        super().__init__()
        self.open, self.refs, self.tags, self.text, self.handlers = [], [], [], [], []
        self.source = open(path, encoding='utf-8').read()
        self.feed(self.source)
        self.close()
        assert not self.open, f'left open: {self.open}'
        self.words = ' '.join(' '.join(self.text).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.refs += [(tag, v) for k, v in attrs if k in ('src', 'href', 'srcset', 'data')]
        self.handlers += [k for k, _ in attrs if k.startswith('on')]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f'</{tag}> closes {self.open[-3:]}'
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] != 'style':
            self.text.append(data)


def page_of(*folders, out):
    return Page(report.write([str(f) for f in folders], str(out / 'report.html')))


def test_who_stopped_halfway_has_no_final_loss(run, tmp_path):
    (run / 'metrics.jsonl').write_text(''.join(
        json.dumps(line) + '\n' for line in lines(100, 'learn')))
    page = page_of(run, out=tmp_path)
    assert 'loss so far' in page.words and 'step of learn, of 400' in page.words
    assert 'final loss' not in page.words
    (run / 'metrics.jsonl').write_text(''.join(
        json.dumps(line) + '\n' for line in lines(400, 'learn')))
    page = page_of(run, out=tmp_path)
    assert 'final loss' in page.words and 'loss so far' not in page.words


def test_what_was_measured_at_the_probes_is_drawn(run, tmp_path):
    """Turn-taking, as training writes it down: a drawing of what has one unit, numbers of all."""
    with open(run / 'metrics.jsonl', 'a') as f:
        for step in (50, 100):
            f.write(json.dumps(dict(stage='learn', step=step, time_s=1.8e9, held_out={
                'turns/gap s/min': 7.25, 'turns/overlap s/min': 1.5, 'turns/events/turn': 12,
                'turns/takeover %/interruption': 62.5, 'turns/seconds': 3.75})) + '\n')
    page = page_of(run, out=tmp_path)
    for said in ('gap s/min', '7.25', 'takeover %/interruption', '62.5', 'seconds', '3.75'):
        assert said in page.words, said
    assert page.tags.count('svg') == 2 * 9 + 1 + 1


def test_a_complete_run_is_shown(run, tmp_path):
    page = page_of(run, out=tmp_path)
    for said in ('Two speakers: a system made up for a test', 'One column per 80 ms frame.',
                 'none of it is real; this is the second line.', 'abc123def456', 'Stage learn',
                 'Stage adapt', '0.0214', '0.0731', 'Closed vocabulary.', 'latency_frames',
                 'What is two plus three?', 'It is five.', 'mine', 'theirs', 'unlisted', '1234abc',
                 'BOS', 'model.safetensors', 'duplex.columns', 'semantic', '410 ×', 'real time',
                 '0.4 %', '800,000 tokens trained on', '5 h audio trained on'):
        assert said in page.words, said
    row = re.search(r'learn dialogue (\S+) (\S+) (\S+)', page.words)
    assert row.groups() == ('2.5', '250,000', '123')     # the last count, not the sum of counts
    assert page.tags.count('audio') == 3
    assert 'x.safetensors' not in page.words            # checkpoints are not exports
    assert page.tags.count('svg') == 2 * 9 + 1          # per stage nine drawings, and a histogram


def test_items_that_were_kept_are_drawn_again(run, tmp_path):
    """Against the normal approximation of a share; what is damaged is shown as it was measured."""
    text = ' '.join(page_of(run, out=tmp_path / 'x.html').text)
    low, high = map(float, re.search(r'0\.91\s+([\d.]+) to ([\d.]+)', text).groups())
    half = 1.96 * math.sqrt(58 / 64 * 6 / 64 / 64)
    assert low == pytest.approx(58 / 64 - half, abs=.02)
    assert high == pytest.approx(min(1, 58 / 64 + half), abs=.02)
    assert '0.0214' in text and not re.search(r'0\.0214\s+[\d.]+ to', text)
    assert '95 % of what 2,000 samples' in text


def test_what_was_heard_and_the_true_recording_stand_beside_a_clip(run, tmp_path):
    page = page_of(run, out=tmp_path)
    assert 'Heard by the judge: it is fife' in page.words and page.tags.count('audio') == 3
    assert page.words.index('It is five.') < page.words.index('The same from the true')


def test_a_run_says_which_config_it_was_made_with(run, tmp_path):
    stored = json.loads((run / 'config.json').read_text())
    (run / 'ledger.jsonl').unlink()
    (run / 'config.json').write_text(json.dumps(
        stored | dict(file='gone/made_up.py:demo,share=0.1', doc='A card kept in the run.')))
    page = page_of(run, out=tmp_path)
    assert 'gone/made_up.py:demo,share=0.1' in page.words and 'A card kept in' in page.words


def test_the_time_is_accounted_for(run, tmp_path):
    assert 'The ledger holds no times of this run' in page_of(run, out=tmp_path).words
    at = 1.79e9
    with open(run / 'ledger.jsonl', 'w') as f:
        for e in (dict(time_s=at + 5, began_s=at, event='start', stage='learn', step=0),
                  dict(time_s=at + 20, event='ready', stage='learn', init_s=10., restore_s=0.,
                       compile_s=8., data_s=2.),
                  dict(time_s=at + 520, event='finished', stage='learn', step=400, saves=4,
                       commit_s=2., first_save_s=1.,
                       spent=dict(data_s=10., save_s=6., probe_s=4.))):
            f.write(json.dumps(e) + '\n')
    page = page_of(run, out=tmp_path)
    for said in ('Goodput 92.3 % of 520 s', 'compile 8.0 1.5 compiling the step',
                 'data 12.0 2.3', 'save 6.0 1.2', 'idle 0.0 0.0', 'every 3 hours'):
        assert said in page.words, said
    with open(run / 'ledger.jsonl', 'a') as f:
        f.write(json.dumps(dict(time_s=at + 600, event='resume', began_s='x', step={})) + '\n')
        f.write(json.dumps(dict(time_s=at + 601, event='ready')) + '\n')
    assert 'holds no times' in page_of(run, out=tmp_path).words


def test_nothing_is_asked_of_a_network(run, tmp_path):
    page = page_of(run, out=tmp_path)
    outside = [r for _, r in page.refs if not r.startswith(('data:', '#'))]
    assert not outside
    assert set(re.findall(r'https?://[^\s"\'<>]+', page.source)) <= {'http://www.w3.org/2000/svg',
                                                                   'http://www.w3.org/1999/xlink'}
    assert not re.search(r'url\((?!#)|@import', page.source)
    assert 'script' not in page.tags
    assert "default-src 'none'" in page.source


def test_texts_are_never_markup(run, tmp_path):
    def spoil(x):
        if isinstance(x, dict):
            return {(k if k in KEYS else k + NASTY): spoil(v) for k, v in x.items()}
        if isinstance(x, list):
            return [spoil(v) for v in x]
        return x + NASTY if isinstance(x, str) and not x.endswith('.wav') else x

    KEYS = {'task', 'split', 'metrics', 'stage', 'note', 'histogram', 'name', 'values', 'file',
            'title', 'text', 'channels', 'terms', 'held_out', 'step', 'loss', 'consumed', 'event',
            'config', 'stages', 'layout'}
    for name in ('config.json', 'evaluation.json', 'samples/samples.json'):
        path = run / name
        path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    for name in ('metrics.jsonl', 'ledger.jsonl'):
        path = run / name
        path.write_text(''.join(json.dumps(spoil(json.loads(line))) + '\n'
                                for line in path.read_text().splitlines()))
    (run / 'grids' / f'{NASTY[:8]}.txt').write_text(NASTY)
    page = page_of(run, out=tmp_path)
    clean = page_of(run, out=tmp_path)
    assert 'alert("x")' in page.words                    # it is shown, as text
    assert 'script' not in page.tags and not page.handlers
    assert page.tags.count('img') == clean.tags.count('img')


def test_a_docstring_is_text_too(run, tmp_path):
    text = NASTY.replace("'", '')
    (tmp_path / 'made_up.py').write_text(f"'''{text}\n\nEvidence {text}'''")
    page = page_of(run, out=tmp_path)
    assert 'script' not in page.tags and 'alert("x")' in page.words


def test_a_run_is_described_by_its_namesake_if_it_fits(run, tmp_path, monkeypatch):
    (run / 'ledger.jsonl').unlink()
    (tmp_path / 'configs').mkdir()
    file = tmp_path / 'configs' / 'made_up.py'
    monkeypatch.chdir(tmp_path)
    for names, fits in (("x = ['duplex.columns']", True), ("x = ['flat.interleave']", False)):
        file.write_text(CARD + names)
        assert ('Two speakers' in page_of(run, out=tmp_path).words) == fits


def test_an_empty_directory_says_what_is_missing(tmp_path):
    (tmp_path / 'nothing').mkdir()
    page = page_of(tmp_path / 'nothing', out=tmp_path)
    for said in ('The config file that describes this run was not found', 'No metrics were written',
                 'No evaluation was written', 'No audio was generated', 'No grid was drawn',
                 f'jaxsd show --config FILE.py --png {tmp_path}/nothing/grids/grid.png',
                 'No ledger was written', 'No readable config.json', 'Nothing was exported'):
        assert said in page.words, said


def test_a_missing_directory_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match='no such directory'):
        report.write([str(tmp_path / 'nowhere')], str(tmp_path / 'report.html'))
    with pytest.raises(ValueError, match='--workdir'):
        report.write([], str(tmp_path / 'report.html'))
    assert not (tmp_path / 'report.html').exists()


@pytest.mark.parametrize('content', [
    b'', b'\x00\xff garbage', b'[' * 100_000, b'null', b'[1, "a", null, {}]',
    b'{"step": 1, "loss": {}, "terms": 3, "metrics": [1]}', b'{"stages": 5, "config": [1]}',
    b'[{"metrics": 4, "histogram": {"values": "abc"}, "file": 5, "items": [1]}]',
    b'RIFF\x10\x00\x00\x00WAVEfmt \x02', b'\x89PNG\r\n\x1a\n'])
def test_damaged_files_are_survived(run, tmp_path, content):
    (run / 'metrics.jsonl').unlink()                    # drawing it each time would take minutes
    for name in ('metrics.jsonl', 'config.json', 'evaluation.json', 'samples/samples.json',
                 'samples/answer.wav', 'grids/example.png', 'grids/toy.txt', 'ledger.jsonl'):
        whole = (run / name).read_bytes() if (run / name).exists() else b''
        (run / name).write_bytes(content)
        page = page_of(run, out=tmp_path)
        assert 'Two speakers' in page.words or name == 'ledger.jsonl'
        (run / name).write_bytes(whole)


def test_what_is_not_finite_is_said(run, tmp_path):
    bad = [dict(stage='learn', step=s, loss=v, terms={'text': v}, lr=v)
           for s, v in enumerate([math.nan, math.inf, None, 'high', 10 ** 400, 1.5, 1e30])]
    bad.append(dict(stage='learn', step=10 ** 400, loss=1.0))
    (run / 'metrics.jsonl').write_text(''.join(json.dumps(b) + '\n' for b in bad))
    (run / 'evaluation.json').write_text(json.dumps([dict(
        task='asr', metrics={'wer': math.nan, 'cer': None}, histogram=dict(
            name='latency', values=[math.nan, None]))]))
    page = page_of(run, out=tmp_path)
    assert '5 of 7 lines have a loss that is not a finite number' in page.words
    assert 'not finite' in page.words and 'holds no finite values' in page.words
    (run / 'metrics.jsonl').write_text('{"stage": "learn", "step": 3, "loss": NaN}\n')
    assert 'losses of stage learn hold no finite numbers' in page_of(run, out=tmp_path).words


def test_size_is_bounded(run, tmp_path, monkeypatch):
    for i in range(20):
        soundfile.write(run / 'samples' / f'long-{i:02d}.wav', tone(12), 16000)
    monkeypatch.setattr(report.run, 'CLIP_S', 5.0)
    most = 24 * 16000
    monkeypatch.setattr(report, 'AUDIO_BYTES', most)
    page = page_of(run, out=tmp_path)
    assert 'the first 5 s here' in page.words and 'full of sound' in page.words
    assert '15 more lie in' in page.words       # of 22 clips: 5 of the 20 long ones, and the others
    sound = sum(len(r) for tag, r in page.refs if tag == 'audio') * 3 / 4
    assert 0.5 * most < sound < 1.1 * most
    with open(run / 'metrics.jsonl', 'w') as f:
        for step in range(20_000):
            f.write(json.dumps(dict(stage='learn', step=step, loss=1 / (step + 1))) + '\n')
    assert os.path.getsize(page_of(run, out=tmp_path) and tmp_path / 'report.html') < 2e6


def test_a_sample_outside_the_run_is_not_read(run, tmp_path):
    soundfile.write(tmp_path / 'secret.wav', tone(1), 16000)
    os.symlink(tmp_path / 'secret.wav', run / 'samples' / 'link.wav')
    (run / 'samples' / 'samples.json').write_text(json.dumps([
        dict(file='../../secret.wav', title='up'), dict(file=str(tmp_path / 'secret.wav')),
        dict(file='link.wav'), dict(file='gone.wav')]))
    page = page_of(run, out=tmp_path)
    assert page.words.count('it lies outside the samples folder') == 3
    assert 'no such file' in page.words


def test_thinning_keeps_the_mean():
    x, y = draw.thin(list(range(1000)), [float(i % 2) for i in range(1000)], 100)
    assert len(x) == 100 and np.allclose(y, .5) and x[0] == 4.5 and x[-1] == 994.5
    assert draw.thin([1, 2], [3., 4.]) == ([1, 2], [3., 4.])


def test_drawings_hold_the_data_and_the_colors_of_the_page():
    svg = draw.curves([('loss', draw.INK, [0, 10], [1., 3.], ([5], [2.])),
                       ('text', draw.SERIES[0], [0, 10], [2., 2.], ([], []))], 'a "loss" & more')
    root = ET.fromstring(svg)
    assert root.get('aria-label') == 'a "loss" & more'
    assert 'var(--ink)' in svg and 'var(--s0)' in svg and draw.INK not in svg
    paths = [p.get('d') for p in root.iter('{http://www.w3.org/2000/svg}path')
             if 'var(--ink)' in p.get('style', '') or 'var(--s0)' in p.get('style', '')]
    ends = [[[float(v) for v in point.split()] for point in re.findall(r'[ML] ([-\d. ]+)', d)]
            for d in paths]
    rising, = (e for e in ends if len(e) == 2 and e[0][1] != e[1][1])
    flat, = (e for e in ends if len(e) == 2 and e[0][1] == e[1][1])
    assert rising[0][1] > flat[0][1] > rising[1][1]     # SVG counts downward
    assert flat[0][1] == pytest.approx((rising[0][1] + rising[1][1]) / 2)


def test_a_spectrogram_shows_where_the_sound_is():
    t = np.arange(16000) / 16000
    wav = (8000 * np.sin(2 * np.pi * 2000 * t)).astype(np.int16)
    wav[8000:] = 0
    picture = imread(io.BytesIO(draw.spectrogram(wav, 16000)))[..., :3].sum(axis=-1)
    rows, columns = picture.shape
    row, column = np.unravel_index(picture.argmax(), picture.shape)
    assert abs((rows - row) / rows - .25) < .05         # 2 of 8 kHz, from the bottom
    assert column < columns / 2
    assert picture[:, : columns // 3].mean() > 2 * picture[:, -columns // 3:].mean()


def test_a_curve_for_the_readme(run, tmp_path):
    out = report.curve_png(str(run), str(tmp_path / 'curve.png'))
    assert open(out, 'rb').read(8) == b'\x89PNG\r\n\x1a\n'
    with pytest.raises(ValueError, match="no metrics of stage 'x'.*learn, adapt"):
        report.curve_png(str(run), out, stage='x')


# Ablations.

@pytest.fixture
def asked(run, tmp_path):
    """An ablation of two arms with two seeds, of which one run failed."""
    folder = tmp_path / 'asked'
    arms = []
    for arm, off in (('word', 0), ('phone', 1)):
        for seed in (0, 1):
            (folder / arm / str(seed)).mkdir(parents=True)
            for name in ('config.json', 'metrics.jsonl', 'evaluation.json', 'ledger.jsonl'):
                (folder / arm / str(seed) / name).write_bytes((run / name).read_bytes())
        arms.append(dict(
            name=arm, config='c.py:demo', same_order=not off,
            differences={'layout.level': ['word', arm]} if off else {},
            stages=[dict(name='learn', steps=400, flops=2e12)],
            runs=[dict(seed=0, folder=f'{arm}/0', state='done'),
                  dict(seed=1, folder=f'{arm}/1', state='failed: no disk' if off else 'done')],
            estimates={'stories right %': dict(mean=71.25 + off, low=64.125, high=77.5, seeds=2)}))
    (folder / 'results.json').write_text(json.dumps(dict(
        name='levels', question='Which alignment teaches most?', verdict='confirmed', arms=arms,
        expected=['word > phone'], source='a paper', limits='It is a toy.', rule='By intervals.',
        budget=dict(unit='tokens', amounts=[2e6], said='2,000,000'), date='2026-01-02',
        revision='1234abc',
        law=dict(points=[dict(flops=1e12, parameters=n, positions=1e12 / n, loss=2 + abs(n - 2e6))
                         for n in (1e6, 2e6, 4e6)], exponents=dict(parameters=.5, positions=.5),
                 optima=[dict(flops=1e12, parameters=2.25e6, positions=4e5, loss=2,
                              fit=[1, -29, 213])]),
        metrics=[dict(label='stories right %', better='higher')], comparisons=[dict(
            better='word', worse='phone', metric='stories right %', difference=-1.5, low=-2.25,
            high=-.75, verdict='confirmed')])))
    return folder


def test_an_ablation_is_shown_before_its_runs(asked, tmp_path):
    page = page_of(asked, out=tmp_path)
    for said in ('Which alignment teaches most?', 'Confirmed. Expected: word > phone (a paper).',
                 '3 of 4', '71.25 64.12 to 77.5',
                 'word > phone stories right % -1.5 -2.25 to -0.75',
                 'phone, seed 1 failed: no disk', 'It is a toy.', 'By intervals.',
                 '1e+12 2,250,000 400,000 2', 'to the power 0.5,',
                 'layout.level word', 'phone: other records than the base', 'Training loss',
                 'Held out: dialogue', '2026-01-02'):
        assert said in page.words, said
    assert page.words.index('Which alignment') < page.words.index('Two speakers')
    for arm in ('word', 'phone'):       # a card for each
        assert f'{arm}, seed 0: Two speakers: a system made up' in page.words
    for name in ('tokens, M', 'hours of sound', 'PFLOPs'):
        assert f'Training loss over {name}' in page.source
    assert 'script' not in page.tags and not page.handlers


def test_arms_are_drawn_where_their_stages_went_on(asked):
    arm = ablation.read_ablation(asked)['arms'][0]
    arm['stages'].append(dict(name='adapt', steps=100, flops=1e12))
    course = ablation.course(asked / 'word' / '0', arm)
    assert [r['tokens'] for r in course if 'loss' in r][39:42] == [640_000, 656_000, 672_000]
    assert course[-1]['flops'] == 400 * 2e12 + 100 * 1e12


def test_colors_tell_arms_apart():
    def colors(*names, budgets=(1,)):
        return ablation._colors(dict(arms=[dict(name=n) for n in names],
                                     budget=dict(amounts=budgets)))
    assert len(set(colors(*'abcdefgh'))) == 8
    assert colors(*'abcdefghij')[8:] == [draw.INK] * 2      # more cannot be told apart
    a1, b1, a2, b2 = colors('a.1e12', 'b.1e12', 'a.2e12', 'b.2e12', budgets=(1e12, 2e12))
    assert a1 == a2 != b1 == b2


def test_runs_of_an_ablation_are_sent_by_their_names(asked, run):
    assert [name for name, _ in wandb._runs(str(asked))] == [
        'asked/word/0', 'asked/word/1', 'asked/phone/0', 'asked/phone/1']
    assert wandb._runs(str(run)) == [('made_up', run)]


def test_what_an_ablation_says_is_text(asked, tmp_path):
    found = json.loads((asked / 'results.json').read_text().replace('word', NASTY[:25]
                                                                    .replace('"', "'")))
    found['question'] = found['arms'][1]['name'] = found['comparisons'][0]['verdict'] = NASTY
    found['arms'][1]['runs'][0]['folder'] = '../made_up'        # not one of its own
    (asked / 'results.json').write_text(json.dumps(found))
    page = page_of(asked, out=tmp_path)
    assert 'script' not in page.tags and not page.handlers and 'alert("x")' in page.words
    assert 'Two speakers' not in page.words


@pytest.mark.parametrize('spoil', [
    {'arms': [3, {'name': 'a', 'runs': 5, 'stages': [1], 'estimates': {'x': 4}}]},
    {'law': {'points': [{'flops': 1, 'parameters': 2, 'loss': 3}, 4], 'optima': [{'flops': []}]}},
    {'metrics': [{'label': 4}], 'comparisons': 'none', 'budget': [1], 'expected': 5},
    {'arms': [{'name': 'a', 'differences': {'k': 4}, 'runs': [{'folder': 7}, {}]}]},
    {'arms': [{'name': 'a', 'runs': [{'folder': 'word\0/0'}], 'stages': [{'steps': 10 ** 400}],
               'estimates': {'stories right %': dict(mean=1e308, low=-1e308, high=1e308)}},
              {'name': 'b', 'estimates': {'stories right %': dict(mean=10 ** 400, low=0, high=1)}}],
     'law': {'points': [dict(flops=10 ** 400, parameters=1e308, positions=1, loss=1e308)]}}])
def test_a_damaged_ablation_is_survived(asked, tmp_path, spoil):
    found = json.loads((asked / 'results.json').read_text())
    (asked / 'results.json').write_text(json.dumps(found | spoil))
    assert 'Which alignment teaches most?' in page_of(asked, out=tmp_path).words

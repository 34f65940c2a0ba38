# SPDX-License-Identifier: Apache-2.0
"""Does `generate` write the files it says it does, from sound, from text, and from the dataset?"""

import contextlib
import io
import json
import logging
import os
import re
import signal

import numpy as np
import pytest
import soundfile
from test_cli import flags
from test_configs import on, read
from test_evaluate import made

from jaxsd import cli, codec, data, dialogue, generate, live, reply, speak, trained
from jaxsd.config import ConfigError, plain
from jaxsd.layout import flat

FLAT = ('asr', 'tts', 's2s', 't2t')


@pytest.fixture(scope='module')
def flat_lm(corpus, tmp_path_factory):
    return made(corpus, 'spirit_lm', tmp_path_factory.mktemp('spirit') / 'run')


@pytest.fixture(scope='module')
def streams_lm(corpus, tmp_path_factory):
    return made(corpus, 'moshi', tmp_path_factory.mktemp('moshi') / 'run')


@pytest.fixture(scope='module')
def sounds(corpus, flat_lm, streams_lm, tmp_path_factory):
    """A second of mono, of stereo (sound on the right alone), of another rate; and a blink."""
    folder = tmp_path_factory.mktemp('sounds')
    units = codec.kmeans(**options(flat_lm))
    record = next(data.examples(flat_lm.config, 'test', 'asr'))
    wav = units.decode(record.units[0][None, :25])
    assert wav.shape == (16000,)
    soundfile.write(folder / 'mono.wav', wav, 16000)
    soundfile.write(folder / 'stereo.wav', np.stack([0 * wav, wav], 1), 16000)
    soundfile.write(folder / 'other.flac', np.repeat(wav, 3)[:48000], 48000)
    soundfile.write(folder / 'blink.wav', wav[:5], 16000)
    return folder


def options(lm):
    return {k: v for k, v in lm.config.codec.items() if k != 'name'}


def run(lm, task, out, source=None, **changes):
    speak.run(lm.config, lm.workdir, out=str(out), source=None if source is None else str(source),
              **(dict(task=task, stage_name=None, split='test', count=2, temperature=None,
                      top_k=None, top_p=None, seed=0) | changes))
    return out


def sound_of(path):
    wav, rate = soundfile.read(path, always_2d=True)
    assert rate == 16000 and soundfile.info(path).subtype == 'PCM_16'
    assert np.isfinite(wav).all() and np.abs(wav).max() <= 1
    return wav.T


# One input.

@pytest.mark.parametrize('name', ['mono.wav', 'stereo.wav', 'other.flac', 'blink.wav'])
def test_sound_to_text(flat_lm, sounds, tmp_path, name):
    """What is written down is the transcript of the units of the sound, its channels averaged."""
    out = run(flat_lm, 'asr', tmp_path / 'said.txt', sounds / name)
    wav, rate = soundfile.read(sounds / name, always_2d=True)
    wav = wav.mean(1)[::rate // 16000].astype(np.float32)
    units = codec.kmeans(**options(flat_lm)).encode(wav)[0]
    ids = [flat.speech_tokens(units, flat_lm.vocab)]
    wanted = trained.transcribe(flat_lm, ids, '[Speech]', '[ASR]')[0]
    found = out.read_text()
    assert found.endswith('\n') and os.listdir(tmp_path) == ['said.txt']
    if name != 'other.flac':        # whose resampling is not ours to repeat
        assert found == wanted + '\n'


def test_text_to_sound_lasts_as_long_as_its_units(flat_lm, tmp_path):
    out = run(flat_lm, 'tts', tmp_path / 'deep' / 'said.wav', 'the')
    wav = sound_of(out)
    start, size = flat_lm.vocab.ranges['units']
    spoken = trained.read_aloud(flat_lm, ['the'], '[Text]', '[TTS]')[0] - start
    frames = trained.unit_frames(flat_lm.config, flat_lm.config.codec.size)[spoken].sum()
    assert wav.shape == (1, frames * 640)       # 25 frames a second of 16,000 samples
    assert os.listdir(out.parent) == ['said.wav']


def test_sound_goes_on(flat_lm, sounds, tmp_path):
    """All of the file, and then more: longer than what was given, deduplicated and held again."""
    one, again, two = (run(flat_lm, 's2s', tmp_path / name, sounds / 'mono.wav', temperature=1.0,
                           seed=seed)
                       for name, seed in (('one.wav', 1), ('again.wav', 1), ('two.wav', 2)))
    given = codec.kmeans(**options(flat_lm)).encode(soundfile.read(sounds / 'mono.wav',
                                                                   dtype='float32')[0])[0]
    frames = trained.unit_frames(flat_lm.config, flat_lm.config.codec.size)
    assert sound_of(one).shape[1] >= frames[flat.runs(given)[0]].sum() * 640
    assert one.read_bytes() == again.read_bytes() != two.read_bytes()


def test_text_goes_on(flat_lm, tmp_path):
    out = run(flat_lm, 't2t', tmp_path / 'more.txt', 'the cat')
    assert re.fullmatch(r'the cat \| .*\n', out.read_text())


def test_a_conversation_about_a_file(streams_lm, sounds, tmp_path, caplog):
    """Two channels, mine and theirs; theirs is the file's last channel as it was, 27 ms late, for
    so far ahead is heard. Beside it the words; how late and how fast it was is said."""
    with pytest.raises(ValueError, match='too short to answer: it needs 0.16 s'):
        run(streams_lm, 'duplex', tmp_path / 'blink.wav', sounds / 'blink.wav')
    assert not os.listdir(tmp_path)
    for name in ('mono.wav', 'stereo.wav'):
        with caplog.at_level('INFO', 'jaxsd'):
            wav = sound_of(run(streams_lm, 'duplex', tmp_path / name, sounds / name))
        said = soundfile.read(sounds / name, dtype='float32', always_2d=True)[0].T[-1]
        assert len(said) - 432 < wav.shape[1] <= len(said) + 432 + 2 * 1280
        n = min(len(said), wav.shape[1] - 432)
        np.testing.assert_allclose(wav[1, 432:432 + n], np.clip(said[:n], -1, 1), atol=1e-4)
        assert not wav[1, :432].any() and wav[0].any()
        lines = (tmp_path / name).with_suffix('.txt').read_text().splitlines()
        assert all(re.fullmatch(r'\d+\.\d\d s  \S+', line) for line in lines)
    told = re.search(r'first audio after (\d+) ms, real-time factor ([\d.]+) over 1.1 s',
                     caplog.text)
    assert int(told[1]) >= 160 and float(told[2]) > 0
    a, b = (run(streams_lm, 'duplex', tmp_path / f'{s}.wav', sounds / 'mono.wav', seed=s)
            for s in (1, 2))
    assert not np.array_equal(sound_of(a)[0], sound_of(b)[0])
    np.testing.assert_array_equal(sound_of(a)[1], sound_of(b)[1])
    only = run(streams_lm, 'duplex', tmp_path / 'only' / 'words.txt', sounds / 'mono.wav')
    assert os.listdir(only.parent) == ['words.txt']


def test_raw_sound_on_standard_input(streams_lm, sounds, tmp_path, monkeypatch):
    """The same samples through a pipe, in pieces of any size, give the same file."""
    wav = soundfile.read(sounds / 'mono.wav', dtype='int16')[0]
    whole = run(streams_lm, 'duplex', tmp_path / 'whole.wav', sounds / 'mono.wav', seed=1)

    class Pipe(io.BytesIO):
        def read1(self, n=-1):
            return super().read1(777)
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(Pipe(wav.astype('<i2').tobytes())))
    piped = run(streams_lm, 'duplex', tmp_path / 'piped.wav', '-', seed=1)
    assert piped.read_bytes() == whole.read_bytes()

    class Ended(Pipe):
        def read1(self, n=-1):
            if self.tell() > wav.nbytes // 2:
                raise KeyboardInterrupt         # Ctrl-C, which ends a recording too
            return super().read1(n)
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(Ended(wav.astype('<i2').tobytes())))
    with pytest.raises(KeyboardInterrupt):
        run(streams_lm, 'duplex', tmp_path / 'ended.wav', '-', seed=1)
    half, every = (soundfile.read(x)[0] for x in (tmp_path / 'ended.wav', whole))
    assert len(every) / 3 < len(half) < len(every)
    np.testing.assert_array_equal(half, every[:len(half)])
    assert (tmp_path / 'whole.txt').read_text().startswith((tmp_path / 'ended.txt').read_text())
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(Pipe((sounds / 'mono.wav').read_bytes())))
    with pytest.raises(ValueError, match='takes raw samples'):
        run(streams_lm, 'duplex', tmp_path / 'no.wav', '-')
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(Pipe(b'')))
    with pytest.raises(ValueError, match='ended before anything'):
        run(streams_lm, 'duplex', tmp_path / 'no.wav', '-')
    assert sorted(os.listdir(tmp_path)) == ['ended.txt', 'ended.wav', 'piped.txt', 'piped.wav',
                                            'whole.txt', 'whole.wav']


@pytest.mark.parametrize(('name', 'stage'), [
    ('omniflatten', 'three'), ('syncllm', 'duplex'), ('dgslm', None)])
def test_chunks_and_units_answer_sound(corpus, sounds, tmp_path, caplog, monkeypatch, name, stage):
    """Of a file and of a pipe: what is said to the codes of the sound, and how late. A chunk that
    was heard is answered at once or, by who speaks a chunk ahead, after another one."""
    lm = made(corpus, name, tmp_path / 'run', stage)
    with caplog.at_level('INFO', 'jaxsd'):
        wav = sound_of(run(lm, 'duplex', tmp_path / 'said.wav', sounds / 'stereo.wav', seed=1,
                           stage_name=stage, temperature=0.0))
    told = re.search(r'first audio after (\d+) ms, real-time factor ([\d.]+) over', caplog.text)
    frames = dict(three=10, duplex=8).get(stage, 1)
    least = 40 * frames + 27 + 25                       # ms: heard, and what ear and voice hold
    assert least <= int(told[1]) < least + 1000 and float(told[2]) > 0
    said = soundfile.read(sounds / 'stereo.wav', dtype='float32', always_2d=True)[0].T[-1]
    assert 16000 - 432 < wav.shape[1] <= 16000 + 432 + 10 * 640
    n = min(len(said), wav.shape[1] - 432)
    np.testing.assert_allclose(wav[1, 432:432 + n], np.clip(said[:n], -1, 1), atol=1e-4)

    one = live.room(lm, slots=1, samplers={})
    padded = np.concatenate([said, np.zeros(one.rest * 640, np.float32)])
    talk = live.Talk(lm, codec.kmeans(**options(lm)), one.chunk)
    heard = np.concatenate(talk.hear(padded), 1)
    (alone,) = dialogue.talk(lm, [heard], dialogue.own_layout(lm), batch=1)
    voiced = live.Voice(codec.kmeans(**options(lm)))
    ahead = dict(three=0, duplex=4).get(stage, 1)       # frames said before any is heard
    borders = [0, *range(ahead + one.chunk, alone.codes.shape[1] + 1, one.chunk)]
    sound = np.concatenate([voiced.push(alone.codes[:, a:b])
                            for a, b in zip(borders, borders[1:], strict=False)])[400:]
    size = min(len(sound), wav.shape[1])
    assert size > 15000
    np.testing.assert_allclose(wav[0, :size], np.clip(sound[:size], -1, 1), atol=1e-4)
    if stage == 'three':
        lines = [x.split() for x in (tmp_path / 'said.txt').read_text().splitlines()]
        assert lines and [(float(t), w) for t, _, w in lines] == [
            (round(t / 25, 2), w) for t, w in alone.words]
    else:
        assert not (tmp_path / 'said.txt').exists()         # it writes no words
        with pytest.raises(ConfigError, match='this system writes no words; name it .wav'):
            run(lm, 'duplex', tmp_path / 'said.txt', sounds / 'stereo.wav', stage_name=stage)

    class Pipe(io.BytesIO):
        def read1(self, n=-1):
            return super().read1(777)
    raw = (said * 32768).astype('<i2')
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(Pipe(raw.tobytes())))
    piped = run(lm, 'duplex', tmp_path / 'piped.wav', '-', seed=1, stage_name=stage,
                temperature=0.0)
    assert piped.read_bytes() == (tmp_path / 'said.wav').read_bytes()
    if name == 'omniflatten':
        assert sorted(os.listdir(run(lm, 'duplex', tmp_path / 'out', count=1,
                                     stage_name=stage))) == ['duplex-000.wav', 'samples.json']


# Examples of the dataset.

@pytest.mark.parametrize('task', FLAT)
def test_examples_of_one_stream(flat_lm, tmp_path, task):
    out = run(flat_lm, task, tmp_path / 'out')
    records = list(data.examples(flat_lm.config, 'test', 'tts' if task == 'tts' else 'asr',
                                 limit=2))
    said = [' '.join(w.text for w in r.words) for r in records]
    names, spoken = sorted(os.listdir(out)), task in ('tts', 's2s')
    stems = [f'{task}-{i:03d}' for i in range(2)]
    extra = {'tts': ['refs.json', 'samples.json', 'true'], 's2s': ['samples.json'],
             'asr': ['samples.json'], 't2t': ['samples.json']}[task]
    assert names == sorted([f'{s}.{"wav" if spoken else "txt"}' for s in stems] + extra)
    listed = json.loads((out / 'samples.json').read_text())
    assert [e['file'] for e in listed] == ([f'{s}.wav' for s in stems] if spoken else [])
    for entry, r in zip(listed, records, strict=False):
        assert r.id in entry['title'] and sound_of(out / entry['file']).shape[0] == 1
    if task == 'tts':
        assert json.loads((out / 'refs.json').read_text()) == {
            f'{s}.wav': text for s, text in zip(stems, said, strict=True)}
        for s, r in zip(stems, records, strict=True):       # what right units would sound like
            assert sound_of(out / 'true' / f'{s}.wav').shape[1] == len(r.units[0]) * 640
    if task == 't2t':
        for s, text in zip(stems, said, strict=True):
            words = text.split()
            assert (out / f'{s}.txt').read_text().startswith(
                ' '.join(words[:max(1, len(words) // 2)]) + ' | ')
    if task == 's2s':       # the first half of what is heard, and what the model makes of it
        speech = codec.kmeans(**options(flat_lm))
        frames = trained.unit_frames(flat_lm.config, flat_lm.config.codec.size)
        heard = [flat.speech_tokens(speech.encode(speech.decode(r.units[0][None]))[0],
                                    flat_lm.vocab) for r in records]
        heard = [h[:len(h) // 2] for h in heard]
        more = generate.continue_prompts(
            flat_lm.speaker(), [trained.prompt(flat_lm.vocab, '[Speech]', h) for h in heard],
            flat_lm.vocab, kind='speech', most_tokens=300)
        for s, h, m in zip(stems, heard, more, strict=True):
            units = np.concatenate([h, m]) - flat_lm.vocab.ranges['units'][0]
            assert sound_of(out / f'{s}.wav').shape[1] == frames[units].sum() * 640
    if task == 'asr':
        units = [flat.speech_tokens(r.units[0], flat_lm.vocab) for r in records]
        assert [(out / f'{s}.txt').read_text()[:-1] for s in stems] == trained.transcribe(
            flat_lm, units, '[Speech]', '[ASR]')


def test_examples_of_many_streams(streams_lm, tmp_path):
    out = run(streams_lm, 'duplex', tmp_path / 'out', count=1)
    record = next(data.examples(streams_lm.config, 'test', 'dialogue'))
    assert sorted(os.listdir(out)) == ['duplex-000.wav', 'samples.json']
    (entry,) = json.loads((out / 'samples.json').read_text())
    assert entry['channels'] == ['mine', 'theirs']
    assert entry['title'] == f'Answers the caller of {record.id}'
    assert entry['lines']['A right answer'] == ' / '.join(
        t.text for t in record.turns if t.channel == 0) != ''
    late = max(trained.layout_delays(plain(streams_lm.config.layout), streams_lm.vocab))
    assert sound_of(out / entry['file']).shape == (2, (record.codes.shape[-1] - late) * 1280)
    times = [float(t) for t in re.findall(r'\[(\S+) s\]', entry['text'])]
    assert times == sorted(times) and all(0 <= t < record.duration_s for t in times)


def test_examples_that_are_answered_beside_text(corpus, tmp_path):
    """Where text and sound stand side by side: the sound of the codes that the answer says."""
    lm = made(corpus, 'intrinsic_voice', tmp_path / 'run')
    out, units = run(lm, 'tts', tmp_path / 'out', drawn='tts'), codec.kmeans(**options(lm))
    records = list(data.examples(lm.config, 'test', 'tts', vocab=lm.vocab, limit=2))
    grids, layout = reply.drawn(lm, 'tts', records)
    assert layout['fields'] == ('text', 'speech')
    refs = json.loads((out / 'refs.json').read_text())
    for stem, record, grid, (_, codes) in zip(
            refs, records, grids, reply.replies(lm, grids, layout, most_columns=128), strict=True):
        want = units.decode(codes) if codes.size else np.zeros(4000)
        np.testing.assert_allclose(sound_of(out / stem)[0], np.clip(want, -1, 1), atol=1e-4)
        assert refs[stem] and refs[stem] in ' '.join(w.text for w in record.words)
        true = reply.true(lm.config, layout, grid, lm.vocab)
        assert ' '.join(map(str, true[0])) in ' '.join(map(str, record.units[0]))
        assert sound_of(out / 'true' / stem).shape[1] == true.shape[1] * 640
    for changes, line in ((dict(source='x.wav'), 'answers examples of the dataset'),
                          (dict(drawn='nothing'), '--source nothing: data.sources are ')):
        with pytest.raises(ConfigError, match=line):
            run(lm, 's2s', tmp_path / 'other', **changes)


def test_samples_of_several_tasks_are_listed_together(flat_lm, tmp_path):
    for count in (2, 1):
        run(flat_lm, 'tts', tmp_path / 'out', count=count)
        run(flat_lm, 's2s', tmp_path / 'out', count=1)
    listed = json.loads((tmp_path / 'out' / 'samples.json').read_text())
    assert [e['file'] for e in listed] == ['tts-000.wav', 's2s-000.wav']
    (tmp_path / 'out' / 'samples.json').write_text('[{"fil')
    with pytest.raises(ConfigError, match='samples.json cannot be read.*move it away'):
        run(flat_lm, 'tts', tmp_path / 'out', count=1)
    assert (tmp_path / 'out' / 'samples.json').read_text() == '[{"fil'


@contextlib.contextmanager
def interrupted_at(word):
    """Ctrl-C when a line that holds `word` is logged."""
    class Handler(logging.Handler):
        def emit(self, record):
            if word in record.getMessage():
                raise KeyboardInterrupt
    handler = Handler()
    level = speak.log.level
    speak.log.addHandler(handler)
    speak.log.setLevel(logging.INFO)
    try:
        yield
    finally:
        speak.log.removeHandler(handler)
        speak.log.setLevel(level)


def test_examples_are_all_there_or_none(flat_lm, tmp_path):
    with interrupted_at('tts-001'), pytest.raises(KeyboardInterrupt):
        run(flat_lm, 'tts', tmp_path / 'out')
    assert not os.listdir(tmp_path)
    run(flat_lm, 'tts', tmp_path / 'out', count=1)
    before = {p: p.read_bytes() for p in tmp_path.rglob('*.*')}
    assert len(before) == 4
    with interrupted_at('tts-001'), pytest.raises(KeyboardInterrupt):
        run(flat_lm, 'tts', tmp_path / 'out')
    assert {p: p.read_bytes() for p in tmp_path.rglob('*.*')} == before


# Small things.

def test_units_are_held_as_long_as_they_usually_are(flat_lm):
    runs, frames = {}, {}
    for r in data.examples(flat_lm.config, 'train', 'aligned', limit=200):
        last = None
        for u in r.units[0].tolist():
            runs[u] = runs.get(u, 1) + (u != last)      # one more run of one frame for every unit
            frames[u] = frames.get(u, 1) + 1
            last = u
    found = trained.unit_frames(flat_lm.config, flat_lm.config.codec.size)
    assert len(found) == flat_lm.config.codec.size and found.min() == 1
    for u in range(len(found)):
        assert found[u] == max(1, round(frames.get(u, 1) / runs.get(u, 1))), u
    assert found.max() > 1


def test_a_wav_is_written_whole_and_clipped(tmp_path):
    wav = np.array([[0.5, 2.0, -3.0], [0, 0.25, 1.0]], np.float32)
    speak.write_wav(str(tmp_path / 'x.wav'), wav, 16000)
    np.testing.assert_allclose(sound_of(tmp_path / 'x.wav'), np.clip(wav, -1, 1), atol=1e-4)
    assert os.listdir(tmp_path) == ['x.wav']


def test_a_sound_is_read_at_the_rate_of_the_codec(tmp_path):
    t = np.arange(48000) / 48000
    soundfile.write(tmp_path / 'tone.wav', 0.5 * np.sin(2 * np.pi * 440 * t), 48000)
    wav = speak.read_wav(str(tmp_path / 'tone.wav'), 16000)
    assert wav.shape == (1, 16000) and wav.dtype == np.float32
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    np.testing.assert_allclose(wav[0, 200:-200], tone[200:-200], atol=5e-3)


# The verbs.

def test_generate_and_show_through_the_command_line(corpus, flat_lm, tmp_path, capsys):
    """As a user does it: generate from text, look at what is read, as text and as a picture."""
    from PIL import Image
    argv = [a for a in flags(corpus) if 'save_steps' not in a]
    assert cli.main(['generate', *argv, '--workdir', flat_lm.workdir, '--task', 'tts', '--input',
                     'the', '--output',
                     str(tmp_path / 'a.wav'), '--temperature', '0.9', '--top-k', '5', '--top-p',
                     '0.9', '--seed', '3']) == 0
    assert sound_of(tmp_path / 'a.wav').shape[0] == 1
    capsys.readouterr()
    assert cli.main(['show', *argv, '--source', 'asr', '--columns', '500']) == 0
    shown = capsys.readouterr().out
    c = on(corpus, read('spirit_lm', 'tiny'))
    record = next(data.examples(c, 'train', 'asr'))
    assert '[Speech]' in shown and '[ASR]' in shown and 'BOS' in shown
    for word in record.words:
        assert word.text in shown
    units = [f'u{u}' for u in flat.runs(record.units[0])[0]]
    words = shown.replace("'", ' ').split()
    assert [w for w in words if re.fullmatch(r'u\d+', w)] == units
    assert cli.main(['show', *argv, '--index', '1', '--png', str(tmp_path / 'grid.png')]) == 0
    with Image.open(tmp_path / 'grid.png') as image:
        assert image.format == 'PNG' and min(image.size) > 50


def test_what_cannot_be_heard_or_written_is_said_before_the_model_is_read(streams_lm, sounds,
                                                                          tmp_path, monkeypatch):
    monkeypatch.setattr(trained, 'load', None)
    soundfile.write(tmp_path / 'none.wav', np.zeros(0), 16000)
    good = sounds / 'mono.wav'
    for out, source, line in (
            ('x.wav', '', '--input is empty'), ('x.wav', tmp_path / 'none.wav', 'holds no sound'),
            ('x.aiff', good, 'sound is written as wav'), ('x', good, 'sound is written as wav'),
            ('none.wav/x.wav', good, 'none.wav is no directory that can be written to')):
        with pytest.raises(ValueError, match=line):
            run(streams_lm, 'duplex', tmp_path / out, source)
    monkeypatch.setattr('sys.stdin', None)
    with pytest.raises(ConfigError, match='nothing is piped in'):
        run(streams_lm, 'duplex', tmp_path / 'x.wav', '-')
    assert os.listdir(tmp_path) == ['none.wav']


def test_who_is_terminated_keeps_what_was_said(streams_lm, sounds, tmp_path, monkeypatch):
    """As after Ctrl-C; afterwards the signal is everybody's own again."""
    raw = (soundfile.read(sounds / 'mono.wav')[0] * 32768).astype('<i2').tobytes()
    before = signal.getsignal(signal.SIGTERM)

    class Pipe(io.BytesIO):
        def read1(self, n=-1):
            part = super().read1(n)
            if not part:
                os.kill(os.getpid(), signal.SIGTERM)
            return part
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(Pipe(raw)))
    with pytest.raises(KeyboardInterrupt):
        run(streams_lm, 'duplex', tmp_path / 'said.wav', '-')
    assert sorted(os.listdir(tmp_path)) == ['said.txt', 'said.wav']
    assert sound_of(tmp_path / 'said.wav').shape[1] > 8000
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_wav_in_small_pieces_is_no_raw_sound():
    class Pipe(io.BytesIO):
        def read1(self, n=-1):
            return super().read1(2)
    with pytest.raises(ValueError, match='this is a wav file'):
        list(speak._raw(Pipe(b'RIFF0000WAVE'), 8))
    pieces = list(speak._raw(Pipe(np.arange(5, dtype='<i2').tobytes() + b'x'), 8))
    np.testing.assert_array_equal(np.concatenate(pieces) * 32768, np.arange(5))

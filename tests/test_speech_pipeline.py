# SPDX-License-Identifier: Apache-2.0
"""Your own speech: manifests, every bad row, the aligner against true times, the judge."""

import json
import os
import pathlib
import shlex
import shutil

import numpy as np
import pytest
import soundfile

from data_pipelines import align, augment, demo, espeak, judge, records, simulate, speech
from jaxsd import codec, config, data
from jaxsd.types import Phrase

ROOT = pathlib.Path(__file__).resolve().parents[1]
RATE_HZ = 16000
SAID = 'tom has three dogs and the red key is in the box'
ASKED = 'where is the green book'
FIT = ['--fit', '--unit-size', '40', '--code-size', '16', '--codebooks', '2', '--text-pieces',
       '300', '--jobs', '1']


def write_rows(path, rows):
    path.write_text(''.join((r if isinstance(r, str) else json.dumps(r)) + '\n' for r in rows))
    return str(path)


@pytest.fixture(scope='module')
def said():
    return (espeak.speak(SAID, voice='en-us'), espeak.speak(ASKED, voice='en-us+m3'))


@pytest.fixture(scope='module')
def good(said, tmp_path_factory):
    """A folder of three dialogues and three clips of another rate, and the rows that name them."""
    import soxr
    folder = tmp_path_factory.mktemp('speech')
    mine, theirs = said
    rows = []
    for i in range(3):
        begin = RATE_HZ * (i + 1)
        wav = np.zeros((max(len(mine.wav), begin + len(theirs.wav)), 2), np.float32)
        wav[:len(mine.wav), 0] = mine.wav
        wav[begin:begin + len(theirs.wav), 1] = theirs.wav
        soundfile.write(folder / f'd{i}.wav', wav, RATE_HZ)
        words = [[f' {w}', [a, b], 'SPEAKER_MAIN'] for w, a, b in mine.words]
        if i == 1:
            words += [[w, [a + begin / RATE_HZ, b + begin / RATE_HZ], 'SPEAKER_OTHER']
                      for w, a, b in theirs.words]
        (folder / f'd{i}.json').write_text(json.dumps({'alignments': words}))
        rows.append({'path': f'd{i}.wav', 'duration': len(wav) / RATE_HZ})
    for name in ('a.flac', 'b.mp3', 'c.wav'):
        soundfile.write(folder / name, soxr.resample(theirs.wav, RATE_HZ, 22050), 22050)
        rows.append({'path': name, 'text': 'Where is the green -- book?'})
    return folder, rows


@pytest.fixture(scope='module')
def made(good, tmp_path_factory):
    """The dataset of the good rows, with tokenizers of its own."""
    folder, rows = good
    out = tmp_path_factory.mktemp('made') / 'own'
    assert speech.main(['--manifest', write_rows(folder / 'own.jsonl', rows), '--out', str(out),
                        '--test-share', '0.3', '--keep-wav', *FIT]) == 0
    return out


def decoded(out, split):
    return {row['id'].decode(): row for row in records.source_of(str(out), split)}


def test_both_kinds_become_records(made, good, said):
    manifest = json.loads((made / 'manifest.json').read_text())
    units, codes = (codec.fitted(str(made / n)) for n in ('units.safetensors', 'codec.safetensors'))
    assert manifest['units'] == units.identity and manifest['codes'] == codes.identity
    assert manifest['aligner']['name'] == 'pocketsphinx' and manifest['sources'] == ['own']
    assert manifest['splits']['train']['records'] == 4
    assert manifest['splits']['test']['records'] == 2
    rows = decoded(made, 'train') | decoded(made, 'test')
    assert sorted(rows) == ['a.flac', 'b.mp3', 'c.wav', 'd0.wav', 'd1.wav', 'd2.wav']

    row, (wav, _) = rows['d1.wav'], soundfile.read(good[0] / 'd1.wav', dtype='float32')
    shape = row['codes_shape']
    assert list(shape) == [2, 2, -(-len(wav) // 1280)]
    for channel, grid in enumerate(row['codes'].reshape(shape)):
        np.testing.assert_array_equal(grid, codes.encode(np.ascontiguousarray(wav[:, channel])))
    np.testing.assert_array_equal(row['units'][row['units_lengths'][0]:],
                                  units.encode(np.ascontiguousarray(wav[:, 1]))[0])
    words = row['word_text'].decode().split('\n')
    assert [w for w, c in zip(words, row['word_channel'], strict=True) if c == 0] == SAID.split()
    assert [w for w, c in zip(words, row['word_channel'], strict=True) if c == 1] == ASKED.split()
    assert (np.diff(row['word_start_s']) >= 0).all()
    np.testing.assert_allclose(
        row['word_start_s'][row['word_channel'] == 1], [2 + a for _, a, _ in said[1].words],
        atol=1e-5)
    assert set(rows['d0.wav']['word_channel']) == {0}
    assert rows['d1.wav']['turn_text'].decode().split('\n') == [SAID, ASKED]

    for name in ('a.flac', 'b.mp3', 'c.wav'):
        row = rows[name]
        assert row['word_text'].decode().split('\n') == ['Where', 'is', 'the', 'green', 'book?']
        assert len(row['phone_channel']) >= 11 and row['codes_shape'][0] == 1
        error = np.abs(row['word_start_s'] - [a for _, a, _ in said[1].words])
        assert error.mean() < 0.05, (name, error)       # mp3 delays the sound by some samples
    import io
    flac, rate = soundfile.read(io.BytesIO(rows['d1.wav']['wav'].tobytes()), dtype='float32')
    assert rate == RATE_HZ and np.abs(flac - wav).max() < 1e-4


def test_given_tokenizers_are_used_and_copied(made, good, tmp_path):
    folder, rows = good
    out = tmp_path / 'again'
    code = speech.main(['--manifest', str(folder / 'own.jsonl'), '--out', str(out), '--units',
                        str(made / 'units.safetensors'), '--codec', str(made / 'codec.safetensors'),
                        '--text-model', str(made / 'text.model'), '--test-share', '0',
                        '--jobs', '2'])
    assert code == 0
    for name in ('units.safetensors', 'codec.safetensors', 'text.model'):
        assert (out / name).read_bytes() == (made / name).read_bytes()
    before = decoded(made, 'train') | decoded(made, 'test')
    after = decoded(out, 'train')
    assert {k: v['crc32'] for k, v in after.items()} == {k: v['crc32'] for k, v in before.items()}


def test_a_full_disk_is_said_in_one_line(good, made, file_limit, tmp_path, capsys):
    for i in range(12):
        for kind in ('wav', 'json'):
            shutil.copy(good[0] / f'd0.{kind}', tmp_path / f'{i}.{kind}')
    rows = write_rows(tmp_path / 'rows.jsonl', [{'path': f'{i}.wav'} for i in range(12)])
    before = sorted(os.listdir(tmp_path))
    units = made / 'units.safetensors'
    with file_limit(units.stat().st_size):      # the tokenizers fit, the shard does not
        code = speech.main(['--manifest', rows, '--out', str(tmp_path / 'out'), '--keep-wav',
                            '--units', str(units), '--text-model', str(made / 'text.model'),
                            '--jobs', '1', '--test-share', '0'])
    said = capsys.readouterr().err.splitlines()[-1]
    assert code == 1 and said.startswith('speech: ') and 'File too large' in said
    assert sorted(os.listdir(tmp_path)) == before


def _broken(good, folder):
    """Every kind of bad row: (row, what its sound's sidecar holds or None, the kind expected)."""
    source, _ = good
    for name in ('d0.wav', 'd0.json', 'c.wav', 'a.flac'):
        shutil.copy(source / name, folder / name)
    shutil.copy(source / 'd0.wav', folder / 'other.wav')
    duration_s = soundfile.info(str(folder / 'd0.wav')).duration
    (folder / 'cut.flac').write_bytes((folder / 'a.flac').read_bytes()[:3000])
    (folder / 'cut.wav').write_bytes((folder / 'c.wav').read_bytes()[:-4000])
    (folder / 'noise.wav').write_bytes(b'not a sound at all')
    (folder / 'folder.wav').mkdir()
    soundfile.write(folder / 'none.wav', np.zeros((0, 1)), RATE_HZ)
    soundfile.write(folder / 'three.wav', np.zeros((800, 3)), RATE_HZ)
    nan = np.zeros(RATE_HZ, np.float32)
    nan[5] = np.nan
    soundfile.write(folder / 'nan.wav', nan, RATE_HZ, subtype='FLOAT')
    soundfile.write(folder / 'long.wav', np.zeros(RATE_HZ * 31), RATE_HZ, format='FLAC')
    soundfile.write(folder / 'fast.wav', np.zeros(800), 4_000_000)
    soundfile.write(folder / 'hush.wav', np.zeros(RATE_HZ), RATE_HZ)

    def with_words(i, sidecar):
        name = f'words{i}'
        shutil.copy(folder / 'd0.wav', folder / f'{name}.wav')
        if sidecar is not None:
            text = sidecar if isinstance(sidecar, str) else json.dumps(sidecar)
            (folder / f'{name}.json').write_text(text)
        return {'path': f'{name}.wav'}

    def one(item):
        return {'alignments': [['fine', [0.0, 0.5], 'SPEAKER_MAIN'], item]}

    text = {'text': 'where is the green book'}
    cases = [
        ('{bad', 'bad JSON'), ('[1, 2]', 'bad JSON'), ({'duration': 3}, 'bad JSON'),
        ({'path': 7}, 'bad JSON'), ({'path': 'c.wav', 'text': 5}, 'bad JSON'),
        ('{"path": "c.wav", "text": "' + 'a' * (1 << 20) + '"}', 'bad JSON'),
        ('\udcff', 'bad JSON'), ('[' * 100_000, 'bad JSON'),
        ({'path': 'absent.wav', 'duration': 3}, 'missing file'),
        ({'path': 'folder.wav', **text}, 'missing file'),
        ({'path': 'other.wav', 'duration': duration_s + 1}, 'wrong duration'),
        ({'path': 'd0.wav', 'duration': 'long'}, 'wrong duration'),
        ('{"path": "d0.wav", "duration": NaN}', 'wrong duration'),
        ({'path': 'noise.wav', **text}, 'unreadable audio'),
        ({'path': 'cut.flac', **text}, 'unreadable audio'),
        ({'path': 'cut.wav', **text}, 'unreadable audio'),
        ({'path': 'nan.wav', **text}, 'unreadable audio'),
        ({'path': 'fast.wav', **text}, 'unreadable audio'),
        ({'path': 'none.wav', **text}, 'zero-length audio'),
        ({'path': 'three.wav', 'duration': 0.05}, 'wrong channel count'),
        ({'path': 'c.wav'}, 'wrong channel count'),
        ({'path': 'other.wav', **text}, 'wrong channel count'),
        ({'path': 'long.wav', **text}, 'too long'),
        ({'path': 'c.wav', 'text': ' \t '}, 'empty transcript'),
        ({'path': 'hush.wav', **text}, 'cannot be aligned'),
        ({'path': 'a.flac', 'text': 'where is the zorblax'}, 'cannot be aligned'),
    ]
    sidecars = [
        (None, 'missing alignment'), ('{', 'bad alignment'), ('[]', 'bad alignment'),
        ({'alignments': {}}, 'bad alignment'), ({'alignments': []}, 'empty transcript'),
        (one(['word', [0.5, 1.0]]), 'bad alignment'), (one(['word', 0.5, 'X']), 'bad alignment'),
        (one([1, [0.5, 1.0], 'X']), 'bad alignment'),
        (one([' ', [0.5, 1.0], 'X']), 'bad alignment'),
        (one(['word', ['0.5', 1.0], 'X']), 'bad alignment'),
        (one(['word', [True, 1.0], 'X']), 'bad alignment'),
        ('{"alignments": [["word", [NaN, 1.0], "X"]]}', 'bad alignment'),
        ('{"alignments": [["word", [0.1, Infinity], "X"]]}', 'bad alignment'),
        (one(['word', [1.0, 0.5], 'X']), 'bad alignment'),
        (one(['word', [-0.5, 0.5], 'X']), 'alignment outside the audio'),
        (one(['word', [0.5, duration_s + 0.2], 'X']), 'alignment outside the audio'),
        (one(['word', [duration_s + 1, duration_s + 2], 'X']), 'alignment outside the audio'),
    ]
    cases += [(with_words(i, sidecar), kind) for i, (sidecar, kind) in enumerate(sidecars)]
    # The good row comes first, and once more at the end.
    return [({'path': 'd0.wav'}, None), *cases, ({'path': 'd0.wav'}, 'repeated path')]


def test_every_bad_row_is_named_counted_and_skipped(good, made, tmp_path, capsys):
    cases = _broken(good, tmp_path)
    manifest = tmp_path / 'bad.jsonl'
    with open(manifest, 'w', encoding='utf-8', errors='surrogateescape') as f:
        f.writelines((r if isinstance(r, str) else json.dumps(r)) + '\n' for r, _ in cases)
    out = tmp_path / 'out'
    assert speech.main([
        '--manifest', str(manifest), '--out', str(out), '--units', str(made / 'units.safetensors'),
        '--text-model', str(made / 'text.model'), '--bad', 'skip', '--max-seconds', '30',
        '--test-share', '0', '--jobs', '1']) == 0
    told = {row['line']: row for row in map(json.loads, open(out / 'bad_rows.jsonl'))}
    want = {i + 1: kind for i, (_, kind) in enumerate(cases) if kind}
    assert {line: row['kind'] for line, row in told.items()} == want
    assert list(decoded(out, 'train')) == ['d0.wav']
    heard = capsys.readouterr()
    for line, kind in want.items():
        assert f'{manifest}:{line}: {kind}: ' in heard.err
    assert f'skipped: {len(want)} rows' in heard.out
    assert 'zorblax' in heard.err
    assert not os.path.exists(f'{out}.partial')


def test_what_it_prints_lets_a_config_read_the_dataset(made):
    manifest = json.loads((made / 'manifest.json').read_text())
    shared, units, codes, select = records.overrides(
        str(made), manifest, manifest['sources']).splitlines()[1:]
    for system, kind in (('spirit_lm', units), ('moshi', codes)):
        c = config.read(f'{ROOT}/configs/{system}.py:tiny')
        each = shlex.split(select)[-1]
        for word in [*shlex.split(shared), *shlex.split(kind)[1:],
                     *(each.replace('SOURCE', s) for s in c.data.sources)]:
            path, _, value = word.removeprefix('--config.').partition('=')
            config.override(c, path, value)
        assert config.bind(c.codec, 'jaxsd.codec', 'codec')().identity in (
            manifest['units'], manifest['codes'])
        assert all(s.select == ('own',) for s in c.data.sources.values())
        if system == 'spirit_lm':
            data.check(c, config.plain(c.stages[0]), config.bind(c.vocab, 'jaxsd.vocab', 'vocab')(
                c.codec))


@pytest.mark.parametrize('bad', [{'path': 'absent.wav'}, {'path': 'a.flac', 'text': 'zorblax'}])
def test_a_bad_row_is_fatal_by_default(good, made, tmp_path, capsys, bad):
    folder, rows = good
    manifest = write_rows(folder / 'fatal.jsonl', [rows[0], bad, bad | {'path': 'gone.wav'}])
    out = tmp_path / 'out'
    given = ['--units', str(made / 'units.safetensors'), '--text-model', str(made / 'text.model')]
    assert speech.main(['--manifest', manifest, '--out', str(out), *given, '--jobs', '1']) == 1
    *said, error = capsys.readouterr().err.strip().split('\n')
    first = 2 if 'text' not in bad else 3       # headers are looked at before words
    assert f'{manifest}:{first}: ' in error and '--bad skip' in error
    assert any(f'bad {manifest}:3: missing file' in line for line in said)
    assert not out.exists() and not os.path.exists(f'{out}.partial')


@pytest.mark.parametrize('pipeline', [augment, demo, judge, simulate, speech])
def test_an_unknown_flag_is_one_line(pipeline, capsys):
    with pytest.raises(SystemExit) as e:
        pipeline.main(['--huors', '3'])
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.count('\n') == 1
    assert said.startswith(f'python -m {pipeline.__name__}: ') and '--help' in said


@pytest.mark.parametrize(('pipeline', 'flag', 'least'), [
    (demo, 'jobs', 1), (demo, 'seed', 0), (augment, 'seed', 0), (simulate, 'seed', 0),
    (judge, 'jobs', 1), *((speech, flag, flag != 'seed') for flag in (
        'jobs', 'seed', 'unit-size', 'code-size', 'codebooks', 'text-pieces'))])
def test_numbers_below_their_least_are_one_line(pipeline, flag, least, capsys):
    needed = {augment: '--source', demo: '--out', judge: '--sentences x --wav x --refs',
              simulate: '--hours 1 --source', speech: '--manifest'}
    argv = f'{needed[pipeline]} x --out x'
    with pytest.raises(SystemExit, match='2'):
        pipeline.main([*argv.split(), f'--{flag}', str(least - 1)])
    said = capsys.readouterr().err
    assert f': --{flag} must be at least {least:d}, got {least - 1}; see ' in said
    assert said.count('\n') == 1


def test_wrong_flags_are_one_line(good, made, tmp_path, capsys):
    folder, _ = good
    units, codes, text = (str(made / n) for n in
                          ('units.safetensors', 'codec.safetensors', 'text.model'))
    (tmp_path / 'words.json').write_text('{"zorblax": "QQ"}')
    own = str(folder / 'own.jsonl')
    cases = [([own], '--fit'), ([own, '--fit', '--units', units], 'drop it'),
             ([own, '--units', codes, '--text-model', text], 'has several codebooks'),
             ([own, '--codec', units, '--text-model', text], 'has one codebook'),
             ([own, '--units', text, '--text-model', text], 'not a codec file'),
             ([own, '--units', units, '--text-model', units], 'cannot read the sentencepiece'),
             ([own, '--units', units, '--text-model', text, '--pronunciations',
               str(tmp_path / 'words.json')], 'ARPAbet'),
             ([str(tmp_path / 'absent'), '--fit'], 'cannot read the manifest'),
             ([own, '--mimi', str(tmp_path / 'absent'), '--text-model', text], 'no Mimi weights')]
    (tmp_path / 'empty.jsonl').write_text('')
    cases.append(([str(tmp_path / 'empty.jsonl'), '--fit'], 'no row to train on in '))
    for flags, said in cases:
        assert speech.main(['--manifest', *flags, '--out', str(tmp_path / 'out'),
                            '--jobs', '1']) == 1
        error = capsys.readouterr().err.strip().split('\n')[-1]
        assert error.startswith('speech: ') and said in error, (flags, error)
        assert not (tmp_path / 'out').exists() and not (tmp_path / 'out.partial').exists()
    assert speech.main(['--manifest', own, '--out', str(made), *FIT]) == 1
    assert 'already holds a finished dataset' in capsys.readouterr().err


@pytest.mark.parametrize(('name', 'content', 'says'), [
    ('rows.csv', b'path,text\na.wav,hello\n', 'line 1: not JSON: Expecting value'),
    ('a.wav', b'RIFF\n\x90\xff', 'line 1: not JSON'),
    ('array.json', b'[{"path": "a.wav"}]', 'line 1: should be an object with a "path"'),
    ('pretty.json', b'{\n "path": "a.wav"\n}', 'line 1: not JSON')])
@pytest.mark.parametrize('bad', ['skip', 'fatal'])
def test_a_file_of_another_kind_is_no_manifest(tmp_path, capsys, name, content, says, bad):
    """One line, however many lines it has, and nothing is made."""
    (tmp_path / name).write_bytes(content)
    assert speech.main(['--manifest', str(tmp_path / name), '--out', str(tmp_path / 'out'), '--fit',
                        '--bad', bad]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f'speech: {tmp_path / name} is no manifest of JSON lines: {says}')
    assert said.count('\n') == 1 and os.listdir(tmp_path) == [name]


def test_rows_may_hold_what_is_written_beside_the_speech(tmp_path):
    lines = [dict(path='a.wav', fields=dict(task='translate', ask=['one', 'another'])),
             dict(path='b.wav'), dict(path='c.wav', fields=['task']),
             dict(path='d.wav', fields=dict(task='')), dict(path='e.wav', fields=dict(task=3)),
             dict(path='f.wav', fields=dict(task=[])), dict(path='g.wav', fields={'a\nb': 'c'})]
    (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    first, second, *bad = [row for _, row in speech.rows_of(str(tmp_path / 'rows.jsonl'))]
    assert first.fields == {'task': (Phrase('translate'),),
                            'ask': (Phrase('one'), Phrase('another'))}
    assert second.fields == {}
    assert len(bad) == 5 and all(isinstance(b, speech.BadRow) and b.kind == 'bad fields'
                                 for b in bad)


# ------------------------------------------------------------------------------------------ aligner

def test_alignment_agrees_with_the_synthesizer():
    errors = []
    for voice in ('en-us', 'en-us+m3', 'en-us+f2'):
        for text in (SAID, ASKED, 'the old farmer sold nine green bottles at the market'):
            spoken = espeak.speak(text, voice=voice)
            found = align.align(spoken.wav, text.split())
            assert [w for w, _, _ in found.words] == text.split() and found.phones
            errors += [a[1] - b[1] for a, b in zip(found.words, spoken.words, strict=True)]
            starts = np.array([p[1] for p in found.phones])
            assert max(np.abs(starts - w[1]).min() for w in found.words) < 0.1
            assert (np.diff(starts) >= 0).all()
    assert np.abs(errors).mean() < 0.03, np.abs(errors).mean()


def test_alignment_moves_with_the_sound(said):
    words = ASKED.split()
    later = np.concatenate([np.zeros(8000, np.float32), said[1].wav])
    a, b = align.align(said[1].wav, words), align.align(later, words)
    shifts = [y[1] - x[1] for x, y in zip(a.words, b.words, strict=True)]
    assert np.abs(np.median(shifts) - 0.5) < 0.03, shifts


def test_pronunciations_and_spelling(said):
    with pytest.raises(ValueError, match='1 words are not in .*: greeen '):
        align.align(said[1].wav, 'where is the greeen book'.split())
    found = align.align(said[1].wav, ['Where', 'is-the', '--', 'Greeen', 'BOOK?'],
                        pronunciations={'greeen': 'G R IY N'})
    assert [w for w, _, _ in found.words] == ['Where', 'is-the', 'Greeen', 'BOOK?']
    assert align.unknown(['zorblax', 'book']) == ['zorblax']


# -------------------------------------------------------------------------------------------- judge

def test_bigram_is_a_distribution():
    """Every history's probabilities, seen and backed off, add up to one."""
    lines = [s.split() for s in ('a b c', 'a b', 'b c a', 'c')]
    arpa = judge.bigram(lines).split('\n')
    cut = arpa.index('\\2-grams:')
    one = {r.split()[1]: [float(x) for x in r.split()[::2]] for r in arpa[5:cut] if r}
    two = {tuple(r.split()[1:]): float(r.split()[0]) for r in arpa[cut + 1:] if ' ' in r}
    words = [w for w in one if w != '<s>']
    assert sorted(words) == ['</s>', 'a', 'b', 'c']
    assert abs(sum(10 ** one[w][0] for w in words) - 1) < 1e-4
    for head in ('<s>', 'a', 'b', 'c'):
        total = sum(10 ** two.get((head, w), one[w][0] + one[head][1]) for w in words)
        assert abs(total - 1) < 1e-4, (head, total)


def test_judge_hears_words_between_floor_and_ceiling(tmp_path, capsys):
    texts = ['tom has three dogs', 'where is the red key', 'anna sold nine green bottles',
             'what is four plus five']
    for folder in ('run', 'ceiling'):
        (tmp_path / folder).mkdir()
    for i, text in enumerate(texts):
        wav = espeak.speak(text, voice='en-us').wav
        soundfile.write(tmp_path / 'ceiling' / f'{i}.wav', wav, RATE_HZ)
        if i == 3:          # the model said something else
            wav = espeak.speak(texts[0], voice='en-us').wav
        soundfile.write(tmp_path / 'run' / f'{i}.wav', wav, RATE_HZ)
    (tmp_path / 'grammar.json').write_text(json.dumps({'sentences': {'train': texts}}))
    (tmp_path / 'refs.json').write_text(json.dumps({f'{i}.wav': t for i, t in enumerate(texts)}))
    (tmp_path / 'evaluation.json').write_text(json.dumps([{'task': 'kept'}, {
        'task': 'spoken', 'split': 'test', 'step': 7, 'stage': 'main', 'metrics': {'wer': 9}}]))
    flags = ['--sentences', str(tmp_path / 'grammar.json'), '--wav', str(tmp_path / 'run'),
             '--refs', str(tmp_path / 'refs.json'), '--ceiling', str(tmp_path / 'ceiling'),
             '--out', str(tmp_path / 'judge.json'), '--workdir', str(tmp_path), '--task', 'spoken',
             '--step', '7', '--stage', 'main']
    assert judge.main([*flags, '--jobs', '1']) == 0
    rows = json.loads((tmp_path / 'evaluation.json').read_text())
    assert rows[0] == {'task': 'kept'} and len(rows) == 2
    rates = rows[1]['metrics']
    assert (rows[1]['step'], rows[1]['split'], rows[1]['items']) == (7, 'test', 4)
    assert rates['ceiling, WER %'] < 10
    assert abs(rates['generated, WER %'] - rates['ceiling, WER %'] - 100 * 5 / 19) < 10
    assert rates['floor: wrong sentences, WER %'] > 60
    assert rates['floor: noise, WER %'] > 90
    printed = capsys.readouterr().out
    assert printed.count('WER') == 4 and 'true units' in printed
    assert json.loads((tmp_path / 'judge.json').read_text())['heard']['spoken']['0.wav'] == texts[0]

    again = json.loads((tmp_path / 'evaluation.json').read_text())
    (tmp_path / 'run' / '2.wav').write_bytes(b'x')
    assert judge.main(flags) == 1
    (tmp_path / 'run' / '2.wav').unlink()
    assert judge.main(flags) == 1
    assert '2.wav' in capsys.readouterr().err
    assert json.loads((tmp_path / 'evaluation.json').read_text()) == again


def test_processes_hear_the_same():
    texts = [SAID, ASKED, 'tom has a box', 'the book is green', 'the red key']
    wavs = [espeak.speak(t, voice='en-us').wav for t in texts]
    alone = judge.recognize(wavs, texts, processes=1)
    assert judge.recognize(wavs, texts, processes=2) == alone
    assert judge.wer(texts, alone) < 0.15
    with pytest.raises(ValueError, match='zorblax'):
        judge.recognize(wavs, ['the zorblax'])
    with pytest.raises(ValueError, match='no sentences'):
        judge.recognize(wavs, ['--'])


def test_what_was_heard_before_changes_nothing(said):
    first = align.align(said[1].wav, ASKED.split())
    noise = np.random.default_rng(0).normal(0, 0.2, RATE_HZ).astype(np.float32)
    align.align(said[0].wav + 0.05 * np.resize(noise, len(said[0].wav)), SAID.split())
    with pytest.raises(ValueError, match='no path'):
        align.align(noise[:3000], SAID.split())
    assert align.align(said[1].wav, ASKED.split()) == first

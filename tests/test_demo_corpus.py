# SPDX-License-Identifier: Apache-2.0
"""The demo corpus: what is said, when it is said, and that it is the same corpus every time."""

import collections
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from data_pipelines import demo, espeak, grammar, records
from jaxsd import vocab
from jaxsd.types import Phrase, Record, Turn, Word

HOURS = '0.03'
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def command(out, *more):
    return [sys.executable, '-m', 'data_pipelines.demo', '--out', str(out), '--hours', HOURS, *more]


def run(out, *more, **kwargs):
    return subprocess.run(command(out, *more), cwd=ROOT, capture_output=True, text=True, **kwargs)


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp('demo') / 'corpus'
    done = run(out, '--jobs', '2')
    assert done.returncode == 0, done.stderr
    assert 'h of audio' in done.stdout
    return out


def rows(directory, split):
    source = records.source_of(str(directory), split)
    return [source[i] for i in range(len(source))]


def decode(row):
    """A stored row as a Record, written from the description of the format."""
    def timed(name, kind):
        texts = row[f'{name}_text'].decode().split('\n')
        columns = (row[f'{name}_channel'], row[f'{name}_start_s'], row[f'{name}_end_s'])
        for text, c, a, b in zip(texts, *columns, strict=len(columns[0]) > 0):
            yield (kind(text, int(c), float(a), float(b)) if kind is Word
                   else kind(int(c), float(a), float(b), text))

    shape, cuts = tuple(row['codes_shape']), np.cumsum(row['side_lengths'])[:-1]
    bounds = np.cumsum(row['units_lengths'])[:-1]
    return Record(
        id=row['id'].decode(), source=row['source'].decode(), language=row['language'].decode(),
        duration_s=float(row['duration_s']),
        codes=row['codes'].reshape(shape) if any(shape) else None,
        units=tuple(np.split(row['units'], bounds)) if len(row['units_lengths']) else (),
        words=tuple(timed('word', Word)), phones=tuple(timed('phone', Word)),
        turns=tuple(timed('turn', Turn)),
        style=tuple(filter(None, row['style'].decode().split('\n'))), wav=row['wav'].tobytes(),
        sides=grouped(row['side_name'], np.split(row['sides'], cuts)),
        fields=grouped(row['field_name'], [
            Phrase(text) for text in row['field_text'].decode().split('\n')]))


def grouped(names: bytes, values) -> dict:
    """Values under their names, several of one name in order."""
    out: dict = {}
    for name, value in zip(names.decode().split('\n'), values, strict=True):
        if name:
            out[name] = (*out.get(name, ()), value)
    return out


# ---------------------------------------------------------------------------------------- espeak

def test_every_word_has_a_time_and_a_sound():
    text = 'Anna put 2 hats in the box, in the car. do you know what is in the bag?'
    wav, words, phones = espeak.speak(text, voice='en-us', rate_wpm=160)
    assert [w for w, _, _ in words] == ('anna put two hats in the box in the car do you know what '
                                        'is in the bag').split()
    assert wav.dtype == np.float32 and 0.2 < np.abs(wav).max() < 1.1
    seconds = len(wav) / espeak.SAMPLE_RATE_HZ
    for items in (words, phones):
        starts = [a for _, a, _ in items]
        assert starts == sorted(starts)
        assert all(0 <= a < b <= seconds + 1e-3 for _, a, b in items)
    loud = [np.sqrt(np.mean(wav[int(a * 16000):int(b * 16000)] ** 2)) for _, a, b in words]
    assert min(loud) > 0.005                    # every span holds sound ...
    stop, go = words[9][2], words[10][1]
    assert go - stop >= espeak.PAUSE_S          # ... and between the sentences there is none
    assert np.abs(wav[int((stop + 0.05) * 16000):int((go - 0.02) * 16000)]).max() < 0.01
    # The engine's own sense of time: half the rate takes about twice as long.
    slow = espeak.speak(text, voice='en-us', rate_wpm=90).wav
    assert 1.4 < len(slow) / len(wav) < 2.2


def test_voices_of_the_corpus_repeat_themselves():
    say = ('import hashlib, sys\nfrom data_pipelines import espeak\nfor voice in sys.argv[1:]:\n'
           '    wav = espeak.speak("the red key is in the box", voice=voice, rate_wpm=155).wav\n'
           '    print(voice, hashlib.sha256(wav.tobytes()).hexdigest())\n')
    voices = (demo.SYSTEM_VOICE, *demo.VOICES, demo.HELD_OUT_VOICE)
    heard = [subprocess.run([sys.executable, '-c', say, *voices], cwd=ROOT, capture_output=True,
                            text=True, check=True).stdout for _ in range(2)]
    assert heard[0] == heard[1] and len(heard[0].splitlines()) == len(set(voices)) == 9


def test_text_is_spelled_as_it_is_said():
    assert espeak.normalize('Hello, 2 plus 137? Yes') == [
        'hello, two plus one hundred thirty seven?', 'yes.']
    assert espeak.spell(2040) == 'two thousand forty' and espeak.spell(19) == 'nineteen'


@pytest.mark.parametrize('text, voice, what', [
    ('hello', 'xx-none', 'no voice'), ('100 % sure', 'en-us', 'cannot speak'),
    (' . ', 'en-us', 'no words'), ('12345', 'en-us', '0..9999')])
def test_unspeakable(text, voice, what):
    with pytest.raises(ValueError, match=what):
        espeak.speak(text, voice=voice)


# --------------------------------------------------------------------------------------- grammar

def test_vocabulary_is_closed_and_small():
    words = grammar.vocabulary()
    assert 80 <= len(words) <= 110
    said = {w for q in grammar.questions('train') for a in q.answers for w in a.split()}
    assert said <= set(words)
    assert all(5 <= len(' '.join(s.sentences).split()) <= 14 for s in grammar.stories('train'))


def test_held_out_sentences_are_unseen_and_their_subjects_are_not():
    train, test = ({q.text: q for q in grammar.questions(s)} for s in ('train', 'test'))
    assert not set(train) & set(test)
    assert 0.07 < len(test) / (len(train) + len(test)) < 0.13
    known = collections.Counter(q.about for q in train.values())
    assert all(known[q.about] == 3 for q in test.values())
    assert 20 <= len({q.about for q in train.values() if not grammar.is_sum(q)}) <= 30
    first = [{s.sentences[0] for s in grammar.stories(split)} for split in ('train', 'test')]
    assert not first[0] & first[1] and len(first[1]) >= demo.PAIRS


def test_sums_are_right_and_answers_are_checked():
    value = {w: i for i, w in enumerate(grammar.NUMBERS)}
    sums = [q for s in ('train', 'test') for q in grammar.questions(s) if grammar.is_sum(q)]
    assert len({q.about for q in sums}) == 57
    for q in sums:
        a, sign, b = q.about.split()
        assert value[q.want] == value[a] + (value[b] if sign == 'plus' else -value[b])
    for q in (*grammar.questions('train'), *grammar.questions('test')):
        assert all(grammar.check_answer(q.text, a) for a in q.answers)
        wrong = next(w for w in grammar.KINDS[q.kind] if w != q.want)
        for answer in q.answers:
            assert not grammar.check_answer(q.text, f'{answer} {wrong}')
            assert not grammar.check_answer(q.text, wrong)
        assert not grammar.check_answer(q.text, '')
    with pytest.raises(ValueError, match='not a question'):
        grammar.check_answer('what is love', 'red')


def test_wrong_continuations_are_as_well_said_but_false():
    rng = np.random.default_rng(0)
    right = {s.sentences for s in (*grammar.stories('train'), *grammar.stories('test'))}
    for story in grammar.stories('test'):
        wrong = grammar.wrong_continuation(story, rng)
        assert wrong.sentences[0] == story.sentences[0]
        assert wrong.sentences not in right and wrong.point != story.point
        assert len(wrong.sentences[1].split()) == len(story.sentences[1].split())
        assert set(wrong.sentences[1].split()) <= set(grammar.vocabulary())


def test_turn_taking_of_every_kind():
    rng = np.random.default_rng(1)
    asked = grammar.questions('train')
    seen, gaps = collections.Counter(), []
    for _ in range(500):
        lines = grammar.dialogue([asked[i] for i in rng.integers(len(asked), size=3)], rng)
        for i, line in enumerate(lines):
            seen[line.kind] += 1
            seen[line.kind, line.channel] += 1
            if line.anchor >= 0 and line.share is None:
                turned = lines[line.anchor].channel != line.channel
                seen['overlap' if line.after_s < 0 else 'gap'] += turned
            if line.kind == 'answer':
                assert lines[line.anchor].kind == 'question'
                assert grammar.check_answer(lines[line.anchor].text, line.text)
                gaps.append(line.after_s)
            if line.cut_s is not None:
                assert lines[i + 1].kind == 'interruption'
    assert min(gaps) > 0 and 0.25 < np.median(gaps) < 0.35
    for kind in ('greeting', 'question', 'answer', 'interruption', 'closing', 'overlap', 'gap',
                 ('backchannel', grammar.SYSTEM), ('backchannel', grammar.USER)):
        assert seen[kind] >= 25, kind


def test_turn_taking_as_it_sounds():
    spoken, _ = demo.compose(0.2, 3)
    dialogues = [i for i in spoken if i.source == 'dialogue'][:25]
    assert {len(d.manners) for d in dialogues} == {2}
    assert all(d.manners[0].voice != d.manners[1].voice for d in dialogues)
    cut = overlaps = 0
    for item in dialogues:
        wav, words, _, turns = demo.perform(item)
        seconds = wav.shape[1] / 16000
        assert wav.dtype == np.int16 and wav.shape[0] == 2 and 2 < seconds < 40
        for channel in (0, 1):
            mine = [t for t in turns if t.channel == channel]
            assert all(a.end_s <= b.start_s for a, b in zip(mine, mine[1:], strict=False))
            # Outside its turns a channel carries dither only, and never digital silence.
            quiet = np.ones(wav.shape[1], bool)
            for t in mine:
                quiet[int(t.start_s * 16000):int(t.end_s * 16000) + 1] = False
            assert 1 < wav[channel][quiet].std() < 10
            assert ' '.join(t.text for t in mine).split() == [
                w.text for w in words if w.channel == channel]
        for t in turns:
            if grammar.is_question(t.text):
                assert t.channel == grammar.USER
                answer = next(a for a in turns if a.channel == 0 and a.start_s >= t.end_s)
                assert grammar.check_answer(t.text, answer.text)
        overlaps += sum(a.end_s > b.start_s for a, b in zip(turns, turns[1:], strict=False))
        texts = {line.text for line in item.lines}
        for t in turns:
            if t.text not in texts:         # broken off: some whole words, then silence
                assert t.channel == grammar.SYSTEM
                assert any(x.startswith(t.text + ' ') for x in texts)
                breaker = [u for u in turns if u.channel == 1 and t.start_s < u.start_s < t.end_s]
                assert breaker and t.end_s - breaker[0].start_s < 1.0
                cut += 1
    assert cut and overlaps > 5


# ---------------------------------------------------------------------------------------- corpus

def test_words_lie_inside_their_sound(corpus):
    count = 0
    for split in demo.SPLITS:
        for row in rows(corpus, split):
            r = decode(row)
            if r.source in ('text', 'exchange'):
                assert r.codes is None and not r.units and not any(w.end_s for w in r.words)
                continue
            assert all(0 <= x.start_s < x.end_s <= r.duration_s + 1e-3
                       for x in (*r.words, *r.phones, *r.turns))
            channels = 2 if r.source == 'dialogue' else 1
            assert r.codes.shape == (channels, 8, int(np.ceil(r.duration_s * 12.5 - 1e-6)))
            assert [len(u) for u in r.units] == [int(np.ceil(r.duration_s * 25 - 1e-6))] * channels
            for c in range(channels):
                assert ' '.join(t.text for t in r.turns if t.channel == c).split() == [
                    w.text for w in r.words if w.channel == c]
            assert len(r.style) == channels and not r.wav
            # Speech sounds unlike the silence around it, in units and in codes.
            assert len(np.unique(r.units[0])) > 5 and len(np.unique(r.codes[0, 0])) > 5
            count += 1
    assert count > 15


def test_splits_keep_their_promises(corpus):
    told = {split: [decode(r) for r in rows(corpus, split)] for split in demo.SPLITS}
    ids = [r.id for rs in told.values() for r in rs]
    assert len(ids) == len(set(ids))
    text = {split: {t.text for r in rs for t in r.turns} for split, rs in told.items()}
    asked = {split: {t for t in texts if grammar.is_question(t)} for split, texts in text.items()}
    assert asked['test'] and not asked['test'] & asked['train']
    assert asked['test'] <= {q.text for q in grammar.questions('test')}
    spoken = {' '.join(t.text for t in r.turns) for r in told['train'] if r.source == 'story'}
    assert not spoken & {' '.join(t.text for t in r.turns) for r in told['train']
                         if r.source == 'text'}
    assert not spoken & {' '.join(t.text for t in r.turns) for r in told['test']}
    written = [tuple(t.text for t in r.turns) for r in told['train'] if r.source == 'exchange']
    assert len(set(written)) == len(written) == 2 * len(grammar.questions('train'))
    assert all(grammar.check_answer(*turns) for turns in written)
    assert {question for question, _ in written} == {q.text for q in grammar.questions('train')}
    voice = f'voice={demo.HELD_OUT_VOICE} '
    assert not any(s.startswith(voice) for k in ('train', 'test') for r in told[k] for s in r.style)
    assert all(r.style[-1].startswith(voice) for r in told['voice'])


def test_index_and_manifest_describe_the_shards(corpus):
    manifest = json.loads((corpus / 'manifest.json').read_text())
    for part in ('shards', 'files'):
        for path, fact in manifest[part].items():
            assert os.path.getsize(corpus / path) == fact['bytes']
            assert records.sha256(corpus / path) == fact['sha256']
    assert manifest['units']['sha256'] == manifest['files']['units.safetensors']['sha256']
    assert manifest['codes']['sha256'] == manifest['files']['codec.safetensors']['sha256']
    for split, said in manifest['splits'].items():
        with np.load(corpus / f'index-{split}.npz', allow_pickle=False) as f:
            index = dict(f)
        found = [decode(r) for r in rows(corpus, split)]
        assert said['records'] == len(found) == len(index['crc32'])
        for i, r in enumerate(found):
            codes = b'' if r.codes is None else r.codes.tobytes()
            payload = b''.join([r.id.encode(), codes, *(u.tobytes() for u in r.units),
                                '\n'.join(w.text for w in r.words).encode(),
                                np.float32([w.start_s for w in r.words]).tobytes(),
                                np.float32([w.end_s for w in r.words]).tobytes(),
                                *(s.tobytes() for name in sorted(r.sides) for s in r.sides[name])])
            assert index['crc32'][i] == zlib.crc32(payload)
            assert index['words'][i] == len(r.words)
            assert index['units'][i] == sum(map(len, r.units))
            assert manifest['sources'][index['source_id'][i]] == r.source
            assert index['duration_s'][i] == np.float32(r.duration_s)
    assert not os.path.exists(str(corpus) + '.partial') and not (corpus / 'work').exists()


def test_text_model_and_grammar_file(corpus):
    text = vocab.Text(str(corpus / 'text.model'))
    assert [text.piece(i) for i in range(5)] == ['<epad>', '<s>', '</s>', '<pad>', '<unk>']
    words = grammar.vocabulary()
    assert all(len(text.encode(w)) == 1 for w in words)
    assert all(text.decode(text.encode(w)) == w for w in (*words, 'jazz', 'quixotic'))
    assert text.size == demo.TEXT_PIECES
    about = json.loads((corpus / 'grammar.json').read_text())
    assert about['vocabulary'] == list(words) and len(about['pairs']) == demo.PAIRS
    assert {q['text'] for q in about['questions']['test']} == {
        q.text for q in grammar.questions('test')}
    assert not set(about['transcripts']['test']) & {
        ' '.join(s.sentences) for s in grammar.stories('train')}


def test_a_killed_run_goes_on_and_gives_the_same_corpus(corpus, tmp_path):
    out = tmp_path / 'again'
    work = tmp_path / 'again.partial' / 'work'
    first = subprocess.Popen(command(out, '--jobs', '1'), cwd=ROOT, start_new_session=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (work / 'spoken-00000').exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert (work / 'spoken-00000').exists() and not out.exists()
    while time.monotonic() < deadline:          # workers must not outlive the run
        try:
            os.killpg(first.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        os.killpg(first.pid, signal.SIGKILL)
        pytest.fail('workers outlived the run that was killed')

    other = run(out, '--seed', '1')
    assert other.returncode == 1 and 'other arguments' in other.stderr
    assert 'Traceback' not in other.stderr
    again = run(out, '--jobs', '1')
    assert again.returncode == 0, again.stderr
    assert (out / 'manifest.json').read_bytes() == (corpus / 'manifest.json').read_bytes()

    finished = run(out)
    assert finished.returncode == 1 and 'already holds a finished dataset' in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1


def test_a_spoken_shard_is_kept_unless_it_is_damaged(tmp_path):
    items = demo.compose(0.01, 0)[0][:2]
    path = str(tmp_path / 'spoken')
    seconds = demo._each('speak', 1, [(demo._speak_shard, (path, items))], fresh=True)
    whole = open(path, 'rb').read()
    before = os.stat(path).st_mtime_ns
    assert demo._speak_shard(path, items) == seconds[0]
    assert os.stat(path).st_mtime_ns == before
    with open(path, 'r+b') as f:
        f.seek(len(whole) // 2)
        f.write(bytes([whole[len(whole) // 2] ^ 1]))
    assert demo._fetch(path) is None
    demo._each('speak', 1, [(demo._speak_shard, (path, items))], fresh=True)
    assert open(path, 'rb').read() == whole


def test_kept_audio_is_the_audio_that_was_encoded(corpus, tmp_path):
    import soundfile
    items = demo.compose(0.01, 0)[0]
    items = [items[0], next(i for i in items if i.source == 'dialogue')]
    spoken, tokens = str(tmp_path / 'spoken'), str(tmp_path / 'tokens')
    demo._speak_shard(spoken, items)
    paths = str(corpus / 'units.safetensors'), str(corpus / 'codec.safetensors')
    demo._encode_shard(spoken, tokens, *paths, True)
    made = demo._records('train', [items], [spoken], [tokens], [], lambda: None)
    units, codes = demo._tokenizers(*paths)
    for record, item in zip(made, items, strict=True):
        wav, rate_hz = soundfile.read(io.BytesIO(record.wav), always_2d=True, dtype='float32')
        assert rate_hz == 16000 and len(wav) == round(record.duration_s * 16000)
        assert wav.shape[1] == len(item.manners) == len(record.units)
        for c in range(wav.shape[1]):
            np.testing.assert_array_equal(units.encode(wav[:, c])[0], record.units[c])
            np.testing.assert_array_equal(codes.encode(wav[:, c]), record.codes[c])


def test_nothing_is_made_where_something_else_lies(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    done = run(tmp_path)
    assert done.returncode == 1 and 'no pipeline made' in done.stderr
    assert os.listdir(tmp_path) == ['notes.txt']
    for flags, what in ((['--hours', '-1'], '--hours'), (['--jobs', '0'], '--jobs'),
                        (['--nope'], 'unrecognized')):
        done = run(tmp_path / 'x', *flags)
        assert done.returncode == 2 and what in done.stderr and 'Traceback' not in done.stderr


def test_a_full_disk_is_one_line_and_no_dataset(file_limit, tmp_path):
    with file_limit(200_000):
        done = run(tmp_path / 'x', '--jobs', '1')
    assert done.returncode == 1
    assert done.stderr.endswith(f'demo: {tmp_path}/x cannot be written: File too large\n')
    assert 'Traceback' not in done.stderr and not (tmp_path / 'x').exists()


# --------------------------------------------------------------------------------------- records

def some_records():
    rng = np.random.default_rng(0)
    for i in range(20):
        channels, seconds = int(rng.integers(1, 3)), float(np.float32(rng.uniform(1, 9)))
        starts = np.sort(rng.uniform(0, seconds - 0.5, 5)).astype(np.float32)
        ends = starts + np.float32(0.25)
        words = tuple(Word(f'w{j}', int(rng.integers(channels)), float(a), float(b))
                      for j, (a, b) in enumerate(zip(starts, ends, strict=True)))
        yield Record(
            f'id-{i}', f'source {i % 3}', 'en', seconds,
            rng.integers(0, 2048, (channels, 8, int(seconds * 12.5))).astype(np.int16),
            tuple(rng.integers(0, 500, int(seconds * 25) + c).astype(np.int16)
                  for c in range(channels)),
            words, words[:2], tuple(Turn(w.channel, w.start_s, w.end_s, 'é è') for w in words[:3]),
            ('calm',) * channels, rng.bytes(30),
            {name: tuple(rng.integers(0, 64, int(seconds * hz) + c).astype(np.int16)
                         for c in range(channels)) for name, hz in (('pitch', 12.5), ('style', 1))},
            {'task': (Phrase('é is asked'), Phrase('asked')), 'answer': (Phrase('yes'),)})
    yield Record('text', 'text', 'en', 0.0, words=(Word('only', 0, 0.0, 0.0),))
    yield Record('units', 'u', 'de', 2.0, units=(np.arange(50, dtype=np.int16),))


def write(out, splits):
    return records.write(str(out), splits, units=None, codes=None, aligner={}, license='CC0-1.0',
                         command='test', sample_rate_hz=16000)


def test_records_come_back_as_they_were(tmp_path):
    made = {r.id: r for r in some_records()}
    measured = write(tmp_path / 'd', {'train': some_records(), 'test': []})
    assert measured['records'] == len(made) == 22
    assert list(measured['manifest']['splits']) == ['train']
    for row in rows(tmp_path / 'd', 'train'):
        found, true = decode(row), made[row['id'].decode()]
        np.testing.assert_equal(found.__dict__, true.__dict__)
        assert row['crc32'] == records.crc32(true)


def test_what_memory_does_not_hold_is_sorted_through_files(tmp_path, monkeypatch):
    """A split of over a gigabyte, here of over a byte: the same shards; the limit of open files is
    what it was."""
    from tensorflow_datasets.core import shuffle
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    shards = []
    for name in ('memory', 'files'):
        write(tmp_path / name, {'train': some_records()})
        shards.append([(p.name, p.read_bytes())
                       for p in sorted((tmp_path / name / 'speech').glob('*.array_record*'))])
        monkeypatch.setattr(shuffle, 'MAX_MEM_BUFFER_SIZE', 1)
    assert shards[0] == shards[1] and shards[0]
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


@pytest.mark.parametrize('change, what', [
    (dict(id=''), 'id'), (dict(codes=np.zeros((8, 3), np.int16)), 'codes'),
    (dict(codes=np.full((1, 8, 3), -1)), '0..32767'), (dict(units=(np.array([40000]),)), 'units'),
    (dict(words=(Word('a', 0, 0.5, 3.5),)), 'outside'),
    (dict(words=(Word('a', 1, 0, 1),)), 'channel'),
    (dict(words=(Word('a', 0, 1, 1.5), Word('b', 0, .5, .8))), 'sorted'),
    (dict(words=(Word('a\nb', 0, 1, 1.5),)), 'line break'),
    (dict(fields={'task': (Phrase('a\nb'),)}), "field 'task' is empty or has a line break"),
    (dict(fields={'task': (Phrase(''),)}), "field 'task' is empty"),
    (dict(sides={'pitch': (np.array([-1]),)}), 'pitch must lie in 0..32767'),
    (dict(codes=None, words=(Word('a', 0, 1, 1.5),)), 'text-only')])
def test_a_bad_record_is_refused_by_name(tmp_path, change, what):
    good = dict(id='r7', source='s', language='en', duration_s=2.0,
                codes=np.zeros((1, 8, 25), np.int16))
    with pytest.raises(ValueError, match=what):
        write(tmp_path / 'd', {'train': [Record(**good), Record(**good | change)]})
    assert not (tmp_path / 'd').exists()

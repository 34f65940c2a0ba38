# SPDX-License-Identifier: Apache-2.0
"""Are simulated dialogues what was asked for, and does what is heard give their labels back?"""

import collections
import contextlib
import io
import itertools
import json

import numpy as np
import pytest
import soundfile
from scipy import stats

from data_pipelines import records, simulate
from jaxsd import dataset, dialogue, turns
from jaxsd import vocab as vocabs
from jaxsd.layout import duplex
from jaxsd.types import Record, Turn, Word

HZ = 12.5
MANNERS = simulate.Manners()


def plans(count, manners=MANNERS, longs=(30, 60), shorts=(4, 9), each=8):
    for i in range(count):
        rng = np.random.default_rng((7, i))
        every = [[[np.ones(n, bool) for n in rng.integers(*of, count)] for _ in range(2)]
                 for of, count in ((longs, 20), (shorts, 5))]
        yield simulate.plan(*every, count=each, frame_hz=HZ, manners=manners, rng=rng)


def active(placed):
    out = np.zeros((2, max(p.end for p in placed) + 3), bool)
    for p in placed:
        assert not out[p.channel, p.start:p.end].any()      # nobody talks over himself
        out[p.channel, p.start:p.end] = True
    return out


def test_every_kind_is_found_again():
    """The labels of the plan are what `turns` makes of the activity, turn by turn, exactly."""
    seen = set()
    for placed in plans(200):
        found = turns.kinds(active(placed), HZ)
        wanted = [(p.kind, p.channel, p.start) for p in placed if p.kind != 'pause']
        assert [(kind, t.channel, t.start) for kind, t in found] == wanted
        ends = {(p.channel, p.end) for p in placed}
        assert all((t.channel, t.end) in ends for _, t in found)
        pauses = sum(p.kind == 'pause' for p in placed)
        assert turns.tally(active(placed), HZ).events['pause'] == pauses
        seen |= {kind for kind, _ in found}
    assert seen == {'opening', 'smooth', 'interruption', 'backchannel'}


def test_what_is_judged_are_the_labels():
    """Of either speaker: so many interruptions, murmurs and pauses of the other, and no more."""
    found, wanted = collections.Counter(), collections.Counter()
    for placed in plans(100):
        wanted.update(p.kind for p in placed)
        heard = np.pad(active(placed), ((0, 0), (0, 13)))       # somebody could answer the last
        for me in (0, 1):
            turn = tuple(Turn(p.channel ^ me, p.start / HZ, p.end / HZ, p.kind) for p in placed)
            theirs = dialogue._turns(Record('r', 'toy', 'en', heard.shape[1] / HZ, turns=turn), 1)
            found.update(c.kind for c in turns.coped(
                heard[[me, 1 - me]], [(t[0].start_s, t[-1].end_s) for t in theirs], HZ,
                murmurs=[t[0].text == 'backchannel' for t in theirs]))
    assert min(wanted.values()) > 50
    assert found == dict(interruption=wanted['interruption'], murmur=wanted['backchannel'],
                         pause=wanted['pause'], turn=wanted['opening'] + wanted['smooth'])


@pytest.mark.parametrize('acoustic', (0, 2))
def test_token_grids_give_the_labels_back(acoustic):
    """Through the grid that a model reads, rows delayed and shifted onto the line: which ids mean
    silence is learned from some dialogues, and the others give every label back, exactly."""
    v = vocabs.streams(dict(codebooks=2, size=64), text_tokens=8)
    late = duplex.delays(v, acoustic_delay_columns=acoustic, text_delay_columns=0)
    drawn = []
    for i, placed in enumerate(plans(60)):
        speech, rng = active(placed), np.random.default_rng(i)
        ids = np.where(speech, rng.integers(9, 64, speech.shape), rng.integers(0, 9, speech.shape))
        codes = np.stack([ids, rng.integers(0, 64, ids.shape)], 1).astype(np.int16)
        grid = duplex.columns(Record(str(i), 'toy', 'en', ids.shape[1] / HZ, codes=codes),
                              vocab=v, rng=rng, acoustic_delay_columns=acoustic)
        rows = duplex.undelay(grid.tokens, late)[:, :ids.shape[1]]
        back = np.stack([rows[k] - v.rows[k].start for k, row in enumerate(v.rows)
                         if row.name in ('mine 0', 'theirs 0')])
        drawn.append((placed, speech, back))
    silent = turns.silent_codes([x for *_, ids in drawn[:20] for x in ids],
                                [x for _, speech, _ in drawn[:20] for x in speech])
    for placed, _, ids in drawn[20:]:
        assert [(kind, t.channel, t.start) for kind, t in turns.kinds(
            turns.voiced(ids, silent), HZ)] == [
                (p.kind, p.channel, p.start) for p in placed if p.kind != 'pause']


def test_gaps_and_overlaps_are_of_the_distribution_that_was_asked_for():
    """Long utterances, so that half of one is no bound: floor transfers measured from activity
    against the normal law (moments are of whole frames: spread evenly over theirs)."""
    rng = np.random.default_rng(0)
    for mean, deviation in ((0.2, 0.35), (0.5, 0.2)):
        manners = simulate.Manners(fto_s=(mean, deviation), interruption=0.0, backchannel=0.0)
        measured = [s for placed in plans(300, manners, longs=(80, 120), shorts=(4, 5))
                    for _, s in turns.transfers(active(placed), HZ)]
        spread = np.array(measured) + rng.uniform(-0.5, 0.5, len(measured)) / HZ
        assert stats.kstest(spread, stats.norm(mean, deviation).cdf).pvalue > 0.01
        assert stats.kstest(spread, stats.norm(mean + 0.1, deviation).cdf).pvalue < 1e-6


def test_a_begin_that_cannot_be_is_as_early_as_may_be():
    """Half a second before the other's end, of turns that are shorter than a second; it ends."""
    manners = MANNERS._replace(fto_s=(-0.5, 0.0), interruption=0.0, pause=0.0, backchannel=0.0)
    for placed in plans(20, manners, longs=(5, 9)):
        for one, two in zip(placed, placed[1:], strict=False):
            least = min(one.end - one.start, two.end - two.start) // 2
            assert -least <= two.fto == two.start - one.end


def test_how_often_each_happens():
    every = [p for placed in plans(2000) for p in placed]
    turn = [p for p in every if p.kind in ('opening', 'smooth', 'interruption')]
    assert sum(p.kind == 'pause' for p in every) / len(turn) == pytest.approx(0.15, abs=0.02)
    murmured = sum(p.kind == 'backchannel' for p in every)
    assert murmured / (len(turn) + sum(p.kind == 'pause' for p in every)) == pytest.approx(
        0.2, abs=0.03)
    still = simulate.Manners(interruption=0.0, pause=0.0, backchannel=0.0, fto_s=(0.5, 0.0))
    assert {p.kind for placed in plans(20, still) for p in placed} == {'opening', 'smooth'}


@pytest.mark.parametrize('asked', (0.1, 0.5, 1.0))
def test_how_many_of_those_that_can_be_are_broken_into(asked):
    """The last turn cannot be, nor one that breaks in."""
    able = []
    for placed in plans(1000, simulate.Manners(interruption=asked, pause=0.0, backchannel=0.0)):
        able += [(after.fto is None) for before, after in itertools.pairwise(placed)
                 if before.kind != 'interruption']
    assert np.mean(able) == pytest.approx(asked, abs=0.03)


@pytest.fixture(scope='module')
def made(corpus, tmp_path_factory):
    out, said = tmp_path_factory.mktemp('simulated') / 'talk', io.StringIO()
    with contextlib.redirect_stdout(said):
        assert simulate.main(['--source', str(corpus), '--out', str(out), '--hours', '0.03',
                              '--seed', '5', '--mine', 'voice=en-us']) == 0
    manifest = json.loads((out / 'manifest.json').read_text())
    hours = sum(s['hours_by_source'].get('simulated', 0) for s in manifest['splits'].values())
    with open(out / 'labels.jsonl') as f:
        labels = f.read().splitlines()
    source = json.loads((corpus / 'manifest.json').read_text())
    assert hours > 0 and labels and said.getvalue().startswith(
        f'{out}: {len(labels)} simulated dialogues, {hours:.3f} h, and the '
        f'{sum(s["records"] for s in source["splits"].values())} records of the source\n')
    assert said.getvalue().endswith(records.overrides(str(out), manifest, ['simulated']) + '\n')
    assert said.getvalue().endswith('"--config.data.sources.SOURCE.select=(\'simulated\',)"\n')
    return out


def opened(folder):
    options = dict(name='rvq', path=str(folder / 'codec.safetensors'), frame_hz=12.5, codebooks=8,
                   size=256)
    return dataset.open_dataset(str(folder), options)


def simulated(folder):
    """(record, its placed utterances) of every simulated dialogue."""
    data = opened(folder)
    labels = {x['id']: x['placed'] for x in map(json.loads, (
        folder / 'labels.jsonl').read_text().splitlines())}
    for split in ('train', 'test'):
        for i in data.select(split, ('simulated',), ''):
            record = data.record(split, int(i))
            yield record, labels.pop(record.id)


def test_a_dataset_gets_dialogues(corpus, made):
    """Everything that was there, and about as many hours more; turns and words are the labels'."""
    before, after = opened(corpus), opened(made)
    for kind in ('dialogue', 'story'):
        assert len(before.select('train', (kind,), '')) == len(after.select('train', (kind,), ''))
    hours, texts = 0.0, set()
    for i in before.select('test', ('dialogue', 'story'), ''):
        texts |= {t.text for t in before.record('test', int(i)).turns}
    for record, placed in simulated(made):
        hours += record.duration_s / 3600
        assert [(t.channel, round(t.start_s * HZ), t.end_s) for t in record.turns] == [
            (p['channel'], p['start'], pytest.approx(p['end'] / HZ)) for p in placed]
        for w in record.words:
            assert any(t.channel == w.channel and t.start_s - 1e-3 <= w.start_s
                       and w.end_s <= t.end_s + 1e-3 for t in record.turns)
        if record.id.startswith('test'):        # only cut turns say less than they did
            assert all(any(full.startswith(p['text']) for full in texts) for p in placed)
    assert 0.02 < hours < 0.05


def test_what_is_heard_gives_the_labels_back(made):
    """From the sound exactly, and nearly so from the real codec's codes: what kind every turn is,
    that every utterance begins and ends on its label. Of the codes (which differ from one kind of
    CPU to another: a soft consonant may be coded as silence, silence before a sudden one as sound)
    a turn in fifty may be of another kind, and as few ends elsewhere."""
    silent = turns.silent_codes(*zip(*(
        (r.codes[c, 0], turns.during([(t.start_s, t.end_s) for t in r.turns if t.channel == c],
                                     r.codes.shape[2], HZ))
        for r, _ in simulated(made) for c in (0, 1)), strict=True))
    off, told, odd = {'sound': [], 'codes': []}, 0, 0
    for record, placed in simulated(made):
        wav = soundfile.read(io.BytesIO(record.wav), dtype='float32')[0].T
        label = active([simulate.Placed(p['channel'], 0, p['start'], p['end'], '') for p in placed]
                       )[:, :record.codes.shape[2]]
        label = np.pad(label, ((0, 0), (0, record.codes.shape[2] - label.shape[1])))
        turn = [(p['kind'], p['channel']) for p in placed if p['kind'] != 'pause']
        for by, heard in (('sound', np.stack([turns.loud(x, 16000, HZ) for x in wav])),
                          ('codes', turns.voiced(record.codes[:, 0], silent))):
            kinds = [(k, t.channel) for k, t in turns.kinds(heard, HZ)]
            if by == 'sound':
                assert kinds == turn
            else:
                told += len(turn)
                odd += (collections.Counter(turn) - collections.Counter(kinds)).total()
            ours, theirs = turns.units(heard, HZ), turns.units(label, HZ)
            assert by == 'codes' or len(ours) == len(theirs)
            for u in theirs:
                off[by] += [min(abs(getattr(x, end) - getattr(u, end)) for x in ours
                                if x.channel == u.channel) for end in ('start', 'end')]
    assert told > 50 and odd <= told / 50
    assert max(off['sound']) <= 1 and np.mean(off['sound']) < 0.01
    assert np.mean(np.array(off['codes']) > 1) < 0.02 and np.mean(np.array(off['codes']) > 0) < 0.05


def test_an_utterance_fills_the_frames_at_its_ends():
    """Hand-made: 1.0 s of tone whose last 30 ms are 30 dB under it, a silence of 0.3 s, 0.29 s of
    tone with a closure of 60 ms and a burst of 10 ms; then a breath, no word. Frames of 80 ms."""
    def tone(seconds, level=0.3):
        return level * np.sin(2 * np.pi * 400 * np.arange(round(seconds * 16000)) / 16000)
    quiet = np.zeros(800)
    wav = np.concatenate([quiet, tone(0.97), tone(0.03, 0.3 / 32), np.zeros(4800), tone(0.29),
                          np.zeros(960), tone(0.01), np.zeros(4800),
                          tone(0.2, 0.1), quiet])
    flac = io.BytesIO()
    soundfile.write(flac, wav, 16000, format='FLAC')
    long_s = len(wav) / 16000
    words = (Word('one', 0, 0.05, 0.6), Word('two', 0, 0.7, 1.05), Word('three', 0, 1.34, 1.7))
    record = Record('r', 'toy', 'en', long_s, words=words, turns=(Turn(0, 0, long_s, 'all'),),
                    wav=flac.getvalue())
    (voice, first), (_, second) = simulate.utterances(record, HZ)
    assert voice == 'r 0' and (first.text, second.text) == ('one two', 'three')
    # 0.97 s is 12.1 frames: in 13, half of what is spare before it. The quiet end is not there.
    assert first.filled.tolist() == [True] * 13 and len(first.wav) == 13 * 1280
    heard = np.flatnonzero(first.wav)
    assert heard[0] == pytest.approx(560, abs=4) and heard[-1] == pytest.approx(560 + 15520, abs=20)
    assert [(w.text, round(w.start_s, 3), round(w.end_s, 3)) for w in first.words] == [
        ('one', 0.035, 0.585), ('two', 0.685, 1.035)]
    # 0.36 s in 5 frames; the last holds the burst alone, and less than half of it is heard.
    assert second.filled.tolist() == [True] * 4 and len(second.wav) == 4 * 1280
    assert abs(int(second.wav[-1])) < 20 < np.abs(second.wav[-400:-200]).max()


def test_who_is_broken_into_stops_where_something_is_heard():
    """Every third frame is filled alone."""
    thirds = [[np.arange(n) % 3 == 2 for n in (30, 45, 60)]] * 2
    stopped = 0
    for i in range(50):
        placed = simulate.plan(thirds, [[], []], count=6, frame_hz=HZ, rng=np.random.default_rng(i),
                               manners=MANNERS._replace(interruption=1.0))
        for p in placed:
            assert (p.end - p.start) % 3 == 0
            stopped += p.end - p.start < (30, 45, 60)[p.index]
    assert stopped > 50


def test_the_same_arguments_give_the_same_bytes(corpus, made, tmp_path):
    assert simulate.main(['--source', str(corpus), '--out', str(tmp_path / 'b'), '--hours', '0.03',
                          '--seed', '5', '--mine', 'voice=en-us']) == 0
    files = [json.loads((f / 'manifest.json').read_text()) for f in (made, tmp_path / 'b')]
    assert files[0]['shards'] == files[1]['shards'] and files[0]['files'] == files[1]['files']


def test_the_user_can_be_heard_worse(corpus, tmp_path):
    """Noise and echo change the other's channel alone, and no label."""
    twice = []
    for worse in ((), ('--worse',)):
        out = tmp_path / f'worse{len(worse)}'
        assert simulate.main(['--source', str(corpus), '--out', str(out), '--hours', '0.01',
                              *worse]) == 0
        twice.append(list(simulated(out)))
    changed = 0
    for (a, first), (b, second) in zip(*twice, strict=True):
        assert first == second and a.words == b.words
        np.testing.assert_array_equal(a.codes[0], b.codes[0])
        changed += not np.array_equal(a.codes[1], b.codes[1])
    assert changed


@pytest.mark.parametrize(('arguments', 'said'), [
    (('--hours', '0'), '--hours is above 0'), (('--hours', '1', '--pause', '2'), '--pause is a'),
    (('--hours', '1', '--noise', 'x'), '--noise is heard with --worse alone'),
    (('--hours', '1'), 'no dataset at ')])
def test_what_is_wrong_is_said(tmp_path, capsys, arguments, said):
    assert simulate.main(['--source', str(tmp_path), '--out', str(tmp_path / 'x'), *arguments]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / 'x').exists()


def test_a_voice_that_is_not_there_is_said(corpus, tmp_path, capsys):
    assert simulate.main(['--source', str(corpus), '--out', str(tmp_path / 'x'), '--hours', '0.01',
                          '--mine', 'nobody']) == 1
    said = capsys.readouterr().err
    assert '--mine nobody: split train has no' in said and 'voice=en-us' in said
    assert not (tmp_path / 'x').exists()

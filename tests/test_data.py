# SPDX-License-Identifier: Apache-2.0
"""Does the order law hold, is every record seen, is nothing cropped in silence, is damage named?"""

import collections
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile

import bench_loader
import ml_collections as mlc
import numpy as np
import pytest

from data_pipelines import records
from jaxsd import data, packing, vocab
from jaxsd import dataset as dataset_lib
from jaxsd.config import ConfigError
from jaxsd.dataset import open_dataset
from jaxsd.types import NOTHING, Grid, Phrase, Record, Turn, Word

COLUMNS, SIZE, HZ = 256, 64, 25.0
CODEC = dict(name='kmeans', frame_hz=HZ, codebooks=1, size=SIZE, path='')
IDENTITY = dict(name='kmeans', frame_hz=HZ, codebooks=1, size=SIZE, sample_rate_hz=16000,
                sha256='0' * 64)
RVQ = dict(IDENTITY, name='rvq', frame_hz=12.5, codebooks=2)
SYLLABLES = ('ba', 'ko', 'tu', 'li', 'fem', 'dor', 'as', 'wi')


def speech(rng, name, source, *, channels=1, seconds=(1.0, 8.0)):
    """A record of random words on random units: its lengths are as uneven as real ones."""
    duration_s = float(np.float32(rng.uniform(*seconds)))
    count = max(1, int(duration_s * rng.uniform(1.5, 3.0)))
    borders = np.sort(rng.uniform(0, duration_s, count + 1)).astype(np.float32)
    words = tuple(Word(''.join(rng.choice(SYLLABLES, 2)), int(rng.integers(channels)), float(a),
                       float(b)) for a, b in zip(borders[:-1], borders[1:], strict=True))
    frames = int(np.ceil(duration_s * HZ))
    units = tuple(np.repeat(rng.integers(0, SIZE, frames), rng.integers(1, 4, frames))[:frames]
                  .astype(np.int16) for _ in range(channels))
    codes = rng.integers(0, SIZE, (channels, 2, int(np.ceil(duration_s * 12.5)))).astype(np.int16)
    return Record(name, source, 'en', duration_s, codes, units, words, words[:1],
                  (Turn(0, 0.0, duration_s, 'all of it'),), ('tone=calm', 'tone=low')[:channels],
                  b'', {'pitch': tuple(u[::2] for u in units)}, {'note': (Phrase(name),)})


def all_records():
    rng = np.random.default_rng(7)
    train = [speech(rng, f's{i}', 'story') for i in range(230)]
    train += [speech(rng, f't{i}', 'talk', channels=2, seconds=(3.0, 9.0)) for i in range(90)]
    train += [Record(f'x{i}', 'text', 'en', 0.0, words=tuple(
        Word(''.join(rng.choice(SYLLABLES, 2)), 0, 0.0, 0.0) for _ in range(rng.integers(3, 60))))
        for i in range(60)]
    return {'train': train, 'test': [speech(rng, f'v{i}', 'story') for i in range(37)]}


@pytest.fixture(scope='session')
def root(tmp_path_factory):
    """A small dataset of three sources, with its tokenizer."""
    import sentencepiece
    path = str(tmp_path_factory.mktemp('data') / 'set')
    staging = records.begin(path, {})
    splits = all_records()
    with open(os.path.join(staging, 'text.model'), 'wb') as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([' '.join(w.text for r in splits['train'] for w in r.words)
                                    [:4000]]),
            model_writer=f, vocab_size=60, model_type='bpe', minloglevel=2, pad_id=3, unk_id=4)
    records.write(path, splits, units=IDENTITY, codes=RVQ, aligner={'name': 'none'}, license='CC0',
                  command='test', sample_rate_hz=16000)
    return path


@pytest.fixture
def damaged(root, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(root, tmp_path / 'copy')


def numbered(record, *, vocab, rng, stretch: float = 8.0):
    """A layout whose every cell says which record it is from; nothing is random but the weights."""
    width = 1 + int(record.duration_s * stretch)
    number = {'s': 0, 't': 1000, 'x': 2000, 'v': 3000}[record.id[0]] + int(record.id[1:])
    return Grid.of(np.full(width, number), 1 + rng.random(width))


def make(root, **changes):
    """(config, stage, vocabulary) with three sources; `changes` by name, the stage's by stage_*."""
    sequence = dict(name='flat.sequence', fields=('text', 'speech'))
    c = mlc.ConfigDict(dict(
        seed=3, codec=CODEC, columns=COLUMNS, layout=dict(name='flat.interleave', text_words=(3, 8),
                                                          speech_words=(2, 5), unit_hz=HZ),
        data=dict(path=str(root), sources=dict(
            mixed=dict(select=('story', 'talk')),
            pairs=dict(select=('story',), layout=sequence),
            text=dict(select=('text',), layout=dict(name='flat.sequence', fields=('text',)))))))
    stage = dict(name='pretrain', batch=8, data=dict(mixed=.5, pairs=.3, text=.2))
    for key, value in changes.items():
        if key.startswith('stage_'):
            stage[key[len('stage_'):]] = value
        else:
            c[key] = value
    tokenizer = os.path.join(root, 'text.model')
    v = vocab.line(c.codec, text_tokens=vocab.Text(tokenizer).size, tokenizer=tokenizer, multiple=1)
    return c, stage, v


def take(count, setup, **options):
    it = data.batches(*setup, **options)
    out = [next(it) for _ in range(count)]
    it.close()
    return out


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


# ------------------------------------------------------------------------------- the order law

@pytest.fixture(scope='session')
def straight(root):
    return take(20, make(root), threads=0)


@pytest.mark.parametrize('count', (1, 2, 4, 8))
def test_any_process_count_gives_the_same_batches(root, straight, count):
    parts = [take(20, make(root), process_index=i, process_count=count) for i in range(count)]
    for step, (whole, account) in enumerate(straight):
        same(whole, {k: np.concatenate([p[step][0][k] for p in parts]) for k in whole})
        for name, used in account.items():
            for key, value in used.items():
                got = sum(p[step][1].get(name, {}).get(key, 0) for p in parts)
                assert got == pytest.approx(value)


@pytest.mark.parametrize('start', (1, 7, 17))
def test_resuming_anywhere_goes_on_with_the_same_batches(root, straight, start):
    it = data.batches(*make(root), threads=1)
    for _ in range(start):
        next(it)
    state = json.loads(json.dumps(it.state()))
    it.close()
    begin = data.resume(state, data.fingerprint(*make(root)))
    assert begin == start
    for (a, _), (b, _) in zip(take(20 - start, make(root), start_step=begin), straight[start:],
                              strict=True):
        same(a, b)


@pytest.mark.parametrize('threads', (1, 3))
def test_threads_change_nothing(root, straight, threads):
    for (a, x), (b, y) in zip(take(20, make(root), threads=threads), straight, strict=True):
        same(a, b)
        assert x == y


def test_a_far_step_costs_no_replay(root):
    began = time.perf_counter()
    far = take(1, make(root), start_step=10 ** 9)
    opened_s = time.perf_counter() - began
    same(far[0][0], take(2, make(root), start_step=10 ** 9 - 1)[1][0])
    assert opened_s < 20


def test_an_epoch_is_every_record_once_and_the_next_one_is_another(root):
    setup = only(root, 'numbers', dict(select=('story', 'talk'), layout=dict(NUMBERED)))
    seen = rows_of_epochs(setup, 2)
    for epoch in seen:
        numbers = collections.Counter(int(t[0]) for row in epoch for t in segments(row))
        assert numbers == collections.Counter([*range(230), *range(1000, 1090)])
    assert not all((a['tokens'] == b['tokens']).all() for a, b in zip(*seen, strict=True))


def test_layouts_are_drawn_anew_in_every_epoch(root):
    first, second = rows_of_epochs(only(root, 'numbers', dict(select=('story',),
                                                              layout=dict(NUMBERED))), 2)
    weights = [{int(row['tokens'][0, i]): float(row['weights'][0, i])
                for row in epoch for i in np.flatnonzero(row['position'] == 1)}
               for epoch in (first, second)]
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) == 230
    assert all(weights[0][k] != weights[1][k] for k in weights[0])


def test_mixture_is_a_share_of_columns(root):
    setup = make(root, stage_batch=32)
    used = total(take(60, setup, threads=0))
    columns = sum(u['columns'] for u in used.values())
    shares = {name: u['columns'] / columns for name, u in used.items()}
    print('share of columns, asked and got:',
          {k: (w, round(shares[k], 4)) for k, w in setup[1]['data'].items()})
    assert shares == pytest.approx(setup[1]['data'], abs=0.01)


@pytest.mark.parametrize('weights', ((1,), (1, 1), (500_000, 300_000, 200_000), (7, 1, 3, 90)))
def test_turns_agree_with_grain(weights):
    """grain interleaves by the same idea; it was written by others."""
    import grain
    sources = [grain.MapDataset.range(10 ** 6).map(lambda n, i=i: (i, n))
               for i in range(len(weights))]
    mixed = grain.MapDataset.mix(sources, weights)
    for row in (*range(2000), 99_991):
        assert packing.pick(row, weights) == mixed[row]


# ------------------------------------------------------------------------------------- packing

NUMBERED = dict(name='test_data:numbered')


def only(root, name, source, **changes):
    """A setup with one source alone."""
    c, stage, v = make(root, stage_data={name: 1.0}, **changes)
    c.data = dict(path=str(root), sources={name: source})
    return c, stage, v


def rows_of_epochs(setup, count):
    """The rows of the first epochs of a setup with one source."""
    rows = opened(setup)
    size = rows.plan.groups * rows.plan.rows
    return [[rows[e * size + i][0] for i in range(size)] for e in range(count)]


def opened(setup):
    config, stage, v = setup
    (name,) = stage['data']
    source = data._open_source(open_dataset(config.data.path), config, name, v, split='train',
                               layout=None, fill=data._tokenizer(v), extras={})
    return data._Rows(source, (config.seed, stage['name'], 'train'))


def segments(row):
    return [row['tokens'][0, row['segment'] == n] for n in range(1, row['segment'].max() + 1)]


def total(taken):
    out = {}
    for _, account in taken:
        for name, used in account.items():
            for key, value in used.items():
                out.setdefault(name, collections.Counter())[key] += value
    return out


def test_rows_keep_grids_apart(root):
    for arrays, _ in take(6, make(root)):
        for tokens, weights, position, segment in zip(
                *(arrays[k] for k in ('tokens', 'weights', 'position', 'segment')), strict=True):
            ends = np.count_nonzero(segment)
            assert (segment[:ends] > 0).all() and (np.diff(segment[:ends]) >= 0).all()
            for n in range(1, segment.max() + 1):
                inside = segment == n
                np.testing.assert_array_equal(position[inside], np.arange(inside.sum()))
                assert weights[0, inside][0] == 0       # nothing before it, so never scored
            assert (tokens[:, ends:] == NOTHING).all() and not weights[:, ends:].any()
            assert not position[ends:].any()


def test_rows_hold_the_grids_as_drawn(root):
    c, stage, v = setup = only(root, 'pairs', dict(select=('story',), layout=dict(
        name='flat.sequence', fields=('text', 'speech'))))
    words = vocab.Text(v.tokenizer)
    got = collections.Counter(tuple(t.tolist()) for row in rows_of_epochs(setup, 1)[0]
                              for t in segments(row))
    wanted = collections.Counter()
    for record in all_records()['train'][:230]:     # drawn by hand, from what was never stored
        units = [u for i, u in enumerate(record.units[0]) if i == 0 or u != record.units[0][i - 1]]
        wanted[(1, v.specials['[Text]'], *(i for w in record.words for i in words.encode(w.text)),
                v.specials['[Speech]'], *(v.ranges['units'][0] + int(u) for u in units))] += 1
    assert got == wanted


@pytest.mark.parametrize('columns', (40, 64, 256))
def test_every_column_is_kept_or_counted_as_cropped(root, columns, caplog):
    setup = only(root, 'numbers', dict(select=('story', 'talk'), layout=dict(NUMBERED)),
                 columns=columns)
    rows = opened(setup)
    accounts = [rows[i][1] for i in range(rows.plan.groups * rows.plan.rows)]
    widths = [1 + int(r.duration_s * 8) for r in all_records()['train'] if r.id[0] in 'st']
    kept, cropped = (sum(a[k] for a in accounts) for k in ('columns', 'cropped_columns'))
    assert kept + cropped == sum(widths)
    assert sum(a['records'] for a in accounts) == len(widths)
    unavoidable = sum(max(0, w - columns) for w in widths)
    assert unavoidable <= cropped <= unavoidable + 0.005 * sum(widths)
    assert ('cropped' in caplog.text) == (unavoidable > 0)      # said once, not only counted


def test_rows_are_full(root):
    """The figure: share of columns in use. Random layouts need room for bad luck."""
    for name, layout in (('spans drawn anew', {}), ('fixed width', dict(layout=dict(NUMBERED)))):
        setup = only(root, 'one', dict(select=('story', 'talk'), **layout), stage_batch=32,
                     columns=512)
        used = total(take(20, setup, threads=0))['one']
        fill, cropped = used['columns'] / (20 * 32 * 512), used['cropped_columns']
        print(f'{name}: rows {100 * fill:.1f} % full, {cropped / used["columns"]:.2e} cropped')
        assert fill > 0.85 and cropped < 0.005 * used['columns']


def test_best_fit_never_overfills():
    rng = np.random.default_rng(0)
    for _ in range(50):
        widths = rng.integers(1, 80, rng.integers(1, 40)).tolist()
        placed = packing.best_fit(widths, rows=4, columns=100)
        assert all(sum(n for _, n in row) <= 100 for row in placed)
        assert sorted(i for row in placed for i, _ in row) == list(range(len(widths)))
        free = 400 - sum(n for row in placed for _, n in row)
        cropped = [n < widths[i] for row in placed for i, n in row]
        assert not any(cropped) or free < 80 * 4


def test_streams_pack_like_one_row(root):
    c = mlc.ConfigDict(dict(seed=0, codec=dict(name='rvq', frame_hz=12.5, codebooks=2, size=SIZE),
                            columns=128, layout=dict(name='duplex.columns'),
                            data=dict(path=root, sources=dict(talk=dict(select=('talk',)),
                                                              text=dict(select=('text',))))))
    v = vocab.streams(c.codec, text_tokens=60, tokenizer=os.path.join(root, 'text.model'))
    stage = dict(name='duplex', batch=4, data=dict(talk=.8, text=.2))
    taken = take(25, (c, stage, v), threads=0)
    assert taken[0][0]['tokens'].shape == (4, 5, 128)
    used = total(taken)
    share = used['talk']['columns'] / (used['talk']['columns'] + used['text']['columns'])
    assert share == pytest.approx(0.8, abs=0.01)
    assert used['talk']['cropped_columns'] == 0     # widths that follow from seconds are exact
    assert used['talk']['audio_s'] == pytest.approx(used['talk']['columns'] / 12.5, rel=0.05)
    assert used['text']['audio_s'] == 0


# ---------------------------------------------------------------------------------- one pass

def test_one_pass_is_every_record_once_for_any_process_count(root):
    setup = only(root, 'numbers', dict(select=('story',)))
    options = dict(batch=4, layout=NUMBERED, split='test')
    whole = list(data.one_pass(setup[0], 'numbers', setup[2], **options))
    seen = [(int(tokens[0]), record) for arrays, _, which in whole for i in range(4)
            for tokens, record in zip(segments({k: x[i] for k, x in arrays.items()}), which[i],
                                      strict=True)]
    stored = [3000 + int(r.id[1:]) for r in data.examples(setup[0], 'test', 'numbers')]
    assert sorted(stored) == list(range(3000, 3037))
    assert sorted(seen, key=lambda pair: pair[1]) == [(n, i) for i, n in enumerate(stored)]
    assert total(w[:2] for w in whole)['numbers']['records'] == 37
    assert all(arrays['tokens'].shape == (4, 1, COLUMNS) for arrays, *_ in whole)
    parts = [list(data.one_pass(setup[0], 'numbers', setup[2], **options, process_index=i,
                                process_count=2)) for i in range(2)]
    for step, (arrays, _, which) in enumerate(whole):
        same(arrays, {k: np.concatenate([p[step][0][k] for p in parts]) for k in arrays})
        assert which == parts[0][step][2] + parts[1][step][2]
    few = data.one_pass(setup[0], 'numbers', setup[2], **options, limit=5)
    assert total(w[:2] for w in few)['numbers']['records'] == 5


def test_examples_come_back_as_they_were_written(root):
    c, _, v = make(root)
    got = {r.id: r for name in ('mixed', 'text') for r in data.examples(c, 'train', name, vocab=v)}
    wanted = all_records()['train']
    assert len(got) == len(wanted)
    encode = vocab.Text(v.tokenizer).encode
    for record in wanted:
        found = got[record.id]
        assert found.words == tuple(w._replace(ids=encode(w.text)) for w in record.words)
        for field in ('id', 'source', 'language', 'duration_s', 'phones', 'turns', 'style', 'wav'):
            assert getattr(found, field) == getattr(record, field), field
        assert len(found.units) == len(record.units)
        for a, b in zip(found.units, record.units, strict=True):
            np.testing.assert_array_equal(a, b)
        assert (found.codes is None) == (record.codes is None)
        if record.codes is not None:
            np.testing.assert_array_equal(found.codes, record.codes)
    assert [r.id for r in data.examples(c, 'test', 'pairs', limit=3)] == [
        r.id for r in data.examples(c, 'test', 'pairs')][:3]


def test_parsing_agrees_with_tfds(root):
    """Every feature of every record, against TFDS's own parser."""
    raw = open_dataset(root)._open('train')
    for i, theirs in enumerate(records.source_of(root, 'train')):
        ours = dataset_lib.parse(raw[i])
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            np.testing.assert_array_equal(np.asarray(ours[key]).reshape(np.shape(value)), value)
        assert dataset_lib.decode(theirs).id == dataset_lib.decode(ours).id


def test_what_is_written_beside_speech_gets_ids(root):
    """Fields of the record and of its source, and the labels of its style, each by a name."""
    chain = dict(name='template.chain', parts=(
        ('field', 'task'), ('field', 'note'), ('label', 'mine tone'), ('text', 'mine', 0)))
    c, stage, v = only(root, 'one', dict(select=('talk',), fields=dict(task=('ab', 'cd')),
                                         layout=chain))
    encode = vocab.Text(v.tokenizer).encode
    record = next(data.examples(c, 'train', 'one', vocab=v))
    assert record.fields['task'] == (Phrase('ab', encode('ab')), Phrase('cd', encode('cd')))
    assert record.fields['note'] == (Phrase(record.id, encode(record.id)),)
    assert record.fields['tone 1'] == (Phrase('low', encode('low')),)
    np.testing.assert_array_equal(record.sides['pitch'][1], record.units[1][::2])
    rest = [*encode(record.id), *encode('calm')]
    drawn = set()
    for step, (arrays, _) in zip(range(4), data.batches(c, stage, v, threads=0), strict=False):
        assert step < 4
        for row, at in zip(arrays['tokens'][:, 0], arrays['segment'] == 1, strict=True):
            said = row[at].tolist()
            drawn |= {text for text in ('ab', 'cd') if said[1:1 + len(encode(text))]
                      == list(encode(text))}
    assert drawn == {'ab', 'cd'}
    _, grid = data._open_source(open_dataset(root), c, 'one', v, split='train', layout=None,
                                fill=data._tokenizer(v), extras={}).draw(0, 0)
    ids = grid.tokens[0].tolist()
    assert any(ids[1 + len(encode(text)):][:len(rest)] == rest for text in ('ab', 'cd'))
    for fields, says in ((dict(task=()), 'fields.task is a text'), (dict(task=3), 'got 3')):
        refused(ConfigError, lambda f=fields: data.batches(*only(root, 'one', dict(
            select=('talk',), fields=f, layout=chain))), says)


def test_a_dataset_made_before_fields_is_read(root):
    """Without the features that came later, a record is one without fields and side streams."""
    from tensorflow_datasets.proto import tf_example_pb2
    stored = tf_example_pb2.Example.FromString(open_dataset(root)._open('train')[0])
    text = next(r for r in all_records()['train'] if r.id == dataset_lib.decode(
        dataset_lib.parse(stored.SerializeToString())).id)
    for name in dataset_lib._ADDED:
        del stored.features.feature[name]
    features = dataset_lib.parse(stored.SerializeToString())
    bare = dataclasses.replace(text, sides={}, fields={})
    found = dataset_lib.decode(features | {'crc32': records.crc32(bare)})
    assert (found.id, found.sides, found.fields, found.words) == (bare.id, {}, {}, bare.words)
    refused(ValueError, lambda: dataset_lib.decode(features), 'does not match its checksum')


# ------------------------------------------------------------------------------- fingerprints

def test_fingerprint_names_what_changed(root, tmp_path):
    before = data.fingerprint(*make(root))
    assert before == data.fingerprint(*make(root))
    sources = make(root)[0].data.sources.to_dict()
    sources['pairs']['layout'] = dict(name='flat.sequence', fields=('speech', 'text'))
    moved = shutil.copytree(root, tmp_path / 'moved')
    assert data.fingerprint(*make(moved)) == before         # where it lies does not matter
    for part, changes in (
            ('seed', dict(seed=4)), ('columns', dict(columns=128)), ('batch', dict(stage_batch=16)),
            ('seed', dict(stage_name='other')),
            ('mixture', dict(stage_data=dict(mixed=.6, pairs=.2, text=.2))),
            ('sources', dict(layout=dict(name='flat.interleave', text_words=(1, 2)))),
            ('sources', dict(stage_layout=dict(name='flat.interleave', text_words=(1, 2)))),
            ('sources', dict(data=dict(path=root, sources=sources)))):
        after = data.fingerprint(*make(root, **changes))
        assert {k for k in before if before[k] != after[k]} == {part}, changes
        with pytest.raises(ConfigError, match=rf'made with other data: {part} changed'):
            data.resume({'next_step': 3, 'fingerprint': before}, after)
    c, stage, v = make(root)
    other = vocab.line(c.codec, text_tokens=60, tokenizer=v.tokenizer, multiple=128)
    assert data.fingerprint(c, stage, other)['vocab'] != before['vocab']
    manifest = json.loads((moved / 'manifest.json').read_text())
    first = next(iter(manifest['shards']))
    manifest['shards'][first]['sha256'] = 'f' * 64
    (moved / 'manifest.json').write_text(json.dumps(manifest))
    assert data.fingerprint(*make(moved))['dataset'] != before['dataset']


# --------------------------------------------------------------------------------- bad input

def refused(kind, call, *words):
    """`call` raises `kind` in one line that holds `words`."""
    with pytest.raises(kind) as e:
        call()
    text = str(e.value)
    assert '\n' not in text and len(text) < 600, text
    for word in words:
        assert str(word) in text, text


def first_shard(path, split='train'):
    return next(p for p in sorted((path / 'speech').iterdir()) if f'-{split}.' in p.name)


def edited(path, change):
    manifest = json.loads((path / 'manifest.json').read_text())
    change(manifest)
    (path / 'manifest.json').write_text(json.dumps(manifest))


@pytest.mark.parametrize('changes, words', (
    (dict(stage_data=dict(mixd=1.0)), ("'mixd'", "did you mean 'mixed'", 'pairs, text')),
    (dict(stage_data=dict(mixed=-1.0)), ('mixed', '-1.0')),
    (dict(stage_data=dict(mixed=0.0)), ('no source a positive weight',)),
    (dict(stage_batch=0), ('batch', 'positive')),
    (dict(data=dict(path='/nowhere', sources=dict(mixed=dict(select=('story',))))),
     ('no dataset at /nowhere', 'data_pipelines.demo --out /nowhere')),
    (dict(data=dict(path='', sources=dict(mixed=dict(select=('story',))))), ('data.path',)),
    (dict(data=dict(pth='x')), ("'pth'", "did you mean 'path'")),
    (dict(codec=CODEC | dict(size=500)), ('codec.size', '500', '64')),
    (dict(codec=CODEC | dict(name='hubert')), ('codec.name', 'hubert', 'kmeans')),
    (dict(codec=CODEC | dict(frame_hz=50.0)), ('codec.frame_hz', '50.0', '25.0')),
    (dict(layout=dict(name='flat.interleave', text_wrds=(1, 2))), ('text_wrds', 'text_words')),
    (dict(layout=dict(name='flat.interleave', unit_hz=50.0)),
     ('layout.unit_hz is 50.0', 'codec.frame_hz is 25.0')),
    (dict(stage_layout=dict(name='flat.nothing')), ('nothing', 'interleave'))))
def test_a_config_that_does_not_fit_is_refused(root, changes, words):
    setup = make(root, **changes)
    if 'data' in changes:
        setup[1]['data'] = dict(mixed=1.0)
    refused(ConfigError, lambda: data.batches(*setup), *words)


def test_bad_sources_are_refused(root):
    for source, words in ((dict(select=('storie',)), ('storie', 'story, talk, text')),
                          (dict(select=()), ('select', 'tuple')),
                          (dict(select='story'), ('select', 'tuple')),
                          (dict(select=('story',), lng=1), ("'lng'", 'layout, select'))):
        refused(ConfigError, lambda s=source: data.batches(*only(root, 'one', s)), *words)
    refused(ConfigError, lambda: data.batches(*make(root), split='tran'), "'tran'", 'test, train')
    refused(ConfigError, lambda: data.batches(*only(root, 'one', dict(select=('talk',))),
                                              split='test'), 'no record', "'test'")
    refused(ConfigError, lambda: data.batches(*make(root), process_count=3), '8 rows',
            '3 processes')
    pairs = only(root, 'one', dict(select=('text',), layout=dict(name='flat.sequence')))
    refused(ValueError, lambda: data.batches(*pairs), 'data.sources.one', 'record x', 'no units')


def test_codec_weights_must_be_those_of_the_dataset(root, tmp_path):
    weights = tmp_path / 'units.safetensors'
    weights.write_bytes(b'other weights')
    refused(ConfigError, lambda: open_dataset(root, CODEC | dict(path=str(weights))),
            'codec.sha256', '0' * 64)
    absent = str(tmp_path / 'absent')
    refused(ConfigError, lambda: open_dataset(root, CODEC | dict(path=absent)),
            f'codec.path: no file {absent}', '--config.codec.path=')
    open_dataset(root, CODEC | dict(path=''))       # training alone needs no codec
    folder = tmp_path / 'released'
    folder.mkdir()
    weights.rename(folder / 'model.safetensors')
    refused(ConfigError, lambda: open_dataset(root, CODEC | dict(path=str(folder))), 'codec.sha256')


def test_a_truncated_shard_is_named(damaged):
    shard = first_shard(damaged)
    size = shard.stat().st_size
    os.truncate(shard, size - 100)
    refused(ValueError, lambda: open_dataset(str(damaged)), shard.name, size - 100, size)
    shard.unlink()
    refused(ValueError, lambda: open_dataset(str(damaged)), shard.name, 'missing')


def test_a_flipped_byte_in_a_shard_is_named_or_harmless(damaged, root):
    """Wherever it falls: reading ends in one line naming file and record, or gives the same."""
    shard = first_shard(damaged)
    whole = shard.read_bytes()
    good = open_dataset(root)
    wanted = [good.record('train', i) for i in range(380)]
    named = 0
    for at in np.random.default_rng(1).integers(0, len(whole), 24):
        flipped = bytearray(whole)
        flipped[at] ^= 0x10
        shard.write_bytes(flipped)
        dataset = open_dataset(str(damaged))
        try:
            for i, record in enumerate(wanted):
                found = dataset.record('train', i)
                assert found.words == record.words and found.id == record.id
                assert all((a == b).all() for a, b in zip(found.units, record.units, strict=True))
        except ValueError as e:
            named += 1
            assert shard.name in str(e) and '\n' not in str(e), str(e)
    print(f'{named} of 24 flipped bytes refused, the others harmless')
    assert named > 12


def test_damage_reaches_the_loop_in_one_line(damaged):
    setup = make(damaged)
    it = data.batches(*setup, threads=2)
    shard = first_shard(damaged)
    it.close()
    shard.write_bytes(shard.read_bytes()[:64] + bytes(shard.stat().st_size - 64))
    refused(ValueError, lambda: next(data.batches(*setup, threads=2)), shard.name)


def test_a_checksum_that_does_not_match_is_named(root):
    features = dict(records.source_of(root, 'train')[5])
    features['units'] = features['units'].copy()
    features['units'][3] ^= 1
    refused(ValueError, lambda: dataset_lib.decode(features), 'record', 'checksum')
    features = dict(records.source_of(root, 'train')[5], codes_shape=np.array([2 ** 30] * 3))
    refused(ValueError, lambda: dataset_lib.decode(features), 'cannot have')
    features = dict(records.source_of(root, 'train')[5], units_lengths=np.array([-1, 5]))
    refused(ValueError, lambda: dataset_lib.decode(features), 'cannot have')


def test_a_damaged_index_is_named(damaged):
    index = damaged / 'index-train.npz'
    whole = index.read_bytes()
    for at in (10, 200, len(whole) // 2, len(whole) - 30):
        index.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        refused(ValueError, lambda: open_dataset(str(damaged)), index.name)


@pytest.mark.parametrize('shape, dtype, words', (
    ((10 ** 12,), '<f4', ('index-train.npz', '1000000000000')),
    ((380, 10 ** 6), '<f4', ('index-train.npz',)),
    ((380,), '|O', ('index-train.npz',)),
    ((380,), '<f4', ('index-train.npz', 'has 0 bytes'))))
def test_an_index_that_lies_allocates_nothing(damaged, shape, dtype, words):
    index = damaged / 'index-train.npz'
    arrays = dict(np.load(index, allow_pickle=False))
    with zipfile.ZipFile(index, 'w') as archive:
        for name in arrays:
            with archive.open(f'{name}.npy', 'w') as f:
                np.lib.format.write_array_header_1_0(f, dict(descr=dtype, fortran_order=False,
                                                             shape=shape))
    edited(damaged, lambda m: m['files'].pop('index-train.npz'))
    refused(ValueError, lambda: open_dataset(str(damaged)), *words)


@pytest.mark.parametrize('change, words', (
    (lambda m: m.pop('shards'), ('lacks', 'shards')),
    (lambda m: m.update(format=2), ('format 2', 'reads 1')),
    (lambda m: m['shards'].update({'../../etc/passwd': dict(bytes=1, sha256='')}), ('outside',)),
    (lambda m: m['shards'].update({'/etc/passwd': dict(bytes=1, sha256='')}), ('outside',)),
    (lambda m: m['splits']['train'].update(records=10 ** 15), ('records', 'bytes')),
    (lambda m: m['splits']['train'].update(records='many'), ("'many'",)),
    (lambda m: m['splits']['train'].update(records=379), ('index-train.npz', '379')),
    (lambda m: m['splits'].update({'../x': dict(records=1)}), ('../x',)),
    (lambda m: m['sources'].pop(), ('index-train.npz', 'source 2')),
    (lambda m: m['units'].pop('size'), ('lacks', 'size')),
    (lambda m: m.update(sources=None), ('manifest.json',))))
def test_a_manifest_that_lies_is_refused(damaged, change, words):
    edited(damaged, change)
    refused(ValueError, lambda: open_dataset(str(damaged), CODEC), *words)


def test_no_class_outside_tfds_is_imported(damaged):
    features = damaged / 'speech' / 'features.json'
    features.write_text(features.read_text().replace(
        'tensorflow_datasets.core.features.features_dict.FeaturesDict', 'os.path.FeaturesDict'))
    refused(ValueError, lambda: open_dataset(str(damaged)), 'features.json', 'os.path')
    features.write_text('{}')
    refused(ValueError, lambda: open_dataset(str(damaged)), 'speech')


# ------------------------------------------------------------------------------ what it costs

def test_reading_wakes_no_accelerator(root):
    code = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from jaxsd import data
assert 'jax' not in sys.modules, 'importing jaxsd.data imports jax'
assert 'tensorflow' not in sys.modules and 'grain' not in sys.modules
import test_data
next(data.batches(*test_data.make({root!r})))
assert 'tensorflow' not in sys.modules
if 'jax' in sys.modules:        # grain imports it for its trees
    import jax._src.xla_bridge
    assert not jax._src.xla_bridge._backends
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_throughput(root, monkeypatch):
    """The figure: the demo asks for 32 rows of 512 columns every half second."""
    for where, kept_s in (('memory', 3600), ('disk', 0)):
        monkeypatch.setattr(dataset_lib, '_REMEMBERED_S', kept_s)   # a corpus too large to keep
        it = data.batches(*make(root, columns=512, stage_batch=32), threads=0)
        next(it)
        rounds = []
        for _ in range(3):      # the fastest counts: other programs slow a core down
            began, count, rows = time.process_time(), 0, 0
            while rows < 256:
                _, account = next(it)
                rows += 32
                count += sum(u['records'] for u in account.values())
            rounds.append((time.process_time() - began, count))
        spent_s, count = min(rounds)
        print(f'from {where}: {rows / spent_s:.0f} rows of 512 columns ({count / spent_s:.0f} '
              f'records) per second of one core, {rows / spent_s / 64:.1f} x the demo')
        # The aim is 5 times; on a machine busy enough to slow the demo's steps, too, it was 4.5.
        assert rows / spent_s > (3 if kept_s else 1) * 64


@pytest.mark.slow
def test_seventeen_streams_fast_enough(tmp_path, monkeypatch):
    """100,000 positions per second of one core, of records that are decoded each time."""
    path = bench_loader.make(str(tmp_path), 4.0)
    monkeypatch.setattr(dataset_lib, '_REMEMBERED_S', 0)
    found = bench_loader.measure(path, profile=False)
    print(found)
    assert found['positions_per_s'] > 100_000
    assert found['restore_s'] < 2 * found['first_batch_s'] + 1      # at step 1,000,000

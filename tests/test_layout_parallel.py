# SPDX-License-Identifier: Apache-2.0
"""Do text and speech stand side by side as the papers draw them, and can it be undone?"""

import dataclasses
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsd import vocab as vocabs
from jaxsd.layout import parallel, show
from jaxsd.types import NOTHING, Record, Turn, Word
from jaxsd.vocab import initial

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'layout'
QUICK = settings(derandomize=True, max_examples=60, deadline=None)
CODEC = dict(size=200, codebooks=3)
AUDIO = ('audio 0', 'audio 1', 'audio 2')
ASKED = dict(marks=('end', 'pad', 'input', 'answer'),
             text_marks=('eos', 'pad', 'input', 'answer', 'asr'))
WORDS = (Word('q', 1, .0, .1, (10, 11)), Word('a', 0, .16, .2, (7,)), Word('b', 0, .2, .3, (8, 9)))


def voc(rows=AUDIO, text_tokens=20, **options):
    return vocabs.parallel(CODEC, text_tokens=text_tokens, rows=rows, **options)


def coded(channels: int = 1, words=WORDS[1:], **fields) -> Record:
    """Channel c, codebook k, frame t of 4 is 100 c + 10 (1 + k) + t; turns of two frames."""
    c, k, t = np.ogrid[:channels, :3, :4]
    return Record('call', 'toy', 'en', .32, codes=(100 * c + 10 * (1 + k) + t).astype(np.int16),
                  words=words, **fields)


def asked(**fields) -> Record:
    return coded(2, WORDS, turns=(Turn(1, 0., .16, ''), Turn(0, .16, .32, '')),
                 feats=(np.ones((32, 5), np.float32), 2 * np.ones((32, 5), np.float32)), **fields)


UNITS = Record('call', 'toy', 'en', .4, words=WORDS,
               turns=(Turn(1, 0., .4, ''), Turn(0, 0., .4, '')),
               units=tuple(np.arange(start, start + 10, dtype=np.int16) for start in (10, 20)),
               feats=(np.ones((40, 5), np.float32),) * 2)
GROUP = voc(marks=('pad',), text_marks=('eos', 'open', 'speech', 'close'), turns=1)
SPREAD = voc(text_marks=('eos', 'answer'), turns=1)
DRAWN = {
    'grows': (parallel.prefixed, voc(), coded(), dict(late=(0, 1, 2))),
    'crops': (parallel.prefixed, voc(text_tokens=0), coded(), dict(late=(0, 1, 2), tail='crop')),
    'ends': (parallel.prefixed, voc(marks=('end',)), coded(),
             dict(late=(0, 1, 2), end='mark', weights=(5., 1., .5))),
    'patches': (parallel.prefixed, vocabs.patches(CODEC, text_tokens=20, rows=3), coded(),
                dict(late=(0, 0, 0), weight_text=1.)),
    'answer': (parallel.answered, voc(**ASKED), asked(), dict(late=(1, 2, 3), stack_frames=8)),
    'answer_to_text': (parallel.answered, voc(**ASKED), asked(),
                       dict(late=(1, 2, 3), heard='text')),
    'recognition': (parallel.answered, voc(**ASKED), asked(),
                    dict(late=(1, 2, 3), said='text', task='same', stack_frames=8)),
    'dealt': (parallel.together, voc(AUDIO[:2], marks=('end', 'pad'), text_marks=('eos', 'pad')),
              UNITS, {}),
    'groups': (parallel.grouped, GROUP, UNITS, dict(score='all')),
    'groups_from_text': (parallel.grouped, GROUP, UNITS, dict(fields=('text', 'speech'))),
    'unaligned': (parallel.upsampled, SPREAD, UNITS, dict(stack_frames=20)),
    'unaligned_from_text': (parallel.upsampled, SPREAD, UNITS, dict(heard='text')),
}


def draw(layout, vocab, record, options):
    return layout(record, vocab=vocab, rng=np.random.default_rng(0), **options)


@pytest.mark.parametrize('name', DRAWN)
def test_drawn_by_hand(name):
    layout, vocab, record, options = DRAWN[name]
    drawn = show.text(draw(layout, vocab, record, options), vocab)
    assert drawn + '\n' == (GOLDEN / f'parallel_{name}.txt').read_text()


def test_features_stand_where_the_question_is_heard():
    """In order, stacked, of the channel that asks; nothing anywhere else."""
    grid = draw(*DRAWN['answer'])
    assert grid.extra['slot'].tolist() == [0, 1, 1] + [0] * 8
    feats = grid.extra['feats']
    assert feats.shape == (11, 40) and (feats[1:3] == 2).all()
    assert not feats[[0, *range(3, 11)]].any()
    ramp = np.arange(32 * 5, dtype=np.float32).reshape(32, 5)
    record = coded(feats=(ramp,), turns=(Turn(0, 0., .16, ''), Turn(0, .16, .32, '')))
    grid = draw(parallel.answered, voc(**ASKED), record,
                dict(late=(1, 2, 3), said='text', task='same', stack_frames=5))
    first = np.flatnonzero(grid.extra['slot'])
    heard = grid.extra['feats'][first].reshape(-1, 5)
    np.testing.assert_array_equal(heard[:32], ramp)
    assert len(first) == 7 and not heard[32:].any()


# Patterns.

def by_list(books: int, frames: int, late, tail: str):
    """The pattern as a list of coordinates for each column, written out by the definition."""
    group = len(late) // books
    last = -(-frames // group) + (max(late) if tail == 'grow' else 0)
    columns = []
    for c in range(last):
        here = {}
        for r, d in enumerate(late):
            t = (c - d) * group + r // books
            if c >= d and t < frames:
                here[r] = (t, r % books)
        columns.append(here)
    return columns


@QUICK
@given(st.data())
def test_patterns_are_lists_of_coordinates_and_can_be_undone(data):
    """Any delays, any number of frames side by side: all is kept by a tail that grows, and what a
    cropped tail loses is the last frames of late rows."""
    books, group = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    frames, rows = data.draw(st.integers(0, 9)), books * group
    late = data.draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
    tail = data.draw(st.sampled_from(['grow', 'crop']))
    at = parallel.pattern(books, frames, late, tail)
    want = by_list(books, frames, late, tail)
    assert at.shape == (rows, len(want))
    for c, here in enumerate(want):
        assert {r: divmod(int(x), frames)[::-1] for r, x in enumerate(at[:, c]) if x >= 0} == here
    for k in range(rows):       # time runs forward in every row
        assert (np.diff(at[k][at[k] >= 0]) > 0).all()
    values = np.arange(books * frames, dtype=np.int32).reshape(books, frames) + 1000
    fills = np.arange(rows)
    cells = parallel.lay(values, at, fills)
    assert (cells[at < 0] == np.broadcast_to(fills[:, None], at.shape)[at < 0]).all()
    back = parallel.undo(cells, at, books, frames)
    kept = {coordinate for here in want for coordinate in here.values()}
    for t in range(frames):
        for k in range(books):
            assert back[k, t] == (values[k, t] if (t, k) in kept else NOTHING)
    if tail == 'grow':
        np.testing.assert_array_equal(back, values)
        short = parallel.undo(cells[:, :2], at, books, frames)      # on the fly, while it is said
        assert set(short[short != NOTHING]) == set(cells[:, :2][at[:, :2] >= 0].tolist())


def test_the_delay_pattern_of_the_papers():
    """Delays 0, 1, 2 over four frames: S 1 2 3 4 S S / S S 1 2 3 4 S / S S S 1 2 3 4."""
    cells = parallel.lay(np.tile(np.arange(1, 5), (3, 1)), parallel.pattern(3, 4, (0, 1, 2)), 0)
    assert cells.tolist() == [[1, 2, 3, 4, 0, 0], [0, 1, 2, 3, 4, 0], [0, 0, 1, 2, 3, 4]]


# Spans that are said last.

def test_spans_lie_apart_inside_and_are_as_many_as_the_paper_says():
    rng, counts = np.random.default_rng(0), []
    for _ in range(600):
        frames = int(rng.integers(1, 200))
        found = parallel.spans(frames, rng, 40)
        edges = [0, *(x for span in found for x in span), frames]
        assert all(b - a >= parallel.APART_FRAMES for a, b in zip(edges[::2], edges[1::2],
                                                                  strict=True)) or not found
        assert all(1 <= b - a <= 40 for a, b in found)
        assert (not found) == (frames < 11)
        if frames > 100:
            counts.append(len(found))
    share = np.bincount(counts, minlength=4) / len(counts)      # Poisson(1), 0 told as 1, 4.. as 3
    np.testing.assert_allclose(share[1:], [0.736, 0.184, 0.080], atol=0.06)


def test_what_was_taken_out_is_said_last():
    """Read back piece by piece: stretches delayed each on its own, what stayed first, then what was
    taken, every frame once; marks where the paper has them, which are never scored but at ends."""
    v = voc(marks=('end', 'over', *parallel.GAPS))
    codes = np.arange(3 * 30).reshape(1, 3, 30).astype(np.int16)
    example = Record('r', 'toy', 'en', 2.4, codes, words=WORDS[1:])
    grid = parallel.infilled(example, vocab=v, rng=np.random.default_rng(1), longest_frames=6,
                             late=(0, 1, 2), weights=(5., 1., .5))
    taken = parallel.spans(30, np.random.default_rng(1), 6)
    assert len(taken) == 2
    sound = grid.tokens[1:, 4:] - np.array([[row.start] for row in v.rows[1:]])
    assert (sound[:, 0] == 205).all() and grid.tokens[0, :4].tolist() == [1, 7, 8, 9]
    edges = [0, *(x for span in taken for x in span), 30]
    kept = [range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    order = [(kept[0], None), ('gap', 202), (kept[1], None), ('gap', 203), (kept[2], 200),
             ('gap', 202), (range(*taken[0]), 201), ('gap', 203), (range(*taken[1]), 201)]
    at, scored = 1, grid.weights[1:, 4:] > 0
    for what, mark in order:
        if what == 'gap':
            assert (sound[:, at] == mark).all() and not scored[:, at].any()
            at += 1
            continue
        n = len(what) + (mark is not None)
        p = parallel.pattern(3, n, (0, 1, 2))
        back = parallel.undo(sound[:, at:at + p.shape[1]], p, 3, n)
        np.testing.assert_array_equal(back[:, :len(what)], codes[0][:, list(what)])
        assert mark is None or (back[:, -1] == mark).all()
        np.testing.assert_array_equal(scored[:, at:at + p.shape[1]], p >= 0)
        at += p.shape[1]
    assert at == sound.shape[1]
    assert [set(w[w > 0]) for w in grid.weights[1:]] == [{5.0}, {1.0}, {0.5}]


# Options and errors.

@pytest.mark.parametrize('layout, vocab, record, options, message', [
    (parallel.prefixed, voc(), coded(), dict(late=(0, 1)), 'for a multiple of 3 codebooks'),
    (parallel.prefixed, voc(), coded(), dict(late=(0, 1, -1)), 'delays of 0 or more'),
    (parallel.prefixed, voc(), coded(), dict(late=(0, 1, 2), tail='cut'), "layout.tail is 'grow'"),
    (parallel.prefixed, voc(), coded(), dict(late=(0, 1, 2), end='mark'),
     'needs end in vocab.marks'),
    (parallel.prefixed, voc(), coded(), dict(late=(0, 1, 2), weights=(1., 2.)), 'layout.weights'),
    (parallel.answered, voc(), asked(), {}, 'needs input in vocab.text_marks'),
    (parallel.answered, voc(text_tokens=0), asked(), {}, 'needs the vocabulary of vocab.parallel'),
    (parallel.answered, voc(**ASKED), asked(), {}, 'a delay for each of the 3 rows'),
    (parallel.answered, voc(**ASKED), asked(), dict(heard='sound'), "layout.heard is 'feats'"),
    (parallel.answered, voc(**ASKED), asked(), dict(task='any'), "layout.task is 'reply'"),
    (parallel.answered, voc(**ASKED), coded(turns=(Turn(0, 0., .2, ''),) * 2), {}, 'no features'),
    (parallel.together, voc(AUDIO, marks=('end', 'pad')), coded(units=UNITS.units), {},
     'no turn that another one'),
    (parallel.grouped, GROUP, UNITS, dict(fields=('speech',)), 'layout.fields names two'),
    (parallel.grouped, GROUP, UNITS, dict(kind='words'), "layout.kind is 'units' or 'codes'"),
    (parallel.grouped, GROUP, UNITS, dict(kind='codes'), 'has audio but no codes'),
    (parallel.upsampled, SPREAD, UNITS, dict(heard='units'), "layout.heard is 'feats' or 'text'"),
])
def test_what_cannot_be_drawn_is_said(layout, vocab, record, options, message):
    with pytest.raises(ValueError, match=message):
        draw(layout, vocab, record, options)


def test_a_record_with_codes_and_units_is_told_in_those_that_the_layout_writes():
    """Dealing, groups and CTC write units, delays and patches codes, whatever else there is."""
    both = dataclasses.replace(UNITS, codes=(30 + np.arange(2 * 3 * 5)).reshape(2, 3, 5).astype(
        np.int16))
    for name in ('dealt', 'groups', 'unaligned'):
        layout, v, _, options = DRAWN[name]
        np.testing.assert_array_equal(draw(layout, v, both, options).tokens,
                                      draw(layout, v, UNITS, options).tokens)
    one = dataclasses.replace(coded(), units=UNITS.units[:1])
    layout, v, _, options = DRAWN['grows']
    np.testing.assert_array_equal(draw(layout, v, one, options).tokens,
                                  draw(layout, v, coded(), options).tokens)
    patch = draw(parallel.grouped, GROUP, both, dict(kind='codes', frame_hz=12.5,
                                                     fields=('text', 'speech')))
    start = GROUP.rows[1].start
    assert (patch.tokens[1:, 4] - start).tolist() == [30, 35, 40]       # frame 0 of three books


def test_text_alone_is_drawn_from_its_turns():
    """Words of a text-only exchange are shared out by turn, and there is no sound to speak."""
    words = tuple(Word(w, 0, 0, 0, (10 + i,)) for i, w in enumerate('who is it it is me'.split()))
    text = Record('e', 'toy', 'en', 0., words=words,
                  turns=(Turn(0, 0, 0, 'who is it'), Turn(0, 0, 0, 'it is me')))
    grid = draw(parallel.answered, voc(**ASKED), text,
                dict(heard='text', said='text', late=(1, 2, 3)))
    assert grid.tokens[0, 1:4].tolist() == [10, 11, 12]
    assert grid.tokens[0, 6:9].tolist() == [13, 14, 15]
    grid = draw(parallel.upsampled, SPREAD, text, dict(heard='text'))
    assert (grid.tokens[1:] == NOTHING).all() and not grid.weights[1:].any()
    with pytest.raises(ValueError, match='no sound to answer with'):
        draw(parallel.answered, voc(**ASKED), text, dict(heard='text', late=(1, 2, 3)))
    with pytest.raises(ValueError, match='no sound for a speech field'):
        draw(parallel.grouped, GROUP, text, {})


def test_units_that_do_not_fit_are_lost_from_the_end():
    """Fifty distinct units in four columns of three frames: the first twelve, in order."""
    long = Record('c', 'toy', 'en', 2., words=WORDS,
                  turns=(Turn(1, 0., 2., ''), Turn(0, 0., 2., '')),
                  units=(np.arange(50, dtype=np.int16),) * 2)
    grid = draw(parallel.upsampled, SPREAD, long, dict(heard='text'))
    cells = grid.tokens[1:, -4:].T.reshape(-1) - SPREAD.rows[1].start
    assert cells.tolist() == list(range(12))
    short = draw(*DRAWN['unaligned_from_text'])
    spoken = short.tokens[1:, -4:].T.reshape(-1)
    kept = spoken[spoken != initial(SPREAD.rows[1])] - SPREAD.rows[1].start
    assert kept.tolist() == list(range(10, 20))


def test_the_vocabulary_keeps_room_and_shares_ranges():
    v = voc(text_tokens=20, **ASKED, room=64)
    assert [row.size for row in v.rows] == [84, 264, 264, 264] and v.size == 84 + 3 * 264
    assert [row.predicted for row in v.rows] == [25, 204, 204, 204]
    assert v.specials['audio 1 end'] == 84 + 264 + 200 and v.specials['eos'] == 20
    assert GROUP.size == 25 + 202 and {row.start for row in GROUP.rows[1:]} == {25}
    joint = vocabs.patches(CODEC, text_tokens=20, rows=2)
    assert joint.size == 20 + 600 + 1 and [r.predicted for r in joint.rows] == [620, 620]
    two = voc(('audio 0', 'audio 1', 'audio 2', 'audio 3'), turns=2)       # two frames of two books
    assert [r.start for r in two.rows[1:]] == [21, 222, 21, 222] and two.size == 21 + 402
    with pytest.raises(ValueError, match='vocab.turns 2 must divide the 3 rows'):
        voc(turns=2)
    with pytest.raises(ValueError, match='vocab.rows must be names of their own'):
        voc(('audio 0', 'audio 0'))

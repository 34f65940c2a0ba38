# SPDX-License-Identifier: Apache-2.0
"""Do both speakers share one clock as the papers draw it, with every delay and every weight?"""

import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsd import vocab as vocabs
from jaxsd.layout import duplex, show
from jaxsd.types import NOTHING, Record, Word
from jaxsd.vocab import initial

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'layout'
PIECES = {7: 'h1', 8: 'h2'}
QUICK = settings(derandomize=True, max_examples=60, deadline=None)
CODEC = {'size': 2048, 'codebooks': 2}
TWO = vocabs.streams(CODEC, text_tokens=32_000)
ONE = vocabs.streams(CODEC, text_tokens=32_000, speakers=('mine',))
BOTH = vocabs.streams(CODEC, text_tokens=32_000, predicted=('mine', 'theirs'))
HEARD = vocabs.streams(CODEC, text_tokens=32_000, predicted=())


def codes(channels: int, frames: int) -> np.ndarray:
    """Channel c, codebook k, frame t is 10 (1 + 2c + k) + t, as the goldens are drawn."""
    c, k, t = np.ogrid[:channels, :2, :frames]
    return (10 * (1 + 2 * c + k) + t).astype(np.int16)


def record(channels: int = 2, frames: int = 4, words=None, **fields) -> Record:
    words = (Word('hello', 0, .16, .32, (7, 8)),) if words is None else tuple(words)
    return Record('call 3', 'toy', 'en', frames / 12.5,
                  **({'codes': codes(channels, frames), 'words': words} | fields))


def draw(example, vocab, **options):
    return duplex.columns(example, vocab=vocab, rng=np.random.default_rng(0), **options)


PROSE = record(codes=None, words=[Word('a', 0, 0, 0, (7, 8)), Word('b', 0, 0, 0, (7,))])
DRAWN = {
    'miniature': (TWO, record(), {}),
    'both_predicted': (BOTH, record(), dict(acoustic_delay_columns=2, weight_theirs=1.)),
    'one_speaker': (ONE, record(1), {}),
    'one_channel': (TWO, record(1), {}),
    'text_only': (TWO, PROSE, {}),
    'recognition_by_delay': (HEARD, record(1, 6), dict(
        mine='none', theirs=0, text='theirs', text_delay_columns=2, acoustic_delay_columns=0)),
    'synthesis_by_delay': (ONE, record(1, 6), dict(text_delay_columns=-2)),
    'dropped_text': (ONE, record(1), dict(drop_text=1.)),
}


@pytest.mark.parametrize('name', DRAWN)
def test_drawn_by_hand(name):
    vocab, example, options = DRAWN[name]
    drawn = show.text(draw(example, vocab, weight_epad=.5, **options), vocab,
                      pieces=PIECES.__getitem__)
    assert drawn + '\n' == (GOLDEN / f'duplex_{name}.txt').read_text()


def test_miniature_in_ids():
    """The same miniature as arrays: every stream's ids and weights, in the default weights."""
    grid = draw(record(), TWO)
    start = [row.start for row in TWO.rows]
    assert start == [0, 32_001, 34_050, 36_099, 38_148] and TWO.size == 40_197
    local = [[32_000, 3, 0, 7, 8], [2048, 10, 11, 12, 13], [2048, 2048, 20, 21, 22],
             [2048, 30, 31, 32, 33], [2048, 2048, 40, 41, 42]]
    assert np.array_equal(grid.tokens, np.array(local) + np.array(start)[:, None])
    assert grid.weights.tolist() == [[0, .5, 1, 1, 1], [0, 100, 100, 100, 100], [0, 0, 1, 1, 1],
                                     [0] * 5, [0] * 5]
    assert grid.position.tolist() == [0, 1, 2, 3, 4] and grid.segment.tolist() == [1] * 5


WORDS = [tuple(part.strip() for part in line.split('|'))
         for line in (GOLDEN / 'place_words.txt').read_text().splitlines()
         if line and not line.startswith('#')]


@pytest.mark.parametrize('rule, words, want', WORDS)
def test_words_placed_by_hand(rule, words, want):
    ids = {'_': 3, '^': 0, 'a': 10, 'b': 11, 'c': 12, 'd': 13}
    placed = []
    for item in words.split():
        times, _, pieces = item.partition(':')
        start, _, end = times.partition('-')
        placed.append(Word(item, 0, float(start) / 12.5, float(end) / 12.5,
                           tuple(ids[p] for p in pieces.split(','))))
    row = duplex.place_words(placed, len(want.split()), frame_hz=12.5, pad=3, epad=0, rule=rule)
    assert row.tolist() == [ids[w] for w in want.split()]


def test_words_placed_by_the_reference_code():
    """Thirty random transcripts as kyutai's fine-tuning code wrote them; its note says how."""
    cases = json.loads((GOLDEN / 'place_words_reference.json').read_text())['cases']
    assert len(cases) == 30
    for case in cases:
        words = [Word('', 0, start, end, tuple(ids)) for ids, start, end in case['words']]
        for rule in ('queue', 'shift'):
            row = duplex.place_words(words, case['columns'], frame_hz=12.5, pad=3, epad=0,
                                     rule=rule)
            assert row.tolist() == case[rule]


@st.composite
def transcripts(draw):
    """Words at random frames, of one to four pieces with ids from 100 on, none used twice."""
    words, at = [], 100
    for start in sorted(draw(st.lists(st.integers(0, 40), max_size=12))):
        pieces = draw(st.integers(1, 4))
        words.append(Word('', 0, start / 12.5, (start + 1) / 12.5, tuple(range(at, at + pieces))))
        at += pieces
    return words


def place(words, columns, rule, frame_hz=12.5):
    return duplex.place_words(words, columns, frame_hz=frame_hz, pad=3, epad=0, rule=rule).tolist()


@QUICK
@given(transcripts())
def test_waiting_rules_lose_no_piece(words):
    pieces = [i for word in words for i in word.ids]
    for rule in ('paper', 'shift'):
        row = place(words, 41 + 1 + len(pieces), rule)
        assert [i for i in row if i >= 100] == pieces
        for word in words:      # never early
            assert row.index(word.ids[0]) >= round(word.start_s * 12.5)
        for t, i in enumerate(row):     # EPAD stands before a first piece, and only there
            if i == 0:
                assert row[t + 1] in {word.ids[0] for word in words}
    row = place(words, 60, 'queue')
    written = [i for i in row if i >= 100]
    assert written == sorted(written), 'the queue loses pieces and never reorders them'
    if words:
        assert written[-len(words[-1].ids):] == list(words[-1].ids)


@QUICK
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), max_size=8), st.integers(0, 3))
def test_paper_rule_is_its_equation_when_words_have_room(shape, first):
    """2410.00037 eq. 4, executed as printed: W[t_i - 1] = EPAD, then W[t_i + j] = w_ij."""
    words, t = [], first
    for pieces, gap in shape:
        words.append(Word('', 0, t / 12.5, (t + pieces) / 12.5, tuple(range(100, 100 + pieces))))
        t += pieces + gap + (t == 0)
    want = [3] * (t + 2)
    for word in words:
        start = round(word.start_s * 12.5)
        shift = start == 0
        if want[start - 1 + shift] == 3:
            want[start - 1 + shift] = 0
        want[start + shift:start + shift + len(word.ids)] = word.ids
    assert place(words, t + 2, 'paper') == want


def test_single_precision_times_move_no_word():
    words = [Word('', 0, float(np.float32(t / 12.5)), 99., (100 + t,)) for t in range(1, 900)]
    for rule in ('paper', 'queue', 'shift'):
        assert place(words, 900, rule) == [0, *range(101, 1000)]
    assert place([Word('', 0, .24, 1., (100,))], 8, 'paper', frame_hz=25.) == [3, 3, 3, 3, 3, 0,
                                                                              100, 3]


@st.composite
def dialogues(draw):
    frames, channels = draw(st.integers(0, 12)), draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    words = [Word('w', int(rng.integers(channels)), t / 12.5, (t + .5) / 12.5, (7, 8))
             for t in range(0, frames, draw(st.integers(1, 4)))]
    return record(words=words, codes=rng.integers(0, 2048, (channels, 2, frames)).astype(np.int16))


@QUICK
@given(dialogues(), st.integers(0, 4), st.integers(-4, 4), st.sampled_from([TWO, ONE, BOTH, HEARD]),
       st.sampled_from(['mine', 'theirs', 'none']))
def test_invariants(example, acoustic, text_delay, vocab, text):
    both = vocab is BOTH
    grid = draw(example, vocab, acoustic_delay_columns=acoustic, text_delay_columns=text_delay,
                text=text, weight_text=2., weight_pad=.25, weight_epad=.5, weight_semantic=8.,
                weight_acoustic=3., weight_theirs=.5 * both)
    late = duplex.delays(vocab, acoustic_delay_columns=acoustic, text_delay_columns=text_delay)
    frames = example.codes.shape[-1]
    assert min(late) >= 0 and grid.tokens.shape == (len(vocab.rows), frames + 1)

    # Column 0, initial tokens and nothing are never scored; ids stay inside their rows.
    starts = np.array([initial(row) for row in vocab.rows])[:, None]
    assert np.array_equal(grid.tokens[:, :1], starts)
    assert not grid.weights[:, 0].any()
    assert not grid.weights[(grid.tokens == starts) | (grid.tokens == NOTHING)].any()
    for row, ids in zip(vocab.rows, grid.tokens, strict=True):
        assert ((ids == NOTHING) | ((ids >= row.start) & (ids < row.start + row.size))).all()

    # Undoing delays returns the input, and the weights add up to what the options promise.
    aligned = duplex.undelay(grid.tokens, late)
    promised = 0.0
    for k, row in enumerate(vocab.rows):
        kept = max(0, frames - late[k])
        assert (aligned[k, kept:] == NOTHING).all()
        speaker, _, codebook = row.name.partition(' ')
        if speaker == 'text':
            alphas = [{3: .25, 0: .5, NOTHING: 0.}.get(i, 2.) for i in aligned[0].tolist()]
            promised += sum(alphas)
            continue
        channel = int(speaker == 'theirs')
        if channel >= len(example.codes):
            assert (aligned[k] == NOTHING).all()
            continue
        assert np.array_equal(aligned[k, :kept] - row.start,
                              example.codes[channel, int(codebook), :kept])
        promised += bool(row.predicted) * kept * (8. if codebook == '0' else 3.) * (
            .5 if channel else 1.)
    assert grid.weights.sum() == pytest.approx(promised)


def test_delay_and_undelay_take_batches():
    late = duplex.delays(TWO, acoustic_delay_columns=2, text_delay_columns=1)
    assert late == (1, 0, 2, 0, 2)
    assert duplex.delays(TWO, acoustic_delay_columns=1, text_delay_columns=-3) == (0, 3, 4, 3, 4)
    frames = np.arange(2 * 5 * 6).reshape(2, 5, 6)
    columns = duplex.delay(frames, TWO, late)
    assert columns.shape == (2, 5, 7) and np.array_equal(columns[1], duplex.delay(frames[1], TWO,
                                                                                 late))
    back = duplex.undelay(columns, late)
    assert np.array_equal(back[..., :4], frames[..., :4])
    assert (back[:, 2, 4:] == NOTHING).all() and np.array_equal(back[:, 1], frames[:, 1])


def test_channels_are_chosen():
    words = [Word('w', c, .16, .2, (7 + c,)) for c in (0, 1)]
    example = record(words=words)
    for mine in (0, 1):
        grid = draw(example, TWO, mine=mine)
        assert grid.tokens[1, 1] - TWO.rows[1].start == 10 + 20 * mine
        assert grid.tokens[3, 1] - TWO.rows[3].start == 30 - 20 * mine
        assert grid.tokens[0, 3] == 7 + mine
    grid = draw(example, TWO, theirs='none')
    assert (grid.tokens[3, 1:] == NOTHING).all()
    grid = draw(example, TWO, mine=1, theirs=1, text='theirs')
    assert grid.tokens[0, 3] == 8 and grid.tokens[3, 1] - TWO.rows[3].start == 30
    rng = np.random.default_rng(0)
    seen = {int(duplex.columns(example, vocab=TWO, rng=rng, mine='random').tokens[0, 3])
            for _ in range(20)}
    assert seen == {7, 8}


def test_silence_is_not_a_missing_transcript():
    """A speaker who says nothing has a row of padding; a record without words has an empty row."""
    silent = record(words=[Word('w', 1, .16, .2, (7,))])
    assert draw(silent, TWO).tokens[0].tolist() == [32_000, 3, 3, 3, 3]
    assert draw(record(words=[]), TWO).tokens[0].tolist() == [32_000, -1, -1, -1, -1]
    assert draw(silent, TWO, text='none').tokens[0].tolist() == [32_000, -1, -1, -1, -1]


def test_text_is_dropped_as_often_as_asked():
    rng = np.random.default_rng(0)
    lost = [not duplex.columns(record(), vocab=TWO, rng=rng, drop_text=.3).weights[0].any()
            for _ in range(400)]
    assert np.mean(lost) == pytest.approx(.3, abs=.05)


def test_heard_cells_are_masked_as_often_as_asked():
    """Only the other speaker's cells go, one by one, and what is mine stays to the bit."""
    plain, masked = (draw(record(frames=2000), TWO, mask_theirs=p) for p in (0., .2))
    changed = plain.tokens != masked.tokens
    assert (masked.tokens[changed] == NOTHING).all() and not changed[:3].any()
    assert .17 < changed[3:].mean() < .23 and (changed[3] != changed[4]).any()
    np.testing.assert_array_equal(plain.weights, masked.weights)


def test_rules_and_rates_reach_the_grid():
    crowded = record(frames=6, words=[Word('a', 0, .08, .16, (7, 8, 7)),
                                      Word('b', 0, .24, .4, (8,))])
    assert draw(crowded, TWO, text_rule='queue').tokens[0].tolist() == [32_000, 0, 7, 8, 8, 3, 3]
    assert draw(crowded, TWO, text_rule='shift').tokens[0].tolist() == [32_000, 0, 7, 8, 7, 8, 3]
    assert draw(crowded, TWO, frame_hz=25.).tokens[0].tolist() == [32_000, 3, 0, 7, 8, 7, 3]


@pytest.mark.parametrize('call, message', [
    (lambda: draw(record(), TWO, text_rule='word'),
     "layout.text_rule must be one of paper, queue, shift, got 'word'"),
    (lambda: draw(record(), TWO, text='both'), 'layout.text must be mine, theirs or none'),
    (lambda: draw(record(), TWO, mine=2), r'layout.mine must be .* 0\.\.1 of record call 3, got 2'),
    (lambda: draw(record(), TWO, mine='other'), 'layout.mine must be'),
    (lambda: draw(record(1), TWO, theirs=1), 'layout.theirs must be'),
    (lambda: draw(record(3), TWO), "call 3 has 3 channels: layout.theirs must be a number"),
    (lambda: draw(record(), TWO, drop_text=1.5), 'layout.drop_text is a probability, got 1.5'),
    (lambda: draw(record(), TWO, acoustic_delay_columns=-1), 'layout.acoustic_delay_columns'),
    (lambda: draw(record(), TWO, weight_pad=-1.), 'layout.weight_pad must be finite and not neg'),
    (lambda: draw(record(), TWO, weight_acoustic=np.nan), 'layout.weight_acoustic must be fin'),
    (lambda: draw(record(), TWO, weight_theirs=1.), 'add it to vocab.predicted'),
    (lambda: draw(record(codes=codes(2, 4)[:, :1]), TWO),
     "call 3 has 1 codebooks, the vocabulary has a row 'mine 1'"),
    (lambda: draw(record(codes=codes(2, 4)[0]), TWO), r'codes must be \[C, K, T\]'),
    (lambda: draw(record(codes=codes(2, 4) + 2030), TWO),
     r'call 3: mine 1 ids must lie in 0\.\.2047, got 2050\.\.2053'),
    (lambda: draw(record(words=[Word('w', 0, .1, .2, (32_000,))]), TWO),
     r'call 3: text ids must lie in 0\.\.31999'),
    (lambda: draw(record(words=[Word('w', 0, .1, .2)]), TWO), "call 3: the word 'w' has no ids"),
    (lambda: draw(record(codes=None, units=(np.zeros(4, np.int16),)), TWO),
     'call 3 has audio but no codes'),
    (lambda: draw(record(), vocabs.line({'size': 9}, text_tokens=9)),
     'needs the vocabulary of vocab.streams'),
    (lambda: draw(record(), vocabs.streams(CODEC, text_tokens=9, speakers=('me',),
                                           predicted=('me',))),
     'vocab.speakers must be among mine, theirs'),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Units of two speakers, and words that are moved.

def test_edges_weigh_and_held_units_do_not():
    """By hand: 5 5 5 7 9 9 beside 2 2 4 4 4 4; the first unit of all is an edge."""
    pair = vocabs.parallel({'size': 10, 'codebooks': 1}, text_tokens=0, rows=('mine 0', 'theirs 0'))
    example = Record('call', 'toy', 'en', .24, units=(np.array([5, 5, 5, 7, 9, 9], np.int16),
                                                      np.array([2, 2, 4, 4, 4, 4], np.int16)))
    def of(**options):
        return duplex.units(example, vocab=pair, rng=np.random.default_rng(0), **options)
    grid = of()
    assert grid.tokens.tolist() == [[10, 5, 5, 5, 7, 9, 9], [21, 13, 13, 15, 15, 15, 15]]
    assert grid.weights.tolist() == [[0, 1, 0, 0, 1, 1, 0], [0, 1, 0, 1, 0, 0, 0]]
    assert of(weight_held=.5).weights[0].tolist() == [0, 1, .5, .5, 1, 1, .5]
    assert of(mine=1).tokens[0].tolist() == [10, 2, 2, 4, 4, 4, 4]
    firsts = {duplex.units(example, vocab=pair, rng=np.random.default_rng(i), mine='random'
                           ).tokens[0, 1] for i in range(9)}
    assert firsts == {5, 2}
    for bad, message in ((dict(vocab=TWO), 'needs vocab.parallel without text'),
                         (dict(mine=2), "layout.mine is 0, 1 or 'random'")):
        with pytest.raises(ValueError, match=message):
            duplex.units(example, **dict(vocab=pair, rng=np.random.default_rng(0)) | bad)
    with pytest.raises(ValueError, match='units of 1 channels'):
        duplex.units(Record('r', 'toy', 'en', 1., units=(np.zeros(3, np.int16),)), vocab=pair,
                     rng=np.random.default_rng(0))


def test_words_are_moved_by_one_draw_and_sound_is_not():
    example = record(1, 40, [Word('a', 0, 1.2, 1.3, (7,)), Word('b', 0, 1.6, 1.7, (8,))])
    still = draw(example, ONE)
    at = set()
    for seed in range(40):
        moved = duplex.columns(example, vocab=ONE, rng=np.random.default_rng(seed),
                               text_shift_s=.6)
        np.testing.assert_array_equal(moved.tokens[1:], still.tokens[1:])
        a, b = (int(np.flatnonzero(moved.tokens[0] == ONE.rows[0].start + i)[0]) for i in (7, 8))
        assert b - a in (4, 5, 6)       # 5 frames apart, by rounding
        at.add(a - 16)
    assert min(at) in (-8, -7, -6) and max(at) in (6, 7, 8) and len(at) > 8
    with pytest.raises(ValueError, match='layout.text_shift_s must not be negative'):
        draw(example, ONE, text_shift_s=-1.)

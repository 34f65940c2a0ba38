# SPDX-License-Identifier: Apache-2.0
"""Two speakers in one row: is nothing lost or doubled where one chunk of time meets the next?"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsd import vocab as vocabs
from jaxsd.layout import chunks, flat
from jaxsd.types import Record, Turn, Word

QUICK = settings(derandomize=True, max_examples=80, deadline=None)
V = vocabs.line({'size': 501}, text_tokens=200,
                markers=('[S0]', '[S1]', '[Silent text]', '[Silent speech]'))
S0, S1 = V.specials['[S0]'], V.specials['[S1]']
QUIET_TEXT, QUIET = V.specials['[Silent text]'], V.specials['[Silent speech]']
FIRST = V.ranges['units'][0]


def talk(a, b, **more) -> Record:
    return Record('talk', 'toy', 'en', len(a) / 25, units=(np.array(a), np.array(b)), **more)


def synchronous(record, seed: int = 0, **options) -> np.ndarray:
    return chunks.synchronous(record, vocab=V, rng=np.random.default_rng(seed), **options).tokens[0]


def test_the_papers_own_example():
    """arXiv 2409.15594 Fig. 3: chunks of 160 ms, repeats left out across their borders too."""
    record = talk([75] * 4 + [17, 17, 338, 338] + [338] * 4, [89] * 8 + [9] * 4)
    row = synchronous(record, chunk_frames=4).tolist()
    u = FIRST
    assert row == [1, S0, 75 + u, S1, 89 + u, S0, 17 + u, 338 + u, S0, S1, 9 + u]
    grid = chunks.synchronous(record, vocab=V, rng=None)
    assert grid.weights[0].tolist() == [0.0] + [1.0] * 10       # the user's side is learned too
    back = chunks.interpolate(np.array(row), V, chunk_frames=4)
    np.testing.assert_array_equal(back, [*map(np.array, record.units)])
    swapped = synchronous(record, chunk_frames=4, mine=1).tolist()
    assert swapped == [1, S0, 89 + u, S1, 75 + u, S0, S1, 17 + u, 338 + u, S0, 9 + u]
    rows = {tuple(synchronous(record, seed, mine='random')) for seed in range(20)}
    assert rows == {tuple(row), tuple(swapped)}


def test_where_both_speak_is_cut_out():
    """Of twelve frames the first speaks in 0 to 5, the other in 4 to 11: 4 and 5 are nobody's."""
    record = talk(range(12), range(100, 112), turns=(Turn(0, 0.0, 6 / 25, 'a'),
                                                     Turn(1, 4 / 25, 12 / 25, 'b')))
    row = synchronous(record, chunk_frames=5, overlaps=False).tolist()
    u, left = FIRST, [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]
    assert row == [1, S0, *(n + u for n in left[:5]), S1, *(100 + n + u for n in left[:5]),
                   S0, *(n + u for n in left[5:]), S1, *(100 + n + u for n in left[5:])]
    assert len(synchronous(record, chunk_frames=5)) == len(row) + 4 + 2


streams = st.integers(1, 40).flatmap(lambda n: st.tuples(
    st.lists(st.integers(0, 3), min_size=n, max_size=n),
    st.lists(st.integers(0, 3), min_size=n, max_size=n)))


@QUICK
@given(streams, st.integers(1, 7))
def test_each_speaker_says_each_run_once(pair, chunk_frames):
    record = talk(*pair)
    row = synchronous(record, chunk_frames=chunk_frames)
    said, clock, who = ([], []), 0, None
    for token in row[1:].tolist():
        if token in (S0, S1):
            clock += token == S0
            who = int(token == S1)
        else:
            said[who].append(token - FIRST)
    assert clock == -(-len(pair[0]) // chunk_frames)            # the clock never misses a beat
    for units, runs in zip(pair, said, strict=True):
        assert runs == flat.runs(units)[0].tolist()
    # Filled to their lengths, chunks hold the same new units: written again, the row is the same.
    back = chunks.interpolate(row, V, chunk_frames=chunk_frames)
    assert back.shape == (2, clock * chunk_frames) and back.min() >= 0
    np.testing.assert_array_equal(synchronous(talk(*back), chunk_frames=chunk_frames), row)


@QUICK
@given(streams, st.integers(1, 7), st.integers(1, 6))
def test_a_chunk_depends_on_nothing_later(pair, chunk_frames, kept):
    row = synchronous(talk(*pair), chunk_frames=chunk_frames)
    cut = [units[:kept * chunk_frames] for units in pair]
    shorter = synchronous(talk(*cut), chunk_frames=chunk_frames)
    np.testing.assert_array_equal(row[:len(shorter)], shorter)


def test_a_remainder_goes_to_the_earlier_units():
    row = np.array([1, S0, FIRST, FIRST + 1, FIRST + 2, S0, S1, FIRST + 7])
    assert chunks.interpolate(row, V, chunk_frames=4).tolist() == [
        [0, 0, 1, 2, 2, 2, 2, 2], [-1, -1, -1, -1, 7, 7, 7, 7]]


# Chunks of fixed width.

@st.composite
def dialogues(draw):
    """My turns with words of one to three pieces, each id once, on 10 to 60 frames."""
    frames = draw(st.integers(10, 60))
    words, turns, t, piece = [], [], draw(st.integers(0, 8)), 0
    while t + 4 <= frames:
        length = draw(st.integers(2, 6))
        begun = t
        for _ in range(draw(st.integers(1, 4))):
            stop = min(frames, t + length)
            ids = tuple(range(5 + piece, 5 + piece + draw(st.integers(1, 3))))
            piece += len(ids)
            words.append(Word('w', 0, t / 25, stop / 25, ids))
            t = stop
        turns.append(Turn(0, begun / 25, t / 25, ''))
        t += draw(st.integers(1, 20))
        turns.append(Turn(1, (t - 1) / 25, t / 25, ''))
    units = draw(st.lists(st.integers(0, 500), min_size=2 * frames, max_size=2 * frames))
    return talk(units[:frames], units[frames:], words=tuple(words), turns=tuple(turns))


@QUICK
@given(dialogues(), st.integers(1, 8), st.integers(1, 3))
def test_positions_are_times(record, chunk_frames, chunk_text):
    grid = chunks.flattened(record, vocab=V, rng=None, chunk_frames=chunk_frames,
                            chunk_text=chunk_text)
    frames, wide = len(record.units[0]), 2 * chunk_frames + chunk_text
    row, weights = grid.tokens[0, 1:], grid.weights[0, 1:]
    assert len(row) % wide == 0
    table, scored = row.reshape(-1, wide), weights.reshape(-1, wide)
    theirs, text, mine = np.split(table, [chunk_frames, chunk_frames + chunk_text], axis=1)
    assert not scored[:, :chunk_frames].any() and scored[:, chunk_frames:].all()
    np.testing.assert_array_equal(theirs.reshape(-1)[:frames] - FIRST, record.units[1])
    talking = np.zeros(frames, bool)
    for turn in record.turns:
        if turn.channel == 0:
            talking[round(turn.start_s * 25):round(turn.end_s * 25)] = True
    own = mine.reshape(-1)
    np.testing.assert_array_equal(own[:frames] == QUIET, ~talking)
    np.testing.assert_array_equal(own[:frames][talking] - FIRST, record.units[0][talking])
    assert (own[frames:] == QUIET).all() and (theirs.reshape(-1)[frames:] == QUIET).all()
    said = text.reshape(-1)
    pieces = [i for w in record.words for i in w.ids]
    assert said[said != QUIET_TEXT].tolist() == pieces          # all of it, once and in order
    at = {int(p): i // chunk_text for i, p in enumerate(said) if p != QUIET_TEXT}
    for turn in record.turns:
        if turn.channel == 0:       # never before I begin to speak
            own = [i for w in record.words if turn.start_s <= w.start_s < turn.end_s for i in w.ids]
            assert all(at[i] >= int(turn.start_s * 25 + 1e-3) // chunk_frames for i in own)


def test_streams_may_be_left_out_and_put_in_order():
    record = talk([1] * 6, [2] * 6, turns=(Turn(0, 0.0, 0.24, ''), Turn(1, 0.24, 0.24, '')),
                  words=(Word('w', 0, 0.0, 0.2, (9,)),))

    def row(*names):
        return chunks.flattened(record, vocab=V, rng=None, streams=names, chunk_frames=3,
                                chunk_text=1).tokens[0, 1:].tolist()
    a, b = FIRST + 1, FIRST + 2
    assert row('theirs', 'mine') == [b, b, b, a, a, a] * 2
    assert row('mine', 'theirs') == [a, a, a, b, b, b] * 2
    assert row('theirs', 'text', 'mine') == [b, b, b, 9, a, a, a, b, b, b, QUIET_TEXT, a, a, a]


@pytest.mark.parametrize('call, says', [
    (lambda r: synchronous(r, chunk_frames=0), 'layout.chunk_frames must be at least 1, got 0'),
    (lambda r: synchronous(r, mine=3), 'layout.mine must be 0, 1 or random'),
    (lambda r: synchronous(r, speakers=('[S0]', '[S9]')), r'talk: the layout needs \[S9\]'),
    (lambda r: synchronous(Record('one', 'toy', 'en', 1.0, units=(np.arange(3),))),
     'record one: it has 1 channels of units, a dialogue has two'),
    (lambda r: chunks.flattened(r, vocab=V, rng=None, streams=('mine', 'ours')),
     'layout.streams names streams among theirs, text, mine')])
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call(talk([1, 2], [3, 4]))

# SPDX-License-Identifier: Apache-2.0
"""Are turns counted as their definitions say, and is every kind of exchange recognized?"""

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from jaxsd import dialogue, turns
from jaxsd.turns import Coped, Stretch

HZ = 10.0       # a frame is 0.1 s, so that 0.2 s is two frames


def drawn(mine: str, theirs: str) -> np.ndarray:
    """Activity of two lines of text: anything but a dot is speech."""
    n = max(len(mine), len(theirs))
    return np.array([[c != '.' for c in line.ljust(n, '.')] for line in (mine, theirs)])


def kinds(mine, theirs):
    return [(kind, t.channel) for kind, t in turns.kinds(drawn(mine, theirs), HZ)]


# Counting.

def test_a_dialogue_counted_by_hand():
    """A silence of 0.1 s joins, one of 0.2 s does not. Of my two units and their one:

        mine    ..aaa.aa..aaa.......
        theirs  ............bbb...b.
    """
    found = turns.tally(drawn('..aaa.aa..aaa.......', '............bbb...b.'), HZ)
    assert found.events == dict(ipu=4, pause=2, gap=0, overlap=1)
    assert found.frames == dict(ipu=6 + 3 + 3 + 1, pause=2 + 3, gap=0, overlap=1)
    assert found.edge == 2 + 1 and found.total == 20
    minute = turns.per_minute([found, found], HZ)
    assert minute['ipus/min'] == pytest.approx(4 / 20 * 600)
    assert minute['overlap s/min'] == pytest.approx(0.1 / 2 * 60)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60),
       st.sampled_from([12.5, 10.0, 25.0, 50.0]))
def test_everything_is_counted_once(pairs, hz):
    """The identity of the module's docstring, and every event by brute force over frames."""
    active = np.array(pairs, bool).T
    found = turns.tally(active, hz)
    f = found.frames
    assert f['ipu'] + f['pause'] + f['gap'] - f['overlap'] + found.edge == found.total
    whole = active.copy()
    for c in (0, 1):            # silences that are too short, found one by one
        for a in range(found.total):
            for b in range(a + 1, found.total):
                if active[c, a] and active[c, b] and not active[c, a + 1:b].any() \
                        and (b - a - 1) / hz < 0.2 - 1e-9:
                    whole[c, a:b] = True
    assert f['ipu'] == whole.sum() and f['overlap'] == whole.all(0).sum()
    silent = ~whole.any(0)
    assert f['pause'] + f['gap'] + found.edge == silent.sum()
    pauses = 0
    for t in np.flatnonzero(silent):
        before = [u for u in range(t) if whole[:, u].any()]
        after = [u for u in range(t, found.total) if whole[:, u].any()]
        if before and after:
            pauses += bool((whole[:, before[-1]] & whole[:, after[0]]).any())
    assert f['pause'] == pauses
    # Turns hold the units of their speaker, and nobody speaks between two units of one.
    for t in turns.turns(active, hz):
        assert whole[t.channel, t.start] and whole[t.channel, t.end - 1]
        inside = whole[:, t.start:t.end]
        assert not (inside[1 - t.channel] & ~inside[t.channel])[
            ~inside[t.channel]].any()


def test_floor_transfers_of_all_turns():
    """A gap of 0.3 s, an overlap of 0.2 s; what lies inside a turn changes nothing."""
    found = turns.transfers(drawn('aaaaa..........aaaa....', '.b......bbbbbbbbb......'), HZ)
    assert found == [(1, pytest.approx(0.3)), (0, pytest.approx(-0.2))]


# Kinds.

@pytest.mark.parametrize(('mine', 'theirs', 'wanted'), [
    ('aaaaaa...............', '.........bbbbbbbbbbbb', [('opening', 0), ('smooth', 1)]),
    ('aaaaaa...............', '.....bbbbbbbbbbbb....', [('opening', 0), ('smooth', 1)]),
    ('aaaaaaaaa............', '.....bbbbbbbbbbbb....', [('opening', 0), ('interruption', 1)]),
    ('aaaaaaaaaaaaaaaaaaaa.', '.....bbb.............', [('opening', 0), ('backchannel', 1)]),
    ('aaaaaaaaaaaaaaaaaaaa.', '.....bbbbbbbbbb......', [('opening', 0), ('attempt', 1)]),
    ('aaaaaa...aaaaaaaa....', '.....................', [('opening', 0)]),        # a pause
    ('aaaaaa...aaaaaaaa....', '.......b.............',
     [('opening', 0), ('smooth', 1), ('smooth', 0)]),
    ('aaaa....aaaa...aaa...', '.....b....bbbbbbbbbbbb',
     [('opening', 0), ('smooth', 1), ('smooth', 0), ('interruption', 1), ('backchannel', 0)]),
    ('aaaaaaaaaaaaaaaaa....', '.bbbbbbbbbb....bbbbbb',
     [('opening', 0), ('attempt', 1), ('interruption', 1)]),        # the floor was never theirs
], ids=['smooth', 'just in time', 'interruption', 'backchannel', 'attempt', 'pause', 'one word',
        'all together', 'after an attempt'])
def test_kinds_of_turns(mine, theirs, wanted):
    assert kinds(mine, theirs) == wanted
    swapped = [(kind, 1 - c) for kind, c in kinds(theirs, mine)]
    assert swapped == wanted        # nothing depends on whose channel comes first


def test_who_begins_and_ends_with_another_lies_in_nobodys_turn():
    assert kinds('..aaaaa..', '..bbbbb..') == [('opening', 0), ('interruption', 1)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_floor_changes_hands(pairs):
    """Leaving out what takes no floor, nobody has two turns in a row, and the first one opens."""
    found = turns.kinds(np.array(pairs, bool).T, HZ)
    kept = [(k, t.channel) for k, t in found if k not in ('attempt', 'backchannel')]
    assert [k == 'opening' for k, _ in kept] == [True] * bool(kept) + [False] * (len(kept) - 1)
    assert all(a != b for (_, a), (_, b) in zip(kept, kept[1:], strict=False))


def test_more_than_three_words_are_no_backchannel():
    active = drawn('aaaaaaaaaaaaaaaaaaaa.', '.....bbb.............')
    for count, kind in ((3, 'backchannel'), (4, 'attempt')):
        said = [5, 5, 6, 7][:count]
        assert turns.kinds(active, HZ, ([0], said))[1][0] == kind


# How a model copes.

def coped(mine, theirs, spans, **options):
    return turns.coped(drawn(mine, theirs), spans, HZ, **options)


def test_an_answer_after_their_end():
    mine, theirs = '.............aaaaaaaaaaaa', 'bbbbbbbbbb...............'
    assert coped(mine, theirs, [(0, 1)]) == [Coped('turn', True, pytest.approx(0.3))]
    assert coped('.............aaa........', theirs, [(0, 1)]) == [Coped('turn', False)]
    # Three words in less than a second are no takeover, four are, and text without a word is none.
    for words, took in (([13, 14, 15], False), ([13, 14, 15, 15], True)):
        assert coped('.............aaa........', theirs, [(0, 1)], words=words)[0].takeover is took
    assert not coped(mine, theirs, [(0, 1)], words=[])[0].takeover
    # A word may be written 0.2 s before it is heard.
    for word, took in ((11, True), (10, False), (24, True), (25, False)):
        assert coped(mine, theirs, [(0, 1)], words=[word])[0].takeover is took
    # What comes after they have spoken again answers that.
    assert coped('.' * 25 + 'a' * 12, 'b' * 10 + '.' * 10 + 'bbb', [(0, 1), (2, 2.3)]) == [
        Coped('turn', False), Coped('turn', True, pytest.approx(0.2))]
    # Nobody interrupts who begins at once.
    assert coped('.....aaaaaaaa', '.....' + 'b' * 12 + '.' * 10, [(0.5, 1.7)])[0].kind == 'turn'
    # Nor who begins in the last 0.2 s of mine.
    for last, kind in ((9, 'turn'), (10, 'interruption')):
        found = coped('a' * last, '........bbbbbbbbbbbb..........', [(0.8, 2.0)])
        assert [c.kind for c in found] == [kind]
    # Where less than a second is left nobody is judged.
    assert coped(mine, 'bbbbbbbbbb..........', [(0, 1)])
    assert not coped('.' * 13, 'bbbbbbbbbb.........', [(0, 1)])
    # 'uh huh' in the middle is no answer, nor a reason to call the answer early.
    assert coped('....a........aaaaaaaaaaaa', theirs, [(0, 1)])[0].latency_s == pytest.approx(0.3)
    # Who begins before their end and goes on is not late.
    assert coped('.........aaaaaaaaaaaa....', theirs, [(0, 1)])[0].latency_s == 0.0


def test_a_second_takes_the_floor():
    for frames, took in ((9, False), (10, True)):
        assert coped('.' * 13 + 'a' * frames, 'b' * 10, [(0, 1)])[0].takeover is took
        found = coped('a' * 40, '........' + 'b' * frames, [(0.8, 0.8 + frames / HZ)])
        assert found[0].kind == ('interruption' if took else 'murmur')


def test_a_second_is_from_the_first_sound_to_the_last():
    """With silences between, as the benchmark counts; and what is short in frames of 80 ms."""
    for line, took in (('aaaa..aaaa', True), ('aaaa..aaa', False)):
        assert coped('.' * 13 + line, 'b' * 10, [(0, 1)])[0].takeover is took
    active = drawn('a' * 12 + '.' * 6 + 'a' * 24, '.' * 8 + 'b' * 16)
    found, = turns.coped(active, [(.64, 1.92)], 12.5)       # 0.48 s of silence are a breath
    assert found.stop_s == pytest.approx(1.28) and found.through
    active = drawn('a' * 12 + '.' * 7 + 'a' * 24, '.' * 8 + 'b' * 16)
    assert turns.coped(active, [(.64, 1.92)], 12.5)[0].stop_s == pytest.approx(.32)


def test_a_pause_is_theirs():
    theirs = 'bbbbb.......bbbbb..................'
    waited = coped('...................aaaaaaaaaaaa', theirs, [(0, 1.7)])
    assert waited == [Coped('pause', False), Coped('turn', True, pytest.approx(0.2))]
    hasty = coped('.......aaaaaaaaaaaaaaaaaaaaaaaa', theirs, [(0, 1.7)])
    assert hasty[0] == Coped('pause', True)
    assert hasty[1] == Coped('turn', True, 0.0)
    early = coped('....aaaaaaaaaaa................', theirs, [(0, 1.7)])    # before they paused
    assert early[0] == Coped('pause', True)
    assert coped('..aaa.............', theirs, [(0, 1.7)])[0] == Coped('pause', False)
    assert not coped('..aaa............', theirs, [(0, 1.7)], words=[2, 3, 3, 4])[0].takeover


def test_they_interrupt():
    """I stop after 0.4 s, wait until they have ended, and answer half a second later."""
    theirs = '........bbbbbbbbbbbbbbbb'
    found = coped('aaaaaaaaaaaa.................aaaaaaaaaaa', theirs, [(0.8, 2.4)])
    assert found == [Coped('interruption', True, pytest.approx(0.5), pytest.approx(0.4))]
    deaf = coped('a' * 40, theirs, [(0.8, 2.4)])
    assert deaf == [Coped('interruption', True, 0.0, pytest.approx(1.6), True)]
    mute = coped('aaaaaaaaaaaa', theirs + '.' * 10, [(0.8, 2.4)])
    assert mute[0].takeover is False and mute[0].stop_s == pytest.approx(0.4)
    slow = coped('a' * 18 + '.' * 9 + 'a' * 12, theirs, [(0.8, 2.4)])      # keeps on for 1 s
    assert slow[0].takeover and slow[0].stop_s == pytest.approx(1.0)
    assert [x[0].gave_way for x in (found, deaf, mute, slow)] == [True, False, False, False]
    assert not coped('.' * 26 + 'a' * 12, theirs, [(0.8, 2.4)])[0].gave_way     # no interruption
    # To catch one's breath is not to stop: 0.4 s of silence are filled, 0.5 s are not.
    for silent, went_on_s in ((4, 1.6), (5, 0.4)):
        breath = coped('a' * 12 + '.' * silent + 'a' * 24, theirs, [(0.8, 2.4)])
        assert breath[0].stop_s == pytest.approx(went_on_s)
        assert breath[0].gave_way == (silent == 5)
    murmur = coped('a' * 12 + '....aaa..........aaaaaaaaaaa', theirs, [(0.8, 2.4)])
    assert murmur[0].stop_s == pytest.approx(0.4) and murmur[0].gave_way


def test_they_murmur():
    theirs = '........bbb............'
    assert coped('a' * 30, theirs, [(0.8, 1.1)]) == [Coped('murmur', True)]
    assert coped('aaaaaaaaaa....................', theirs, [(0.8, 1.1)]) == [Coped('murmur', False)]
    assert coped('aaaaaaaaaa....aaaa............', theirs, [(0.8, 1.1)]) == [Coped('murmur', True)]
    again = 'bbb............bbb'        # what I say after they spoke again went on with nothing
    assert coped('aaa' + '.' * 19 + 'aaa....', '.' + again, [(.1, .4), (1.6, 1.9)]) == [
        Coped('murmur', False), Coped('turn', False)]
    assert coped('a' * 30, theirs, [(0.8, 1.1)], murmurs=[False])[0].kind == 'interruption'
    assert coped('aaa...........................', theirs, [(0.8, 1.1)], murmurs=[True]) == []


def test_my_backchannels():
    theirs = 'b' * 40
    assert turns.backchannels(drawn('.....aa........aa....', theirs), HZ) == ([5, 15], False)
    assert turns.backchannels(drawn('.....aaaaaaaaaaaaaaaa', theirs), HZ) == ([], True)
    assert turns.backchannels(drawn('.....aa', theirs), HZ, [5, 5, 6, 6]) == ([], True)
    assert turns.backchannels(drawn('.....aa', theirs), HZ, [5, 5, 6]) == ([5], False)
    assert turns.backchannels(drawn('a' * 20, '.....bbbbbbbbbb'), HZ) == ([], False)    # theirs
    assert turns.backchannels(drawn('.' * 35 + 'a' * 20, theirs), HZ) == ([], True)


def test_timing_is_scipys_distance():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 100, 40), rng.integers(0, 100, 50)
    p, q = (np.bincount(x // 2, minlength=50) for x in (a, b))      # two frames are a bin
    assert turns.timing_distance(a, b, 100, HZ) == pytest.approx(jensenshannon(p, q))
    assert turns.timing_distance([], b, 100, HZ) == 1.0
    assert turns.timing_distance(a, a, 100, HZ) == 0.0


def test_repeats():
    assert turns.repetition([['a', 'b', 'c', 'd'], ['a', 'b', 'c']]) == 0.0
    assert turns.repetition([['a', 'b', 'c', 'a', 'b', 'c']]) == pytest.approx(1 / 4)
    assert turns.repetition([['a']]) == 0.0


# Activity.

def test_what_is_silence_is_learned_from_what_is_known():
    codes = [np.array([7, 7, 3, 4, 7, 3]), np.array([7, 5, 5, 4])]
    heard = [np.array([0, 0, 1, 1, 0, 0], bool), np.array([1, 0, 0, 1], bool)]
    silent = turns.silent_codes(codes, heard)
    assert silent == {5, 7}         # 3 was heard as often as not
    assert turns.voiced(np.array([[3, 5, -1, 7]]), silent).tolist() == [[True, False, False, False]]


def test_sound_is_heard_where_it_is():
    rate, rng = 16000, np.random.default_rng(0)
    wav = 1e-4 * rng.standard_normal(4 * rate)
    wav[rate:2 * rate] += 0.1 * np.sin(np.arange(rate))
    wav[3 * rate:int(3.3 * rate)] += 0.02 * np.sin(np.arange(int(0.3 * rate)))
    found = turns.loud(wav, rate, 12.5)
    for odd in (11025, 22050, 8000, 44100):         # hops of 10 ms that are no whole samples
        late = np.zeros(112 * odd)
        late[100 * odd:110 * odd] = .1 * np.sin(np.arange(10 * odd))
        assert turns.spans(turns.loud(late, odd, 12.5)) == [(1250, 1375)]
    assert turns.spans(found) == [(12, 25), (37, 42)]      # 1 to 2 s and 3 to 3.3 s, whole frames
    assert not turns.loud(np.zeros(rate), rate, 12.5).any()
    assert turns.units(np.stack([found, ~found]), 12.5)[0] == Stretch(1, 0, 12)


def test_a_recording_of_two_channels(tmp_path, capsys):
    """They speak for 2 s, I answer 0.4 s later for 3 s, they murmur for 0.4 s."""
    rate = 22050
    wav = np.zeros((8 * rate, 2))
    for channel, begin, end in ((1, 1, 3), (0, 3.4, 6.4), (1, 5, 5.4)):
        at = slice(int(begin * rate), int(end * rate))
        wav[at, channel] = .1 * np.sin(np.arange(at.stop - at.start))
    soundfile.write(tmp_path / 'talk.wav', wav, rate)
    assert dialogue.main([str(tmp_path / 'talk.wav')]) == 0
    found = {line[:24].strip(): float(line[24:]) for line in capsys.readouterr().out.splitlines()}
    assert found['opening/theirs'] == found['smooth/mine'] == found['backchannel/theirs'] == 1
    assert found['opening/mine'] == 0 and found['transfer ms/mine'] == pytest.approx(400, abs=21)
    assert found['ipu s/min'] == pytest.approx(5.4 / 8 * 60, abs=.4)
    assert found['overlaps/min'] == 7.5 and found['gap s/min'] == pytest.approx(3, abs=.2)
    soundfile.write(tmp_path / 'one.wav', wav[:, 0], rate)
    for name, says in (('one.wav', 'it has 1 channels'), ('none.wav', 'cannot be measured')):
        assert dialogue.main([str(tmp_path / name)]) == 1
        said = capsys.readouterr().err
        assert says in said and said.count('\n') == 1


def test_times_as_frames():
    assert turns.during([(0.0, 0.5), (0.96, 1.1)], 12, 10.0).nonzero()[0].tolist() == [
        0, 1, 2, 3, 4, 10]
    assert turns.during([(0.06, 0.54)], 12, 10.0).nonzero()[0].tolist() == [1, 2, 3, 4]

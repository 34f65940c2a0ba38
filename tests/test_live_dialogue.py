# SPDX-License-Identifier: Apache-2.0
"""Is talking frame by frame what reading it all at once would have been, for everybody at once?"""

import threading

import bench_live
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_evaluate import made
from test_generate import LATE, heard, speaker_of

from jaxsd import codec, data, dialogue, generate, live, trained
from jaxsd.config import ConfigError, plain
from jaxsd.generate import Sampler
from jaxsd.layout import duplex


def room_of(kind='helium', slots=2, **samplers):
    v, speaker = speaker_of('streams', kind, **samplers)
    return v, speaker, generate.Room(speaker, LATE, slots=slots, columns=64, key=jax.random.key(3))


def aligned(speaker, v, codes):
    """What `converse` says in my rows, as frames that are complete after the last that was heard:
    of the column after it what would be said to any."""
    last = np.zeros((len(codes), 1), codes.dtype)
    plan = generate.conversation_plan(v, np.concatenate([codes, last], 1), LATE)
    said = generate.converse(speaker, [plan])[0]
    return mine(v, duplex.undelay(said, LATE)[:, :codes.shape[1] + 1 - max(LATE)])


def mine(v, rows):
    return rows[[k for k, row in enumerate(v.rows) if not row.name.startswith('theirs')]]


def test_words_go_to_the_sound_that_is_nearest():
    """Two stretches half a second apart, and a breath of 0.2 s within the first."""
    rate = 8000
    tone, quiet = np.sin(np.arange(rate // 5)), np.zeros(rate // 5)
    wav = np.concatenate([quiet, tone, quiet, tone, *[quiet] * 3, tone])
    words = [(0.1, 'a'), (0.7, 'b'), (1.0, 'c'), (1.2, 'd'), (2.0, 'e')]
    found = bench_live.stretches(wav, words, rate)
    assert [w for _, w in found] == ['a b c', 'd e']
    assert [len(x) / rate for x, _ in found] == pytest.approx([0.6, 0.2], abs=0.021)
    assert bench_live.stretches(np.zeros(rate), words, rate) == []


# The room.

@pytest.mark.parametrize('kind', ('helium', 'qwen2'))
def test_frame_by_frame_is_the_whole_conversation(kind):
    """Two conversations of different begins and lengths, far beyond the window where there is one,
    one of which waits now and then; each is what it would have been alone."""
    v, speaker, room = room_of(kind)
    a, b = heard(50, seed=1), heard(20, seed=2)
    said, left = {0: [], 1: []}, list(b.T)
    for t in range(50):
        now = {0: a[:, t]}
        if t >= 5 and t % 3 and left:
            now[1] = left.pop(0)
        for slot, rows in room.step(now).items():
            said[slot].append(rows)
    for slot, codes in ((0, a), (1, b)):
        np.testing.assert_array_equal(mine(v, np.concatenate(said[slot], 1)),
                                      aligned(speaker, v, codes))


def test_a_slot_is_used_again_as_if_it_were_new():
    v, speaker, room = room_of()
    for t, codes in enumerate(heard(20, seed=3).T):
        room.step({0: codes, 1: codes} if t < 9 else {0: codes})
    room.begin(1)
    codes = heard(25, seed=4)
    said = [rows for now in codes.T for rows in room.step({1: now}).values()]
    np.testing.assert_array_equal(mine(v, np.concatenate(said, 1)), aligned(speaker, v, codes))


def test_an_hour_takes_no_more_than_a_minute():
    """The state keeps its size, and nothing is compiled after the first frame."""
    v, speaker, room = room_of()
    codes = heard(8).T
    room.step({0: codes[0]})
    sizes = jax.tree.map(lambda x: (x.shape, x.dtype), room._state)
    compiled = generate._next._cache_size()
    for t in range(400):
        room.step({0: codes[t % 8], 1: codes[-t % 8]} if t % 3 else {0: codes[t % 8]})
    assert jax.tree.map(lambda x: (x.shape, x.dtype), room._state) == sizes
    assert generate._next._cache_size() == compiled
    assert room._state['cache']['k'].shape[2] == speaker.ring_columns
    # And it still hears: the last window alone decides, whatever came before.
    assert int(room._state['position'][0]) == 402


def test_sampling_is_seeded_and_codes_are_checked():
    said = []
    for _ in range(2):
        _, _, room = room_of(text=Sampler(1.0), mine=Sampler(1.0))
        said.append([room.step({0: c}) for c in heard(12).T])
    for a, b in zip(*said, strict=True):
        np.testing.assert_array_equal(a.get(0, 0), b.get(0, 0))
    with pytest.raises(ValueError, match='theirs 0 ids must lie in'):
        room.step({0: np.array([99, 0, 0])})


# Ear and voice.

@pytest.fixture(scope='module')
def moshi(corpus):
    return made(corpus, 'moshi')


@pytest.fixture(scope='module')
def rvq(moshi):
    return codec.rvq(**{k: v for k, v in moshi.config.codec.items() if k != 'name'})


@pytest.fixture(scope='module')
def sound(moshi, rvq):
    """Two seconds of a voice, and its codes."""
    codes = next(data.examples(moshi.config, 'train', 'stories')).codes[0][:, 5:30]
    return rvq.decode(codes), codes


@pytest.mark.parametrize('size', (160, 1280, 5000))
def test_pieces_of_any_size_are_heard_as_the_whole(rvq, sound, size):
    ear, wav = live.Ear(rvq), sound[0]
    codes = [c for i in range(0, len(wav), size) for c in ear.push(wav[i:i + size])]
    whole = rvq.encode(np.concatenate([np.zeros(432, np.float32), wav]))
    np.testing.assert_array_equal(np.array(codes).T, whole[:, :len(codes)])
    assert len(codes) == len(wav) // 1280


def test_frames_are_spoken_as_the_whole(rvq, sound):
    """Frame by frame the sound has the spectrum of what is decoded at once, and no clicks."""
    wav, codes = sound
    voice = live.Voice(rvq)
    pieces = [voice.push(c[:, None]) for c in codes.T]
    assert {p.shape for p in pieces} == {(1280,)}
    said = np.concatenate(pieces)
    again = rvq.encode(said[400:400 + 24 * 1280])       # 25 ms are held back
    true = rvq.encode(wav)[:, :24]
    assert (again[0] == true[0]).mean() > 0.3
    # Power follows that of the whole, frame by frame.
    power = [np.log10(np.mean(x[:24 * 1280].reshape(24, -1) ** 2, axis=1) + 1e-6)
             for x in (said[400:], wav)]
    assert np.corrcoef(power)[0, 1] > 0.9
    steps = np.abs(np.diff(said))
    assert steps[1279::1280].max() <= 1.5 * np.abs(np.diff(wav)).max()


def test_chunks_are_spoken_as_the_whole_but_for_silence(rvq, sound):
    """Pieces of several frames; a frame of no code is silent from its first sample that is not
    faded to its last."""
    wav, codes = sound
    voice, codes = live.Voice(rvq), codes[:, :24].copy()
    codes[:, 8:12] = -1
    said = np.concatenate([voice.push(codes[:, i:i + 4]) for i in range(0, 24, 4)])
    assert said.shape == (24 * 1280,)
    quiet = said[400 + 8 * 1280:400 + 12 * 1280]
    assert not quiet[800:-800].any() and np.abs(said[:8 * 1280]).max() > 0.01
    power = [np.log10(np.mean(x[:23 * 1280].reshape(23, -1) ** 2, axis=1) + 1e-6)
             for x in (said[400:], wav)]
    loud = np.r_[0:8, 12:23]
    assert np.corrcoef(np.array(power)[:, loud])[0, 1] > 0.9


# Talks.

def test_words_are_told_when_they_are_complete(moshi, rvq):
    talk, v, text = live.Talk(moshi, rvq, 1), moshi.vocab, moshi.text()
    first, second = (text.encode(w) for w in ('what', 'zzz'))
    row = [*first, v.specials['pad'], v.specials['epad'], *second, *first, v.specials['pad']]
    told = []
    for token in row:
        told += talk.say(np.zeros((rvq.identity['codebooks'], 1), int), np.array([token]))[1]
    at = len(first) + 2
    assert told == [(0.0, 'what'), (at / 12.5, 'zzz'), ((at + len(second)) / 12.5, 'what')]
    line = np.array(row)
    assert [(t, w) for t, w in told] == [
        (t / 12.5, w) for t, w in trained.words_at(v, text, line)]


def test_a_stream_is_the_conversation(moshi, rvq, sound):
    """Sound in, sound and words out: as many frames as were heard but for the delay."""
    said, words = [], []
    found = live.stream(moshi, rvq, live.room(moshi, slots=1, samplers={}),
                        [sound[0][:7000], sound[0][7000:]],
                        lambda wav, told: (said.append(wav), words.extend(told)))
    n = len(sound[0]) // 1280
    assert found['frames'] == n and len(said) == n + 1          # and the word that was left
    assert found['first_audio_ms'] > 160 + 27 + 25 and found['real_time_factor'] > 0
    ear = live.Ear(rvq)
    codes = np.array(ear.push(sound[0])).T
    plan = generate.conversation_plan(moshi.vocab, codes,
                                      trained.layout_delays(plain(moshi.config.layout),
                                                             moshi.vocab))
    row = generate.converse(moshi.speaker(), [plan])[0][0, 1:n + 1]
    wanted = trained.words_at(moshi.vocab, moshi.text(), row)
    told, whole = (''.join(w for _, w in found) for found in (words, wanted))
    assert whole == told


@pytest.mark.slow
def test_a_long_conversation_goes_on_as_it_began(moshi, rvq):
    """Sound in and out for 160 s, eight times the window: memory and time of a frame stay. (An
    hour, and its figures: tests/bench_live.py.)"""
    room = live.room(moshi, slots=1, samplers={})
    found, rows = bench_live.measure(moshi, rvq, room, bench_live.callers(moshi, rvq), count=2000,
                                     every=500)
    assert found['frames'] == 2000 and len(rows) == 4
    # Who kept one channel of sound would have 7.7 MB more.
    assert rows[-1]['resident_mb'] - rows[0]['resident_mb'] < 4
    assert rows[-1]['cpu_ms'] < 1.5 * rows[0]['cpu_ms']


def test_several_listeners_share_a_room(moshi, rvq, sound):
    """Each hears what it would alone; who comes when all slots are taken is told so; who leaves
    makes room."""
    lobby = live.Lobby(moshi, rvq, slots=2, samplers={})
    server = threading.Thread(target=lobby.serve, daemon=True)
    server.start()
    said = {}

    def listen(name, wav):
        slot, talk = lobby.enter()
        told = [lobby.hear(slot, codes) for codes in talk.hear(wav)]
        said[name] = [np.concatenate(x, -1) for x in zip(*filter(None, told), strict=True)]
        lobby.leave(slot)
    wavs = dict(a=sound[0], b=sound[0][::-1].copy())
    threads = [threading.Thread(target=listen, args=item) for item in wavs.items()]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    late = trained.layout_delays(plain(moshi.config.layout), moshi.vocab)
    for name, wav in wavs.items():
        codes = np.array(live.Ear(rvq).push(wav)).T
        more = np.concatenate([codes, codes[:, -1:]], 1)     # what nothing said yet depends on
        said_alone = generate.converse(moshi.speaker(), [generate.conversation_plan(
            moshi.vocab, more, late)])[0]
        rows = duplex.undelay(said_alone, late)[:, :codes.shape[1] + 1 - max(late)]
        np.testing.assert_array_equal(said[name][0], dialogue.local(moshi.vocab, rows))
        np.testing.assert_array_equal(said[name][1], rows[0])
    one, two = lobby.enter(), lobby.enter()
    assert lobby.enter() is None and lobby.free == 0
    lobby.leave(one[0])
    assert lobby.enter()[0] == one[0]
    lobby.leave(two[0])
    lobby.close()
    server.join(10)
    assert not server.is_alive()


def in_chunks(lm, slots=2):
    """(room, what two callers of different lengths say, whole chunks each)."""
    layout = dialogue.own_layout(lm)
    one = live.room(lm, slots=slots, samplers={})
    heard = [dialogue.tokens_of(r, 1, layout)[:, :n - n % one.chunk] for r, n in zip(
        data.examples(lm.config, 'train', dialogue.own_source(lm), limit=2), (90, 60), strict=True)]
    return one, layout, heard


@pytest.mark.parametrize(('name', 'answers', 'ahead'), [
    ('omniflatten', 10, 0), ('syncllm', 8, 4), ('dgslm', 1, 1)])
def test_chunk_by_chunk_is_the_whole_conversation(corpus, name, answers, ahead):
    """Two conversations, one of which begins later and goes on after the other, and a third in a
    slot that was used: each says what it would have said to all of it at once."""
    lm = made(corpus, name)
    one, layout, heard = in_chunks(lm)
    assert one.answers == answers
    alone = dialogue.talk(lm, heard, layout, batch=2)
    said = {0: [], 1: []}
    one.begin(1)
    n = one.chunk
    for t in range(0, heard[0].shape[1] + 3 * n, n):
        now = {0: heard[0][:, t:t + n]} if t < heard[0].shape[1] else {}
        if 0 <= t - 3 * n < heard[1].shape[1]:
            now[1] = heard[1][:, t - 3 * n:t - 2 * n]
        for slot, told in one.step(now).items():
            said[slot].append(told)
    one.begin(1)
    again = [one.step({1: heard[0][:, t:t + n]})[1] for t in range(0, heard[0].shape[1], n)]
    for parts, whole in ((said[0], alone[0]), (said[1], alone[1]), (again, alone[0])):
        codes = np.concatenate([codes for codes, _ in parts], 1)
        assert codes.shape[1] == whole.codes.shape[1] + ahead
        np.testing.assert_array_equal(codes[:, :whole.codes.shape[1]], whole.codes)
        assert [line is None for _, line in parts] == len(parts) * [whole.words is None]
        if whole.words is not None:
            line = np.concatenate([line for _, line in parts])
            assert trained.words_at(lm.vocab, lm.text(), line) == whole.words
    assert len({tuple(x.codes[0, :60]) for x in alone}) == 2         # what is heard matters


def test_what_cannot_be_talked_with_is_said(corpus):
    lm = made(corpus, 'spirit_lm')
    with pytest.raises(ConfigError, match='flat.interleave holds no two speakers who talk'):
        live.room(lm, slots=1, samplers={})


@pytest.mark.parametrize('name', ('moshi', 'dgslm', 'omniflatten', 'syncllm'))
def test_what_is_heard_can_be_answered_when_it_is_said(corpus, name):
    """Of what comes out after so many frames, the first that depends on the first chunk heard: what
    is said, that is; how a first codebook sounds may depend on it before."""
    lm = made(corpus, name)
    one, rng = live.room(lm, slots=1, samplers=dict(mine=Sampler(2.0), tokens=Sampler(2.0))), (
        np.random.default_rng(0))
    books, n = lm.config.codec.codebooks, one.chunk
    heard = rng.integers(0, 50, (books, 6 * n))

    def said(heard):
        if isinstance(one, live._Columns):      # the same draws again
            one._room._state |= dict(step=jnp.int32(0))
        else:
            one._begun = 0
        one.begin(0)
        return [one.step({0: heard[:, t:t + n]})[0][0][0].tolist() for t in range(0, 6 * n, n)]
    first, before = [], said(heard)
    assert before == said(heard)
    for _ in range(6):
        heard[:, :n] = rng.integers(0, 50, (books, n))
        first += [i for i, pair in enumerate(zip(before, said(heard), strict=True))
                  if pair[0] != pair[1]][:1]
    assert min(first) == one.answers // n - 1


def test_a_chunk_without_a_new_unit_goes_on_as_the_last(corpus, monkeypatch):
    """Mine: nothing at first, then 5, nothing new, 7 and 8 by halves; theirs is told without
    repeats, across chunks as well."""
    lm, told = made(corpus, 'syncllm'), []

    def step_by_step(speaker, vocab, **_):
        for mine in ([], [5], [], [7, 8], []):
            told.append((yield [vocab.encode('units', np.array(mine, int)).tolist()], []))
    monkeypatch.setattr(generate, 'step_by_step', step_by_step)
    said = dialogue.by_chunks(lm, lm.speaker(), dialogue.own_layout(lm), jax.random.key(0))
    assert next(said).tolist() == [[-1] * 4]
    theirs = np.array([[3, 3, 4, 4], [4, 4, 4, 4], [4, 4, 4, 6], [3, 3, 3, 3]])
    out = [said.send(heard[None])[0][0].tolist() for heard in theirs]
    assert out == [[5] * 4, [5] * 4, [7, 7, 8, 8], [8] * 4]
    assert [x[0].tolist() for x in told] == [[3, 4], [], [6], [3]]

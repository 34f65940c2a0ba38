# SPDX-License-Identifier: Apache-2.0
"""Is talking frame by frame what reading it all at once would have been, for everybody at once?"""

import threading

import bench_live
import jax
import numpy as np
import pytest
from test_evaluate import made
from test_generate import LATE, heard, speaker_of

from jaxsd import codec, data, generate, live, trained
from jaxsd.config import ConfigError, plain
from jaxsd.generate import Sampler
from jaxsd.layout import duplex


def room_of(kind='helium', slots=2, **samplers):
    v, speaker = speaker_of('streams', kind, **samplers)
    return v, speaker, generate.Room(speaker, LATE, slots=slots, columns=64, key=jax.random.key(3))


def aligned(speaker, v, codes, **options):
    """What `converse` says, as frames that are complete."""
    plan = generate.conversation_plan(v, codes, LATE)
    said = generate.converse(speaker, [plan], **options)[0]
    return duplex.undelay(said, LATE)[:, :codes.shape[1] - max(LATE)]


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
        for slot, frame in room.step(now).items():
            said[slot].append(frame)
    for slot, codes in ((0, a), (1, b)):
        np.testing.assert_array_equal(np.array(said[slot]).T, aligned(speaker, v, codes))


def test_a_slot_is_used_again_as_if_it_were_new():
    v, speaker, room = room_of()
    for t, codes in enumerate(heard(20, seed=3).T):
        room.step({0: codes, 1: codes} if t < 9 else {0: codes})
    room.begin(1)
    codes = heard(25, seed=4)
    said = [frame for now in codes.T for frame in room.step({1: now}).values()]
    np.testing.assert_array_equal(np.array(said).T, aligned(speaker, v, codes))


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
    assert int(room._state['position'][0]) == 401


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
    pieces = [voice.push(c) for c in codes.T]
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


# Talks.

def test_words_are_told_when_they_are_complete(moshi, rvq):
    talk, v, text = live.Talk(moshi, rvq), moshi.vocab, moshi.text()
    first, second = (text.encode(w) for w in ('what', 'zzz'))
    row = [*first, v.specials['pad'], v.specials['epad'], *second, *first, v.specials['pad']]
    told = []
    for token in row:
        frame = np.array([token, *(r.start for r in v.rows[1:])])
        told += talk.say(frame)[2]
    at = len(first) + 2
    assert told == [(0.0, 'what'), (at / 12.5, 'zzz'), ((at + len(second)) / 12.5, 'what')]
    line = np.array(row)
    assert [(t, w) for t, w in told] == [
        (t / 12.5, w) for t, w in trained.words_at(v, text, line)]


def test_a_stream_is_the_conversation(moshi, rvq, sound):
    """Sound in, sound and words out: as many frames as were heard but for the delay."""
    said, words = [], []
    found = live.stream(moshi, rvq, [sound[0][:7000], sound[0][7000:]], {}, 0,
                        lambda wav, told: (said.append(wav), words.extend(told)))
    n = len(sound[0]) // 1280
    assert found['frames'] == n and len(said) == n - 1
    assert found['first_audio_ms'] > 160 + 27 + 25 and found['real_time_factor'] > 0
    ear = live.Ear(rvq)
    codes = np.array(ear.push(sound[0])).T
    plan = generate.conversation_plan(moshi.vocab, codes,
                                      trained.layout_delays(plain(moshi.config.layout),
                                                             moshi.vocab))
    row = generate.converse(moshi.speaker(), [plan])[0][0, 1:n]
    wanted = trained.words_at(moshi.vocab, moshi.text(), row)
    told, whole = (''.join(w for _, w in found) for found in (words, wanted))
    assert whole.startswith(told)
    assert len(told) >= len(whole) - len(wanted[-1][1])         # the last may not be complete


@pytest.mark.slow
def test_a_long_conversation_goes_on_as_it_began(moshi, rvq):
    """Sound in and out for 160 s, eight times the window: memory and time of a frame stay. (An
    hour, and its figures: tests/bench_live.py.)"""
    found, rows = bench_live.measure(moshi, rvq, bench_live.callers(moshi, rvq), frames=2001,
                                     every=500)
    assert found['frames'] == 2001 and len(rows) == 4
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
        frames = [lobby.hear(slot, codes) for codes in talk.frames_of(wav)]
        said[name] = np.array([f for f in frames if f is not None])
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
        said_alone = generate.converse(moshi.speaker(), [generate.conversation_plan(
            moshi.vocab, codes, late)])[0]
        np.testing.assert_array_equal(
            said[name].T, duplex.undelay(said_alone, late)[:, :codes.shape[1] - max(late)])
    one, two = lobby.enter(), lobby.enter()
    assert lobby.enter() is None and lobby.free == 0
    lobby.leave(one[0])
    assert lobby.enter()[0] == one[0]
    lobby.leave(two[0])
    lobby.close()
    server.join(10)
    assert not server.is_alive()


def test_what_cannot_be_talked_with_is_said(corpus):
    lm = made(corpus, 'omniflatten')
    with pytest.raises(ConfigError, match='does not talk frame by frame'):
        live.room(lm, slots=1, samplers={})

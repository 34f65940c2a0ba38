# SPDX-License-Identifier: Apache-2.0
"""Is what streaming decode says what the model would have said, cell by cell, read all at once?"""

import copy
import functools

import jax
import jax.numpy as jnp
import ml_collections as mlc
import numpy as np
import pytest
import sentencepiece
from flax import nnx
from small import built

from jaxsd import generate, model, trained
from jaxsd.config import ConfigError
from jaxsd.generate import FREE, Sampler
from jaxsd.layout import chunks, duplex, template
from jaxsd.types import NOTHING, Record, Word
from jaxsd.vocab import Text, initial, line, streams

LATE = (2, 0, 1, 1, 0, 1, 1)        # of text, mine 0..2, theirs 0..2
SPREAD = Sampler(1.0)


def speaker_of(system: str, kind: str, **samplers):
    c, graph, params = built(system, kind)
    v, params = model.make_vocab(c), trained.streamed(params, model.abstract(c)[2])
    return v, generate.ready(graph, params, v, samplers, c.backbone.get('window_columns'))


@functools.partial(jax.jit, static_argnums=0)
def _scores(graph, params, tokens_KT, segment_T):
    return nnx.merge(graph, params).scores(dict(
        tokens=tokens_KT[None], position=jnp.arange(tokens_KT.shape[1])[None],
        segment=segment_T[None]))


def teacher(speaker, tokens_KT):
    """Scores per row [T, V] of the training forward over one sequence that is already there."""
    K, T = tokens_KT.shape
    padded, segment = np.full((K, 64), NOTHING, np.int32), np.zeros(64, np.int32)
    padded[:, :T], segment[:T] = tokens_KT, 1
    out = _scores(speaker.graph, speaker.params, padded, segment)
    return [None if s is None else np.asarray(s[0, :T]) for s in out]


def assert_greedy(v, speaker, said_KT, plan_KT):
    """Every cell that the plan left free holds the best id, given everything said before it."""
    free = 0
    for k, (row, s) in enumerate(zip(v.rows, teacher(speaker, said_KT), strict=True)):
        if s is None:
            assert not (plan_KT[k] == FREE).any()
            continue
        for t in np.flatnonzero(plan_KT[k] == FREE):
            chosen = said_KT[k, t] - row.start
            assert 0 <= chosen < row.predicted
            assert s[t - 1, chosen] > s[t - 1].max() - 1e-4, (row.name, t)
            free += 1
    return free


def heard(frames: int, seed: int = 0):
    return np.random.default_rng(seed).integers(0, 12, (3, frames))


# The plan of a conversation.

def test_a_plan_is_what_training_would_have_drawn():
    """The heard rows of a plan are those of the layout's own delays; mine are free after them."""
    c, _, _ = built('streams', 'helium')
    v, codes = model.make_vocab(c), heard(9)
    plan = generate.conversation_plan(v, codes, LATE)
    aligned = np.full((7, 9), NOTHING)
    for book in range(3):
        aligned[4 + book] = v.encode(f'theirs {book}', codes[book])
    drawn = duplex.delay(aligned, v, LATE)
    np.testing.assert_array_equal(plan[4:], drawn[4:])
    for k, row in enumerate(v.rows):
        assert (plan[k, :1 + LATE[k]] == initial(row)).all()
        if k < 4:
            assert (plan[k, 1 + LATE[k]:] == FREE).all()
    # Undelayed, the codes come back, but for those that fell off the end.
    back = duplex.undelay(plan, LATE)
    np.testing.assert_array_equal(back[4], aligned[4])
    np.testing.assert_array_equal(back[5:, :8], aligned[5:, :8])
    assert (back[5:, 8] == NOTHING).all()


def test_a_plan_may_give_my_voice_instead():
    v = model.make_vocab(built('streams', 'helium')[0])
    plan = generate.conversation_plan(v, heard(5), LATE, speaker='mine')
    np.testing.assert_array_equal(plan[1, 1:], v.encode('mine 0', heard(5)[0]))
    assert (plan[4, 1:] == FREE).all()


def test_a_plan_shorter_than_its_delays_and_a_code_out_of_range():
    v = model.make_vocab(built('streams', 'helium')[0])
    plan = generate.conversation_plan(v, heard(1), (5, 0, 3, 3, 0, 3, 3))
    assert plan.shape == (7, 2) and plan[5].tolist() == [initial(v.rows[5])] * 2
    with pytest.raises(ValueError, match='theirs 0 ids must lie in'):
        generate.conversation_plan(v, np.full((3, 4), 99), LATE)


# A conversation.

@pytest.mark.parametrize('kind', ('helium', 'qwen2'))
def test_conversation_is_the_training_forward(kind):
    """Several conversations at once, of different lengths, much longer than the window where there
    is one: heard cells as given, initial tokens in place, all else the model's first choice."""
    v, speaker = speaker_of('streams', kind)
    plans = [generate.conversation_plan(v, heard(n, seed=n), LATE) for n in (63, 20, 1)]
    said = generate.converse(speaker, plans)
    for plan, column in zip(plans, said, strict=True):
        assert column.shape == plan.shape
        known = plan != FREE
        np.testing.assert_array_equal(column[known], plan[known])
        free = (1 + 3) * (plan.shape[1] - 1) - sum(min(d, plan.shape[1] - 1) for d in LATE[:4])
        assert assert_greedy(v, speaker, column, plan) == free
    # And what I hear undelayed is what was given.
    back = duplex.undelay(said[1], LATE)
    for book in range(3):
        kept = 20 - LATE[4 + book]
        np.testing.assert_array_equal(back[4 + book, :kept],
                                      v.encode(f'theirs {book}', heard(20, seed=20)[book, :kept]))
    if kind == 'helium':    # the window matters here: without it, other choices
        wide = speaker._replace(graph=wider(speaker))
        with pytest.raises(AssertionError):
            assert_greedy(v, wide, said[0], plans[0])


def wider(speaker):
    """The same model without its window."""
    lm = nnx.eval_shape(lambda p: nnx.merge(speaker.graph, p), speaker.params)
    lm.backbone.window_columns = None
    return nnx.split(lm)[0]


def test_conversations_together_are_each_alone():
    v, speaker = speaker_of('streams', 'mistral')
    plans = [generate.conversation_plan(v, heard(n, seed=n), LATE) for n in (40, 11)]
    together = generate.converse(speaker, plans)
    for plan, column in zip(plans, together, strict=True):
        np.testing.assert_array_equal(generate.converse(speaker, [plan])[0], column)


def test_what_is_heard_later_changes_nothing_said_earlier():
    v, speaker = speaker_of('streams', 'helium')
    codes = heard(30)
    other = codes.copy()
    other[:, 17:] = (other[:, 17:] + 5) % 12
    a, b = (generate.converse(speaker, [generate.conversation_plan(v, x, LATE)])[0]
            for x in (codes, other))
    # Column 1 + 17 is the first that holds another code, and the one after it may answer.
    np.testing.assert_array_equal(a[:4, :19], b[:4, :19])
    assert (a[:4, 19:] != b[:4, 19:]).any()


@pytest.mark.parametrize('n', [1, 31, 32, 33, 256, 257, 2047, 2049])
def test_few_lengths_hold_every_length(n):
    """The next of four lengths per octave, from 32 on: at most a quarter is padding."""
    found = generate.few(n)
    assert 0 <= found - n < max(32, n / 4) and found % 32 == 0
    assert len({generate.few(m) for m in range(1025, 2049)}) == 4


def test_memory_does_not_grow_with_a_conversation(monkeypatch):
    """The ring holds the window however long the conversation; without a window, all of it."""
    rings = []

    class Watched(generate.Stream):
        def __init__(self, *args, columns, **options):
            super().__init__(*args, columns=columns, **options)
            rings.append((columns, self._cache['k'].shape[2]))

        def more(self, *args, **options):
            before = jax.tree.map(jnp.shape, self._cache)
            out = super().more(*args, **options)
            assert jax.tree.map(jnp.shape, self._cache) == before
            return out
    monkeypatch.setattr(generate, 'Stream', Watched)
    for kind, frames in (('helium', 63), ('helium', 127), ('qwen2', 127)):
        v, speaker = speaker_of('streams', kind)
        generate.converse(speaker, [generate.conversation_plan(v, heard(frames), LATE)])
    assert rings == [(7, 7), (7, 7), (160, 160)]


@pytest.mark.parametrize('parts', [(1,) * 12, (5, 1, 6)])
def test_frame_by_frame_is_all_at_once(parts):
    """Drawn at a temperature: the keys, too, depend on the column alone."""
    v, speaker = speaker_of('streams', 'helium', text=SPREAD, mine=SPREAD)
    plan = np.stack([generate.conversation_plan(v, heard(13, seed=s), LATE) for s in (0, 1)])

    def begin():
        stream = generate.Stream(speaker, rows=2, columns=7, key=jax.random.key(3))
        return stream, stream.first([p[:, :1] for p in plan], plan[:, :, 1])
    rest = np.moveaxis(plan[:, :, 2:], 2, 0)
    stream, first = begin()
    whole = np.asarray(stream.more(rest))
    stream, again = begin()
    np.testing.assert_array_equal(first, again)
    cuts = np.cumsum(parts)[:-1]
    pieces = [np.asarray(stream.more(part)) for part in np.split(rest, cuts)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert len({tuple(c) for c in whole[:, 0, :4]}) > 6         # it does vary


def test_keys_and_samplers():
    """The same key says the same again, another key another thing; rows draw as they are told."""
    v, speaker = speaker_of('streams', 'helium', text=SPREAD)
    assert speaker.samplers == (SPREAD,) + (generate.GREEDY,) * 6
    plan = [generate.conversation_plan(v, heard(30), LATE)]
    a, again, b = (generate.converse(speaker, plan, key=jax.random.key(k))[0] for k in (1, 1, 2))
    np.testing.assert_array_equal(a, again)
    assert (a[0] != b[0]).any()


# One row.

def reference(speaker, v, prompt, kind, most_tokens, stop=None):
    """Greedy continuation by reading everything anew for every token."""
    allowed, out = generate.allowed_ids(v, kind, stop), []
    for _ in range(most_tokens):
        tokens = np.concatenate([prompt, out]).astype(np.int32)
        out.append(int(np.where(allowed, teacher(speaker, tokens[None])[0][-1], -np.inf).argmax()))
        if out[-1] == (v.specials['eos'] if stop is None else stop):
            return out[:-1]
    return out


def test_prompts_of_any_length_continue_as_if_read_anew():
    """Together and chunk by chunk, up to EOS (which is not returned) or the most tokens."""
    v, speaker = speaker_of('flat', 'mistral')
    # An EOS that is likelier than by chance, so that some sequences end early and some do not.
    kernel = speaker.params['head']['out']['kernel']
    params = dict(speaker.params, head=dict(out=dict(kernel=kernel.at[:, 2].multiply(1.5))))
    speaker = speaker._replace(params=params)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 14, n) for n in (2, 33, 5, 1, 12)]
    for kind in ('speech', 'text'):
        got = generate.continue_prompts(speaker, prompts, v, kind=kind, most_tokens=14, chunk=4)
        want = [reference(speaker, v, p, kind, 14) for p in prompts]
        assert [g.tolist() for g in got] == want
        lengths = {len(w) for w in want}
        assert len(lengths) > 1 and max(lengths) == 14, lengths     # both ways to end were seen


def test_only_what_is_allowed_is_ever_said():
    """Of text: its pieces but BOS. Of speech: its units. EOS in both, markers and padding never."""
    v, speaker = speaker_of('flat', 'llama', tokens=Sampler(50.0))      # nearly uniform
    start, size = v.ranges['units']
    text = set(range(14)) - {v.specials['bos']}
    units = set(range(start, start + size))
    rng = np.random.default_rng(1)
    for kind, legal in (('text', text), ('speech', units | {v.specials['eos']})):
        assert set(np.flatnonzero(generate.allowed_ids(v, kind))) == legal
        prompts = [rng.integers(0, v.size, 4) for _ in range(24)]
        got = generate.continue_prompts(speaker, prompts, v, kind=kind, most_tokens=30,
                                        key=jax.random.key(5))
        said = {int(t) for ids in got for t in ids}
        assert said == legal - {v.specials['eos']}


# Templates.

CHAIN = dict(end='eos', parts=(
    ('mark', '[Speech]', 0), ('speech', 'mine', 0), ('mark', '[Text]'), ('text', 'mine'),
    ('mark', '[Speech]'), ('speech', 'mine')))


def told(v, seed: int, **options):
    rng = np.random.default_rng(seed)
    words = tuple(Word('w', 0, 0.0, 0.0, (int(i),)) for i in rng.integers(3, 14, 2 + seed))
    record = Record('r', 'toy', 'en', 1.0, units=(rng.integers(0, 20, 3 + 2 * seed),), words=words)
    return template.pieces(record, vocab=v, rng=rng, **CHAIN | options)


def test_a_chain_is_a_list_of_phases():
    """What is given is the prompt; marks are written; each phase ends at the mark behind it."""
    v, _ = speaker_of('flat', 'llama')
    pieces = told(v, 1)
    prompt, steps = generate.phases(pieces, v)
    text, speech = v.specials['[Text]'], v.specials['[Speech]']
    assert prompt.tolist() == [1, speech, *pieces[1].tokens, text]
    assert [(p.name, p.kind, p.before.tolist(), p.stop) for p in steps] == [
        ('text mine', 'text', [], speech), ('speech mine', 'speech', [speech], 2)]
    # Nothing between two contents: one phase, in which either may be said.
    joined = (('speech', 'mine', 0), ('text', 'mine'), ('speech', 'mine'), ('mark', '[Text]'))
    _, steps = generate.phases(told(v, 1, parts=joined), v)
    assert [(p.name, p.kind, p.stop) for p in steps] == [('text mine+speech mine', 'any', text)]
    legal = generate.allowed_ids(v, 'any', text)
    assert legal[text] and not legal[speech] and legal[5] and legal[v.ranges['units'][0]]
    assert not legal[[v.specials['bos'], v.specials['eos']]].any()
    # Content that is never learned is given, wherever it stands.
    given = (('speech', 'mine', 0), ('text', 'mine', 0), ('mark', '[Speech]'), ('speech', 'mine'))
    prompt, steps = generate.phases(told(v, 1, parts=given), v)
    assert prompt[-1] == speech and len(steps) == 1
    with pytest.raises(ValueError, match='the template asks for nothing'):
        generate.phases(told(v, 1, parts=given[:2]), v)


def test_a_chain_is_said_as_if_every_phase_were_read_anew():
    v, speaker = speaker_of('flat', 'mistral')
    # Ends that are likelier than by chance: of the text, and of the speech.
    kernel = speaker.params['head']['out']['kernel']
    ends = np.array([v.specials['[Speech]'], 2])
    params = dict(speaker.params, head=dict(out=dict(kernel=kernel.at[:, ends].multiply(1.5))))
    speaker = speaker._replace(params=params)
    made = [generate.phases(told(v, seed), v) for seed in range(5)]
    prompts, steps = map(list, zip(*made, strict=True))
    said = generate.follow(speaker, prompts, steps, v, most_tokens=dict(text=6, speech=9))
    lengths = set()
    for prompt, phases, found in zip(prompts, steps, said, strict=True):
        for phase in phases:
            prompt = np.concatenate([prompt, phase.before])
            most = 6 if phase.kind == 'text' else 9
            want = reference(speaker, v, prompt, phase.kind, most, phase.stop)
            assert found[phase.name].tolist() == want
            lengths.add((phase.kind, len(want)))
            prompt = np.concatenate([prompt, want]).astype(np.int32)
    assert len({n for kind, n in lengths if kind == 'text'}) > 1, lengths
    with pytest.raises(ValueError, match='these templates differ'):
        generate.follow(speaker, prompts[:2], [steps[0], [steps[1][0]._replace(stop=2)]], v,
                        most_tokens=dict(text=6, speech=9))


# Two speakers in one row.

def spoken_to(v, *lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(0, 20, n) for n in lengths]


@pytest.fixture(scope='module')
def talker():
    """A model of one line whose markers are those of chunks."""
    c, _, _ = built('flat', 'llama')
    c = copy.deepcopy(c)
    c.vocab.markers = ('[S0]', '[S1]', '[Silent text]', '[Silent speech]')
    graph, _, _ = model.abstract(c)
    params = jax.tree.map(lambda x: x * 1.3, model.init(c, jax.random.key(2)))
    v = model.make_vocab(c)
    return v, generate.ready(graph, params, v, {})


def test_chunks_of_fixed_width_are_the_training_forward(talker):
    """Theirs as given, my stretches the best of their own ids; and drawn as the layout draws."""
    v, speaker = talker
    silences = ('[Silent text]', '[Silent speech]')
    heard = spoken_to(v, 11, 4)
    rows = generate.in_chunks(speaker, heard, v, streams=('theirs', 'text', 'mine'), chunk_frames=4,
                              chunk_text=2, silences=silences)
    allowed = dict(text=generate.allowed_ids(v, 'text', v.specials[silences[0]]),
                   mine=generate.allowed_ids(v, 'speech', v.specials[silences[1]]))
    for units, row in zip(heard, rows, strict=True):
        frames = len(units)
        record = Record('r', 'toy', 'en', frames / 25, units=(units, units))
        drawn = chunks.flattened(record, vocab=v, rng=None, chunk_frames=4, chunk_text=2,
                                 silences=silences).tokens[0]
        assert row.shape == drawn.shape
        scores = teacher(speaker, row[None])[0]
        for t in range(1, len(row)):
            at = (t - 1) % 10
            if at < 4:
                assert row[t] == drawn[t]       # theirs
            else:
                legal = allowed['text' if at < 6 else 'mine']
                best = np.where(legal, scores[t - 1], -np.inf)
                assert legal[row[t]] and best[row[t]] > best.max() - 1e-4


def test_a_ring_of_chunks_is_a_window(talker):
    """However long they talk, a ring of 12 columns says what a window of 12 columns says."""
    v, speaker = talker
    heard, silences = spoken_to(v, 61, 30), ('[Silent text]', '[Silent speech]')
    options = dict(streams=('theirs', 'text', 'mine'), chunk_frames=4, chunk_text=2,
                   silences=silences)
    c = copy.deepcopy(built('flat', 'llama')[0])
    c.vocab.markers = ('[S0]', '[S1]', '[Silent text]', '[Silent speech]')
    c.backbone.window_columns = 12
    windowed = generate.ready(model.abstract(c)[0], speaker.params, v, {})
    whole = generate.in_chunks(speaker, heard, v, **options)
    wanted = generate.in_chunks(windowed, heard, v, **options)
    found = generate.in_chunks(speaker._replace(ring_columns=12), heard, v, **options)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(whole, wanted, strict=True))


def test_memory_of_talking_in_step_is_bounded(talker, monkeypatch):
    """Ten times as many chunks, the same cache; a ring that holds all changes nothing."""
    v, speaker = talker
    sizes, empty = [], generate.Stream.__init__

    def noted(self, *args, columns, **options):
        sizes.append(columns)
        empty(self, *args, columns=columns, **options)
    monkeypatch.setattr(generate.Stream, '__init__', noted)
    short, long = spoken_to(v, 30)[0], spoken_to(v, 300)[0]
    ringed = speaker._replace(ring_columns=40)
    for units in (short, long):
        (row,), _ = generate.in_step(ringed, [units], v, chunk_frames=3)
        assert (row == v.specials['[S0]']).sum() == len(units) / 3
    assert sizes[0] == sizes[1] == 40
    few = spoken_to(v, 12)
    np.testing.assert_array_equal(generate.in_step(ringed, few, v, chunk_frames=3)[0][0],
                                  generate.in_step(speaker, few, v, chunk_frames=3)[0][0])


def test_a_ring_of_talking_in_step_is_a_window(talker):
    """Silence, which fills a chunk with padding, takes no place in what is kept: a ring that holds
    a window and one reading says what the window says."""
    v, speaker = talker
    c = copy.deepcopy(built('flat', 'llama')[0])
    c.vocab.markers = ('[S0]', '[S1]', '[Silent text]', '[Silent speech]')
    c.backbone.window_columns = 24
    windowed = generate.ready(model.abstract(c)[0], speaker.params, v, {})
    talked, rest = spoken_to(v, 60, 6)
    silent = np.concatenate([talked[:12], np.full(120, 3), talked[12:40]])    # one unit, repeated
    wide, most = 2 * 3 + 3, 2 * 3 + 1
    ring = 24 - 1 + 2 * wide + most
    for heard in ([silent], [silent, np.concatenate([rest, np.full(100, 5)])]):
        wanted, _ = generate.in_step(windowed, heard, v, chunk_frames=3)
        found, _ = generate.in_step(windowed._replace(ring_columns=ring), heard, v, chunk_frames=3)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a, b)
        assert max(map(len, wanted)) > 3 * ring
    (whole,), _ = generate.in_step(speaker, [silent], v, chunk_frames=3)
    assert whole.tolist() != generate.in_step(windowed, [silent], v, chunk_frames=3)[0][0].tolist()


def test_what_they_say_now_changes_nothing_that_i_say_next(talker):
    """My chunk n + 1 stands on a guess of their chunk n; what they said before it is heard."""
    v, speaker = talker
    start, clock = v.ranges['units'][0], v.specials['[S0]']
    heard = spoken_to(v, 18)[0]

    def mine(units):
        (row,), (guesses,) = generate.in_step(speaker, [units], v, chunk_frames=3)
        parts = np.split(row, np.flatnonzero(row == clock))[1:]
        assert len(parts) == len(guesses) == 6
        theirs = chunks.fresh(units, 3)
        out = []
        for part, new in zip(parts, theirs, strict=True):       # what was really said stands there
            at = np.flatnonzero(part == v.specials['[S1]'])
            own, said = (part[1:at[0]], part[at[0] + 1:]) if at.size else (part[1:], part[:0])
            np.testing.assert_array_equal(said - start, new)
            assert len(own) <= 3 and ((own >= start) & (own < start + 20)).all()
            out.append(own.tolist())
        return out
    before = mine(heard)
    for n in range(1, 6):
        other = heard.copy()
        other[3 * n:] = (other[3 * n:] + 7) % 20
        after = mine(other)
        assert after[:n + 2] == before[:n + 2], n
    assert any(mine((heard + 7) % 20)[n] != before[n] for n in range(2, 6))     # it does listen


def test_talking_in_step_reads_nothing_twice_and_says_the_same(talker):
    """Guesses and answers are those after the whole row read anew; two talks of unequal length."""
    v, speaker = talker
    clock, other = v.specials['[S0]'], v.specials['[S1]']
    heard = [spoken_to(v, 12)[0], (spoken_to(v, 6)[0] + 3) % 20]
    rows, guesses = generate.in_step(speaker, heard, v, chunk_frames=3)

    def anew(*parts):
        return generate.continue_prompts(
            speaker, [np.concatenate(parts).astype(np.int32)], v, kind='speech', stop=clock,
            also=(other,), most_tokens=7)[0]

    def until(said, marker):
        return said[:np.argmax(said == marker)] if (said == marker).any() else said
    for row, guessed, n in zip(rows, guesses, (4, 2), strict=True):
        begins = np.flatnonzero(row == clock)
        assert len(begins) == len(guessed) == n
        for i, (at, guess) in enumerate(zip(begins, guessed, strict=True)):
            before = row[:at + 1 + len(until(row[at + 1:], clock))]     # chunk i, both sides
            before = before[:at + 1 + len(until(before[at + 1:], other))]
            said = anew(before)
            after = said[np.argmax(said == other):] if (said == other).any() else said[:0]
            np.testing.assert_array_equal(after[after != other][:3], guess)
            if i + 1 < n:
                mine = until(anew(before, [other] if len(guess) else [], guess, [clock]), other)[:3]
                own = until(until(row[begins[i + 1] + 1:], clock), other)
                np.testing.assert_array_equal(own, mine)


# Samplers.

def distribution(logits, sampler):
    """What `sampler` draws from, in float64: temperature, top k, then top p of what is left."""
    p = np.exp(logits / sampler.temperature - (logits / sampler.temperature).max())
    order = np.argsort(-p)
    if sampler.top_k:
        p[order[sampler.top_k:]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= sampler.top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize('sampler', [
    Sampler(1.0), Sampler(0.5), Sampler(2.0), Sampler(1.0, top_k=1), Sampler(0.7, top_k=3),
    Sampler(1.0, top_k=100), Sampler(1.0, top_p=0.6), Sampler(1.5, top_p=0.01),
    Sampler(1.3, top_k=4, top_p=0.7)])
def test_samplers_draw_from_the_distribution_they_name(sampler):
    logits = np.array([1.0, 0.2, 2.0, -1.0, 0.7, -np.inf, 1.9])      # one id is forbidden
    want, n = distribution(logits, sampler), 40_000
    ids = np.asarray(jax.jit(generate.draw, static_argnums=2)(
        jnp.tile(jnp.asarray(logits, jnp.float32), (n, 1)), jax.random.key(0), sampler))
    got = np.bincount(ids, minlength=7) / n
    assert not got[want == 0].any()
    np.testing.assert_allclose(got, want, atol=4.5 * np.sqrt(0.25 / n))
    assert (got[want > 0] > 0).all()


def test_temperature_zero_is_argmax_and_rows_draw_apart():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((50, 9)), jnp.float32)
    np.testing.assert_array_equal(generate.draw(logits, jax.random.key(0), generate.GREEDY),
                                  logits.argmax(-1))
    same = jnp.zeros((200, 9))
    assert len(set(np.asarray(generate.draw(same, jax.random.key(0), SPREAD)).tolist())) == 9


# Prompts and words.

def test_prompt_and_markers():
    v = model.make_vocab(built('flat', 'llama')[0])
    got = trained.prompt(v, '[Text]', [5, 6], '[Speech]')
    assert got.tolist() == [1, 14, 5, 6, 15] and got.dtype.kind == 'i'
    pair = dict(name='flat.sequence', fields=('speech', 'text'))
    pairs, all_ = dict(layout=pair | dict(markers=('[A]', '[B]'))), dict(select=('story',))
    c = mlc.ConfigDict(dict(layout=dict(name='flat.interleave'), data=dict(path='x', sources=dict(
        asr=dict(layout=pair) | all_, named=pairs | all_, plain=all_))))
    assert trained.markers(c, 'asr') == ('[Speech]', '[Text]')
    assert trained.markers(c, 'named') == ('[A]', '[B]')
    with pytest.raises(ConfigError, match=r'data.sources.plain must be drawn by two fields'):
        trained.markers(c, 'plain')


def test_words_of_a_text_row(tmp_path):
    """Pieces from where a word begins to where the next does; silence and nothing between them."""
    corpus = tmp_path / 'corpus.txt'
    corpus.write_text('hello big world of blue birds\nbig birds hello\n' * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / 'text'), vocab_size=24, model_type='bpe',
        unk_id=4, bos_id=1, eos_id=2, pad_id=3, control_symbols=[], minloglevel=2,
        user_defined_symbols=['<epad>'], hard_vocab_limit=False)
    text = Text(str(tmp_path / 'text.model'))
    v = streams(dict(codebooks=2, size=5), text_tokens=text.size)
    hello, world = text.encode('hello'), text.encode('world')
    assert len(world) > 1
    row = np.full(20, v.specials['pad'])
    row[2], row[3:3 + len(hello)] = v.specials['epad'], hello
    at = 3 + len(hello)
    row[at:at + len(world)] = world
    row[19], row[0] = NOTHING, initial(v.rows[0])
    # A pause inside a word does not break it.
    row[at + len(world)], row[at + len(world) - 1] = world[-1], v.specials['pad']
    assert trained.words_at(v, text, row) == [(3, 'hello'), (at, 'world')]
    assert trained.words_at(v, text, np.full(5, NOTHING)) == []


def test_a_marker_that_the_vocabulary_lacks():
    v = line({'size': 9}, text_tokens=9, markers=('[Text]',))
    assert trained.prompt(v, '[Text]', [3]).tolist() == [1, 9, 3]
    with pytest.raises(ConfigError, match=r'vocab.markers lacks \[Speech\]'):
        trained.prompt(v, '[Text]', [3], '[Speech]')

# SPDX-License-Identifier: Apache-2.0
"""Sound that is no tokens: is it drawn, measured, spoken and heard as it should be?"""

import functools
import io
import pathlib

import jax
import jax.numpy as jnp
import ml_collections as mlc
import numpy as np
import pytest
import soundfile
from flax import nnx

from jaxsd import codec, data, encoder, evaluate, frames, generate, model, speak, train, trained
from jaxsd import config as configs
from jaxsd.head import Spectrogram
from jaxsd.layout import framed, show
from jaxsd.objective import frames as objective
from jaxsd.types import NOTHING, Record, Row, Sizes, Word
from jaxsd.vocab import parallel

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT / 'tests' / 'golden' / 'layout'
V = parallel(dict(size=1, codebooks=1), text_tokens=20, rows=(), text_marks=('frame', 'end'))
WORDS = (Word('it', 0, .02, .1, (10, 11)), Word('was', 0, .1, .14, (7,)),
         Word('late', 0, .18, .3, (8, 9)))
RAMP = np.arange(27 * 5, dtype=np.float32).reshape(27, 5)     # 27 frames in .27 s


def said(**fields) -> Record:
    return Record(**dict(id='one', source='toy', language='en', duration_s=.27, words=WORDS,
                         feats=(RAMP,)) | fields)


def draw(record=None, vocab=V, **options):
    return framed.continued(record or said(), vocab=vocab, rng=np.random.default_rng(0), **options)


# How it is drawn.

CONTINUED = dict(prompt_s=.15, stack_frames=8, frames_per_column=2, weight_frame=.5)
ALOUD = dict(prompt_s=0.0, frames_per_column=3)


@pytest.mark.parametrize('name, options', [('continued', CONTINUED), ('aloud', ALOUD)])
def test_drawn_by_hand(name, options):
    """Three words; the second silence, at 0.16 s, is nearest to 0.15 s. 16 frames are heard, two
    columns of 8; of the 11 after them, five columns of 2 hold 10."""
    assert show.text(draw(**options), V) + '\n' == (GOLDEN / f'framed_{name}.txt').read_text()


def test_what_is_heard_and_spoken_lies_in_its_columns():
    grid = draw(**CONTINUED)
    assert grid.extra['slot'].tolist() == [1, 1] + [0] * (grid.tokens.shape[1] - 2)
    np.testing.assert_array_equal(grid.extra['feats'][:2].reshape(-1, 5), RAMP[:16])
    mark = grid.tokens[0] == V.specials['frame']
    np.testing.assert_array_equal(grid.extra['framed'] > 0, mark)
    np.testing.assert_array_equal(grid.extra['frames'][mark].reshape(-1, 5), RAMP[16:26])
    assert not grid.extra['frames'][~mark].any() and not grid.extra['feats'][2:].any()
    aloud = draw(**ALOUD)
    assert set(aloud.extra) == {'frames', 'framed'}
    np.testing.assert_array_equal(frames.true_frames(aloud).reshape(-1, 5), RAMP)


def test_a_share_of_frames_is_withheld():
    """The same frames are said; those not read back differ from drawing to drawing."""
    rng, kept = np.random.default_rng(0), []
    for _ in range(400):
        grid = framed.continued(said(), vocab=V, rng=rng, withheld=.3, **ALOUD)
        there = grid.extra['framed'] > 0
        np.testing.assert_array_equal(there, draw(**ALOUD).extra['framed'] > 0)
        np.testing.assert_array_equal(grid.extra['frames'], draw(**ALOUD).extra['frames'])
        assert set(grid.extra['framed'][there].tolist()) <= {1, 2}
        kept.append(np.mean(grid.extra['framed'][there] == 1))
    assert abs(np.mean(kept) - .7) < .03
    with pytest.raises(ValueError, match='withheld is a share below 1, got 1'):
        draw(withheld=1, **ALOUD)


@pytest.mark.parametrize('at_s, words', [(.01, 1), (.12, 1), (.14, 2), (9., 2), (0., 0)])
def test_an_utterance_is_split_in_the_nearest_silence(at_s, words):
    assert framed.cut(WORDS, at_s) == (words, pytest.approx({0: 0., 1: .1, 2: .16}[words]))


@pytest.mark.parametrize('record, vocab, options, message', [
    (said(feats=()), V, {}, 'record one: it has no sound'),
    (said(words=WORDS[:1]), V, {}, 'no two words to split between'),
    (None, V, dict(prompt_s=.1, stack_frames=99), 'nothing to hear, to write or to speak'),
    (None, parallel(dict(size=1), text_tokens=20, rows=(), text_marks=('frame',)), {}, 'with end'),
])
def test_what_cannot_be_drawn_is_refused(record, vocab, options, message):
    with pytest.raises(ValueError, match=message):
        draw(record, vocab, **options)


# How it is measured.

TRUE = np.array([[1, 2], [3, 5], [4, 4]], np.float32)
SAID = np.array([[1, 1], [2, 5], [4, 5]], np.float32)
SIZES = Sizes((Row('text', 0, 4, 3),), 4, 8)


def measured(said_true, weights, segment, each=1, framed_=None, width=2, **options):
    """Terms of frames [T x each, width] that stand `each` to a column, beside tokens of no loss."""
    columns = [x.reshape(1, -1, width * each) for x in said_true]
    B, T, _ = columns[0].shape
    batch = dict(tokens=np.zeros((1, 1, T), int), weights=np.reshape(weights, (1, 1, T)),
                 segment=np.reshape(segment, (1, T)), frames=columns[1],
                 framed=np.ones((1, T), int) if framed_ is None else np.reshape(framed_, (1, T)))
    cells = np.zeros((1, 1, T))
    terms, _ = objective(cells, cells, batch, dict(frames=columns), sizes=SIZES, ranges={},
                         terms=dict(text=('text',)), bins=2, **options)
    return {k: (float(s), float(w)) for k, (s, w) in terms.items()}


def test_the_arithmetic_of_three_frames():
    """By hand: sums of 6, 6, 8 and 6; means of 1, 2, 2 and 3."""
    found = measured((SAID, TRUE), [1, 1, 1], [1, 1, 1], delta_frames=2)
    assert found == dict(text=(0, 3), frames=(6, 6), bins=(6, 3), **{'time 1': (8, 4),
                                                                     'time 2': (6, 2)})
    three = measured((SAID, TRUE), [1], [1], each=3, delta_frames=2)    # all in one column
    assert {k: x for k, x in three.items() if k != 'text'} == {
        k: x for k, x in found.items() if k != 'text'}
    heavy = measured((SAID, TRUE), [2, 2, 2], [1, 1, 1], delta_frames=1, scales=dict(bins=.5))
    assert heavy['frames'] == (12, 12) and heavy['bins'] == (6, 6) and heavy['time 1'] == (16, 8)


def test_differences_stay_within_a_sound():
    """Between two segments, over a column that holds none, and from what is only context there is
    no difference; packed together, two sounds weigh what they weigh alone."""
    six = tuple(np.concatenate([x, 3 * x]) for x in (SAID, TRUE))
    alone = [measured((a, b), [1, 1, 1], [1, 1, 1], delta_frames=3)
             for a, b in ((SAID, TRUE), (3 * SAID, 3 * TRUE))]
    packed = measured(six, [1] * 6, [1, 1, 1, 2, 2, 2], delta_frames=3)
    assert packed == {k: (alone[0][k][0] + alone[1][k][0], alone[0][k][1] + alone[1][k][1])
                      for k in packed}
    assert packed['time 3'] == (0, 0)
    hole = measured((SAID, TRUE), [1, 1, 1], [1, 1, 1], framed_=[1, 0, 1], delta_frames=1)
    assert hole['frames'] == (2 + 2, 4) and hole['time 1'] == (0, 0)
    given = measured((SAID, TRUE), [0, 1, 1], [1, 1, 1], delta_frames=1)
    assert given['frames'][1] == 4 and given['time 1'] == (4, 2)


def test_wrong_options_of_the_objective():
    with pytest.raises(ValueError, match='bins 2 must divide the 3 numbers'):
        measured((np.ones((1, 3)), np.ones((1, 3))), [1], [1], width=3, delta_frames=1)
    with pytest.raises(ValueError, match=r"scales names \['time 9'\]"):
        measured((SAID, TRUE), [1] * 3, [1] * 3, delta_frames=1, scales={'time 9': 1.0})


# How it is spoken.

@functools.cache
def made():
    """(config, graph, parameters) of a small model with a scale that gives it preferences."""
    c = mlc.ConfigDict()
    c.codec = dict(size=1, codebooks=1)
    c.vocab = dict(name='parallel', text_tokens=20, rows=(), text_marks=('frame', 'end'))
    c.frontend = dict(name='summed', dtype='float32',
                      prenet=dict(name='mlp', features=10, hidden=4),
                      encoder=dict(name='listener', features=40, inside=8, layers=1, heads=2,
                                   mlp=12))
    c.backbone = dict(name='decoder', width=12, layers=2, heads=2, kv_heads=2, head_dim=6, mlp=16,
                      theta=100.0, remat='none', block_columns=16)
    c.head = dict(name='spectrogram', features=10, hidden=16)
    c.objective = dict(name='frames', terms=dict(text=('text',)), bins=5, delta_frames=2)
    graph, _, _ = model.abstract(c)
    return c, graph, jax.tree.map(lambda x: 1.5 * x, model.init(c, jax.random.key(3)))


def batch_of(grids, columns=48):
    """Grids [1, T_i] as rows of a batch of their own."""
    rows = []
    for g in grids:
        T = g.tokens.shape[1]
        row = dict(tokens=np.full((1, columns), NOTHING), position=np.zeros(columns, int),
                   segment=np.zeros(columns, int), feats=np.zeros((columns, 40), np.float32),
                   slot=np.zeros(columns, int), frames=np.zeros((columns, 10), np.float32),
                   framed=np.zeros(columns, int), weights=np.zeros((1, columns), np.float32))
        for name, x in dict(tokens=g.tokens, weights=g.weights, position=g.position,
                            segment=g.segment, **g.extra).items():
            row[name][..., :T] = x if name in ('tokens', 'weights') else row[name][..., :T]
            if name not in ('tokens', 'weights'):
                row[name][:T] = x
        rows.append(row)
    return {k: np.stack([r[k] for r in rows]) for k in rows[0]}


@functools.cache
def both():
    _, graph, _ = made()
    return jax.jit(lambda p, b: (nnx.merge(graph, p).forward(b), nnx.merge(graph, p).scores(b)[0]))


def forward(batch):
    """(log-probabilities, hits, what is beside) and the scores [B, T, V]."""
    return both()(made()[2], batch)


def grids():
    """Two utterances of different lengths and noise for sound."""
    rng = np.random.default_rng(0)
    out = []
    for n in (27, 20):
        feats = rng.standard_normal((n, 5)).astype(np.float32)
        out.append(draw(said(feats=(feats,), duration_s=n / 100), **CONTINUED))
    return out


def until(asked, columns):
    """(features, prompts) of the first `columns` of each grid."""
    pairs = list(zip(asked, columns, strict=True))
    return ([(g.extra['feats'][:n], g.extra['slot'][:n]) for g, n in pairs],
            [g.tokens[:, :n] for g, n in pairs])


def test_spoken_is_the_training_forward():
    """From the true text: every frame is what the whole sequence, read at once, says there, and
    speech ends in the first column in which its end is likelier than another frame."""
    c, graph, params = made()
    speaker = generate.ready(graph, params, V, {})
    asked = grids()
    firsts = [int(np.argmax(g.extra['framed'] > 0)) for g in asked]
    heard, prompts = until(asked, firsts)
    for end in range(20):       # an untrained model ends soon, by most ids; one will do as the end
        marked = frames.Marks(V.specials['frame'], end)
        spoken = frames.say(speaker, prompts, marked, heard=heard, most_columns=21, chunk=4)
        if 4 < max(map(len, spoken)) < 21 and len(spoken[0]) != len(spoken[1]):
            break
    lengths = set()
    for p, h, x in zip(prompts, heard, spoken, strict=True):
        n, m = p.shape[1], len(x)
        lengths.add(m)
        batch = batch_of([draw(**CONTINUED)])
        for name in ('tokens', 'slot', 'framed', 'segment', 'frames', 'feats'):
            batch[name] = np.zeros_like(batch[name])
        batch['tokens'][0, 0, :n], batch['tokens'][0, 0, n:n + m] = p, marked.frame
        batch['segment'][0, :n + m] = 1
        batch['position'][0] = np.arange(48)
        batch['feats'][0, :n], batch['slot'][0, :n] = h
        batch['frames'][0, n:n + m], batch['framed'][0, n:n + m] = x, 1
        (_, _, beside), scores = forward(batch)
        say, true = (np.asarray(z[0]) for z in beside['frames'])
        np.testing.assert_allclose(say[n:n + m], x, atol=2e-4)
        np.testing.assert_array_equal(true[n:n + m], x)
        scores = np.asarray(scores[0])
        over = scores[:, marked.end] > scores[:, marked.frame]      # of the column after
        assert not over[n - 1:n + m - 1].any() and (over[n + m - 1] or m == 21)
    assert len(lengths) == 2 and max(lengths) > 4, lengths


def test_a_withheld_frame_is_said_but_not_read_back():
    batch = batch_of([draw(**CONTINUED)])
    t = int(np.argmax(batch['framed'][0] > 0)) + 1
    for mark, seen in ((1, True), (2, False)):
        batch['framed'][0, t] = mark
        other = batch | dict(frames=batch['frames'].copy())
        other['frames'][0, t] += 1.0
        ((_, _, beside), a), ((_, _, moved), b) = forward(batch), forward(other)
        assert (np.abs(np.asarray(a - b))[0, t:].max() > 1e-3) == seen
        said, true = (np.asarray(x) for x in moved['frames'])       # it is still the target
        np.testing.assert_allclose(true[0, t] - np.asarray(beside['frames'][1])[0, t], 1.0,
                                   rtol=1e-5)


def test_what_is_silent_still_learns():
    """Hidden units of the post-net that are all below zero have gradients: none dies for good."""
    head = Spectrogram(Sizes((Row('text', 0, 4, 3),), 4, 8), rngs=nnx.Rngs(0), features=6, hidden=5)
    h = jax.random.normal(jax.random.key(1), (2, 3, 8))
    head.up.bias[...] = -jnp.abs(head.up(h)).max((0, 1)) - 0.1
    assert (head.up(h) < 0).all()
    slope = nnx.grad(lambda head: head.frame(h).sum())(head)
    assert (jnp.abs(slope.up.bias[...]) > 1e-3).all()


def test_frames_are_said_and_read_in_their_own_units():
    """Around their mean, in deviations: the same maps of other numbers."""
    sizes, h = Sizes((Row('text', 0, 4, 3),), 4, 8), jax.random.normal(jax.random.key(1), (2, 8))

    def head(**options):
        return Spectrogram(sizes, rngs=nnx.Rngs(0), features=6, hidden=5, **options)
    np.testing.assert_allclose(head(mean=-0.6, deviation=0.5).frame(h), 0.5 * head().frame(h) - 0.6,
                               rtol=1e-6)
    with pytest.raises(ValueError, match='head.deviation must be above 0, got 0'):
        head(deviation=0.0)
    x = jax.random.normal(jax.random.key(2), (1, 2, 6))
    own, other = (encoder.Gated(8, rngs=nnx.Rngs(0), features=6, hidden=5, mean=mean)
                  for mean in (-0.6, 0.0))
    np.testing.assert_allclose(own(x, None, None), other(x + 0.6, None, None), rtol=1e-6)


def test_no_score_sees_a_later_frame():
    """Gradients of what is said in a column reach the frames before it and none from it on; those
    of the tokens' scores too. What is heard is heard before anything is scored."""
    _, graph, params = made()
    batch = batch_of(grids()[:1])
    scored = np.flatnonzero(batch['weights'][0, 0] > 0)
    sound = np.flatnonzero(batch['framed'][0])
    assert scored.min() > np.flatnonzero(batch['slot'][0]).max()

    def probe(x, t):
        logp, _, beside = nnx.merge(graph, params).forward(batch | dict(frames=x))
        return logp[0, 0, t] + jnp.sum(jnp.sin(beside['frames'][0][0, t]))
    slope, reach = jax.jit(jax.grad(probe)), 0
    for t in sound[[0, 2, -1]]:
        g = np.abs(np.asarray(slope(jnp.asarray(batch['frames']), t))[0]).sum(-1)
        assert not g[t:].any() and (g[sound[sound < t]] > 0).all()
        reach += (g > 0).sum()
    assert reach


def test_a_question_is_written_and_then_spoken():
    """Nothing of the answer given: the text is what `reply` writes, and the frames follow it."""
    c, graph, params = made()
    lm = trained.LM(c, None, V, graph, params, 0, '')
    asked = grids()
    n = [int(np.argmax(g.tokens[0] == V.specials['bos'])) + 1 for g in asked]
    heard, prompts = until(asked, n)
    found = frames.answered(lm, prompts, heard, most_tokens=5, most_columns=8)
    for (ids, x), p, h in zip(found, prompts, heard, strict=True):
        assert ids[-1] == V.specials['eos'] and len(ids) <= 6 and x.shape[1] == 10
        prompt = np.concatenate([p, ids[None]], axis=1)
        longer = [np.concatenate([z, np.zeros((len(ids), *z.shape[1:]), z.dtype)]) for z in h]
        again = frames.say(lm.speaker(), [prompt], frames.marks(V), heard=[tuple(longer)],
                           most_columns=8)[0]
        np.testing.assert_allclose(x, again, atol=2e-4)


# How it is heard.

def test_frames_are_heard_as_what_they_were(corpus):
    """Speech through log-mel frames and back: the frames of what is heard are those that were
    spoken, but for what Griffin-Lim loses."""
    c = configs.read(f'{ROOT}/configs/spectron.py:tiny')
    c.data.path, c.codec.path = str(corpus), str(corpus / 'units.safetensors')
    c.vocab.tokenizer = str(corpus / 'text.model')
    record = next(data.examples(c, 'train', 'told', vocab=model.make_vocab(c)))
    before = record.feats[0][:]
    wav = frames.wave(c, before[:len(before) // 8 * 8].reshape(-1, 640))
    flac = io.BytesIO()
    soundfile.write(flac, wav, 16_000, format='FLAC')
    after = codec.log_mel(flac.getvalue())[0][:]
    before = before[:len(after)]
    assert len(after) > 100
    assert np.abs(after - before).mean() < 0.15 * np.abs(before - before.mean(0)).mean()
    with pytest.raises(ValueError, match=r'finite \[S, 80\]'):
        codec.heard(np.zeros((4, 5)))


def test_distance_is_blind_to_pace_and_nothing_else():
    x = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    assert frames.distance(x, x) == 0 and frames.distance(np.repeat(x, 3, 0), x) == 0
    assert frames.distance(x[::-1], x) > 0.3
    assert frames.distance(x + 0.25, x) <= 0.25 + 1e-6
    assert frames.distance(x[:0], x) == pytest.approx(np.abs(x).mean(), abs=1e-6)
    assert len(frames.wave(None, x[:0])) and not frames.wave(None, x[:0]).any()


# From a corpus.

def test_sound_is_packed_with_its_columns(corpus):
    c = configs.read(f'{ROOT}/configs/spectron.py:tiny')
    c.data.path, c.codec.path = str(corpus), str(corpus / 'units.safetensors')
    c.vocab.tokenizer = str(corpus / 'text.model')
    v = model.make_vocab(c)
    arrays, used, _ = next(data.one_pass(c, 'told', v, batch=4, split='train', limit=4))
    assert arrays['frames'].shape == (4, 256, 640) and arrays['feats'].shape == (4, 256, 640)
    mark = arrays['tokens'][:, 0] == v.specials['frame']
    np.testing.assert_array_equal(mark, arrays['framed'] > 0)
    assert mark.any() and not arrays['frames'][~mark].any() and used['told']['audio_s'] > 1
    record = next(data.examples(c, 'train', 'told', vocab=v))
    grid = data.grid(c, 'told', v)
    sound = frames.true_frames(grid).reshape(-1, 80)
    whole = record.feats[0][:]
    first = round(framed.cut(record.words, 1.5)[1] * len(whole) / record.duration_s)
    np.testing.assert_allclose(sound, whole[first:first + len(sound)], atol=1e-4)
    assert len(whole) - first - len(sound) < 8
    c.frontend.prenet.features = 80
    with pytest.raises(ValueError, match='draws 640 features per column, frontend.prenet.features'):
        data.grid(c, 'told', v)


@pytest.mark.slow
def test_a_run_is_measured_and_heard(corpus, tmp_path):
    """A few steps on real speech: every verb that speaks or listens does so in frames."""
    c = configs.read(f'{ROOT}/configs/spectron.py:tiny')
    c.data.path, c.codec.path = str(corpus), str(corpus / 'units.safetensors')
    c.vocab.tokenizer, work = str(corpus / 'text.model'), str(tmp_path / 'run')
    # After two steps it may still be chance whether it ends before it has said a frame.
    c.stages = tuple(dict(s) | dict(steps=12, save_steps=12) for s in configs.plain(c.stages))
    assert np.isfinite(train.run(c, work))
    for task in ('sounds', 'aloud'):
        found = evaluate.run(c, work, tasks=(task,), limit=3)[0]['metrics']
        assert found['length %'] > 0 and 0 < found['distance'] < 2
    found = evaluate.run(c, work, tasks=('written',), limit=3)[0]['metrics']
    assert 0 <= found['WER %'] <= 100 and 0 <= found['WER %/floor'] <= 100
    c.evals.written.source = 'aloud'
    with pytest.raises(configs.ConfigError, match='written: nothing is heard in data.sources.alo'):
        evaluate.run(c, work, tasks=('written',), limit=3)
    for task, given in (('tts', 'the ball is in the garden'), ('s2s', None)):
        out = str(tmp_path / (f'{task}.wav' if given else task))
        speak.run(c, work, task=task, stage_name=None, source=given, out=out, split='test', count=2,
                  temperature=None, top_k=None, top_p=None, seed=0)
        path = out if given else f'{out}/{task}-000.wav'
        wav, rate = soundfile.read(path)
        assert rate == 16_000 and len(wav) > 100 and np.isfinite(wav).all()
    with pytest.raises(configs.ConfigError, match='it speaks frames; use tts or s2s'):
        speak.run(c, work, task='asr', stage_name=None, source=given, out=out, split='test',
                  count=1, temperature=None, top_k=None, top_p=None, seed=0)

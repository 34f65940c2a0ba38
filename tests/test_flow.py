# SPDX-License-Identifier: Apache-2.0
"""Does a flow learn and follow the field that carries a guess to the truth, where it is known?"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import ml_collections as mlc
import numpy as np
import pytest
import soundfile
from flax import nnx

from jaxsd import codec, data, evaluate, flow, frames, generate, model, speak, train, trained
from jaxsd import config as configs
from jaxsd.layout import framed, show
from jaxsd.objective import flow as objective
from jaxsd.types import Record, Row, Sizes, Turn
from jaxsd.vocab import line

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT / 'tests' / 'golden' / 'layout'

# A prior N(M, A^2) and a truth N(N, B^2), drawn apart: what is known of them, one number at a time.
M, A, N, B = 0.4, 0.7, -1.1, 0.3


def field(x, t):
    """The mean velocity at x and t, from the joint normal of x and x1 - x0 (by conditioning)."""
    spread = (1 - t) ** 2 * A ** 2 + t ** 2 * B ** 2
    return (N - M) + (t * B ** 2 - (1 - t) * A ** 2) / spread * (x - (1 - t) * M - t * N)


def carried(x0):
    """Where that field carries x0 by time 1, in closed form: it keeps the order of a normal."""
    return N + B / A * (x0 - M)


@pytest.mark.parametrize('t', [0.0, 0.2, 0.5, 0.9, 1.0])
def test_the_line_of_best_fit_is_the_field_of_two_normals(t):
    """The least squares of what a flow is asked to say, on where it is asked, is the closed form:
    both are linear in x, so that a fitted line has its slope and its height."""
    rng = np.random.default_rng(0)
    x0, x1 = M + A * rng.standard_normal(200_000), N + B * rng.standard_normal(200_000)
    x, velocity = flow.between(x0, x1, t)
    slope, height = np.polyfit(x, velocity, 1)
    for at in (-1.0, 0.0, 1.5):
        assert slope * at + height == pytest.approx(field(at, t), abs=0.02)


def test_the_sampler_follows_a_known_field_to_its_end():
    """From any x0 to the closed form, with an error that halves when the steps double."""
    x0 = jnp.linspace(-2, 2, 9)
    errors = [float(jnp.abs(flow.follow(field, x0, steps) - carried(x0)).max())
              for steps in (64, 128, 256)]
    assert errors[-1] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)
    # A constant velocity needs one step, and time is seen to run from 0 on.
    assert float(flow.follow(lambda x, t: 3.0 + 0 * x, jnp.zeros(()), 1)) == 3.0
    assert float(flow.follow(lambda x, t: t, jnp.zeros(()), 4)) == pytest.approx(0.375)


def test_a_prior_near_the_truth_needs_fewer_steps():
    """What centering the prior on the units is for (arXiv 2401.13527): to an error that a prior
    around zero comes to in many steps, one close by comes in few."""
    def steps_to(m, a, tolerance=0.02):
        def known(x, t):
            spread = (1 - t) ** 2 * a ** 2 + t ** 2 * B ** 2
            return (N - m) + (t * B ** 2 - (1 - t) * a ** 2) / spread * (x - (1 - t) * m - t * N)
        x0 = m + a * jnp.linspace(-2, 2, 9)
        return next(steps for steps in range(1, 200) if float(jnp.abs(flow.follow(
            known, x0, steps) - (N + B / a * (x0 - m))).max()) < tolerance)
    assert steps_to(N + 0.2, B) < 0.75 * steps_to(0.0, 1.0) < 0.5 * steps_to(0.0, 2.0)


# As a head.

V = line(dict(size=20, codebooks=8), text_tokens=8, markers=('a',), multiple=1)


@functools.cache
def made(sigma=0.5):
    c = mlc.ConfigDict()
    c.codec = dict(size=20, codebooks=8)
    c.vocab = dict(name='line', text_tokens=8, markers=('a',), multiple=1)
    c.frontend = dict(name='summed', dtype='float32')
    c.backbone = dict(name='decoder', width=8, layers=1, heads=2, kv_heads=2, head_dim=4, mlp=16,
                      theta=100.0, remat='none', block_columns=8)
    c.head = dict(name='flowing', latents=3, scale=2.0, sigma=sigma, inside=32, layers=1, heads=2,
                  mlp=48)
    c.objective = dict(name='flow', terms=dict(tokens=('tokens',)))
    graph, _, _ = model.abstract(c)
    return c, graph, model.init(c, jax.random.key(0))


def batch_of(means, true, given=0, segment=None):
    """A batch of sounds [B, T, 3] whose first columns are given, between two empty columns."""
    def wide(x):
        return np.pad(x, ((0, 0), (1, 1)) + ((0, 0),) * (x.ndim - 2))
    rows, columns = means.shape[:2]
    weights = np.ones((rows, columns), np.float32)
    weights[:, :given] = 0
    segment = wide(np.ones((rows, columns), int) if segment is None else segment)
    return dict(tokens=wide(np.full((rows, columns), 9))[:, None], weights=wide(weights)[:, None],
                means=wide(means), frames=wide(true), framed=(segment > 0).astype(int),
                segment=segment, position=np.tile(np.arange(columns + 2), (rows, 1)))


def test_a_trained_flow_draws_from_the_truth():
    """Units stand for one of two means and the truth is a normal elsewhere for each: after training
    by the objective, draws have the truth's means and deviations, where the prior has neither."""
    import optax
    c, graph, params = made()
    rng = np.random.default_rng(0)
    objective_of = model.objective_of(c)
    kinds = np.array([[1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    truth = np.array([[-1.0, 2.0, 1.0], [3.0, -2.0, -1.0]])

    def sounds(rows):
        kind = rng.integers(0, 2, (rows, 6))
        return kind, batch_of(kinds[kind], truth[kind] + 0.4 * rng.standard_normal((rows, 6, 3)))
    tx = optax.adam(5e-3)

    @jax.jit
    def step(params, opt, batch, key):
        def loss(p):
            terms, _ = objective_of(*(lambda out: (out[0], out[1], batch, out[2]))(
                nnx.merge(graph, p).forward(batch, key)))
            return terms['flow'][0] / terms['flow'][1]
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt, value
    opt, values = tx.init(params), []
    for n in range(250):
        params, opt, value = step(params, opt, sounds(64)[1], jax.random.key(n))
        values.append(float(value))
    assert np.mean(values[-50:]) < 0.5 * np.mean(values[:10])
    kind, batch = sounds(256)
    drawn = np.asarray(jax.jit(lambda p: nnx.merge(graph, p).head.refine(
        batch, jax.random.key(1), 16))(params))[:, 1:-1]
    for k in (0, 1):
        assert np.abs(drawn[kind == k].mean(0) - truth[k]).max() < 0.25
        assert 0.2 < drawn[kind == k].std(0).mean() < 0.6


def test_what_is_given_stays_and_is_heard():
    """A prompt comes back as it was and moves what follows it; sounds packed into one row do not
    hear each other, and columns without sound change nothing."""
    _, graph, params = made(sigma=0.0)
    rng = np.random.default_rng(1)
    means, true = rng.standard_normal((2, 1, 8, 3)).astype(np.float32)
    refine = jax.jit(lambda b: nnx.merge(graph, params).head.refine(b, jax.random.key(0), 4))
    out = np.asarray(refine(batch_of(means, true, given=3)))[0, 1:-1]
    np.testing.assert_array_equal(out[:3], true[0, :3])
    louder = true.copy()
    louder[:, 0] += 3
    moved = np.asarray(refine(batch_of(means, louder, given=3)))[0, 1:-1]
    assert np.abs(moved - out)[3:].max(-1).min() > 1e-4
    later = true.copy()
    later[:, 5] += 3            # the truth that is asked for is not heard
    np.testing.assert_array_equal(np.asarray(refine(batch_of(means, later, given=3)))[0, 1:-1], out)
    two = np.array([[1, 1, 1, 1, 2, 2, 2, 2]])
    apart = np.asarray(refine(batch_of(means, true, segment=two)))[0, 1:-1]
    other = means.copy()
    other[:, 4:] += 1
    again = np.asarray(refine(batch_of(other, true, segment=two)))[0, 1:-1]
    np.testing.assert_allclose(again[:4], apart[:4], atol=1e-6)
    assert np.abs(again[4:] - apart[4:]).min() > 1e-4
    # As `frames` packs it for speech: alone in a row, which is wider.
    lm = trained.LM(None, None, V, graph, params, 0, '')
    lone = frames.refine(generate.ready(lm.graph, lm.params, V, {}), [means[0]], [true[0, :3]],
                         steps=4)[0]
    np.testing.assert_allclose(lone, out, atol=1e-5)


def test_the_objective_is_a_mean_square_of_what_weighs():
    sizes = Sizes((Row('tokens', 0, 4, 4),), 4, 8)
    weights = np.array([[[0, 1, 2.0]]])
    said, true = np.zeros((1, 3, 2)), np.array([[[9, 9], [1, 2], [3, 0.0]]])
    batch = dict(tokens=np.zeros((1, 1, 3), int), weights=weights, framed=np.ones((1, 3)),
                 frames=true)
    terms, _ = objective(-np.ones((1, 1, 3)), np.zeros((1, 1, 3)), batch, dict(frames=(said, true)),
                         sizes=sizes, ranges={}, terms=dict(tokens=('tokens',)))
    assert {k: (float(s), float(w)) for k, (s, w) in terms.items()} == dict(
        tokens=(3, 3), flow=(1 * 5 + 2 * 9, 3 * 2))
    del batch['frames']
    assert set(objective(0 * weights, 0 * weights, batch, sizes=sizes, ranges={},
                         terms=dict(tokens=('tokens',)))[0]) == {'tokens'}


@pytest.mark.parametrize('options', [dict(scale=0.0), dict(sigma=-1.0), dict(latents=0)])
def test_wrong_options_of_the_head(options):
    with pytest.raises(ValueError, match='head'):
        configs.bind(dict(name='flowing', latents=3, scale=1.0, sigma=1.0, inside=8, layers=1,
                          heads=2, mlp=8) | options, 'jaxsd.head', 'head', given=('rngs',))(
            V.sizes(8), rngs=nnx.Rngs(0))


# How it is drawn, and from where.

def drawn(record, **options):
    return framed.refined(record, vocab=V, rng=np.random.default_rng(0), **options)


UNITS = np.array([3, 3, 19, 4, 7], np.int16)
LATENTS = np.arange(5 * 2 * 3, dtype=np.float32).reshape(5, 2, 3)


def test_drawn_by_hand():
    """Five units of one voice, two fifths given."""
    record = Record('one', 'toy', 'en', .4, units=(UNITS,), latents=(LATENTS,))
    grid = drawn(record, given=(.4, .4))
    assert show.text(grid, V) + '\n' == (GOLDEN / 'framed_refined.txt').read_text()
    assert grid.extra['framed'].tolist() == [0, 1, 1, 1, 1, 1]
    np.testing.assert_array_equal(grid.extra['means'][1:], LATENTS[:, 0])
    np.testing.assert_array_equal(grid.extra['frames'][1:], LATENTS[:, 1])
    both = Record('two', 'toy', 'en', .4, units=(UNITS, UNITS - 1), latents=(LATENTS, LATENTS + 90),
                  turns=(Turn(1, .16, .32, 'x'),))
    grid = drawn(both)      # two frames of the one who speaks
    assert [V.name(t) for t in grid.tokens[0, 1:]] == [('units', 18), ('units', 3)]
    np.testing.assert_array_equal(grid.extra['frames'][1:], LATENTS[2:4, 1] + 90)
    for wrong, message in ((dict(given=(.5, .2)), 'two shares'), (dict(given=(0., 1.)), 'shares')):
        with pytest.raises(ValueError, match=message):
            drawn(record, **wrong)
    with pytest.raises(ValueError, match='record bare: it has no latents'):
        drawn(Record('bare', 'toy', 'en', .4, units=(UNITS,)))


def config_on(corpus):
    c = configs.read(f'{ROOT}/configs/speechgpt.py:tiny,gen')
    c.data.path, c.codec.path = str(corpus), str(corpus / 'codec.safetensors')
    c.vocab.tokenizer = str(corpus / 'text.model')
    return c, model.make_vocab(c)


def test_latents_of_a_corpus(corpus):
    """They are sums of the codec's own vectors, all of them are heard as its codes are, and only
    the stage that needs them is given them."""
    c, v = config_on(corpus)
    made = codec.fitted(c.codec.path)
    record = next(data.examples(c, 'train', 'refined', vocab=v))
    codes = record.codes[0]
    np.testing.assert_array_equal(record.units[0], codes[0])
    lazy = record.latents[0]
    assert len(lazy) == codes.shape[1] and lazy[3:7].shape == (4, 2, 64)
    np.testing.assert_array_equal(made.latents(codes[:1]), lazy[:][:, 0])
    np.testing.assert_array_equal(made.sound(lazy[:][:, 1]), made.decode(codes))
    same = made.latents(np.full((1, 2), codes[0, 0]))
    np.testing.assert_array_equal(same[0], lazy[0:1][0, 0])
    for x, message in ((np.zeros((3, 5)), r'latents are finite \[T, 64\]'),
                       (np.full((1, 64), np.nan), 'finite')):
        with pytest.raises(ValueError, match=message):
            made.sound(x)
    with pytest.raises(ValueError, match='codes must lie in'):
        made.latents(np.full((1, 2), 9999))
    for stage in c.stages:
        there = data.extras(c, stage)
        assert there == (dict(means=64, frames=64, framed=0) if stage['name'] == 'flow' else {})
    arrays, used, _ = next(data.one_pass(c, 'refined', v, batch=2, split='train', limit=4))
    assert arrays['means'].shape == (2, c.columns, 64) and used['refined']['audio_s'] > 0
    error = np.square(arrays['means'] - arrays['frames']).sum()
    assert 0 < error < 0.6 * np.square(arrays['frames']).sum()
    arrays, *_ = next(data.one_pass(c, 'asr', v, batch=2, split='train', limit=2))
    assert 'frames' not in arrays


@pytest.mark.slow
def test_a_run_is_measured_and_heard(corpus, tmp_path):
    """Every stage for a few steps; then units that are said are carried to sound by the flow."""
    c, v = config_on(corpus)
    work, out = str(tmp_path / 'run'), tmp_path / 'said'
    assert np.isfinite(train.run(c, work))
    found = evaluate.run(c, work, tasks=('refined',), limit=4)[0]['metrics']
    assert found['left %/8 steps'] > 0 and found['left %/mean'] > 100
    speak.run(c, work, task='tts', stage_name=None, source=None, out=str(out), split='test',
              count=2, temperature=None, top_k=None, top_p=None, seed=0)
    for name in ('tts-000.wav', 'tts-001.wav', 'true/tts-000.wav'):
        wav, rate = soundfile.read(out / name)
        assert rate == 16_000 and len(wav) > 100 and np.isfinite(wav).all()

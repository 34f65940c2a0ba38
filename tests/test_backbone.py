# SPDX-License-Identifier: Apache-2.0
"""Does the decoder see what it may, packed or streamed, however it is computed?"""

import functools

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import BACKBONES

from jaxsd import nn
from jaxsd.backbone import decoder
from jaxsd.types import Sizes, Where

WIDTH, COLUMNS = 16, 40


@functools.cache
def made(kind: str, **changes):
    """A decoder of `kind`, its gains and biases moved off ones and zeros so that none can hide."""
    options = dict(width=WIDTH, layers=2, heads=4, kv_heads=4, head_dim=4, mlp=24, theta=100.0,
                   remat='none', block_columns=16) | BACKBONES[kind] | changes
    lm = decoder(Sizes((), 8, WIDTH), rngs=nnx.Rngs(0), **options)
    graph, state = nnx.split(lm)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32),
                          nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def where_of(*lengths: int, columns: int = COLUMNS) -> Where:
    """Segments of these lengths in one row [1, T], and nothing after them."""
    segment, position = np.zeros((2, 1, columns), np.int32)
    at = 0
    for s, n in enumerate(lengths):
        segment[:, at:at + n], position[:, at:at + n] = s + 1, np.arange(n)
        at += n
    return Where(jnp.asarray(position), jnp.asarray(segment))


def inputs(seed: int = 0, columns: int = COLUMNS):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((1, columns, WIDTH)), jnp.float32)


@nnx.jit
def forward(lm, x, where):
    return lm(x, where)[0]


@pytest.mark.parametrize('kind', BACKBONES)
def test_decoder_by_hand(kind):
    """Each kind against the equations in double precision."""
    lm, x = made(kind), inputs()
    params = by_hand.float64(nnx.to_pure_dict(nnx.state(lm)))
    options = {k: v for k, v in BACKBONES[kind].items()
               if k in ('pairs', 'window_columns', 'norm_eps', 'rope_scaling',
                        'experts_per_column')}
    want = by_hand.decoder(params, np.asarray(x[0], np.float64), theta=100.0, **options)
    np.testing.assert_allclose(forward(lm, x, where_of(COLUMNS))[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', BACKBONES)
def test_packed_segments_are_alone(kind):
    lm, x, lengths = made(kind), inputs(), (13, 1, 20)
    whole = np.asarray(forward(lm, x, where_of(*lengths)))
    assert np.isfinite(whole).all()         # the empty columns too
    at = 0
    for n in lengths:
        alone = forward(lm, x[:, at:at + n], where_of(n, columns=n))
        np.testing.assert_allclose(whole[:, at:at + n], alone, rtol=1e-5, atol=2e-5)
        at += n


@pytest.mark.parametrize('kind', BACKBONES)
def test_a_changed_column_moves_only_what_may_see_it(kind):
    """Not what came before, not another segment, not what lies further than the layers' windows."""
    lm, x, where = made(kind), inputs(), where_of(6, 30)
    before = np.asarray(forward(lm, x, where))
    reach = 2 * (BACKBONES[kind].get('window_columns', COLUMNS) - 1)     # of two layers
    for t, last in ((3, 5), (6, 35), (21, 35)):
        after = np.asarray(forward(lm, x.at[:, t].add(1.0), where))
        moved = np.flatnonzero(np.abs(after - before)[0, :36].max(-1) > 0)
        assert moved.tolist() == list(range(t, min(last, t + reach) + 1)), t
    after = forward(lm, x.at[:, 38].add(1.0), where)        # of no segment: nobody sees it
    np.testing.assert_array_equal(after[:, :36], before[:, :36])


@functools.partial(nnx.jit, static_argnums=4)
def streamed(lm, x, where, cache, chunk: int):
    """All columns of x through the cache, `chunk` at a time, as one compiled loop."""
    def step(cache, now):
        h, cache = lm(now[0], Where(*now[1]), cache)
        return cache, h

    def cut(z):
        return jnp.moveaxis(z.reshape(z.shape[0], -1, chunk, *z.shape[2:]), 1, 0)
    cache, h = jax.lax.scan(step, cache, (cut(x), tuple(cut(w) for w in where)))
    return jnp.moveaxis(h, 0, 1).reshape(x.shape), cache


@pytest.mark.parametrize('chunk', (1, 5))
@pytest.mark.parametrize('kind', BACKBONES)
def test_streaming_is_the_training_forward(kind, chunk):
    """Column by column or five at a time. With a window the ring is the window (and what a call
    brings), and the sequence is several times longer: it wraps, and nothing is lost or leaks."""
    lm, x, where = made(kind), inputs(), where_of(COLUMNS)
    want = forward(lm, x, where)
    window = BACKBONES[kind].get('window_columns')
    ring = window + chunk - 1 if window else COLUMNS
    cache = lm.empty_cache(1, ring, jnp.float32)
    got, after = streamed(lm, x, where, cache, chunk)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-5)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, cache)
    assert window is None or COLUMNS >= 3 * ring
    if window:      # and a slot less is too few, so the ring is no larger than it must be
        short, _ = streamed(lm, x, where, lm.empty_cache(1, ring - 1, jnp.float32), chunk)
        assert np.abs(np.asarray(short - want)).max() > 1e-3


@pytest.mark.parametrize('kind', BACKBONES)
def test_a_prompt_at_once_then_column_by_column(kind):
    """A call of many columns leaves the cache as calls of one leave it."""
    lm, x, where = made(kind), inputs(), where_of(COLUMNS)
    cache = lm.empty_cache(1, COLUMNS, jnp.float32)
    first = tuple(w[:, :12] for w in where)
    a, at_once = streamed(lm, x[:, :12], first, cache, 12)
    b, by_one = streamed(lm, x[:, :12], first, cache, 1)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, atol=2e-5), at_once, by_one)
    c, _ = streamed(lm, x[:, 12:], tuple(w[:, 12:] for w in where), at_once, 1)
    np.testing.assert_allclose(jnp.concatenate([a, c], 1), forward(lm, x, where), atol=3e-5)


def test_a_batch_of_prompts_of_different_lengths():
    """Columns of segment 0 before a shorter prompt are never seen by what follows."""
    lm, x = made('helium'), inputs()
    want = forward(lm, x[:, :20], where_of(20, columns=20))
    empty = 7
    segment = jnp.concatenate([jnp.zeros((1, empty), int), jnp.ones((1, 20), int)], 1)
    position = jnp.maximum(jnp.arange(27) - empty, 0)[None]
    for noise in (0.0, 5.0):
        padded = jnp.concatenate([noise * inputs(3)[:, :empty], x[:, :20]], 1)
        got, _ = streamed(lm, padded, (position, segment), lm.empty_cache(1, 27, jnp.float32), 9)
        np.testing.assert_allclose(got[:, empty:], want, rtol=1e-5, atol=3e-5)
        assert np.isfinite(got).all()


def value_and_gradient(lm, x, where):
    graph, state = nnx.split(lm)

    def loss(state, x):
        h = nnx.merge(graph, state)(x, where)[0]
        return jnp.sum(jnp.sin(h) * (where.segment > 0)[..., None])
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(state, x)


def assert_same(a, b, tolerance=2e-5):
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = max(1.0, float(np.abs(q).max()))
        np.testing.assert_allclose(p / scale, q / scale, atol=tolerance)


def test_recomputing_and_unrolling_change_nothing(monkeypatch):
    """Every remat, every block size and both forms of the scan: one value, one gradient."""
    x, where = inputs(), where_of(13, 20)
    want = value_and_gradient(made('helium'), x, where)
    for changes in (dict(remat='full', block_columns=64), dict(remat='dots', block_columns=13)):
        assert_same(value_and_gradient(made('helium', **changes), x, where), want)
    monkeypatch.setattr(nn, 'unroll', lambda layers, place: 1)      # as on an accelerator
    assert_same(value_and_gradient(made('helium'), x, where), want)
    assert_same(value_and_gradient(made('helium', remat='full'), x, where), want)


def test_rounding_of_the_stream_and_of_the_forward_agree_in_bfloat16():
    """A bfloat16 cache costs no more than bfloat16 arithmetic does anyway."""
    lm, x, where = made('helium'), inputs().astype(jnp.bfloat16), where_of(COLUMNS)
    exact = np.asarray(forward(lm, x.astype(jnp.float32), where))
    packed = np.asarray(forward(lm, x, where), np.float32)
    got, cache = streamed(lm, x, where, lm.empty_cache(1, 7, jnp.bfloat16), 1)
    assert cache['k'].dtype == got.dtype == jnp.bfloat16
    error = np.sqrt(np.mean((np.asarray(got, np.float32) - exact) ** 2))
    assert error < 2 * np.sqrt(np.mean((packed - exact) ** 2)) < 0.2


@pytest.mark.parametrize('change, message', [
    (dict(width=8), 'backbone.width 8 and the model width 16 must agree'),
    (dict(kv_heads=3), 'backbone.kv_heads 3 must divide backbone.heads 4'),
    (dict(remat='some'), "backbone.remat is 'full', 'dots' or 'none', got 'some'"),
    (dict(pairs='quarter'), "'half' or 'interleaved', got 'quarter'"),
    (dict(norm_gain='middle'), "'late' or 'early', got 'middle'"),
    (dict(qk_norm='row'), "backbone.qk_norm is 'none' or 'head', got 'row'"),
    (dict(experts=2, experts_per_column=3),
     'experts_per_column 3 must lie between 1 and backbone.experts 2'),
    (dict(experts=-1), 'backbone.experts -1'),
    (dict(rope_scaling='dynamic'), "rope_scaling is 'none' or has a name")])
def test_bad_options_say_which(change, message):
    with pytest.raises(ValueError, match=message):
        forward(made('llama', **change), inputs(), where_of(COLUMNS))

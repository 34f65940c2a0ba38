# SPDX-License-Identifier: Apache-2.0
"""Are the pieces of every model what the textbooks say, in values and in gradients?"""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import slowed as slowed_by_hand
from flax import nnx

from jaxsd import attention, nn
from jaxsd.types import Where


def normal(*shape, seed: int = 0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize('pairs', ('half', 'interleaved'))
def test_rotary_is_a_rotation_of_pairs(pairs):
    """Pair j of a column at position t, as a complex number, times exp(i t theta^(-2 j / H))."""
    x, at = normal(2, 5, 3, 8), np.array([[0, 1, 2, 7, 30], [3, 3, 0, 900, 5]])
    got = np.asarray(nn.rotate(jnp.asarray(x), jnp.asarray(at), theta=100.0, pairs=pairs))
    first, second = ((slice(0, 4), slice(4, 8)) if pairs == 'half' else
                     (slice(0, 8, 2), slice(1, 8, 2)))
    z = (x[..., first] + 1j * x[..., second]) * np.exp(
        1j * at[..., None, None] * 100.0 ** (-2 * np.arange(4) / 8))
    np.testing.assert_allclose(got[..., first], z.real, atol=2e-4)
    np.testing.assert_allclose(got[..., second], z.imag, atol=2e-4)


@pytest.mark.parametrize('pairs', ('half', 'interleaved'))
def test_rotary_products_depend_on_the_distance_alone(pairs):
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)

    def product(i, j):
        a, b = (nn.rotate(jnp.asarray(x), jnp.array([[at]]), theta=100.0, pairs=pairs)
                for x, at in ((q, i), (k, j)))
        return float(jnp.sum(a * b))
    assert product(7, 3) == pytest.approx(product(904, 900), abs=1e-3)
    assert product(7, 3) != pytest.approx(product(3, 7), abs=0.1)
    assert product(5, 5) == pytest.approx(float(np.sum(q * k)), abs=1e-5)


def test_rotary_layouts_are_one_rotation_in_two_orders():
    """Half layout of x = interleaved layout of x with its pairs brought together."""
    x, at = normal(2, 3, 2, 8), jnp.array([[0, 4, 9], [1, 2, 3]])
    order = np.array([0, 4, 1, 5, 2, 6, 3, 7])
    half = nn.rotate(jnp.asarray(x), at, theta=50.0, pairs='half')
    pairs = nn.rotate(jnp.asarray(x[..., order]), at, theta=50.0, pairs='interleaved')
    np.testing.assert_allclose(half[..., order], pairs, atol=1e-5)
    assert nn.rotate(jnp.asarray(x, jnp.bfloat16), at, theta=50.0, pairs='half'
                     ).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="'half' or 'interleaved'"):
        nn.rotate(jnp.asarray(x), at, theta=50.0, pairs='both')


def test_rotary_scaling_by_wavelength():
    """Sixteen pairs through all three regimes, each against the published cases."""
    numbers = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_columns=64)
    plain = nn.frequencies(16, 1000.0)
    np.testing.assert_allclose(plain, 1000.0 ** (-np.arange(16) / 16), rtol=1e-6)
    assert plain.dtype == np.float32
    got = nn.frequencies(16, 1000.0, dict(name='llama3', **numbers))
    want = [slowed_by_hand(f, 'llama3', **numbers) for f in plain.astype(float)]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    kept, slowed = got == plain, np.isclose(got, plain / 8)
    assert kept.any() and slowed.any() and (~kept & ~slowed).any()
    linear = dict(name='linear', factor=3.0)
    np.testing.assert_allclose(nn.frequencies(16, 1000.0, linear), plain / 3, rtol=1e-6)
    x, at = jnp.asarray(normal(1, 4, 1, 8)), jnp.arange(4)[None]
    for pairs in ('half', 'interleaved'):       # a third of the way for every column
        np.testing.assert_allclose(
            nn.rotate(x, 3 * at, theta=9.0, pairs=pairs, scaling=tuple(linear.items())),
            nn.rotate(x, at, theta=9.0, pairs=pairs), atol=1e-5)


@pytest.mark.parametrize('scaling, message', [
    ('llama3', "'none' or has a name of linear, llama3, got 'llama3'|takes the positive numbers"),
    (dict(name='yarn', factor=2.0), "got 'yarn'"), (dict(factor=2.0), 'got None'), (7, 'got 7'),
    (dict(name='linear', factor=0), 'takes the positive numbers factor, got'),
    (dict(name='linear', factor='2'), 'takes the positive numbers factor, got'),
    (dict(name='linear', factor=2.0, low=1.0), "'low'"),
    (dict(name='llama3', factor=2.0), 'low_freq_factor, high_freq_factor, original_columns'),
    (dict(name='llama3', factor=2.0, low_freq_factor=4.0, high_freq_factor=4.0,
          original_columns=8), 'low_freq_factor 4.0 must be below high_freq_factor 4.0')])
def test_bad_rotary_scaling_says_what_it_takes(scaling, message):
    with pytest.raises(ValueError, match=message):
        nn.frequencies(4, 100.0, scaling)


@functools.cache
def experts(count: int, chosen: int):
    return nn.Experts(6, 10, rngs=nnx.Rngs(3), experts=count, chosen=chosen)


def dense_experts(module, x_MD):
    """Every column through every expert, those that it did not choose weighted zero."""
    likely = jax.nn.softmax(x_MD @ module.router.kernel[...], -1)
    least = jnp.sort(likely, -1)[:, -module.chosen, None]
    weight = jnp.where(likely >= least, likely, 0)
    y = jnp.einsum('md,eduf->emuf', x_MD, module.gate_up[...])
    y = jnp.einsum('emf,efd->emd', jax.nn.silu(y[:, :, 0]) * y[:, :, 1], module.down[...])
    return jnp.einsum('emd,me->md', y, weight / weight.sum(-1, keepdims=True))


@pytest.mark.parametrize('columns, count, chosen', ((3, 5, 2), (200, 4, 2)))
def test_experts_are_all_experts_masked(columns, count, chosen):
    """Sorting into blocks changes neither values nor any gradient, from few columns to many."""
    module, x = experts(count, chosen), jnp.asarray(normal(1, columns, 6, seed=columns))
    graph, state = nnx.split(module)

    def loss(fn, state, x):
        return jnp.sum(jnp.sin(fn(nnx.merge(graph, state), x[0])))
    one = jax.jit(jax.value_and_grad(lambda s, x: loss(lambda m, x: m(x[None])[0], s, x), (0, 1)))
    two = jax.jit(jax.value_and_grad(lambda s, x: loss(dense_experts, s, x), (0, 1)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                 one(state, x), two(state, x))


def test_no_column_is_dropped_when_all_choose_one_expert():
    module, x = experts(5, 2), jnp.asarray(np.tile(normal(1, 1, 6), (1, 64, 1)))
    got = np.asarray(jax.jit(lambda x: module(x))(x))
    np.testing.assert_allclose(got[0], np.tile(dense_experts(module, x[0])[:1], (64, 1)), atol=1e-5)


def test_balance_is_least_where_experts_are_used_alike():
    """E sum_e f_e P_e is `chosen` for an even spread, E for one expert that always wins alone."""
    even = jnp.full((2, 4), 10.0) * jnp.array([[2.0], [1.0]])     # 40 columns, two experts each
    assert float(nn.balance(even, 40)) == pytest.approx(2.0)
    assert float(nn.balance(jnp.array([[40.0, 0, 0, 0]] * 2), 40)) == pytest.approx(4.0)
    assert float(nn.balance(jnp.zeros((2, 4)), 0)) == 0.0      # nothing at all


def test_the_load_of_experts_is_counted_over_real_columns():
    module, x = experts(5, 2), jnp.asarray(normal(2, 30, 6))
    real = np.arange(60).reshape(2, 30) % 7 > 1
    y, load = jax.jit(module.loaded)(x, jnp.asarray(real))
    np.testing.assert_array_equal(y, jax.jit(lambda x: module(x))(x))
    likely = np.asarray(jax.nn.softmax(x @ module.router.kernel[...], -1))[real]
    best = np.argsort(-likely, -1)[:, :2]
    np.testing.assert_array_equal(load[0], np.bincount(best.ravel(), minlength=5))
    np.testing.assert_allclose(load[1], likely.sum(0), rtol=1e-5)


@pytest.mark.parametrize('gain', ('late', 'early'))
def test_norm(gain):
    """float32 against numpy; bfloat16 rounds before ('late') or after ('early') the gain."""
    norm = nn.Norm(16, eps=0.3, gain=gain)
    weight, x = normal(16), 3 * normal(4, 16, seed=1)
    norm.weight = nnx.Param(jnp.asarray(weight), axes=('width',))
    scaled = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, -1, keepdims=True) + 0.3)
    np.testing.assert_allclose(norm(jnp.asarray(x)), scaled * weight, rtol=2e-6)

    low = jnp.asarray(x, jnp.bfloat16)
    x = np.asarray(low, np.float32)
    scaled = (x / np.sqrt(np.mean(x ** 2, -1, keepdims=True) + np.float32(0.3))).astype(np.float32)
    if gain == 'late':
        want = jnp.asarray(scaled, jnp.bfloat16) * jnp.asarray(weight, jnp.bfloat16)
    else:
        want = jnp.asarray(scaled * weight, jnp.bfloat16)
    assert norm(low).dtype == jnp.bfloat16
    # One bfloat16 ulp may flip where float32 rounds differently; the other order flips dozens.
    different = np.asarray(norm(low) != want)
    assert different.mean() < 0.05


def test_norm_gains_differ_in_bfloat16_only():
    x, weight = normal(64, 16), nnx.Param(jnp.asarray(normal(16, seed=1)), axes=('width',))
    out = []
    for gain in ('late', 'early'):
        norm = nn.Norm(16, eps=1e-5, gain=gain)
        norm.weight = weight
        out.append((norm(jnp.asarray(x)), norm(jnp.asarray(x, jnp.bfloat16))))
    np.testing.assert_array_equal(out[0][0], out[1][0])
    assert np.mean(np.asarray(out[0][1] != out[1][1])) > 0.2
    with pytest.raises(ValueError, match="'late' or 'early'"):
        nn.Norm(4, eps=1e-5, gain='never')


def packed(rows: int, columns: int):
    """Segments of lengths that differ between rows, and two empty columns at the end."""
    segment, position = np.zeros((2, rows, columns), np.int32)
    for i in range(rows):
        cuts = [0, 4 + i, 7 + 2 * i, columns - 2]
        for s, (a, b) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
            segment[i, a:b], position[i, a:b] = s + 1, np.arange(b - a)
    return Where(jnp.asarray(position), jnp.asarray(segment))


def by_hand(q, k, v, where, window):
    """Attention one query and one head at a time, in float64. Query head n reads kv head n // r."""
    B, T, N, H = q.shape
    repeat = N // k.shape[2]
    position, segment = (np.asarray(w) for w in where)
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        seen = [s for s in range(t + 1) if segment[b, s] == segment[b, t] > 0
                and (window is None or position[b, t] - position[b, s] < window)]
        if seen:
            s = k[b, seen, n // repeat].astype(np.float64) @ q[b, t, n] / np.sqrt(H)
            p = np.exp(s - s.max())
            out[b, t, n] = p / p.sum() @ v[b, seen, n // repeat]
    return out


@pytest.mark.parametrize('window', (None, 1, 3, 100))
@pytest.mark.parametrize('kv_heads', (1, 2, 4))
def test_attention_by_hand(kv_heads, window):
    """Grouped heads repeat (not tile), windows count the column itself, segments are alone, and
    blocks of any size, ragged too, are one block."""
    B, T, N, H = 2, 17, 4, 6
    q = normal(B, T, N, H)
    k, v = normal(B, T, kv_heads, H, seed=1), normal(B, T, kv_heads, H, seed=2)
    where = packed(B, T)
    want, real = by_hand(q, k, v, where, window), np.asarray(where.segment) > 0
    for block_columns in (512, 5, 4 if kv_heads == 2 else T):
        got = np.asarray(jax.jit(functools.partial(
            attention.causal_attention, window_columns=window, block_columns=block_columns))(
                q, k, v, where))
        np.testing.assert_allclose(got[real], want[real], atol=2e-6)
        assert np.isfinite(got).all()


@pytest.mark.parametrize('block_columns', (512, 5))
def test_padding_gives_finite_gradients_and_takes_no_part(block_columns):
    B, T, N, H = 2, 17, 4, 6
    q, k, v = normal(B, T, N, H), normal(B, T, 2, H, seed=1), normal(B, T, 2, H, seed=2)
    where = packed(B, T)
    empty = np.asarray(where.segment) == 0

    @functools.partial(jax.jit, static_argnums=3)
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradients(q, k, v, only_real):
        o = attention.causal_attention(q, k, v, where, window_columns=4,
                                       block_columns=block_columns)
        return jnp.sum(o ** 2 * (jnp.asarray(~empty)[..., None, None] if only_real else 1.0))
    for only_real in (False, True):
        grads = gradients(q, k, v, only_real)
        assert all(np.isfinite(g).all() for g in grads)
    for g in grads:     # of the loss on real columns: none reaches the padding
        assert not np.asarray(g)[empty].any() and np.asarray(g)[~empty].any()
    # A batch of nothing at all, as the last one of an epoch may hold.
    nowhere = Where(jnp.zeros((B, T), jnp.int32), jnp.zeros((B, T), jnp.int32))
    grad = jax.jit(jax.grad(lambda q: jnp.sum(attention.causal_attention(
        q, k, v, nowhere, window_columns=None, block_columns=block_columns) ** 2)))(q)
    assert np.isfinite(grad).all()


def test_attention_in_blocks_has_the_gradient_of_one_block():
    q, k, v = normal(1, 16, 2, 4), normal(1, 16, 1, 4, seed=1), normal(1, 16, 1, 4, seed=2)
    where = packed(1, 16)

    real = jnp.asarray(np.asarray(where.segment) > 0)[..., None, None]

    def grads(block_columns):
        return jax.jit(jax.grad(lambda *x: jnp.sum(real * jnp.sin(attention.causal_attention(
            *x, where, window_columns=5, block_columns=block_columns))), (0, 1, 2)))(q, k, v)
    for a, b in zip(grads(16), grads(3), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def shapes_in(jaxpr) -> set:
    """(dtype, shape) of every value of a jaxpr and of the jaxprs inside it."""
    found = set()
    for eqn in jaxpr.eqns:
        found |= {(str(v.aval.dtype), v.aval.shape) for v in eqn.outvars
                  if hasattr(v.aval, 'shape')}
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            found |= shapes_in(inner)
    return found


def test_windowed_blocks_never_hold_a_square():
    """With a window, a block's scores are [block, block + window - 1], forward and backward."""
    T, block, window = 64, 8, 5
    x, where = jnp.zeros((1, T, 2, 1)), Where(jnp.arange(T)[None], jnp.ones((1, T), int))

    def areas(window):
        made = jax.make_jaxpr(jax.grad(lambda q: jnp.sum(attention.causal_attention(
            q, x, x, where, window_columns=window, block_columns=block))))(x)
        return max(s[-1] * s[-2] for _, s in shapes_in(made.jaxpr) if len(s) == 5)
    assert areas(window) == block * (block + window - 1)
    assert areas(None) == block * T


def products_in(jaxpr) -> int:
    return sum((eqn.primitive.name == 'dot_general') + sum(
        map(products_in, jax.extend.core.jaxprs_in_params(eqn.params))) for eqn in jaxpr.eqns)


@pytest.mark.parametrize('outputs', ((4, 6), (2,)))
def test_a_product_has_the_gradients_that_are_asked_for(outputs):
    """Those of `tensordot`, one matrix product each; what is frozen costs none, and who keeps
    products need not multiply again."""
    x, w = jnp.asarray(normal(5, 2, 3)), jnp.asarray(normal(2, 3, *outputs))

    def loss(multiply):
        return lambda x, w: jnp.sum(jnp.sin(multiply(x, w, 2)))
    for ours, true in zip(jax.grad(loss(nn.product), (0, 1))(x, w),
                          jax.grad(loss(jnp.tensordot), (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(ours, true, rtol=1e-5, atol=1e-5)

    def count(fn, of):
        return products_in(jax.make_jaxpr(jax.grad(fn, of))(x, w).jaxpr)
    once = loss(nn.product)
    assert [count(once, 0), count(once, 1), count(once, (0, 1))] == [2, 2, 3]
    kept = jax.checkpoint(lambda x, w: jnp.sum(jnp.sin(nn.product(jnp.sin(x), w, 2))),
                          policy=nn.products_saveable)
    assert count(kept, (0, 1)) == 3


def test_log_prob_is_log_softmax():
    logits, target = jax.random.normal(jax.random.key(0), (3, 4, 7)) * 5, jnp.arange(12) % 7
    target = target.reshape(3, 4)

    def plain(x):
        return jnp.take_along_axis(jax.nn.log_softmax(x), target[..., None], axis=-1)[..., 0]
    logp, hit = nn.log_prob(logits, target)
    np.testing.assert_allclose(logp, plain(logits), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(hit, jnp.argmax(logits, -1) == target)
    weigh = jnp.cos(jnp.arange(12.0).reshape(3, 4))
    ours = jax.grad(lambda x: jnp.sum(weigh * nn.log_prob(x, target)[0]))(logits)
    true = jax.grad(lambda x: jnp.sum(weigh * plain(x)))(logits)
    np.testing.assert_allclose(ours, true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('columns', (12, 13, 3, 4))
def test_by_columns(columns):
    """Chunks of 4, a ragged tail included, change neither value nor gradient, tree by tree."""
    a, b, w = normal(2, columns, 3), normal(2, columns, seed=1), normal(3, 5, seed=2)

    def fn(a, b, w):
        y = jnp.tanh(a @ w)
        return y * b[..., None], jnp.sum(y, -1) > b

    def loss(chunk):
        def of(a, b, w):
            (y, hit) = (nn.by_columns(lambda a, b: fn(a, b, w), chunk, a, b) if chunk
                        else fn(a, b, w))
            return jnp.sum(y ** 2), (y, hit)
        return jax.jit(jax.value_and_grad(of, (0, 1, 2), has_aux=True))(a, b, w)
    (_, want), want_grads = loss(None)
    (_, got), grads = loss(4)
    assert got[0].shape == (2, columns, 5) and got[1].shape == (2, columns)
    np.testing.assert_allclose(got[0], want[0], atol=1e-6)
    np.testing.assert_array_equal(got[1], want[1])
    for g, f in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(g, f, atol=1e-5)


@pytest.mark.parametrize('columns', (32, 37))
def test_by_columns_never_holds_the_whole(columns):
    """Forward and backward, no value of [B, T, V] exists, of which the plain form has several."""
    h, w = jnp.zeros((2, columns, 6)), jnp.zeros((6, 101))

    def shapes(chunk):
        def loss(h, w):
            return jnp.sum(nn.by_columns(lambda h: jax.nn.logsumexp(h @ w, -1), chunk, h))
        return shapes_in(jax.make_jaxpr(jax.grad(loss, (0, 1)))(h, w).jaxpr)

    def most(found):
        return max(int(np.prod(s)) for _, s in found if s and s[-1] == 101)
    assert most(shapes(512)) == 2 * columns * 101
    assert most(shapes(8)) == 2 * 8 * 101


def test_log_prob_is_stable_and_counts_hits():
    logits = jnp.asarray([[1e4, 0.0, -1e4], [1.0, 2.0, 0.5], [0.0, 0.0, -1.0]], jnp.float32)
    logp, hit = nn.log_prob(logits, jnp.array([0, 2, 1]))
    z = np.log(np.exp([1.0, 2.0, 0.5]).sum())
    np.testing.assert_allclose(logp, [0.0, 0.5 - z, -np.log(2 + np.exp(-1.0))], atol=1e-6)
    assert hit.tolist() == [True, False, True]
    low = nn.log_prob(logits.astype(jnp.bfloat16), jnp.array([0, 2, 1]))[0]
    assert low.dtype == jnp.float32


def test_gated_halves():
    """The first half goes through silu: told apart by a gate of zero and a gate of one."""
    y = jnp.asarray([[[2.0, -1.0], [3.0, 5.0]]])
    got = nn.gated(None, lambda _: y, lambda z: z)
    silu = np.array([2.0 / (1 + np.exp(-2.0)), -1.0 / (1 + np.exp(1.0))])
    np.testing.assert_allclose(got[0], silu * [3.0, 5.0], rtol=1e-6)


@pytest.mark.parametrize('inputs, outputs', [((6,), (4,)), ((6,), (2, 4)), ((2, 3), (5,))])
def test_dense_with_lora_is_a_folded_kernel(inputs, outputs):
    axes = tuple('embed' for _ in inputs + outputs)
    dense = nn.Dense(inputs, outputs, axes, rngs=nnx.Rngs(0), bias=True)
    dense.bias = nnx.Param(jnp.asarray(normal(*outputs, seed=3)), axes=axes[len(inputs):])
    x = jnp.asarray(normal(7, *inputs))
    plain = np.asarray(dense(x))
    flat = np.asarray(x).reshape(7, -1) @ np.asarray(dense.kernel[...]).reshape(6, -1)
    np.testing.assert_allclose(plain, flat.reshape(7, *outputs) + dense.bias[...], atol=1e-5)

    nn.add_lora(dense, 2, 0.7, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(dense(x), plain)         # zero at the start
    assert dense.lora_a.shape == (*inputs, 2) and dense.lora_b.shape == (2, *outputs)
    bound = 1 / np.sqrt(6)
    assert 0.3 * bound < np.abs(dense.lora_a[...]).max() <= bound
    dense.lora_b = nnx.Param(jnp.asarray(normal(2, *outputs, seed=4)), axes=('rank', *axes[1:]))
    folded = np.asarray(dense.kernel[...]).reshape(6, -1) + 0.7 * (
        np.asarray(dense.lora_a[...]).reshape(6, 2) @ np.asarray(dense.lora_b[...]).reshape(2, -1))
    want = (np.asarray(x).reshape(7, -1) @ folded).reshape(7, *outputs) + dense.bias[...]
    np.testing.assert_allclose(dense(x), want, atol=1e-5)
    assert np.abs(want - plain).max() > 0.1


def test_lora_of_a_stack_draws_each_layer_and_names_its_axes():
    def make(*, rngs):
        return nn.Dense((6,), (2, 4), ('embed', 'stream', 'mlp'), rngs=rngs)
    stacked = nn.stack(make, 3, rngs=nnx.Rngs(0))
    kernel = np.asarray(stacked.kernel[...])
    assert kernel.shape == (3, 6, 2, 4) and np.abs(kernel[0] - kernel[1]).max() > 0.1
    nn.add_lora(stacked, 2, 1.0, rngs=nnx.Rngs(1))
    a = np.asarray(stacked.lora_a[...])
    assert a.shape == (3, 6, 2) and stacked.lora_b.shape == (3, 2, 2, 4)
    assert np.abs(a[0] - a[1]).max() > 0.1 and np.abs(a).max() <= 1 / np.sqrt(6)
    assert stacked.lora_a.get_metadata()['axes'] == ('embed', 'rank')
    assert stacked.lora_b.get_metadata()['axes'] == ('rank', 'stream', 'mlp')


def test_initial_spread():
    """Truncated at three deviations, of deviation std / sqrt(fan_in)."""
    x = np.asarray(nn.truncated(jax.random.key(0), (400, 250), 16, std=2.0)) / 0.5
    assert np.abs(x).max() <= 3.0 and np.abs(x).max() > 2.9
    assert np.std(x) == pytest.approx(0.9866, abs=0.01)     # of a normal cut at three
    assert abs(np.mean(x)) < 0.01

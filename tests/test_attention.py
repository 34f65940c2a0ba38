# SPDX-License-Identifier: Apache-2.0
"""Does every engine hear the same, in values and in gradients, and is the right one chosen?

The kernels of accelerators run here in the forms that they offer for it: splash attention
interpreted, cuDNN's attention by the same call to jax.nn with the reference implementation.
"""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsd import attention, nn, sharding
from jaxsd.backbone import decoder
from jaxsd.types import Sizes, Where

ENGINES = {
    'xla': functools.partial(attention.xla, block_columns=48),
    'splash': functools.partial(attention.splash, block_columns=0, interpret=True),
    'cudnn': functools.partial(attention.cudnn, block_columns=0, implementation='xla')}


def packed(columns: int):
    """Two rows of several segments each, the last columns of the first row empty."""
    segment, position = np.zeros((2, 2, columns), np.int32)
    for i, cuts in enumerate(([0, columns // 3, columns // 2, columns - 9], [0, 5, columns])):
        for s, (a, b) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
            segment[i, a:b], position[i, a:b] = s + 1, np.arange(b - a)
    return Where(jnp.asarray(position), jnp.asarray(segment))


def by_hand(q, k, v, where, window):
    """Every pair of columns scored, float32; query head n reads kv head n // (N / G)."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    s = jnp.einsum('btnh,bcnh->bntc', q, k) / np.sqrt(q.shape[-1])
    back = where.position[:, :, None] - where.position[:, None]
    seen = (back >= 0) & (back < window) & (where.segment[:, :, None] == where.segment[:, None])
    return jnp.einsum('bntc,bcnh->btnh', jax.nn.softmax(jnp.where(seen[:, None], s, -1e30)), v)


def by_engine(name: str, ways: int, window):
    """The engine as `ways` devices run it, each with its piece of the columns."""
    mesh = sharding.make_mesh(dict(context=ways), jax.devices()[:ways])
    fn = functools.partial(ENGINES[name], window_columns=window)

    def run(q, k, v, where):
        return attention.spread(fn, q, k, v, where, window, sharding.placer(sharding.RULES, mesh))
    return run


@pytest.mark.parametrize('ways, columns, window', ((1, 131, None), (1, 150, 17), (2, 256, None),
                                                   (2, 256, 33), (4, 512, 150)))
@pytest.mark.parametrize('name', ENGINES)
def test_engines_agree(name, ways, columns, window):
    """Four heads over two groups, packed, with and without a window, odd numbers of columns, on one
    device and in pieces."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, columns, n, 16)), jnp.float32)
               for n in (4, 2, 2))
    where = packed(columns)
    real = (where.segment > 0)[..., None, None]

    @functools.partial(jax.jit, static_argnums=3)
    def value_and_gradients(q, k, v, fn):
        def loss(q, k, v):
            o = fn(q, k, v, where)
            return jnp.sum(jnp.sin(o) * real), o
        (_, o), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return o * real, grads, jnp.isfinite(o).all()
    want = value_and_gradients(q, k, v, functools.partial(by_hand, window=window or columns))
    got = value_and_gradients(q, k, v, by_engine(name, ways, window))
    np.testing.assert_allclose(got[0], want[0], atol=3e-6)
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert got[2]           # the empty columns too


@pytest.mark.parametrize('window', (None, 3000))
def test_splash_is_a_tpu_program_forward_and_backward(window):
    """At a published shape, whose columns are no multiple of a block, compiled as far as it goes
    without a TPU: the kernels are there and nothing of the size of all pairs is."""
    B, T, N, H = 1, 3750, 4, 128
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16)
    at = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def loss(q, k, v, position, segment):
        where = Where(position, segment)
        return jnp.sum(attention.splash(q, k, v, where, where, attention.Part(0, 0, 1),
                                        window_columns=window, block_columns=0).astype(jnp.float32))
    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x, at, at).lower(
        lowering_platforms=('tpu',)).as_text()
    assert text.count('tpu_custom_call') >= 3
    assert '3750x3750' not in text and '3840x3840' not in text


@pytest.mark.parametrize('name, kept', (('xla', ('f32[2,4,1,128,16]', 'f32[2,4,1,128,1]')),
                                        ('splash', ('f32[2,4,128,16]', 'f32[2,4,128]'))))
def test_who_keeps_products_need_not_attend_again(name, kept, capsys):
    """What comes out, and the sums it was divided by: all that gradients need of the kernel."""
    x, where = jnp.ones((2, 128, 4, 16)), packed(128)
    fn = functools.partial(ENGINES[name], window_columns=None)
    if name == 'xla':
        fn = functools.partial(fn, block_columns=128)

    def loss(q, k, v):
        return jnp.sum(jnp.sin(fn(jnp.sin(q), k, v, where, where, attention.Part(0, 0, 1))))

    def made(policy):       # what is kept but neither given nor constant
        jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(loss, policy=policy), x, x, x)
        return {line.split()[0] for line in capsys.readouterr().out.splitlines()
                if 'from the argument' not in line and 'from a constant' not in line}
    assert made(None) == set()
    assert made(nn.products_saveable) == set(kept)


SHAPE = dict(columns=3750, ways=1, head_dim=128, dtype='bfloat16')


@pytest.mark.parametrize('platform, changes, engine, reason', [
    ('cpu', {}, 'xla', 'the devices are cpu'),
    ('tpu', {}, 'splash', 'the devices are tpu'),
    ('gpu', {}, 'cudnn', 'the devices are gpu'),
    ('tpu', dict(head_dim=80), 'xla', 'not by splash: a head of 80 is no multiple of 64'),
    ('tpu', dict(ways=2), 'xla', '1875 columns on each of 2 devices are no multiple of 128'),
    ('tpu', dict(ways=2, columns=4096), 'splash', 'the devices are tpu'),
    ('gpu', dict(dtype='float32'), 'xla', r'float32 \(frontend.dtype\) is not of two bytes'),
    ('gpu', dict(head_dim=256), 'xla', 'a head of 256 is above 128'),
    ('gpu', dict(ways=2), 'xla', '1875 columns on each of 2 devices are no multiple of 2')])
def test_the_engine_follows_from_the_devices_and_says_why(platform, changes, engine, reason):
    found, why = attention.choose('auto', platform, **SHAPE | changes)
    assert found == engine and re.search(reason, why), why
    if engine == 'xla' and platform != 'cpu':       # what 'auto' went around is refused by name
        best = dict(tpu='splash', gpu='cudnn')[platform]
        with pytest.raises(ValueError, match=f"backbone.attention is '{best}', but .*{platform}"):
            attention.choose(best, platform, **SHAPE | changes)
    assert attention.choose('xla', platform, **SHAPE | changes)[0] == 'xla'


def test_no_engine_falls_back_silently(caplog):
    x, where = jnp.zeros((1, 8, 16)), Where(jnp.arange(8)[None], jnp.ones((1, 8), int))

    def run(engine, place=sharding.anywhere):
        lm = decoder(Sizes((), 8, 16), rngs=nnx.Rngs(0), width=16, layers=1, heads=2, kv_heads=2,
                     head_dim=8, mlp=8, theta=100.0, attention=engine)
        return jax.eval_shape(lambda x: lm(x, where, place=place)[0], x)
    for engine, runs_on in (('splash', 'TPU'), ('cudnn', 'GPU')):
        with pytest.raises(ValueError, match=f"is '{engine}', but that runs on {runs_on}; the dev"):
            run(engine)
    with pytest.raises(ValueError, match='backbone.attention is one of auto, xla, splash, cudnn'):
        run('flash')
    attention._say.cache_clear()
    mesh = sharding.make_mesh(dict(fsdp=1), jax.devices()[:1])
    with caplog.at_level(logging.INFO, 'jaxsd'):
        for _ in range(2):
            run('auto')
            run('auto', place=sharding.placer(sharding.RULES, mesh))
    assert caplog.messages == ['attention by xla: the devices are cpu']

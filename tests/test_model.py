# SPDX-License-Identifier: Apache-2.0
"""Does the model see only what it may, and is speaking step by step the training forward?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import BACKBONES, batch, built, config

from jaxsd import config as configs
from jaxsd import generate, model, nn
from jaxsd.config import override
from jaxsd.types import Where

SYSTEMS = ('flat', 'streams')


def logp(graph, params, b):
    return np.asarray(nnx.merge(graph, params)(b)[0])


@pytest.mark.parametrize('kind', BACKBONES)
@pytest.mark.parametrize('system', SYSTEMS)
def test_packed_segments_are_alone(system, kind):
    """Every segment of a packed row scores as it does in a row of its own."""
    c, graph, params = built(system, kind)
    b = batch(c)
    whole = logp(graph, params, b)
    for s in range(1, b['segment'].max() + 1):
        at = np.flatnonzero(b['segment'][0] == s)
        alone = {k: x[..., at] for k, x in b.items()} | {'segment': np.ones((2, len(at)), int)}
        part = logp(graph, params, alone)
        scored = b['weights'][..., at] > 0
        np.testing.assert_allclose(np.where(scored, whole[..., at], 0), np.where(scored, part, 0),
                                   rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize('system', SYSTEMS)
def test_no_cell_sees_itself_or_later(system):
    """Changing cell (k, t) changes only later columns, and later rows of the same column."""
    c, graph, params = built(system)
    b = batch(c, rows=1, segments=1)
    before = logp(graph, params, b)
    rows = model.make_vocab(c).rows
    for k, t in ((0, 4), (len(rows) // 2, 9), (len(rows) - 1, 13)):
        other = dict(b, tokens=b['tokens'].copy())
        row = rows[k]
        other['tokens'][0, k, t] = row.start + (b['tokens'][0, k, t] - row.start + 1) % (
            row.predicted or row.size - 1)
        moved = np.abs(logp(graph, params, other) - before)[0] > 1e-6
        moved[k, t] = False         # another target has another probability
        assert not moved[:, :t].any(), (k, t)
        assert not moved[:k, t].any(), (k, t)
        assert moved[:, t + 1:].any(), (k, t)


@pytest.mark.parametrize('system', SYSTEMS)
def test_log_prob_is_the_scores_log_softmax(system):
    c, graph, params = built(system, chunk_columns=7)       # ragged chunks
    b = batch(c)
    lm = nnx.merge(graph, params)
    got, scores = np.asarray(lm(b)[0]), lm.scores(b)
    for k, (row, s) in enumerate(zip(model.make_vocab(c).rows, scores, strict=True)):
        if s is None:
            assert not got[:, k].any()
            continue
        want = np.asarray(jax.nn.log_softmax(s, axis=-1))
        for i, t in np.argwhere(b['weights'][:, k] > 0):
            local = b['tokens'][i, k, t] - row.start
            assert got[i, k, t] == pytest.approx(want[i, t - 1, local], abs=1e-5)


@pytest.mark.parametrize('system', SYSTEMS)
def test_chunked_loss_equals_plain_in_value_and_gradient(system):
    c, graph, params = built(system)
    graphs = [model.abstract(config(system, chunk_columns=n))[0] for n in (5, 8, 512)]
    b = batch(c)

    def loss(graph):
        return jax.value_and_grad(lambda p: -jnp.sum(nnx.merge(graph, p)(b)[0] * b['weights']))
    (v0, g0), *others = [loss(g)(params) for g in graphs]
    for v, g in others:
        np.testing.assert_allclose(v, v0, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), g, g0)


def test_chunked_loss_never_holds_all_logits():
    """No float32 array of the size [B, T, V] exists in the compiled loss and its gradient."""
    c = config('flat', chunk_columns=8)
    c.vocab.text_tokens, c.columns = 997, 64
    graph, shapes, _ = model.abstract(c)
    b = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch(c, columns=64).items()}

    def compiled(graph):
        fn = jax.grad(lambda p, b: jnp.sum(nnx.merge(graph, p)(b)[0]))
        return jax.jit(fn).lower(shapes, b).compile().as_text()
    size = model.make_vocab(c).size
    assert f'f32[2,64,{size}]' not in compiled(graph)
    c.head.chunk_columns = 512
    assert f'f32[2,64,{size}]' in compiled(model.abstract(c)[0])     # the probe does see it


def test_gradient_by_finite_differences():
    c, graph, params = built('streams', 'helium')
    b = batch(c)
    loss = jax.jit(lambda p: -jnp.sum(nnx.merge(graph, p)(b)[0] * b['weights']))
    grad = jax.grad(loss)(params)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    for i in range(len(leaves)):
        way = rng.normal(size=leaves[i].shape).astype(np.float32)
        way /= np.linalg.norm(way)

        def at(e, i=i, way=way):
            return float(loss(jax.tree.unflatten(tree, [
                x + e * way if j == i else x for j, x in enumerate(leaves)])))
        slope = (at(1e-2) - at(-1e-2)) / 2e-2
        want = float(jnp.sum(jax.tree.leaves(grad)[i] * way))
        assert slope == pytest.approx(want, rel=0.03, abs=0.05), tree


@pytest.mark.parametrize('kind', BACKBONES)
def test_streaming_equals_training_forward(kind):
    """Column by column through the ring, and prompt at once, equal one packed forward."""
    c, graph, params = built('streams', kind)
    b = batch(c, rows=2, segments=1, columns=24)
    lm = nnx.merge(graph, params)
    want = np.asarray(lm.hidden(b))
    window = BACKBONES[kind].get('window_columns')
    ring = window or 24         # with a window the ring is far shorter than the sequence
    x = lm.frontend(b)
    for chunk in (1, 3):
        cache = lm.backbone.empty_cache(2, min(24, ring + chunk - 1), jnp.float32)
        got = []
        for t in range(0, 21, chunk):
            part = Where(*(jnp.asarray(b[k][:, t:t + chunk]) for k in ('position', 'segment')))
            h, cache = lm.backbone(x[:, t:t + chunk], part, cache)
            got.append(np.asarray(h))
        np.testing.assert_allclose(np.concatenate(got, 1), want[:, :21], rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize('step_weights', ('own', 'shared'))
def test_depth_samples_what_it_scores(step_weights):
    """Greedy and forced picks, row by row, give the logits that training computes at once."""
    c, graph, params = built('streams', 'helium', step_weights=step_weights)
    b = batch(c, rows=2, segments=1)
    lm = nnx.merge(graph, params)
    h, scores = lm.hidden(b), lm.scores(b)
    rows = model.make_vocab(c).rows
    for t in (2, 7):
        seen = {}

        def pick(k, logits, key, t=t, seen=seen):
            seen[k] = np.asarray(logits)
            return jnp.asarray(b['tokens'][:, k, t + 1] - rows[k].start)
        lm.head.sample(h[:, t], lm.table, jax.random.key(0), pick)
        for k, s in enumerate(scores):
            if s is not None:
                np.testing.assert_allclose(seen[k], np.asarray(s)[:, t], rtol=1e-5, atol=3e-5)


def test_depth_on_a_share_of_columns_is_unbiased():
    """The mean over every choice of columns is the loss and the gradient of all columns."""
    c, graph, params = built('streams')
    part = model.abstract(config('streams', fraction=0.25))[0]
    b = batch(c, rows=1, segments=1, columns=8)

    def loss(graph, params, key):
        return -jnp.sum(nnx.merge(graph, params)(b, key)[0] * b['weights'])
    full, full_grad = jax.value_and_grad(loss, argnums=1)(graph, params, None)
    keys = jax.random.split(jax.random.key(0), 4000)
    one = jax.jit(lambda k: jax.value_and_grad(loss, argnums=1)(part, params, k))
    values, grads = jax.lax.map(one, keys, batch_size=100)
    assert np.std(values) > 1           # the choice does matter
    spread = np.std(values) / np.sqrt(len(keys))
    assert abs(np.mean(values) - full) < 4 * spread
    g, f = grads['head']['text_table'], full_grad['head']['text_table']
    spread = np.std(g, axis=0) / np.sqrt(len(keys))
    assert (np.abs(np.mean(g, axis=0) - f) < 5 * spread + 1e-4).all()


def test_remat_changes_nothing():
    c, _, params = built('flat')
    b = batch(c)
    out = []
    for remat in ('none', 'dots', 'full'):
        c2 = config('flat')
        c2.backbone.remat = remat
        graph = model.abstract(c2)[0]
        loss = lambda p, g=graph: jnp.sum(nnx.merge(g, p)(b)[0] * b['weights'])     # noqa: E731
        out.append(jax.grad(loss)(params))
    for other in out[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
                     out[0], other)


def test_lora_is_nothing_at_first_and_a_folded_kernel_later():
    c, _, _ = built('flat')
    lora = dict(rank=3, scale=2.0)
    graph, _, _ = model.abstract(c, lora)
    params = model.init(c, jax.random.key(0), lora)
    plain = model.init(c, jax.random.key(0))
    b = batch(c)
    base = model.abstract(c)[0]
    np.testing.assert_array_equal(logp(graph, params, b), logp(base, _without(params), b))
    assert jax.tree.structure(_without(params)) == jax.tree.structure(plain)
    down = params['backbone']['blocks']['down']
    down['lora_b'] = jnp.asarray(np.random.default_rng(0).normal(size=down['lora_b'].shape))
    folded = _without(params)
    folded['backbone']['blocks']['down']['kernel'] = down['kernel'] + 2.0 * jnp.einsum(
        'lfr,lrd->lfd', down['lora_a'], down['lora_b'])
    np.testing.assert_allclose(logp(graph, params, b), logp(base, folded, b), atol=1e-4)


def _without(tree):
    return {k: _without(v) if isinstance(v, dict) else v for k, v in tree.items()
            if not k.startswith('lora_')}


@pytest.mark.parametrize('pairs', ('half', 'interleaved'))
def test_rotary_is_a_rotation_of_pairs(pairs):
    """Against complex numbers; and only the difference of positions matters."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 5, 1, 8)).astype(np.float32)
    at = np.array([[0, 1, 2, 7, 30]])
    got = np.asarray(nn.rotate(jnp.asarray(x), jnp.asarray(at), theta=100.0, pairs=pairs))
    first, second = ((slice(0, 4), slice(4, 8)) if pairs == 'half' else
                     (slice(0, 8, 2), slice(1, 8, 2)))
    z = (x[..., first] + 1j * x[..., second]) * np.exp(
        1j * at[..., None, None] * 100.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(got[..., first], z.real, atol=1e-5)
    np.testing.assert_allclose(got[..., second], z.imag, atol=1e-5)


def test_published_sizes_to_the_parameter():
    """moshiko: 7,687,729,152 (its checkpoint). Llama-2 7B: 6,738,415,616 with its 32,000 pieces."""
    moshi = configs.read('configs/moshi.py')
    override(moshi, 'vocab.predicted', "('mine',)")
    override(moshi, 'vocab.multiple', '1')
    assert model.count(model.abstract(moshi)[1]) == 7_687_729_152
    spirit = configs.read('configs/spirit_lm.py')
    rows = model.make_vocab(spirit).size - 32_000
    assert model.count(model.abstract(spirit)[1]) == 6_738_415_616 + 2 * rows * 4096


def plan_of(b, t):
    return np.where(np.arange(b['tokens'].shape[2]) <= t, b['tokens'][0], generate.FREE)


@pytest.mark.parametrize('system', SYSTEMS)
def test_generated_columns_are_the_training_forward_s_own_choice(system):
    """What greedy decoding said is, cell by cell, the argmax of the scores given what it said."""
    c, graph, params = built(system, 'helium' if system == 'streams' else 'qwen2')
    v = model.make_vocab(c)
    b = batch(c, rows=1, segments=1, columns=20)
    speaker = generate.ready(graph, params, v, {}, c.backbone.get('window_columns'))
    plan = plan_of(b, 3)[:, :18].copy()
    for k, row in enumerate(v.rows):
        if not row.predicted:       # the other speaker is heard throughout
            plan[k] = b['tokens'][0, k, :18]
    said = generate.converse(speaker, [plan])[0]
    assert (said != generate.FREE).all()
    given = dict(tokens=said[None], position=np.arange(18)[None], segment=np.ones((1, 18), int))
    scores = nnx.merge(graph, params).scores(given)
    for k, (row, s) in enumerate(zip(v.rows, scores, strict=True)):
        if s is not None:
            best = np.asarray(s)[0, :-1].argmax(-1) + row.start
            np.testing.assert_array_equal(said[k, 4:], best[3:])


def test_prompts_of_any_length_continue_as_if_alone():
    c, graph, params = built('flat', 'mistral')
    v = model.make_vocab(c)
    speaker = generate.ready(graph, params, v, {})
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 13, n) for n in (2, 9, 5)]
    together = generate.continue_prompts(speaker, prompts, v, kind='speech', most_tokens=12,
                                         chunk=5)
    alone = [generate.continue_prompts(speaker, [p], v, kind='speech', most_tokens=12)[0]
             for p in prompts]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a, b)
        start, size = v.ranges['units']
        assert len(a) <= 12 and ((a >= start) & (a < start + size)).all()


@pytest.mark.parametrize('sampler', [generate.Sampler(0.7), generate.Sampler(1.0, 3),
                                     generate.Sampler(1.0, 0, 0.6), generate.Sampler(0.0)])
def test_samplers_draw_from_the_distribution_they_name(sampler):
    logits = np.array([1.0, 0.2, 2.0, -1.0, 0.7])
    if sampler.temperature == 0:
        want = np.eye(5)[2]
    else:
        want = np.exp(logits / sampler.temperature)
        order = np.argsort(-want)
        want /= want.sum()
        if sampler.top_k:
            want[order[sampler.top_k:]] = 0
        if sampler.top_p < 1:
            before = np.cumsum(want[order]) - want[order]
            want[order[before >= sampler.top_p]] = 0
        want /= want.sum()
    n = 20_000
    ids = generate.draw(jnp.tile(jnp.asarray(logits, jnp.float32), (n, 1)), jax.random.key(0),
                        sampler)
    np.testing.assert_allclose(np.bincount(ids, minlength=5) / n, want, atol=0.015)

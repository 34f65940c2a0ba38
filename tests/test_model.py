# SPDX-License-Identifier: Apache-2.0
"""Does the whole model see only what it may, learn what it should, and have the known sizes?"""

import functools
import pathlib

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import BACKBONES, batch, built, config
from test_sharding import SYSTEMS as MECHANISMS

from jaxsd import config as configs
from jaxsd import model, nn, trained
from jaxsd.config import override
from jaxsd.stage import flatten, unflatten
from jaxsd.types import Where

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'configs'
SYSTEMS = ('flat', 'streams')


@functools.partial(jax.jit, static_argnums=0)
def logp(graph, params, b):
    return nnx.merge(graph, params)(b)[0]


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(graph, params, b):
    return jax.value_and_grad(lambda p: -jnp.sum(nnx.merge(graph, p)(b)[0] * b['weights']))(params)


def assert_close(tree, other, tolerance=1e-5):
    """Every leaf within `tolerance` of the other's, in units of its own largest entry (or 1)."""
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        scale = max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance)


@pytest.mark.parametrize('system, kind', [('flat', 'mistral'), ('streams', 'helium')])
def test_packed_segments_are_alone(system, kind):
    """Every segment of a packed row scores as it does in a row of its own."""
    c, graph, params = built(system, kind)
    b = batch(c)
    whole = np.asarray(logp(graph, params, b))
    for s in range(1, b['segment'].max() + 1):
        at = np.flatnonzero(b['segment'][0] == s)
        alone = {k: x[..., at] for k, x in b.items()}
        alone['segment'] = np.ones((2, len(at)), np.int32)
        part = np.asarray(logp(graph, params, alone))
        scored = b['weights'][..., at] > 0
        assert scored.any()
        np.testing.assert_allclose(whole[..., at][scored], part[scored], rtol=1e-5, atol=3e-5)


def allowed(rows, k: int, t: int, columns: int):
    """bool [K, T]: where a change of cell (k, t) may show."""
    may = np.zeros((len(rows), columns), bool)
    may[:, t + 1:] = True
    if len(rows) > 1 and rows[k].predicted:
        may[k + 1:, t] = True       # the rows of its own column that are spoken after it
    return may & np.array([row.predicted > 0 for row in rows])[:, None]


@pytest.mark.parametrize('system', SYSTEMS)
def test_a_cell_is_seen_by_later_cells_only(system):
    """Exactly: by later columns, and by the rows below it in its own. Not by its own prediction."""
    c, graph, params = built(system, 'qwen2')
    b = batch(c, rows=1, segments=1)
    rows = model.make_vocab(c).rows
    scores = jax.jit(lambda p, b: nnx.merge(graph, p).scores(b))
    before = scores(params, b)
    for k in range(len(rows)):
        t = 4 + k
        other = dict(b, tokens=b['tokens'].copy())
        other['tokens'][0, k, t] = rows[k].start + (b['tokens'][0, k, t] - rows[k].start + 1) % (
            rows[k].predicted or rows[k].size - 1)
        moved = np.zeros((len(rows), c.columns), bool)
        for i, (x, y) in enumerate(zip(scores(params, other), before, strict=True)):
            if x is not None:       # scores after column t - 1 are the prediction of column t
                moved[i, 1:] = np.abs(np.asarray(x - y))[0, :-1].max(-1) > 0
        end = b['segment'][0].sum()         # what is not in the segment sees nothing of it
        np.testing.assert_array_equal(moved[:, :end], allowed(rows, k, t, c.columns)[:, :end])


def test_the_shift():
    tokens = np.arange(12).reshape(1, 2, 6)
    np.testing.assert_array_equal(model.next_column(tokens), [[[1, 2, 3, 4, 5, -1],
                                                               [7, 8, 9, 10, 11, -1]]])


@pytest.mark.parametrize('system', SYSTEMS)
def test_a_cell_s_log_prob_is_read_from_the_scores_of_the_column_before(system):
    c, graph, params = built(system, chunk_columns=7)       # ragged chunks
    b = batch(c)
    got, hit = map(np.asarray, jax.jit(lambda p: nnx.merge(graph, p)(b))(params))
    scores = jax.jit(lambda p: nnx.merge(graph, p).scores(b))(params)
    assert got.shape == hit.shape == b['tokens'].shape and got.dtype == np.float32
    assert not got[:, :, 0].any() and not hit[:, :, 0].any()    # nothing comes before column 0
    for k, (row, s) in enumerate(zip(model.make_vocab(c).rows, scores, strict=True)):
        if s is None:
            assert not got[:, k].any() and not hit[:, k].any()
            continue
        want = by_hand.log_softmax(np.asarray(s, np.float64))
        for i, t in np.argwhere(b['weights'][:, k] > 0):
            local = b['tokens'][i, k, t] - row.start
            assert got[i, k, t] == pytest.approx(want[i, t - 1, local], rel=1e-6, abs=2e-5)
            assert bool(hit[i, k, t]) == (want[i, t - 1].argmax() == local)


@pytest.mark.parametrize('system', SYSTEMS)
def test_chunked_loss_equals_plain_in_value_and_gradient(system):
    c, graph, params = built(system)
    b = batch(c)
    plain = loss_and_gradient(graph, params, b)
    for chunk_columns in (5, 8):
        chunked = model.abstract(config(system, chunk_columns=chunk_columns))[0]
        assert_close(loss_and_gradient(chunked, params, b), plain)


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


def loss_by_hand(params, c, b) -> float:
    """The loss of a batch in float64, one segment at a time, straight from the equations."""
    rows = model.make_vocab(c).rows
    kind = {k: c.backbone[k] for k in ('theta', 'pairs', 'window_columns', 'norm_eps')
            if k in c.backbone}
    total = 0.0
    for i, s in np.ndindex(len(b['tokens']), b['segment'].max()):
        at = np.flatnonzero(b['segment'][i] == s + 1)
        tokens, weights = b['tokens'][i][:, at], b['weights'][i][:, at]
        x = by_hand.frontend(params['frontend'], tokens[:, :-1])
        h = by_hand.decoder(params['backbone'], x, **kind)
        if c.head.name == 'depth':
            scores = by_hand.depth(params['head'], h, tokens[:, 1:], rows, range(3))
        else:
            scores = [h @ params['head']['out']['kernel']]
        for k, logits in enumerate(scores):
            own = by_hand.log_softmax(logits)
            for t in np.flatnonzero(weights[k, 1:]):
                total -= weights[k, t + 1] * own[t, tokens[k, t + 1] - rows[k].start]
    return total


PLACES = {      # a parameter of every sort, and an entry that the batch surely uses
    'flat': [
        (('frontend', 'table'), (16, 3)), (('backbone', 'blocks', 'q', 'kernel'), (0, 2, 1, 3)),
        (('backbone', 'blocks', 'q', 'bias'), (1, 2, 0)),
        (('backbone', 'blocks', 'k', 'kernel'), (1, 4, 0, 1)),
        (('backbone', 'blocks', 'norm_mlp', 'weight'), (0, 7)),
        (('backbone', 'blocks', 'gate_up', 'kernel'), (1, 3, 0, 5)),
        (('backbone', 'norm', 'weight'), (9,)), (('head', 'out', 'kernel'), (3, 6))],
    'streams': [
        (('frontend', 'table'), (3, 0)), (('frontend', 'table'), (60, 1)),
        (('backbone', 'blocks', 'v', 'kernel'), (0, 2, 3, 1)),
        (('backbone', 'blocks', 'norm_attention', 'weight'), (1, 4)),
        (('head', 'text_out', 'kernel'), (2, 5)), (('head', 'inputs', 'kernel'), (1, 3, 2)),
        (('head', 'text_table'), (4, 1)), (('head', 'tables'), (1, 6, 3)),
        (('head', 'blocks', 'qkv', 'kernel'), (1, 2, 4, 0, 1, 2)),
        (('head', 'blocks', 'down', 'kernel'), (0, 1, 7, 3)),
        (('head', 'blocks', 'norm_mlp', 'weight'), (1, 2)),
        (('head', 'outs', 'kernel'), (2, 5, 3))]}


@pytest.mark.parametrize('system, kind', [('flat', 'qwen2'), ('streams', 'helium')])
def test_loss_and_gradient_by_hand(system, kind):
    """Frontend to loss against float64 numpy, and its gradient against differences of that."""
    c, graph, params = built(system, kind)
    b = batch(c)
    value, gradient = loss_and_gradient(graph, params, b)
    params = by_hand.float64(params)

    def loss(params):
        return loss_by_hand(params, c, b)
    assert float(value) == pytest.approx(loss(params), rel=2e-6)
    for path, index in PLACES[system]:
        leaf = gradient
        for key in path:
            leaf = leaf[key]
        want = by_hand.slope(loss, params, path, index)
        assert float(leaf[index]) == pytest.approx(want, rel=5e-4, abs=2e-5), (path, index)
        assert abs(want) > 1e-3, (path, index)      # a cell that does nothing would prove nothing


def _without(tree):
    return {k: _without(v) if isinstance(v, dict) else v for k, v in tree.items()
            if not k.startswith('lora_')}


@pytest.mark.parametrize('system', SYSTEMS)
def test_lora_is_nothing_at_first_and_a_folded_kernel_later(system):
    c, base, _ = built(system)
    lora = dict(rank=3, scale=2.0)
    graph, _, axes = model.abstract(c, lora)
    params = model.init(c, jax.random.key(0), lora)
    b = batch(c)
    assert jax.tree.structure(_without(params)) == jax.tree.structure(
        model.init(c, jax.random.key(0)))
    np.testing.assert_array_equal(logp(graph, params, b), logp(base, _without(params), b))
    rng, changed = np.random.default_rng(0), 0

    def fold(tree, axes, out):
        """Gives every linear map of `tree` a second term, and folds it into that of `out`."""
        nonlocal changed
        for name, value in tree.items():
            if isinstance(value, dict) and 'lora_a' in value:
                low = 0.3 * rng.standard_normal(value['lora_b'].shape).astype(np.float32)
                value['lora_b'] = jnp.asarray(low)
                kernel, a = np.array(value['kernel']), np.asarray(value['lora_a'])
                for i in np.ndindex(kernel.shape[:kernel.ndim - len(axes[name]['kernel'])]):
                    kernel[i] += 2.0 * np.tensordot(a[i], low[i], 1)
                out[name]['kernel'] = jnp.asarray(kernel)
                changed += 1
            elif isinstance(value, dict):
                fold(value, axes[name], out[name])
    folded = _without(params)
    fold(params, axes, folded)
    assert changed == 6 + (1 if system == 'flat' else 7)       # of the backbone, of the head
    got = logp(graph, params, b)
    np.testing.assert_allclose(got, logp(base, folded, b), atol=1e-4)
    assert np.abs(np.asarray(got - logp(base, _without(params), b))).max() > 0.1


def test_shapes_that_were_asked_for_before_follow_the_config():
    """They are kept by what they depend on; what a caller does to its own changes nobody else's."""
    c = config('flat')
    count = model.count(model.abstract(c)[1])
    shapes = model.abstract(c)[1]
    shapes.pop('head')
    assert model.count(model.abstract(c)[1]) == count
    assert model.count(model.abstract(c, dict(rank=2, scale=1.0))[1]) > count
    for slot, key in (('backbone', 'layers'), ('vocab', 'text_tokens')):
        changed = config('flat')
        changed[slot][key] += 1 if slot == 'backbone' else 256
        assert model.count(model.abstract(changed)[1]) > count
    assert model.count(model.abstract(c)[1]) == count


@pytest.mark.parametrize('kind', BACKBONES)
def test_abstract_and_real_parameters_agree(kind):
    """Shapes made without arrays are those of real parameters, and every one names its axes."""
    c = config('streams', kind)
    _, shapes, axes = model.abstract(c)
    params = jax.eval_shape(lambda: model.init(c, jax.random.key(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes)
    names = jax.tree.map(lambda x, a: len(x.shape) - len(a), shapes, axes)
    assert set(jax.tree.leaves(names)) <= {0, 1, 2}         # none, a layer, a layer and a step


def test_published_sizes_to_the_parameter():
    """moshiko: 7,687,729,152 (its checkpoint). Llama-2 7B: 6,738,415,616 with a line of 32,000."""
    moshi = configs.read(str(CONFIGS / 'moshi.py'))
    override(moshi, 'vocab.predicted', "('mine',)")
    override(moshi, 'vocab.multiple', '1')
    assert model.count(model.abstract(moshi)[1]) == 7_687_729_152
    spirit = configs.read(str(CONFIGS / 'spirit_lm.py'))
    more = model.make_vocab(spirit).size - 32_000       # units, markers and padding, twice
    assert model.count(model.abstract(spirit)[1]) == 6_738_415_616 + 2 * more * 4096
    override(spirit, 'vocab.text_tokens', str(32_000 - 501 - 2))
    assert model.make_vocab(spirit).size == 32_000
    assert model.count(model.abstract(spirit)[1]) == 6_738_415_616


@pytest.mark.parametrize('system, kind', [
    ('flat', 'llama'), ('tied', 'qwen2'), ('streams', 'helium'), ('parallel', 'qwen3'),
    ('flat', 'mixtral')])
def test_parameters_as_a_stream_reads_them_change_no_score(system, kind):
    c = config(system, kind)
    c.frontend.dtype = 'bfloat16'
    lora = dict(rank=2, scale=2.0)
    graph, _, _ = model.abstract(c, lora)
    params = jax.tree.map(lambda x: x * 1.3, model.init(c, jax.random.key(1), lora))
    parts = trained.streamed(params, model.abstract(c, lora)[2], 'bfloat16')
    assert parts['backbone']['norm']['weight'].dtype == 'float32'
    kernels = [x for p, x in flatten(parts).items() if p.endswith('/kernel') and 'router' not in p]
    assert {x.dtype.name for x in jax.tree.leaves(kernels)} == {'bfloat16'}
    assert len(parts['backbone']['blocks']['q']['kernel']) == c.backbone.layers
    scores = jax.jit(lambda params: nnx.merge(graph, params).scores(batch(c)))
    for one, other in zip(scores(params), scores(parts), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('system', ('streams', 'parallel'))
def test_kernels_with_their_inputs_last_are_the_same_kernels(system):
    """As a stream on a GPU reads them, in stacks that lie apart: every last axis in memory is one
    that the product sums over."""
    c = config(system, 'llama')
    graph, shapes, axes = model.abstract(c)
    parts = flatten(trained.streamed(model.init(c, jax.random.key(1)), axes))
    inputs = trained._inputs(graph, shapes)
    assert set(inputs) == {p for p in parts if p.endswith('/kernel')}
    assert {inputs['backbone/blocks/q/kernel'], inputs['backbone/blocks/out/kernel']} == {1, 2}
    laid = {p: nn.inputs_last(x, inputs[p]) if p in inputs else x for p, x in parts.items()}
    for path, n_in in inputs.items():
        for x in jax.tree.leaves(laid[path]):
            assert sorted(x.format.layout.major_to_minor[-n_in:]) == list(range(n_in)), path
    scores = jax.jit(lambda params: nnx.merge(graph, params).scores(batch(c)))
    for one, other in zip(scores(unflatten(parts)), scores(unflatten(laid)), strict=True):
        if one is not None:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('system', MECHANISMS)
def test_every_mechanism_reads_parameters_that_lie_apart(system):
    c = MECHANISMS[system]()
    graph, _, axes = model.abstract(c)
    parts = jax.eval_shape(lambda: trained.streamed(model.init(c, jax.random.key(0)), axes,
                                                    'float32'))
    b = {k: jnp.asarray(x) for k, x in batch(c).items()}
    where = Where(b['position'], b['segment'])
    heard = {k: b[k] for k in ('feats', 'slot', 'frames', 'framed') if k in b} or None

    def pick(k, logits_BV, key):
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)

    def said(params):
        made = nnx.merge(graph, params)
        cache = made.empty_cache(len(b['tokens']), c.columns)
        h_BD, _ = made.read(b['tokens'], where, cache, heard)
        if system in ('frames', 'flow'):        # said outside of the model
            return h_BD
        return made.step(b['tokens'], where, cache, jax.random.key(0), pick, heard)[0]
    assert jax.eval_shape(said, parts).shape[0] == len(b['tokens'])

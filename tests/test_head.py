# SPDX-License-Identifier: Apache-2.0
"""Does each head say, row by row, what it scores, and score what the equations say?"""

import functools
import itertools

import by_hand
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsd import head, nn
from jaxsd.types import NOTHING, Row, Sizes

WIDTH = 12
LINE = Sizes((Row('tokens', 0, 20, 20),), 20, WIDTH)
# Four predicted audio rows after the text row, and two that are only heard. Ids: text 0..8 and an
# initial token 9; each audio row six codes and an initial token.
STREAMS = Sizes((Row('text', 0, 10, 9), *(Row(f'mine {k}', 10 + 7 * k, 7, 6) for k in range(4)),
                 *(Row(f'theirs {k}', 38 + 7 * k, 7, 0) for k in range(2))), 52, WIDTH)
SOME = Sizes((Row('text', 0, 6, 5), Row('mine 0', 6, 5, 4), Row('theirs 0', 11, 5, 0)), 16, WIDTH)
DEPTH = dict(width=8, layers=2, heads=2, mlp=10)
SLOTS = {'own': (0, 1, 2, 3), 'shared': (0, 0, 0, 0), 'schedule': (0, 1, 1, 2)}
KINDS = ('flat', 'rows', 'tied', *SLOTS)


@functools.cache
def made(kind: str, **options):
    """(head, its Sizes, embedding table), parameters moved away from where they start."""
    sizes = {'flat': LINE, 'tied': LINE, 'rows': SOME}.get(kind, STREAMS)
    if sizes is STREAMS:
        options = DEPTH | dict(step_weights=SLOTS[kind] if kind == 'schedule' else kind) | options
        lm = head.depth(sizes, rngs=nnx.Rngs(0), **options)
    else:
        lm = (head.tied if kind == 'tied' else head.flat)(sizes, rngs=nnx.Rngs(0), **options)
    rng = np.random.default_rng(1)
    graph, state = nnx.split(lm)
    params = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32),
                          nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, params)
    embed = jnp.asarray(rng.standard_normal((sizes.vocab, WIDTH)), jnp.float32)
    return nnx.merge(graph, state), sizes, embed


def inputs(sizes: Sizes, B: int = 2, T: int = 7, seed: int = 0):
    """Random hidden states, and target columns that are legal in every row."""
    rng = np.random.default_rng(seed)
    tokens = np.stack([rng.integers(r.start, r.start + (r.predicted or r.size), (B, T))
                       for r in sizes.rows], 1)
    h = rng.standard_normal((B, T, WIDTH))
    return jnp.asarray(h, jnp.float32), jnp.asarray(tokens, jnp.int32)


log_prob = nnx.jit(lambda lm, *x: lm.log_prob(*x))
scores = nnx.jit(lambda lm, *x: lm.scores(*x))


@pytest.mark.parametrize('kind', KINDS)
def test_log_prob_is_the_log_softmax_of_the_scores(kind):
    """Whole, and in chunks of three columns with one left over."""
    for lm, sizes, embed in (made(kind), made(kind, chunk_columns=3))[kind == 'shared':]:
        h, target = inputs(sizes)
        logp, hit = log_prob(lm, h, target, embed, None)
        assert logp.shape == hit.shape == target.shape and logp.dtype == jnp.float32
        for k, (row, s) in enumerate(zip(sizes.rows, scores(lm, h, target, embed), strict=True)):
            if not row.predicted:
                assert s is None and not logp[:, k].any() and not hit[:, k].any()
                continue
            assert s.shape == (*h.shape[:2], row.predicted)
            local = np.asarray(target[:, k]) - row.start
            want = np.take_along_axis(by_hand.log_softmax(np.asarray(s, np.float64)),
                                      local[..., None], -1)[..., 0]
            np.testing.assert_allclose(logp[:, k], want, atol=2e-5)
            np.testing.assert_array_equal(hit[:, k], np.asarray(s).argmax(-1) == local)


def test_tied_scores_are_products_with_the_table():
    lm, sizes, embed = made('tied')
    h, target = inputs(sizes)
    np.testing.assert_allclose(scores(lm, h, target, embed)[0], np.asarray(h) @ np.asarray(embed).T,
                               atol=1e-4)
    assert not jax.tree.leaves(nnx.state(lm))       # and it owns no parameters


def test_tied_in_chunks_passes_the_whole_gradient_to_the_table():
    (whole, sizes, embed), (chunked, _, _) = made('tied'), made('tied', chunk_columns=3)
    h, target = inputs(sizes)
    grads = [jax.jit(jax.grad(lambda h, e, lm=lm: jnp.sum(lm.log_prob(h, target, e)[0]),
                              (0, 1)))(h, embed) for lm in (whole, chunked)]
    p = by_hand.softmax(np.asarray(h, np.float64) @ np.asarray(embed, np.float64).T)
    want = np.einsum('btv,btd->vd', np.eye(20)[np.asarray(target[:, 0])] - p, h)
    for _, g in grads:
        np.testing.assert_allclose(g, want, atol=1e-4)
    np.testing.assert_allclose(grads[0][0], grads[1][0], atol=1e-5)


def test_flat_rows_share_one_hidden_state_and_nothing_else():
    """Each predicted row has its own columns of the kernel, in the order of the rows."""
    lm, sizes, embed = made('rows')
    h, target = inputs(sizes)
    kernel = np.asarray(lm.out.kernel[...])
    assert kernel.shape == (WIDTH, 5 + 4)
    text, mine, theirs = scores(lm, h, target, embed)
    np.testing.assert_allclose(text, np.asarray(h) @ kernel[:, :5], atol=1e-4)
    np.testing.assert_allclose(mine, np.asarray(h) @ kernel[:, 5:], atol=1e-4)
    assert theirs is None


@pytest.mark.parametrize('kind', SLOTS)
def test_depth_by_hand(kind):
    """Against the equations in double precision, cells of nothing among the targets."""
    lm, sizes, embed = made(kind)
    h, target = inputs(sizes)
    target = target.at[0, 0, 2].set(NOTHING).at[1, 2, 3].set(NOTHING).at[:, :, 6].set(NOTHING)
    params = by_hand.float64(nnx.to_pure_dict(nnx.state(lm)))
    got = scores(lm, h, target, embed)
    for b in range(2):
        want = by_hand.depth(params, np.asarray(h[b], np.float64), np.asarray(target[b]),
                             sizes.rows, SLOTS[kind])
        for k, w in enumerate(want):
            np.testing.assert_allclose(got[k][b], w, rtol=2e-4, atol=2e-4)
    assert got[5] is got[6] is None


def test_own_and_shared_weights_differ_by_their_sets():
    """Own: a set per step of the maps, norms shared. Equal sets are what 'shared' is."""
    (own, sizes, embed), (shared, _, _) = made('own'), made('shared')
    shapes = [jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(lm))) for lm in (own, shared)]
    per_step = ('qkv', 'out', 'gate_up', 'down')
    for name in per_step:
        a, b = (s['blocks'][name]['kernel'] for s in shapes)
        assert a[:2] == (2, 4) and b[:2] == (2, 1) and a[2:] == b[2:]
    assert shapes[0]['inputs']['kernel'][0] == 4 and shapes[1]['inputs']['kernel'][0] == 1
    for name in ('norm_attention', 'norm_mlp'):
        assert shapes[0]['blocks'][name] == shapes[1]['blocks'][name] == {'weight': (2, 8)}
    some = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(made('schedule')[0])))
    assert {some['blocks'][name]['kernel'][1] for name in per_step} == {3}
    assert some['inputs']['kernel'][0] == 3 and some['outs'] == shapes[0]['outs']
    for name in ('outs', 'tables', 'text_table', 'text_out'):       # one per codebook in both
        assert shapes[0][name] == shapes[1][name]
    params = nnx.to_pure_dict(nnx.state(shared))
    for name in per_step:
        params['blocks'][name]['kernel'] = jnp.repeat(params['blocks'][name]['kernel'], 4, axis=1)
    params['inputs']['kernel'] = jnp.repeat(params['inputs']['kernel'], 4, axis=0)
    graph, state = nnx.split(own)
    nnx.replace_by_pure_dict(state, params)
    h, target = inputs(sizes)
    for a, b in zip(scores(nnx.merge(graph, state), h, target, embed),
                    scores(shared, h, target, embed), strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_row_sees_the_rows_above_it_in_its_column_only():
    lm, sizes, embed = made('own')
    h, target = inputs(sizes)
    before = scores(lm, h, target, embed)[:5]
    for k in range(7):
        row = sizes.rows[k]
        other = target.at[0, k, 3].set(row.start + (target[0, k, 3] - row.start + 1) % 6)
        after = scores(lm, h, other, embed)[:5]
        moved = np.stack([np.abs(np.asarray(a - b)).max(-1) > 0
                          for a, b in zip(after, before, strict=True)])         # [P + 1, B, T]
        want = np.zeros_like(moved)
        want[k + 1:, 0, 3] = True       # for heard rows (and the last spoken one): nothing
        np.testing.assert_array_equal(moved, want, err_msg=f'row {k}')
    after = scores(lm, h.at[1, 5].add(1.0), target, embed)[:5]
    moved = np.stack([np.abs(np.asarray(a - b)).max(-1) > 0
                      for a, b in zip(after, before, strict=True)])
    assert moved[:, 1, 5].all() and moved.sum() == 5


def test_a_cell_of_nothing_above_adds_nothing():
    """It is as if the embedding of that step were zero, not that of the first or the last id."""
    lm, sizes, embed = made('own')
    h, target = inputs(sizes)
    for k in range(4):
        got = scores(lm, h, target.at[:, k].set(NOTHING), embed)
        graph, state = nnx.split(lm)
        params = nnx.to_pure_dict(state)
        if k:
            params['tables'] = params['tables'].at[k - 1].set(0.0)
        else:
            params['text_table'] = jnp.zeros_like(params['text_table'])
        nnx.replace_by_pure_dict(state, params)
        want = scores(nnx.merge(graph, state), h, target, embed)
        for a, b in zip(got[:5], want[:5], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@nnx.jit
def speak(lm, h_BD, embed, forced_K):
    """`sample` with greedy picks, but where `forced_K` has a local id: (column, logits by row)."""
    seen = {}

    def pick(k, logits, key):
        seen[k] = logits
        return jnp.where(forced_K[k] < 0, jnp.argmax(logits, -1), forced_K[k])
    return lm.sample(h_BD, embed, jax.random.key(0), pick), seen


@pytest.mark.parametrize('kind', KINDS)
def test_speaking_is_scoring_cell_by_cell(kind):
    """Greedy picks, some rows forced (to an initial token, too): what is said is the argmax of what
    training scores at it, and the logits on the way are those scores."""
    lm, sizes, embed = made(kind)
    h, _ = inputs(sizes, B=6, T=1)
    for forced in ({}, {0: 3}, {0: 4, 2: 1}, {1: sizes.rows[-1].size - 1}, {3: 0}):
        if max(forced, default=0) >= sum(r.predicted > 0 for r in sizes.rows):
            continue
        fixed = np.array([forced.get(k, -1) for k in range(len(sizes.rows))])
        column, seen = speak(lm, h[:, 0], embed, fixed)
        assert column.shape == (6, len(sizes.rows))
        want = scores(lm, h, column[:, :, None], embed)
        for k, (row, s) in enumerate(zip(sizes.rows, want, strict=True)):
            if s is None:
                assert (np.asarray(column[:, k]) == NOTHING).all() and k not in seen
                continue
            np.testing.assert_allclose(seen[k], s[:, 0], rtol=1e-5, atol=2e-5)
            said = np.asarray(column[:, k]) - row.start
            np.testing.assert_array_equal(said, forced.get(k, np.asarray(s[:, 0]).argmax(-1)))


def test_rows_draw_with_keys_of_their_own():
    """Two rows with the same logits do not repeat each other's draw."""
    lm, sizes, embed = made('own')
    h, _ = inputs(sizes, B=200, T=1)
    column = nnx.jit(lambda lm, h: lm.sample(h, embed, jax.random.key(0), lambda k, logits, key:
                                             jax.random.randint(key, (200,), 0, 6)))(lm, h[:, 0])
    local = np.asarray(column[:, :5]) - [r.start for r in sizes.rows[:5]]
    for a, b in itertools.combinations(range(5), 2):
        assert 10 < (local[:, a] == local[:, b]).sum() < 70


def test_a_share_of_the_columns_is_unbiased_exactly():
    """Two of four columns: the mean over all six choices is loss, gradient and accuracy of all."""
    half, sizes, embed = made('own', fraction=0.5, layers=1)
    whole, _, _ = made('own', layers=1)
    h, target = inputs(sizes, T=4)
    w = jnp.asarray(np.random.default_rng(5).uniform(0.5, 2, target.shape), jnp.float32)

    @nnx.jit
    def of(lm, h, key):
        graph, state = nnx.split(lm)

        def loss(state, h):
            logp, hit = nnx.merge(graph, state).log_prob(h, target, embed, key)
            return jnp.sum(logp * w), (logp, hit)
        (value, aux), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(state, h)
        return aux[0], (value, jnp.sum(aux[1] * w), grads)
    full_logp, full = of(whole, h, None)
    keys = jax.random.split(jax.random.key(0), 240)
    logp = nnx.jit(jax.vmap(lambda lm, key: lm.log_prob(h, target, embed, key)[0],
                            in_axes=(None, 0)))(half, keys)
    every = {}      # which two columns -> the numbers of every key that takes them
    for i, x in enumerate(np.asarray(logp)):
        taken = tuple(np.flatnonzero(x[0, 1]))
        np.testing.assert_allclose(x[:, 1:5, taken], 2 * full_logp[:, 1:5, taken], rtol=1e-5)
        np.testing.assert_allclose(x[:, 0], full_logp[:, 0], rtol=1e-6)         # text: all of it
        every.setdefault(taken, []).append(i)
    assert min(map(len, every.values())) > 20       # of 40: no choice is favored
    every = {taken: of(half, h, keys[same[0]])[1] for taken, same in every.items()}
    assert sorted(every) == sorted(itertools.combinations(range(4), 2))
    mean = jax.tree.map(lambda *x: sum(x) / 6, *every.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-4, atol=2e-5 * max(1.0, float(jnp.abs(b).max()))), mean, full)
    one = next(iter(every.values()))        # while one choice alone is far off
    assert abs(float(one[0] - full[0])) > 1.0


def test_a_share_of_the_columns_takes_another_share_with_another_key():
    lm, sizes, embed = made('own', fraction=0.5, layers=1)
    h, target = inputs(sizes, T=10)
    shares = {tuple(np.flatnonzero(np.asarray(log_prob(lm, h, target, embed, jax.random.key(i))
                                              [0][0, 1]))) for i in range(8)}
    assert len(shares) > 5 and {len(s) for s in shares} == {5}
    with pytest.raises(ValueError, match='head.fraction < 1 needs a key'):
        lm.log_prob(h, target, embed)


@pytest.mark.parametrize('kind', ('flat', 'own'))
def test_whole_logits_never_exist(kind):
    """In chunks of 4 of 32 columns, forward and backward, no value has the logits of every column;
    in one chunk, values do."""
    def most(chunk_columns):
        lm, sizes, embed = made(kind, chunk_columns=chunk_columns)
        h, target = inputs(sizes, T=32)
        graph, state = nnx.split(lm)
        jaxpr = jax.make_jaxpr(jax.grad(lambda s: jnp.sum(nnx.merge(graph, s).log_prob(
            h, target, embed)[0])))(state).jaxpr
        logits = 20 if kind == 'flat' else 9        # the vocabulary, which no other axis has
        return max(int(np.prod(s)) for s in shapes_in(jaxpr) if s and s[-1] == logits)
    assert most(512) == 2 * 32 * (20 if kind == 'flat' else 9)
    assert most(4) == max(2 * 4, WIDTH) * (20 if kind == 'flat' else 9)     # a chunk or the kernel


def shapes_in(jaxpr) -> set:
    found = set()
    for eqn in jaxpr.eqns:
        found |= {v.aval.shape for v in eqn.outvars if hasattr(v.aval, 'shape')}
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            found |= shapes_in(inner)
    return found


def test_scanned_as_on_an_accelerator_is_the_same(monkeypatch):
    lm, sizes, embed = made('own')
    h, target = inputs(sizes)
    want = log_prob(lm, h, target, embed, None)[0]
    monkeypatch.setattr(nn, 'unroll', lambda layers, place: 1)
    got = nnx.jit(lambda lm: lm.log_prob(h, target, embed)[0])(lm)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('sizes, options, message', [
    (LINE, {}, 'needs predicted audio rows right after the text row'),
    (Sizes((STREAMS.rows[0], STREAMS.rows[5], STREAMS.rows[1]), 52, WIDTH), {},
     'needs predicted audio rows right after the text row'),
    (Sizes((Row('text', 0, 4, 3), Row('mine 0', 4, 3, 2), Row('mine 1', 7, 4, 3)), 11, WIDTH), {},
     'needs audio rows of one size'),
    (STREAMS, dict(step_weights='some'),
     "head.step_weights is 'own', 'shared' or a tuple of 4 numbers, got 'some'"),
    (STREAMS, dict(step_weights=(0, True, 1, 1)), 'or a tuple of 4 numbers'),
    (STREAMS, dict(step_weights=(0, 1, 1)), 'must name a set for each of the 4 steps'),
    (STREAMS, dict(step_weights=(0, 1, 3, 3)), 'leave out none from 0 to the last'),
    (STREAMS, dict(step_weights=(-1, 0, 0, 0)), 'leave out none from 0 to the last'),
    (STREAMS, dict(step_weights=(0, 1, 2, 3)), "write 'own'"),
    (STREAMS, dict(heads=3), 'head.heads 3 must divide head.width 8'),
    (STREAMS, dict(fraction=0.0), r'head.fraction must lie in \(0, 1\], got 0.0')])
def test_bad_options_say_which(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        head.depth(sizes, rngs=nnx.Rngs(0), **DEPTH | options)


def test_tied_needs_a_row_over_the_whole_line():
    for sizes in (STREAMS, Sizes((Row('tokens', 0, 20, 18),), 20, WIDTH)):
        with pytest.raises(ValueError, match="head 'tied' needs one row over the whole line"):
            head.tied(sizes, rngs=nnx.Rngs(0))

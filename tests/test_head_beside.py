# SPDX-License-Identifier: Apache-2.0
"""Heads that speak many cells of a column: do they say what they score, and score it right?"""

import functools
import itertools

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxsd import backbone, frontend, head, objective
from jaxsd.types import NOTHING, Row, Sizes, Where

WIDTH = 12
OWN = Sizes((Row('text', 0, 10, 9), *(Row(f'audio {k}', 10 + 7 * k, 7, 6) for k in range(3))), 31,
            WIDTH)
SHARED = Sizes((Row('text', 0, 10, 9), *(Row(f'audio {k}', 10, 7, 6) for k in range(3))), 17,
               WIDTH)
PATCH = Sizes(tuple(Row(f'patch {k}', 0, 9, 8) for k in range(3)), 9, WIDTH)
SMALL = dict(width=8, layers=2, heads=2, mlp=10)
DECODER = functools.partial(backbone.decoder, width=8, layers=2, heads=2, kv_heads=2, head_dim=4,
                            mlp=12, theta=100.0, remat='none', block_columns=16)
MADE = {'group': (head.group, OWN, SMALL), 'shared group': (head.group, SHARED, SMALL),
        'local': (head.local, PATCH, SMALL),
        'ctc': (head.ctc, SHARED, dict(decoder=DECODER, most_units=5))}


@functools.cache
def made(kind: str, **options):
    """(head, its Sizes), parameters moved away from where they start."""
    make, sizes, own = MADE[kind]
    return moved(make(sizes, rngs=nnx.Rngs(0), **own | options)), sizes


def moved(module):
    rng = np.random.default_rng(1)
    graph, state = nnx.split(module)
    params = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32),
                          nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def inputs(sizes: Sizes, B: int = 2, T: int = 7, seed: int = 0):
    rng = np.random.default_rng(seed)
    tokens = np.stack([rng.integers(r.start, r.start + r.predicted, (B, T)) for r in sizes.rows], 1)
    h = rng.standard_normal((B, T, WIDTH))
    return jnp.asarray(h, jnp.float32), jnp.asarray(tokens, jnp.int32)


log_prob = nnx.jit(lambda lm, *x: lm.log_prob(*x))
scores = nnx.jit(lambda lm, *x: lm.scores(*x))


def within(p, x, seen):
    """The small transformer over one column, x [P, D], in double precision."""
    for i in range(len(p['blocks']['norm_mlp']['weight'])):
        b = {k: {n: a[i] for n, a in v.items()} for k, v in p['blocks'].items()}
        y = by_hand.norm(x, b['norm_attention']['weight'], 1e-5)
        q, k, v = np.einsum('td,dcnh->ctnh', y, b['qkv']['kernel'])
        x = x + np.einsum('tnh,nhd->td', by_hand.attention(q, k, v, seen), b['out']['kernel'])
        y = by_hand.norm(x, b['norm_mlp']['weight'], 1e-5)
        gate, up = np.einsum('td,dcf->ctf', y, b['gate_up']['kernel'])
        x = x + (by_hand.silu(gate) * up) @ b['down']['kernel']
    return by_hand.norm(x, p['norm']['weight'], 1e-5)


@pytest.mark.parametrize('kind', ('group', 'shared group', 'local'))
def test_log_prob_is_the_log_softmax_of_the_scores(kind):
    """Whole, and in chunks of three columns with one left over."""
    for lm, sizes in (made(kind), made(kind, chunk_columns=3)):
        h, target = inputs(sizes)
        logp, hit = log_prob(lm, h, target, None)
        for k, (row, s) in enumerate(zip(sizes.rows, scores(lm, h, target, None), strict=True)):
            local = np.asarray(target[:, k]) - row.start
            want = np.take_along_axis(by_hand.log_softmax(np.asarray(s, np.float64)),
                                      local[..., None], -1)[..., 0]
            np.testing.assert_allclose(logp[:, k], want, atol=2e-5)
            np.testing.assert_array_equal(hit[:, k], np.asarray(s).argmax(-1) == local)


@pytest.mark.parametrize('kind', ('group', 'shared group'))
def test_a_group_by_hand(kind):
    """Hidden state and queries, all seeing all; query g says row g; nothing of the targets is used.
    """
    lm, sizes = made(kind)
    h, target = inputs(sizes)
    p = by_hand.float64(nnx.to_pure_dict(nnx.state(lm)))
    got = scores(lm, h, target, None)
    assert p['outs']['kernel'].shape[0] == (1 if kind == 'shared group' else 3)
    for b, t in np.ndindex(h.shape[:2]):
        x = np.concatenate([[np.asarray(h[b, t], np.float64) @ p['inputs']['kernel']],
                            p['queries']])
        x = within(p['within'], x, np.ones((4, 4), bool))
        for g in range(3):
            want = x[1 + g] @ p['outs']['kernel'][0 if kind == 'shared group' else g]
            np.testing.assert_allclose(got[1 + g][b, t], want, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(got[0][b, t], np.asarray(h[b, t]) @ p['text_out']['kernel'],
                                   atol=1e-4)


def test_a_patch_by_hand():
    """Each row from its slice of the hidden state, the token before it, and its place."""
    lm, sizes = made('local')
    h, target = inputs(sizes)
    target = target.at[0, 1, 2].set(NOTHING)
    p = by_hand.float64(nnx.to_pure_dict(nnx.state(lm)))
    got = scores(lm, h, target, None)
    for b, t in np.ndindex(h.shape[:2]):
        x = np.asarray(h[b, t], np.float64).reshape(3, 4) @ p['inputs']['kernel'] + p['place']
        x[0] += p['first']
        for k in (1, 2):
            if target[b, k - 1, t] != NOTHING:
                x[k] += p['tokens'][target[b, k - 1, t]]
        x = within(p['within'], x, np.tri(3, dtype=bool))
        for k in range(3):
            np.testing.assert_allclose(got[k][b, t], x[k] @ p['out']['kernel'], rtol=2e-4,
                                       atol=2e-4)


@pytest.mark.parametrize('kind', ('group', 'local'))
def test_a_row_sees_earlier_rows_of_its_column_at_most(kind):
    """The rows of a group nothing of the column; those of a patch the rows above; neither another
    column's hidden state."""
    lm, sizes = made(kind)
    h, target = inputs(sizes)
    before = scores(lm, h, target, None)

    def moves(h, target):
        after = scores(lm, h, target, None)
        return np.stack([np.abs(np.asarray(a - b)).max(-1) > 0
                         for a, b in zip(after, before, strict=True)])
    for k, row in enumerate(sizes.rows):
        got = moves(h, target.at[0, k, 3].set(row.start + (target[0, k, 3] - row.start + 1) % 6))
        want = np.zeros_like(got)
        want[k + 1:, 0, 3] = kind == 'local'
        np.testing.assert_array_equal(got, want)
    got = moves(h.at[1, 5].add(1.0), target)
    assert got[:, 1, 5].all() and got.sum() == len(sizes.rows)


@nnx.jit
def speak(lm, h_BD, forced_K):
    seen = {}

    def pick(k, logits, key):
        seen[k] = logits
        return jnp.where(forced_K[k] < 0, jnp.argmax(logits, -1), forced_K[k])
    return lm.sample(h_BD, None, jax.random.key(0), pick), seen


@pytest.mark.parametrize('kind', ('group', 'shared group', 'local'))
def test_speaking_is_scoring_cell_by_cell(kind):
    lm, sizes = made(kind)
    h, _ = inputs(sizes, B=6, T=1)
    for forced in ({}, {0: 3}, {1: 5}):
        fixed = np.array([forced.get(k, -1) for k in range(len(sizes.rows))])
        column, seen = speak(lm, h[:, 0], fixed)
        for k, (row, s) in enumerate(zip(sizes.rows, scores(lm, h, column[:, :, None], None),
                                         strict=True)):
            np.testing.assert_allclose(seen[k], s[:, 0], rtol=1e-5, atol=2e-5)
            said = np.asarray(column[:, k]) - row.start
            np.testing.assert_array_equal(said, forced.get(k, np.asarray(s[:, 0]).argmax(-1)))


# Connectionist temporal classification.

def collapsed(path, blank):
    return tuple(s for s, _ in itertools.groupby(path) if s != blank)


def every_path(logp_TV, units, blank):
    """The log-probability of `units`, by adding up every path of symbols there is."""
    T, V = logp_TV.shape
    p = [np.exp(sum(logp_TV[t, s] for t, s in enumerate(path)))
         for path in itertools.product(range(V), repeat=T)
         if collapsed(path, blank) == tuple(units)]
    return np.log(sum(p)) if p else -np.inf


def packed(rng, answers, V, gap: int = 1):
    """One row of answers [(frames, units)], frames of none between them: (logp, unit, segment)."""
    T = sum(n + gap for n, _ in answers) + 1
    logp = by_hand.log_softmax(rng.standard_normal((T, V)) * 1.5)
    unit, segment = np.full(T, -1), np.zeros(T, int)
    at = 1
    for i, (n, units) in enumerate(answers):
        segment[at:at + n] = i + 1
        where = np.sort(rng.choice(n, min(n, len(units)), replace=False))
        unit[at + where] = units[:n]
        at += n + gap
    return logp, unit, segment


ctc = jax.jit(objective.ctc, static_argnames=('blank', 'most_units'))


def test_ctc_is_the_sum_over_every_path():
    """Two answers in a row (repeats, a single unit, none at all), each alone by brute force, evenly
    divided among its cells, wherever those stand."""
    rng = np.random.default_rng(0)
    rows = [packed(rng, answers, 3) for answers in (
        [(5, [0, 1]), (4, [1, 1])], [(4, [0]), (5, [0, 1, 0])], [(5, []), (4, [1, 0, 1, 0])])]
    logp, unit, segment = (np.stack(x) for x in zip(*rows, strict=True))
    got = np.asarray(ctc(logp, unit, segment, blank=2, most_units=4))
    assert not got[unit < 0].any()
    for b in range(3):
        for s in (1, 2):
            here = segment[b] == s
            units = unit[b, here][unit[b, here] >= 0]
            if not len(units):
                continue
            want = every_path(logp[b, here], units, 2)
            np.testing.assert_allclose(got[b, here].sum(), want, rtol=1e-5)
            np.testing.assert_allclose(got[b, here][unit[b, here] >= 0], want / len(units),
                                       rtol=1e-5)


def test_ctc_and_its_gradient_are_those_of_optax():
    """Each answer of packed rows by optax.ctc_loss alone."""
    rng = np.random.default_rng(1)
    V, blank = 7, 6
    rows = [packed(rng, [(n, rng.integers(0, 6, m).tolist()) for n, m in sizes], V)
            for sizes in ([(12, 5), (9, 3)], [(8, 4), (13, 6)])]
    logits, unit, segment = (np.stack(x) for x in zip(*rows, strict=True))

    def ours(logits):
        return -jnp.sum(objective.ctc(jax.nn.log_softmax(logits), jnp.asarray(unit),
                                      jnp.asarray(segment), blank=blank, most_units=8))

    def theirs(logits):
        total = 0.0
        for b, s in itertools.product(range(2), (1, 2)):
            here = np.flatnonzero(segment[b] == s)
            units = unit[b, here][unit[b, here] >= 0]
            total += optax.ctc_loss(logits[b, here][None], jnp.zeros((1, len(here))),
                                    jnp.asarray(units)[None], jnp.zeros((1, len(units))),
                                    blank_id=blank)[0]
        return total
    logits = jnp.asarray(logits, jnp.float32)
    (a, da), (b, db) = (jax.jit(jax.value_and_grad(f))(logits) for f in (ours, theirs))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(da, db, atol=2e-5)


def test_units_that_no_path_says_are_left_out():
    """Three frames cannot say 0 0 (which needs a blank between) and 1 besides: no loss, no gradient
    from there; and units beyond the most are not scored while those before them are."""
    rng = np.random.default_rng(2)
    logp, unit, segment = packed(rng, [(3, [0, 0, 1]), (4, [0, 1])], 3)
    def total(logp, most=4):
        return objective.ctc(logp[None], unit[None], segment[None], blank=2, most_units=most)[0]
    got = np.asarray(total(logp))
    want = every_path(logp[segment == 2], [0, 1], 2)
    np.testing.assert_allclose(got.sum(), want, rtol=1e-5)
    assert not got[segment == 1].any()
    grad = np.asarray(jax.grad(lambda x: total(x).sum())(jnp.asarray(logp)))
    assert np.isfinite(grad).all() and not grad[segment != 2].any() and grad[segment == 2].any()
    one = np.asarray(total(logp, most=1))
    first = np.flatnonzero(unit >= 0)
    np.testing.assert_allclose(one[first], [every_path(logp[segment == 1], [0], 2), 0, 0,
                                            every_path(logp[segment == 2], [0], 2), 0], rtol=1e-5)


def answers_of(lm, sizes, seed: int = 0, T: int = 9):
    """Hidden states and targets: one row with answers of 3 and 2 columns, one with an answer of 4.
    """
    h, target = inputs(sizes, T=T, seed=seed)
    blank = sizes.rows[1].start + sizes.rows[1].predicted
    spoken = np.zeros((2, T), bool)
    spoken[0, 1:4] = spoken[0, 6:8] = spoken[1, 3:7] = True
    cells = np.array(target)
    cells[:, 1:][np.broadcast_to(~spoken[:, None], cells[:, 1:].shape)] = NOTHING
    cells[:, 3][spoken] = cells[0, 2, 1] = cells[1, 2, 4:6] = blank     # holes, as layouts leave
    return h, jnp.asarray(cells), spoken


def test_ctc_head_speaks_what_it_scores():
    """The decoder reads each answer alone, R repeats a column; its log-probability is that of the
    units in their cells, by optax; text as ever; and nothing outside answers matters."""
    lm, sizes = made('ctc', most_units=12)
    h, target, spoken = answers_of(lm, sizes)
    logp, hit = log_prob(lm, h, target, None)
    s = scores(lm, h, target, None)
    np.testing.assert_allclose(logp[:, 0], np.take_along_axis(
        by_hand.log_softmax(np.asarray(s[0])), np.asarray(target[:, 0])[..., None], -1)[..., 0],
        atol=1e-4)
    assert not np.asarray(logp[:, 1:])[np.broadcast_to(~spoken[:, None], (2, 3, 9))].any()
    frames = np.stack([np.asarray(x) for x in s[1:]], 2).reshape(2, 27, 7)
    for b, first, last in ((0, 1, 4), (0, 6, 8), (1, 3, 7)):
        units = np.asarray(target[b, 1:, first:last]).T.reshape(-1) - 10
        units = units[units < 6]
        repeats = 3 * (last - first)
        loss = optax.ctc_loss(frames[b:b + 1, 3 * first:3 * last], np.zeros((1, repeats)),
                              units[None], np.zeros((1, len(units))), blank_id=6)[0]
        np.testing.assert_allclose(logp[b, 1:, first:last].sum(), -loss, rtol=1e-4)
        alone = lm.decoder(jnp.repeat(lm.inputs(h[b:b + 1, first:last]), 3, axis=1), Where(
            jnp.arange(repeats)[None], jnp.ones((1, repeats), int)))[0]
        np.testing.assert_allclose(lm.out(alone)[0], frames[b, 3 * first:3 * last], atol=1e-4)
    other = jnp.where(spoken[..., None], h, h + 1.0)
    np.testing.assert_allclose(log_prob(lm, other, target, None)[0][:, 1:], logp[:, 1:], atol=1e-5)


def test_who_only_writes_pays_for_no_voice():
    """Where a batch speaks nowhere, the decoder is not run: what it would say is not a number."""
    lm, sizes = made('ctc')
    h, target = inputs(sizes)
    written = target.at[:, 1:].set(NOTHING)
    graph, state = nnx.split(nnx.clone(lm))
    state['inputs']['kernel'].set_value(jnp.full_like(state['inputs']['kernel'][...], jnp.nan))

    def scored(state, target):
        return jnp.sum(nnx.merge(graph, state).log_prob(h, target, None)[0], axis=(0, 2))
    want, (spoken, written_only) = log_prob(lm, h, written, None)[0], (
        jax.jit(scored)(state, x) for x in (target, written))
    np.testing.assert_allclose(written_only, jnp.sum(want, axis=(0, 2)), rtol=1e-6)
    assert not np.asarray(want)[:, 1:].any() and np.isnan(spoken[1:]).all()
    grads = jax.jit(jax.grad(lambda s: scored(s, written).sum()))(state)
    assert not any(np.any(x) for x in jax.tree.leaves((grads['inputs'], grads['decoder'])))
    assert np.any(grads['text_out']['kernel'][...])


def test_ctc_streams_as_it_scores_and_looks_never_ahead():
    """Column by column with a cache of its own: the logits of training. A later column changes no
    earlier one's."""
    lm, sizes = made('ctc')
    h, target, _ = answers_of(lm, sizes)
    want = scores(lm, h, target, None)
    cache, step = lm.empty_cache(1, 4, jnp.float32), nnx.jit(
        lambda lm, h, cache: sampled(lm, h, cache))
    for t in range(3, 7):
        seen, cache = step(lm, h[1:2, t], cache)
        for k in range(4):
            np.testing.assert_allclose(seen[k][0], want[k][1, t], rtol=1e-4, atol=1e-4)
    after = scores(lm, h.at[1, 5].add(1.0), target, None)
    for r in range(1, 4):
        moved = np.abs(np.asarray(after[r] - want[r])).max(-1) > 1e-6
        assert moved[1, 5:7].all() and moved.sum() == 2


def sampled(lm, h_BD, cache):
    seen = {}

    def pick(k, logits, key):
        seen[k] = logits
        return jnp.argmax(logits, -1)
    column, cache = lm.sample(h_BD, None, None, pick, cache)
    assert column.shape == (1, 4)
    return seen, cache


# What goes in.

def test_averaged_features_count_for_every_row_of_speech():
    sizes, rng = OWN, np.random.default_rng(0)
    x = moved(frontend.averaged(sizes, rngs=nnx.Rngs(0), dtype='float32', encoder=functools.partial(
        Doubled)))
    _, tokens = inputs(sizes)
    tokens = tokens.at[0, 1:, 2].set(NOTHING)
    feats, slot = rng.standard_normal((2, 7, WIDTH)).astype(np.float32), np.zeros((2, 7), int)
    slot[0, 3:5] = 1
    got = x(dict(tokens=tokens, feats=jnp.asarray(feats), slot=jnp.asarray(slot),
                 position=None, segment=None))
    table = np.asarray(x.table[...])
    for b, t in np.ndindex(2, 7):
        rows = [table[i] if i >= 0 else 0 for i in np.asarray(tokens[b, :, t])]
        want = (rows[0] + 3 * 2 * feats[b, t] if slot[b, t] else sum(rows)) / 4
        np.testing.assert_allclose(got[b, t], want, atol=1e-5)
    added = moved(frontend.summed(sizes, rngs=nnx.Rngs(0), dtype='float32', heard=('text',),
                                  encoder=Doubled))
    got = added(dict(tokens=tokens, feats=jnp.asarray(feats), slot=jnp.asarray(slot),
                     position=None, segment=None))
    for b, t in np.ndindex(2, 7):
        want = np.asarray(added.table[...])[tokens[b, 0, t]] + 2 * feats[b, t] * slot[b, t]
        np.testing.assert_allclose(got[b, t], want, atol=1e-5)


class Doubled(nnx.Module):
    """An encoder that has nothing to learn."""

    def __init__(self, width, *, rngs):
        del width, rngs

    def __call__(self, feats, slot, where):
        return 2 * feats


@pytest.mark.parametrize('layers', (0, 1))
def test_a_group_enters_side_by_side(layers):
    """By hand: small embeddings, a transformer over them where there is one, then one linear map;
    the text's own embedding where there is no group."""
    x = moved(frontend.grouped(OWN, rngs=nnx.Rngs(0), dtype='float32', inside=8, layers=layers,
                               heads=2, mlp=10))
    _, tokens = inputs(OWN)
    tokens = tokens.at[0, 1:, 2].set(NOTHING).at[1, 2, 3].set(NOTHING)
    got = x(dict(tokens=tokens))
    p = by_hand.float64(nnx.to_pure_dict(nnx.state(x)))
    for b, t in np.ndindex(2, 7):
        group = np.asarray(tokens[b, 1:, t])
        if (group < 0).all():
            want = p['words'][tokens[b, 0, t]]
        else:
            parts = np.stack([p['inside'][i - 10] if i >= 0 else np.zeros(8) for i in group])
            if layers:
                parts = within(p['within'], parts + p['place'], np.ones((3, 3), bool))
            want = np.einsum('sw,swd->d', parts, p['out']['kernel'])
        np.testing.assert_allclose(got[b, t], want, rtol=1e-4, atol=1e-4)


def test_a_patch_enters_side_by_side_and_frames_add_their_codebooks():
    x = moved(frontend.grouped(PATCH, rngs=nnx.Rngs(0), dtype='float32', inside=5))
    _, tokens = inputs(PATCH)
    p = by_hand.float64(nnx.to_pure_dict(nnx.state(x)))
    want = np.einsum('btsw,swd->btd', p['inside'][np.moveaxis(np.asarray(tokens), 1, 2)],
                     p['out']['kernel'])
    np.testing.assert_allclose(x(dict(tokens=tokens)), want, atol=1e-4)
    four = Sizes((*OWN.rows, Row('audio 3', 31, 7, 6)), 38, WIDTH)      # two frames of two books
    x = moved(frontend.grouped(four, rngs=nnx.Rngs(0), dtype='float32', inside=5, steps=2))
    _, tokens = inputs(four)
    p = by_hand.float64(nnx.to_pure_dict(nnx.state(x)))
    each = p['inside'][np.asarray(tokens[:, 1:]) - 10]                  # [B, K, T, inside]
    steps = np.stack([each[:, 0] + each[:, 1], each[:, 2] + each[:, 3]], 2)
    np.testing.assert_allclose(x(dict(tokens=tokens)), np.einsum(
        'btsw,swd->btd', steps, p['out']['kernel']), atol=1e-4)


def test_a_listener_hears_its_own_sound_and_no_other():
    """A change in one sound moves every column of that sound in that segment and none outside."""
    from jaxsd import encoder
    x = moved(encoder.listener(WIDTH, rngs=nnx.Rngs(0), features=4, inside=8, layers=2, heads=2,
                               mlp=10))
    rng = np.random.default_rng(0)
    feats = jnp.asarray(rng.standard_normal((1, 12, 4)), jnp.float32)
    slot = jnp.asarray([[0, 1, 1, 1, 0, 2, 2, 0, 1, 1, 1, 0]])
    where = Where(jnp.asarray([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]]),
                  jnp.asarray([[1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]]))
    before = x(feats, slot, where)
    assert before.shape == (1, 12, WIDTH)
    for change, want in ((2, {1, 2, 3}), (5, {5, 6}), (9, {8, 9, 10})):
        after = x(feats.at[0, change].add(1.0), slot, where)
        changed = np.abs(np.asarray(after - before))[0].max(-1) > 1e-6
        assert set(np.flatnonzero(changed & np.asarray(slot[0] > 0))) == want   # elsewhere: unused
    # And it knows the order: sound read backwards is another.
    turned = x(feats.at[0, 1:4].set(feats[0, 3:0:-1]), slot, where)
    assert np.abs(np.asarray(turned[0, 1:4][::-1] - before[0, 1:4])).max() > 1e-3


def test_adaptors_by_hand():
    from jaxsd import encoder
    rng = np.random.default_rng(0)
    feats = rng.standard_normal((2, 3, 4)).astype(np.float32)
    for make in (encoder.mlp, encoder.gated):
        x = moved(make(WIDTH, rngs=nnx.Rngs(0), features=4, hidden=6))
        p = by_hand.float64(nnx.to_pure_dict(nnx.state(x)))
        if make is encoder.mlp:
            y = np.maximum(feats @ p['up']['kernel'] + p['up']['bias'], 0)
            want = y @ p['down']['kernel'] + p['down']['bias']
        else:
            gate, up = np.einsum('btd,dcf->cbtf', feats, p['gate_up']['kernel'])
            want = by_hand.silu(gate) * up @ p['down']['kernel']
        np.testing.assert_allclose(x(jnp.asarray(feats), None, None), want, atol=1e-4)
        with pytest.raises(ValueError, match='F=4'):
            x(jnp.asarray(feats[..., :3]), None, None)


@pytest.mark.parametrize('make, message', [
    (lambda: head.group(PATCH, rngs=nnx.Rngs(0), **SMALL), 'needs a text row'),
    (lambda: head.local(OWN, rngs=nnx.Rngs(0), **SMALL), 'needs predicted rows over one line'),
    (lambda: head.local(Sizes(PATCH.rows[:2], 9, 13), rngs=nnx.Rngs(0), **SMALL), 'must divide'),
    (lambda: head.group(OWN, rngs=nnx.Rngs(0), **SMALL | dict(heads=3)), 'must divide width 8'),
    (lambda: head.ctc(OWN, rngs=nnx.Rngs(0), decoder=DECODER, most_units=3), 'share one range'),
    (lambda: frontend.grouped(OWN, rngs=nnx.Rngs(0), inside=4, steps=2), 'frontend.steps 2 must'),
    (lambda: frontend.summed(OWN, rngs=nnx.Rngs(0), heard=('mine',)), 'frontend.heard names'),
])
def test_bad_options_say_which(make, message):
    with pytest.raises(ValueError, match=message):
        make()

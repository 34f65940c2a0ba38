# SPDX-License-Identifier: Apache-2.0
"""Is the loss what one gets with a pencil, and can nothing but the batch change its weights?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsd.objective import weighted_ce
from jaxsd.types import Row, Sizes

# Text ids 0..3 (3 is initial), mine 4..6 (6 is initial), theirs 7..9, of which none is predicted.
ROWS = (Row('text', 0, 4, 3), Row('mine 0', 4, 3, 2), Row('theirs 0', 7, 3, 0))
SIZES = Sizes(ROWS, 10, 8)
RANGES = {'text': (0, 4), 'mine 0': (4, 3), 'theirs 0': (7, 3)}
TERMS = dict(text=('text',), audio=('mine', 'theirs'))


def ce(logp, hit, batch, *, sizes=SIZES, ranges=RANGES, terms=TERMS):
    out, metrics = weighted_ce(jnp.asarray(logp, jnp.float32), jnp.asarray(hit), batch,
                               sizes=sizes, ranges=ranges, terms=terms)
    return jax.tree.map(float, out), jax.tree.map(float, metrics)


def random_batch(seed: int, B: int = 4, T: int = 6):
    rng = np.random.default_rng(seed)
    tokens = np.stack([rng.integers(r.start, r.start + r.size - 1, (B, T)) for r in ROWS], 1)
    weights = rng.uniform(0, 2, tokens.shape) * (rng.random(tokens.shape) < 0.7)
    weights[:, 2] = 0
    batch = dict(tokens=jnp.asarray(tokens, jnp.int32), weights=jnp.asarray(weights, jnp.float32))
    return -rng.exponential(size=tokens.shape), rng.random(tokens.shape) < 0.5, batch


def test_two_by_two():
    """Row text: 2 * log 2 + 0.5 * log 4 of weight 2.5. Row mine: 3 * log 5 of weight 3."""
    rows = Sizes(ROWS[:2], 7, 8)
    logp = -np.log([[[2.0, 4.0], [5.0, 100.0]]])
    hit = np.array([[[True, False], [True, True]]])
    batch = dict(tokens=jnp.array([[[1, 2], [4, 5]]]),
                 weights=jnp.array([[[2.0, 0.5], [3.0, 0.0]]]))
    terms, metrics = ce(logp, hit, batch, sizes=rows, ranges={'text': (0, 4), 'mine 0': (4, 3)},
                        terms=dict(text=('text',), audio=('mine',)))
    assert terms['text'] == pytest.approx((2 * np.log(2) + 0.5 * np.log(4), 2.5))
    assert terms['audio'] == pytest.approx((3 * np.log(5), 3.0))
    # Metrics count a scored cell once, whatever it weighs.
    assert metrics['nats/text'] == pytest.approx((np.log(2) + np.log(4), 2.0))
    assert metrics['accuracy/text'] == pytest.approx((1.0, 2.0))
    assert metrics['nats/mine 0'] == pytest.approx((np.log(5), 1.0))
    assert metrics['accuracy/mine 0'] == pytest.approx((1.0, 1.0))


def test_rows_of_a_term_are_pooled():
    """Not a mean of means: a row with more weight counts for more."""
    rows = Sizes((Row('text', 0, 4, 3), Row('mine 0', 4, 3, 2), Row('mine 1', 7, 3, 2)), 10, 8)
    logp = -np.array([[[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]]])
    weights = jnp.array([[[1.0, 1.0], [100.0, 100.0], [1.0, 0.0]]])
    batch = dict(tokens=jnp.array([[[0, 0], [4, 4], [7, 7]]]), weights=weights)
    terms, _ = ce(logp, logp == 0, batch, sizes=rows, ranges={},
                  terms=dict(text=('text',), audio=('mine',)))
    assert terms['audio'] == pytest.approx((205.0, 201.0))
    assert terms['text'] == (0.0, 2.0)


def test_a_semantic_codebook_weighs_a_hundred_times_as_much():
    """Moshi's eight codebooks (arXiv 2410.00037 §5.4): 2.0 nats of the first, 1.5 of the others."""
    rows = Sizes((Row('text', 0, 4, 3), *(Row(f'mine {k}', 4 + 3 * k, 3, 2) for k in range(8))),
                 28, 8)
    logp = -np.array([0.0, 2.0, *[1.5] * 7])[None, :, None]
    batch = dict(tokens=jnp.array([0, *(4 + 3 * k for k in range(8))])[None, :, None],
                 weights=jnp.array([0.0, 100.0, *[1.0] * 7])[None, :, None])
    terms, _ = ce(logp, logp == 0, batch, sizes=rows, ranges={}, terms=dict(audio=('mine',)))
    assert terms['audio'] == pytest.approx((210.5, 107.0))
    assert terms['audio'][0] / terms['audio'][1] == pytest.approx(1.96729, abs=1e-5)


def test_one_row_of_two_ranges():
    """A flat line: one term, and metrics by where on the line each target lies."""
    flat = Sizes((Row('tokens', 0, 10, 10),), 10, 8)
    logp = -np.array([[[1.0, 2.0, 4.0, 8.0]]])
    batch = dict(tokens=jnp.array([[[0, 6, 7, 3]]]), weights=jnp.array([[[1.0, 1.0, 0.0, 2.0]]]))
    terms, metrics = ce(logp, logp < -1, batch, sizes=flat,
                        ranges={'text': (0, 5), 'markers': (5, 1), 'units': (6, 4)},
                        terms=dict(tokens=('tokens',)))
    assert terms == {'tokens': (19.0, 4.0)}
    assert metrics == {'nats/text': (9.0, 2.0), 'accuracy/text': (1.0, 2.0),
                       'nats/markers': (0.0, 0.0), 'accuracy/markers': (0.0, 0.0),
                       'nats/units': (2.0, 1.0), 'accuracy/units': (1.0, 1.0)}


@pytest.mark.parametrize('cuts', [(1, 4), (2, 4), (1, 2, 3, 4)])
def test_sums_and_weights_add_up_over_any_split(cuts):
    logp, hit, batch = random_batch(0)
    whole = ce(logp, hit, batch)
    parts = [ce(logp[a:b], hit[a:b], {k: v[a:b] for k, v in batch.items()})
             for a, b in zip((0, *cuts[:-1]), cuts, strict=True)]
    added = jax.tree.map(lambda *x: sum(x), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), added, whole)
    # While a mean of means, which the loss is not, would have told the split.
    means = np.mean([p[0]['text'][0] / p[0]['text'][1] for p in parts])
    assert abs(means - whole[0]['text'][0] / whole[0]['text'][1]) > 1e-3


def test_padding_columns_add_nothing():
    logp, hit, batch = random_batch(1)
    empty = {k: jnp.full((4, 3, 5), {'tokens': -1, 'weights': 0}[k], v.dtype)
             for k, v in batch.items()}
    longer = {k: jnp.concatenate([v, empty[k]], -1) for k, v in batch.items()}
    pad = np.full((4, 3, 5), -3.0)
    got = ce(np.concatenate([logp, pad], -1), np.concatenate([hit, pad < 0], -1), longer)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got,
                 ce(logp, hit, batch))


def test_weights_and_gradient_depend_on_the_batch_alone():
    logp, hit, batch = random_batch(2)
    other = ce(3 * logp - 1, ~hit, batch)
    for a, b in zip(ce(logp, hit, batch), other, strict=True):
        for name in a:
            assert a[name][1] == b[name][1] and a[name][0] != b[name][0]

    def total(logp, part):
        return sum(t[part] for t in weighted_ce(logp, hit, batch, sizes=SIZES, ranges=RANGES,
                                                terms=TERMS)[0].values())
    np.testing.assert_allclose(jax.grad(total)(jnp.asarray(logp, jnp.float32), 0),
                               -batch['weights'])
    assert not jax.grad(total)(jnp.asarray(logp, jnp.float32), 1).any()


def test_a_row_that_is_never_predicted_has_no_metrics():
    logp, hit, batch = random_batch(3)
    assert set(ce(logp, hit, batch)[1]) == {'nats/text', 'accuracy/text', 'nats/mine 0',
                                            'accuracy/mine 0'}


def test_a_term_of_unknown_rows_is_refused():
    logp, hit, batch = random_batch(4)
    with pytest.raises(ValueError, match=r"objective.terms.audio names rows \('yours',\), but the "
                                         r"rows are \['mine', 'text', 'theirs'\]"):
        ce(logp, hit, batch, terms=dict(text=('text',), audio=('yours',)))
    for names in ('text', 3, (), ('text', 'yours'), (3,)):
        with pytest.raises(ValueError, match='objective.terms.text names rows'):
            ce(logp, hit, batch, terms=dict(text=names))
    with pytest.raises(ValueError, match='objective.terms is empty'):
        ce(logp, hit, batch, terms={})


def test_balance_is_a_term_of_its_own_coefficient():
    """Weighted by the columns of segments, which the batch says; without it only a metric."""
    logp, hit, batch = random_batch(0)
    batch['segment'] = jnp.asarray(np.arange(24).reshape(4, 6) % 5 > 0, jnp.int32)
    columns = float(batch['segment'].sum())
    beside = {'balance': (2.5 * columns, columns)}
    given = dict(sizes=SIZES, ranges=RANGES, terms=TERMS)
    plain, metrics = weighted_ce(logp, hit, batch, beside, **given)
    assert 'balance' not in plain and metrics['balance'] == beside['balance']
    out, _ = weighted_ce(logp, hit, batch, beside, **given, balance=0.02)
    assert float(out['balance'][0] / out['balance'][1]) == pytest.approx(0.02 * 2.5)
    unseen, _ = weighted_ce(logp, hit, batch, **given, balance=0.02)     # before any forward
    assert {k: float(w) for k, (_, w) in unseen.items()} == pytest.approx(
        {k: float(w) for k, (_, w) in out.items()})
    for terms, balance in ((TERMS, -1.0), (dict(balance=('text',)), 0.1)):
        with pytest.raises(ValueError, match='objective.balance is a coefficient of at least 0'):
            weighted_ce(logp, hit, batch, sizes=SIZES, ranges=RANGES, terms=terms, balance=balance)


def test_scales_multiply_what_they_name_and_nothing_else():
    logp, hit, batch = random_batch(3)
    cells = (jnp.asarray(logp, jnp.float32), jnp.asarray(hit), batch)
    options = dict(sizes=SIZES, ranges=RANGES, terms=TERMS)
    plain, metrics = weighted_ce(*cells, **options)
    scaled, same = weighted_ce(*cells, **options, scales=dict(audio=3.0))
    assert float(scaled['audio'][0]) == pytest.approx(3 * float(plain['audio'][0]))
    assert scaled['audio'][1] == plain['audio'][1] and scaled['text'] == plain['text']
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(a == b), metrics, same))
    for bad in (dict(mine=1.0), dict(audio=0.0)):
        with pytest.raises(ValueError, match='objective.scales'):
            weighted_ce(*cells, **options, scales=bad)

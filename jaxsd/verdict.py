# SPDX-License-Identifier: Apache-2.0
"""What measurements of several arms decide, and what they do not.

Two kinds of luck stand between a measurement and an answer: which items were measured, and which
seed was trained. Both are estimated from what was measured, and RULE says how they decide.
"""

import functools
import math

import numpy as np

DRAWS = 2000
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 % for 1, 2, ... degrees of freedom; the last serves for more."""

RULE = (f'An interval of 95 % joins two kinds of luck. Items are drawn again {DRAWS:,} times, the '
        "same ones for all arms. Seeds are replicates, by Student's t on their mean. Their half "
        'widths are added as squares. Arms are compared seed by seed, by the interval of their '
        'difference: an ordering is confirmed where it lies wholly on the expected side of zero, '
        'contradicted where it lies wholly on the other, and else not decided at this budget. '
        'Nothing is decided with one seed, before all seeds are there, by arms measured on '
        'different numbers of items, or where every seed gives the same number and no items are '
        'kept. Below some twenty items the intervals are too narrow. Nothing is corrected for the '
        'number of comparisons.')


@functools.lru_cache(4)
def _drawn(items: int) -> np.ndarray:
    """float64 [DRAWS, items]: how often each item is in each of the samples drawn again."""
    return np.random.default_rng(items).multinomial(
        items, np.full(items, 1 / items), size=DRAWS).astype(np.float64)


def redrawn(per_item: list[dict | None]) -> np.ndarray | None:
    """float64 [DRAWS]: the mean over seeds of a metric of items drawn again, or None without any.

    per_item: for each seed what `evaluate.shares` kept.
    """
    sizes = {len(x['sum']) if x else 0 for x in per_item}
    if len(sizes) != 1 or sizes == {0}:
        return None
    counts = _drawn(sizes.pop())
    with np.errstate(invalid='ignore', divide='ignore'):
        return np.mean([counts @ np.array(x['sum']) / (counts @ np.array(
            x.get('of', np.ones(counts.shape[1])))) for x in per_item], axis=0)


def interval(values: list[float], draws: np.ndarray | None) -> tuple[float, float | None,
                                                                   float | None]:
    """(mean, low, high) of one value per seed: see RULE. None: neither items nor seeds to go by."""
    mean, n = float(np.mean(values)), len(values)
    luck = T_975[min(n, len(T_975) + 1) - 2] * float(np.std(values, ddof=1)) / math.sqrt(n) if (
        n > 1) else 0.0
    if draws is None and not luck:      # one seed, or ties, which say nothing of the next seed
        return mean, None, None
    low, high = (mean, mean)
    if draws is not None and not np.isnan(draws).all():
        low, high = np.nanpercentile(draws, [2.5, 97.5])
    return (mean, mean - math.hypot(max(0.0, mean - low), luck),
            mean + math.hypot(max(0.0, high - mean), luck))


Found = list[tuple[float, dict | None]]
"""Per seed, the value of a metric and what `evaluate.shares` kept of its items, if anything."""


def estimate(found: Found, *, percent: bool = False) -> dict:
    """mean, low, high, seeds and by_seed of one arm: see RULE.

    percent: a mean over items that lie in 0..100 does so, too, and so does its interval.
    """
    values, per_item = [x for x, _ in found], [p for _, p in found]
    mean, low, high = interval(values, redrawn(per_item))
    if percent and low is not None and all(p and 'of' not in p for p in per_item) and all(
            0 <= x <= 100 for p in per_item for x in p['sum']):
        low, high = max(0.0, low), min(100.0, high)
    return dict(mean=mean, low=low, high=high, seeds=len(found), by_seed=values)


def difference(a: Found, b: Found) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of a minus b, seed by seed, items drawn alike for both: see RULE."""
    draws = [redrawn([p for _, p in found]) for found in (a, b)]
    differences = [x - y for (x, _), (y, _) in zip(a, b, strict=True)]
    if len({len(p['sum']) if p else 0 for _, p in (*a, *b)}) > 1:
        return float(np.mean(differences)), None, None
    return interval(differences, None if draws[0] is None else draws[0] - draws[1])


def of_difference(low: float | None, high: float | None, *, seeds: int, better: str) -> str:
    """Of a difference 'expected better minus worse' with this interval."""
    if low is None or high is None or seeds < 2:
        return 'not decided'
    low, high = (low, high) if better == 'higher' else (-high, -low)
    return 'confirmed' if low > 0 else 'contradicted' if high < 0 else 'not decided'


def overall(verdicts: list[str]) -> str:
    if not verdicts:
        return 'no ordering was expected'
    if 'contradicted' in verdicts:
        return 'contradicted'
    return 'confirmed' if set(verdicts) == {'confirmed'} else 'not decided at this budget'


def law(points: list[tuple[float, float, float, float]]) -> dict:
    """Which size is best for a budget of computation: a parabola over the logarithm of the size for
    each budget, and a power law through their minima (iso-FLOP profiles, arXiv 2203.15556 §3.2).

    points: (FLOPs, parameters, positions, loss). exponents: of parameters and of positions in the
    FLOPs; None with fewer than two budgets whose minimum lies inside the sizes tried.
    """
    optima = []
    for flops in sorted({p[0] for p in points}):
        size, seen, loss = np.array(sorted(p[1:] for p in points if p[0] == flops)).T
        if len(set(size)) < 3:
            continue
        x = np.log(size)
        a, b, c = np.polyfit(x, loss, 2)
        if a > 0 and x[0] < -b / (2 * a) < x[-1]:
            best = -b / (2 * a)
            optima.append(dict(flops=flops, parameters=float(np.exp(best)), positions=float(
                np.exp(np.interp(best, x, np.log(seen)))), loss=float(c - b * b / (4 * a)),
                               fit=[float(a), float(b), float(c)]))
    exponents = None
    if len(optima) > 1:
        exponents = {k: float(np.polyfit(np.log([o['flops'] for o in optima]),
                                         np.log([o[k] for o in optima]), 1)[0])
                     for k in ('parameters', 'positions')}
    return dict(points=[dict(zip(('flops', 'parameters', 'positions', 'loss'), p, strict=True))
                        for p in points], optima=optima, exponents=exponents)

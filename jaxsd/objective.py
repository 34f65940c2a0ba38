# SPDX-License-Identifier: Apache-2.0
"""What is rewarded: log-probabilities and a Batch become named sums and weights.

An objective returns terms {name: (sum, weight)}; the loss is the sum over terms of sum / weight,
divided once, after every microbatch and device has been added up. Weights depend on the batch
alone, so packing, accumulation and data parallelism cannot change the loss. Keeping terms apart is
what lets text and audio be normalized each by its own weight, as the multistream systems do.
"""

from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxsd.types import Sizes


def _overlap(row, start: int, size: int) -> bool:
    return row.start < start + size and start < row.start + row.size


def weighted_ce(logp_BKT, hit_BKT, batch, beside: Mapping = MappingProxyType({}), *,
                sizes: Sizes, ranges, terms: dict, scales: Mapping = MappingProxyType({}),
                balance: float = 0.0):
    """Weighted cross entropy; cells as `batch['weights']` say, grouped into `terms` by row name.

    terms maps a term to the first words of the names of its rows: {'text': ('text',), 'audio':
    ('mine', 'theirs')}. A term's value is sum(w * ce) / sum(w), all its rows pooled (moshi-finetune
    finetune/loss.py); `scales` multiplies the values of those that it names. Also returns metrics:
    unweighted nats and accuracy per range of the line.

    beside: the backbone's own terms, reported as metrics. balance: the coefficient with which its
    'balance', how evenly experts are used (see `nn.balance`), is a term as well. It is a product of
    means and so a term of each microbatch, weighted by its columns.
    """
    weights = batch['weights']
    kinds = [row.name.split()[0] for row in sizes.rows]
    if not terms:
        raise ValueError('objective.terms is empty: nothing would be learned; name terms and their '
                         f'rows, as in {{"ce": ("{kinds[0]}",)}}')
    if not set(scales) <= set(terms) or not all(x > 0 for x in scales.values()):
        raise ValueError(f'objective.scales {dict(scales)} must be factors above 0 of terms among '
                         f'{sorted(terms)}')
    out = {}
    for term, names in terms.items():
        if not isinstance(names, tuple | list) or not names or not set(names) <= set(kinds):
            raise ValueError(f'objective.terms.{term} names rows {names}, but the rows are '
                             f'{sorted(set(kinds))}; give a tuple of these')
        at = jnp.asarray([k for k, kind in enumerate(kinds) if kind in names])
        w = weights[:, at]
        out[term] = (scales.get(term, 1.0) * jnp.sum(-logp_BKT[:, at] * w), jnp.sum(w))
    if balance < 0 or (balance and 'balance' in terms):
        raise ValueError('objective.balance is a coefficient of at least 0, and then no name of '
                         f'objective.terms; got {balance} and {", ".join(terms)}')
    if balance:     # the weight is the batch's own, known before any forward
        total, _ = beside.get('balance', (0.0, 0.0))
        out['balance'] = (balance * total, jnp.sum(batch['segment'] > 0).astype(jnp.float32))
    metrics = dict(beside)
    for name, (start, size) in ranges.items():
        ks = [k for k, row in enumerate(sizes.rows)
              if row.predicted and _overlap(row, start, size)]
        if ks:
            at = jnp.asarray(ks)
            tokens = batch['tokens'][:, at]
            w = ((weights[:, at] > 0) & (tokens >= start) & (tokens < start + size)
                 ).astype(jnp.float32)
            metrics[f'nats/{name}'] = (jnp.sum(-logp_BKT[:, at] * w), jnp.sum(w))
            metrics[f'accuracy/{name}'] = (jnp.sum(hit_BKT[:, at] * w), jnp.sum(w))
    return out, metrics


def _frames(batch, beside: Mapping):
    """How far off frames are [B, T, M], how much that matters [B, T], and what else is beside."""
    beside = dict(beside)
    said, true = beside.pop('frames', (jnp.zeros(batch['frames'].shape),) * 2)
    return said - true, batch['weights'][:, 0] * (batch['framed'] > 0), beside


def frames(logp_BKT, hit_BKT, batch, beside: Mapping = MappingProxyType({}), *, sizes: Sizes,
           ranges, terms: dict, bins: int, delta_frames: int,
           scales: Mapping = MappingProxyType({})):
    """`weighted_ce` of the tokens and, of the frames between them, the distance to the true ones.

    The distance of two numbers is |d| + d^2. Three kinds of terms measure it between frames as they
    are ('frames'), between their differences from bin to bin ('bins') and from each frame to the
    one k before it, k up to `delta_frames` ('time 1' ...), which is what keeps speech from being
    smoothed (arXiv 2305.15255 §3.3). A term is a mean over numbers, where the paper has sums, in
    which the frames would drown the words; `scales` weighs it.

    A column holds one or several frames of `bins` numbers, in order of time, and weighs as its cell
    in the first row; differences reach over columns that touch and belong to one segment.
    beside['frames']: what is said and what is true, [B, T, frames x bins].
    """
    d_BTM, weight_BT, beside = _frames(batch, beside)
    out, metrics = weighted_ce(logp_BKT, hit_BKT, batch, beside, sizes=sizes, ranges=ranges,
                               terms=terms,
                               scales={name: s for name, s in scales.items() if name in terms})
    B, T, width = d_BTM.shape
    if width % bins:
        raise ValueError(f'objective.bins {bins} must divide the {width} numbers of a column')
    each = width // bins
    weight = jnp.repeat(weight_BT, each, axis=1)            # of every frame, [B, T x each]
    segment = jnp.repeat(batch['segment'], each, axis=1)
    d = d_BTM.reshape(B, T * each, bins)

    def distance(d, weight):
        total = jnp.sum(weight * jnp.sum(jnp.abs(d) + d * d, axis=-1))
        return total, jnp.sum(weight) * d.shape[-1]
    found = {'frames': distance(d, weight), 'bins': distance(jnp.diff(d, axis=-1), weight)}
    for k in range(1, delta_frames + 1):
        both = (weight[:, :-k] > 0) & (segment[:, :-k] == segment[:, k:])
        found[f'time {k}'] = distance(d[:, k:] - d[:, :-k], weight[:, k:] * both)
    if not set(scales) <= {*terms, *found}:
        raise ValueError(f'objective.scales names {sorted(set(scales) - {*terms, *found})}, but '
                         f'the terms are {", ".join((*terms, *found))}')
    for name, (total, weight) in found.items():
        out[name] = (scales.get(name, 1.0) * total, weight)
    return out, metrics


def flow(logp_BKT, hit_BKT, batch, beside: Mapping = MappingProxyType({}), *, sizes: Sizes, ranges,
         terms: dict):
    """`weighted_ce` of the tokens and, where a batch has frames, a term 'flow': the mean squared
    distance of velocities (arXiv 2210.02747 eq. 14), of columns that weigh as their tokens do.

    beside['frames']: the velocity that is said and the true one, [B, T, M].
    """
    if 'frames' not in batch:
        return weighted_ce(logp_BKT, hit_BKT, batch, beside, sizes=sizes, ranges=ranges,
                           terms=terms)
    d_BTM, weight_BT, beside = _frames(batch, beside)
    out, metrics = weighted_ce(logp_BKT, hit_BKT, batch, beside, sizes=sizes, ranges=ranges,
                               terms=terms)
    total = jnp.sum(weight_BT * jnp.sum(d_BTM * d_BTM, axis=-1))
    return out | {'flow': (total, jnp.sum(weight_BT) * d_BTM.shape[-1])}, metrics


NEVER = -1e30
"""The logarithm of a probability of 0, finite so that its gradient is."""


def ctc(logp_BTV, unit_BU, segment_BT, *, blank: int, most_units: int):
    """Connectionist temporal classification of several answers in one row: float32 [B, U].

    logp_BTV: log-probabilities of every frame. segment_BT: which answer a frame belongs to, counted
    from 1 in order of time, 0 for none; the frames of an answer are consecutive and a frame of 0
    lies between two answers. unit_BU: targets, -1 for a cell without one; cell u belongs to the
    answer of frame u (U = T), in order.

    An answer's units are said by every path of one symbol per frame that is those units once
    repeats are merged and blanks dropped (Graves et al. 2006 §3). The logarithm of the probability
    of all paths is divided evenly among its first `most_units` units, each in its own cell; summed
    over cells it is what optax.ctc_loss and torch's CTCLoss give for each answer alone. (Those take
    one answer per row; rows here are packed.) Units that no path can say get 0 and no gradient
    (zero_infinity).
    """
    B, T, _ = logp_BTV.shape
    segment = segment_BT
    first = (segment > 0) & (segment != jnp.pad(segment, ((0, 0), (1, 0)))[:, :-1])
    last = (segment > 0) & (segment != jnp.pad(segment, ((0, 0), (0, 1)))[:, 1:])
    there = (unit_BU >= 0) & (segment > 0)
    before = jnp.cumsum(there, axis=1) - there          # how many units of the row come earlier
    rows = jnp.arange(B)[:, None]
    in_order = jnp.zeros((B, T + most_units), jnp.int32).at[
        rows, jnp.where(there, before, T + most_units)].set(unit_BU, mode='drop')
    begun = jax.lax.cummax(jnp.where(first, before, 0), axis=1)     # units before the answer
    of_answer = jax.vmap(lambda n, s: jax.ops.segment_sum(n, s, T + 1))(
        there.astype(jnp.int32), segment)
    count_BT = jnp.minimum(jnp.take_along_axis(of_answer, segment, axis=1), most_units)
    states = 2 * most_units + 1             # blank, unit, blank, unit, ..., blank
    odd = jnp.arange(states) % 2 == 1

    def frame(alpha, now):
        logp, is_first, start, count = now
        units = jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (most_units,)))(
            in_order, start)
        symbol = jnp.full((B, states), blank).at[:, 1::2].set(units)
        change = odd & (symbol != jnp.pad(symbol, ((0, 0), (2, 0)), constant_values=-1)[:, :-2])
        one, two = (jnp.pad(alpha, ((0, 0), (n, 0)), constant_values=NEVER)[:, :-n]
                    for n in (1, 2))
        alpha = jnp.logaddexp(jnp.logaddexp(alpha, one), jnp.where(change, two, NEVER))
        begin = jnp.where(jnp.arange(states) < 2, 0.0, NEVER)
        alpha = jnp.where(is_first[:, None], begin, alpha)
        alpha = alpha + jnp.take_along_axis(logp, symbol, axis=1)
        alpha = jnp.where(jnp.arange(states) <= 2 * count[:, None], jnp.maximum(alpha, NEVER),
                          NEVER)
        end = jnp.take_along_axis(alpha, 2 * count[:, None], axis=1)[:, 0]
        unit = jnp.take_along_axis(alpha, jnp.maximum(2 * count[:, None] - 1, 0), axis=1)[:, 0]
        return alpha, jnp.logaddexp(end, jnp.where(count > 0, unit, NEVER))

    by_time = (jnp.moveaxis(logp_BTV.astype(jnp.float32), 1, 0), first.T, begun.T, count_BT.T)
    # Made anew in the backward pass: a frame's sums take more memory than time.
    _, said = jax.lax.scan(jax.checkpoint(frame, prevent_cse=False), jnp.full((B, states), NEVER),
                           by_time)
    said = jnp.where(last, said.T, 0.0)
    said = jnp.where(said < 0.1 * NEVER, 0.0, said)     # NaN stays NaN
    total = jax.vmap(lambda x, s: jax.ops.segment_sum(x, s, T + 1))(said, segment)
    share = jnp.take_along_axis(total, segment, axis=1) / jnp.maximum(count_BT, 1)
    return jnp.where(there & (before - begun < most_units), share, 0.0)

# SPDX-License-Identifier: Apache-2.0
"""What is rewarded: log-probabilities and a Batch become named sums and weights.

An objective returns terms {name: (sum, weight)}; the loss is the sum over terms of sum / weight,
divided once, after every microbatch and device has been added up. Weights depend on the batch
alone, so packing, accumulation and data parallelism cannot change the loss. Keeping terms apart is
what lets text and audio be normalized each by its own weight, as the multistream systems do.
"""

from collections.abc import Mapping
from types import MappingProxyType

import jax.numpy as jnp

from jaxsd.types import Sizes


def _overlap(row, start: int, size: int) -> bool:
    return row.start < start + size and start < row.start + row.size


def weighted_ce(logp_BKT, hit_BKT, batch, beside: Mapping = MappingProxyType({}), *,
                sizes: Sizes, ranges, terms: dict, balance: float = 0.0):
    """Weighted cross entropy; cells as `batch['weights']` say, grouped into `terms` by row name.

    terms maps a term to the first words of the names of its rows: {'text': ('text',), 'audio':
    ('mine', 'theirs')}. A term's value is sum(w * ce) / sum(w), all its rows pooled (moshi-finetune
    finetune/loss.py). Also returns metrics: unweighted nats and accuracy per range of the line.

    beside: the backbone's own terms, reported as metrics. balance: the coefficient with which its
    'balance', how evenly experts are used (see `nn.balance`), is a term as well. It is a product of
    means and so a term of each microbatch, weighted by its columns.
    """
    weights = batch['weights']
    kinds = [row.name.split()[0] for row in sizes.rows]
    if not terms:
        raise ValueError('objective.terms is empty: nothing would be learned; name terms and their '
                         f'rows, as in {{"ce": ("{kinds[0]}",)}}')
    out = {}
    for term, names in terms.items():
        if not isinstance(names, tuple | list) or not names or not set(names) <= set(kinds):
            raise ValueError(f'objective.terms.{term} names rows {names}, but the rows are '
                             f'{sorted(set(kinds))}; give a tuple of these')
        at = jnp.asarray([k for k, kind in enumerate(kinds) if kind in names])
        w = weights[:, at]
        out[term] = (jnp.sum(-logp_BKT[:, at] * w), jnp.sum(w))
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

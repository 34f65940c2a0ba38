# SPDX-License-Identifier: Apache-2.0
"""How many floating-point operations a step takes, counted in the program that jax traced.

Matrix products are counted, two operations per multiply-add, and what a scan repeats is counted as
often as it is repeated. `model`: one forward pass and the products of its backward pass, as no
recomputation would need more; this is the numerator of the MFU. `executed`: all that the step does,
recomputation included.
"""

import copy
import logging
import math

import jax
import numpy as np
from jax.extend import core as jex_core

from jaxsd import model, sharding, train
from jaxsd.attention import LANES
from jaxsd.config import options_of, plain, resolve
from jaxsd.stage import join, split
from jaxsd.state import abstract_state

log = logging.getLogger('jaxsd')


class _Count:
    """Walks a program. `marked` says of each input whether gradients flow to it."""

    def __init__(self, seen: float = 1.0):
        self.unknown, self.seen = 0, seen

    def of(self, jaxpr, marked) -> tuple[float, list[bool]]:
        """(FLOPs, marks of the outputs). A product of marked inputs has one more product per such
        input in the backward pass."""
        total, marks = 0.0, dict(zip(jaxpr.invars, marked, strict=True))

        def mark(x):
            return not isinstance(x, jex_core.Literal) and marks.get(x, False)
        for eqn in jaxpr.eqns:
            flops, out = self._eqn(eqn, [mark(x) for x in eqn.invars])
            total += flops
            for var, m in zip(eqn.outvars, out, strict=True):
                marks[var] = m and np.issubdtype(_kind(var), np.inexact)
        return total, [mark(x) for x in jaxpr.outvars]

    def _eqn(self, eqn, marked):
        name, p, n_out = eqn.primitive.name, eqn.params, len(eqn.outvars)
        if name in ('dot_general', 'conv_general_dilated', 'ragged_dot', 'ragged_dot_general'):
            return _product(eqn) * (1 + sum(marked[:2])), [any(marked)] * n_out
        if name == 'stop_gradient':
            return 0.0, [False] * n_out
        if name == 'scan':
            # What is carried keeps its shape, what is stacked has an axis more outside: releases of
            # jax differ in how their parameters say how many there are.
            body, ndim = p['jaxpr'].jaxpr, lambda v: len(v.aval.shape)
            carried = sum(ndim(a) == ndim(b) for a, b in
                          zip(eqn.outvars, body.outvars, strict=True))
            carry = sum(ndim(a) == ndim(b) for a, b in zip(eqn.invars, body.invars, strict=True))
            first = carry - carried
            marked, before = list(marked), None
            while marked != before:         # until the carry's marks no longer grow
                before = list(marked)
                flops, out = self._inner(p['jaxpr'], marked)
                marked[first:carry] = [a or b for a, b in
                                       zip(marked[first:carry], out[:carried], strict=True)]
            return flops * p['length'], marked[first:carry] + out[carried:]
        if name == 'while':
            return self._while(p, marked)
        if name == 'cond':
            found = [self._inner(branch, marked[1:]) for branch in p['branches']]
            return (max(flops for flops, _ in found),
                    [any(m) for m in zip(*(out for _, out in found), strict=True)])
        if name == 'shard_map':             # every device does what it says
            flops, out = self._inner(p['jaxpr'], marked)
            manual = p.get('manual_axes', p['mesh'].axis_names)
            return flops * math.prod(p['mesh'].shape[a] for a in manual), out
        if name == 'pallas_call':
            flops, _ = self._inner(p['jaxpr'], None)
            times = (self.seen * _blocks(eqn) if str(p.get('name')).startswith('splash') else
                     math.prod(p['grid_mapping'].grid))
            return flops * times, [any(marked)] * n_out
        inner = [v for v in p.values() if hasattr(v, 'eqns') or hasattr(v, 'jaxpr')]
        if inner:       # a call of one kind or another
            return self._inner(inner[0], marked, n_out)
        return 0.0, [any(marked)] * n_out

    def _inner(self, jaxpr, marked, n_out=None):
        jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
        if marked is None or len(marked) != len(jaxpr.invars):
            flops, out = self.of(jaxpr, [bool(marked) and any(marked)] * len(jaxpr.invars))
        else:
            flops, out = self.of(jaxpr, marked)
        return flops, out if n_out in (None, len(out)) else [any(out)] * n_out

    def _while(self, p, marked):
        """A loop of unknown length fills an array slice by slice: as often as it has slices."""
        first = p['cond_nconsts'] + p['body_nconsts']
        marked, before = list(marked), None
        while marked != before:
            before = list(marked)
            flops, out = self._inner(p['body_jaxpr'], marked[p['cond_nconsts']:])
            marked[first:] = [a or b for a, b in zip(marked[first:], out, strict=True)]
        if flops:
            filled = [v.aval.shape[0] for v in p['body_jaxpr'].jaxpr.outvars if v.aval.ndim > 1]
            self.unknown += not filled
            flops *= max(filled, default=1)
        return flops, marked[first:]


def _blocks(eqn) -> float:
    """How many blocks of queries by blocks of keys there are in a kernel of attention, seen or not:
    its grid may leave some of those that a window hides out, and not all."""
    (queries, q), (keys, k) = [(whole.aval.shape, part.aval.shape) for whole, part in
                               zip(eqn.invars, eqn.params['jaxpr'].invars, strict=False)
                               if np.issubdtype(_kind(whole), np.inexact)][:2]
    return math.prod(queries[:-2]) * (queries[-2] / q[-2]) * (keys[-2] / k[-2])


def _kind(var):
    dtype = getattr(var.aval, 'dtype', np.dtype('int32'))
    return np.float32 if str(dtype) == 'bfloat16' else getattr(dtype, 'type', np.int32)


def _product(eqn) -> float:
    a, b = (v.aval.shape for v in eqn.invars[:2])
    out = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == 'dot_general':
        return 2.0 * out * math.prod(a[i] for i in eqn.params['dimension_numbers'][0][0])
    if eqn.primitive.name == 'conv_general_dilated':
        return 2.0 * out * math.prod(b) / b[eqn.params['dimension_numbers'].rhs_spec[0]]
    return 2.0 * out * a[-1]            # every row by the one matrix it belongs to


def count(jaxpr, seen: float = 1.0) -> tuple[float, int]:
    """(FLOPs, loops of unknown length) of a jaxpr as it stands; nothing is added for gradients.

    seen: the share of blocks that kernels of attention compute, which is not in their text.
    """
    counter = _Count(seen)
    jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
    flops, _ = counter.of(jaxpr, [False] * len(jaxpr.invars))
    return flops, counter.unknown


def pairs(columns: int, window_columns: int | None) -> int:
    """How many pairs of columns attend: each to itself and to those before it, in the window."""
    w = columns if window_columns is None else min(columns, window_columns)
    return w * (w + 1) // 2 + (columns - w) * w


def seen(config) -> float:
    """The share of the blocks of `attention.splash` in which a query sees a key: those on the
    diagonal, and before it up to where the window of their first query begins."""
    columns = -(-config.columns // LANES) * LANES
    block, window = math.gcd(512, columns), config.backbone.get('window_columns') or columns
    n = columns // block
    first = [max(0, i * block - window + 1) // block for i in range(n)]
    return sum(i + 1 - j for i, j in enumerate(first)) / n ** 2


def model_flops(config, stage, devices) -> tuple[float, int]:
    """(FLOPs of a step without recomputation, loops of unknown length), causal attention counted
    as causal, rows as if each held one segment.

    The blocked attention multiplies more pairs than are visible. How much of the total that is
    tells a second count with blocks of half the size: it differs in these pairs alone.
    """
    T, options = config.columns, options_of(resolve(config.backbone.name, 'jaxsd.backbone'))
    if 'block_columns' not in options:
        return _forward(config, stage, devices)
    window, half = config.backbone.get('window_columns'), (T + 1) // 2
    blocked = {'attention': 'xla'} if 'attention' in options else {}
    found, level = [], log.level
    log.setLevel(logging.WARNING)       # the engine of this count is nobody's choice
    try:
        for block in (T, half):
            c = copy.deepcopy(config)
            with c.unlocked():
                c.backbone.update(block_columns=block, **blocked)
            found.append(_forward(c, stage, devices))
    finally:
        log.setLevel(level)
    (whole, unknown), (halved, _) = found       # blocks of all columns, and of half of them
    first = 0 if window is None else max(0, half - window + 1)
    skipped = T * T - half * half - (T - half) * (T - first)
    return whole - (whole - halved) / skipped * (T * T - pairs(T, window)), unknown


def _forward(config, stage, devices):
    """Counts a forward pass and its gradients on one device of the platform that will run it."""
    mesh = sharding.make_mesh({}, devices[:1])
    graph, target, by_path = abstract_state(config, stage, mesh)
    place = sharding.placer(sharding.rules_of(plain(config.mesh).get('rules', {})), mesh)
    batch = train.abstract_batch(config, stage, mesh)
    trainable, frozen = split(target['params'], by_path)
    key = jax.eval_shape(lambda: jax.random.key(0))
    scored = train.scorer(graph, model.objective_of(config), place)

    def forward(trainable, frozen, batch, key):
        return scored(join(trainable, frozen), batch, key)
    jaxpr = jax.make_jaxpr(forward)(trainable, frozen, batch, key).jaxpr
    free = len(jax.tree.leaves(trainable))
    counter = _Count()
    flops, _ = counter.of(jaxpr, [i < free for i in range(len(jaxpr.invars))])
    return flops, counter.unknown

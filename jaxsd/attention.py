# SPDX-License-Identifier: Apache-2.0
"""Who may listen to whom, and the engines that compute it: one function, three ways.

A column attends to the earlier columns of its own segment, within a window if there is one. The
mask is derived from positions and segments, never built by callers. `causal_attention` runs a
packed batch on every device's own rows, heads and columns; which engine multiplies is chosen from
the platform of those devices and said once. Streaming has `attend` and `visible` alone.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxsd.sharding import Place, anywhere
from jaxsd.types import Where

log = logging.getLogger('jaxsd')

ENGINES = ('auto', 'xla', 'splash', 'cudnn')
LANES = 128         # columns of the smallest block of the splash kernels


def visible(query: Where, key: Where, window_columns: int | None):
    """bool [B, Tq, Tk]: same segment, not later, and fewer than `window_columns` columns back."""
    back = query.position[:, :, None] - key.position[:, None, :]
    same = (query.segment[:, :, None] == key.segment[:, None, :]) & (key.segment[:, None, :] > 0)
    mask = same & (back >= 0)
    return mask if window_columns is None else mask & (back < window_columns)


def attend(q_BTNH, k_BCGH, v_BCGH, mask_BTC):
    """Softmax attention with grouped keys and float32 softmax; scale 1 / sqrt(H)."""
    B, T, N, H = q_BTNH.shape
    G = k_BCGH.shape[2]
    q = q_BTNH.reshape(B, T, G, N // G, H)
    s = jnp.einsum('BTGNH,BCGH->BGNTC', q, k_BCGH, preferred_element_type=jnp.float32)
    # A finite fill: a row that sees nothing (padding) must give finite numbers and gradients.
    s = jnp.where(mask_BTC[:, None, None], s / math.sqrt(H), -1e30)
    p = jax.nn.softmax(s, axis=-1).astype(v_BCGH.dtype)
    return jnp.einsum('BGNTC,BCGH->BTGNH', p, v_BCGH).reshape(B, T, N, H)


def causal_attention(q_BTNH, k_BTGH, v_BTGH, where: Where, *, window_columns: int | None,
                     block_columns: int, engine: str = 'auto', place: Place = anywhere):
    """Attention of packed columns to earlier columns of their segment, [B, T, N, H].

    engine: see `choose`; padding may hold any finite number. block_columns: queries per block of
    the engine 'xla', which is recomputed in the backward pass, so that no [T, T] array outlives it.
    """
    B, T, N, H = q_BTNH.shape
    if engine == 'auto' and place.mesh is None:     # kernels must be told how arrays are split
        engine = 'xla'
    else:
        engine, why = choose(engine, place.platform, columns=T, ways=place.ways('column'),
                             head_dim=H, dtype=q_BTNH.dtype)
        _say(engine, why)
    fn = functools.partial(dict(xla=xla, splash=splash, cudnn=cudnn)[engine],
                           window_columns=window_columns, block_columns=block_columns)
    return spread(fn, q_BTNH, k_BTGH, v_BTGH, where, window_columns, place)


def spread(fn: Callable, q_BTNH, k_BTGH, v_BTGH, where: Where, window_columns: int | None,
           place: Place):
    """An engine on every device's own rows, heads and columns.

    Where devices hold pieces of the columns, each asks with its own. With a window it hears the
    columns before them that the window reaches, from the devices that hold these; without, it
    hears all.
    """
    T, N = q_BTNH.shape[1:3]
    ways, groups = place.ways('column'), k_BTGH.shape[2]
    if T % ways:
        raise ValueError(f'{T} columns do not divide over {ways} devices; change columns or '
                         'mesh.context')
    reach = None if window_columns is None else min(
        T - T // ways, -(-(window_columns - 1) // LANES) * LANES)

    def piece(q, k, v, position, segment):
        query, heard, at = Where(position, segment), (k, v, position, segment), Part(0, 0, 1)
        if ways > 1 and reach is None:
            heard = (place.whole(x, 1, 'column') for x in heard)
            at = Part(0, place.nth('column'), ways)
        elif ways > 1:
            heard = (place.before(x, 1, 'column', reach) for x in heard)
            at = Part(reach, 0, 1)
        k, v, *key = heard
        if k.shape[2] * N != q.shape[2] * groups:       # all groups are here, few of the heads
            own = place.nth('heads') * q.shape[2] + jnp.arange(q.shape[2])
            group = own // (N // groups) - place.nth('kv_heads') * k.shape[2]
            k, v = k[:, :, group], v[:, :, group]
        return fn(q, k, v, query, Where(*key), at)
    columns = ('batch', 'column')
    return place.apart(piece, (q_BTNH, *columns, 'heads', 'head_dim'),
                       (k_BTGH, *columns, 'kv_heads', 'head_dim'),
                       (v_BTGH, *columns, 'kv_heads', 'head_dim'),
                       (where.position, *columns), (where.segment, *columns),
                       out=(*columns, 'heads', 'head_dim'))


class Part(NamedTuple):
    """Which of the keys' columns are those of the queries: from column `first` on, of the `nth` of
    `ways` equal pieces, a number that is not known while compiling if there are several."""

    first: int
    nth: int | jax.Array
    ways: int


# Which engine.

def choose(wanted: str, platform: str, *, columns: int, ways: int, head_dim: int, dtype
           ) -> tuple[str, str]:
    """(engine, why): the engine that `backbone.attention` asks for on devices of `platform`, which
    hold the columns in `ways` pieces.

    'auto' takes the kernels of the platform, Pallas splash attention on TPU and cuDNN's flash
    attention on GPU, where they can do what is asked, and 'xla' elsewhere. An engine asked for by
    name that cannot is a ValueError that says why.
    """
    shape = dict(columns=columns // ways, ways=ways, head_dim=head_dim, dtype=dtype)
    if wanted != 'auto':
        if why := _cannot(wanted, platform, **shape):
            raise ValueError(f'backbone.attention is {wanted!r}, but {why}; the devices are '
                             f"{platform}, for which 'auto' finds one that can")
        return wanted, 'as backbone.attention asks'
    best = dict(tpu='splash', gpu='cudnn').get(platform, 'xla')
    if why := _cannot(best, platform, **shape):
        return 'xla', f'the devices are {platform}, but not by {best}: {why}'
    return best, f'the devices are {platform}'


def _cannot(engine: str, platform: str, *, columns: int, ways: int, head_dim: int, dtype) -> str:
    """Why `engine` cannot do it, or ''."""
    several = f'{columns} columns on each of {ways} devices are no multiple of'
    if engine == 'splash':
        if platform != 'tpu':
            return 'that runs on TPU'
        if head_dim % 64:
            return f'a head of {head_dim} is no multiple of 64'
        if ways > 1 and columns % LANES:
            return f'{several} {LANES}'
    if engine == 'cudnn':
        if platform != 'gpu':
            return 'that runs on GPU'
        if jnp.dtype(dtype).name not in ('bfloat16', 'float16'):
            return f'{jnp.dtype(dtype).name} (frontend.dtype) is not of two bytes'
        if head_dim > 128 or head_dim % 8:
            return f'a head of {head_dim} is above 128 or no multiple of 8'
        if ways > 1 and columns % 2:
            return f'{several} 2'
    return ''


@functools.cache
def _say(engine: str, why: str) -> None:
    log.info('attention by %s: %s', engine, why)


# The engines. Positions inside a segment advance with the column, so a window is a column distance.

def xla(q, k, v, query: Where, key: Where, at: Part, *, window_columns, block_columns):
    """Blocks of queries, each reading only the columns that it can see."""
    B, T, N, H = q.shape
    G, C = k.shape[2], k.shape[1]
    blocks = [(start, min(start + block_columns, T)) for start in range(0, T, block_columns)]
    sees = [(0, C)] * len(blocks)
    if at.ways == 1:
        sees = [(0 if window_columns is None else max(0, at.first + start - window_columns + 1),
                 at.first + stop) for start, stop in blocks]
    # Pieces rather than slices: the gradient of a slice is an array of zeros around it.
    q = jnp.split(jnp.moveaxis(q.reshape(B, T, G, N // G, H), 1, 3),
                  [stop for _, stop in blocks[:-1]], axis=3)
    cuts = sorted({0, C}.union(*sees))
    k, v = (jnp.split(jnp.moveaxis(x, 1, 2), cuts[1:-1], axis=2) for x in (k, v))
    out = []
    for q_BGNTH, (start, stop), (first, last) in zip(q, blocks, sees, strict=True):
        here = slice(cuts.index(first), cuts.index(last))
        out.append(_block(window_columns, q_BGNTH, jnp.concatenate(k[here], axis=2),
                          jnp.concatenate(v[here], axis=2),
                          Where(*(w[:, start:stop] for w in query)),
                          Where(*(w[:, first:last] for w in key))))
    return jnp.moveaxis(jnp.concatenate(out, axis=3), 3, 1).reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(window_columns, q_BGNTH, k_BGCH, v_BGCH, query: Where, key: Where):
    """`attend` of a block, heads before columns. Its weights are made anew in the backward pass,
    from their maximum and their sum (arXiv 2307.08691 §3.1)."""
    return _block_forward(window_columns, q_BGNTH, k_BGCH, v_BGCH, query, key)[0]


def _block_forward(window_columns, q_BGNTH, k_BGCH, v_BGCH, query, key):
    s = jnp.einsum('BGNTH,BGCH->BGNTC', q_BGNTH, k_BGCH, preferred_element_type=jnp.float32)
    mask = visible(query, key, window_columns)[:, None, None]
    s = jnp.where(mask, s / math.sqrt(q_BGNTH.shape[-1]), -1e30)    # finite, as in `attend`
    most = jnp.max(s, axis=-1, keepdims=True)
    p = jnp.exp(s - most)
    total = jnp.sum(p, axis=-1, keepdims=True)
    o = jnp.einsum('BGNTC,BGCH->BGNTH', p.astype(v_BGCH.dtype), v_BGCH,
                   preferred_element_type=jnp.float32)
    o, most, total = (checkpoint_name(x, 'product')
                      for x in ((o / total).astype(v_BGCH.dtype), most, total))
    return o, (q_BGNTH, k_BGCH, v_BGCH, query, key, o, most, total)


def _block_backward(window_columns, kept, g):
    q, k, v, query, key, o, most, total = kept
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    g = g / total
    own = jnp.sum(g * o, axis=-1)
    g = g.astype(v.dtype)
    # Keys before queries, as two of the four products need them.
    mask = jnp.swapaxes(visible(query, key, window_columns), 1, 2)[:, None, None]
    s = product('BGCH,BGNTH->BGNCT', k, q) / math.sqrt(q.shape[-1])
    p = jnp.exp(jnp.where(mask, s, -1e30) - jnp.moveaxis(most, -1, -2))
    dv = product('BGNCT,BGNTH->BGCH', p.astype(v.dtype), g)
    ds = p * (product('BGCH,BGNTH->BGNCT', v, g) - own[..., None, :])
    ds = (jnp.where(mask, ds, 0.0) / math.sqrt(q.shape[-1])).astype(q.dtype)
    return (product('BGNCT,BGCH->BGNTH', ds, k).astype(q.dtype),
            product('BGNCT,BGNTH->BGCH', ds, q).astype(k.dtype), dv.astype(v.dtype), None, None)


_block.defvjp(_block_forward, _block_backward)


def _padded(multiple: int, *arrays):
    """The arrays with zeros behind their columns (axis 1), up to a `multiple` of them."""
    return [jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))
            for x in arrays]


def splash(q, k, v, query: Where, key: Where, at: Part, *, window_columns, block_columns,
           interpret: bool = False):
    """Pallas splash attention, jax.experimental.pallas.ops.tpu: blocks that nobody sees are
    skipped, none of their scores is ever stored. Columns of no segment see one another."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    del block_columns
    T, N, H = q.shape[1:]
    q, k, v, own, every = _padded(LANES, q * H ** -0.5, k, v, query.segment, key.segment)
    shape = (at.ways * q.shape[1], k.shape[1])
    mask = (masks.CausalMask(shape, at.first) if window_columns is None else
            masks.LocalMask(shape, (window_columns - 1, 0), at.first))
    size = math.gcd(512, q.shape[1], k.shape[1])
    sizes = {f'block_{x}': size for x in ('q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv',
                                          'kv_dkv_compute', 'q_dq', 'kv_dq')}
    with jax.ensure_compile_time_eval():
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * N), block_sizes=kernels.BlockSizes(**sizes),
            head_shards=1, q_seq_shards=at.ways, interpret=interpret,
            residual_checkpoint_name='product')
    if at.ways > 1:     # which blocks to skip, of the queries that are here

        def here(info):
            def of_piece(x, axis):
                size = x.shape[axis] // at.ways
                return jax.lax.dynamic_slice_in_dim(x, at.nth * size, size, axis)
            axes = dict(data_next=1, mask_next=1, block_mask=1, q_sequence=0)
            return info._replace(**{name: of_piece(getattr(info, name), axis)
                                    for name, axis in axes.items()
                                    if getattr(info, name) is not None})
        kernel = kernels.SplashAttentionKernel(
            *map(here, (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)),
            **kernel.kwargs)

    def row(q, k, v, own, every):
        return kernel(q, k, v, segment_ids=kernels.SegmentIds(own, every))
    o = jax.vmap(row)(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), own, every)
    return jnp.swapaxes(o, 1, 2)[:, :T].astype(v.dtype)


def cudnn(q, k, v, query: Where, key: Where, at: Part, *, window_columns, block_columns,
          implementation: str = 'cudnn'):
    """cuDNN's flash attention through jax.nn. Later columns are skipped where query n is key n;
    segments are a mask of a bit for each pair of columns. Columns of no segment see one another."""
    del block_columns
    T, whole = q.shape[1], at.ways == 1 and at.first == 0
    q, k, v, own, every = _padded(2, q, k, v, query.segment, key.segment)
    mask = own[:, :, None] == every[:, None, :]
    if not whole:
        back = query.position[:, :, None] - key.position[:, None, :]
        mask &= back >= 0
        if window_columns is not None:
            mask &= back < window_columns
    window = None if window_columns is None or not whole else (window_columns - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], is_causal=whole,
                                        local_window_size=window,
                                        implementation=implementation)[:, :T]

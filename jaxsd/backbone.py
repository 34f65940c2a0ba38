# SPDX-License-Identifier: Apache-2.0
"""What thinks: one pre-norm decoder whose options make it Llama, Mistral, Mixtral, Qwen or
Helium.

Layers are stacked on a leading axis and scanned. The same code runs a packed training batch and a
streaming step: without a cache a column attends to the earlier columns of its segment, with one it
attends to the ring of cached columns.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsd import nn
from jaxsd.attention import ENGINES, attend, causal_attention, visible
from jaxsd.sharding import Place, anywhere
from jaxsd.types import Sizes, Where, check, positive


class Block(nnx.Module):
    """One pre-norm layer: attention, then a gated feed-forward or one of several experts'."""

    def __init__(self, *, rngs, width, heads, kv_heads, head_dim, mlp, norm_eps, norm_gain,
                 qkv_bias, qk_norm, experts, experts_per_column):
        D, N, G, H = width, heads, kv_heads, head_dim
        self.norm_attention = nn.Norm(D, eps=norm_eps, gain=norm_gain)
        self.q = nn.Dense((D,), (N, H), ('embed', 'heads', 'head_dim'), rngs=rngs, bias=qkv_bias)
        self.k = nn.Dense((D,), (G, H), ('embed', 'kv_heads', 'head_dim'), rngs=rngs, bias=qkv_bias)
        self.v = nn.Dense((D,), (G, H), ('embed', 'kv_heads', 'head_dim'), rngs=rngs, bias=qkv_bias)
        self.out = nn.Dense((N, H), (D,), ('heads', 'head_dim', 'embed'), rngs=rngs)
        if qk_norm == 'head':
            self.norm_q = nn.Norm(H, eps=norm_eps, gain=norm_gain)
            self.norm_k = nn.Norm(H, eps=norm_eps, gain=norm_gain)
        self.norm_mlp = nn.Norm(D, eps=norm_eps, gain=norm_gain)
        if experts:
            self.experts = nn.Experts(D, mlp, rngs=rngs, experts=experts,
                                      chosen=experts_per_column)
        else:
            self.gate_up = nn.Dense((D,), (2, mlp), ('embed', 'stream', 'mlp'), rngs=rngs)
            self.down = nn.Dense((mlp,), (D,), ('mlp', 'embed'), rngs=rngs)

    def feed_forward(self, x_BTD, where: Where, place: Place):
        """Its output, and how columns spread over experts, [2, E], if there are any."""
        if hasattr(self, 'experts'):
            return self.experts.loaded(x_BTD, where.segment > 0, place)
        return nn.gated(x_BTD, self.gate_up, self.down), None


class Decoder(nnx.Module):
    """x_BTD -> h_BTD through `layers` causal layers and a final norm.

    window_columns: a column sees itself and the `window_columns - 1` before it; None sees all.
    rope_scaling: slows rotary positions, see `nn.frequencies`. qk_norm: 'head' normalizes every
    query and key over its head before they are turned, 'none' does not. experts: feed-forwards per
    layer, of which each column uses `experts_per_column`; 0 is one that all use, without a router.
    remat: 'full' recomputes each layer in the backward pass, 'dots' keeps matrix products and what
    comes of attention, 'none' keeps everything. attention: the engine, see `attention.choose`.
    block_columns: queries per block of the engine 'xla'.
    """

    def __init__(self, sizes: Sizes, *, rngs, width: int, layers: int, heads: int, kv_heads: int,
                 head_dim: int, mlp: int, theta: float, pairs: str = 'half',
                 window_columns: int | None = None, norm_eps: float = 1e-5,
                 norm_gain: str = 'late', qkv_bias: bool = False, qk_norm: str = 'none',
                 rope_scaling: str | dict = 'none', experts: int = 0, experts_per_column: int = 0,
                 remat: str = 'full', attention: str = 'auto', block_columns: int = 512):
        positive('backbone', width=width, layers=layers, heads=heads, kv_heads=kv_heads,
                 head_dim=head_dim, mlp=mlp, block_columns=block_columns,
                 window_columns=1 if window_columns is None else window_columns)
        if head_dim % 2 or theta <= 0:
            raise ValueError(f'backbone: rotary positions need an even head_dim and a theta above '
                             f'0, got {head_dim} and {theta}')
        if pairs not in ('half', 'interleaved'):
            raise ValueError(f"backbone.pairs is 'half' or 'interleaved', got {pairs!r}")
        if width != sizes.width:
            raise ValueError(f'backbone.width {width} and the model width {sizes.width} must agree')
        if heads % kv_heads:
            raise ValueError(f'backbone.kv_heads {kv_heads} must divide backbone.heads {heads}')
        if qk_norm not in ('none', 'head'):
            raise ValueError(f"backbone.qk_norm is 'none' or 'head', got {qk_norm!r}")
        if (experts or experts_per_column) and not 1 <= experts_per_column <= experts:
            raise ValueError(f'backbone.experts_per_column {experts_per_column} must lie between 1 '
                             f'and backbone.experts {experts}')
        nn.frequencies(head_dim // 2, theta, rope_scaling)      # raises for what it does not know
        if attention not in ENGINES:
            raise ValueError(f'backbone.attention is one of {", ".join(ENGINES)}, got '
                             f'{attention!r}')
        if remat not in ('full', 'dots', 'none'):
            raise ValueError(f"backbone.remat is 'full', 'dots' or 'none', got {remat!r}")
        self.blocks = nn.stack(
            functools.partial(Block, width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                              mlp=mlp, norm_eps=norm_eps, norm_gain=norm_gain, qkv_bias=qkv_bias,
                              qk_norm=qk_norm, experts=experts,
                              experts_per_column=experts_per_column),
            layers, rngs=rngs)
        self.norm = nn.Norm(width, eps=norm_eps, gain=norm_gain)
        self.layers, self.kv_heads, self.head_dim, self.width = layers, kv_heads, head_dim, width
        self.heads, self.mlp, self.experts = heads, mlp, experts
        self.theta, self.pairs, self.window_columns = theta, pairs, window_columns
        self.rope_scaling = (rope_scaling if isinstance(rope_scaling, str)
                             else tuple(sorted(rope_scaling.items())))
        self.remat, self.attention, self.block_columns = remat, attention, block_columns

    def _layer(self, block: Block, x_BTD, where: Where, cache, place: Place):
        y = block.norm_attention(x_BTD)
        turn = functools.partial(nn.rotate, position_BT=where.position, theta=self.theta,
                                 pairs=self.pairs, scaling=self.rope_scaling)
        q, k, v = block.q(y), block.k(y), block.v(y)
        if hasattr(block, 'norm_q'):
            q, k = block.norm_q(q), block.norm_k(k)
        q, k = turn(q), turn(k)
        if cache is None:
            o = causal_attention(q, k, v, where, window_columns=self.window_columns,
                                 block_columns=self.block_columns, engine=self.attention,
                                 place=place)
        else:
            k_LBCGH, v_LBCGH, n, at, mask_BTC = cache
            k = k_LBCGH.at[n, *at].set(k.astype(k_LBCGH.dtype), mode='drop')
            v = v_LBCGH.at[n, *at].set(v.astype(v_LBCGH.dtype), mode='drop')
            o = attend(q, k[n].astype(q.dtype), v[n].astype(q.dtype), mask_BTC)
        x_BTD = place(x_BTD + block.out(o), 'batch', 'column', 'width')
        y, load_2E = block.feed_forward(block.norm_mlp(x_BTD), where, place)
        return place(x_BTD + y, 'batch', 'column', 'width'), (k, v), load_2E

    def __call__(self, x_BTD, where: Where, cache=None, place: Place = anywhere):
        """h_BTD, and beside it the new cache of a stream, which takes T columns at a time.

        Of a packed batch, instead, terms {name: (sum, weight)} that came up on the way: 'balance'
        of experts over the columns of all segments, see `nn.balance`.
        """
        check(x_BTD, 'BTD', D=self.width)
        if cache is None:
            def step(x, block):
                x, _, load_2E = self._layer(block, x, where, None, place)
                return x, load_2E
            if self.remat != 'none':
                policy = nn.products_saveable if self.remat == 'dots' else None
                step = jax.checkpoint(step, prevent_cse=False, policy=policy)
            x_BTD, load_L2E = jax.lax.scan(step, x_BTD, self.blocks,
                                    unroll=nn.unroll(self.layers, place))
            if not self.experts:
                return self.norm(x_BTD), {}
            columns = jnp.sum(where.segment > 0).astype(jnp.float32)
            spread = nn.balance(jnp.sum(load_L2E, 0), self.layers * columns)
            return self.norm(x_BTD), {'balance': (spread * columns, columns)}
        T, C = x_BTD.shape[1], cache['position'].shape[1]
        # One count for all sequences, whose padding is written, too, or one for each, which then
        # come and go on their own: padding (segment 0) takes no place.
        if not cache['written'].ndim:
            slots, grown = (cache['written'] + jnp.arange(T)) % C, T
        else:
            new = where.segment > 0
            slots = (cache['written'][:, None] + jnp.cumsum(new, axis=1) - 1) % C
            slots, grown = jnp.where(new, slots, C), jnp.sum(new, axis=1)   # C: dropped
        at = (jnp.arange(x_BTD.shape[0])[:, None], jnp.atleast_2d(slots))
        keys = Where(cache['position'].at[at].set(where.position, mode='drop'),
                     cache['segment'].at[at].set(where.segment, mode='drop'))
        mask = visible(where, keys, self.window_columns)

        def step(carry, layer):     # the cache is carried, so that a layer writes its columns alone
            (x, k, v), (block, n) = carry, layer
            x, kv, _ = self._layer(block, x, where, (k, v, n, at, mask), place)
            return (x, *kv), None
        (x_BTD, k, v), _ = nn.each_layer(step, (x_BTD, cache['k'], cache['v']), self.blocks,
                                         np.arange(self.layers))
        cache = dict(k=k, v=v, position=keys.position, segment=keys.segment,
                     written=cache['written'] + grown)
        return self.norm(x_BTD), cache

    def empty_cache(self, rows: int, columns: int, dtype) -> dict:
        """A ring of `columns` for `rows` sequences. With a window, `window_columns - 1` plus the
        columns of the longest call suffice for dialogues without end."""
        kv = (self.layers, rows, columns, self.kv_heads, self.head_dim)
        return dict(k=jnp.zeros(kv, dtype), v=jnp.zeros(kv, dtype),
                    position=jnp.zeros((rows, columns), jnp.int32),
                    segment=jnp.zeros((rows, columns), jnp.int32), written=jnp.int32(0))


decoder = Decoder

# SPDX-License-Identifier: Apache-2.0
"""What thinks: one pre-norm decoder whose options make it Llama, Mistral, Qwen2 or Helium.

Layers are stacked on a leading axis and scanned. The same code runs a packed training batch and a
streaming step: without a cache a column attends to the earlier columns of its segment, with one it
attends to the ring of cached columns.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsd import nn
from jaxsd.sharding import Place, anywhere
from jaxsd.types import Sizes, Where, check, positive


class Block(nnx.Module):
    """One pre-norm layer: attention, then a gated feed-forward."""

    def __init__(self, *, rngs, width, heads, kv_heads, head_dim, mlp, norm_eps, norm_gain,
                 qkv_bias):
        D, N, G, H = width, heads, kv_heads, head_dim
        self.norm_attention = nn.Norm(D, eps=norm_eps, gain=norm_gain)
        self.q = nn.Dense((D,), (N, H), ('embed', 'heads', 'head_dim'), rngs=rngs, bias=qkv_bias)
        self.k = nn.Dense((D,), (G, H), ('embed', 'kv_heads', 'head_dim'), rngs=rngs, bias=qkv_bias)
        self.v = nn.Dense((D,), (G, H), ('embed', 'kv_heads', 'head_dim'), rngs=rngs, bias=qkv_bias)
        self.out = nn.Dense((N, H), (D,), ('heads', 'head_dim', 'embed'), rngs=rngs)
        self.norm_mlp = nn.Norm(D, eps=norm_eps, gain=norm_gain)
        self.gate_up = nn.Dense((D,), (2, mlp), ('embed', 'stream', 'mlp'), rngs=rngs)
        self.down = nn.Dense((mlp,), (D,), ('mlp', 'embed'), rngs=rngs)


class Decoder(nnx.Module):
    """x_BTD -> h_BTD through `layers` causal layers and a final norm.

    window_columns: a column sees itself and the `window_columns - 1` before it; None sees all.
    remat: 'full' recomputes each layer in the backward pass, 'dots' keeps matrix products,
    'none' keeps everything. block_columns: queries per attention block.
    """

    def __init__(self, sizes: Sizes, *, rngs, width: int, layers: int, heads: int, kv_heads: int,
                 head_dim: int, mlp: int, theta: float, pairs: str = 'half',
                 window_columns: int | None = None, norm_eps: float = 1e-5,
                 norm_gain: str = 'late', qkv_bias: bool = False, remat: str = 'full',
                 block_columns: int = 512):
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
        if remat not in ('full', 'dots', 'none'):
            raise ValueError(f"backbone.remat is 'full', 'dots' or 'none', got {remat!r}")
        self.blocks = nn.stack(
            functools.partial(Block, width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                              mlp=mlp, norm_eps=norm_eps, norm_gain=norm_gain, qkv_bias=qkv_bias),
            layers, rngs=rngs)
        self.norm = nn.Norm(width, eps=norm_eps, gain=norm_gain)
        self.layers, self.kv_heads, self.head_dim, self.width = layers, kv_heads, head_dim, width
        self.heads, self.mlp = heads, mlp
        self.theta, self.pairs, self.window_columns = theta, pairs, window_columns
        self.remat, self.block_columns = remat, block_columns

    def _layer(self, block: Block, x_BTD, where: Where, cache, place: Place):
        y = block.norm_attention(x_BTD)
        turn = functools.partial(nn.rotate, position_BT=where.position, theta=self.theta,
                                 pairs=self.pairs)
        q, k, v = turn(block.q(y)), turn(block.k(y)), block.v(y)
        if cache is None:
            o = nn.causal_attention(q, k, v, where, window_columns=self.window_columns,
                                    block_columns=self.block_columns)
        else:
            k_BCGH, v_BCGH, slots, mask_BTC = cache
            k = k_BCGH.at[:, slots].set(k.astype(k_BCGH.dtype))
            v = v_BCGH.at[:, slots].set(v.astype(v_BCGH.dtype))
            o = nn.attend(q, k.astype(q.dtype), v.astype(q.dtype), mask_BTC)
        x_BTD = place(x_BTD + block.out(o), 'batch', 'column', 'width')
        x_BTD = x_BTD + nn.gated(block.norm_mlp(x_BTD), block.gate_up, block.down)
        return place(x_BTD, 'batch', 'column', 'width'), (k, v)

    def __call__(self, x_BTD, where: Where, cache=None, place: Place = anywhere):
        """h_BTD and the new cache (None without one). Streaming takes T columns at a time."""
        check(x_BTD, 'BTD', D=self.width)
        if cache is None:
            def step(x, block):
                return self._layer(block, x, where, None, place)[0], None
            if self.remat != 'none':
                policy = (jax.checkpoint_policies.dots_with_no_batch_dims_saveable
                          if self.remat == 'dots' else None)
                step = jax.checkpoint(step, prevent_cse=False, policy=policy)
            x_BTD, _ = jax.lax.scan(step, x_BTD, self.blocks, unroll=nn.unroll(self.layers))
            return self.norm(x_BTD), None
        T = x_BTD.shape[1]
        C = cache['position'].shape[1]
        slots = (cache['written'] + jnp.arange(T)) % C
        keys = Where(cache['position'].at[:, slots].set(where.position),
                     cache['segment'].at[:, slots].set(where.segment))
        mask = nn.visible(where, keys, self.window_columns)

        def step(x, layer):
            block, k, v = layer
            return self._layer(block, x, where, (k, v, slots, mask), place)
        x_BTD, (k, v) = jax.lax.scan(step, x_BTD, (self.blocks, cache['k'], cache['v']))
        cache = dict(k=k, v=v, position=keys.position, segment=keys.segment,
                     written=cache['written'] + T)
        return self.norm(x_BTD), cache

    def empty_cache(self, rows: int, columns: int, dtype) -> dict:
        """A ring of `columns` for `rows` sequences. With a window, `window_columns - 1` plus the
        columns of the longest call suffice for dialogues without end."""
        kv = (self.layers, rows, columns, self.kv_heads, self.head_dim)
        return dict(k=jnp.zeros(kv, dtype), v=jnp.zeros(kv, dtype),
                    position=jnp.zeros((rows, columns), jnp.int32),
                    segment=jnp.zeros((rows, columns), jnp.int32), written=jnp.int32(0))


decoder = Decoder

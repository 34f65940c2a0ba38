# SPDX-License-Identifier: Apache-2.0
"""A small transformer for a short axis: the cells of a column, or the columns of a sound.

Pre-norm layers with gated feed-forwards, over whatever a mask lets see each other. Heads use it to
speak the cells of a column, frontends to read them, encoders to listen.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsd import nn
from jaxsd.types import positive


class _Layer(nnx.Module):
    def __init__(self, *, rngs, width, heads, mlp):
        D, N, H = width, heads, width // heads
        self.norm_attention = nn.Norm(D, eps=1e-5)
        self.qkv = nn.Dense((D,), (3, N, H), ('embed', 'stream', 'heads', 'head_dim'), rngs=rngs)
        self.out = nn.Dense((N, H), (D,), ('heads', 'head_dim', 'embed'), rngs=rngs)
        self.norm_mlp = nn.Norm(D, eps=1e-5)
        self.gate_up = nn.Dense((D,), (2, mlp), ('embed', 'stream', 'mlp'), rngs=rngs)
        self.down = nn.Dense((mlp,), (D,), ('mlp', 'embed'), rngs=rngs)


class Within(nnx.Module):
    """x [..., P, D] -> [..., P, D]: `layers` layers and a final norm.

    mask: bool [..., P, P], which cell (before last axis) sees which. position: [..., P], where
    given, turns queries and keys (rotary), so that cells know how far apart they stand.
    """

    def __init__(self, *, rngs, width: int, layers: int, heads: int, mlp: int):
        positive('within', width=width, layers=layers, heads=heads, mlp=mlp)
        if width % heads or width // heads % 2:
            raise ValueError(f'heads {heads} must divide width {width} into even parts')
        self.blocks = nn.stack(
            lambda *, rngs: _Layer(rngs=rngs, width=width, heads=heads, mlp=mlp), layers, rngs=rngs)
        self.norm = nn.Norm(width, eps=1e-5)
        self.layers, self.width, self.heads = layers, width, heads

    def _qkv(self, block, x, position):
        qkv = block.qkv(block.norm_attention(x))
        q, k, v = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        if position is None:
            return q, k, v
        return (*(nn.rotate(z, position, theta=10_000.0, pairs='half') for z in (q, k)), v)

    def _mix(self, block, x, q, k, v, mask):
        s = jnp.einsum('...PNH,...QNH->...NPQ', q, k, preferred_element_type=jnp.float32)
        s = jnp.where(mask[..., None, :, :], s / jnp.sqrt(jnp.float32(q.shape[-1])), -1e30)
        o = jnp.einsum('...NPQ,...QNH->...PNH', jax.nn.softmax(s, -1).astype(v.dtype), v)
        x = x + block.out(o)
        return x + nn.gated(block.norm_mlp(x), block.gate_up, block.down)

    def __call__(self, x, mask, position=None):
        def layer(x, part):
            block, = part
            return self._mix(block, x, *self._qkv(block, x, position), mask), None
        x, _ = nn.each_layer(layer, x, self.blocks, unroll=True)    # few and small
        return self.norm(x)

    def empty(self, rows: int, cells: int, dtype):
        """The keys and values of `cells` cells that `step` will fill."""
        shape = (self.layers, rows, cells, self.heads, self.width // self.heads)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    def step(self, x_BD, p: int, cache):
        """Cell `p` after cells 0 .. p - 1: ([B, D], the cache with it)."""
        seen = jnp.arange(cache[0].shape[2])[None, :] <= p

        def layer(x, kv):
            block, keys, values = kv
            q, k, v = self._qkv(block, x, None)
            keys, values = keys.at[:, p].set(k[:, 0]), values.at[:, p].set(v[:, 0])
            return self._mix(block, x, q, keys, values, seen), (keys, values)
        x, cache = nn.each_layer(layer, x_BD[:, None], self.blocks, *cache)
        return self.norm(x)[:, 0], cache

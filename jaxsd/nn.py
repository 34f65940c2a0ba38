# SPDX-License-Identifier: Apache-2.0
"""The pieces every model is made of: dense layers, norms, rotary positions, attention, losses.

Modules follow the small subset of NNX that plain JAX understands: `__init__` makes parameters that
carry their axis names, `__call__` is pure, stacks are made by `jax.vmap` and run by `jax.lax.scan`.
Weights are float32 masters, cast to the dtype of the activation where they are used.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsd.types import Where


def truncated(key, shape, fan_in: int, std: float = 1.0):
    """Truncated normal, cut at three deviations, of deviation std / sqrt(fan_in), float32.

    The initialization of moshi (models/lm.py init_layer) and, near enough, of everyone else.
    """
    return jax.random.truncated_normal(key, -3.0, 3.0, shape) * (std / math.sqrt(fan_in))


class Dense(nnx.Module):
    """A linear map from the trailing `n_in` axes of its input to named output axes.

    kernel: [*inputs, *outputs]. `lora_a` [*inputs, R] and `lora_b` [R, *outputs], where present,
    are a second term `scale * (x a) b`, folded into the kernel on export (arXiv 2106.09685).
    """

    def __init__(self, inputs: tuple[int, ...], outputs: tuple[int, ...], axes: tuple[str, ...], *,
                 rngs, bias: bool = False):
        fan_in = math.prod(inputs)
        self.kernel = nnx.Param(truncated(rngs.params(), inputs + outputs, fan_in), axes=axes)
        self.n_in = len(inputs)
        self.lora_scale = 0.0
        if bias:
            self.bias = nnx.Param(jnp.zeros(outputs), axes=axes[len(inputs):])

    def __call__(self, x):
        y = jnp.tensordot(x, self.kernel[...].astype(x.dtype), self.n_in)
        if self.lora_scale:
            low = jnp.tensordot(x, self.lora_a[...].astype(x.dtype), self.n_in)
            y = y + self.lora_scale * jnp.tensordot(low, self.lora_b[...].astype(x.dtype), 1)
        return y + self.bias[...].astype(x.dtype) if hasattr(self, 'bias') else y


def add_lora(model, rank: int, scale: float, *, rngs) -> None:
    """Gives every Dense of `model` a low-rank second term: A uniform, B zero, times `scale`.

    Follows moshi-finetune: every linear, factor `scale` applied directly, not alpha / rank.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Dense):
            shape, names = module.kernel.shape, module.kernel.get_metadata()['axes']
            lead = shape[:len(shape) - len(names)]      # the layer axis of a stack
            inputs = shape[len(lead):len(lead) + module.n_in]
            outputs = shape[len(lead) + module.n_in:]
            bound = 1.0 / math.sqrt(math.prod(inputs))
            module.lora_a = nnx.Param(
                jax.random.uniform(rngs.params(), (*lead, *inputs, rank), minval=-bound,
                                   maxval=bound), axes=(*names[:module.n_in], 'rank'))
            module.lora_b = nnx.Param(jnp.zeros((*lead, rank, *outputs)),
                                      axes=('rank', *names[module.n_in:]))
            module.lora_scale = scale


class Norm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32.

    gain='late': cast back to the input's dtype, then scale (Hugging Face Llama).
    gain='early': scale in float32, then cast back (kyutai, `rms_norm_f32`).
    """

    def __init__(self, width: int, *, eps: float, gain: str = 'late'):
        if gain not in ('late', 'early'):
            raise ValueError(f"norm gain is 'late' or 'early', got {gain!r}")
        self.weight = nnx.Param(jnp.ones(width), axes=('width',))
        self.eps, self.gain = eps, gain

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        if self.gain == 'early':
            return (x32 * self.weight[...]).astype(x.dtype)
        return x32.astype(x.dtype) * self.weight[...].astype(x.dtype)


def rotate(x_BTNH, position_BT, *, theta: float, pairs: str):
    """Rotary positions. pairs='half': (i, i + H/2), as Hugging Face; 'interleaved': (2i, 2i + 1).

    Angles are float32. The half layout multiplies in the activation's dtype and the interleaved one
    in float32, as the peers do (peer code: transformers modeling_llama, moshi modules/rope.py).
    """
    half = x_BTNH.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_BT[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if pairs == 'half':
        cos, sin = cos.astype(x_BTNH.dtype), sin.astype(x_BTNH.dtype)
        a, b = x_BTNH[..., :half], x_BTNH[..., half:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    if pairs != 'interleaved':
        raise ValueError(f"rotary pairs are 'half' or 'interleaved', got {pairs!r}")
    x = x_BTNH.astype(jnp.float32).reshape(*x_BTNH.shape[:-1], half, 2)
    a, b = x[..., 0], x[..., 1]
    x = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return x.reshape(x_BTNH.shape).astype(x_BTNH.dtype)


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
                     block_columns: int):
    """Attention of packed columns to earlier columns of their segment.

    Queries go by blocks that are recomputed in the backward pass, and each block reads only the
    columns that it can see, so no [T, T] array outlives its block.
    """
    T = q_BTNH.shape[1]
    out = []
    for start in range(0, T, block_columns):
        stop = min(start + block_columns, T)
        # Positions inside a segment advance with the column, so a window is a column distance.
        first = 0 if window_columns is None else max(0, start - window_columns + 1)

        @jax.checkpoint
        def block(q, k, v, wq, wk):
            return attend(q, k, v, visible(wq, wk, window_columns))

        part = (slice(None), slice(start, stop)), (slice(None), slice(first, stop))
        out.append(block(q_BTNH[part[0]], k_BTGH[part[1]], v_BTGH[part[1]],
                         Where(*(w[part[0]] for w in where)), Where(*(w[part[1]] for w in where))))
    return jnp.concatenate(out, axis=1)


def gated(x, gate_up: Callable, down: Callable):
    """down(silu(gate(x)) * up(x)), gate and up being the two halves of one map [.., 2, F]."""
    y = gate_up(x)
    return down(jax.nn.silu(y[..., 0, :]) * y[..., 1, :])


def log_prob(logits, target):
    """Float32 log-probability of `target` under `logits` [..., V], and whether it is the argmax."""
    logits = logits.astype(jnp.float32)
    normal = jax.scipy.special.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return own - normal, own >= jnp.max(logits, axis=-1)


def by_columns(fn, chunk_columns: int, *arrays):
    """`fn` over the column axis (1) in chunks, recomputed in the backward pass.

    `arrays` are [B, T, ...]; `fn` returns a tree of [B, c, ...]. Nothing larger than one chunk's
    intermediates (logits, say) is alive at once. T that does not divide gets one ragged last chunk.
    """
    T = arrays[0].shape[1]
    if chunk_columns >= T:
        return fn(*arrays)
    whole = T // chunk_columns * chunk_columns

    def split(x):
        x = x[:, :whole].reshape(x.shape[0], -1, chunk_columns, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    out = jax.lax.map(lambda xs: jax.checkpoint(fn)(*xs), tuple(split(x) for x in arrays))
    out = jax.tree.map(
        lambda y: jnp.moveaxis(y, 0, 1).reshape(y.shape[1], whole, *y.shape[3:]), out)
    if whole == T:
        return out
    rest = jax.checkpoint(fn)(*(x[:, whole:] for x in arrays))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), out, rest)


def stack(make: Callable, layers: int, *, rngs):
    """`layers` modules made by `make(rngs=...)` as one whose arrays lead with a layer axis."""
    keys = jax.random.split(rngs.params(), layers)
    return jax.vmap(lambda key: make(rngs=nnx.Rngs(key)))(keys)


def unroll(layers: int) -> int:
    """How far a scan over layers is unrolled: whole on CPU, where XLA loses half its speed to the
    loop's copies, not at all on accelerators, where it costs compile time."""
    return layers if jax.default_backend() == 'cpu' else 1

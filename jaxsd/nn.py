# SPDX-License-Identifier: Apache-2.0
"""The pieces every model is made of: dense layers, norms, rotary positions, experts, losses.

Modules follow the small subset of NNX that plain JAX understands: `__init__` makes parameters that
carry their axis names, `__call__` is pure, stacks are made by `jax.vmap` and run by `jax.lax.scan`.
Weights are float32 masters, cast to the dtype of the activation where they are used.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.experimental.layout import Format, Layout

from jaxsd.sharding import Place, anywhere


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
        y = product(x, self.kernel[...].astype(x.dtype), self.n_in)
        if self.lora_scale:
            low = product(x, self.lora_a[...].astype(x.dtype), self.n_in)
            y = y + self.lora_scale * product(low, self.lora_b[...].astype(x.dtype), 1)
        return y + self.bias[...].astype(x.dtype) if hasattr(self, 'bias') else y


def product(x, kernel, n_in: int):
    """The trailing `n_in` axes of x times the leading ones of `kernel`."""
    return checkpoint_name(_product(x, kernel, n_in), 'product')


_named_saveable = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names('product'))


def products_saveable(prim, *args, **params):
    """What `jax.checkpoint` keeps of a layer: products of activations and weights, and what came of
    attention. cuDNN's cannot be named, and is known by its primitive."""
    return ('dot_product_attention_fwd' in prim.name) or _named_saveable(prim, *args, **params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, kernel, n_in: int):
    """Its kernel's gradient has x or the gradient transposed, whichever is narrower: on CPU, XLA
    writes that transpose out first. `jax.grad` always has the gradient."""
    return jnp.tensordot(x, kernel, n_in)


def _product_forward(x, kernel, n_in: int):
    kept = (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)
    return _product(x.value, kernel.value, n_in), kept


def _product_backward(n_in: int, kept, g):
    x, kernel = kept
    if isinstance(g, SymbolicZero):
        return None, None
    dx = dkernel = None
    if kernel is not None:
        outputs = tuple(range(n_in, kernel.ndim))
        dx = jnp.tensordot(g, kernel, (tuple(n - kernel.ndim for n in outputs), outputs))
    if x is not None:
        lead = tuple(range(x.ndim - n_in))
        if x.size > g.size:
            swapped = jnp.tensordot(g, x, (lead, lead))
            dkernel = jnp.moveaxis(swapped, range(-n_in, 0), range(n_in))
        else:
            dkernel = jnp.tensordot(x, g, (lead, lead))
    return dx, dkernel


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def as_read(path: str, x, dtype):
    """The parameter `x` of a path in `dtype`, the activations', if it is cast to that at every use.

    For what only reads parameters: half the bytes of each pass, and the same numbers. Tables, norms
    and routers are added, scaled or multiplied in float32, and stay.
    """
    *within, name = path.split('/')
    kernel = name in ('kernel', 'bias', 'lora_a', 'lora_b') or 'experts' in within
    return x.astype(dtype) if kernel and 'router' not in within else x


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


ROPE_SCALINGS = {       # the numbers that each takes
    'linear': ('factor',),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', 'original_columns')}


def frequencies(pairs: int, theta: float, scaling: str | Mapping | tuple = 'none') -> np.ndarray:
    """Radians per column of each rotary pair: float32 theta^(-i / pairs), slowed as `scaling` says.

    scaling, 'none' or a dict (or its items) with a name: 'linear' divides all by `factor` (arXiv
    2306.15595). 'llama3' divides only those whose wavelength exceeds original_columns /
    low_freq_factor, keeps those below original_columns / high_freq_factor, and blends between
    (transformers modeling_rope_utils). Raises ValueError for a name or numbers that are not those.
    """
    frequency = float(theta) ** (-np.arange(pairs) / pairs)
    if scaling == 'none':
        return frequency.astype(np.float32)
    numbers = dict(scaling) if isinstance(scaling, Mapping | tuple) else {'name': scaling}
    name = numbers.pop('name', None)
    if name not in ROPE_SCALINGS:
        raise ValueError(f"rope_scaling is 'none' or has a name of {', '.join(ROPE_SCALINGS)}, "
                         f'got {name!r}')
    wanted = ROPE_SCALINGS[name]
    if set(numbers) != set(wanted) or any(
            isinstance(x, bool) or not isinstance(x, int | float) or not x > 0
            for x in numbers.values()):
        raise ValueError(f"rope_scaling {name!r} takes the positive numbers {', '.join(wanted)}, "
                         f'got {numbers}')
    slow = frequency / numbers['factor']
    if name == 'linear':
        return slow.astype(np.float32)
    low, high = numbers['low_freq_factor'], numbers['high_freq_factor']
    if not low < high:
        raise ValueError(f'rope_scaling: low_freq_factor {low} must be below high_freq_factor '
                         f'{high}')
    turns = numbers['original_columns'] * frequency / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - kept) * slow + kept * frequency).astype(np.float32)


def rotate(x_BTNH, position_BT, *, theta: float, pairs: str, scaling='none'):
    """Rotary positions. pairs='half': (i, i + H/2), as Hugging Face; 'interleaved': (2i, 2i + 1).

    Angles are float32. The half layout multiplies in the activation's dtype and the interleaved one
    in float32, as the peers do (peer code: transformers modeling_llama, moshi modules/rope.py).
    scaling: see `frequencies`.
    """
    half = x_BTNH.shape[-1] // 2
    frequency = frequencies(half, theta, scaling)
    angle = position_BT[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if pairs == 'half':
        cos, sin = cos.astype(x_BTNH.dtype), sin.astype(x_BTNH.dtype)
        a, b = jnp.split(x_BTNH, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    if pairs != 'interleaved':
        raise ValueError(f"rotary pairs are 'half' or 'interleaved', got {pairs!r}")
    a, b = jnp.unstack(x_BTNH.astype(jnp.float32).reshape(*x_BTNH.shape[:-1], half, 2), axis=-1)
    x = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return x.reshape(x_BTNH.shape).astype(x_BTNH.dtype)


def gated(x, gate_up: Callable, down: Callable):
    """down(silu(gate(x)) * up(x)), gate and up being the two halves of one map [.., 2, F]."""
    gate, up = jnp.unstack(gate_up(x), axis=-2)
    return down(jax.nn.silu(gate) * up)


class Experts(nnx.Module):
    """`experts` gated feed-forwards; each column goes through the `chosen` its router prefers.

    The weights of those are the softmax over all experts, in float32, divided by their sum; every
    column gets all that it chose (peer code: transformers modeling_mixtral; arXiv 2401.04088).
    """

    def __init__(self, width: int, mlp: int, *, rngs, experts: int, chosen: int):
        self.router = Dense((width,), (experts,), ('embed', 'expert'), rngs=rngs)
        self.gate_up = nnx.Param(truncated(rngs.params(), (experts, width, 2, mlp), width),
                                 axes=('expert', 'embed', 'stream', 'mlp'))
        self.down = nnx.Param(truncated(rngs.params(), (experts, mlp, width), mlp),
                              axes=('expert', 'mlp', 'embed'))
        self.chosen = chosen

    def __call__(self, x_BTD, place: Place = anywhere):
        return self.loaded(x_BTD, jnp.ones(x_BTD.shape[:2], bool), place)[0]

    def loaded(self, x_BTD, real_BT, place: Place = anywhere):
        """Also how the columns of `real_BT` spread, float32 [2, E]: how many chose each expert, and
        the sum of the probabilities that they gave it, which alone has a gradient."""
        with jax.default_matmul_precision('float32'):
            p_BTE = jax.nn.softmax(self.router(x_BTD.astype(jnp.float32)), axis=-1)
        p, choice = jax.lax.top_k(p_BTE, self.chosen)
        chose = choice[..., None] == jnp.arange(p_BTE.shape[-1])
        load = jnp.stack([jnp.sum(chose & real_BT[..., None, None], (0, 1, 2)),
                          jnp.sum(p_BTE * real_BT[..., None], (0, 1))])
        p = (p / jnp.sum(p, axis=-1, keepdims=True)).astype(x_BTD.dtype)
        columns = ('batch', 'column')

        def here(x, p, choice, *held):
            # Devices with other experts have other rows: each takes in the rows of all, sorts the
            # columns, passes those that chose an expert it holds, and gives back what came of them.
            return _through_experts(*(place.meet(z, columns, 'expert') for z in (x, p, choice)),
                                    *held)
        y = place.apart(
            here, (x_BTD, *columns, 'width'), (p, *columns, None),
            (choice, *columns, None), (jnp.arange(len(self.down)), 'expert'),
            (self.gate_up[...].astype(x_BTD.dtype), 'expert', None, None, 'mlp'),
            (self.down[...].astype(x_BTD.dtype), 'expert', 'mlp', None),
            out=(*columns, 'width'), summed=('expert', 'mlp'))
        return y, load


def balance(load_2E, columns):
    """E sum_e f_e P_e: f_e the share of `columns` that chose expert e, P_e its mean probability.

    As many as a column chooses where all experts are used alike, and up to E times as much (arXiv
    2101.03961 eq. 4-6; peer code: transformers load_balancing_loss_func, all layers pooled).
    """
    share, p = load_2E / jnp.maximum(columns, 1)
    return load_2E.shape[-1] * jnp.sum(share * p)


def _through_experts(x_BTD, p_BTK, choice_BTK, ids_E, gate_up_EDUF, down_EFD):
    """The chosen experts' outputs added up as p weighs them: of experts `ids_E`, which are here."""
    E, D, _, F = gate_up_EDUF.shape
    chosen = p_BTK.shape[-1]
    blocks = Blocks.of(choice_BTK.reshape(-1) - ids_E[0], E)
    x = blocks.spread(jnp.repeat(x_BTD.reshape(-1, D), chosen, axis=0))

    def gate_up(x):
        y = grouped(x, gate_up_EDUF.reshape(E, D, 2 * F), blocks.owner, blocks.used)
        return y.reshape(*x.shape[:-1], 2, F)
    y = gated(x, gate_up, lambda y: grouped(y, down_EFD, blocks.owner, blocks.used))
    y = y.reshape(-1, D)[blocks.at].reshape(*x_BTD.shape[:-1], chosen, D)
    return jnp.einsum('BTKD,BTK->BTD', y, p_BTK)


class Blocks(NamedTuple):
    """Rows sorted by their expert into blocks of one expert each, the last of each partly empty.

    at: [rows], where each row lies.    owner: [blocks], the expert of each.    used: how many
    blocks experts have, after which lie the rows of experts that are not here.    size: rows of a
    block.
    """

    at: jax.Array
    owner: jax.Array
    used: jax.Array
    size: int

    @staticmethod
    def of(expert, experts: int) -> 'Blocks':
        """From the expert of each row, which is here if it is one of `experts` from 0 on."""
        rows = len(expert)
        # A quarter of an even share: few empty rows, and still a matrix product.
        size = 1 << max(0, min(8, (rows // experts // 4).bit_length() - 1))
        expert = jnp.where((expert >= 0) & (expert < experts), expert, experts)
        counts = jnp.bincount(expert, length=experts + 1)
        blocks = -(-counts // size)
        ends = jnp.cumsum(blocks)
        order = jnp.argsort(expert)
        nth = jnp.arange(rows) - (jnp.cumsum(counts) - counts)[expert[order]]
        first = (ends - blocks) * size
        at = jnp.zeros(rows, jnp.int32).at[order].set(first[expert[order]] + nth)
        most = -(-rows // size) + experts + 1
        owner = jnp.searchsorted(ends[:-1], jnp.arange(most), side='right')
        return Blocks(at, jnp.minimum(owner, experts - 1), ends[-2], size)

    def spread(self, x):
        """[rows, D] as [blocks, size, D], zeros where a block is empty."""
        flat = jnp.zeros((len(self.owner) * self.size, x.shape[-1]), x.dtype)
        return flat.at[self.at].set(x).reshape(-1, self.size, x.shape[-1])


@jax.custom_vjp
def grouped(x_KCD, w_EDF, owner_K, used):
    """Block k of x times the matrix of its expert, for the first `used` blocks; zeros for the rest.

    One product at a time: `jax.lax.ragged_dot` on CPU multiplies every row by every expert.
    """
    return _each_block(lambda k: x_KCD[k] @ w_EDF[owner_K[k]], used,
                       jnp.zeros((*x_KCD.shape[:-1], w_EDF.shape[-1]), x_KCD.dtype))


def _each_block(fn, used, out):
    return jax.lax.fori_loop(0, used, lambda k, out: out.at[k].set(fn(k)), out)


def _grouped_forward(x, w, owner, used):
    return grouped(x, w, owner, used), (x, w, owner, used)


def _grouped_backward(kept, g):
    x, w, owner, used = kept
    dx = _each_block(lambda k: g[k] @ w[owner[k]].T, used, jnp.zeros_like(x))
    dw = jax.lax.fori_loop(
        0, used, lambda k, dw: dw.at[owner[k]].add(jnp.matmul(
            x[k].T, g[k], preferred_element_type=jnp.float32)), jnp.zeros(w.shape, jnp.float32))
    return dx, dw.astype(w.dtype), None, None


grouped.defvjp(_grouped_forward, _grouped_backward)


def embedded(table_VD, token_BKT, place: Place = anywhere, rows: str = 'vocab'):
    """The sum over K of the table's rows, [B, T, D]; zeros for a token that it does not have.

    Devices hold other slices of the table's width, 'embed', and perhaps of its `rows`: each looks
    up its slice for the batch rows of all, and they trade. Left to itself, the compiler gathers
    whole batches.
    """
    def looked_up(table_VD, token_BKT):
        x_BTD = 0.0
        for k in range(token_BKT.shape[1]):     # one at a time: [B, K, T, D] never exists
            x_BTD = x_BTD + _rows_of(table_VD, token_BKT[:, k])
        return x_BTD
    return _traded(looked_up, table_VD, token_BKT, place, rows, ('batch', 'column'))


def each_embedded(table_VD, token_BKT, place: Place = anywhere, rows: str = 'vocab'):
    """`embedded` without the sum, [B, K, T, D]: one look-up, and one scatter backwards."""
    return _traded(_rows_of, table_VD, token_BKT, place, rows, ('batch', 'stream', 'column'))


def _rows_of(table_VD, token):
    row = jnp.take(table_VD, jnp.clip(token, 0, len(table_VD) - 1), axis=0)
    return jnp.where(((token >= 0) & (token < len(table_VD)))[..., None], row, 0.0)


def _traded(look_up, table_VD, token_BKT, place: Place, rows: str, axes: tuple):
    """look_up(this device's piece of the table, tokens of all that split its width) -> [*axes, D],
    traded for this device's part of `axes`."""
    def here(table_VD, token_BKT):
        token_BKT = place.meet(token_BKT, ('batch', 'stream', 'column'), 'embed')
        x = look_up(table_VD, token_BKT - place.nth(rows) * len(table_VD))
        return place.part(x, (*axes, 'embed'), 'embed')
    return place.apart(here, (table_VD, rows, 'embed'), (token_BKT, 'batch', 'stream', 'column'),
                       out=(*axes, 'width'), summed=(rows,))


@jax.custom_vjp
def log_prob(logits, target):
    """Float32 log-probability of `target` under `logits` [..., V], and whether it is the argmax.

    The target is found by comparing. Reading it at its place has a scatter for a gradient, which is
    slow on CPU and to compile for TPU.
    """
    return _log_prob_forward(logits, target)[0]


def _log_prob_forward(logits, target):
    x = logits.astype(jnp.float32)
    normal = jax.scipy.special.logsumexp(x, axis=-1)
    own = jnp.sum(jnp.where(_one_hot(target, x), x, 0.0), axis=-1)
    return (own - normal, own >= jnp.max(x, axis=-1)), (logits, target, normal)


def _log_prob_backward(kept, g):
    logits, target, normal = kept
    p = jnp.exp(logits.astype(jnp.float32) - normal[..., None])
    return (g[0][..., None] * (_one_hot(target, p) - p)).astype(logits.dtype), None


def _one_hot(target, logits):
    return target[..., None] == jnp.arange(logits.shape[-1])


log_prob.defvjp(_log_prob_forward, _log_prob_backward)


def by_columns(fn, chunk_columns: int, *arrays, place: Place = anywhere):
    """`fn` over the column axis (1) in chunks, recomputed in the backward pass.

    `arrays` are [B, T, ...]; `fn` returns a tree of [B, c, ...]. Nothing larger than one chunk's
    intermediates (logits, say) is alive at once. T that does not divide gets one ragged last chunk.
    Where devices hold pieces of the columns, a chunk takes `chunk_columns` of every piece.
    """
    B, T = arrays[0].shape[:2]
    ways = place.ways('column')
    piece = T // ways
    if chunk_columns >= piece:
        return fn(*arrays)
    chunks, rest = divmod(piece, chunk_columns)

    def run(*xs):
        return jax.checkpoint(fn)(*(place(x, 'batch', 'column', *[None] * (x.ndim - 2))
                                    for x in xs))

    def part(x, first, last):       # of every piece, as [B, columns, ...]
        x = x.reshape(B, ways, piece, *x.shape[2:])[:, :, first:last]
        return x.reshape(B, -1, *x.shape[3:])

    def split(x):
        x = part(x, 0, chunks * chunk_columns)
        x = x.reshape(B, ways, chunks, chunk_columns, *x.shape[2:])
        return jnp.moveaxis(x, 2, 0).reshape(chunks, B, ways * chunk_columns, *x.shape[4:])

    def joined(y):
        y = y.reshape(chunks, B, ways, chunk_columns, *y.shape[3:])
        return jnp.moveaxis(y, 0, 2).reshape(B, ways, chunks * chunk_columns, *y.shape[4:])

    out = jax.tree.map(joined, jax.lax.map(lambda xs: run(*xs), tuple(map(split, arrays))))
    if rest:
        last = run(*(part(x, chunks * chunk_columns, piece) for x in arrays))
        out = jax.tree.map(lambda a, b: jnp.concatenate(
            [a, b.reshape(B, ways, rest, *b.shape[2:])], axis=2), out, last)
    return jax.tree.map(lambda y: y.reshape(B, T, *y.shape[3:]), out)


def stack(make: Callable, layers: int, *, rngs):
    """`layers` modules made by `make(rngs=...)` as one whose arrays lead with a layer axis."""
    keys = jax.random.split(rngs.params(), layers)
    return jax.vmap(lambda key: make(rngs=nnx.Rngs(key)))(keys)


def unroll(layers: int, place: Place) -> int:
    """How far a scan over layers is unrolled: whole on CPU, where XLA loses half its speed to the
    loop's copies, not at all on accelerators, where it costs compile time."""
    return layers if place.platform == 'cpu' else 1


# A stream reads every weight once per column, and a slice of a stack would be copied first: there
# stacks lie apart, a tuple of arrays in the place of one.

def apart(x, axes: tuple[str, ...]):
    """The array of a parameter whose own axes have these names, without the axes of stacks."""
    return x if x.ndim == len(axes) else tuple(apart(part, axes) for part in x)


def inputs_last(x, n_in: int):
    """A kernel laid out in memory with its `n_in` input axes last, as a product of one row reads it
    in one pass: XLA for GPUs has no kernel for small ones laid out the other way, and writes out
    every summand."""
    if isinstance(x, tuple):
        return tuple(inputs_last(part, n_in) for part in x)
    order = (*range(n_in, x.ndim), *range(n_in))
    return jax.device_put(x, Format(Layout(order), x.sharding))


def together(module):
    """`module` with its stacks in one piece, as a whole batch goes through them."""
    def whole(x):
        return jnp.stack([whole(part) for part in x]) if isinstance(x, tuple) else x
    return _by_parameter(whole, module)


def nth(stack, n):
    """Module `n` of a stack, which may lie apart; of one that does not also several at once."""
    return _by_parameter(lambda x: x[n], stack)


def _by_parameter(fn: Callable, module):
    def of(v):
        x = v.get_value()
        new = fn(x)
        return v if new is x else nnx.Param(new, **v.get_metadata())
    return jax.tree.map(of, module, is_leaf=lambda v: isinstance(v, nnx.Variable))


def each_layer(step: Callable, carry, blocks, *beside, unroll: int | bool = 1):
    """`jax.lax.scan` of step(carry, (block, *beside)), layer by layer where `blocks` lie apart."""
    parts = jax.tree.leaves(blocks, is_leaf=lambda v: isinstance(v, nnx.Variable))
    if not isinstance(parts[0].get_value(), tuple):
        return jax.lax.scan(step, carry, (blocks, *beside), unroll=unroll)
    out = []
    for n in range(len(parts[0].get_value())):
        carry, y = step(carry, (nth(blocks, n), *(x[n] for x in beside)))
        out.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *out)

# SPDX-License-Identifier: Apache-2.0
"""How the next column is spoken: h_BTD becomes log-probabilities of, or samples for, its rows.

Three methods make a head, and a fourth (`frames`) one that speaks sound that is no tokens:

    log_prob(h_BTD, target_BKT, embed_VD, key, place)
        log-probabilities of given targets, and hits, both [B, K, T]
    scores(h_BTD, target_BKT, embed_VD)
        logits [B, T, V_row] per row, None where the row is not predicted
    sample(h_BD, embed_VD, key, pick)
        the next column [B, K], each row picked from its logits

Training never needs whole logits, only the targets' log-probabilities, so those are computed in
chunks of columns and [B, T, V] in float32 does not exist. `target_BKT[..., t]` is the column that
h[:, t] predicts. Targets and samples are ids on the vocabulary's line.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsd import flow, nn, objective
from jaxsd.sharding import Place, anywhere
from jaxsd.types import NOTHING, Row, Sizes, Where, check, positive
from jaxsd.within import Within

Pick = Callable
"""pick(k, logits_BV, key) -> int32 [B]: the caller's choice among row k's predictable local ids."""


def _fold(key, k: int):
    """The key of row `k`; None for a pick that draws nothing or has its own random numbers."""
    return None if key is None else jax.random.fold_in(key, k)


def _local(target, row: Row):
    """Ids of `row` on the line as indices of its predictable ids; anything else becomes 0."""
    local = target - row.start
    return jnp.where((local >= 0) & (local < row.predicted), local, 0)


class Flat(nnx.Module):
    """A softmax over the line for every row on its own, from the same hidden state.

    One row: an ordinary language model. chunk_columns bounds the logits that are alive at once.
    """

    def __init__(self, sizes: Sizes, *, rngs, chunk_columns: int = 512):
        positive('head', chunk_columns=chunk_columns)
        total = sum(row.predicted for row in sizes.rows)
        self.out = nn.Dense((sizes.width,), (total,), ('embed', 'vocab'), rngs=rngs)
        self.rows, self.width, self.chunk_columns = sizes.rows, sizes.width, chunk_columns

    def _logits(self, h, embed_VD):
        del embed_VD
        return self.out(h)

    def _by_row(self, logits):
        at = 0
        for row in self.rows:
            yield row, logits[..., at:at + row.predicted]
            at += row.predicted

    def log_prob(self, h_BTD, target_BKT, embed_VD, key=None, place: Place = anywhere):
        check(h_BTD, 'BTD', D=self.width)

        def chunk(h, target_BTK):
            pairs = [nn.log_prob(logits, _local(target_BTK[..., k], row)) if row.predicted else
                     (jnp.zeros(h.shape[:2]), jnp.zeros(h.shape[:2], bool))
                     for k, (row, logits) in enumerate(self._by_row(self._logits(h, embed_VD)))]
            return tuple(jnp.stack(x, axis=-1) for x in zip(*pairs, strict=True))

        logp, hit = nn.by_columns(chunk, self.chunk_columns, h_BTD, jnp.swapaxes(target_BKT, 1, 2),
                                  place=place)
        return jnp.swapaxes(logp, 1, 2), jnp.swapaxes(hit, 1, 2)

    def scores(self, h_BTD, target_BKT, embed_VD):
        del target_BKT
        logits = self._logits(h_BTD, embed_VD).astype(jnp.float32)
        return [part if row.predicted else None for row, part in self._by_row(logits)]

    def sample(self, h_BD, embed_VD, key, pick: Pick):
        logits = self._logits(h_BD, embed_VD).astype(jnp.float32)
        column = [pick(k, part, _fold(key, k)) + row.start if row.predicted
                  else jnp.full(h_BD.shape[:1], NOTHING)
                  for k, (row, part) in enumerate(self._by_row(logits))]
        return jnp.stack(column, axis=1)


class Tied(Flat):
    """A flat softmax whose kernel is the embedding table: one row that may hold the whole line."""

    def __init__(self, sizes: Sizes, *, rngs, chunk_columns: int = 512):
        del rngs
        if len(sizes.rows) != 1 or sizes.rows[0].predicted != sizes.vocab:
            raise ValueError("head 'tied' needs one row over the whole line; use 'flat'")
        self.rows, self.width, self.chunk_columns = sizes.rows, sizes.width, chunk_columns

    def _logits(self, h, embed_VD):
        return jnp.tensordot(h, embed_VD.astype(h.dtype), [[-1], [1]])


class Spectrogram(Flat):
    """A softmax over the line and, beside it, the frame of sound that the next column holds.

    The frame is a regression from the same hidden state by two linear maps with a GELU between them
    (the post-net of arXiv 2305.15255 §3.2, which does not say what lies between: with rectifiers
    all of them died in the first steps, and every frame was the median). Which columns hold one is
    said by their tokens, so that the model ends its speech as it ends a text.

    features: numbers of a column's frame. hidden: between the two maps. mean and deviation: of
    those numbers, about; what the maps say is in units of these.
    """

    def __init__(self, sizes: Sizes, *, rngs, features: int, hidden: int, mean: float = 0.0,
                 deviation: float = 1.0, chunk_columns: int = 512):
        super().__init__(sizes, rngs=rngs, chunk_columns=chunk_columns)
        positive('head', features=features, hidden=hidden)
        if deviation <= 0:
            raise ValueError(f'head.deviation must be above 0, got {deviation}')
        self.mean, self.deviation = mean, deviation
        self.up = nn.Dense((sizes.width,), (hidden,), ('embed', 'mlp'), rngs=rngs, bias=True)
        self.down = nn.Dense((hidden,), (features,), ('mlp', 'stream'), rngs=rngs, bias=True)

    def frame(self, h):
        """The frame [..., M] of the column after one whose hidden state is `h` [..., D]."""
        said = self.down(jax.nn.gelu(self.up(h))).astype(jnp.float32)
        return self.mean + self.deviation * said

    def frames(self, before_BTD, batch, key=None, place: Place = anywhere):
        """What is said in columns whose past is `before_BTD`, and what should be, [B, T, M]."""
        del key
        return self.frame(before_BTD), place(batch['frames'], 'batch', 'column', None)


class _Mover(nnx.Module):
    """How latents move: a transformer over the columns of a sound that all see each other."""

    def __init__(self, *, rngs, latents, inside, layers, heads, mlp):
        # An odd number of inputs: its rows are not spread.
        self.up = nn.Dense((3 * latents + 1,), (inside,), ('stream', 'mlp'), rngs=rngs, bias=True)
        self.time = nn.Dense((inside,), (inside,), ('embed', 'mlp'), rngs=rngs)
        self.within = Within(rngs=rngs, width=inside, layers=layers, heads=heads, mlp=mlp)
        self.down = nn.Dense((inside,), (latents,), ('mlp', 'stream'), rngs=rngs, bias=True)
        self.inside = inside

    def __call__(self, x_BTM, t_BT, means_BTM, frames_BTM, batch):
        given = _given(batch)
        z = jnp.concatenate([jnp.where(given, 0.0, x_BTM), means_BTM,
                             jnp.where(given, frames_BTM, 0.0), given], axis=-1)
        h = self.up(z) + self.time(flow.clock(t_BT, self.inside))
        sound = jnp.where(batch['framed'] > 0, batch['segment'], -1)
        mask = (sound[:, :, None] == sound[:, None, :]) & (sound[:, None, :] >= 0)
        return self.down(self.within(h, mask, batch['position']))


class Flowing(Flat):
    """A softmax over the line and, beside it, a flow from what units mean to how they sound.

    A transformer without direction over the columns of a sound learns how latents move from the
    prior, a normal distribution of deviation `sigma` around the column's `means`, to the true ones,
    `frames` (arXiv 2401.13527 §3.3; `flow`). Frames of weight 0 are given, as a prompt whose voice
    is to be kept. It reads units by their means and nothing of the model that said them.

    latents: their width. scale: what they are divided by. inside, layers, heads, mlp: of the flow.
    """

    def __init__(self, sizes: Sizes, *, rngs, latents: int, scale: float, sigma: float, inside: int,
                 layers: int, heads: int, mlp: int, chunk_columns: int = 512):
        super().__init__(sizes, rngs=rngs, chunk_columns=chunk_columns)
        positive('head', latents=latents, inside=inside)
        if scale <= 0 or sigma < 0:
            raise ValueError(f'head.scale must be above 0 and head.sigma at least 0, got {scale} '
                             f'and {sigma}')
        self.flow = _Mover(rngs=rngs, latents=latents, inside=inside, layers=layers, heads=heads,
                           mlp=mlp)
        self.scale, self.sigma = scale, sigma

    def _scaled(self, batch, key):
        """Means, true latents and a draw of the prior, all in units of `scale`."""
        means = batch['means'] / self.scale
        return (means, batch['frames'] / self.scale,
                means + self.sigma * jax.random.normal(key, means.shape))

    def frames(self, before_BTD, batch, key=None, place: Place = anywhere):
        """The velocity at a random time of each sound, and what it should be, [B, T, M]."""
        del before_BTD
        noise, when = jax.random.split(jax.random.key(0) if key is None else key)
        means, true, drawn = self._scaled(batch, noise)
        B, T = batch['segment'].shape
        t_BT = jnp.take_along_axis(jax.random.uniform(when, (B, T + 1)), batch['segment'], axis=1)
        x, velocity = flow.between(drawn, true, t_BT[..., None])
        return (self.flow(x, t_BT, means, true, batch),
                place(velocity, 'batch', 'column', None))

    def refine(self, batch, key, steps: int):
        """Latents [B, T, M] at time 1, from a draw at time 0; those that are given stay."""
        means, true, drawn = self._scaled(batch, key)
        x = flow.follow(lambda x, t: self.flow(x, jnp.full(x.shape[:2], t), means, true, batch),
                        drawn, steps)
        return jnp.where(_given(batch), batch['frames'], x * self.scale)


def _given(batch):
    """Which frames are a prompt, [B, T, 1]: they are there and weigh nothing."""
    return ((batch['framed'] > 0) & (batch['weights'][:, 0] == 0))[..., None]


class _Layer(nnx.Module):
    """One layer of the depth transformer; S sets of weights, norms shared by all steps."""

    def __init__(self, *, rngs, S, width, heads, mlp, norm_eps, norm_gain):
        D, N, H = width, heads, width // heads
        def per_step(inputs, outputs, axes):
            return nn.stack(lambda *, rngs: nn.Dense(inputs, outputs, axes, rngs=rngs), S,
                            rngs=rngs)
        self.norm_attention = nn.Norm(D, eps=norm_eps, gain=norm_gain)
        self.qkv = per_step((D,), (3, N, H), ('embed', 'stream', 'heads', 'head_dim'))
        self.out = per_step((N, H), (D,), ('heads', 'head_dim', 'embed'))
        self.norm_mlp = nn.Norm(D, eps=norm_eps, gain=norm_gain)
        self.gate_up = per_step((D,), (2, mlp), ('embed', 'stream', 'mlp'))
        self.down = per_step((mlp,), (D,), ('mlp', 'embed'))


def _slots(step_weights, steps: int) -> tuple[int, ...]:
    """Which set of weights each step uses, of `max + 1` sets."""
    if step_weights == 'own':
        return tuple(range(steps))
    if step_weights == 'shared':
        return (0,) * steps
    if not isinstance(step_weights, tuple) or any(type(s) is not int for s in step_weights):
        raise ValueError(f"head.step_weights is 'own', 'shared' or a tuple of {steps} numbers, "
                         f'got {step_weights!r}')
    if len(step_weights) != steps or set(step_weights) != set(range(max(step_weights) + 1)):
        raise ValueError(f'head.step_weights {step_weights} must name a set for each of the '
                         f'{steps} steps, and leave out none from 0 to the last')
    if step_weights == tuple(range(steps)):
        raise ValueError(f"head.step_weights {step_weights} gives each step a set of its own: "
                         "write 'own'")
    return step_weights


class Depth(nnx.Module):
    """Text from the hidden state, then the audio rows of the column one after another.

    A small causal transformer runs over the P predicted audio rows of one column: step p reads
    in_p(h) + the embedding of the row before it (the text token for p = 0) and predicts row p + 1.
    No positions; no final norm (arXiv 2410.00037 §3.4.1; moshi models/lm.py
    forward_depformer_training). Its inputs are the column as it stands, delays included.

    step_weights: every step has its 'own' set of maps, all have one set ('shared'), or a schedule
    (0, 1, 2, 2) names the set that each step uses, so that the fine codebooks may share one (moshi
    models/lm.py depformer_weights_per_step_schedule). Norms are shared and output maps and
    embeddings are per codebook in any case.

    fraction < 1 trains the depth loop on that random share of the columns: their terms are scaled
    by T / taken, so that the expected loss and gradient are those of all columns (CSM's recipe).
    """

    def __init__(self, sizes: Sizes, *, rngs, width: int, layers: int, heads: int, mlp: int,
                 step_weights: str | tuple[int, ...] = 'own', norm_eps: float = 1e-8,
                 norm_gain: str = 'early', fraction: float = 1.0, chunk_columns: int = 512):
        positive('head', width=width, layers=layers, heads=heads, mlp=mlp,
                 chunk_columns=chunk_columns)
        audio = [(k, row) for k, row in enumerate(sizes.rows) if k and row.predicted]
        self.audio = tuple(k for k, _ in audio)
        self.steps = P = len(audio)
        if not P or self.audio != tuple(range(1, P + 1)):
            raise ValueError('head depth needs predicted audio rows right after the text row')
        if len({row.size for _, row in audio}) != 1:
            raise ValueError('head depth needs audio rows of one size')
        self.slots = _slots(step_weights, P)
        if width % heads:
            raise ValueError(f'head.heads {heads} must divide head.width {width}')
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f'head.fraction must lie in (0, 1], got {fraction}')
        self.rows, self.width = sizes.rows, sizes.width
        self.fraction, self.chunk_columns, self.layers = fraction, chunk_columns, layers
        self.depth_width, self.heads, self.mlp = width, heads, mlp
        text, card, size = sizes.rows[0], audio[0][1].predicted, audio[0][1].size
        S, D = max(self.slots) + 1, width
        self.text_out = nn.Dense((sizes.width,), (text.predicted,), ('embed', 'vocab'), rngs=rngs)
        self.inputs = nn.stack(lambda *, rngs: nn.Dense((sizes.width,), (D,), ('embed', 'mlp'),
                                                        rngs=rngs), S, rngs=rngs)
        # Small tables of odd lengths (an initial token each): their rows are not spread.
        self.text_table = nnx.Param(nn.truncated(rngs.params(), (text.size, D), D),
                                    axes=('stream', 'embed'))
        self.tables = nnx.Param(nn.truncated(rngs.params(), (max(P - 1, 1), size, D), D),
                                axes=('stream', 'stream', 'embed'))
        self.blocks = nn.stack(lambda *, rngs: _Layer(
            rngs=rngs, S=S, width=D, heads=heads, mlp=mlp, norm_eps=norm_eps, norm_gain=norm_gain),
            layers, rngs=rngs)
        self.outs = nn.stack(lambda *, rngs: nn.Dense((D,), (card,), ('embed', 'vocab'), rngs=rngs),
                             P, rngs=rngs)

    def _before(self, target_K, p: int, dtype):
        """The embedding of the token before step p, of [B]; zeros where that cell holds nothing."""
        token = target_K[p] - self.rows[p].start
        table = self.text_table[...] if p == 0 else self.tables[...][p - 1]
        return nn.embedded(table, token[:, None, None], rows='stream')[:, 0].astype(dtype)

    def _all_before(self, target_BTK, dtype, place: Place):
        """`_before` of every step, [P, B, T, D]."""
        token_BKT = jnp.swapaxes(target_BTK, 1, 2)[:, :self.steps]
        local = token_BKT - jnp.asarray([row.start for row in self.rows[:self.steps]])[:, None]
        text = nn.embedded(self.text_table[...], local[:, :1], place, 'stream')[None]
        count, size, width = self.tables.shape
        has = (local[:, 1:] >= 0) & (local[:, 1:] < size)
        audio = nn.each_embedded(
            self.tables[...].reshape(count * size, width),      # one table below the other
            jnp.where(has, local[:, 1:] + size * jnp.arange(self.steps - 1)[:, None], -1), place,
            'stream')
        return jnp.concatenate([text, jnp.moveaxis(audio, 1, 0)]).astype(dtype)

    def _mapped(self, stack, x):
        """x [P, ...], or of all steps alike [1, ...], by the map of each step. P leads: one batched
        dot; where all steps share one map, no copies of it."""
        if max(self.slots) == 0:
            return nn.nth(stack, 0)(x)
        maps = nn.nth(stack, jnp.asarray(self.slots))
        if len(x) == 1:
            return jax.vmap(lambda dense: dense(x[0]))(maps)
        return jax.vmap(lambda dense, x: dense(x))(maps, x)

    def _logits(self, h_BTD, target_BTK, place: Place = anywhere):
        """Logits [P, B, T, V] of the audio rows, all steps at once."""
        P = self.steps

        def spread(x_PBTD):     # else the compiler has every device take the columns of all
            return place(x_PBTD, None, 'batch', 'column', 'width')
        x = self._mapped(self.inputs, h_BTD[None])
        x = spread(x + self._all_before(target_BTK, h_BTD.dtype, place))
        causal = jnp.tril(jnp.ones((P, P), bool))

        def layer(x, block):
            y = block.norm_attention(x)
            qkv = self._mapped(block.qkv, y)                       # [P, B, T, 3, N, H]
            q, k, v = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
            s = jnp.einsum('PBTNH,QBTNH->BTNPQ', q, k, preferred_element_type=jnp.float32)
            s = jnp.where(causal, s / jnp.sqrt(jnp.float32(q.shape[-1])), -1e30)
            o = jnp.einsum('BTNPQ,QBTNH->PBTNH', jax.nn.softmax(s, -1).astype(v.dtype), v)
            x = spread(x + self._mapped(block.out, o))
            y = block.norm_mlp(x)
            return spread(x + nn.gated(y, lambda y: self._mapped(block.gate_up, y),
                                       lambda y: self._mapped(block.down, y))), None
        x, _ = jax.lax.scan(layer, x, self.blocks, unroll=nn.unroll(self.layers, place))
        return jax.vmap(lambda dense, x: dense(x))(self.outs, x)

    def log_prob(self, h_BTD, target_BKT, embed_VD, key=None, place: Place = anywhere):
        del embed_VD
        check(h_BTD, 'BTD', D=self.width)
        B, K, T = target_BKT.shape
        target_BTK = jnp.swapaxes(target_BKT, 1, 2)

        def text(h, target):
            return nn.log_prob(self.text_out(h), _local(target, self.rows[0]))

        def audio(h, target):
            local = jnp.stack([_local(target[..., k], self.rows[k]) for k in self.audio])
            logp, hit = nn.log_prob(self._logits(h, target, place), local)         # [P, B, T]
            return jnp.moveaxis(logp, 0, -1), jnp.moveaxis(hit, 0, -1)

        logp_text, hit_text = nn.by_columns(text, self.chunk_columns, h_BTD, target_BTK[..., 0],
                                            place=place)
        taken = max(1, round(self.fraction * T))
        if taken < T:
            if key is None:
                raise ValueError('head.fraction < 1 needs a key')
            at = jnp.sort(jax.random.choice(key, T, (taken,), replace=False))
            # The last again and again, until every device has as many.
            even = jnp.concatenate([at, jnp.repeat(at[-1:], -taken % place.ways('column'))])
            logp, hit = (x[:, :taken] for x in nn.by_columns(
                audio, self.chunk_columns, place(h_BTD[:, even], 'batch', 'column', 'width'),
                place(target_BTK[:, even], 'batch', 'column', None), place=place))
            logp = jnp.zeros((B, T, self.steps)).at[:, at].set(logp * (T / taken))
            # A hit counts as much as its column stands for, so accuracies stay unbiased too.
            hit = jnp.zeros((B, T, self.steps)).at[:, at].set(hit * (T / taken))
        else:
            logp, hit = nn.by_columns(audio, self.chunk_columns, h_BTD, target_BTK, place=place)
        silent = jnp.zeros((B, T, K - 1 - self.steps))
        logp = jnp.concatenate([logp_text[..., None], logp, silent], axis=-1)
        hit = jnp.concatenate([hit_text[..., None].astype(jnp.float32), hit.astype(jnp.float32),
                               silent], axis=-1)
        return jnp.swapaxes(logp, 1, 2), jnp.swapaxes(hit, 1, 2)

    def scores(self, h_BTD, target_BKT, embed_VD):
        del embed_VD
        audio = self._logits(h_BTD, jnp.swapaxes(target_BKT, 1, 2)).astype(jnp.float32)
        text = self.text_out(h_BTD).astype(jnp.float32)
        return [text, *audio, *[None] * (len(self.rows) - 1 - self.steps)]

    def sample(self, h_BD, embed_VD, key, pick: Pick):
        del embed_VD
        B = h_BD.shape[0]
        N, H, P, L = self.heads, self.depth_width // self.heads, self.steps, self.layers
        text = pick(0, self.text_out(h_BD).astype(jnp.float32), _fold(key, 0))
        column = [text + self.rows[0].start]
        keys = jnp.zeros((L, P, B, N, H), h_BD.dtype)
        values = jnp.zeros_like(keys)
        for p in range(P):
            before = self._before(column, p, h_BD.dtype)
            x = nn.nth(self.inputs, self.slots[p])(h_BD) + before
            seen = jnp.arange(P) <= p

            def layer(x, kv, p=p, seen=seen):
                block, k_PBNH, v_PBNH = kv
                qkv = nn.nth(block.qkv, self.slots[p])(block.norm_attention(x))
                q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
                k_PBNH, v_PBNH = k_PBNH.at[p].set(k), v_PBNH.at[p].set(v)
                s = jnp.einsum('BNH,PBNH->BNP', q, k_PBNH, preferred_element_type=jnp.float32)
                s = jnp.where(seen, s / jnp.sqrt(jnp.float32(H)), -1e30)
                o = jnp.einsum('BNP,PBNH->BNH', jax.nn.softmax(s, -1).astype(v.dtype), v_PBNH)
                x = x + nn.nth(block.out, self.slots[p])(o)
                x = x + nn.gated(block.norm_mlp(x), nn.nth(block.gate_up, self.slots[p]),
                                 nn.nth(block.down, self.slots[p]))
                return x, (k_PBNH, v_PBNH)
            x, (keys, values) = nn.each_layer(layer, x, self.blocks, keys, values)
            logits = nn.nth(self.outs, p)(x).astype(jnp.float32)
            column.append(pick(p + 1, logits, _fold(key, p + 1))
                          + self.rows[p + 1].start)
        silent = [jnp.full((B,), NOTHING)] * (len(self.rows) - 1 - P)
        return jnp.stack(column + silent, axis=1)


class _Beside(nnx.Module):
    """A text row read off the hidden state, and `cells` rows of one size that follow it."""

    def __init__(self, sizes: Sizes, *, rngs, chunk_columns: int):
        positive('head', chunk_columns=chunk_columns)
        cells = sizes.rows[1:]
        if sizes.rows[0].name != 'text' or not cells or not cells[0].predicted or len(
                {(row.size, row.predicted) for row in cells}) != 1:
            raise ValueError('this head needs a text row, then predicted rows of one size')
        self.rows, self.width, self.chunk_columns = sizes.rows, sizes.width, chunk_columns
        self.text_out = nn.Dense((sizes.width,), (sizes.rows[0].predicted,), ('embed', 'vocab'),
                                 rngs=rngs)


class Group(_Beside):
    """Text from the hidden state; the rows of speech all at once, from as many learned queries.

    A small transformer without an order reads the projected hidden state and the queries, and query
    g says row g: the rows of a column are independent given the hidden state, and one step of the
    backbone speaks them all (arXiv 2410.08035 §3.2). Rows that share a range share their output
    map. layers, width, heads, mlp: of that transformer.
    """

    def __init__(self, sizes: Sizes, *, rngs, width: int, layers: int, heads: int, mlp: int,
                 chunk_columns: int = 512):
        super().__init__(sizes, rngs=rngs, chunk_columns=chunk_columns)
        cells = sizes.rows[1:]
        self.cells, starts = len(cells), sorted({row.start for row in cells})
        self.inputs = nn.Dense((sizes.width,), (width,), ('embed', 'mlp'), rngs=rngs)
        self.queries = nnx.Param(nn.truncated(rngs.params(), (self.cells, width), width),
                                 axes=('stream', 'embed'))
        self.within = Within(rngs=rngs, width=width, layers=layers, heads=heads, mlp=mlp)
        self.outs = nn.stack(lambda *, rngs: nn.Dense((width,), (cells[0].predicted,),
                                                      ('embed', 'vocab'), rngs=rngs),
                             len(starts), rngs=rngs)
        self.maps = tuple(starts.index(row.start) for row in cells)

    def _logits(self, h):
        """Logits [G, ..., V] of the cells of columns whose hidden state is h [..., D]."""
        queries = jnp.broadcast_to(self.queries[...].astype(h.dtype),
                                   (*h.shape[:-1], *self.queries.shape))
        x = jnp.concatenate([self.inputs(h)[..., None, :], queries], axis=-2)
        x = self.within(x, jnp.ones((self.cells + 1,) * 2, bool))
        return jnp.stack([nn.nth(self.outs, m)(x[..., 1 + g, :]) for g, m in enumerate(self.maps)])

    def log_prob(self, h_BTD, target_BKT, embed_VD, key=None, place: Place = anywhere):
        del embed_VD, key
        check(h_BTD, 'BTD', D=self.width)

        def chunk(h, target_BTK):
            pairs = [nn.log_prob(logits, _local(target_BTK[..., k], row)) for k, (row, logits)
                     in enumerate(zip(self.rows, [self.text_out(h), *self._logits(h)],
                                      strict=True))]
            return tuple(jnp.stack(x, axis=-1) for x in zip(*pairs, strict=True))
        logp, hit = nn.by_columns(chunk, self.chunk_columns, h_BTD, jnp.swapaxes(target_BKT, 1, 2),
                                  place=place)
        return jnp.swapaxes(logp, 1, 2), jnp.swapaxes(hit, 1, 2)

    def scores(self, h_BTD, target_BKT, embed_VD):
        del target_BKT, embed_VD
        return [x.astype(jnp.float32) for x in (self.text_out(h_BTD), *self._logits(h_BTD))]

    def sample(self, h_BD, embed_VD, key, pick: Pick):
        del embed_VD
        logits = [self.text_out(h_BD), *self._logits(h_BD)]
        return jnp.stack([pick(k, x.astype(jnp.float32), _fold(key, k)) + row.start
                          for k, (row, x) in enumerate(zip(self.rows, logits, strict=True))], 1)


class Local(nnx.Module):
    """The rows of a column one after another, each from its own slice of the hidden state.

    A column is a patch of one sequence. The hidden state is cut into as many slices as there are
    rows; a small causal transformer reads, for row p, slice p and the token of row p - 1 (a learned
    start for the first), with a learned place, and one map says all rows (arXiv 2305.07185 §2.1,
    2310.00704 §2.3). Unlike `depth`, the first row is part of the chain and nothing is per row.
    """

    def __init__(self, sizes: Sizes, *, rngs, width: int, layers: int, heads: int, mlp: int,
                 chunk_columns: int = 512):
        positive('head', chunk_columns=chunk_columns)
        self.steps = P = len(sizes.rows)
        if len({row[1:] for row in sizes.rows}) != 1 or not sizes.rows[0].predicted:
            raise ValueError('head local needs predicted rows over one line (vocab.patches)')
        if sizes.width % P:
            raise ValueError(f'head local: {P} rows must divide the model width {sizes.width}')
        self.rows, self.width, self.chunk_columns = sizes.rows, sizes.width, chunk_columns
        self.inputs = nn.Dense((sizes.width // P,), (width,), ('embed', 'mlp'), rngs=rngs)
        self.tokens = nnx.Param(nn.truncated(rngs.params(), (sizes.vocab, width), width),
                                axes=('vocab', 'embed'))
        self.first = nnx.Param(nn.truncated(rngs.params(), (width,), width), axes=('embed',))
        self.place = nnx.Param(nn.truncated(rngs.params(), (P, width), width),
                               axes=('stream', 'embed'))
        self.within = Within(rngs=rngs, width=width, layers=layers, heads=heads, mlp=mlp)
        self.out = nn.Dense((width,), (sizes.rows[0].predicted,), ('embed', 'vocab'), rngs=rngs)

    def _input(self, h, before, p: int, place: Place = anywhere):
        """What step p reads of h [B, T, D]: its slice, its place, and the token [B, T] before it
        (None: start)."""
        part = h.reshape(*h.shape[:-1], self.steps, -1)[..., p, :]
        if before is None:
            token = self.first[...]
        else:
            token = nn.embedded(self.tokens[...], before[:, None] - self.rows[0].start, place)
        return self.inputs(part) + (token + self.place[...][p]).astype(h.dtype)

    def _logits(self, h, target_BTK, place: Place = anywhere):
        """Logits [B, T, P, V] of all steps at once."""
        x = jnp.stack([self._input(h, target_BTK[..., p - 1] if p else None, p, place)
                       for p in range(self.steps)], axis=-2)
        return self.out(self.within(x, jnp.tril(jnp.ones((self.steps,) * 2, bool))))

    def log_prob(self, h_BTD, target_BKT, embed_VD, key=None, place: Place = anywhere):
        del embed_VD, key
        check(h_BTD, 'BTD', D=self.width)

        def chunk(h, target):
            return nn.log_prob(self._logits(h, target, place), _local(target, self.rows[0]))
        logp, hit = nn.by_columns(chunk, self.chunk_columns, h_BTD, jnp.swapaxes(target_BKT, 1, 2),
                                  place=place)
        return jnp.swapaxes(logp, 1, 2), jnp.swapaxes(hit, 1, 2)

    def scores(self, h_BTD, target_BKT, embed_VD):
        del embed_VD
        logits = self._logits(h_BTD, jnp.swapaxes(target_BKT, 1, 2)).astype(jnp.float32)
        return [logits[..., p, :] for p in range(self.steps)]

    def sample(self, h_BD, embed_VD, key, pick: Pick):
        del embed_VD
        cache = self.within.empty(len(h_BD), self.steps, h_BD.dtype)
        column = []
        for p, row in enumerate(self.rows):
            x = self._input(h_BD[:, None], column[-1][:, None] if p else None, p)[:, 0]
            x, cache = self.within.step(x, p, cache)
            column.append(pick(p, self.out(x).astype(jnp.float32), _fold(key, p)) + row.start)
        return jnp.stack(column, axis=1)


class Ctc(_Beside):
    """Text from the hidden state; units from a causal decoder on hidden states, unaligned.

    Every column of an answer is repeated R times, once for each row of speech, and a second decoder
    reads the repeats. Each says a unit or nothing (the initial token is the blank); which repeat
    says which unit is left open by connectionist temporal classification (arXiv 2409.06666 §3.3).

    The targets of an answer are the units in its cells, column by column: where they stand means
    nothing. A column is part of an answer where its first row of speech is not NOTHING; answers in
    one row are apart by at least a column. The log-probability of an answer's units is divided
    evenly among their cells. (Their hits are all 0: without an alignment there is none.)

    The hidden states that speak are those that predict the answer's columns, as the paper defines
    them and as generation has them. Spoken cells are what each repeat says, repeats and blanks
    included; `reply.collapse` makes units of them.

    decoder: a backbone of its own. most_units: of one answer; what lies beyond is not scored.
    """

    def __init__(self, sizes: Sizes, *, rngs, decoder: Callable, most_units: int,
                 chunk_columns: int = 512):
        super().__init__(sizes, rngs=rngs, chunk_columns=chunk_columns)
        positive('head', most_units=most_units)
        unit = sizes.rows[1]
        if unit.size != unit.predicted + 1 or len({row.start for row in sizes.rows[1:]}) != 1:
            raise ValueError('head ctc needs rows of speech that share one range, without marks')
        width = decoder.keywords['width']
        self.repeats, self.most_units = len(sizes.rows) - 1, most_units
        self.inputs = nn.Dense((sizes.width,), (width,), ('embed', 'mlp'), rngs=rngs, bias=True)
        self.decoder = decoder(Sizes(sizes.rows[1:], unit.size, width), rngs=rngs)
        self.out = nn.Dense((width,), (unit.size,), ('embed', 'vocab'), rngs=rngs)

    def _frames(self, h_BTD, spoken_BT, place: Place = anywhere):
        """Logits [B, T * R, V + 1] of every repeat, and Where of answers: columns of none are 0."""
        B, T, _ = h_BTD.shape
        x = jnp.repeat(self.inputs(h_BTD), self.repeats, axis=1)
        first = spoken_BT & ~jnp.pad(spoken_BT, ((0, 0), (1, 0)))[:, :-1]
        answer_BT = jnp.where(spoken_BT, jnp.cumsum(first, axis=1), 0)
        column = jnp.arange(T) - jax.lax.cummax(jnp.where(first, jnp.arange(T), 0), axis=1)
        position = jnp.repeat(column * self.repeats, self.repeats, axis=1) + jnp.tile(
            jnp.arange(self.repeats), T)
        where = Where(position, jnp.repeat(answer_BT, self.repeats, axis=1))
        logits = self.out(self.decoder(x, where, place=place)[0]).astype(jnp.float32)
        # A column of no answer sees nothing, which attention takes for everything.
        return jnp.where((where.segment > 0)[..., None], logits, 0.0), where

    def log_prob(self, h_BTD, target_BKT, embed_VD, key=None, place: Place = anywhere):
        del embed_VD, key
        check(h_BTD, 'BTD', D=self.width)
        B, K, T = target_BKT.shape
        text, unit = self.rows[0], self.rows[1]

        def chunk(h, target):
            return nn.log_prob(self.text_out(h), _local(target, text))
        logp, hit = nn.by_columns(chunk, self.chunk_columns, h_BTD, target_BKT[:, 0],
                                  place=place)

        def spoken(h):
            cells = jnp.swapaxes(target_BKT[:, 1:], 1, 2).reshape(B, -1)    # in the order of time
            logits, where = self._frames(h, target_BKT[:, 1] != NOTHING, place)
            local = cells - unit.start
            local = jnp.where((local >= 0) & (local < unit.predicted), local, -1)
            # A path runs through all frames of a row, so every device takes whole rows.
            frames = place(jax.nn.log_softmax(logits), 'batch', None, None)
            local, segment = (place(x, 'batch', None) for x in (local, where.segment))
            share = objective.ctc(frames, local, segment, blank=unit.predicted,
                                  most_units=self.most_units)
            return jnp.swapaxes(share.reshape(B, T, K - 1), 1, 2)
        # Stages that only write pay nothing for a voice.
        share = jax.lax.cond(jnp.any(target_BKT[:, 1] != NOTHING), spoken,
                             lambda h: jnp.zeros((B, K - 1, T)), h_BTD)
        return (jnp.concatenate([logp[:, None], share], axis=1),
                jnp.concatenate([hit[:, None].astype(jnp.float32), jnp.zeros_like(share)], axis=1))

    def scores(self, h_BTD, target_BKT, embed_VD):
        """Row 1 + r: the logits of repeat r of each column, the blank last."""
        del embed_VD
        logits, _ = self._frames(h_BTD, target_BKT[:, 1] != NOTHING)
        logits = logits.reshape(*h_BTD.shape[:2], self.repeats, -1)
        return [self.text_out(h_BTD).astype(jnp.float32),
                *(logits[:, :, r] for r in range(self.repeats))]

    def empty_cache(self, rows: int, columns: int, dtype) -> dict:
        """What `sample` remembers between columns: the repeats of `columns` columns."""
        return self.decoder.empty_cache(rows, columns * self.repeats, dtype)

    def sample(self, h_BD, embed_VD, key, pick: Pick, cache):
        """The next column and the new cache. Its first call is the first column of an answer."""
        del embed_VD
        column = [pick(0, self.text_out(h_BD).astype(jnp.float32), _fold(key, 0))]
        x = jnp.repeat(self.inputs(h_BD)[:, None], self.repeats, axis=1)
        position = jnp.broadcast_to(cache['written'] + jnp.arange(self.repeats), x.shape[:2])
        h, cache = self.decoder(x, Where(position, jnp.ones_like(position)), cache)
        logits = self.out(h).astype(jnp.float32)
        column += [pick(1 + r, logits[:, r], _fold(key, 1 + r)) for r in range(self.repeats)]
        return jnp.stack([x + row.start for x, row in zip(column, self.rows, strict=True)],
                         1), cache


flat, tied, depth, group, local, ctc = Flat, Tied, Depth, Group, Local, Ctc
spectrogram, flowing = Spectrogram, Flowing

# SPDX-License-Identifier: Apache-2.0
"""Sound that is no tokens, spoken: frame after frame, or all at once from units that were said.

Frame after frame: what is heard and written is a prompt like any other; from there on the model
says frames, each read back before the next, until it would rather say its end. Nothing is drawn, a
regression has one answer. All at once: units say what is meant, and a flow carries what they stand
for to how it sounds, in the voice of a prompt.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsd import codec, generate, reply, trained
from jaxsd.config import ConfigError
from jaxsd.generate import Speaker
from jaxsd.layout import framed
from jaxsd.types import NOTHING, Grid, Where


class Marks(NamedTuple):
    """The ids of a column that holds a frame and of the one behind the last."""

    frame: int
    end: int


def marks(vocab) -> Marks:
    """Raises ConfigError for a vocabulary without them."""
    if not {'frame', 'end'} <= set(vocab.specials):
        raise ConfigError('vocab.text_marks lacks frame and end, which sound is spoken with')
    return Marks(vocab.specials['frame'], vocab.specials['end'])


@functools.partial(jax.jit, static_argnums=0)
def _read(graph, params, cache, tokens_BKT, where, heard):
    return nnx.merge(graph, params).read(tokens_BKT, where, cache, heard)


@functools.partial(jax.jit, static_argnums=(0, 7), donate_argnums=2)
def _say(graph, params, cache, h_BD, position_B, over_B, marked: Marks, count: int):
    """`count` frames from a hidden state: (frames [count, B, M], which are past the end, what the
    next call takes)."""
    lm = nnx.merge(graph, params)

    def step(carry, _):
        cache, h_BD, position, over = carry
        logits = lm.head.scores(h_BD[:, None], None, lm.table)[0][:, 0]
        over = over | (logits[:, marked.end] > logits[:, marked.frame])
        frame = lm.head.frame(h_BD)
        one = jnp.ones_like(position)[:, None]
        h_BD, cache = lm.read(jnp.full((len(position), 1, 1), marked.frame),
                              Where(position[:, None], one), cache,
                              dict(frames=frame[:, None], framed=one))
        return (cache, h_BD, position + 1, over), (frame, over)
    carry, out = jax.lax.scan(step, (cache, h_BD, position_B, over_B), length=count)
    return *out, carry


def say(speaker: Speaker, prompts: list[np.ndarray], marked: Marks, *, most_columns: int,
        heard=None, chunk: int = 32) -> list[np.ndarray]:
    """The frames [n, M] that follow each prompt (tokens [1, T_i]), at most `most_columns` of them.

    heard: (feats [T_i, F], slot [T_i]) of each prompt. Ends when all have.
    """
    longest = -(-max(p.shape[1] for p in prompts) // 32) * 32       # few shapes, few compilations
    tokens, where, features = generate.at_the_right(prompts, longest, heard)
    lm = nnx.eval_shape(lambda p: nnx.merge(speaker.graph, p), speaker.params)
    most = -(-most_columns // chunk) * chunk
    h_BD, cache = _read(speaker.graph, speaker.params, lm.empty_cache(len(prompts), longest + most),
                        tokens, where, features)
    position = jnp.asarray([p.shape[1] for p in prompts], jnp.int32)
    over, said = jnp.zeros(len(prompts), bool), []
    for _ in range(most // chunk):
        frames, ended, (cache, h_BD, position, over) = _say(
            speaker.graph, speaker.params, cache, h_BD, position, over, marked, chunk)
        said.append((np.asarray(frames), np.asarray(ended)))
        if said[-1][1][-1].all():
            break
    frames = np.concatenate([f for f, _ in said])[:most_columns]
    ended = np.concatenate([e for _, e in said])[:most_columns]
    return [frames[:int((~ended[:, i]).sum()), i] for i in range(len(prompts))]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _refine(graph, params, batch, key, steps: int):
    return nnx.merge(graph, params).head.refine(batch, key, steps)


def refine(speaker: Speaker, means: list[np.ndarray], given: list[np.ndarray], *, steps: int,
           key=None) -> list[np.ndarray]:
    """Latents [n, W] of sounds whose units stand for `means` [n, W], in `steps` steps of a flow.

    given: [m, W] each, the true latents of the first m columns, which are kept (m may be 0).
    """
    key = jax.random.key(0) if key is None else key
    longest = -(-max(map(len, means)) // 64) * 64       # few shapes, few compilations
    shape = (len(means), longest, means[0].shape[1])
    batch = dict(means=np.zeros(shape, np.float32), frames=np.zeros(shape, np.float32),
                 framed=np.zeros(shape[:2], np.int32), weights=np.ones((len(means), 1, longest)),
                 position=np.tile(np.arange(longest), (len(means), 1)),
                 segment=np.zeros(shape[:2], np.int32))
    for i, (mean, true) in enumerate(zip(means, given, strict=True)):
        batch['means'][i, :len(mean)] = mean
        batch['frames'][i, :len(true)] = true
        batch['framed'][i, :len(mean)] = batch['segment'][i, :len(mean)] = 1
        batch['weights'][i, 0, :len(true)] = 0.0
    out = np.asarray(_refine(speaker.graph, speaker.params, batch, key, steps))
    return [x[:len(mean)] for x, mean in zip(out, means, strict=True)]


# A trained stage, and what it is asked to do.

def wave(config, frames: np.ndarray) -> np.ndarray:
    """float32 [S]: the sound of frames [n, M] that a column holds one or several of; a moment of
    silence where there are none."""
    if not len(frames):
        return np.zeros(codec.SAMPLE_RATE_HZ // 4, np.float32)
    return codec.heard(frames.reshape(-1, config.objective.bins))


def question(config, vocab, wav: np.ndarray) -> tuple[np.ndarray, tuple]:
    """A prompt [1, T] and its (feats, slot): a wave [S] that is heard, as the layout draws it."""
    feats = framed.columns(codec.log_mel(codec.flac(wav))[0][:],
                           config.layout.get('stack_frames', 1))
    if not len(feats):
        raise ValueError('--input is too short to hear anything in')
    prompt = np.array([[*[NOTHING] * len(feats), vocab.specials['bos']]], np.int32)
    return prompt, framed.beside(0, feats, prompt.shape[1])


def true_frames(grid: Grid) -> np.ndarray:
    """The frames [n, M] that a grid says, as it should be."""
    return grid.extra['frames'][grid.extra['framed'] > 0]


def spoken(lm: trained.LM, grids: list[Grid], *, most_columns: int, batch: int = 16
           ) -> list[np.ndarray]:
    """The frames that follow what stands before the first frame of each grid, its text given."""
    marked, out = marks(lm.vocab), []
    for part in trained.in_parts(grids, batch):
        part = [*part, *[part[-1]] * (batch - len(part))]
        firsts = [int(np.argmax(g.extra['framed'] > 0)) for g in part]
        heard = None
        if all('slot' in g.extra for g in part):
            heard = [(g.extra['feats'][:n], g.extra['slot'][:n])
                     for g, n in zip(part, firsts, strict=True)]
        out += say(lm.speaker(), [g.tokens[:, :n] for g, n in zip(part, firsts, strict=True)],
                   marked, heard=heard, most_columns=most_columns)
    return out[:len(grids)]


def answered(lm: trained.LM, prompts: list[np.ndarray], heard=None, *, most_tokens: int = 64,
             most_columns: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(text ids with EOS, frames [n, M]): what is written after each prompt, and then spoken."""
    said = reply.answer(lm.speaker(), prompts, stop=reply.ended(lm.vocab), heard=heard,
                        most_columns=most_tokens)
    eos = np.full((1, 1), lm.vocab.specials['eos'], np.int32)
    whole = [np.concatenate([p, x, *([] if x[0, -1] == eos else [eos])], axis=1)
             for p, x in zip(prompts, said, strict=True)]
    if heard is not None:
        heard = [tuple(np.concatenate([x, np.zeros((w.shape[1] - len(x), *x.shape[1:]), x.dtype)])
                       for x in pair) for pair, w in zip(heard, whole, strict=True)]
    frames = say(lm.speaker(), whole, marks(lm.vocab), heard=heard, most_columns=most_columns)
    return [(w[0, p.shape[1]:], f) for p, w, f in zip(prompts, whole, frames, strict=True)]


def refined(lm: trained.LM, grids: list[Grid], *, steps: int, batch: int = 16
            ) -> list[np.ndarray]:
    """Latents [n, W] of the sounds of grids, with what each is given."""
    out = []
    for n, part in enumerate(trained.in_parts(grids, batch)):
        part = [*part, *[part[-1]] * (batch - len(part))]
        there = [g.extra['framed'] > 0 for g in part]
        counts = [int((g.weights[0][t] == 0).sum()) for g, t in zip(part, there, strict=True)]
        out += refine(lm.speaker(), [g.extra['means'][t] for g, t in zip(part, there, strict=True)],
                      [g.extra['frames'][t][:k]
                       for g, t, k in zip(part, there, counts, strict=True)],
                      steps=steps, key=jax.random.fold_in(jax.random.key(0), n))
    return out[:len(grids)]


def distance(said: np.ndarray, true: np.ndarray) -> float:
    """Mean |difference| between frames [S, M] along the best alignment of both (time warping).

    The mean is over the pairs of frames on the way. Nothing said counts as a frame of zeros.
    """
    import librosa
    from scipy.spatial.distance import cdist
    said = said if len(said) else np.zeros_like(true[:1])
    cost = cdist(said, true, 'cityblock') / true.shape[1]
    total, path = librosa.sequence.dtw(C=cost, backtrack=True)
    return float(total[-1, -1] / len(path))


# SPDX-License-Identifier: Apache-2.0
"""Small models, text models and packed batches of random tokens that several tests share."""

import functools
import io
import os
import pathlib

import jax
import ml_collections as mlc
import numpy as np
from flax import nnx

from jaxsd import model

BACKBONES = {       # the kinds of decoder, each with what sets it apart
    'llama': dict(),
    'mistral': dict(window_columns=5, kv_heads=2),
    'qwen2': dict(qkv_bias=True, kv_heads=1),
    'qwen3': dict(qk_norm='head', kv_heads=2, rope_scaling=dict(     # one pair slowed, one blended
        name='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_columns=12)),
    'mixtral': dict(experts=4, experts_per_column=2, kv_heads=2),
    'helium': dict(pairs='interleaved', norm_eps=1e-8, norm_gain='early', window_columns=7),
}


def virtual(devices: int) -> str:
    """XLA_FLAGS of a process with so many devices; of a flag that is given twice the last holds."""
    return f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'


def config(system: str, kind: str = 'llama', **head) -> mlc.ConfigDict:
    """A model of a few thousand parameters: 'flat' or 'tied' (a row), 'streams' (3 codebooks, depth
    loop) or 'parallel' (the same, every row from the hidden state)."""
    c = mlc.ConfigDict()
    c.seed = 0
    many = system in ('streams', 'parallel')
    c.codec = dict(codebooks=3, size=12) if many else dict(codebooks=1, size=20)
    c.vocab = (dict(name='streams', text_tokens=14, predicted=('mine',), multiple=8)
               if many else dict(name='line', text_tokens=14, multiple=8))
    c.columns = 24
    c.frontend = dict(name='summed', dtype='float32')
    c.backbone = dict(name='decoder', width=16, layers=2, heads=4, kv_heads=4, head_dim=4, mlp=24,
                      theta=100.0, remat='none', block_columns=8) | BACKBONES[kind]
    c.head = (dict(name='depth', width=8, layers=2, heads=2, mlp=12) if system == 'streams'
              else dict(name='tied' if system == 'tied' else 'flat')) | head
    c.objective = dict(name='weighted_ce', terms=(
        dict(text=('text',), audio=('mine',)) if many else dict(ce=('tokens',))))
    c.mesh = dict(fsdp=1)
    return c


@functools.cache
def built(system: str, kind: str = 'llama', **head):
    """(config, graph, parameters) with scales large enough that nothing is near zero."""
    c = config(system, kind, **head)
    graph, _, _ = model.abstract(c)
    params = model.init(c, jax.random.key(1))
    return c, graph, jax.tree.map(lambda x: x * 1.3, params)


def batch(c, rows: int = 2, segments: int = 3, columns: int | None = None, seed: int = 0) -> dict:
    """Random packed tokens [B, K, T] with the last columns empty and random weights.

    Beside speech, columns of text alone. Where speech is not aligned, answers of a unit in each
    column. Where an encoder listens, features of a sound in every segment.
    """
    rng = np.random.default_rng(seed)
    v, T = model.make_vocab(c), columns or c.columns
    tokens = np.stack([rng.integers(r.start, r.start + (r.predicted or r.size - 1), (rows, T))
                       for r in v.rows], axis=1).astype(np.int32)
    cuts = np.linspace(0, T - 2, segments + 1).astype(int)
    segment, position = np.zeros((rows, T), np.int32), np.zeros((rows, T), np.int32)
    for i, (a, b) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
        segment[:, a:b], position[:, a:b] = i + 1, np.arange(b - a)
    weights = rng.uniform(0.2, 2.0, tokens.shape).astype(np.float32)
    weights *= np.array([r.predicted > 0 for r in v.rows])[:, None]
    weights[:, :, cuts] = 0         # the first column of a segment, and what is empty
    weights[:, :, cuts[-1]:] = 0
    tokens[:, :, cuts[-1]:] = -1
    if len(v.rows) > 1:             # silence inside, too
        tokens[0, 2, 3:5] = -1
        weights[0, 2, 3:5] = 0
    out = dict(tokens=tokens, weights=weights, position=position, segment=segment)
    if c.vocab.name == 'parallel':
        tokens[:, 1:, cuts] = -1
        tokens[:, 2:] = -1 if 'decoder' in c.head else tokens[:, 2:]
        weights[tokens < 0] = 0
    if 'encoder' in c.frontend:
        out |= dict(feats=rng.normal(size=(rows, T, c.frontend.encoder.features)).astype(
            np.float32), slot=((position > 1) & (position < 5)).astype(np.int32))
    if 'prenet' in c.frontend:
        out['framed'] = (position > 5).astype(np.int32)
        out['frames'] = rng.normal(size=(rows, T, c.frontend.prenet.features)).astype(np.float32)
    if 'latents' in c.head:         # a column of each sound is given
        out['framed'] = (position > 0).astype(np.int32)
        out['weights'][:, 0][position == 1] = 0
        out |= {name: rng.normal(size=(rows, T, c.head.latents)).astype(np.float32)
                for name in ('frames', 'means')}
    return out


def run(graph, params, method, *args):
    return getattr(nnx.merge(graph, params), method)(*args)


SENTENCES = ('the cat sat on the mat', 'a dog sang to the moon', 'she sells sea shells',
             'Numbers 1 2 3, and so on.', 'on and on they sang', 'the sea sat still')
NONSENSE = ('nethas thadlo hesa tagsen onegth', 'doglesh lateh seanond shesthe', 'sthonela')


@functools.cache
def _text_model(algorithm: str, options: tuple) -> bytes:
    import sentencepiece
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5), model_writer=out, model_type=algorithm,
        vocab_size=370, hard_vocab_limit=False, byte_fallback=True, unk_id=4, bos_id=1, eos_id=2,
        pad_id=3, control_symbols=['<epad>'], num_threads=1, minloglevel=2, **dict(options))
    return out.getvalue()


def text_model(folder: pathlib.Path, algorithm: str = 'bpe', **options) -> str:
    """The path of a small sentencepiece model with bytes, written to `folder`."""
    path = folder / 'text.model'
    path.write_bytes(_text_model(algorithm, tuple(options.items())))
    return str(path)

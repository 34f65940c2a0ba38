# SPDX-License-Identifier: Apache-2.0
"""Configs of ours that describe the golden checkpoints, and how a peer's inputs become our columns.

The golden folders hold tiny models of the released implementations with random weights
(tests/peers/make_goldens.py). Shared by the tests that compare with them.
"""

import functools
import pathlib
import re

import jax
import ml_collections as mlc
import numpy as np
from flax import nnx

from jaxsd import generate, model
from jaxsd.layout import duplex
from jaxsd.types import NOTHING

GOLDEN = pathlib.Path(__file__).resolve().parent / 'golden'

ONE_ROW = dict(name='weighted_ce', terms=dict(ce=('tokens',)))
DECODERS = ('llama', 'llama3', 'mistral', 'mixtral', 'qwen2', 'qwen3', 'helium')


def _config(**slots) -> mlc.ConfigDict:
    c = mlc.ConfigDict(dict(seed=0, columns=128, objective=dict(name='weighted_ce'), stages=(),
                            data=dict(), mesh=dict(), evals=dict()))
    c.frontend = dict(name='summed', dtype='float32')
    for name, value in slots.items():
        c[name] = value
    return c


def decoder(name: str, **changes) -> mlc.ConfigDict:
    """The config of the golden of that name in DECODERS. The line is text, markers, units."""
    sizes = dict(
        llama=dict(width=64, heads=4, kv_heads=2, head_dim=16, mlp=112, theta=500.0),
        mistral=dict(width=48, heads=4, kv_heads=1, head_dim=16, mlp=80, theta=2000.0,
                     window_columns=5),
        qwen2=dict(width=64, heads=4, kv_heads=2, head_dim=16, mlp=80, theta=300.0,
                   norm_eps=1e-6, qkv_bias=True),
        llama3=dict(width=48, heads=6, kv_heads=2, head_dim=16, mlp=64, theta=500.0,
                    rope_scaling=dict(name='llama3', factor=8.0, low_freq_factor=1.0,
                                      high_freq_factor=4.0, original_columns=32)),
        qwen3=dict(width=48, heads=4, kv_heads=2, head_dim=16, mlp=64, theta=300.0,
                   norm_eps=1e-6, qk_norm='head'),
        mixtral=dict(width=32, heads=4, kv_heads=2, head_dim=8, mlp=40, theta=400.0,
                     experts=5, experts_per_column=2),
        helium=dict(width=64, heads=4, kv_heads=2, head_dim=16, mlp=80, theta=700.0,
                    pairs='interleaved', norm_eps=1e-8, norm_gain='early'))[name]
    return _config(
        codec=dict(name='kmeans', path='', frame_hz=25.0, size=34, codebooks=1),
        vocab=dict(name='line', text_tokens=60, multiple=32), layout=dict(name='flat.interleave'),
        objective=ONE_ROW,
        backbone=dict(name='decoder', layers=2, remat='none') | sizes | changes,
        head=dict(name='tied' if name in ('qwen2', 'llama3') else 'flat'))


def of_facts(facts: dict) -> mlc.ConfigDict:
    """The config of what `export.decoders.read` says of a peer's config.json."""
    return _config(
        codec=dict(name='kmeans', path='', frame_hz=25.0, size=2, codebooks=1),
        vocab=dict(name='line', text_tokens=facts['vocab.size'] - 4, multiple=1),
        layout=dict(name='flat.interleave'), objective=ONE_ROW, head=dict(name=facts['head.name']),
        backbone=dict(name='decoder', remat='none') | {
            k.split('.')[1]: v for k, v in facts.items() if k.startswith('backbone.')})


def multistream(*, head=None, vocab=None, **changes) -> mlc.ConfigDict:
    """The config of the golden kyutai LMModel."""
    return _config(
        codec=dict(name='rvq', path='', frame_hz=12.5, codebooks=4, size=32),
        vocab=dict(name='streams', text_tokens=48) | (vocab or {}),
        layout=dict(name='duplex.columns', acoustic_delay_columns=1),
        backbone=dict(name='decoder', width=64, layers=2, heads=4, kv_heads=4, head_dim=16,
                      mlp=176, theta=500, pairs='interleaved', window_columns=7, norm_eps=1e-8,
                      norm_gain='early', remat='none') | changes,
        head=dict(name='depth', width=32, layers=2, heads=2, mlp=88) | (head or {}))


def stacked(state: dict) -> dict:
    """A kyutai checkpoint's tensors as published: all steps of a projection in one."""
    out, parts = {}, {}
    for key, value in state.items():
        match = re.fullmatch(r'(.*self_attn\.)(in|out)_projs\.(\d+)\.(.*)', key)
        if match:
            tail = match[4] if match[2] == 'out' or match[4] != 'weight' else 'in_proj_weight'
            name = tail if tail == 'in_proj_weight' else f'{match[2]}_proj.{tail}'
            parts.setdefault(match[1] + name, {})[int(match[3])] = value
        else:
            out[key] = value
    return out | {key: np.concatenate([value[s] for s in range(len(value))])
                  for key, value in parts.items()}


def random_params(config, seed: int, lora: dict | None = None) -> dict:
    """Parameters far from their initial values: gains and biases too, so that none can hide."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        center = 1.0 if 'norm' in str(path) else 0.0
        scale = .06 if 'outs' in str(path) else .25     # behind no norm: logits of a few units
        return (center + scale * rng.standard_normal(leaf.shape)).astype(np.float32)
    return jax.tree_util.tree_map_with_path(draw, model.abstract(config, lora)[1])


def bound(config, params, lora: dict | None = None) -> model.Model:
    """The model of `config` holding `params`."""
    made = nnx.eval_shape(lambda: model.build(config, rngs=nnx.Rngs(0), lora=lora), graph=False)
    graph, state = nnx.split(made, graph=False)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


@functools.partial(jax.jit, static_argnums=(0,))
def _scores(config_key, params, tokens):
    config = config_key.config
    B, _, T = tokens.shape
    batch = dict(tokens=tokens, position=np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
                 segment=np.ones((B, T), np.int32))
    return bound(config, params, config_key.lora).scores(batch)


class _Key:
    """A config as a static argument of jit: equal where the configs are."""

    def __init__(self, config, lora=None):
        from jaxsd.config import to_json
        self.config, self.lora, self.text = config, lora, to_json([config, lora])

    def __hash__(self):
        return hash(self.text)

    def __eq__(self, other):
        return self.text == other.text


def scores(config, params, tokens, lora: dict | None = None) -> list:
    """Logits [B, T, V] per row (None: unpredicted) for the column after each column."""
    out = _scores(_Key(config, lora), params, np.asarray(tokens, np.int32))
    return [None if x is None else np.asarray(x) for x in out]


def loss(config, params, tokens, labels) -> float:
    """What training minimizes when every cell of `labels` [B, T] but -100 counts once."""
    B, T = tokens.shape
    weights = (labels != -100).astype(np.float32)
    weights[:, 0] = 0
    batch = dict(tokens=tokens[:, None], weights=weights[:, None],
                 position=np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
                 segment=np.ones((B, T), np.int32))
    objective = model.objective_of(config)

    @jax.jit
    def terms(params, batch):
        return objective(*bound(config, params)(batch), batch)[0]
    return float(sum(total / weight for total, weight in terms(params, batch).values()))


def late(config) -> tuple[int, ...]:
    return duplex.delays(model.make_vocab(config),
                         text_delay_columns=config.layout.get('text_delay_columns', 0),
                         acoustic_delay_columns=config.layout.acoustic_delay_columns)


def columns_of(config, codes: np.ndarray) -> np.ndarray:
    """The peer's own codes [B, 1 + n_q, T], un-delayed, as columns of our line [B, K, T + 1]."""
    rows = model.make_vocab(config).rows
    start = np.array([row.start for row in rows])[:, None]
    return duplex.delay(np.where(codes < 0, NOTHING, codes + start), model.make_vocab(config),
                        late(config))


def aligned_scores(config, params, codes: np.ndarray, lora: dict | None = None
                   ) -> tuple[np.ndarray, np.ndarray]:
    """(text [B, 1, T, V], audio [B, Q, T, card]) as the peer aligns them: NaN where it masks."""
    T = codes.shape[-1]
    text, *audio = scores(config, params, columns_of(config, codes), lora)
    out = []
    for logits, d in zip(audio, late(config)[1:], strict=True):
        if logits is not None:
            logits = np.concatenate([logits[:, d:T], np.full_like(logits[:, :d], np.nan)], 1)
            out.append(logits)
    return text[:, None, :T], np.stack(out, 1)


def spoken(config, params, heard, lora: dict | None = None) -> np.ndarray:
    """What our streaming engine says greedily while it hears `heard`, as moshi's LMGen gives it.

    heard [B, user rows, steps] -> [B, 1 + own rows, steps - max delay], local ids. LMGen puts the
    frame given at step s into column s (+ its row's delay), so it never sees that of step 0; and
    the last column is only spoken, not heard.
    """
    v, delays = model.make_vocab(config), late(config)
    speaker = _speaker(config, params, lora)
    own = len(v.rows) - heard.shape[1]
    frames = np.concatenate([heard[:, :, 1:], np.zeros_like(heard[:, :, :1])], -1)
    plans = [generate.conversation_plan(v, f, delays) for f in frames]
    said = np.stack(generate.converse(speaker, plans))
    said = duplex.undelay(said, delays)[:, :own, :heard.shape[-1] - max(delays)]
    return said - np.array([row.start for row in v.rows[:own]])[:, None]


def _speaker(config, params, lora: dict | None = None) -> generate.Speaker:
    graph, _, _ = model.abstract(config, lora)
    return generate.ready(graph, params, model.make_vocab(config), {},
                          config.backbone.window_columns)


def continued(config, params, codes, blank, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """What follows `codes` [B, rows, T] greedily while the user's every frame is `blank` [B, Q].

    As transformers gives it: text [B, T + steps] and codes [B, own rows, T + steps - 1], local ids.
    """
    v, delays, prompt = model.make_vocab(config), late(config), codes.shape[-1]
    own = len(v.rows) - blank.shape[1]
    plans = []
    for example, silence in zip(codes, blank, strict=True):
        heard = np.concatenate([example[own:], np.tile(silence[:, None], (1, steps))], 1)
        plan = generate.conversation_plan(v, heard, delays)
        for k, row in enumerate(v.rows[:own]):
            plan[k, 1 + delays[k]:1 + delays[k] + prompt] = example[k] + row.start
        plans.append(plan)
    said = duplex.undelay(np.stack(generate.converse(_speaker(config, params), plans)), delays)
    said = said[:, :own] - np.array([row.start for row in v.rows[:own]])[:, None]
    return said[:, 0], said[:, 1:, :-1]


def scheduled(**changes) -> mlc.ConfigDict:
    """The config of the golden LMModel whose later depth steps share a set of weights."""
    config = multistream(head=dict(width=24, layers=2, heads=3, mlp=66, step_weights=(0, 1, 1),
                                   norm_eps=1e-5),
                         width=32, layers=1, heads=2, kv_heads=2, mlp=84, norm_eps=1e-5,
                         window_columns=9, **changes)
    config.codec = dict(name='rvq', path='', frame_hz=12.5, codebooks=3, size=16)
    config.vocab.text_tokens = 24
    config.layout.acoustic_delay_columns = 2
    return config


LORA = dict(rank=2, scale=2.0)       # of the golden low-rank terms


def in_halves(**changes) -> mlc.ConfigDict:
    """The config of the golden transformers Moshi."""
    config = multistream(head=dict(width=16, layers=2, heads=2, mlp=24) | changes.pop('head', {}),
                         **dict(width=48, heads=3, kv_heads=3, mlp=64, pairs='half') | changes)
    config.codec = dict(name='rvq', path='', frame_hz=12.5, codebooks=3, size=32)
    config.vocab.text_tokens = 40
    return config

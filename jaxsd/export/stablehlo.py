# SPDX-License-Identifier: Apache-2.0
"""Programs that run without this package: scoring, and one streaming step, for any jax process.

`jax.export` artefacts for cpu, cuda and tpu at once, with symbolic batch and length, beside the
weights as safetensors and `signature.json`, which says what goes in and what comes out. Both
programs read columns through the streaming cache, so there is one attention and one depth loop to
trust, and no choice of this machine's platform (how far a scan is unrolled, say) is baked in.
"""

import json
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsd import model
from jaxsd.config import ConfigError
from jaxsd.export import safetensors
from jaxsd.stage import flatten, unflatten
from jaxsd.types import NOTHING, Row, Where

PLATFORMS = ('cpu', 'cuda', 'tpu')
FREE = -2
"""In `plan`: the model chooses this cell."""


def pick_by_noise(logits_BV, noise_B, temperature):
    """int32 [B]: argmax at temperature 0, else the token at which the cumulative probability
    passes `noise_B`, uniform in [0, 1). So the caller draws the random numbers."""
    p = jax.nn.softmax(logits_BV / jnp.maximum(temperature, 1e-6), axis=-1)
    below = jnp.cumsum(p, axis=-1)
    drawn = jnp.sum(below <= noise_B[:, None] * below[:, -1:], axis=-1)
    drawn = jnp.minimum(drawn, logits_BV.shape[-1] - 1)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


def score(lm: model.Model, tokens_BKT, segment_BT, position_BT) -> dict:
    """Logits {row: float32 [B, T, V_row]} for the column after each column, per predicted row.

    A row of a column may be told the column's earlier rows (a depth head is): they are read from
    the next column of `tokens`, and count as nothing after the last.
    """
    B, K, T = tokens_BKT.shape
    cache = lm.backbone.empty_cache(B, T, jnp.dtype(lm.frontend.dtype))
    h_BTD, _ = lm.backbone(lm.frontend({'tokens': tokens_BKT}), Where(position_BT, segment_BT),
                           cache)
    target = jnp.swapaxes(model.next_column(tokens_BKT), 1, 2).reshape(B * T, K)
    out = {}

    def pick(k, logits, key):
        del key
        row = lm.head.rows[k]
        out[row.name] = logits.reshape(B, T, -1)
        return target[:, k] - row.start
    lm.head.sample(h_BTD.reshape(B * T, -1), lm.table, None, pick)
    return out


def advance(lm: model.Model, cache, tokens_BKT, segment_BT, position_BT, plan_BK, noise_BK,
            temperature_K) -> dict:
    """Reads T columns and speaks the next: its column [B, K], each row's logits, the new cache.

    plan_BK: what is known of the next column, FREE where the model chooses.
    """
    h_BTD, cache = lm.backbone(lm.frontend({'tokens': tokens_BKT}), Where(position_BT, segment_BT),
                               cache)
    out = {}

    def pick(k, logits, key):
        del key
        row = lm.head.rows[k]
        out[row.name] = logits
        chosen = pick_by_noise(logits, noise_BK[:, k], temperature_K[k])
        return jnp.where(plan_BK[:, k] == FREE, chosen, plan_BK[:, k] - row.start)
    column = lm.head.sample(h_BTD[:, -1], lm.table, None, pick)
    column = jnp.where(plan_BK == FREE, column, plan_BK).astype(jnp.int32)
    return {'column': column, 'scores': out, 'cache': cache}


def check(config, format: str) -> None:
    """ConfigError for a model that hears or says more than these programs read and keep."""
    for slot, key in (('frontend', 'encoder'), ('frontend', 'prenet'), ('head', 'decoder'),
                      ('head', 'latents')):
        if key in config[slot]:
            made = config[slot][key]
            raise ConfigError(f'{slot}.{key} is {made if isinstance(made, int) else made.name!r}; '
                              f'format {format!r} can only read and speak columns of tokens')


def write(folder: str, config, flat: Mapping, *, shard_bytes: int) -> dict:
    """Writes both programs, the weights and signature.json of a model to `folder`.

    flat: its parameters by path, without low-rank terms. See `runtimes.Runtime`.
    """
    from jax import export as jax_export
    check(config, 'stablehlo')
    graph, _, _ = model.abstract(config)
    rows = model.make_vocab(config).rows
    K = len(rows)
    b, t, c = jax_export.symbolic_shape('b, t, c')
    weights = {path: jax.ShapeDtypeStruct(x.shape, jnp.float32) for path, x in flat.items()}

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def floats(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def bound(weights):
        return nnx.merge(graph, unflatten(weights))

    def empty(weights):
        lm = bound(weights)
        return flatten(lm.backbone.empty_cache(b, c, jnp.dtype(lm.frontend.dtype)))

    def scores(weights, tokens, segment, position):
        return score(bound(weights), tokens, segment, position)

    def step(weights, cache, tokens, segment, position, plan, noise, temperature):
        out = advance(bound(weights), unflatten(cache), tokens, segment, position, plan, noise,
                      temperature)
        return out | {'cache': flatten(out['cache'])}

    columns = dict(tokens=ints(b, K, t), segment=ints(b, t), position=ints(b, t))
    programs = {
        'scores': (scores, dict(weights=weights, **columns)),
        'step': (step, dict(weights=weights, cache=jax.eval_shape(empty, weights), **columns,
                            plan=ints(b, K), noise=floats(b, K), temperature=floats(K)))}
    about = {}
    for name, (fn, arguments) in programs.items():
        made = jax_export.export(jax.jit(fn), platforms=PLATFORMS)(*arguments.values())
        with open(os.path.join(folder, f'{name}.bin'), 'wb') as f:
            f.write(made.serialize())
        returned = jax.tree.unflatten(made.out_tree, made.out_avals)
        about[name] = {
            'file': f'{name}.bin', 'calling_convention': made.calling_convention_version,
            'arguments': [{'name': k, **({'tree': 'every tensor of the weights, by name'}
                                         if k == 'weights' else _said(v))}
                          for k, v in arguments.items()],
            'returns': _said(returned)}
    size = safetensors.write(folder, {path: flat[path].shape for path in sorted(flat)},
                             (flat[path] for path in sorted(flat)), shard_bytes=shard_bytes)
    with open(os.path.join(folder, 'signature.json'), 'w', encoding='utf-8') as f:
        json.dump({'jax': jax.__version__, 'platforms': PLATFORMS,
                   'weights': sorted(n for n in os.listdir(folder) if n.endswith('.safetensors')),
                   'programs': about, 'rows': [row._asdict() for row in rows],
                   'nothing': NOTHING, 'free': FREE,
                   'sizes': {'b': 'sequences', 't': 'columns read at once',
                             'c': 'columns in the cache, at least t; the oldest are overwritten'}},
                  f, indent=1)
        f.write('\n')
    return {'bytes': size, 'tensors': len(flat), 'numbers': size // 4, 'about': card(rows)}


def _said(tree):
    """Shapes and dtypes of a tree, as JSON: sizes are numbers or names."""
    if isinstance(tree, Mapping):
        return {'tree': {k: _said(v) for k, v in tree.items()}}
    return {'shape': [d if isinstance(d, int) else str(d) for d in tree.shape],
            'dtype': str(tree.dtype)}


def card(rows: tuple[Row, ...]) -> str:
    """How to run it, as a paragraph and a program for the model card."""
    spoken = next(row.name for row in rows if row.predicted)
    return f'''two `jax.export` programs for {", ".join(PLATFORMS)}, which need jax and
nothing of the code that trained the model. `signature.json` lists arguments and results. `scores`
gives the logits of the column after each column; `step` reads `t` columns and speaks the next one.
A cell of `plan` is a token that is known or {FREE} where the model chooses: greedily where that
row's `temperature` is 0, else by `noise`, uniform in [0, 1). `segment` is 1 for what is there and 0
for padding; `position` counts a sequence's columns from 0.

```python
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors.numpy import load_file

folder = pathlib.Path('.')
signature = json.loads((folder / 'signature.json').read_text())
weights = {{}}
for name in signature['weights']:
    weights |= load_file(folder / name)
weights = jax.device_put(weights)
scores, step = (export.deserialize(bytearray((folder / f'{{name}}.bin').read_bytes())).call
                for name in ('scores', 'step'))
step = jax.jit(step, donate_argnums=1)


def empty_cache(**sizes):
    arguments = signature['programs']['step']['arguments']
    cache = next(a for a in arguments if a['name'] == 'cache')['tree']
    return {{k: jnp.zeros([sizes.get(n, n) for n in v['shape']], v['dtype'])
            for k, v in cache.items()}}


def speak(prompt, columns):
    """Greedily continues prompt [b, rows, t], by so many columns: [b, rows, columns]."""
    b, rows, t = prompt.shape
    cache, out, read = empty_cache(b=b, c=t + columns), [], prompt
    plan = np.full((b, rows), signature['free'], np.int32)
    noise, temperature = np.zeros((b, rows), np.float32), np.zeros(rows, np.float32)
    for start in [0, *range(t, t + columns - 1)]:
        position = start + np.tile(np.arange(read.shape[2], dtype=np.int32), (b, 1))
        made = step(weights, cache, read, np.ones_like(position), position, plan, noise,
                    temperature)
        cache, read = made['cache'], np.asarray(made['column'])[:, :, None]
        out.append(read)
    return np.concatenate(out, axis=2)
```

`scores(weights, tokens, segment, position)['{spoken}']` are the logits of that row. jax reads such
programs for at least six months after they were made (its compatibility guarantee); the weights are
plain safetensors'''

# SPDX-License-Identifier: Apache-2.0
"""One streaming step as an ONNX program, for onnxruntime and whatever else runs ONNX.

The step of `stablehlo`, translated by jax2onnx: it reads a column and its cache, gives the logits
of the next column's rows, and speaks it; for a depth model that is a frame with all its codebooks.
Sizes are fixed, since jax2onnx does not translate symbolic ones: one sequence, one column at a
time, and a cache of as many columns as the model was trained on. The weights are safetensors, which
the program names as its external data; activations are float32, which onnxruntime has on CPU.
"""

import contextlib
import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsd import model
from jaxsd.config import ConfigError
from jaxsd.export import safetensors, stablehlo
from jaxsd.stage import flatten, unflatten
from jaxsd.types import NOTHING, Row

FILE, OLD, NEW = 'step.onnx', 'cache/', 'new cache/'


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """jax2onnx tells of every optional package that it does not find, with a traceback."""
    loggers = [logging.getLogger(name) for name in ('jax2onnx', 'onnx_ir')]
    levels = [x.level for x in loggers]
    for x in loggers:
        x.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for x, level in zip(loggers, levels, strict=True):
            x.setLevel(level)


@_quiet()
def write(folder: str, config, flat: Mapping, *, shard_bytes: int) -> dict:
    """Writes step.onnx, the weights and signature.json to `folder`. See `runtimes.Runtime`."""
    import jax2onnx
    import onnx_ir
    stablehlo.check(config, 'onnx')
    if config.backbone.get('experts'):
        raise ConfigError("format 'onnx' cannot say backbone.experts: jax2onnx does not translate "
                          'how columns are sorted by expert')
    config = copy.deepcopy(config)
    config.frontend.dtype = 'float32'
    graph, _, _ = model.abstract(config)
    rows, names = model.make_vocab(config).rows, sorted(flat)
    predicted, K = [row.name for row in rows if row.predicted], len(rows)

    def bound(weights):
        return nnx.merge(graph, unflatten(dict(zip(names, weights, strict=True))))

    shapes = [jax.ShapeDtypeStruct(flat[name].shape, jnp.float32) for name in names]
    cache = jax.eval_shape(lambda *weights: flatten(
        bound(weights).backbone.empty_cache(1, config.columns, jnp.float32)), *shapes)
    parts, at = sorted(cache), (len(names), len(names) + len(cache))

    def step(*given):
        held = unflatten(dict(zip(parts, given[at[0]:at[1]], strict=True)))
        out = stablehlo.advance(bound(given[:at[0]]), held, *given[at[1]:])
        now = flatten(out['cache'])
        return out['column'], *(out['scores'][x] for x in predicted), *(now[x] for x in parts)

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    read = dict(tokens=ints(1, K, 1), segment=ints(1, 1), position=ints(1, 1), plan=ints(1, K),
                noise=jax.ShapeDtypeStruct((1, K), jnp.float32),
                temperature=jax.ShapeDtypeStruct((K,), jnp.float32))
    made = jax2onnx.to_onnx(
        step, inputs=[*shapes, *(cache[x] for x in parts), *read.values()], return_mode='ir',
        model_name='step', input_names=[*names, *(OLD + x for x in parts), *read],
        output_names=['column', *(f'scores/{x}' for x in predicted), *(NEW + x for x in parts)])
    size = safetensors.write(folder, {name: flat[name].shape for name in names},
                             (flat[name] for name in names), shard_bytes=shard_bytes)
    where = safetensors.places(folder)
    for value in list(made.graph.inputs):
        if value.name in where:
            file, start, length = where[value.name]
            value.const_value = onnx_ir.ExternalTensor(
                file, start, length, onnx_ir.DataType.FLOAT, shape=value.shape, name=value.name,
                base_dir=folder)
            made.graph.inputs.remove(value)
            made.graph.register_initializer(value)
    onnx_ir.save(made, os.path.join(folder, FILE))
    with open(os.path.join(folder, 'signature.json'), 'w', encoding='utf-8') as f:
        json.dump({'rows': [row._asdict() for row in rows], 'nothing': NOTHING,
                   'free': stablehlo.FREE, 'columns': config.columns}, f, indent=1)
        f.write('\n')
    return {'bytes': size, 'tensors': len(flat), 'numbers': size // 4,
            'about': card(rows, config.columns)}


def card(rows: tuple[Row, ...], columns: int) -> str:
    """How to run it, as a paragraph and a program for the model card."""
    spoken = next(row.name for row in rows if row.predicted)
    return f'''one ONNX program, `{FILE}`, whose weights are the safetensors beside it. It
reads one column (`tokens`: an id per row) and speaks the next, `column`; `scores/{spoken}` and so
on are the logits of its rows. A cell of `plan` is a token that is known or {stablehlo.FREE} where
the model chooses: greedily where that row's `temperature` is 0, else by `noise`, uniform in [0, 1).
`segment` is 1; `position` counts columns from 0; the cache holds {columns} columns, the oldest of
which are overwritten.

```python
import json
import pathlib

import numpy as np
import onnxruntime

folder = pathlib.Path('.')
signature = json.loads((folder / 'signature.json').read_text())
options = onnxruntime.SessionOptions()
options.log_severity_level = 3      # or it warns of every constant that a loop leaves unused
step = onnxruntime.InferenceSession(str(folder / '{FILE}'), options,
                                    providers=['CPUExecutionProvider'])
inputs, outputs = step.get_inputs(), [x.name for x in step.get_outputs()]


def empty_cache():
    kinds = {{'tensor(float)': np.float32, 'tensor(int32)': np.int32}}
    return {{x.name: np.zeros(x.shape, kinds[x.type])
            for x in inputs if x.name.startswith('{OLD}')}}


def read(cache, column, position, plan=None, noise=None, temperature=None):
    """Reads column [rows] and returns (what is spoken next [rows], its logits, the new cache)."""
    rows = len(signature['rows'])
    given = dict(tokens=np.reshape(column, (1, rows, 1)), segment=np.ones((1, 1)),
                 position=np.full((1, 1), position),
                 plan=np.full((1, rows), signature['free']) if plan is None else plan[None])
    given = {{k: np.asarray(v, np.int32) for k, v in given.items()}} | dict(
        noise=np.zeros((1, rows), np.float32) if noise is None else noise[None],
        temperature=np.zeros(rows, np.float32) if temperature is None else temperature)
    given = {{x.name: (given | cache)[x.name] for x in inputs}}
    made = dict(zip(outputs, step.run(None, given), strict=True))
    cache = {{x.removeprefix('new '): made[x] for x in made if x.startswith('{NEW}')}}
    scores = {{x.removeprefix('scores/'): made[x][0] for x in made if x.startswith('scores/')}}
    return made['column'][0], scores, cache


def speak(prompt, columns):
    """Greedily continues prompt [rows, t] by so many columns: [rows, columns]."""
    cache, out = empty_cache(), []
    for position in range(prompt.shape[1] + columns - 1):
        column = prompt[:, position] if position < prompt.shape[1] else out[-1]
        said, scores, cache = read(cache, column, position)
        if position >= prompt.shape[1] - 1:
            out.append(said)
    return np.stack(out, axis=1)
```
'''

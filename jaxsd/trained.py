# SPDX-License-Identifier: Apache-2.0
"""A trained stage, loaded to be asked, and the requests that several verbs make of it.

`generate` knows parameters and plans; here are checkpoints, configs and words.
"""

import dataclasses

import jax
import numpy as np
from flax import nnx

from jaxsd import checkpoint, data, generate, model, nn
from jaxsd import stage as stages
from jaxsd.config import ConfigError
from jaxsd.layout import duplex, flat
from jaxsd.stage import flatten, unflatten
from jaxsd.vocab import Text, Vocab


@dataclasses.dataclass(frozen=True)
class LM:
    """A trained stage, ready to score and to speak."""

    config: object
    stage: stages.Stage
    vocab: Vocab
    graph: nnx.GraphDef
    params: dict
    step: int
    workdir: str

    def speaker(self, samplers: dict | None = None) -> generate.Speaker:
        """Talks for as long as may be: of what was said it keeps the backbone's window, or where it
        has none as much as a row held in training."""
        kept = self.config.backbone.get('window_columns') or self.config.get('columns')
        return generate.ready(self.graph, self.params, self.vocab, samplers or {}, kept)

    def text(self) -> Text:
        if not self.vocab.tokenizer:
            raise ConfigError('this config names no text tokenizer (vocab.tokenizer)')
        return Text(self.vocab.tokenizer)


def load(config, workdir: str, stage_name: str | None = None, *, untrained: bool = False) -> LM:
    """The newest sound checkpoint of a stage, or its model as the config's seed draws it, with
    parameters as a stream reads them.

    Raises CheckpointError or ConfigError.
    """
    stage = stages.find(config, stage_name)
    graph, shapes, axes = model.abstract(config, stage.lora)
    v, dtype = model.make_vocab(config), config.frontend.get('dtype', 'bfloat16')
    if untrained:
        params, step = jax.jit(lambda key: model.init(config, key, stage.lora))(
            jax.random.key(config.seed)), 0
    else:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
                              shapes)
        params, meta = checkpoint.restore_params(checkpoint.folder_of(workdir, stage.name), target)
        data.same_codec(meta['data'], config)
        step = int(meta['step'])
    params = flatten(params)        # held by nobody else: what is replaced is given back
    on_gpu = jax.local_devices()[0].platform == 'gpu'
    _replace(params, flatten(axes), dtype, _inputs(graph, shapes) if on_gpu else {})
    return LM(config, stage, v, graph, unflatten(params), step, workdir)


def streamed(params: dict, axes: dict, dtype='float32') -> dict:
    """Parameters as a stream reads them, of the names of their `axes` (`model.abstract`) and the
    dtype of activations: see `nn.as_read` and `nn.apart`. Whole batches take them as well."""
    flat = flatten(params)
    _replace(flat, flatten(axes), dtype, {})
    return unflatten(flat)


def _replace(flat: dict, axes: dict, dtype, inputs: dict) -> None:
    """One by one and in place, or all would be there twice. Kernels that have a number of `inputs`
    are laid out for it: see `nn.inputs_last`."""
    for path, x in flat.items():
        x = nn.apart(nn.as_read(path, x, dtype), axes[path])
        flat[path] = nn.inputs_last(x, inputs[path]) if path in inputs else x


def _inputs(graph, shapes: dict) -> dict[str, int]:
    """How many input axes each kernel of a model has, by its path."""
    return {'/'.join(map(str, (*path, 'kernel'))): module.n_in
            for path, module in nnx.iter_modules(nnx.merge(graph, shapes))
            if isinstance(module, nn.Dense)}


def prompt(vocab: Vocab, *parts) -> np.ndarray:
    """BOS, then markers (by name) and id arrays, as one row. ConfigError for an unknown marker."""
    for part in parts:
        if isinstance(part, str) and part not in vocab.specials:
            raise ConfigError(f'vocab.markers lacks {part}, which this task is asked with')
    return np.concatenate([[vocab.specials['bos']]] + [
        [vocab.specials[p]] if isinstance(p, str) else np.asarray(p, np.int32) for p in parts])


def markers(config, source: str) -> tuple[str, str]:
    """The two markers of a source that pairs fields: of what is given, of what is asked."""
    layout = data.layout_of(config, source)
    fields = layout.get('fields', ())
    if len(fields) != 2:
        raise ConfigError(f'data.sources.{source} must be drawn by two fields, got {fields}')
    return tuple(layout.get('markers') or (flat.MARKERS[f] for f in fields))


def in_parts(items, size: int = 32):
    for i in range(0, len(items), size):
        yield items[i:i + size]


def transcribe(lm: LM, units: list[np.ndarray], given: str, asked: str,
               most_tokens: int = 48) -> list[str]:
    """What each run-length-free stretch of units (ids on the line) says, written down greedily."""
    text, out = lm.text(), []
    for part in in_parts(units):
        prompts = [prompt(lm.vocab, given, u, asked) for u in part]
        for ids in generate.continue_prompts(lm.speaker(), prompts, lm.vocab, kind='text',
                                             most_tokens=most_tokens):
            out.append(text.decode(ids))
    return out


def read_aloud(lm: LM, texts: list[str], given: str, asked: str, *, most_tokens: int = 200,
               sampler: generate.Sampler = generate.GREEDY, seed: int = 0) -> list[np.ndarray]:
    """Units (ids on the line) of each text, read aloud."""
    text, out = lm.text(), []
    for n, part in enumerate(in_parts(texts)):
        prompts = [prompt(lm.vocab, given, [i for w in t.split() for i in text.encode(w)], asked)
                   for t in part]
        out += generate.continue_prompts(
            lm.speaker({lm.vocab.rows[0].name: sampler}), prompts, lm.vocab, kind='speech',
            most_tokens=most_tokens, key=jax.random.fold_in(jax.random.key(seed), n))
    return out


def unit_frames(config, size: int, limit: int = 200) -> np.ndarray:
    """How many frames each of `size` units is usually held: its mean run in training data, rounded.

    A run-length-free stream has lost its durations; the released systems predict them with a small
    network, and the mean per unit is the plainest predictor.
    """
    runs, frames = np.ones(size), np.ones(size)
    for source in config.data.sources:
        for r in data.examples(config, 'train', source, limit=limit):
            for units in r.units:
                values, ends = flat.runs(units)
                np.add.at(runs, values, 1)
                np.add.at(frames, values, np.diff(ends, prepend=0))
        if runs.max() > 1:          # the first source that has sound is enough
            break
    return np.maximum(1, np.round(frames / runs)).astype(int)


def layout_delays(layout: dict, vocab: Vocab) -> tuple[int, ...]:
    """Each row's delay in columns under the options of a layout."""
    return duplex.delays(vocab, acoustic_delay_columns=layout.get('acoustic_delay_columns', 1),
                         text_delay_columns=layout.get('text_delay_columns', 0))


def words_at(vocab: Vocab, text: Text, row: np.ndarray) -> list[tuple[int, str]]:
    """(first frame, word) of every word in an undelayed text row [T] (ids on the line)."""
    start = vocab.ranges['text'][0]
    quiet = {vocab.specials.get(k) for k in ('pad', 'epad', 'bos', 'eos')}
    words: list[tuple[int, list[int]]] = []
    for t, token in enumerate(row):
        local = int(token) - start
        if token < 0 or local in quiet or local >= text.size:
            continue
        if text.piece(local).startswith('\u2581') or not words:
            words.append((t, []))
        words[-1][1].append(local)
    return [(t, text.decode(ids)) for t, ids in words]

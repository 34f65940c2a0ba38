# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint in the files of another program, and beside them what a reader must know.

That is: which ids are what and of which codec (`vocabulary.json`), where the weights come from and
what they were trained on (`provenance.json`, with the config), how to generate, and a model card.
Tensors are written one by one; in a run of several processes every process hands over its shards
and the first one writes.
"""

import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

import jaxsd
from jaxsd import model, sharding
from jaxsd.codec import fitted
from jaxsd.config import ConfigError, fingerprint, plain, to_json, unknown
from jaxsd.export import rules, runtimes, safetensors, tokens
from jaxsd.export.facts import facts
from jaxsd.export.families import FAMILIES
from jaxsd.export.folder import fresh
from jaxsd.export.streaming import covered, some
from jaxsd.run import on_first_process
from jaxsd.stage import flatten

log = logging.getLogger('jaxsd')

SHARD_BYTES = 4 << 30
SENTENCES = 'tokenizer.model'       # what the text's sentencepiece model is called
FILES = 16          # names of so many are told
DTYPES = {'f32': 'float32', 'bf16': 'bfloat16'}     # of the tensors of a family
STATED = ('bos_token_id', 'eos_token_id', 'pad_token_id')       # ids in a config.json


def save(config, params, out: str, format: str, *, lora_scale: float = 0.0,
         notes: Mapping[str, str] | None = None, history: Mapping | None = None,
         shard_bytes: int = SHARD_BYTES, **options) -> dict:
    """Writes `params` of `config` to the new folder `out` in the files that `format` prescribes.

    config.json, safetensors, generation_config.json, the text tokenizer where the config names one,
    `vocabulary.json`, `provenance.json` and a model card README.md; for a format of `runtimes` its
    own files in place of the first two. params: arrays of the host, or of the devices of one or
    several processes, which then all call this.
    lora_scale: the scale of the stage's low-rank terms, which are folded into the kernels unless
    the format is of the terms alone. notes: further lines of the card, {name: value}. history:
    {'sources', 'stages', 'codec'}, as `runs.history` tells them, and what `loading` tells of the
    checkpoint that the parameters are: 'speaks', how it generates, and 'bundled', what else it
    brings, which both go along unchanged. options: what the format lets its user choose; for a
    family that is dtype, one of DTYPES (f32 if not given), of all tensors but those of a codec that
    goes along. Returns {'bytes', 'tensors', 'files'}. Raises ConfigError for a config that the
    format cannot express, ValueError for parameters of another config and where `out` has
    something in it; then nothing is written.
    """
    notes, history = notes or {}, history or {}
    formats = (*FAMILIES, *runtimes.RUNTIMES)
    if format not in formats:
        raise unknown('format', format, formats)
    if format in runtimes.RUNTIMES:
        return _for_runtime(config, flatten(params), out, format, lora_scale, notes, history,
                            shard_bytes, options)
    family = FAMILIES[format]
    dtype = options.pop('dtype', 'f32')
    if options:
        raise unknown(f'format {format!r}', next(iter(options)), ('dtype',))
    if dtype not in tuple(DTYPES):
        raise unknown('dtype', dtype, DTYPES)
    have = facts(config)
    family.check(have)
    shapes = {path: leaf.shape for path, leaf in flatten(model.abstract(config)[1]).items()}
    ours = fold_lora(flatten(params), lora_scale)
    _same(ours, shapes)
    plan = family.rules(have)
    made = list(rules.pieces(plan.rules, shapes))
    covered(made, shapes, plan.spare)
    tensors = (rules.forward(piece, ours, _take) for piece in made)

    def write():
        spelled, along = family.spell(have), family.along(have)
        if history.get('speaks', {}).get('format') == format and not along:
            stated, along = history.get('bundled', ({}, {}))
            spelled |= stated
        if family.tokenizer and config.vocab.get('tokenizer'):
            spelled[family.tokenizer] = SENTENCES
        generation = (family.generation(have) if family.generation else
                      {**_generation(config, {}), '_from_model_config': True})
        if (speaks := _speaks(config, history)).get('format') == format:
            if 'bos_token_id' in spelled:
                spelled = {k: v for k, v in spelled.items() if k not in STATED} | speaks['config']
            # Without the file transformers goes by config.json, as it did with the original.
            if speaks['file'] is not None or not family.generation:
                generation = speaks['file']
        if 'torch_dtype' in spelled:        # what transformers computes in, unless it is told
            spelled['torch_dtype'] = DTYPES[dtype]
        shapes = {piece.key: piece.shape for piece in made} | {
            key: entry.shape for key, entry in along.items()}
        short = () if dtype == 'f32' else {piece.key for piece in made}
        said = {'numbers': {'f32': 'float32', 'bf16': 'bfloat16, rounded from float32 to the '
                            'nearest (ties to even)'}[dtype]}
        with fresh(out) as folder:
            size = safetensors.write(
                folder, shapes, itertools.chain(tensors, map(safetensors.whole, along.values())),
                shard_bytes=shard_bytes if family.sharded else None, short=short)
            _json(folder, 'config.json', spelled)
            if generation is not None:
                _json(folder, 'generation_config.json', generation)
            numbers = sum(map(math.prod, shapes.values()))
            files = _beside(folder, config, format, about(format, spelled), numbers, said | notes,
                            history)
        return {'bytes': size, 'tensors': len(shapes), 'files': files}
    return _once(write, tensors)


def told(made: Mapping) -> str:
    """What `save` wrote, in words: how much, which files, whose tokenizer."""
    texts = [name for name in made['files'] if name.startswith('token')]
    return (f'{made["tensors"]:,} tensors of {made["bytes"]:,} bytes in {len(made["files"])} files '
            f'({", ".join(made["files"][:FILES])}{", ..." * (len(made["files"]) > FILES)}), '
            + (f'with the text tokenizer {" and ".join(texts)}' if texts else 'no tokenizer'))


def _for_runtime(config, flat, out, format, lora_scale, notes, history, shard_bytes, options
                 ) -> dict:
    """`save` for a format of `runtimes`: its own files, and what every export carries."""
    runtime = runtimes.checked(format, options)
    if runtime.adapts:
        options = options | dict(lora_scale=lora_scale)
    else:
        flat = fold_lora(flat, lora_scale)
    if runtime.speaks:
        options = options | dict(speaks=_unchanged(config, history))
    _same({path: x for path, x in flat.items() if not path.endswith(('/lora_a', '/lora_b'))},
          {path: leaf.shape for path, leaf in flatten(model.abstract(config)[1]).items()})
    flat = {path: _take(x, tuple(slice(0, n) for n in x.shape)) for path, x in flat.items()}

    def write():
        with fresh(out) as folder:
            made = runtime.write(folder, config, flat, shard_bytes=shard_bytes, **options)
            _json(folder, 'generation_config.json', _generation(config, history))
            files = _beside(folder, config, format, made['about'], made['numbers'], notes, history)
        return {'bytes': made['bytes'], 'tensors': made['tensors'], 'files': files}
    return _once(write)


def _generation(config, history: Mapping) -> Mapping:
    """How to generate: in the words of the checkpoint that the parameters are, or our bos and eos.
    """
    if speaks := _speaks(config, history):
        return speaks['file'] if speaks['file'] is not None else speaks['config']
    specials = model.make_vocab(config).specials
    return {'bos_token_id': specials['bos'], 'eos_token_id': specials['eos']}


def _speaks(config, history: Mapping) -> Mapping:
    """`history`'s 'speaks', where bos and eos are still those that the config was read with."""
    speaks = history.get('speaks', {})
    same = speaks and all(config.vocab.get(k) == speaks['vocab'].get(k) for k in ('bos', 'eos'))
    return speaks if same else {}


def _unchanged(config, history: Mapping) -> Mapping:
    """`history`'s 'speaks', where the vocabulary is still all that the config was read with."""
    speaks = history.get('speaks', {})
    return speaks if speaks and speaks['vocab'] == plain(config.vocab) else {}


def _same(ours: Mapping, shapes: Mapping) -> None:
    if {path: tuple(leaf.shape) for path, leaf in ours.items()} != shapes:
        odd = sorted(set(ours) ^ set(shapes)) or [p for p in shapes if ours[p].shape != shapes[p]]
        raise ValueError(f'the parameters are not those of the config: {some(odd)}')


def _once(write: Callable[[], dict], tensors: Iterable = ()) -> dict:
    """What `write` returns, called by the first process; its error, raised by all.

    tensors: what `write` draws from, which the other processes must draw as well. They return {}.
    """
    error: list[BaseException] = []
    done: dict = {}
    if jax.process_index() == 0:
        try:
            done.update(write())
        except (OSError, ValueError) as e:
            error.append(e)
    if jax.process_count() > 1:
        for _ in tensors:       # to the end, whatever happened: the others wait in every gather
            pass

    def verdict() -> int:
        if error:
            raise error[0]
        return done['bytes'] >> 20
    on_first_process(verdict)
    return done


def _take(x, index) -> np.ndarray:
    """Some of an array of the host or of any devices, on the host. All processes call it alike."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x[index])
    start = tuple(np.int32(i.start or 0 if isinstance(i, slice) else i) for i in index)
    size = tuple(len(range(*i.indices(n))) if isinstance(i, slice) else 1
                 for i, n in zip(index, x.shape, strict=True))
    flat = tuple(k for k, i in enumerate(index) if not isinstance(i, slice))
    everywhere = sharding.replicated(x.sharding.mesh)
    picked = jax.jit(lambda x, start: jax.lax.dynamic_slice(x, start, size),
                     out_shardings=everywhere)(x, start)
    return np.asarray(picked.addressable_data(0)).squeeze(flat)


def fold_lora(flat: Mapping[str, object], scale: float) -> dict:
    """Parameters by path with every low-rank term added to its kernel: W + scale A B."""
    out = {}
    for path, leaf in flat.items():
        folder, _, name = path.rpartition('/')
        if name in ('lora_a', 'lora_b'):
            continue
        if name == 'kernel' and f'{folder}/lora_a' in flat:
            if not scale:
                raise ValueError(f'{folder} has a low-rank term: its lora scale is needed')
            a, b, w = (flat[f'{folder}/{x}'] for x in ('lora_a', 'lora_b', 'kernel'))
            lead = a.ndim + b.ndim - 2 - w.ndim         # layer and step axes, which all three share
            letters = [chr(ord('a') + i) for i in range(a.ndim + b.ndim - lead)]
            left, right = letters[:a.ndim], letters[:lead] + letters[a.ndim - 1:][:b.ndim - lead]
            leaf = _folded(f'{"".join(left)},{"".join(right)}->'
                           f'{"".join(left[:-1] + right[lead + 1:])}', a, b, w, scale)
        out[path] = leaf
    return out


def _folded(equation: str, a, b, w, scale: float):
    """w + scale a b, where the arrays are: on the host, or on devices as w is spread there."""
    if not isinstance(w, jax.Array):
        return w + np.float32(scale) * np.einsum(equation, a, b)

    def fold(a, b, w):
        return w + scale * jnp.einsum(equation, a, b, precision='highest')
    return jax.jit(fold, out_shardings=w.sharding)(a, b, w)


def _beside(folder: str, config, format: str, about: str, numbers: int, notes, history
            ) -> list[str]:
    """What every export carries: ids, origin, text tokenizer, card. Returns all file names."""
    vocab = model.make_vocab(config)
    codec = {k: v for k, v in plain(config.codec).items() if k != 'path'}
    _json(folder, 'vocabulary.json',
          {'ranges': {k: {'start': a, 'size': n} for k, (a, n) in vocab.ranges.items()},
           'specials': {k: i for k, i in vocab.specials.items()
                        if k not in _speaks(config, history).get('unstated', ())},
           'size': vocab.size, 'codec': codec})
    _json(folder, 'provenance.json',
          {'jaxsd': jaxsd.__version__, 'format': format, 'fingerprint': fingerprint(config),
           'config': json.loads(to_json(config)), 'codec': history.get('codec') or codec,
           'sources': history.get('sources', []), 'stages': history.get('stages', [])})
    if vocab.tokenizer:
        try:
            shutil.copyfile(vocab.tokenizer, os.path.join(folder, SENTENCES))
        except OSError as e:
            raise ConfigError(f'vocab.tokenizer: cannot copy {vocab.tokenizer}: {e}') from e
    if format == 'hf':
        notes = _tokenizer(folder, config, history) | notes
    copy = _codec(folder, config, history.get('codec', {}))
    with open(os.path.join(folder, 'README.md'), 'w', encoding='utf-8') as f:
        f.write(card(config, format, about, numbers, notes_of(history) | notes, copy))
    return sorted(os.listdir(folder))


def _tokenizer(folder: str, config, history: Mapping) -> dict[str, str]:
    """Writes the tokenizer that transformers loads; what the card says where there is none.

    Where the vocabulary is still that of the checkpoint it came with, its own files go along.
    """
    if files := _unchanged(config, history).get('tokenizer'):
        for path in files:
            try:
                shutil.copyfile(path, os.path.join(folder, os.path.basename(path)))
            except OSError as e:
                raise ConfigError(f'the tokenizer cannot be copied: {e}') from e
        return {}
    if config.vocab.get('tokenizer'):
        tokens.write_tokenizer(folder, model.make_vocab(config), config.columns)
        return {}
    lost = [s for s in history.get('sources', []) if s.get('tokenizer')]
    if not lost:
        return {}
    said = (f'none here: text ids are those of {lost[-1]["tokenizer"]} of {lost[-1]["name"]}; '
            'tokenizers with added tokens are written for sentencepiece models only')
    log.warning('tokenizer: %s', said)
    return {'tokenizer': said}


def notes_of(history: Mapping) -> dict[str, str]:
    """What the model card says of a history: sources and their licenses, codec, data of stages."""
    sources = history.get('sources', [])
    out = {'license of the weights': license_of(sources)}
    for i, source in enumerate(sources):
        out[f'began from{f" ({i + 1})" if i else ""}'] = (
            f'{source["format"]} checkpoint {source["name"]}, license {source["license"]}')
    if codec := history.get('codec'):
        out['codec of the training data'] = ', '.join(f'{k} {v}' for k, v in sorted(codec.items()))
    for stage in history.get('stages', []):
        name = stage['stage']
        out['stage' if stage is history['stages'][-1] else f'earlier stage {name}'] = name
        out['step' if stage is history['stages'][-1] else f'steps of {name}'] = str(stage['step'])
        for source, c in sorted(stage['consumed'].items()):
            out[f'trained on {source} ({name})'] = (
                f'{c["tokens"]:,} tokens, {c["audio_s"] / 3600:.2f} h of audio')
    return out


def license_of(sources: Iterable[Mapping]) -> str:
    """The licenses that the weights' sources state, or that nobody stated any."""
    return ', '.join(dict.fromkeys(source['license'] for source in sources)) or 'not stated'


CARDS = {   # format: (library, what the folder is), for the formats that are families
    'hf': ('transformers', 'a plain `{architecture}`: load it with '
           '`transformers.AutoModelForCausalLM.from_pretrained(folder)`, and its tokenizer, where '
           'it has one, with `AutoTokenizer`. Markers and units are recognized where text spells '
           'them, so take them out of text that strangers write'),
    'kyutai': ('moshi', 'the `LMModel` of the `moshi` package: load it with '
               '`moshi.models.loaders.CheckpointInfo.from_hf_repo("", weights, mimi, tokenizer, '
               '"config.json").get_moshi()`, the three being `pathlib.Path`s of model.safetensors, '
               'a Mimi and the text tokenizer, and the last two being opened only when asked for'),
    'kyutai-hf': ('transformers', 'a `MoshiForConditionalGeneration`: load it with '
                  '`transformers.MoshiForConditionalGeneration.from_pretrained(folder)`, and put '
                  'the codec named below in its `audio_encoder` unless its tensors are in the '
                  'files'),
}


def about(format: str, spelled: Mapping) -> str:
    """What the files of a family are, and what loads them."""
    return CARDS[format][1].format(architecture=spelled.get('architectures', [''])[0])


def _codec(folder: str, config, trained: Mapping) -> str:
    """Copies the fitted codec that the run was `trained` with, if it still lies where it did.

    Into a folder of its own, as servers take every safetensors file beside the weights for weights.
    Returns the copy's name in `folder`, or '' (a released codec is large, and has its own home).
    """
    path = plain(config.codec).get('path', '')
    try:
        if not path or fitted(path).identity['sha256'] != trained.get('sha256'):
            return ''
    except ValueError:
        return ''
    copy = os.path.join('codec', os.path.basename(path))
    os.mkdir(os.path.join(folder, 'codec'))
    shutil.copyfile(path, os.path.join(folder, copy))
    return copy


def card(config, format: str, about: str, numbers: int, notes: Mapping[str, str],
         codec_file: str = '') -> str:
    """The model card: what these files are, what made them, and what runs them.

    about: what follows `This folder is`; numbers: how many parameters; codec_file: the codec's name
    in the folder, if it goes along.
    """
    library = (CARDS[format][0] if format in CARDS else runtimes.RUNTIMES[format].library)
    codec = plain(config.codec) | {'path': codec_file}
    lines = {'format': format, 'config fingerprint': fingerprint(config),
             'codec': ', '.join(f'{k} {v}' for k, v in sorted(codec.items()) if v),
             'parameters': f'{numbers:,}', 'seed': config.seed,
             'license of the weights': 'not stated', **notes}
    stated = lines['license of the weights']
    return '\n'.join([
        '---', f'library_name: {library}',
        *([] if stated == 'not stated' else [f'license: {json.dumps(stated)}']),
        'tags: [speech, jaxsd]', '---', '# A spoken language model', '',
        f'This folder is {about}.', '',
        'It takes and gives no sound: the ids of units and codes (`vocabulary.json` says which are '
        'which) are those of the codec named below, with which they must be made and played.', '',
        '| | |', '|---|---|', *(f'| {k} | {_cell(v)} |' for k, v in lines.items()), ''])


def _cell(value) -> str:
    """`value` in one cell of a table, whatever somebody else's card had in it."""
    return ' '.join(str(value).split()).replace('|', '\\|')


def _json(folder: str, name: str, value: dict) -> None:
    with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
        f.write(json.dumps(value, indent=2, sort_keys=True) + '\n')

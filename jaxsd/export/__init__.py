# SPDX-License-Identifier: Apache-2.0
"""Hands checkpoints to the runtimes people use, and starts from the weights people have.

A format is a family of released checkpoints (see `families`): 'hf', a Hugging Face Llama, Mistral
or Qwen2 that any server loads, 'kyutai', the LMModel of the moshi package, and 'kyutai-hf', the
same as transformers lays it out. One ordered table of rules is read in both directions, so
import(export(x)) is x to the bit. Parameters are a nested dict of arrays in the shapes of
`model.abstract(config)`.
"""

import copy
import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping

import jax
import numpy as np

from jaxsd import checkpoint, data, model
from jaxsd import run as rundir
from jaxsd import stage as stages
from jaxsd.config import ConfigError, fingerprint, plain, unknown
from jaxsd.export import kyutai_lora, rules, safetensors
from jaxsd.export.facts import disagreements, facts
from jaxsd.export.families import FAMILIES, Family
from jaxsd.export.folder import fresh
from jaxsd.stage import flatten, unflatten

log = logging.getLogger('jaxsd')

LORA = 'kyutai-lora'
FORMATS = (*FAMILIES, LORA)
SHARD_BYTES = 4 << 30
LISTED = 8          # how many tensors an error names before it counts the rest


def export_run(config, workdir: str, out: str, format: str, *,
               stage_name: str | None = None) -> dict:
    """Writes the newest checkpoint of a stage (default: the last) of run `workdir` to folder `out`.

    As `save`, with what the ledger says of the stage's training in the model card.
    """
    chosen = stages.find(config, stage_name)
    rundir.same_run(workdir, config)
    params, meta = _restored(config, chosen.lora, checkpoint.folder_of(workdir, chosen.name))
    notes = {'config fingerprint': fingerprint(config), 'stage': chosen.name,
             'step': str(meta['step'])}
    for entry in rundir.read_ledger(workdir):
        if entry.get('stage') == chosen.name and entry.get('consumed_to') == meta['step']:
            for source, c in sorted(entry['consumed'].items()):
                notes[f'trained on {source}'] = (f'{c["tokens"]:,} tokens, '
                                                 f'{c["audio_s"] / 3600:.2f} h of audio')
    tables = format == LORA and kyutai_lora.trains_tables(
        stages.multipliers(chosen, flatten(params)))
    return save(of_stage(config, chosen), params, out, format, notes=notes,
                lora_scale=chosen.lora.get('scale', 0.0), **(dict(tables=True) if tables else {}))


def _restored(config, lora, folder: str):
    """(params, meta) of the newest checkpoint in `folder`, on one device."""
    at = _one_device()
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
                          model.abstract(config, lora)[1])
    return checkpoint.restore_params(folder, target)


def import_run(config, source: str, workdir: str, format: str, *,
               stage_name: str | None = None) -> None:
    """Makes `workdir` a run whose stage (default: the last) stands at step 0 with these weights.

    Every verb accepts it; `train` goes on from there. Where the config's dataset is not at hand,
    only training in this workdir is refused; naming the checkpoint as a stage's `start` is not.
    """
    chosen = stages.find(config, stage_name)
    if bool(chosen.lora) != (format == LORA):
        raise ConfigError(f'stage {chosen.name} adds low-rank terms to earlier weights; import '
                          'into the stage before it with --stage' if chosen.lora else
                          f'stage {chosen.name} has no low-rank terms: name one that has (lora)')
    if os.path.exists(checkpoint.folder_of(workdir, chosen.name)):
        raise ConfigError(f'--workdir {workdir} already has checkpoints of stage {chosen.name}; '
                          'name a new directory')
    if format == LORA:
        found = kyutai_lora.read(of_stage(config, chosen), source,
                                 _adapted(config, chosen, workdir), chosen.lora).items()
    else:
        found = stream(of_stage(config, chosen), source, format)
    params = unflatten({path: jax.device_put(x, _one_device()) for path, x in found})
    by_path = stages.multipliers(chosen, flatten(params))
    opt = jax.jit(stages.optimizer(chosen, by_path).init)(stages.split(params, by_path)[0])
    state = dict(params=params, opt=opt, step=jax.numpy.int32(0), bad_steps=jax.numpy.int32(0),
                 skipped_steps=jax.numpy.int32(0))
    vocab = model.make_vocab(config)
    try:
        marks = data.fingerprint(config, dataclasses.asdict(chosen), vocab)
    except ValueError as e:
        log.warning('training cannot go on in %s until it is imported with the dataset at hand: %s',
                    workdir, e)
        marks = {}
    rundir.open_run(workdir, config)
    rundir.ledger(workdir, dict(event='import', stage=chosen.name, step=0, format=format,
                                source=os.path.abspath(source), fingerprint=fingerprint(config)))
    with checkpoint.Checkpoints(workdir, chosen.name, config=config, keep=chosen.keep) as saved:
        saved.save(0, state, data_state=dict(next_step=0, fingerprint=marks), wait=True)


def _adapted(config, stage, workdir: str) -> dict:
    """The weights by path that a stage adds low-rank terms to: those that it starts from."""
    names = [s.name for s in stages.stages(config)]
    folder = (checkpoint.folder_of(workdir, stage.start) if stage.start in names else stage.start)
    if stage.start == 'init' or not os.path.isdir(folder):
        raise ConfigError(f'stage {stage.name} starts from {stage.start!r}, and there is no '
                          'checkpoint of it; import the model that the terms adapt there first')
    return flatten(_restored(config, None, folder)[0])


def of_stage(config, stage):
    """`config` with the layout that the stage trains with: its delays are part of the weights."""
    if not stage.layout:
        return config
    out = copy.deepcopy(config)
    out.layout = stage.layout
    return out


def _one_device():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def save(config, params, out: str, format: str, *, lora_scale: float = 0.0,
         notes: Mapping[str, str] | None = None, shard_bytes: int = SHARD_BYTES,
         tables: bool = False) -> dict:
    """Writes `params` of `config` to the new folder `out` in the files that `format` prescribes.

    config.json, float32 safetensors, generation_config.json, the text tokenizer where the config
    names one, `vocabulary.json` (which ids are text, markers, units) and a model card README.md.
    lora_scale: the scale of the stage's low-rank terms, which are folded into the kernels, except
    in 'kyutai-lora', which holds the terms alone; there `tables` adds the embeddings. notes:
    further lines of the card, {name: value}. Returns {'bytes', 'tensors', 'files'}.
    Raises ConfigError for a config that the format cannot express, ValueError for parameters of
    another config and where `out` has something in it; then nothing is written.
    """
    if format == LORA:
        return _save_terms(config, flatten(params), out, lora_scale, tables, notes or {})
    family = family_of(format)
    have = facts(config)
    family.check(have)
    shapes = {path: leaf.shape for path, leaf in flatten(model.abstract(config)[1]).items()}
    ours = {path: np.asarray(x) for path, x in fold_lora(flatten(params), lora_scale).items()}
    _same(ours, shapes)
    plan = family.rules(have)
    _covered(plan, shapes)
    spelled = family.spell(have)
    vocab = model.make_vocab(config)
    with fresh(out) as folder:
        made = rules.pieces(plan.rules, shapes)
        keys = []

        def tensors():
            for piece in made:
                keys.append(piece.key)
                yield piece.key, rules.forward(piece, ours)
            for key, tensor in family.along(have).items():
                keys.append(key)
                yield key, tensor

        size = safetensors.write(folder, tensors(),
                                 shard_bytes=shard_bytes if family.sharded else None)
        _json(folder, 'config.json', spelled)
        _json(folder, 'generation_config.json', family.generation(have) if family.generation else
              {'bos_token_id': vocab.specials['bos'], 'eos_token_id': vocab.specials['eos'],
               '_from_model_config': True})
        files = _beside(folder, config, format, about(format, spelled), size // 4, notes or {})
    return {'bytes': size, 'tensors': len(keys), 'files': files}


def _save_terms(config, flat: Mapping, out: str, scale: float, tables: bool,
                notes: Mapping[str, str]) -> dict:
    """`save` of low-rank terms alone."""
    flat = {path: np.asarray(x) for path, x in flat.items()}
    _same({path: x for path, x in flat.items() if not path.endswith(('/lora_a', '/lora_b'))},
          {path: leaf.shape for path, leaf in flatten(model.abstract(config)[1]).items()})
    with fresh(out) as folder:
        made = kyutai_lora.write(folder, config, flat, lora_scale=scale, tables=tables)
        files = _beside(folder, config, LORA, made['about'], made['numbers'], notes)
    return {'bytes': made['bytes'], 'tensors': made['tensors'], 'files': files}


def _beside(folder: str, config, format: str, about: str, numbers: int,
            notes: Mapping[str, str]) -> list[str]:
    """What every export carries: ids, the text tokenizer, the card. Returns all file names."""
    vocab = model.make_vocab(config)
    _json(folder, 'vocabulary.json',
          {'ranges': {k: {'start': a, 'size': n} for k, (a, n) in vocab.ranges.items()},
           'specials': vocab.specials, 'size': vocab.size})
    if vocab.tokenizer:
        try:
            shutil.copyfile(vocab.tokenizer, os.path.join(folder, 'tokenizer.model'))
        except OSError as e:
            raise ConfigError(f'vocab.tokenizer: cannot copy {vocab.tokenizer}: {e}') from e
    with open(os.path.join(folder, 'README.md'), 'w', encoding='utf-8') as f:
        f.write(card(config, format, about, numbers, notes))
    return sorted(os.listdir(folder))


def import_params(config, source: str, format: str) -> dict:
    """The parameters of the checkpoint in folder (or file) `source`, as `config` arranges them.

    Float32 numpy arrays in the shapes of `model.abstract(config)`. The checkpoint's config.json is
    compared with the config first. Raises ConfigError where they disagree, and ValueError naming
    file and key for a damaged file and for missing, unused or misshapen tensors.
    """
    return unflatten(dict(stream(config, source, format)))


def stream(config, source: str, format: str):
    """`import_params`, one (path, array) at a time, so that a caller may place each as it comes."""
    family = family_of(format)
    have = facts(config)
    family.check(have)
    have['checkpoint'] = _agree(family, have, source)
    shapes = {path: leaf.shape for path, leaf in flatten(model.abstract(config)[1]).items()}
    plan = family.rules(have)
    _covered(plan, shapes)
    found = safetensors.entries(source, lambda key: family.dialect(key, have))
    wanted = list(rules.pieces(plan.rules, shapes))
    _matched(source, found, wanted, plan.ignored)
    for path, shape in shapes.items():
        array = np.zeros(shape, np.float32)
        for piece in wanted:
            for section in piece.sections:
                if section.path == path:
                    rows = safetensors.rows(found[piece.key], section.start, section.stop)
                    rules.backward(section, rows, array)
        yield path, array


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
            a, b, w = (np.asarray(flat[f'{folder}/{x}'], np.float32)
                       for x in ('lora_a', 'lora_b', 'kernel'))
            lead = a.ndim + b.ndim - 2 - w.ndim         # layer and step axes, which all three share
            letters = [chr(ord('a') + i) for i in range(a.ndim + b.ndim - lead)]
            left, right = letters[:a.ndim], letters[:lead] + letters[a.ndim - 1:][:b.ndim - lead]
            leaf = w + np.float32(scale) * np.einsum(
                f'{"".join(left)},{"".join(right)}->{"".join(left[:-1] + right[lead + 1:])}', a, b)
        out[path] = leaf
    return out


def about(format: str, spelled: Mapping) -> str:
    """What the files of a family are, and what loads them."""
    return {'hf': f'a plain `{spelled.get("architectures", [""])[0]}`: load it with '
                  '`transformers.AutoModelForCausalLM.from_pretrained(folder)`',
            'kyutai': 'the `LMModel` of the `moshi` package: load it with '
                      '`moshi.models.loaders.get_moshi_lm("model.safetensors", lm_kwargs)`, '
                      'lm_kwargs being config.json',
            'kyutai-hf': 'a `MoshiForConditionalGeneration`: load it with '
                        '`transformers.MoshiForConditionalGeneration.from_pretrained(folder)`, and '
                        'put the codec named below in its `audio_encoder` unless its tensors are '
                        'in the files'}[format]


def card(config, format: str, about: str, numbers: int, notes: Mapping[str, str]) -> str:
    """The model card: what these files are, what made them, and what runs them.

    about: what follows `This folder is`; numbers: how many parameters.
    """
    codec = plain(config.codec)
    lines = {'format': format, 'config fingerprint': fingerprint(config),
             'codec': ', '.join(f'{k} {v}' for k, v in sorted(codec.items())),
             'parameters': f'{numbers:,} (float32)', 'seed': config.seed,
             'license of the weights': 'not stated', **notes}
    return '\n'.join([
        '---', 'library_name: ' + {'hf': 'transformers', 'kyutai': 'moshi',
                                    'kyutai-hf': 'transformers', LORA: 'moshi'}[format],
        'tags: [speech, jaxsd]', '---', '# A spoken language model', '',
        f'This folder is {about}.', '',
        'Sound is not in it: the ids of units and codes (`vocabulary.json` says which are which) '
        'are those of the codec named below, with which they must be made and played.', '',
        '| | |', '|---|---|', *(f'| {k} | {v} |' for k, v in lines.items()), ''])


def family_of(format: str) -> Family:
    if format not in FAMILIES:
        raise unknown('--format', format, FAMILIES)
    return FAMILIES[format]


def _agree(family: Family, have: Mapping, source: str) -> Mapping:
    """The facts of the checkpoint, which are those of the config but for what import leaves out."""
    if not os.path.exists(source):
        raise ValueError(f'--source: no file or folder {source}')
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    path = os.path.join(folder, 'config.json')
    if os.path.exists(path):
        values = safetensors.read_json(path)
    elif family.without_config is not None:
        values, path = family.without_config, f'{source} (which has no config.json)'
    else:
        raise ValueError(f'--source: no {path}')
    said = family.read(values, path)
    if wrong := disagreements(have, family.cut(have, said)):
        raise ConfigError(f'the config is not that of {path}: {"; ".join(wrong)}')
    return said


def _matched(source: str, found: Mapping, wanted, ignored: str) -> None:
    keys = {piece.key for piece in wanted}
    if missing := [piece.key for piece in wanted if piece.key not in found]:
        raise ValueError(f'{source} lacks {_some(missing)}')
    if unused := [k for k in found if k not in keys and not re.fullmatch(ignored, k)]:
        raise ValueError(f'{source} has tensors without a place in the config: {_some(unused)}')
    for piece in wanted:
        entry = found[piece.key]
        if entry.shape != piece.shape:
            raise ValueError(f'{entry.file}: {entry.key} has shape {entry.shape}, '
                             f'the config wants {piece.shape}')


def _same(ours: Mapping, shapes: Mapping) -> None:
    if {path: tuple(leaf.shape) for path, leaf in ours.items()} != shapes:
        odd = sorted(set(ours) ^ set(shapes)) or [p for p in shapes if ours[p].shape != shapes[p]]
        raise ValueError(f'the parameters are not those of the config: {_some(odd)}')


def _covered(plan, shapes: Mapping) -> None:
    """Every number of ours has exactly one place in the peer's files, padding rows apart."""
    size = dict.fromkeys(shapes, 0)
    for piece in rules.pieces(plan.rules, shapes):
        for section in piece.sections:
            size[section.path] += int(np.prod(section.shape))
    short = [p for p, n in size.items() if n != np.prod(shapes[p], dtype=int)
             and p not in plan.spare]
    if short:
        raise ConfigError(f'this format has no place for {_some(short)}')


def _some(keys) -> str:
    keys = list(keys)
    rest = f' and {len(keys) - LISTED} more' if len(keys) > LISTED else ''
    return ', '.join(keys[:LISTED]) + rest


def _json(folder: str, name: str, value: dict) -> None:
    with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
        f.write(json.dumps(value, indent=2, sort_keys=True) + '\n')

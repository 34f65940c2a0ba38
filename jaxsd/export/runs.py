# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other programs and run directories: one becomes the other."""

import dataclasses
import logging
import os
import re

import jax

from jaxsd import checkpoint, data, model, sharding, state
from jaxsd import run as rundir
from jaxsd import stage as stages
from jaxsd.config import ConfigError, fingerprint
from jaxsd.export import runtimes
from jaxsd.export.begin import older_params
from jaxsd.export.loading import open_start, origin_of
from jaxsd.export.streaming import some
from jaxsd.export.write import save
from jaxsd.stage import flatten, of_stage, unflatten

log = logging.getLogger('jaxsd')

ANCESTORS = 64      # stages that a history goes back at most


def export_run(config, workdir: str, out: str, format: str, *,
               stage_name: str | None = None, **options) -> dict:
    """Writes the newest checkpoint of a stage (default: the last) of run `workdir` to folder `out`.

    As `save`, with what the run's ledger tells of where the weights began and of the data they were
    trained on. In a run of several processes all of them call this.
    """
    chosen = stages.find(config, stage_name)
    rundir.same_run(workdir, config, moved=True)
    params, meta = checkpoint.restore_params(checkpoint.folder_of(workdir, chosen.name),
                                             _placed(config, chosen)[1]['params'])
    if format in runtimes.RUNTIMES and runtimes.RUNTIMES[format].adapts:
        if only_adapted(chosen, params, format):
            options = options | dict(tables=True)
    told = history(config, workdir, chosen, meta)
    return save(of_stage(config, chosen), params, out, format, history=told,
                lora_scale=chosen.lora.get('scale', 0.0), **options)


def only_adapted(stage, params, format: str) -> list[str]:
    """The embedding tables that a stage trained besides low-rank terms, as `format` can hold.

    ConfigError where it trained anything else: it would be lost; and where it began from a graft,
    as the weights with its new rows or parts, which the terms adapt, lie in no checkpoint. A stage
    without low-rank terms is for the format itself to refuse.
    """
    if not stage.lora:
        return []
    if stage.graft:
        raise ConfigError(f'stage {stage.name} adapts a start that it grafted itself, and no '
                          f'checkpoint holds the result, so format {format!r} would fit nothing; '
                          'use a format of whole models, which folds the terms')
    moved = [path for path, m in stages.multipliers(stage, flatten(params)).items()
             if m is not None and not path.endswith(('/lora_a', '/lora_b'))]
    lost = [path for path in moved if path not in runtimes.RUNTIMES[format].tables]
    if lost:
        raise ConfigError(f'stage {stage.name} also trained {some(lost)}, which format {format!r} '
                          'does not hold; use a format of whole models, which folds the terms')
    return moved


def import_run(config, source: str, workdir: str, format: str, *,
               stage_name: str | None = None, made: dict | None = None) -> dict:
    """Makes `workdir` a run whose stage (default: the last) stands at step 0 with these weights.

    Every verb accepts it; `train` goes on from there. The stage's `graft` says what may differ. A
    format of low-rank terms fills those of a stage that has them, and the other weights are those
    that the stage starts from. Where the config's dataset is not at hand, only training in this
    workdir is refused; naming the checkpoint as a stage's `start` is not. made: as in `open_run`.
    Returns {'stage': its name, 'trains': whether training can go on here}.
    """
    chosen = stages.find(config, stage_name)
    reads = runtimes.RUNTIMES[format].read if format in runtimes.RUNTIMES else None
    if bool(chosen.lora) != bool(reads):
        raise ConfigError(f'stage {chosen.name} adds low-rank terms to earlier weights; import '
                          'into the stage before it with --stage' if chosen.lora else
                          f'stage {chosen.name} has no low-rank terms; name one with lora')
    if checkpoint.steps(checkpoint.folder_of(workdir, chosen.name)):
        raise ConfigError(f'--workdir {workdir} already has checkpoints of stage {chosen.name}; '
                          'name a new directory')
    _, target, by_path = _placed(config, chosen)
    where = flatten(target['params'])
    if reads:
        begun = older_params(config, chosen, workdir, target)
        if begun.params is None:
            raise ConfigError(f'stage {chosen.name} starts from {chosen.start!r}; low-rank terms '
                              'adapt a model: let it start from one')
        params = reads(of_stage(config, chosen), source, flatten(begun.params), chosen.lora)
        params = {path: jax.device_put(x, where[path].sharding) for path, x in params.items()}
        origins = (*begun.origins, origin_of(source, format))
    else:
        found = open_start(of_stage(config, chosen), f'{format}:{source}', graft=chosen.graft,
                           where=f'stage {chosen.name}',
                           place=stages.place(config, chosen, 'graft'))
        params, origins = found.params(where, jax.random.key(config.seed)), (found.origin,)
    fresh = state.fresh_state(config, chosen, target, by_path, unflatten(params))
    try:
        marks = data.fingerprint(config, dataclasses.asdict(chosen), model.make_vocab(config))
    except ValueError as e:
        log.warning('training cannot go on in %s until it is imported with the dataset at hand: %s',
                    workdir, e)
        marks = None
    # The ledger comes first: nobody may train from random weights where an import was cut short.
    rundir.open_run(workdir, config, dict(
        event='import', stage=chosen.name, step=0, origins=origins, **(
            dict(start=begun.start) if reads else {}),
        source=os.path.abspath(source), fingerprint=fingerprint(config)), made)
    with (rundir.held(workdir), checkpoint.Checkpoints(
            workdir, chosen.name, config=config, keep=chosen.keep) as saved):
        saved.save(0, fresh, data_state=dict(next_step=0, fingerprint=marks or {}), wait=True)
    return dict(stage=chosen.name, trains=marks is not None)


def _placed(config, stage):
    """`abstract_state` on the config's mesh, or on one device where it was made for others."""
    try:
        return state.abstract_state(config, stage, state.mesh_of(config))
    except ValueError:
        if jax.process_count() > 1:
            raise
        return state.abstract_state(config, stage, sharding.make_mesh({}, jax.devices()[:1]))


def history(config, workdir: str, stage, meta) -> dict:
    """Where the weights of a checkpoint began and what they were trained on, oldest first.

    {'sources': [{'format', 'name', 'license'}], 'stages': [{'stage', 'step', 'consumed'}],
    'codec': identity of the codec, if training told it}. Follows the stages' `start` back through
    this run's ledger and those of the runs it names. meta: of the checkpoint.
    """
    sources, told, codec = [], [], dict(meta['data'].get('codec') or {})
    entries, name, step = rundir.read_ledger(workdir), stage.name, meta['step']
    for _ in range(ANCESTORS):
        consumed: dict = {}
        for e in entries:
            if e.get('stage') == name and e.get('consumed_to') == step:
                consumed = e['consumed']
        told.append(dict(stage=name, step=step, consumed=consumed))
        begun = next((e for e in reversed(entries) if e.get('stage') == name
                      and e.get('event') in ('start', 'import')), {})
        sources += begun.get('origins', [])
        before = re.fullmatch(r'step (\d+) of (.+)', begun.get('start', ''))
        if not before:
            break
        name, step = before[2], int(before[1])
        if not any(e.get('stage') == name for e in entries):        # the folder of another run
            workdir = os.path.dirname(os.path.dirname(os.path.abspath(name)))
            name, entries = os.path.basename(name), rundir.read_ledger(workdir)
    return dict(sources=sources, stages=told[::-1],
                codec={k: codec[k] for k in ('name', 'sha256') if k in codec})

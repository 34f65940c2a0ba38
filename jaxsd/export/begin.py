# SPDX-License-Identifier: Apache-2.0
"""What a stage begins with: an earlier stage's weights, or those of another program's checkpoint.

Every function takes the state of ShapeDtypeStructs (`state.abstract_state`) that says which arrays
are wanted and where each lies.
"""

import re
from typing import NamedTuple

import jax

from jaxsd import checkpoint, data, model
from jaxsd import stage as stages
from jaxsd.config import ConfigError
from jaxsd.export.loading import Start, is_foreign, open_start
from jaxsd.stage import Stage, flatten, of_stage, unflatten


class Begun(NamedTuple):
    """Parameters, None for random ones, and what a ledger keeps of where they come from.

    start: in words, such as 'step 100 of first'. origins: the checkpoints of other programs.
    """

    params: dict | None
    start: str
    origins: tuple[dict, ...] = ()


def start_params(config, stage: Stage, workdir: str, target) -> Begun:
    """What `stage` begins with: `older_params`, and low-rank terms that add nothing yet."""
    begun = older_params(config, stage, workdir, target)
    if begun.params is None or not stage.lora:
        return begun
    where = jax.tree.map(lambda x: x.sharding, target['params'])
    fresh = jax.jit(lambda key: model.init(config, key, stage.lora),
                    out_shardings=where)(jax.random.key(config.seed))
    return begun._replace(params=unflatten(flatten(fresh) | flatten(begun.params)))


def older_params(config, stage: Stage, workdir: str, target) -> Begun:
    """The weights that `stage` names as its start, with low-rank terms only where that has some."""
    if (found := foreign(config, stage, workdir)) is not None:
        params = found.params(flatten(older(target)), jax.random.key(config.seed))
        return Begun(unflatten(params), stage.start, (found.origin,))
    if (folder := start_folder(config, stage, workdir)) is not None:
        params, meta = checkpoint.restore_params(folder, held(folder, stage, target))
        data.same_codec(meta['data'], config)
        return Begun(_redrawn(params, config, stage, target), f'step {meta["step"]} of '
                                                              f'{stage.start}')
    return Begun(None, 'init')


def _redrawn(params, config, stage: Stage, target) -> dict:
    """`params` of an earlier stage, those that `graft.fresh` names as the config's seed draws them:
    a text model's rows make room for units. ConfigError for a pattern that names none."""
    flat, fresh = flatten(params), stage.graft.get('fresh', ())
    for pattern in fresh:
        if not any(re.fullmatch(pattern, path) for path in flat):
            raise ConfigError(f'{stages.place(config, stage, "graft")}.fresh: {pattern!r} names no '
                              f'parameter of stage {stage.start}')
    again = [path for path in flat if any(re.fullmatch(p, path) for p in fresh)]
    if not again:
        return params
    where = {path: x.sharding for path, x in flatten(target['params']).items() if path in again}

    def draw(key):
        drawn = flatten(model.init(config, key))
        return {path: drawn[path] for path in again}
    return unflatten(flat | jax.jit(draw, out_shardings=where)(jax.random.key(config.seed)))


def older(target) -> dict:
    """The parameters of `target` that an earlier stage has: all but low-rank terms."""
    return unflatten({p: x for p, x in flatten(target['params']).items()
                      if not _low_rank(p)})


def held(folder: str, stage: Stage, target) -> dict:
    """The parameters of `target` that the checkpoints in `folder` should hold.

    Raises ConfigError where they have low-rank terms and `stage` has none: its model would be
    another one without them.
    """
    if not any(map(_low_rank, checkpoint.read_meta(folder)['leaves'])):
        return older(target)
    if not stage.lora:
        raise ConfigError(f'stage {stage.name} starts from {stage.start!r}, whose checkpoint has '
                          'low-rank terms: give it the same lora (train may freeze them), or '
                          'export that stage, which folds them in, and start from the export')
    return target['params']


def _low_rank(path: str) -> bool:
    return path.rsplit('/', 1)[-1].startswith('lora_')


def foreign(config, stage: Stage, workdir: str) -> Start | None:
    """The checkpoint of another program that `stage` begins with, checked; None if it does not.

    A path that holds one is recognized; 'hf:path' says what it is.
    """
    if (stage.start == 'init' or stage.start in [s.name for s in stages.stages(config)]
            or checkpoint.steps(checkpoint.folder_of(workdir, stage.name))
            or checkpoint.steps(stage.start) or not is_foreign(stage.start)):
        return None
    return open_start(of_stage(config, stage), stage.start, graft=stage.graft,
                      where=f'stage {stage.name} starts from {stage.start}',
                      place=stages.place(config, stage, 'graft'))


def start_folder(config, stage: Stage, workdir: str) -> str | None:
    """The checkpoints that `stage` begins with, if any. ConfigError where they are missing."""
    if stage.start == 'init' or checkpoint.steps(checkpoint.folder_of(workdir, stage.name)):
        return None
    names = [s.name for s in stages.stages(config)]
    folder = (checkpoint.folder_of(workdir, stage.start) if stage.start in names else stage.start)
    if not checkpoint.steps(folder):
        fix = ('train that stage first' if stage.start in names else
               'name a folder of checkpoints, such as RUN/checkpoints/STAGE')
        raise ConfigError(f'stage {stage.name} starts from {stage.start!r}, but there is no '
                          f'checkpoint in {folder}; {fix}')
    return folder

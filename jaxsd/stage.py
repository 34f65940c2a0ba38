# SPDX-License-Identifier: Apache-2.0
"""A stage is an overlay on a config: what is trained, how, from what mixture, starting where.

Systems are trained in stages that freeze some parts and move others at other speeds. `train` is an
ordered list of (regex, multiplier or None): the first regex that matches a parameter's whole path
decides its learning-rate multiplier, None freezes it, and every parameter must be matched.
"""

import copy
import dataclasses
import re
import typing

import jax
import jax.numpy as jnp
import optax

from jaxsd.config import ConfigError, plain, unknown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage. `batch` rows per step are split into `accumulate` microbatches.

    data: weights of the sources of `config.data.sources`, by share of tokens.
    schedule: 'constant', 'cosine' or 'linear' (to final_lr x lr) or 'rsqrt' (as the inverse root
    of the step), after `warmup_steps` linear steps.
    start: 'init', the name of an earlier stage, a path to another run's checkpoints, or one to a
    checkpoint of another program ('hf:PATH', or a path whose format is recognized).
    graft: {}, or in what such a checkpoint may differ from the config: dict(rows, fresh, unused,
    unlike), explained in export/surgery.py. Of an earlier stage's, `fresh` draws anew as well.
    apart: {}, or dict(share, data) with perhaps train: that share of the steps reads the mixture of
    its own `data` and nothing else, with moments of its own and the multipliers of its own `train`
    (it freezes what the stage freezes). Two kinds of batch, two optimizer states, one rate.
    lora: {} or dict(rank, scale): every linear map gets a low-rank second term.
    layout: {} or options that replace those of the config's layout for this stage.
    bad_steps: consecutive non-finite steps (skipped and counted) after which training stops.
    """

    name: str
    steps: int
    batch: int
    data: dict
    lr: float
    schedule: str = 'constant'
    warmup_steps: int = 0
    final_lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    train: tuple = (('.*', 1.0),)
    start: str = 'init'
    graft: dict = dataclasses.field(default_factory=dict)
    apart: dict = dataclasses.field(default_factory=dict)
    lora: dict = dataclasses.field(default_factory=dict)
    layout: dict = dataclasses.field(default_factory=dict)
    accumulate: int = 1
    bad_steps: int = 10
    save_steps: int = 1000
    keep: int = 3
    log_steps: int = 10
    probe_steps: int = 0


SCHEDULES = ('constant', 'cosine', 'linear', 'rsqrt')
PARTS = dict(graft=('rows', 'fresh', 'unused', 'unlike'), lora=('rank', 'scale'),
             apart=('share', 'data', 'train'))
"""The keys of a stage's options that are dicts of their own."""


def stages(config) -> tuple[Stage, ...]:
    """The config's stages, checked. Raises ConfigError naming `stages[i].key`."""
    legal = {f.name: f for f in dataclasses.fields(Stage)}
    required = [n for n, f in legal.items() if f.default is f.default_factory]
    out = []
    for i, options in enumerate(config.stages):
        options = plain(options)
        for key in options:
            if key not in legal:
                raise unknown(f'stages[{i}]', key, legal)
        missing = [k for k in required if k not in options]
        if missing:
            raise ConfigError(f'stages[{i}] needs {", ".join(missing)}')
        for key, value in options.items():
            kind = typing.get_origin(legal[key].type) or legal[key].type
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float
                                                         else kind):
                raise ConfigError(f'stages[{i}].{key} takes {kind.__name__}, got {value!r}')
        stage = Stage(**options)
        for key in ('steps', 'batch', 'accumulate', 'save_steps', 'log_steps', 'keep', 'bad_steps'):
            if getattr(stage, key) < 1:
                raise ConfigError(f'stages[{i}].{key} must be positive, got {getattr(stage, key)}')
        for key in ('warmup_steps', 'probe_steps', 'lr', 'final_lr', 'weight_decay'):
            if not 0 <= getattr(stage, key) < float('inf'):
                raise ConfigError(f'stages[{i}].{key} must be finite and not negative, got '
                                  f'{getattr(stage, key)}')
        if len(stage.betas) != 2 or not all(
                isinstance(b, int | float) and 0 <= b < 1 for b in stage.betas):
            raise ConfigError(f'stages[{i}].betas are two numbers from 0 to below 1, got '
                              f'{stage.betas}')
        for key in ('eps', 'clip'):
            if not 0 < getattr(stage, key) < float('inf'):
                raise ConfigError(f'stages[{i}].{key} must be finite and above 0, got '
                                  f'{getattr(stage, key)}')
        if stage.batch % stage.accumulate:
            raise ConfigError(f'stages[{i}].accumulate {stage.accumulate} must divide '
                              f'stages[{i}].batch {stage.batch}')
        if stage.schedule not in SCHEDULES:
            raise ConfigError(f'stages[{i}].schedule is one of {", ".join(SCHEDULES)}, '
                              f'got {stage.schedule!r}')
        if stage.schedule in ('cosine', 'linear') and stage.warmup_steps >= stage.steps:
            raise ConfigError(f'stages[{i}].warmup_steps {stage.warmup_steps} must be below '
                              f'stages[{i}].steps {stage.steps}; add '
                              f"'--config.stages[{i}].warmup_steps=0'")
        if not re.fullmatch(r'\w[\w.-]*', stage.name):
            raise ConfigError(f'stages[{i}].name {stage.name!r} must be a plain name: it becomes a '
                              'directory')
        if stage.name in (s.name for s in out):
            raise ConfigError(f'stages[{i}].name {stage.name!r} is taken by an earlier stage')
        for field, names in PARTS.items():
            for key in getattr(stage, field):
                if key not in names:
                    raise unknown(f'stages[{i}].{field}', key, names)
        if missing := [k for k in ('rank', 'scale') if stage.lora and k not in stage.lora]:
            raise ConfigError(f'stages[{i}].lora needs {", ".join(missing)}')
        if stage.lora and not (isinstance(stage.lora['rank'], int) and stage.lora['rank'] > 0
                               and isinstance(stage.lora['scale'], int | float)):
            raise ConfigError(f'stages[{i}].lora takes a positive rank and a number as scale, got '
                              f'{stage.lora}')
        if stage.apart and not (isinstance(stage.apart.get('share'), float)
                                and 0 < stage.apart['share'] < 1 and stage.apart.get('data')):
            raise ConfigError(f'stages[{i}].apart needs data and a share of the steps between 0 '
                              f'and 1, got {stage.apart}')
        out.append(stage)
    names = [s.name for s in out]
    for i, stage in enumerate(out):
        if stage.start in names[i:]:
            which = 'the stage itself' if stage.start == stage.name else 'a later stage'
            raise ConfigError(f'stages[{i}].start {stage.start!r} is {which}; name an earlier one')
    if not out:
        raise ConfigError('stages is empty: a config needs at least one')
    return tuple(out)


def find(config, name: str | None) -> Stage:
    """The stage called `name`; the last one for None."""
    every = stages(config)
    if name is None:
        return every[-1]
    for stage in every:
        if stage.name == name:
            return stage
    raise unknown('--stage', name, [s.name for s in every])


def place(config, stage: Stage, key: str) -> str:
    """Where the option `key` of `stage` lies in `config`: 'stages[0].lr'."""
    return f'stages[{[s.name for s in stages(config)].index(stage.name)}].{key}'


def of_stage(config, stage: Stage):
    """`config` with the layout that the stage trains with: its delays are part of the weights."""
    if not stage.layout:
        return config
    out = copy.deepcopy(config)
    out.layout = stage.layout
    return out


def flatten(tree, path: str = '') -> dict:
    """{'a/b/c': leaf} of a nested dict."""
    out = {}
    for key, value in tree.items():
        at = f'{path}/{key}' if path else key
        out |= flatten(value, at) if isinstance(value, dict) else {at: value}
    return out


def unflatten(flat: dict) -> dict:
    """The nested dict of {'a/b/c': leaf}."""
    out: dict = {}
    for path, leaf in flat.items():
        *folders, name = path.split('/')
        at = out
        for folder in folders:
            at = at.setdefault(folder, {})
        at[name] = leaf
    return out


def multipliers(stage: Stage, paths) -> dict[str, float | None]:
    """The learning-rate multiplier of each path, None where frozen. Uncovered paths are errors."""
    try:
        rules = [(re.compile(pattern), None if m is None else float(m))
                 for pattern, m in stage.train]
    except (re.error, TypeError, ValueError) as e:
        raise ConfigError(f'stage {stage.name}: train takes pairs of a regular expression and a '
                          f'multiplier or None: {e}') from None
    out = {}
    for path in paths:
        match = next((m for rule, m in rules if rule.fullmatch(path)), 'none')
        if match == 'none':
            raise ConfigError(f'stage {stage.name}: no rule of train covers {path}; '
                              "end the list with ('.*', 1.) or ('.*', None)")
        out[path] = match
    if all(m is None for m in out.values()):
        raise ConfigError(f'stage {stage.name}: train freezes every parameter')
    return out


def split(params: dict, by_path: dict) -> tuple[dict, dict]:
    """(trainable, frozen) nested dicts."""
    flat = flatten(params)
    return (unflatten({p: x for p, x in flat.items() if by_path[p] is not None}),
            unflatten({p: x for p, x in flat.items() if by_path[p] is None}))


def join(trainable: dict, frozen: dict) -> dict:
    return unflatten(flatten(frozen) | flatten(trainable))


def learning_rate(stage: Stage):
    """step -> learning rate."""
    if stage.schedule == 'cosine':
        return optax.warmup_cosine_decay_schedule(
            0.0 if stage.warmup_steps else stage.lr, stage.lr, stage.warmup_steps, stage.steps,
            end_value=stage.lr * stage.final_lr)
    warm = max(1, stage.warmup_steps)
    after = {'constant': optax.constant_schedule(stage.lr),
             'linear': optax.linear_schedule(stage.lr, stage.lr * stage.final_lr,
                                             stage.steps - stage.warmup_steps),
             # Below 0 it is asked for during warm-up, and not used.
             'rsqrt': lambda step: stage.lr * (warm / (jax.numpy.maximum(step, 0) + warm)) ** 0.5,
             }[stage.schedule]
    if not stage.warmup_steps:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, stage.lr, stage.warmup_steps), after],
                                [stage.warmup_steps])


def optimizer(stage: Stage, by_path: dict) -> optax.GradientTransformation:
    """AdamW on the trainable parameters: clip, moments, decay on all of them, rate, multiplier.

    With `apart`, `update` takes a bool of that name: whether the step is one of those.
    """
    speed = unflatten({p: m for p, m in by_path.items() if m is not None})
    moments = (optax.clip_by_global_norm(stage.clip),
               optax.scale_by_adam(*stage.betas, eps=stage.eps),
               optax.add_decayed_weights(stage.weight_decay))
    rate = optax.scale_by_learning_rate(learning_rate(stage))
    if not stage.apart:
        return optax.chain(*moments, rate, optax.stateless(
            lambda updates, _: jax.tree.map(lambda u, m: u * m, updates, speed)))
    own = multipliers(dataclasses.replace(stage, train=stage.apart.get('train', stage.train)),
                      by_path)
    if {p for p, m in own.items() if m is None} != {p for p, m in by_path.items() if m is None}:
        raise ConfigError(f'stage {stage.name}: apart.train must freeze what train freezes')
    speeds = unflatten({p: (m, own[p]) for p, m in by_path.items() if m is not None})

    def sped(updates, state, params=None, *, apart, **_):
        del params
        return jax.tree.map(lambda u, m: u * jnp.where(apart, m[1], m[0]), updates, speeds), state
    return optax.chain(_either(optax.chain(*moments)), rate, optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), sped))


def _either(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` with two states, of which every update reads and writes one."""
    def init(params):
        return dict(main=inner.init(params), apart=inner.init(params))

    def update(updates, state, params=None, *, apart, **_):
        def choose(a, b):
            return jax.tree.map(lambda x, y: jnp.where(apart, y, x), a, b)
        updates, new = inner.update(updates, choose(state['main'], state['apart']), params)
        return updates, dict(main=choose(new, state['main']), apart=choose(state['apart'], new))
    return optax.GradientTransformationExtraArgs(init, update)

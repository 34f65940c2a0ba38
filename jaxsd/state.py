# SPDX-License-Identifier: Apache-2.0
"""What a step changes: parameters, moments, counters; where each array lies, and step 0 of them.

A state is a plain dict: params (nested dict), opt, step, bad_steps (consecutive) and skipped_steps
(in all).
"""

import jax
import jax.numpy as jnp
import optax

from jaxsd import model, sharding
from jaxsd import stage as stages
from jaxsd.config import ConfigError, plain
from jaxsd.stage import Stage, flatten


def mesh_of(config, devices=None):
    """The mesh that `config.mesh` asks for, of all devices or of these. Raises ConfigError where
    they do not fit it."""
    sizes = {k: v for k, v in plain(config.mesh).items() if k != 'rules'}
    try:
        return sharding.make_mesh(sizes, devices)
    except ValueError as e:
        raise ConfigError(str(e)) from None


def abstract_state(config, stage: Stage, mesh):
    """(graph, state of ShapeDtypeStructs with shardings, by_path): everything but the arrays."""
    graph, shapes, axes = model.abstract(config, stage.lora)
    rules = sharding.rules_of(plain(config.mesh).get('rules', {}))
    placed = sharding.of(shapes, axes, rules, mesh)
    by_path = stages.multipliers(stage, flatten(shapes))
    tx = stages.optimizer(stage, by_path)
    opt = jax.eval_shape(tx.init, stages.split(shapes, by_path)[0])
    whole = sharding.replicated(mesh)
    # Left alone, jit(tx.init) would put every moment on one device.
    opt_placed = optax.tree_utils.tree_map_params(
        tx, lambda _, s: s, opt, stages.split(placed, by_path)[0],
        transform_non_params=lambda _: whole)
    def at(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    state = dict(params=jax.tree.map(at, shapes, placed),
                 opt=jax.tree.map(at, opt, opt_placed))
    for name in ('step', 'bad_steps', 'skipped_steps'):
        state[name] = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return graph, state, by_path


def fresh_state(config, stage: Stage, target, by_path, params=None):
    """A state at step 0, placed as `target` says; from `params` where given (already placed)."""
    where = jax.tree.map(lambda x: x.sharding, target)
    if params is None:
        params = jax.jit(lambda key: model.init(config, key, stage.lora),
                         out_shardings=where['params'])(jax.random.key(config.seed))
    tx = stages.optimizer(stage, by_path)
    opt = jax.jit(lambda p: tx.init(stages.split(p, by_path)[0]),
                  out_shardings=where['opt'])(params)
    zero = lambda: jax.device_put(jnp.int32(0), where['step'])      # noqa: E731
    return dict(params=params, opt=opt, step=zero(), bad_steps=zero(), skipped_steps=zero())

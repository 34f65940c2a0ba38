# SPDX-License-Identifier: Apache-2.0
"""From a guess to what it stands for, along straight lines: conditional flow matching.

x0 is drawn around a guess and x1 is the truth; at time t a sound is (1 - t) x0 + t x1 and moves
with velocity x1 - x0 (arXiv 2210.02747 with its sigma_min 0). A network that learns the mean
velocity at a place and a time carries draws of x0 to draws of x1.
"""

import jax
import jax.numpy as jnp


def between(x0, x1, t):
    """(x, velocity): where a sound is at time `t` on its way from x0 to x1, and how it moves."""
    return (1 - t) * x0 + t * x1, x1 - x0


def follow(velocity, x0, steps: int):
    """x at time 1 from x0 at time 0 along velocity(x, t), in `steps` equal steps (Euler)."""
    def step(x, n):
        return x + velocity(x, n / steps) / steps, None
    return jax.lax.scan(step, x0, jnp.arange(steps))[0]


def clock(t_BT, width: int):
    """Sines and cosines [B, T, width] of a time in 0..1, at frequencies from 1 to 1000 radians."""
    frequency = jnp.geomspace(1.0, 1000.0, width // 2)
    angle = t_BT[..., None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)

# SPDX-License-Identifier: Apache-2.0
"""How rows of a vocabulary begin that a checkpoint does not have: markers, units, codes, padding.

Each takes the array with the kept rows in place (x_VD), which rows of axis 0 are new (new_V) and a
key, and leaves the kept rows as they are, to the bit.
"""

import jax
import jax.numpy as jnp


def zero(x_VD, new_V, key):
    """Zeros: in an output map the score of a new id is then 0."""
    del key
    return jnp.where(new_V[:, None], 0.0, x_VD)


def normal(x_VD, new_V, key, *, sigma: float):
    """Drawn from N(0, sigma^2)."""
    return jnp.where(new_V[:, None], sigma * jax.random.normal(key, x_VD.shape), x_VD)


def mean(x_VD, new_V, key):
    """The mean of the kept rows, so that at first no new id stands out from the old ones."""
    del key
    kept = jnp.where(new_V[:, None], 0.0, x_VD).sum(0) / jnp.maximum((~new_V).sum(), 1)
    return jnp.where(new_V[:, None], kept, x_VD)

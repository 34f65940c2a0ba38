# SPDX-License-Identifier: Apache-2.0
"""Connectionist temporal classification of packed answers against PyTorch's, each answer alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsd import objective

pytestmark = pytest.mark.peers


def test_ctc_and_its_gradient_are_those_of_torch():
    import torch

    rng = np.random.default_rng(0)
    V, blank = 9, 8
    segment = np.array([0, *[1] * 14, 0, *[2] * 9, 0, 0, *[3] * 11, 0])
    unit = np.full(segment.shape, -1)
    targets = [rng.integers(0, blank, n) for n in (6, 9, 4)]
    targets[0][2] = targets[0][1]           # a repeat needs a blank between
    targets[1] = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4])      # nine frames cannot say this
    for s, units in enumerate(targets, start=1):
        unit[np.flatnonzero(segment == s)[:len(units)]] = units
    logits = rng.standard_normal((len(segment), V)).astype(np.float32)

    def ours(logits):
        return -jnp.sum(objective.ctc(jax.nn.log_softmax(logits)[None], jnp.asarray(unit)[None],
                                      jnp.asarray(segment)[None], blank=blank, most_units=12))
    value, grad = jax.value_and_grad(ours)(jnp.asarray(logits))
    torch.set_grad_enabled(True)            # other peers turn it off for all
    x = torch.tensor(logits, requires_grad=True)
    total = sum(torch.nn.functional.ctc_loss(
        torch.log_softmax(x[segment == s], -1)[:, None], torch.tensor(units)[None],
        torch.tensor([int((segment == s).sum())]), torch.tensor([len(units)]), blank=blank,
        reduction='sum', zero_infinity=True) for s, units in enumerate(targets, start=1))
    total.backward()
    np.testing.assert_allclose(value, total.item(), rtol=1e-5)
    np.testing.assert_allclose(grad, x.grad.numpy(), atol=1e-5)

# SPDX-License-Identifier: Apache-2.0
"""How sound that is no token enters: features of a column become a vector of the model's width.

A batch carries `feats` [B, T, F], the features of the columns in which something is heard, and
`slot` [B, T], 0 where nothing is. What they are is the choice of the encoder: log-mel frames for
one that is trained here, the states of a frozen encoder for an adaptor. An encoder is made by
`(width, *, rngs, <options>)` and called as `(feats, slot, where) -> [B, T, width]`.
"""

import jax
from flax import nnx

from jaxsd import nn
from jaxsd.types import check, positive
from jaxsd.within import Within


class Mlp(nnx.Module):
    """Two linear maps with a rectifier between them: the adaptor of arXiv 2409.06666 §3.2.

    features: numbers per column, as of five stacked states of a frozen encoder.
    """

    def __init__(self, width: int, *, rngs, features: int, hidden: int):
        positive('encoder', features=features, hidden=hidden)
        self.up = nn.Dense((features,), (hidden,), ('embed', 'mlp'), rngs=rngs, bias=True)
        self.down = nn.Dense((hidden,), (width,), ('mlp', 'embed'), rngs=rngs, bias=True)
        self.features = features

    def __call__(self, feats_BTF, slot_BT, where):
        del slot_BT, where
        return self.down(jax.nn.relu(self.up(check(feats_BTF, 'BTF', F=self.features))))


class Gated(nnx.Module):
    """A gated feed-forward to the model's width: the adapter of arXiv 2408.16725.

    mean: of the features, about, which is taken from them first.
    """

    def __init__(self, width: int, *, rngs, features: int, hidden: int, mean: float = 0.0):
        positive('encoder', features=features, hidden=hidden)
        self.gate_up = nn.Dense((features,), (2, hidden), ('embed', 'stream', 'mlp'), rngs=rngs)
        self.down = nn.Dense((hidden,), (width,), ('mlp', 'embed'), rngs=rngs)
        self.features, self.mean = features, mean

    def __call__(self, feats_BTF, slot_BT, where):
        del slot_BT, where
        feats_BTF = check(feats_BTF, 'BTF', F=self.features) - self.mean
        return nn.gated(feats_BTF, self.gate_up, self.down)


class Listener(nnx.Module):
    """A transformer that hears all of a question at once, small enough to be trained from nothing.

    Every column sees every other one of its own sound: those of one segment with one number in
    `slot`. inside: the encoder's own width.
    """

    def __init__(self, width: int, *, rngs, features: int, inside: int, layers: int, heads: int,
                 mlp: int):
        positive('encoder', features=features)
        self.up = nn.Dense((features,), (inside,), ('embed', 'mlp'), rngs=rngs, bias=True)
        self.within = Within(rngs=rngs, width=inside, layers=layers, heads=heads, mlp=mlp)
        self.down = nn.Dense((inside,), (width,), ('mlp', 'embed'), rngs=rngs)
        self.features = features

    def __call__(self, feats_BTF, slot_BT, where):
        x = self.up(check(feats_BTF, 'BTF', F=self.features))
        sound = where.segment * 1024 + slot_BT      # 1024 sounds in a segment are more than any
        mask = (sound[:, :, None] == sound[:, None, :]) & (slot_BT[:, None, :] > 0)
        return self.down(self.within(x, mask, where.position))


mlp, gated, listener = Mlp, Gated, Listener

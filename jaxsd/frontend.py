# SPDX-License-Identifier: Apache-2.0
"""How symbols and sound enter: a Batch becomes x_BTD. One table over the vocabulary's line."""

from flax import nnx

from jaxsd import nn
from jaxsd.sharding import Place, anywhere
from jaxsd.types import Sizes, check


class Summed(nnx.Module):
    """The sum over a column's rows of their embeddings; a cell of NOTHING adds exact zeros.

    With one row this is a plain embedding. No scaling, no norm (arXiv 2410.00037 §3.4.2).
    """

    def __init__(self, sizes: Sizes, *, rngs, dtype: str = 'bfloat16'):
        if dtype not in ('float32', 'bfloat16', 'float16'):
            raise ValueError(f"frontend.dtype is 'float32', 'bfloat16' or 'float16', got {dtype!r}")
        self.table = nnx.Param(nn.truncated(rngs.params(), (sizes.vocab, sizes.width), sizes.width),
                               axes=('vocab', 'embed'))
        self.dtype = dtype
        self.rows = len(sizes.rows)

    def __call__(self, batch, place: Place = anywhere):
        tokens_BKT = check(batch['tokens'], 'BKT', K=self.rows)
        return nn.embedded(self.table[...], tokens_BKT, place).astype(self.dtype)


summed = Summed

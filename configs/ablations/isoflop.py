# SPDX-License-Identifier: Apache-2.0
"""Which size is best for a budget of computation? Iso-FLOP profiles of the interleaved demo.

Every width is trained with every budget; a parabola over the logarithm of the size gives the best
one for each, a power law goes through them.
"""


def wide(width: int) -> tuple[str, ...]:
    sizes = dict(width=width, head_dim=width // 4, mlp=16 * (width * 14 // 80))
    return (f'w{width}', *(f'--config.backbone.{k}={n}' for k, n in sizes.items()))


QUESTION = dict(
    question='How should computation be shared out between size and data?',
    base=('configs/spirit_lm.py:demo', '--config.stages[0].warmup_steps=20',
          '--config.stages[0].batch=4', "--config.evals.likelihood.sources=('aligned',)"),
    arms=tuple(wide(width) for width in (24, 40, 64, 112)),
    budget=dict(flops=(5e11, 1e12, 2e12)),
    seeds=(0,),
    metrics=(('likelihood', 'aligned/loss/tokens', 'lower'),),
    law=('likelihood', 'aligned/loss/tokens'),
    items=200,
    limits='Three small budgets, one seed, one learning rate for all widths and a corpus of twelve '
           'hours that is read more than once: the exponents describe this corpus.')

# SPDX-License-Identifier: Apache-2.0
"""Eight codebooks of a frame: at once or each a column later, by flat heads or a depth transformer.

The same floating-point operations for each arm, so the depth transformer takes fewer steps.
"""

DELAYS = (('together', f'--config.layout.late={(0,) * 8}'),
          ('late', f'--config.layout.late={(0, *(1,) * 7)}'),
          ('delayed', f'--config.layout.late={tuple(range(8))}'))
DEPTH = dict(name='depth', width=96, layers=2, heads=2, mlp=256, fraction=0.125)

QUESTION = dict(
    question='Do codebooks need a depth transformer, or do delays do?',
    base=('configs/musicgen.py:demo', '--config.stages[0].warmup_steps=20'),
    arms=(('flat', DELAYS), ('depth', f'--config.head={DEPTH!r}', DELAYS)),
    budget=dict(flops=5e12),
    seeds=(0, 1),
    metrics=(('likelihood', 'sound/loss/audio', 'lower'),
             ('likelihood', 'sound/nats/audio 0', 'shown'),
             ('likelihood', 'sound/nats/audio 7', 'shown')),
    items=200,
    expected=('flat.delayed > flat.together', 'depth.together > flat.together'),
    source='arXiv 2306.05284 (patterns of codebooks) and 2410.00037 (a depth transformer), by '
           'their reasoning; their tables measure what listeners hear',
    limits='Likelihoods of true codes: what a delay costs in latency, and what is heard, are not '
           'in them.')

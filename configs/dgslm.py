# SPDX-License-Identifier: Apache-2.0
"""dGSLM: two speakers' units and nothing else, the textless duplex baseline (arXiv 2203.16502).

One column per unit, one row per speaker. Only edges, where a unit changes, are learned.

  look     python -m jaxsd show     --config configs/dgslm.py:demo --source dialogue
  smoke    python -m jaxsd train    --config configs/dgslm.py:tiny --workdir runs/dgslm_tiny
  demo     python -m jaxsd train    --config configs/dgslm.py:demo --workdir runs/dgslm
  train    python -m jaxsd train    --config configs/dgslm.py --workdir $WORKDIR
Size       not stated by the source; six layers of width 512, one tower where the paper has two.
Evidence   grid drawn by hand (tests/test_layout_duplex.py); trained by us at scale: no. In place of
           two towers with cross-attention both speakers share one column, durations are not
           predicted (a held unit is just said again), and the layers are gated.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False)
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='kmeans', path='', frame_hz=50.0, size=500, codebooks=1)    # HuBERT, Fisher
    c.vocab = dict(name='parallel', text_tokens=0, rows=('mine 0', 'theirs 0'))
    c.columns = 6_144
    c.layout = dict(name='duplex.units', mine='random')
    c.frontend = dict(name='summed')
    c.backbone = dict(name='decoder', width=512, layers=6, heads=8, kv_heads=8, head_dim=64,
                      mlp=1_365, theta=10_000.0)        # 2,048 without gates
    c.head = dict(name='flat')
    c.objective = dict(name='weighted_ce', terms=dict(mine=('mine',), theirs=('theirs',)))
    c.data = dict(path='', sources=dict(dialogue=dict(select=('fisher',))))
    # 18,432 tokens x 16 x 2 a step. The schedule goes on with an inverse square root.
    c.stages = (dict(name='pretrain', steps=250_000, batch=96, lr=5e-4, warmup_steps=20_000,
                     betas=(0.9, 0.98), data=dict(dialogue=1.0)),)
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        c.codec = parts.demo_units()
        c.columns = 512
        # Held units count a little: nothing else says how long one is held.
        c.layout = dict(name='duplex.units', mine='random', weight_held=0.2)
        c.frontend = dict(name='summed', dtype='float32')
        c.backbone = parts.small(c.backbone, width=160, layers=5, heads=4, mlp=448,
                                 block_columns=64)
        c.data = dict(path='', sources=dict(dialogue=dict(select=('dialogue',))))
        parts.demo_answers(c, evals=('dialogue',), stages=[
            ('pretrain', dict(dialogue=1.0), dict(steps=1_000, lr=2e-3, batch=8))])
        c.evals.matched = dict(name='matched', source='dialogue', given='theirs')
        c.evals.turns = parts.turn_taking('dialogue')
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=1, heads=4, mlp=64)
        parts.tiny(c, columns=192)
    return c

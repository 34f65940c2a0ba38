# SPDX-License-Identifier: Apache-2.0
"""UniAudio: one vocabulary, three tokens to a column (arXiv 2310.00704).

After MegaByte (arXiv 2305.07185): a global transformer reads patches of three tokens; a local one
says the tokens of the next patch one after another, each from its own slice of the global output.
Text tokens fill a patch each.

  look     python -m jaxsd show     --config configs/uniaudio.py:demo --source sound
  smoke    python -m jaxsd train    --config configs/uniaudio.py:tiny --workdir runs/tiny
  demo     python -m jaxsd train    --config configs/uniaudio.py:demo --workdir runs/uniaudio
  train    python -m jaxsd train    --config configs/uniaudio.py --workdir $WORKDIR
Size       1 B in the paper, which counts what its other tasks need as well.
Evidence   head by hand and cell by cell (tests/test_head_beside.py). Trained by us at scale: no.
           Layers are rotary and gated where the released code has learned positions and LayerNorm;
           tasks beside speech, and their tokens, are left out.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False)
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='rvq', path='', frame_hz=50.0, codebooks=3, size=1024)
    c.vocab = dict(name='patches', text_tokens=32_000, rows=3, multiple=128)    # not stated: text
    c.columns = 2_048                                       # not stated by the source
    c.layout = dict(name='parallel.prefixed', frame_hz=50.0, late=(0, 0, 0))
    c.frontend = dict(name='grouped', inside=512)
    c.backbone = dict(name='decoder', width=1_536, layers=24, heads=16, kv_heads=16, head_dim=96,
                      mlp=4_096, theta=10_000.0)            # 6,144 without gates
    c.head = dict(name='local', width=1_536, layers=8, heads=16, mlp=4_096)
    c.objective = dict(name='weighted_ce', terms=dict(patch=('patch',)))
    c.data = dict(path='', sources=dict(sound=dict(select=('read',))))
    c.stages = (dict(name='pretrain', steps=500_000, batch=64, lr=1e-4,     # not stated
                     warmup_steps=10_000, data=dict(sound=1.0)),)
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        c.codec = parts.demo_codec()
        c.vocab = dict(name='patches', rows=8, **parts.DEMO_TEXT)
        c.columns = 256
        c.layout = dict(name='parallel.prefixed', frame_hz=12.5, late=(0,) * 8)
        c.frontend = dict(name='grouped', inside=32, dtype='float32')
        c.backbone = parts.small(c.backbone, width=160, layers=6, heads=4, mlp=448,
                                 block_columns=64)
        c.head = dict(name='local', width=96, layers=2, heads=4, mlp=256)
        c.data = dict(path='', sources=dict(sound=dict(select=('story',))))
        parts.demo_answers(c, evals=('sound',), stages=[
            ('pretrain', dict(sound=1.0), dict(steps=1_000, lr=3e-3))])
        c.evals.matched = dict(name='matched', source='sound')
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=64, layers=1, heads=4, mlp=64)
        c.head = dict(name='local', width=16, layers=1, heads=2, mlp=32)
        parts.tiny(c, columns=96)
    return c

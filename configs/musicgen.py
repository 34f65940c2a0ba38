# SPDX-License-Identifier: Apache-2.0
"""MusicGen: four codebooks, each a column later than the one before (arXiv 2306.05284).

A text stands before the sound; the codes of a frame are spread over four columns by the delay
pattern, and every row is said by a head of its own from the same hidden state.

  look     python -m jaxsd show     --config configs/musicgen.py:demo --source sound
  smoke    python -m jaxsd train    --config configs/musicgen.py:tiny --workdir runs/tiny
  demo     python -m jaxsd train    --config configs/musicgen.py:demo --workdir runs/musicgen
  train    python -m jaxsd train    --config configs/musicgen.py --workdir $WORKDIR
Size       1.5 B in the paper, with cross-attention to the text, which is not here.
Evidence   the delay pattern as its paper draws it, and undone (tests/test_layout_parallel.py).
           Trained by us at scale: no. The text is a prefix in place of cross-attention to T5 with
           classifier-free guidance, and layers are rotary and gated, of the same size.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False)
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='rvq', path='', frame_hz=50.0, codebooks=4, size=2048)     # EnCodec 32 kHz
    c.vocab = dict(name='parallel', text_tokens=32_128, rows=parts.rows(4), multiple=128)
    c.columns = 1_664                                       # 30 s, the tail and the text
    c.layout = dict(name='parallel.prefixed', frame_hz=50.0, late=(0, 1, 2, 3))
    c.frontend = dict(name='summed')
    c.backbone = dict(name='decoder', width=1_536, layers=48, heads=24, kv_heads=24, head_dim=64,
                      mlp=4_096, theta=10_000.0)            # 6,144 without gates
    c.head = dict(name='flat')
    c.objective = dict(name='weighted_ce', terms=dict(text=('text',), audio=('audio',)))
    c.data = dict(path='', sources=dict(sound=dict(select=('music',))))
    # D-Adaptation found the rate; how many steps the released models took is not in the paper.
    c.stages = (dict(name='pretrain', steps=1_000_000, batch=192, lr=1e-4, schedule='cosine',
                     warmup_steps=4_000, data=dict(sound=1.0)),)
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        c.codec = parts.demo_codec()
        c.vocab = dict(name='parallel', rows=parts.rows(8), **parts.DEMO_TEXT)
        c.columns = 256
        c.layout = dict(name='parallel.prefixed', frame_hz=12.5, late=tuple(range(8)))
        c.frontend = dict(name='summed', dtype='float32')
        c.backbone = parts.small(c.backbone, width=160, layers=6, heads=4, mlp=448,
                                 block_columns=64, theta=10_000.0)
        c.data = dict(path='', sources=dict(sound=dict(select=('story',))))
        parts.demo_answers(c, evals=('sound',), stages=[
            ('pretrain', dict(sound=1.0), dict(steps=1_000, lr=3e-3))])
        c.evals.matched = dict(name='matched', source='sound')
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=1, heads=4, mlp=64)
        parts.tiny(c, columns=192)
    return c

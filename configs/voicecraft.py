# SPDX-License-Identifier: Apache-2.0
"""VoiceCraft: delayed codebooks of which the first matters most (arXiv 2403.16973).

Phonemes stand before the sound; four codebooks are each a column later than the one before and
weigh 5, 1, 0.5 and 0.1. Spans are taken out of the sound and said at the end, so that editing is
continuing.

  look     python -m jaxsd show     --config configs/voicecraft.py:demo --source sound
  smoke    python -m jaxsd train    --config configs/voicecraft.py:tiny --workdir runs/tiny
  demo     python -m jaxsd train    --config configs/voicecraft.py:demo --workdir runs/voicecraft
  train    python -m jaxsd train    --config configs/voicecraft.py --workdir $WORKDIR
Size       830 M in the paper; heads are linear here, and each table has rows for all codebooks.
Evidence   stretches read back one by one (tests/test_layout_parallel.py). Trained by us at scale:
           no. Heads are linear, layers rotary and gated, of the same size; gaps are ids of every
           row in place of embeddings of a column; words stand in for phonemes in the demo.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg

MARKS = ('end', 'over', 'gap0', 'gap1', 'gap2')


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False)
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='rvq', path='', frame_hz=50.0, codebooks=4, size=2048)     # EnCodec 16 kHz
    weights = (5.0, 1.0, 0.5, 0.1)
    c.vocab = dict(name='parallel', text_tokens=100, rows=parts.rows(4), marks=MARKS, multiple=8)
    c.columns = 1_280                                       # 20 s, the tail and the phonemes
    c.layout = dict(name='parallel.infilled', frame_hz=50.0, late=(0, 1, 2, 3), weights=weights)
    c.frontend = dict(name='summed')
    c.backbone = dict(name='decoder', width=2_048, layers=16, heads=16, kv_heads=16, head_dim=128,
                      mlp=5_461, theta=10_000.0)            # 8,192 without gates
    c.head = dict(name='flat')
    c.objective = dict(name='weighted_ce', terms=dict(text=('text',), audio=('audio',)))
    c.data = dict(path='', sources=dict(sound=dict(select=('read',))))
    # ScaledAdam of rate 0.05 in the paper; batch and rate for AdamW are the project's own.
    c.stages = (dict(name='pretrain', steps=50_000, batch=400, lr=2e-4, schedule='cosine',
                     warmup_steps=1_000, data=dict(sound=1.0)),)
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        c.codec = parts.demo_codec()
        c.vocab = dict(name='parallel', rows=parts.rows(8), marks=MARKS, **parts.DEMO_TEXT)
        c.columns = 256
        c.layout = dict(name='parallel.infilled', frame_hz=12.5, late=tuple(range(8)),
                        longest_frames=20, weights=(*weights, *[0.1] * 4))
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

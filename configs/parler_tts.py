# SPDX-License-Identifier: Apache-2.0
"""Parler-TTS Mini: a transcript read aloud in nine delayed codebooks.

github.com/huggingface/parler-tts. The transcript stands before the sound; nine codebooks are each a
column later than the one before, and every one says once that it is over.

  look     python -m jaxsd show     --config configs/parler_tts.py:demo --source sound
  smoke    python -m jaxsd train    --config configs/parler_tts.py:tiny --workdir runs/tiny
  demo     python -m jaxsd train    --config configs/parler_tts.py:demo --workdir runs/parler_tts
  train    python -m jaxsd train    --config configs/parler_tts.py --workdir $WORKDIR
Size       not stated by the source; the decoder's shapes are the released ones, less its
           cross-attention.
Evidence   grid drawn by hand (tests/golden/layout/parallel_ends.txt). Trained by us at scale: no.
           The frozen encoder of voice descriptions and the cross-attention to it are not here;
           layers are rotary and gated, of the same size.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False)
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='rvq', path='', frame_hz=86.1328125, codebooks=9, size=1024)    # DAC 44 kHz
    c.vocab = dict(name='parallel', text_tokens=32_128, rows=parts.rows(9), marks=('end',), room=64,
                   multiple=128)
    c.columns = 2_816                                       # 30 s, the tail and the text
    c.layout = dict(name='parallel.prefixed', frame_hz=86.1328125, late=tuple(range(9)),
                    end='mark')
    c.frontend = dict(name='summed')
    c.backbone = dict(name='decoder', width=1_024, layers=24, heads=16, kv_heads=16, head_dim=64,
                      mlp=2_730, theta=10_000.0)            # 4,096 without gates
    c.head = dict(name='flat')
    c.objective = dict(name='weighted_ce', terms=dict(text=('text',), audio=('audio',)))
    c.data = dict(path='', sources=dict(sound=dict(select=('read',))))
    # Four epochs; batch and steps are not stated by the source.
    c.stages = (dict(name='pretrain', steps=250_000, batch=192, lr=9.5e-4, warmup_steps=20_000,
                     data=dict(sound=1.0)),)
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        c.codec = parts.demo_codec()
        c.vocab = dict(name='parallel', rows=parts.rows(8), marks=('end',), **parts.DEMO_TEXT)
        c.columns = 256
        c.layout = dict(name='parallel.prefixed', frame_hz=12.5, late=tuple(range(8)), end='mark')
        c.frontend = dict(name='summed', dtype='float32')
        c.backbone = parts.small(c.backbone, width=160, layers=6, heads=4, mlp=448,
                                 block_columns=64, theta=10_000.0)
        c.data = dict(path='', sources=dict(sound=dict(select=('story',))))
        parts.demo_answers(c, evals=('sound',), stages=[
            ('pretrain', dict(sound=1.0), dict(steps=500, lr=3e-3))])
        c.evals.matched = dict(name='matched', source='sound')
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=1, heads=4, mlp=64)
        parts.tiny(c, columns=192)
    return c

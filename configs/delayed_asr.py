# SPDX-License-Identifier: Apache-2.0
"""Kyutai STT: streaming recognition by delay alone (arXiv 2509.08753), the 1B model.

Thirty-two codebooks are heard, one column per 80 ms; the text row says each word half a second
after it begins. No depth transformer: nothing is spoken.

  look     python -m jaxsd show     --config configs/delayed_asr.py:demo --source heard
  smoke    python -m jaxsd train    --config configs/delayed_asr.py:tiny --workdir runs/tiny
  demo     python -m jaxsd train    --config configs/delayed_asr.py:demo --workdir runs/delayed_asr
  train    python -m jaxsd train    --config configs/delayed_asr.py --workdir $WORKDIR
Size       1 B by the name of the released model.
Evidence   grid drawn by hand (tests/golden/layout/duplex_recognition_by_delay.txt). Trained by us
           at scale: no. Delays are those of the released config; sizes of the 1B model are not in
           it and recalled, and how it was trained is not stated by the source.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False)
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='mimi', path='', codebooks=32, frame_hz=12.5, size=2048)
    streams = dict(name='streams', speakers=('theirs',), predicted=())
    c.vocab = dict(text_tokens=8_000, tokenizer='', **streams)
    c.columns = 1_500                                       # not stated by the source
    late = dict(name='duplex.columns', mine='none', theirs=0, text='theirs',
                acoustic_delay_columns=0)
    c.layout = late | dict(text_delay_columns=6)            # 0.5 s
    c.frontend = dict(name='summed')
    c.backbone = parts.helium_7b(width=2_048, layers=16, heads=16, kv_heads=16, mlp=5_632,
                                 theta=100_000.0, window_columns=750)
    c.head = dict(name='flat')
    c.objective = dict(name='weighted_ce', terms=dict(text=('text',)))
    c.data = dict(path='', sources=dict(heard=dict(select=('transcribed',))))
    c.stages = (dict(name='pretrain', steps=500_000, batch=128, lr=2e-4,    # not stated
                     schedule='cosine', warmup_steps=5_000, data=dict(heard=1.0)),)
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        c.codec = parts.demo_codec()
        c.vocab = dict(**streams, **parts.DEMO_TEXT)
        c.columns = 256
        c.layout = late | dict(text_delay_columns=8, weight_pad=0.1, weight_epad=0.3,
                               mask_theirs=0.2)
        c.frontend = dict(name='summed', dtype='float32')
        c.backbone = parts.small(c.backbone, width=160, layers=6, heads=4, mlp=448,
                                 window_columns=250, block_columns=64)
        c.data = dict(path='', sources=dict(
            heard=dict(select=('story',)),
            users=dict(select=('dialogue',), layout=dict(c.layout) | dict(theirs=1))))
        parts.demo_answers(c, evals=('heard',), stages=[
            ('pretrain', dict(heard=0.5, users=0.5), dict(steps=600, lr=3e-3))])
        c.evals.listening = dict(name='listening', source='heard')
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=1, heads=4, mlp=64)
        parts.tiny(c, columns=192)
    return c

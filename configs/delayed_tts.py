# SPDX-License-Identifier: Apache-2.0
"""Kyutai TTS: streaming synthesis by delay alone (arXiv 2509.08753).

The same grid as a dialogue model of one speaker, with all sound two seconds behind the text: what
is to be said is known when it is said. Acoustic codebooks are two columns later still.

  look     python -m jaxsd show     --config configs/delayed_tts.py:demo --source read
  smoke    python -m jaxsd train    --config configs/delayed_tts.py:tiny --workdir runs/tiny
  demo     python -m jaxsd train    --config configs/delayed_tts.py:demo --workdir runs/delayed_tts
  train    python -m jaxsd train    --config configs/delayed_tts.py --workdir $WORKDIR
Size       2 B by the name of the family whose sizes these are.
Evidence   grid drawn by hand (tests/golden/layout/duplex_synthesis_by_delay.txt). Trained by us at
           scale: no. Sizes are those of the released 2-billion family (Hibiki), and how it was
           trained is not stated by the source; voices are not chosen by cross-attention.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False)
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='mimi', path='', codebooks=16, frame_hz=12.5, size=2048)
    streams = dict(name='streams', speakers=('mine',), predicted=('mine',))
    c.vocab = dict(text_tokens=48_000, tokenizer='', **streams)
    c.columns = 1_500                                       # not stated by the source
    # Text is what is given; it is learned a little, so that its pace is.
    late = dict(name='duplex.columns', text_delay_columns=-25, acoustic_delay_columns=2)
    c.layout = dict(late)
    c.frontend = dict(name='summed')
    c.backbone = parts.helium_7b(width=2_560, layers=24, heads=20, kv_heads=20, mlp=7_040,
                                 theta=100_000.0, window_columns=500)   # window: not stated
    # Which codebooks share a depth step's weights: those of the released 2-billion model.
    c.head = dict(name='depth', width=1_024, layers=6, heads=16, mlp=2_816,
                  step_weights=(0, 1, 2, 3, 4, 5, 6, 7, *[8] * 8))
    c.objective = dict(name='weighted_ce', terms=dict(text=('text',), audio=('mine',)))
    c.data = dict(path='', sources=dict(read=dict(select=('transcribed',))))
    c.stages = (dict(name='pretrain', steps=500_000, batch=128, lr=2e-4,    # not stated
                     schedule='cosine', warmup_steps=5_000, data=dict(read=1.0)),)
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        c.codec = parts.demo_codec()
        c.vocab = dict(**streams, **parts.DEMO_TEXT)
        c.columns = 256
        c.layout = late | dict(text_delay_columns=-12, acoustic_delay_columns=1,
                               weight_semantic=20.0, weight_pad=0.1)
        c.frontend = dict(name='summed', dtype='float32')
        c.backbone = parts.small(c.backbone, width=160, layers=6, heads=4, mlp=448,
                                 window_columns=250, block_columns=64)
        c.head = dict(name='depth', width=96, layers=2, heads=2, mlp=256, fraction=0.25)
        c.data = dict(path='', sources=dict(read=dict(select=('story',))))
        parts.demo_answers(c, evals=('read',), stages=[
            ('pretrain', dict(read=1.0), dict(steps=1_000, lr=3e-3))])
        c.evals.matched = dict(name='matched', source='read', given='text')
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=1, heads=4, mlp=64)
        c.head = dict(name='depth', width=16, layers=1, heads=2, mlp=32, fraction=0.5)
        parts.tiny(c, columns=192)
    return c

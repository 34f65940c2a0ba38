# SPDX-License-Identifier: Apache-2.0
"""CSM-1B: text, then frames of 32 codes, learned on a sixteenth of them (Sesame, 2025).

sesame.com/research/crossing_the_uncanny_valley_of_voice. A column is a token of text or a frame of
32 codes. A small decoder says the codes of a frame one after another, and is trained on a random
sixteenth of the frames.

  look     python -m jaxsd show     --config configs/csm.py:demo --source read
  smoke    python -m jaxsd train    --config configs/csm.py:tiny --workdir runs/tiny
  demo     python -m jaxsd train    --config configs/csm.py:demo --workdir runs/csm
  train    python -m jaxsd train    --config configs/csm.py --workdir $WORKDIR
Size       1 B and 100 M are the release's names for the shapes of its two transformers; the tables
           of text and of 32 codebooks come on top.
Evidence   the subsampled loss and gradient are unbiased, exactly and by statistics
           (tests/test_head.py). Trained by us at scale: no. The first codebook is said by the depth
           decoder too (the released model reads it off the backbone, on every frame), the hidden
           state is added to every step, and steps have no rotary positions.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False)
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='mimi', path='', codebooks=32, frame_hz=12.5, size=2048)
    c.vocab = dict(name='parallel', text_tokens=128_256, bos=128_000, eos=128_001, pad=128_001,
                   rows=parts.rows(32), marks=('end',), room=3, multiple=128)
    c.columns = 2_048
    c.layout = dict(name='parallel.prefixed', frame_hz=12.5, late=(0,) * 32, end='mark')
    c.frontend = dict(name='summed')
    # Llama-3.2 shapes of 1 billion and 100 million (torchtune's builders in the released code).
    c.backbone = dict(name='decoder', width=2_048, layers=16, heads=32, kv_heads=8, head_dim=64,
                      mlp=8_192, theta=500_000.0, rope_scaling=parts.llama3_scaling(32.0))
    c.head = dict(name='depth', width=1_024, layers=4, heads=8, mlp=8_192, step_weights='shared',
                  norm_gain='late', norm_eps=1e-5, fraction=1 / 16)
    c.objective = dict(name='weighted_ce', terms=dict(text=('text',), audio=('audio',)))
    c.data = dict(path='', sources=dict(read=dict(select=('transcribed',))))
    # Five epochs over a million hours; batch, rate and steps are not stated by the source.
    c.stages = (dict(name='pretrain', steps=500_000, batch=128, lr=2e-4, schedule='cosine',
                     warmup_steps=5_000, data=dict(read=1.0)),)
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        c.codec = parts.demo_codec()
        c.vocab = dict(name='parallel', rows=parts.rows(8), marks=('end',), **parts.DEMO_TEXT)
        c.columns = 256
        c.layout = dict(name='parallel.prefixed', frame_hz=12.5, late=(0,) * 8, end='mark')
        c.frontend = dict(name='summed', dtype='float32')
        c.backbone = parts.small(c.backbone, width=160, layers=6, heads=4, mlp=448,
                                 block_columns=64, theta=10_000.0, rope_scaling='none')
        c.head = dict(name='depth', width=96, layers=2, heads=2, mlp=256, step_weights='shared',
                      fraction=1 / 16)
        c.data = dict(path='', sources=dict(read=dict(select=('story',))))
        parts.demo_answers(c, evals=('read',), stages=[
            ('pretrain', dict(read=1.0), dict(steps=1_000, lr=3e-3))])
        c.evals.matched = dict(name='matched', source='read')
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=1, heads=4, mlp=64)
        c.head = dict(name='depth', width=16, layers=1, heads=2, mlp=32, step_weights='shared',
                      fraction=1 / 4)
        parts.tiny(c, columns=96)
    return c

# SPDX-License-Identifier: Apache-2.0
"""MiMo-Audio in kind: four frames of eight codebooks to one position.

github.com/XiaomiMiMo/MiMo-Audio. A patch of four frames enters through a small encoder as one
vector of the language model, and is said by a small decoder, cell after cell. Text and speech share
one sequence.

  look     python -m jaxsd show     --config configs/mimo_audio.py:demo --source tts
  smoke    python -m jaxsd train    --config configs/mimo_audio.py:tiny --workdir runs/tiny
  demo     python -m jaxsd train    --config configs/mimo_audio.py:demo --workdir runs/mimo_audio
  train    python -m jaxsd train    --config configs/mimo_audio.py --workdir $WORKDIR
Size       7 B by the name of the released model, whose shapes are recalled here.
Evidence   grid drawn by hand (tests/golden/layout/parallel_groups.txt), encoder by hand
           (tests/test_head_beside.py). Trained by us at scale: no. All codebooks have the size of
           the first, and the patch decoder says its 32 cells in order in place of eight delayed
           rows over four steps; sizes are recalled, training is not stated by the source.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False)
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='rvq', path='', frame_hz=25.0, codebooks=8, size=1024)
    marks = dict(turns=8, marks=('pad',), text_marks=('open', 'speech', 'close'))
    c.vocab = dict(name='parallel', text_tokens=151_680, bos=151_643, eos=151_645, pad=151_643,
                   rows=parts.rows(32), **marks)
    c.columns = 8_192
    c.layout = grouped(25.0, 'speech', 'speech')
    c.frontend = dict(name='grouped', steps=4, inside=1_024, layers=6, heads=64, mlp=2_730)
    c.backbone = dict(name='decoder', width=4_096, layers=36, heads=32, kv_heads=8, head_dim=128,
                      mlp=11_008, theta=640_000.0, qkv_bias=True)
    c.head = dict(name='depth', width=1_024, layers=16, heads=64, mlp=2_730, norm_gain='late',
                  norm_eps=1e-5, step_weights='shared')
    c.objective = dict(name='weighted_ce', terms=dict(text=('text',), audio=('audio',)))
    c.data = dict(path='', sources=sources(25.0, ('read',), ('dialogues',)))
    speaks = ('head/(inputs|tables|text_table|blocks|outs)/?.*',)
    c.stages = (        # first to understand, with the text alone scored; then to speak, too
        dict(name='understand', steps=100_000, batch=512, lr=2e-4, warmup_steps=1_000,
             data=dict(asr=1.0), train=((speaks[0], None), ('.*', 1.0))),
        dict(name='speak', steps=100_000, batch=512, lr=2e-4, warmup_steps=1_000,
             start='understand', data=dict(asr=0.3, tts=0.3, s2s=0.4)))
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        c.codec = parts.demo_codec()
        c.vocab = dict(name='parallel', rows=parts.rows(16), **marks, **parts.DEMO_TEXT)
        c.columns = 256
        c.layout = grouped(12.5, 'speech', 'speech')
        c.frontend = dict(name='grouped', steps=2, inside=64, layers=1, heads=4, mlp=176,
                          dtype='float32')
        c.backbone = parts.small(c.backbone, width=160, layers=6, heads=4, mlp=448,
                                 block_columns=64, theta=10_000.0)
        c.head = dict(name='depth', width=96, layers=2, heads=2, mlp=256, step_weights='shared',
                      fraction=0.25)
        c.data = dict(path='', sources=sources(12.5, ('story',), ('dialogue',)))
        parts.demo_answers(c, evals=('tts', 'asr'), stages=[
            ('understand', dict(asr=1.0), dict(steps=400, lr=3e-3,
                                               train=((speaks[0], None), ('.*', 1.0)))),
            ('speak', dict(asr=0.3, tts=0.4, s2s=0.3), dict(steps=600, lr=2e-3))])
        c.evals.asr = dict(name='replies', source='asr')
        c.evals.tts = dict(name='matched', source='tts')
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=1, heads=4, mlp=64)
        c.frontend = dict(name='grouped', steps=2, inside=16, layers=1, heads=2, mlp=32,
                          dtype='float32')
        c.head = dict(name='depth', width=16, layers=1, heads=2, mlp=32, step_weights='shared',
                      fraction=0.25)
        parts.tiny(c, columns=128)
    return c


def grouped(hz: float, *fields, **options) -> dict:
    return dict(name='parallel.grouped', kind='codes', frame_hz=hz, fields=fields) | options


def sources(hz: float, read, talk) -> dict:
    return dict(s2s=dict(select=talk, layout=grouped(hz, 'speech', 'speech')),
                asr=dict(select=read, layout=grouped(hz, 'speech', 'text', task='same')),
                tts=dict(select=read, layout=grouped(hz, 'text', 'speech', task='same')))

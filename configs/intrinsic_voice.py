# SPDX-License-Identifier: Apache-2.0
"""IntrinsicVoice: one position of the language model speaks five units at once (arXiv 2410.08035).

A spoken stretch is `<sosp> <speech> ... <eosp>` among ordinary text; each <speech> carries a group
of five units, entered as one vector and predicted by a small transformer with learned queries.

  look     python -m jaxsd show     --config configs/intrinsic_voice.py:demo --source s2s
  smoke    python -m jaxsd train    --config configs/intrinsic_voice.py:tiny --workdir runs/iv_tiny
  demo     python -m jaxsd train    --config configs/intrinsic_voice.py:demo --workdir runs/iv
  train    python -m jaxsd train    --config configs/intrinsic_voice.py --workdir $WORKDIR
Size       7 B in the paper: Qwen2-7B, and a group model whose size is not stated by the source.
Evidence   grid drawn by hand (tests/golden/layout/parallel_groups.txt), head by hand and cell by
           cell (tests/test_head_beside.py). Trained by us at scale: no. The paper's text was not at
           hand; sizes of the group model are the project's own.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False, group=5)
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='kmeans', path='', frame_hz=25.0, size=500, codebooks=1)    # mHuBERT
    marks = dict(turns=1, marks=('pad',), text_marks=('open', 'speech', 'close'),
                 rows=parts.rows(arg.group))
    c.vocab = dict(name='parallel', text_tokens=151_936, bos=151_643, eos=151_645, pad=151_643,
                   **marks)
    c.columns = 1_200
    c.layout = grouped('speech', 'speech')
    c.frontend = dict(name='grouped', inside=512)           # not stated by the source
    c.backbone = parts.qwen2_7b()
    c.head = dict(name='group', width=1_024, layers=4, heads=16, mlp=2_816)     # not stated
    c.objective = dict(name='weighted_ce', terms=dict(text=('text',), audio=('audio',)))
    c.data = dict(path='', sources=sources(('read',), ('dialogues',), ('text_qa',)))
    # 4 epochs of about 500,000. Whether low-rank terms were trained is not stated by the source.
    common = dict(batch=256, lr=1.5e-4, schedule='cosine', warmup_steps=200)
    c.stages = (
        dict(name='align', steps=8_000, data=dict(asr=1.0, tts=1.0), **common),
        dict(name='converse', steps=8_000, start='align', data=dict(
            s2s=1.0, s2t=1.0, t2s=1.0, t2t=1.0, asr=0.5, tts=0.5), **common))
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        c.codec = parts.demo_units()
        c.vocab = dict(name='parallel', **marks, **parts.DEMO_TEXT)
        c.columns = 256
        c.frontend = dict(name='grouped', inside=48, dtype='float32')
        c.backbone = parts.small(c.backbone, width=160, layers=6, heads=4, mlp=448,
                                 block_columns=64, theta=10_000.0)
        c.head = dict(name='group', width=96, layers=1, heads=4, mlp=256)
        c.data = dict(path='', sources=sources(('story', 'dialogue'), ('dialogue',),
                                               ('exchange',)))
        parts.demo_answers(c, evals=('s2s', 'tts'), stages=[
            ('align', dict(asr=0.5, tts=0.5), dict(steps=420, lr=3e-3)),
            ('converse', dict(s2s=0.2, s2t=0.3, t2s=0.1, t2t=0.15, asr=0.1, tts=0.15),
             dict(steps=420, lr=2e-3))])
        c.evals.replies = dict(name='replies', source='s2t')
        c.evals.tts = dict(name='replies', source='tts', listener='asr', temperature=1.0)
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=1, heads=4, mlp=64)
        c.head = dict(name='group', width=32, layers=1, heads=4, mlp=64)
        parts.tiny(c, columns=192)
    return c


def grouped(*fields, **options) -> dict:
    return dict(name='parallel.grouped', fields=fields) | options


def sources(read, talk, written) -> dict:
    """A question and an answer, each spoken or written; recognition and synthesis."""
    tasks = {f'{a[0]}2{b[0]}': (a, b) for a in ('speech', 'text') for b in ('speech', 'text')}
    out = {name: dict(select=written if name == 't2t' else talk, layout=grouped(*fields))
           for name, fields in tasks.items()}
    return out | dict(asr=dict(select=read, layout=grouped('speech', 'text', task='same')),
                      tts=dict(select=read, layout=grouped('text', 'speech', task='same')))

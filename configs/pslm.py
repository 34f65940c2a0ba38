# SPDX-License-Identifier: Apache-2.0
"""PSLM: text and speech in parallel, units dealt out over several streams (arXiv 2406.12428).

A question and its answer, each as a text beside its units; with S streams unit j stands in stream
j mod S, so that speech takes S times fewer steps.

  look     python -m jaxsd show     --config configs/pslm.py:demo --source dialogue
  smoke    python -m jaxsd train    --config configs/pslm.py:tiny --workdir runs/pslm_tiny
  demo     python -m jaxsd train    --config configs/pslm.py:demo --workdir runs/pslm
  train    python -m jaxsd train    --config configs/pslm.py --workdir $WORKDIR
Size       7 B in the paper: nekomata-7b, which is Qwen-7B, with rows for two streams of units.
Evidence   grid drawn by hand (tests/golden/layout/parallel_dealt.txt); trained by us at scale: no.
           The paper's text was not at hand: sizes of the base model apart, training options are the
           project's own. The question is recognized outside, as in the paper.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False, streams=2)
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='kmeans', path='', frame_hz=50.0, size=512, codebooks=1)    # HuBERT, ja
    marks = dict(marks=('end', 'pad'), text_marks=('eos', 'pad'), rows=parts.rows(arg.streams))
    c.vocab = dict(name='parallel', text_tokens=151_936, multiple=128, **marks)
    c.columns = 2_048                                       # not stated by the source
    c.layout = dict(name='parallel.together', frame_hz=50.0)
    c.frontend = dict(name='summed')
    # nekomata-7b, which is Qwen-7B (its config.json): 11,008 is half of what that file counts.
    c.backbone = dict(name='decoder', width=4096, layers=32, heads=32, kv_heads=32, head_dim=128,
                      mlp=11_008, theta=10_000.0, norm_eps=1e-6, qkv_bias=True)
    c.head = dict(name='flat')
    # Streams are pooled: each weighs 1 / S, so that more of them do not drown the text.
    c.objective = dict(name='weighted_ce', terms=dict(text=('text',), audio=('audio',)))
    c.data = dict(path='', sources=dict(dialogue=dict(select=('spoken_qa',))))
    c.stages = (dict(name='finetune', steps=10_000, batch=64, lr=1e-5,  # not stated by the source
                     schedule='cosine', warmup_steps=500, data=dict(dialogue=1.0)),)
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        c.codec = parts.demo_units()
        c.vocab = dict(name='parallel', **marks, **parts.DEMO_TEXT)
        c.columns = 256
        c.layout = dict(name='parallel.together', frame_hz=25.0)
        c.frontend = dict(name='summed', dtype='float32')
        c.backbone = parts.small(c.backbone, width=160, layers=6, heads=4, mlp=448,
                                 block_columns=64)
        c.data = dict(path='', sources=dict(
            dialogue=dict(select=('dialogue',)), stories=dict(select=('story',)),
            written=dict(select=('exchange',))))
        parts.demo_answers(c, evals=('dialogue',), stages=[
            ('learn', dict(stories=0.5, dialogue=0.3, written=0.2), dict(steps=500, lr=3e-3)),
            ('finetune', dict(dialogue=0.8, written=0.2), dict(steps=700, lr=2e-3))])
        c.evals.replies = dict(name='replies', source='dialogue')
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=1, heads=4, mlp=64)
        parts.tiny(c, columns=192)
    return c

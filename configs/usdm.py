# SPDX-License-Identifier: Apache-2.0
"""USDM: segments of text and speech that continue or correspond, then dialogues (arXiv 2402.05706).

A text model learns from utterances cut into segments of about ten seconds. Each is written or
spoken by a coin's toss and may be said again in the other modality; a token says whether a segment
goes on from the last thing or repeats it. Fine-tuning writes down what the user said, answers in
text and then speaks the answer. Units keep their repeats, which carry prosody.

  look     python -m jaxsd show     --config configs/usdm.py:demo --source aligned
  smoke    python -m jaxsd train    --config configs/usdm.py:tiny --workdir runs/usdm_tiny
  demo     python -m jaxsd train    --config configs/usdm.py:demo --workdir runs/usdm
  train    python -m jaxsd train    --config configs/usdm.py --stage pretrain --workdir $WORKDIR
Size       7 B in the paper: Mistral 7B and 10,002 rows in both tables; the released one has one
           more, for padding.
Evidence   the layout's relations against the paper's statistics (tests/test_layout_spans.py) and
           both grids against hand-drawn ones. Trained by us at scale: no. The number of steps is
           not stated by the source; the released table has one more row, a padding token.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg

RELATIONS = ('<|continue|>', '<|correspond|>')
# Wording ours; the released preamble is one sentence as well.
FIELDS = dict(preamble='Below is a conversation between a user and an agent. Continue it.',
              user='### User', agent='### Agent')
# The user's transcript and its newline, the agent's answer and what closes it are learned.
TURN = (('field', 'user', 0), ('mark', 'newline', 0), ('speech', 'theirs', 0),
        ('mark', RELATIONS[1], 0), ('text', 'theirs'), ('mark', 'newline'),
        ('field', 'agent', 0), ('mark', 'newline', 0), ('text', 'mine'), ('mark', RELATIONS[1]),
        ('speech', 'mine'), ('mark', 'space'), ('mark', 'newline', 0))


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False)
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='kmeans', path='', frame_hz=50.0, size=10_000, codebooks=1)
    c.vocab = dict(name='line', text_tokens=32_000, tokenizer='', markers=RELATIONS,
                   names=dict(newline=13, space=28_705), unit='<|unit{}|>', multiple=1)
    c.columns = 8192                                            # about 160 s of speech
    c.layout = dict(name='flat.interleave', level='segment', segment_s=10.0,
                    spans=dict(name='coin', share=0.5), again=0.5, relations=RELATIONS,
                    unit_hz=50.0, dedup=False, end='eos')
    c.frontend = dict(name='summed')
    c.backbone = parts.mistral_7b()
    c.head = dict(name='flat')
    c.objective = dict(name='weighted_ce', terms=dict(tokens=('tokens',)))
    # DailyTalk, one exchange at a time, each speaker in turn being the user.
    answer = dict(name='template.chain', over='exchange', mine='random', unit_hz=50.0, dedup=False,
                  opening=(('field', 'preamble', 0), *[('mark', 'newline', 0)] * 2), parts=TURN,
                  end='eos')
    c.data = dict(path='', sources=dict(
        aligned=dict(select=('mls', 'gigaspeech', 'voxpopuli', 'peoples_speech', 'commonvoice')),
        dialogue=dict(select=('dailytalk',), fields=FIELDS, layout=answer)))
    steps = 2_000       # not stated by the source: about an epoch of 87,000 h
    c.stages = (
        dict(name='pretrain', steps=steps, batch=1024, lr=2e-5, schedule='cosine',
             warmup_steps=round(0.03 * steps), final_lr=0.0, betas=(0.9, 0.95), weight_decay=0.01,
             data=dict(aligned=1.0), graft=dict(rows=dict(name='normal', sigma=0.02))),
        dict(name='dialogue', steps=500, batch=64, lr=2e-5,     # steps and batch: not stated
             schedule='cosine', warmup_steps=15, final_lr=0.0, weight_decay=0.01,
             data=dict(dialogue=1.0), start='pretrain'))
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        demo(c)
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=2, heads=4, mlp=64)
        parts.tiny(c, columns=256)
    return c


def demo(c) -> None:
    """The system on stories of a few seconds, in segments of one and a half, and on dialogues."""
    c.codec = parts.demo_units()
    c.vocab = dict(name='line', markers=(*RELATIONS, 'newline', 'space'), **parts.DEMO_TEXT)
    c.columns = 384
    near = dict(unit_hz=25.0)
    c.layout = dict(c.layout) | near | dict(segment_s=1.5)
    c.frontend = dict(name='summed', dtype='float32')
    c.backbone = parts.demo_decoder(c.backbone, window_columns=None)
    # The recorded system has one voice and always answers.
    answer = dict(c.data.sources.dialogue.layout) | near | dict(mine=0, opening=())
    c.data = dict(path=parts.DEMO, sources=dict(
        aligned=dict(select=('story',)),
        dialogue=dict(select=('dialogue',), fields=dict(user='user', agent='agent'),
                      layout=answer)))
    c.stages = (parts.demo_stage('pretrain', 500, dict(aligned=1.0)),
                parts.demo_stage('dialogue', 300, dict(dialogue=1.0), start='pretrain', lr=2e-3))
    c.evals = dict(likelihood=dict(name='likelihood', sources=('aligned', 'dialogue')),
                   exchanges=dict(name='exchanges', source='dialogue'))

# SPDX-License-Identifier: Apache-2.0
"""AudioPaLM: one decoder for speech and text, told in words what to do (arXiv 2306.12925).

A sample opens with its task in plain text, as in `[ASR French]`; what is given follows, and what is
asked is learned. A combined task asks for the transcript, its translation and the translation
spoken, in one go.

  look     python -m jaxsd show     --config configs/audiopalm.py:demo --source answer
  smoke    python -m jaxsd train    --config configs/audiopalm.py:tiny --workdir runs/audiopalm_tiny
  demo     python -m jaxsd train    --config configs/audiopalm.py:demo --workdir runs/audiopalm
  train    python -m jaxsd train    --config configs/audiopalm.py --workdir $WORKDIR
Size       8 B in the paper: PaLM 8B (8.63 B with its table of 256,000 rows) and a row for each of
           1,024 units.
Evidence   the grids against hand-drawn ones. Trained by us at scale: no. Departures: PaLM 8B's size
           in this project's sequential blocks; AdamW where the paper has Adafactor; no dropout (0.1
           in the paper). Steps, batch and the mixture's weights are not stated by the source, nor
           whether units are deduplicated (they are not here). Betas and decay are the project's
           defaults.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg

LANGUAGES = ('French',)         # into English; each other one is a line here
HZ = 25.0

# In a record of two languages channel 1 (theirs) is the source and channel 0 (mine) the target.
GIVEN = dict(speech=('speech', 'theirs', 0), text=('text', 'theirs', 0))
TASKS = {
    'ASR': (GIVEN['speech'], ('text', 'theirs')),
    'AST': (GIVEN['speech'], ('text', 'mine')),
    'S2ST': (GIVEN['speech'], ('speech', 'mine')),
    'TTS': (GIVEN['text'], ('speech', 'theirs')),
    'MT': (GIVEN['text'], ('text', 'mine')),
    'ASR AST S2ST': (GIVEN['speech'], ('text', 'theirs'), ('text', 'mine'), ('speech', 'mine')),
}


def asked(*parts_, **options) -> dict:
    return dict(name='template.chain', parts=(('field', 'task', 0), *parts_), unit_hz=HZ,
                dedup=False, end='eos') | options


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False)
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='kmeans', path='', frame_hz=HZ, size=1024, codebooks=1)   # USM-v1 or -v2
    c.vocab = dict(name='line', text_tokens=256_000, tokenizer='', markers=())
    c.columns = 2048                                            # not stated by the source
    c.frontend = dict(name='summed')
    c.backbone = dict(name='decoder', width=4096, layers=32, heads=16, kv_heads=1, head_dim=256,
                      mlp=16_384, theta=10_000.0)   # PaLM 8B (arXiv 2204.02311, Table 1)
    c.head = dict(name='tied')
    c.objective = dict(name='weighted_ce', terms=dict(tokens=('tokens',)))
    sources = {}
    for language in LANGUAGES:
        for task, given in TASKS.items():
            tongues = language if task in ('ASR', 'TTS') else f'{language} English'
            sources[f'{task.replace(" ", "_").lower()}_{language.lower()}'] = dict(
                select=(f'translated_{language.lower()}',), layout=asked(*given),
                fields=dict(task=f'[{task} {tongues}]'))
    c.layout = asked(*TASKS['ASR'])
    c.data = dict(path='', sources=sources)
    c.stages = (dict(name='finetune', steps=100_000, batch=512, lr=5e-5, data=dict.fromkeys(
        sources, 1.0), graft=dict(rows=dict(name='zero'))),)    # new rows begin at zero (§3)
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        demo(c)
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=2, heads=4, mlp=64)
        parts.tiny(c, columns=256)
    return c


def demo(c) -> None:
    """Tasks of the demo corpus: recognition, synthesis, and questions with their answers.

    Nothing is translated there; an answer stands where a translation would. The combined task
    writes down the question, answers it in text and speaks the answer.
    """
    c.codec = parts.demo_units()
    c.vocab = dict(name='line', markers=(), **parts.DEMO_TEXT)
    c.columns = 320
    c.layout = asked(('speech', 'mine', 0), ('text', 'mine'))
    c.frontend = dict(name='summed', dtype='float32')
    c.backbone = parts.demo_decoder(c.backbone)
    c.data = dict(path=parts.DEMO, sources=dict(
        asr=dict(select=('story',), fields=dict(task='write')),
        tts=dict(select=('story',), fields=dict(task='read'),
                 layout=asked(('text', 'mine', 0), ('speech', 'mine'))),
        answer=dict(select=('dialogue',), fields=dict(task='write answer read'),
                    layout=asked(*TASKS['ASR AST S2ST'], over='exchange')),
        written=dict(select=('exchange',), fields=dict(task='answer'),
                     layout=asked(*TASKS['MT'], over='exchange'))))
    c.stages = (parts.demo_stage('finetune', 700, dict(asr=0.3, tts=0.3, answer=0.35,
                                                       written=0.05)),)
    c.evals = dict(likelihood=dict(name='likelihood', sources=('asr', 'tts', 'answer')),
                   exchanges=dict(name='exchanges', source='answer'),
                   answer=dict(name='translations', source='answer'),
                   mt=dict(name='translations', source='written'))

# SPDX-License-Identifier: Apache-2.0
"""Mini-Omni: answers written and spoken at once by a 0.5 B model (arXiv 2408.16725).

Eight rows: text, and seven SNAC codes of a column of 85 ms, each a column later than the one
before. A column's embedding is the mean over its rows; what is heard stands in the place of the
seven. `:version=2` trains as Mini-Omni2 does (arXiv 2410.11190), without its pictures.

  look     python -m jaxsd show     --config configs/mini_omni.py:demo --source voice
  smoke    python -m jaxsd train    --config configs/mini_omni.py:tiny --workdir runs/mini_omni_tiny
  demo     python -m jaxsd train    --config configs/mini_omni.py:demo --workdir runs/mini_omni
  train    python -m jaxsd train    --config configs/mini_omni.py --workdir $WORKDIR
Size       0.5 B in the paper: Qwen2-0.5B with 181,120 rows in its table, as released, and a head of
           as many.
Evidence   the grid of the released code, cell by cell (tests/golden/layout/parallel_answer.txt);
           batch-parallel decoding equals the training forward (tests/test_reply.py). Trained by us
           at scale: no. The released Whisper encoder is not part of this yet: the published size
           begins at its states. The paper's six layers between the language model and the heads are
           not in its released weights and not here.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False, version=1)
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='rvq', path='', frame_hz=11.71875, codebooks=7, size=4096)  # SNAC 24 kHz
    # 152,000 + 7 x 4,160 rows, as in the released table.
    c.vocab = dict(name='parallel', text_tokens=151_936, rows=parts.rows(7), room=64, **MARKS)
    c.columns = 2_048                                       # not stated by the source
    c.layout = answered(11.71875, 7)
    c.frontend = dict(name='averaged', encoder=dict(name='gated', features=768, hidden=4_864))
    c.backbone = parts.qwen2_05b()
    c.head = dict(name='flat')
    # The mean of the rows' cross entropies (of SLAM-LLM's reproduction), but for a factor.
    c.objective = dict(name='weighted_ce', terms=dict(text=('text',), audio=('audio',)),
                       scales=dict(audio=7.0))
    c.data = dict(path='', sources=sources(11.71875, 7, 1, dict(
        asr=('asr',), tts=('asr',), text_qa=('text_qa',), audio_qa=('audio_qa',),
        voice=('voice_qa',), spoken_text=('voice_qa',))))
    # 40,000 steps are an epoch; which stage takes how many is not stated by the source.
    common = dict(steps=40_000, batch=192, schedule='cosine', final_lr=0.01,
                  warmup_steps=1_500)                       # not stated by the source
    c.stages = stages(arg.version, common, (4e-4, 4e-4, 5e-5))
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        demo(c, arg.version)
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=1, heads=4, mlp=64)
        c.frontend.encoder = dict(name='listener', features=640, inside=16, layers=1, heads=2,
                                  mlp=32)
        parts.tiny(c, columns=192)
    return c


MARKS = dict(marks=('end', 'pad', 'input', 'answer'),
             text_marks=('eos', 'pad', 'input', 'answer', 'asr'))
ADAPTER = ('frontend/encoder/.*',)


def answered(hz: float, rows: int, **options) -> dict:
    return dict(name='parallel.answered', frame_hz=hz, late=tuple(range(1, rows + 1))) | options


def sources(hz: float, rows: int, stack: int, select: dict) -> dict:
    """Every task of the paper: what is heard or read, and what is to be written and spoken."""
    heard, read = dict(heard='feats', stack_frames=stack), dict(heard='text')
    tasks = dict(
        asr=dict(said='text', task='same', **heard), tts=dict(said='both', task='same', **read),
        text_qa=dict(said='text', **read), audio_qa=dict(said='text', **heard),
        voice=dict(said='both', **heard), spoken_text=dict(said='both', **read))
    return {name: dict(select=select[name], layout=answered(hz, rows, **options))
            for name, options in tasks.items()}


def stages(version: int, common: dict, rates) -> tuple:
    """(1) the adapter, (2) the language model in text, (3) everything (§3.3). Mini-Omni2's second
    stage answers in text too, its first hears only."""
    first = dict(asr=1.0, tts=1.0) if version == 1 else dict(asr=1.0)
    last = dict(asr=0.1, tts=0.2, text_qa=0.1, audio_qa=0.1, voice=0.3,
                spoken_text=0.2)                            # shares not stated by the source
    return (
        dict(name='align', data=first, lr=rates[0], train=((ADAPTER[0], 1.0), ('.*', None)),
             **common),
        dict(name='adapt', data=dict(asr=1.0, audio_qa=1.0, text_qa=1.0), lr=rates[1],
             start='align', train=((ADAPTER[0], None), ('.*', 1.0)), **common),
        dict(name='speak', data=last, lr=rates[2], start='adapt', **common))


def demo(c, version: int) -> None:
    """The system on the demo corpus, kept with its audio (--keep-wav); eight codes at 12.5 Hz.

    Everything here begins from nothing, so the first stage trains all of it, to read and to hear.
    """
    c.codec = parts.demo_codec()
    c.vocab = dict(name='parallel', rows=parts.rows(8), **MARKS, **parts.DEMO_TEXT)
    c.columns = 256
    c.layout = answered(12.5, 8)
    c.frontend = dict(name='averaged', dtype='float32', encoder=parts.DEMO_EAR)
    c.backbone = parts.small(c.backbone, width=160, layers=6, heads=4, mlp=448, block_columns=64)
    c.objective.scales = dict(audio=1.0)        # eight rows of codes against few words
    c.data = dict(path=parts.DEMO, sources=sources(12.5, 8, 8, dict(
        asr=('story',), tts=('story',), text_qa=('exchange',), audio_qa=('dialogue',),
        voice=('dialogue',), spoken_text=('dialogue',))))
    made = stages(version, dict(batch=16, schedule='cosine', warmup_steps=40, final_lr=0.05,
                                weight_decay=0.05, save_steps=200, log_steps=20, probe_steps=200),
                  (3e-3, 2e-3, 1e-3))
    c.stages = tuple(s | dict(steps=steps) | (dict(train=(('.*', 1.0),)) if i == 0 else {})
                     for i, (s, steps) in enumerate(zip(made, (500, 200, 500), strict=True)))
    c.evals = dict(likelihood=dict(name='likelihood', sources=('voice', 'asr')),
                   replies=dict(name='replies', source='voice'),
                   asr=dict(name='replies', source='asr'))

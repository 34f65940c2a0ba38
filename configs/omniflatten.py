# SPDX-License-Identifier: Apache-2.0
"""OmniFlatten: fewer and fewer flattened streams, from turns to full duplex (arXiv 2410.17799).

A half-billion text model first learns recognition and synthesis; then whole dialogues turn by turn
in four streams; then chunk by chunk the user's speech, what to say and how it sounds; and at last
the two voices alone. The user's tokens are heard and never learned.

  look     python -m jaxsd show     --config configs/omniflatten.py:demo --source three
  smoke    python -m jaxsd train    --config configs/omniflatten.py:tiny --workdir runs/flat_tiny
  demo     python -m jaxsd train    --config configs/omniflatten.py:demo --workdir runs/omniflatten
  train    python -m jaxsd train    --config configs/omniflatten.py --stage align --workdir $WORKDIR
Size       0.5 B in the paper: Qwen2-0.5B and rows for 4,096 units and eight markers.
Evidence   the grids against hand-drawn ones and property tests of what stands at the borders of
           chunks. Trained by us at scale: no. The rate of the units (50 or 25 Hz) and which stage
           has which optimizer settings are not stated by the source; the steps are ours, and so are
           constant rates (the source's is a peak), betas and clipping.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg

SILENCES = ('[Silent text]', '[Silent speech]')
MARKERS = ('[ASR]', '[TTS]', '[SOS]', '[EOS]', '[SOT]', '[EOT]', *SILENCES)


def speech(who: str, weight: float = 1.0) -> tuple:
    return ('mark', '[SOS]', weight), ('speech', who, weight), ('mark', '[EOS]', weight)


def text(who: str, weight: float = 1.0) -> tuple:
    return ('mark', '[SOT]', weight), ('text', who, weight), ('mark', '[EOT]', weight)


def chain(*parts_, hz: float, **options) -> dict:
    return dict(name='template.chain', parts=parts_, dedup=False, unit_hz=hz) | options


def layouts(hz: float) -> dict:
    """By source: the two tasks of the first stage, half duplex, and chunks of three and two."""
    def chunks(*streams):
        return dict(name='chunks.flattened', streams=streams, chunk_frames=10, chunk_text=2,
                    silences=SILENCES, unit_hz=hz)
    return dict(
        asr=chain(('mark', '[ASR]'), *speech('mine'), *text('mine'), hz=hz),
        tts=chain(('mark', '[TTS]'), *text('mine'), *speech('mine'), hz=hz),
        half=chain(*speech('theirs', 0), *text('theirs', 0), *text('mine'), *speech('mine'), hz=hz,
                   over='dialogue'),
        three=chunks('theirs', 'text', 'mine'),
        two=chunks('theirs', 'mine'))


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False)
    c = mlc.ConfigDict()
    c.seed = 0
    hz = 50.0           # of the first CosyVoice tokenizer; a 25 Hz one exists: not stated which
    c.codec = dict(name='kmeans', path='', frame_hz=hz, size=4096, codebooks=1)
    c.vocab = dict(name='line', text_tokens=151_936, tokenizer='', bos=151_643, eos=151_645,
                   markers=MARKERS)
    c.columns = 8192    # 1024 in the first stage: rows are packed, so a longer one changes nothing
    drawn = layouts(hz)
    c.layout = drawn['three']
    c.frontend = dict(name='summed')
    c.backbone = parts.qwen2_05b()
    c.head = dict(name='tied')
    c.objective = dict(name='weighted_ce', terms=dict(tokens=('tokens',)))
    c.data = dict(path='', sources={
        name: dict(select=('pairs',) if name in ('asr', 'tts') else ('two_channel',),
                   layout=layout) for name, layout in drawn.items()})
    common = dict(lr=2e-5, weight_decay=0.1)
    c.stages = (        # 100 M tokens a batch, 5 epochs
        dict(name='align', steps=1_000, batch=12_208, data=dict(asr=1.0, tts=1.0),
             graft=dict(rows=dict(name='mean')), **common),
        dict(name='half', steps=100, batch=12_208, data=dict(half=1.0), start='align', **common),
        dict(name='three', steps=100, batch=12_208, data=dict(three=1.0), start='half', **common),
        dict(name='two', steps=100, batch=12_208, data=dict(two=1.0), start='three', **common))
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        demo(c)
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=2, heads=4, mlp=64)
        parts.tiny(c, columns=384)
    return c


def demo(c) -> None:
    """All four stages on stories and dialogues at 25 units a second."""
    c.codec = parts.demo_units()
    c.vocab = dict(name='line', markers=MARKERS, **parts.DEMO_TEXT)
    c.columns = 1024
    drawn = layouts(25.0)
    c.layout = drawn['three']
    c.frontend = dict(name='summed', dtype='float32')
    c.backbone = parts.demo_decoder(c.backbone)
    c.data = dict(path=parts.DEMO, sources={
        name: dict(select=('story',) if name in ('asr', 'tts') else ('dialogue',), layout=layout)
        for name, layout in drawn.items()})
    c.stages = (
        parts.demo_stage('align', 200, dict(asr=0.5, tts=0.5), batch=4),
        parts.demo_stage('half', 80, dict(half=1.0), batch=4, start='align'),
        parts.demo_stage('three', 120, dict(three=1.0), batch=4, start='half', lr=2e-3),
        parts.demo_stage('two', 250, dict(two=1.0), batch=4, start='three', lr=2e-3))
    c.evals = dict(likelihood=dict(name='likelihood', sources=('half', 'three', 'two')),
                   matched=dict(name='matched', source='two', given='heard'),
                   turns=parts.turn_taking('two'))

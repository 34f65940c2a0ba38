# SPDX-License-Identifier: Apache-2.0
"""GLM-4-Voice: spoken spans in written text, then text and speech in turns (arXiv 2412.02612).

Pretraining replaces spans of text by speech tokens of a slow tokenizer. Then the model answers in
blocks of 13 text and 26 speech tokens, so that speech can be heard while the text goes on. Every
dialogue is learned twice: for its text, and five times as often for its speech.

  look     python -m jaxsd show     --config configs/glm4_voice.py:demo --source spoken
  smoke    python -m jaxsd train    --config configs/glm4_voice.py:tiny --workdir runs/glm4_tiny
  demo     python -m jaxsd train    --config configs/glm4_voice.py:demo --workdir runs/glm4_voice
  train    python -m jaxsd train    --config configs/glm4_voice.py --workdir $WORKDIR
Size       9 B in the paper: GLM-4-9B with the released table of 168,960 rows, and its head.
Evidence   the grids against hand-drawn ones. Trained by us at scale: no. Departures: rotary
           positions turn whole heads (half of each in GLM-4); no dropout (0.5 in fine-tuning).
           Batches are not stated by the source; steps follow from tokens and an assumed batch.
           Decay and clipping of pretraining are the project's defaults. The roles' markers are new
           rows here; GLM-4 has its own, so an import's stop id begins anew.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg

MARKERS = ('[Text]', '[Speech]', '<|system|>', '<|user|>', '<|assistant|>', '<|begin_of_audio|>',
           '<|end_of_audio|>')
FIELDS = dict(instruction='Answer the user in turns of 13 text tokens and 26 audio tokens.',
              streaming='streaming_transcription')
# The next user's marker ends an answer: it is the stop id.
PARTS = (('mark', '<|begin_of_audio|>', 0), ('speech', 'theirs', 0),
         ('mark', '<|end_of_audio|>', 0), ('mark', '<|assistant|>', 0), ('field', 'streaming', 0),
         ('blocks', 'mine'), ('mark', '<|user|>'))


def answered(score: str, hz: float, ratio=(13, 26)) -> dict:
    """Dialogues in which answers alternate, learned for one of the two kinds of tokens."""
    return dict(name='template.chain', over='dialogue', parts=PARTS, ratio=ratio, dedup=False,
                unit_hz=hz, score=(score, 'mark'), opening=(
                    ('mark', '<|system|>', 0), ('field', 'instruction', 0),
                    ('mark', '<|user|>', 0)))


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False)
    c = mlc.ConfigDict()
    c.seed = 0
    hz = 12.5
    c.codec = dict(name='kmeans', path='', frame_hz=hz, size=16_384, codebooks=1)
    c.vocab = dict(name='line', text_tokens=151_552, tokenizer='', bos=151_331, eos=151_329,
                   markers=MARKERS, unit='<|audio_{}|>', multiple=1024)
    c.columns = 8192
    clock = dict(unit_hz=hz, dedup=False)
    c.layout = dict(name='flat.interleave', spans=dict(name='poisson', mean=10.0, share=0.3),
                    **clock)
    c.frontend = dict(name='summed')
    c.backbone = dict(name='decoder', width=4096, layers=40, heads=32, kv_heads=2, head_dim=128,
                      mlp=13_696, theta=10_000.0, qkv_bias=True, norm_eps=1.5625e-7)
    c.head = dict(name='flat')
    c.objective = dict(name='weighted_ce', terms=dict(tokens=('tokens',)))

    def whole(*fields):
        return dict(name='flat.sequence', fields=fields, dedup=False)
    c.data = dict(path='', sources=dict(
        interleaved=dict(select=('synthetic_interleaved',)),
        speech=dict(select=('speech',), layout=whole('speech')),
        asr=dict(select=('pairs',), layout=whole('speech', 'text')),
        tts=dict(select=('pairs',), layout=whole('text', 'speech')),
        text=dict(select=('text',), layout=whole('text')),
        written=dict(select=('dialogues',), fields=FIELDS, layout=answered('text', hz)),
        spoken=dict(select=('dialogues',), fields=FIELDS, layout=answered('speech', hz))))
    # A trillion tokens: 30% text; one epoch of speech (31 B) and of pairs (14.5 B); the rest.
    c.stages = (
        dict(name='pretrain', steps=120_000, batch=1_024, lr=6e-5, schedule='linear', final_lr=0.1,
             data=dict(text=0.3, speech=0.031, asr=0.00725, tts=0.00725, interleaved=0.6545),
             graft=dict(rows=dict(name='mean'))),
        dict(name='chat', steps=5_000, batch=128, lr=1e-5, schedule='linear', final_lr=0.1,
             weight_decay=0.1, clip=1.0, start='pretrain', data=dict(written=4.0, spoken=20.0)))
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        demo(c)
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=2, heads=4, mlp=64)
        parts.tiny(c, columns=256)
    return c


def demo(c) -> None:
    """Blocks of 2 text and 16 units: at 25 units a second text still runs ahead."""
    hz, ratio = 25.0, (2, 16)
    c.codec = parts.demo_units()
    c.vocab = dict(name='line', markers=MARKERS, **parts.DEMO_TEXT)
    c.columns = 512
    clock = dict(unit_hz=hz, dedup=False)
    c.layout = dict(name='flat.interleave', spans=dict(name='poisson', mean=2.0, share=0.3),
                    **clock)
    c.frontend = dict(name='summed', dtype='float32')
    c.backbone = parts.demo_decoder(c.backbone)
    fields = dict(instruction='answer', streaming='text')

    def whole(*of):
        return dict(name='flat.sequence', fields=of, dedup=False)
    c.data = dict(path=parts.DEMO, sources=dict(
        interleaved=dict(select=('story',)),
        speech=dict(select=('story', 'dialogue'), layout=whole('speech')),
        asr=dict(select=('story',), layout=whole('speech', 'text')),
        tts=dict(select=('story',), layout=whole('text', 'speech')),
        text=dict(select=('text', 'exchange'), layout=whole('text')),
        written=dict(select=('dialogue',), fields=fields, layout=answered('text', hz, ratio)),
        spoken=dict(select=('dialogue',), fields=fields, layout=answered('speech', hz, ratio))))
    c.stages = (
        parts.demo_stage('pretrain', 500, dict(interleaved=0.25, speech=0.05, asr=0.4, tts=0.1,
                                               text=0.2), batch=8),
        # More of what is written than in the paper: it is not known from before.
        parts.demo_stage('chat', 700, dict(written=14.0, spoken=10.0), start='pretrain', batch=8,
                         lr=2e-3))
    c.evals = dict(likelihood=dict(name='likelihood', sources=('interleaved', 'written', 'spoken')),
                   exchanges=dict(name='exchanges', source='spoken'))

# SPDX-License-Identifier: Apache-2.0
"""Spirit-LM: one stream of text and speech units, interleaved by words (arXiv 2402.05755).

A text model goes on training on a third each (by tokens) of text, speech, and sentences that keep
changing between being written and being spoken; the spans are drawn anew each time. The model is
the paper's Base; `expressive` tells pitch (12.5 Hz) and style (1 Hz) beside the units, by time.
`level` (word, phone, utterance) and `again` (how often a span is told in the other modality too)
vary how finely text and speech are aligned, and whether they continue or correspond.

  look     python -m jaxsd show     --config configs/spirit_lm.py:demo --source aligned
  fits?    python -m jaxsd plan     --config configs/spirit_lm.py --topology v5p:8x8x8 --search
  smoke    python -m jaxsd train    --config configs/spirit_lm.py:tiny --workdir runs/spirit_lm_tiny
  demo     python -m jaxsd train    --config configs/spirit_lm.py:demo --workdir runs/spirit_lm
  train    python -m jaxsd train    --config configs/spirit_lm.py --workdir $WORKDIR
Size       7 B in the paper: Llama 2 7B and 512 rows in both tables, for 501 units, two markers and
           padding.
Evidence   the demo (own units, own corpus, closed vocabulary) is trained and judged by make
           quickstart. Trained by us at scale: no. The optimizer's betas, decay and warm-up are not
           stated by the paper; the values here are the project's defaults.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg

SPANS = dict(word=(2, 6), phone=(6, 18), utterance=(1, 1))
"""Of the demo, in words, phones and sentences: about as long at every level."""


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False, mix='interleaved', expressive=False, level='word',
                    again=0.0)
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='kmeans', path='', frame_hz=25.0, size=501, codebooks=1)   # 500 and a blank
    c.vocab = dict(name='line', text_tokens=32_000, tokenizer='')
    c.columns = 4096                                            # about 200 s of speech
    c.layout = dict(name='flat.interleave', text_words=(10, 30), speech_words=(5, 15))
    c.frontend = dict(name='summed')
    c.backbone = parts.llama2_7b(theta=100_000.0)               # raised from 10,000 (App. A)
    c.head = dict(name='flat')
    c.objective = dict(name='weighted_ce', terms=dict(tokens=('tokens',)))
    c.data = dict(path='', sources=dict(
        aligned=dict(select=('aligned',)),
        speech=dict(select=('speech',),
                    layout=dict(name='flat.sequence', fields=('speech',))),
        text=dict(select=('text',), layout=dict(name='flat.sequence', fields=('text',)))))
    c.stages = (dict(name='pretrain', steps=100_000, batch=256, lr=3e-5,
                     data=dict(aligned=1.0, speech=1.0, text=1.0),
                     # Of a text model imported into this stage, whose new rows are random (App. A);
                     # their deviation is not stated.
                     graft=dict(rows=dict(name='normal', sigma=0.02),
                                unlike=('backbone.theta',))),)
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        demo(c, arg.mix, arg.level)
    if arg.level == 'phone' and not (arg.demo or arg.tiny):     # the demo's phones, for want of any
        c.vocab = dict(c.vocab) | dict(markers=('[Text]', '[Speech]', *parts.DEMO_PHONES))
    if arg.level != 'word' or arg.again:
        c.layout = dict(c.layout) | dict(level=arg.level, again=arg.again)
    if arg.expressive:
        told = dict(sides=(('style', 1.0, False), ('pitch', 12.5, True)))   # in this order at once
        c.vocab = dict(c.vocab) | dict(sides=(('pitch', 64), ('style', 100)))
        c.layout = dict(c.layout) | told
        for source in c.data.sources.values():
            if 'speech' in source.get('layout', {}).get('fields', ()):
                source.layout = dict(source.layout) | told | dict(unit_hz=25.0)
        c.evals = {k: v for k, v in c.evals.items() if k == 'likelihood'}
        if arg.demo:
            c.evals['preserved'] = dict(name='preserved', source='speech')
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=2, heads=4, mlp=64)
        parts.tiny(c, columns=256)
    return c


def demo(c, mix: str, level: str) -> None:
    """The system on the demo corpus at 2 M parameters, with the paper's '+ASR+TTS' tasks.

    mix='interleaved' is the system; 'pairs' replaces interleaving by more recognition and synthesis
    pairs and 'unimodal' by more speech and text alone, all with the same number of tokens.
    """
    c.codec = parts.demo_units()
    c.vocab = dict(name='line', markers=('[Text]', '[Speech]', '[ASR]', '[TTS]', *(
        parts.DEMO_PHONES if level == 'phone' else ())), **parts.DEMO_TEXT)
    c.columns = 256
    if level not in SPANS:
        raise ValueError(f'level is one of {", ".join(SPANS)} in the demo, got {level!r}')
    c.layout = dict(name='flat.interleave', text_words=SPANS[level], speech_words=SPANS[level],
                    end='eos')
    c.frontend = dict(name='summed', dtype='float32')
    c.backbone = parts.small(c.backbone, width=160, layers=5, heads=4, mlp=448, theta=10_000.0,
                             block_columns=64)
    spoken = ('story', 'dialogue')

    def whole(*fields, **options):
        return dict(name='flat.sequence', fields=fields, end='eos') | options
    c.data = dict(path=parts.DEMO, sources=dict(
        aligned=dict(select=('story',)),
        asr=dict(select=('story',), layout=whole('speech', 'text', score=('text',),
                                                  markers=('[Speech]', '[ASR]'))),
        tts=dict(select=('story',), layout=whole('text', 'speech', score=('speech',),
                                                  markers=('[Text]', '[TTS]'))),
        speech=dict(select=spoken, layout=whole('speech')),
        text=dict(select=('text', 'story'), layout=whole('text'))))
    shares = dict(
        interleaved=dict(aligned=0.25, asr=0.3, tts=0.35, speech=0.05, text=0.05),
        pairs=dict(asr=0.42, tts=0.48, speech=0.05, text=0.05),
        unimodal=dict(speech=0.75, text=0.25))
    if mix not in shares:
        raise ValueError(f'mix is one of {", ".join(shares)}, got {mix!r}')
    c.stages = (dict(name='pretrain', steps=700, batch=16, lr=3e-3, schedule='cosine',
                     warmup_steps=40, final_lr=0.05, weight_decay=0.05, data=shares[mix],
                     save_steps=100, log_steps=10, probe_steps=100),)
    c.evals = dict(likelihood=dict(name='likelihood', sources=('aligned', 'asr', 'tts')),
                   asr=dict(name='asr', source='asr'), tts=dict(name='tts', source='tts'),
                   stories=dict(name='stories'), **{
                       kind: dict(name='pairs', path=f'{parts.PAIRS}/{kind}', source='speech')
                       for kind in ('words', 'sentences')},
                   endings=dict(name='cloze', path=f'{parts.PAIRS}/stories'),
                   topics=dict(name='cloze', path=f'{parts.PAIRS}/topics'))

# SPDX-License-Identifier: Apache-2.0
"""EMOVA: answers as an object of text, style and speech, in that order (arXiv 2409.18042).

The model hears units and writes a JSON object: what the user said and in which emotion and pitch,
what to answer and in which emotion and pitch, and at last the answer's units. Style stands before
the units, so that it can condition them and the decoder behind them. (Vision is out of scope.)

  look     python -m jaxsd show     --config configs/emova.py:demo --source dialogue
  smoke    python -m jaxsd train    --config configs/emova.py:tiny --workdir runs/emova_tiny
  demo     python -m jaxsd train    --config configs/emova.py:demo --workdir runs/emova
  train    python -m jaxsd train    --config configs/emova.py --stage align --workdir $WORKDIR
Size       8 B in the paper: Llama 3.1 8B and rows for 4,096 units, without what sees.
Evidence   the grids against hand-drawn ones. Trained by us at scale: no. Instructions are worded by
           us; released checkpoints number their speech tokens in no particular order, so that ids
           must be looked up by name. Batches (per device in the configs) are times 64 devices here,
           which is not stated by the source; nor are the betas (the project's default). Steps are
           those of the paper's whole mixture, with images and text, of which the sources here are
           the spoken part: they are read more often than there. No decay, as in the configs.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg

LABELS = ('emotion', 'pitch')


def turn(role: str, *said) -> tuple:
    """A turn of the backbone's chat template; the assistant's is learned up to its end."""
    learned = 1 if role == 'assistant' else 0
    return (('mark', 'header', 0), ('field', role, 0), ('mark', 'header_end', 0), *said,
            ('mark', 'turn_end', learned))


def task(ask: str, given: tuple, said: tuple) -> dict:
    return dict(name='template.chain', parts=(
        *turn('user', ('field', ask, 0), (*given, 0)), *turn('assistant', said)))


def answer(labels) -> tuple[dict, dict]:
    """The layout of a spoken dialogue, and the text between its values."""
    fields, said = {}, []

    def value(key: str, part):
        fields[f'json {len(fields)}'] = ('{"' if not fields else '", "') + key + '": "'
        said.extend([('field', f'json {len(fields) - 1}'), part])
    for who, name in (('theirs', 'user question'), ('mine', 'assistant response')):
        value(f'{name} text', ('text', who))
        for label in labels:
            value(f'{name} {label}', ('label', f'{who} {label}'))
    value('assistant response speech', ('speech', 'mine'))
    fields['json end'] = '"}'
    said.append(('field', 'json end'))
    return dict(name='template.chain', over='exchange', parts=(
        *turn('user', ('field', 'chat', 0), ('speech', 'theirs', 0)),
        *turn('assistant', *said))), fields


FIELDS = dict(
    user='user', assistant='assistant',
    hear='Please recognize the text corresponding to the following speech.',
    say='Please synthesize the speech corresponding to the following text.',
    chat='Please recognize the texts, emotion and pitch from the user question speech units and '
         'provide the texts, emotion, pitch and speech units for the assistant response as a JSON '
         'object. user question speech:')


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False)
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='kmeans', path='', frame_hz=25.0, size=4096, codebooks=1)   # 8 levels ^ 4
    c.vocab = dict(name='line', text_tokens=128_256, tokenizer='', bos=128_000, eos=128_009,
                   names=dict(header=128_006, header_end=128_007, turn_end=128_009), markers=(),
                   unit='<|speech_{}|>')
    c.columns = 6144
    dialogue, between = answer(LABELS)
    c.layout = dialogue
    c.frontend = dict(name='summed')
    c.backbone = parts.llama3_8b(rope_scaling=dict(
        name='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_columns=8192))                                 # Llama 3.1
    c.head = dict(name='flat')
    c.objective = dict(name='weighted_ce', terms=dict(tokens=('tokens',)))
    c.data = dict(path='', sources=dict(
        asr=dict(select=('speech_pairs',), fields=FIELDS,
                 layout=task('hear', ('speech', 'mine'), ('text', 'mine'))),
        tts=dict(select=('speech_pairs',), fields=FIELDS,
                 layout=task('say', ('text', 'mine'), ('speech', 'mine'))),
        dialogue=dict(select=('spoken_dialogues',), fields=FIELDS | between)))
    common = dict(lr=2e-5, schedule='cosine', final_lr=0.0, weight_decay=0.0)
    c.stages = (
        dict(name='align', steps=3_400, batch=2_048, warmup_steps=102, data=dict(asr=1.0, tts=1.0),
             graft=dict(rows=dict(name='mean')), **common),
        dict(name='instruct', steps=3_900, batch=1_024, warmup_steps=117, start='align',
             data=dict(dialogue=1.0), **common))
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        demo(c)
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=2, heads=4, mlp=64)
        parts.tiny(c, columns=256)
    return c


def demo(c) -> None:
    """The demo corpus has no emotions; its voices differ in pace and tone. Keys are a word each."""
    c.codec = parts.demo_units()
    c.vocab = dict(name='line', markers=('header', 'header_end', 'turn_end'), **parts.DEMO_TEXT)
    c.columns = 320
    dialogue, between = answer(('pace', 'tone'))
    words = ('text', 'pace', 'tone')
    fields = dict(user='user', assistant='helper', hear='write', say='read', chat='answer') | {
        key: 'end' if key == 'json end' else (*words, *words, 'say')[int(key.split()[1])]
        for key in between}
    c.layout = dialogue
    c.frontend = dict(name='summed', dtype='float32')
    c.backbone = parts.demo_decoder(c.backbone, rope_scaling='none')
    sources = c.data.sources
    c.data = dict(path=parts.DEMO, sources=dict(
        asr=dict(select=('story',), fields=fields, layout=sources.asr.layout),
        tts=dict(select=('story',), fields=fields, layout=sources.tts.layout),
        dialogue=dict(select=('dialogue',), fields=fields)))
    c.stages = (parts.demo_stage('align', 500, dict(asr=0.5, tts=0.5)),
                parts.demo_stage('instruct', 400, dict(dialogue=1.0), start='align', lr=2e-3))
    c.evals = dict(likelihood=dict(name='likelihood', sources=('asr', 'dialogue')),
                   exchanges=dict(name='exchanges', source='dialogue'))

# SPDX-License-Identifier: Apache-2.0
"""One backbone, one corpus of dialogues, one sequence of units, six ways to write time.

`layout` is chain (transcript, written answer, spoken answer), interleaved (the answer in blocks of
text and units), parallel (text beside two rows of units), grouped (five units a position), chunks
(both speakers and my words, 400 ms at a time) or multistream (both speakers' units in one column).
Stage, source and seed have the same names everywhere, so all read the dialogues in the same order.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import ConfigError, parse_arg

HZ = 25.0
CLOCK = dict(unit_hz=HZ, dedup=False)
MARKERS = ('[Heard]', '[Answer]', '[Speak]', '[Silent text]', '[Silent speech]')


def told(*said) -> dict:
    return dict(name='template.chain', over='exchange', end='eos', ratio=(2, 16), **CLOCK,
                parts=(('speech', 'theirs', 0), *said))


LAYOUTS = dict(
    chain=told(('mark', '[Heard]'), ('text', 'theirs'), ('mark', '[Answer]'), ('text', 'mine'),
               ('mark', '[Speak]'), ('speech', 'mine')),
    interleaved=told(('mark', '[Answer]'), ('blocks', 'mine')),
    parallel=dict(name='parallel.together', frame_hz=HZ),
    grouped=dict(name='parallel.grouped', frame_hz=HZ, fields=('speech', 'speech')),
    chunks=dict(name='chunks.flattened', unit_hz=HZ, chunk_frames=10, chunk_text=2),
    multistream=dict(name='duplex.units', weight_held=0.2))
LINE = dict(name='line', markers=MARKERS, **parts.DEMO_TEXT)
VOCABS = dict(
    chain=LINE, interleaved=LINE, chunks=LINE,
    parallel=dict(name='parallel', marks=('end', 'pad'), text_marks=('eos', 'pad'),
                  rows=parts.rows(2), **parts.DEMO_TEXT),
    grouped=dict(name='parallel', turns=1, marks=('pad',), rows=parts.rows(5),
                 text_marks=('open', 'speech', 'close'), **parts.DEMO_TEXT),
    multistream=dict(name='parallel', text_tokens=0, rows=('mine 0', 'theirs 0')))
BESIDE = dict(text=('text',), audio=('audio',))
TERMS = dict(parallel=BESIDE, grouped=BESIDE, multistream=dict(mine=('mine',), theirs=('theirs',)))


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, layout='chain')
    if arg.layout not in LAYOUTS:
        raise ConfigError(f'layout is one of {", ".join(LAYOUTS)}, got {arg.layout!r}')
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = parts.demo_units()
    c.vocab = dict(VOCABS[arg.layout])
    c.columns = 1024
    c.layout = dict(LAYOUTS[arg.layout])
    c.frontend = dict(name='summed', dtype='float32')
    c.backbone = parts.demo_decoder(parts.llama2_7b())
    c.head = dict(name='flat')
    if arg.layout == 'grouped':
        c.frontend = dict(name='grouped', inside=48, dtype='float32')
        c.head = dict(name='group', width=128, layers=2, heads=4, mlp=352)
    c.objective = dict(name='weighted_ce', terms=TERMS.get(arg.layout, dict(tokens=('tokens',))))
    c.data = dict(path=parts.DEMO, sources=dict(dialogue=dict(select=('dialogue',))))
    c.stages = (parts.demo_stage('converse', 150, dict(dialogue=1.0), batch=2, warmup_steps=20),)
    c.mesh = dict(fsdp=-1)
    # No likelihood: it is of other tokens in every layout, and could not be compared.
    c.evals = dict(pairings=dict(name='jaxsd.pairing:pairings', source='dialogue',
                                 clock=arg.layout in ('chunks', 'multistream')))
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=1, heads=4, mlp=64)
        if arg.layout == 'grouped':
            c.head = dict(name='group', width=32, layers=1, heads=4, mlp=64)
        parts.tiny(c, columns=384)
    return c

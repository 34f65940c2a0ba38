# SPDX-License-Identifier: Apache-2.0
"""TWIST: a speech-only model whose body was a text model (arXiv 2305.13009), and two recipes.

The text model's embeddings and output map are dropped and begin anew for 500 units and one token
that opens and closes (`recipe=twist`). Slam trains the same at 0.4B in a day on one card (arXiv
2502.15814); SIMS keeps the text and interleaves it with speech by words (arXiv 2504.02398).

  look     python -m jaxsd show     --config configs/twist.py:demo --source speech
  smoke    python -m jaxsd train    --config configs/twist.py:tiny --workdir runs/twist_tiny
  demo     python -m jaxsd train    --config configs/twist.py:demo --workdir runs/twist
  train    python -m jaxsd train    --config configs/twist.py:recipe=slam --workdir $WORKDIR
Size       7 B in the paper: LLaMA 7B whose 32,000 rows of text became 502, in both tables.
Evidence   the id map of the released units and the spans' statistics are tests. Trained by us at
           scale: no. TWIST's learning rate is not stated by the source; its steps and batch are
           from memory. Slam's last half hour, preference learning, is not part of this config.
           Betas, decay and what else no stage names are the project's defaults, not the sources'.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg

UNITS = dict(name='template.chain', parts=(('speech', 'mine'),), end='eos')
WRITTEN = dict(name='flat.sequence', fields=('text',))
# Without text there are two ids before the units: padding, and one that is both BOS and EOS.
UNITS_ALONE = dict(name='line', text_tokens=2, tokenizer='', bos=1, eos=1, markers=(), multiple=1)
TABLES = ('frontend/table', 'head/out/kernel')


def replaced(*tables) -> dict:
    """A graft that drops the text rows and begins all rows anew."""
    return dict(fresh=tables, unused=tables, unlike=('backbone.theta',))


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False, recipe='twist', cold=False)
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='kmeans', path='', frame_hz=25.0, size=500, codebooks=1)  # mHuBERT layer 11
    c.vocab = UNITS_ALONE
    c.layout = UNITS
    c.frontend = dict(name='summed')
    c.head = dict(name='flat')
    c.objective = dict(name='weighted_ce', terms=dict(tokens=('tokens',)))
    c.data = dict(path='', sources=dict(speech=dict(select=(
        'librispeech', 'librilight', 'spotify', 'peoples_speech', 'voxpopuli'))))
    if arg.recipe == 'twist':
        c.columns = 1024                                        # not stated by the source
        c.backbone = parts.llama2_7b(norm_eps=1e-6)             # LLaMA 7B; 1.3B and 350M are OPT
        c.stages = (dict(name='speech', steps=400_000, batch=64, lr=1e-4, schedule='rsqrt',
                         warmup_steps=100, data=dict(speech=1.0), graft=replaced(*TABLES)),)
    elif arg.recipe == 'slam':
        c.columns = 1024
        c.backbone = parts.qwen2_05b(theta=10_000.0)
        c.head = dict(name='tied')
        c.data = dict(path='', sources=dict(speech=dict(select=(
            'librispeech', 'librilight', 'tinystories'))))      # the last one synthesized
        c.stages = (dict(name='speech', steps=17_625, batch=128, lr=1e-3, schedule='cosine',
                         final_lr=0.05, warmup_steps=176, clip=0.5, data=dict(speech=1.0),
                         graft=replaced(TABLES[0])),)
    elif arg.recipe == 'sims':
        c.columns = 2048
        c.vocab = dict(name='line', text_tokens=152_064, tokenizer='', bos=151_643, eos=151_643)
        c.backbone = parts.qwen2_7b()
        c.layout = dict(name='flat.interleave', spans=dict(name='poisson', mean=10.0, share=0.3))
        c.data = dict(path='', sources=dict(
            aligned=dict(select=('librispeech', 'librilight', 'tinystories')),
            speech=dict(select=('librispeech', 'librilight'),
                        layout=dict(name='flat.sequence', fields=('speech',))),
            text=dict(select=('text',), layout=WRITTEN)))
        c.stages = (dict(name='interleaved', steps=20_000, batch=512, lr=5e-4,   # steps: not stated
                         schedule='cosine', final_lr=0.1, warmup_steps=200, clip=0.5,
                         data=dict(aligned=1.0, speech=1.0, text=1.0),      # matched by tokens
                         graft=dict(rows=dict(name='mean'))),)
    else:
        raise ValueError(f'recipe is one of twist, slam, sims, got {arg.recipe!r}')
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        demo(c, arg.recipe, arg.cold)
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=2, heads=4, mlp=64)
        parts.tiny(c, columns=256)
    return c


def demo(c, recipe: str, cold: bool) -> None:
    """A text model of the demo corpus's own, then speech from it; `cold` begins with the speech.

    One table holds text and units, so that one run has both stages: where the recipe drops the
    text, all rows begin anew and those of text are never seen again.
    """
    c.codec = parts.demo_units()
    c.vocab = dict(name='line', **parts.DEMO_TEXT)
    c.columns = 256
    c.frontend = dict(name='summed', dtype='float32')
    c.backbone = parts.demo_decoder(c.backbone)
    sources = dict(speech=dict(select=('story', 'dialogue'), layout=UNITS),
                   text=dict(select=('text', 'story'), layout=WRITTEN))
    name, shares = 'speech', dict(speech=1.0)
    if recipe == 'sims':
        sources['aligned'] = dict(select=('story',), layout=dict(
            name='flat.interleave', spans=dict(name='poisson', mean=2.0, share=0.3)))
        name, shares = 'interleaved', dict(aligned=1.0, speech=1.0, text=1.0)
    c.layout = UNITS
    if cold:
        sources = {k: v for k, v in sources.items() if k in shares}
    c.data = dict(path=parts.DEMO, sources=sources)
    tables = TABLES if c.head.name == 'flat' else TABLES[:1]
    graft = {} if cold or recipe == 'sims' else dict(graft=dict(fresh=tables))
    last = parts.demo_stage(name, 500, shares, start='init' if cold else 'text', **graft)
    c.stages = ((last,) if cold else
                (parts.demo_stage('text', 300, dict(text=1.0), batch=8), last))
    c.evals = dict(likelihood=dict(name='likelihood', sources=('speech',)),
                   matched=dict(name='matched', source='speech', given='half'),
                   words=dict(name='pairs', path=f'{parts.PAIRS}/words', source='speech'),
                   sentences=dict(name='pairs', path=f'{parts.PAIRS}/sentences', source='speech'))

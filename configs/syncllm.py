# SPDX-License-Identifier: Apache-2.0
"""SyncLLM: two speakers in one row, synchronous by chunks of time (arXiv 2409.15594).

Every chunk of 160 ms holds what is new in each speaker's units, behind the speaker's marker. A text
model first learns dialogues turn by turn, of which more and more sentences are spoken, then chunks
without overlap, then real telephone talk.

  look     python -m jaxsd show     --config configs/syncllm.py:demo --source duplex
  smoke    python -m jaxsd train    --config configs/syncllm.py:tiny --workdir runs/syncllm_tiny
  demo     python -m jaxsd train    --config configs/syncllm.py:demo --workdir runs/syncllm
  train    python -m jaxsd train    --config configs/syncllm.py:chunk=5 --workdir $WORKDIR
Size       8 B in the paper: Llama 3 8B and 512 rows in both tables, for 501 units, two markers and
           padding.
Evidence   the paper's own example, and property tests of what stands at the borders of chunks.
           Trained by us at scale: no. A departure: the first stage's share of speech rises in four
           steps, each a stage with moments of its own. The paper's rises smoothly, by a schedule
           that stands in a figure only, and training by steps diverged there. Betas, decay and
           clipping are the project's.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg

SPEAKERS = ('[S0]', '[S1]')
SHARES = (0.15, 0.4, 0.65, 0.9)     # of spoken sentences, on average: no numbers are stated
SPREAD = 0.2                        # likewise


def turns(share: float) -> dict:
    return dict(name='template.turns', speakers=SPEAKERS, share=share, spread=SPREAD)


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False, chunk=4)       # frames of 40 ms: 4, 5 or 6
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='kmeans', path='', frame_hz=25.0, size=501, codebooks=1)
    c.vocab = dict(name='line', text_tokens=128_256, tokenizer='', bos=128_000, eos=128_001,
                   markers=SPEAKERS)
    c.columns = 8192
    c.layout = dict(name='chunks.synchronous', chunk_frames=arg.chunk, speakers=SPEAKERS)
    c.frontend = dict(name='summed')
    c.backbone = parts.llama3_8b()
    c.head = dict(name='flat')
    c.objective = dict(name='weighted_ce', terms=dict(tokens=('tokens',)))
    c.data = dict(path='', sources=dict(
        {f'turns_{i}': dict(select=('synthetic_turns',), layout=turns(share))
         for i, share in enumerate(SHARES)},
        apart=dict(select=('synthetic_apart',)),        # one speaks, the other's side is silence
        duplex=dict(select=('fisher',))))
    first = [dict(name=f'turns_{i}', steps=40_000 // len(SHARES), batch=128, lr=3e-5,
                  warmup_steps=0 if i else 500, data={f'turns_{i}': 1.0},
                  start=f'turns_{i - 1}' if i else 'init',
                  graft={} if i else dict(rows=dict(name='mean'))) for i in range(len(SHARES))]
    c.stages = (
        *first,
        dict(name='apart', steps=6_000, batch=64, lr=2.2e-5, warmup_steps=200,
             data=dict(apart=1.0), start=first[-1]['name']),
        dict(name='duplex', steps=2_000, batch=32, lr=1.5e-5, warmup_steps=100,
             data=dict(duplex=1.0), start='apart'))
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        demo(c)
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=2, heads=4, mlp=64)
        parts.tiny(c, columns=384)
    return c


def demo(c) -> None:
    """Turns, then chunks: first the corpus' dialogues without the moments in which both speak."""
    c.codec = parts.demo_units()
    c.vocab = dict(name='line', markers=SPEAKERS, **parts.DEMO_TEXT)
    c.columns = 640
    c.frontend = dict(name='summed', dtype='float32')
    c.backbone = parts.demo_decoder(c.backbone)
    c.data = dict(path=parts.DEMO, sources=dict(
        turns_0=dict(select=('dialogue',), layout=turns(0.3)),
        turns_1=dict(select=('dialogue',), layout=turns(0.8)),
        apart=dict(select=('dialogue',), layout=dict(c.layout) | dict(overlaps=False)),
        duplex=dict(select=('dialogue',))))
    c.stages = (
        parts.demo_stage('turns_0', 150, dict(turns_0=1.0), batch=8),
        parts.demo_stage('turns_1', 150, dict(turns_1=1.0), batch=8, start='turns_0'),
        parts.demo_stage('apart', 150, dict(apart=1.0), batch=8, start='turns_1', lr=2e-3),
        parts.demo_stage('duplex', 250, dict(duplex=1.0), batch=8, start='apart', lr=2e-3))
    c.evals = dict(likelihood=dict(name='likelihood', sources=('turns_1', 'duplex')),
                   matched=dict(name='matched', source='duplex', given='half'),
                   turns=parts.turn_taking('duplex'))

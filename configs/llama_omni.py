# SPDX-License-Identifier: Apache-2.0
"""LLaMA-Omni: a text model whose hidden states, repeated, say units by CTC (arXiv 2409.06666).

Speech enters as features through an adaptor; the answer is written as ever, and a second, causal
decoder on the repeated states of the answer speaks it while it is being written.

  look     python -m jaxsd show     --config configs/llama_omni.py:demo --source voice
  smoke    python -m jaxsd train    --config configs/llama_omni.py:tiny --workdir runs/llama_tiny
  demo     python -m jaxsd train    --config configs/llama_omni.py:demo --workdir runs/llama_omni
  train    python -m jaxsd train    --config configs/llama_omni.py --workdir $WORKDIR
Size       8 B in the paper: Llama 3.1 8B, and the 425 M of its speech decoder, with the adaptor.
Evidence   CTC against every path, optax and torch, streaming against the training forward
           (tests/test_head_beside.py, tests/peers/test_ctc.py). Trained by us at scale: no. The
           frozen Whisper-large-v3 is not part of this yet: the published size begins at five
           stacked states of it. States that speak are those that predict the answer's tokens, as
           the paper defines them; the released code trains on the states one later.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False)
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='kmeans', path='', frame_hz=50.0, size=1_000, codebooks=1)  # mHuBERT
    # A column may say 25 units. One id stands for the header of the assistant's turn.
    marks = dict(turns=1, text_marks=('answer',))
    c.vocab = dict(name='parallel', text_tokens=128_256, bos=128_000, eos=128_009, pad=128_001,
                   rows=parts.rows(25), **marks)
    c.columns = 1_024                                       # not stated by the source
    c.layout = dict(name='parallel.upsampled', frame_hz=50.0, stack_frames=5)
    c.frontend = dict(name='summed', heard=('text',),
                      encoder=dict(name='mlp', features=6_400, hidden=2_048))
    c.backbone = parts.llama31_8b()
    c.head = dict(name='ctc', most_units=2_048, decoder=parts.llama2_7b(layers=2))
    c.objective = dict(name='weighted_ce', terms=dict(text=('text',), audio=('audio',)))
    written = dict(name='parallel.upsampled', frame_hz=50.0, stack_frames=5, said='text')
    c.data = dict(path='', sources=dict(
        voice=dict(select=('instruct',)), written=dict(select=('instruct',), layout=written)))
    # 3 epochs of 200,000 answers, 3 % of it warm-up.
    common = dict(steps=18_750, batch=32, schedule='cosine', warmup_steps=563, final_lr=0.0)
    c.stages = stages(common)
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        demo(c, marks)
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=1, heads=4, mlp=64)
        c.frontend.encoder = dict(name='listener', features=640, inside=16, layers=1, heads=2,
                                  mlp=32)
        c.head.decoder = parts.small(c.backbone, width=32, layers=1, heads=4, mlp=64)
        c.head.most_units = 64
        parts.tiny(c, columns=96)
    return c


SPEAKS = 'head/(inputs|decoder|out)/.*'


def stages(common: dict) -> tuple:
    """(1) adaptor and language model learn to answer in text, (2) the decoder learns to speak."""
    return (
        dict(name='understand', data=dict(written=1.0), lr=2e-5,
             train=((SPEAKS, None), ('.*', 1.0)), **common),
        dict(name='speak', data=dict(voice=1.0), lr=2e-4, start='understand',
             train=((SPEAKS, 1.0), ('.*', None)), **common))


def demo(c, marks: dict) -> None:
    """The system on the demo corpus, kept with its audio (--keep-wav); an answer has 10 units
    for each of its words, which long ones take from short ones.

    The first stage also reads exchanges, which stand in for what a text model knows.
    """
    c.codec = parts.demo_units()
    c.vocab = dict(name='parallel', rows=parts.rows(10), **marks, **parts.DEMO_TEXT)
    c.columns = 128

    def upsampled(**options):
        return dict(name='parallel.upsampled', frame_hz=25.0, stack_frames=8) | options
    c.layout = upsampled()
    c.frontend = dict(name='summed', dtype='float32', heard=('text',), encoder=parts.DEMO_EAR)
    c.backbone = parts.small(c.backbone, width=160, layers=5, heads=4, mlp=448, block_columns=64,
                             theta=10_000.0, rope_scaling='none')
    # A window of the decoder holds most answers whole; all columns of a row would be 1,280 repeats.
    c.head = dict(name='ctc', most_units=192, decoder=parts.small(
        c.backbone, width=128, layers=2, heads=4, mlp=352, window_columns=192))
    c.data = dict(path=parts.DEMO, sources=dict(
        voice=dict(select=('dialogue',)),
        written=dict(select=('dialogue',), layout=upsampled(said='text')),
        asr=dict(select=('story',), layout=upsampled(said='text', task='same')),
        spelled=dict(select=('exchange',), layout=upsampled(heard='text')),
        aloud=dict(select=('story', 'dialogue'), layout=upsampled(heard='text', task='same'))))
    common = dict(batch=16, schedule='cosine', warmup_steps=40, final_lr=0.05, weight_decay=0.05,
                  save_steps=200, log_steps=20, probe_steps=200)
    understand, speak = stages(common)
    c.stages = (
        understand | dict(steps=450, lr=3e-3, data=dict(written=0.4, asr=0.4, spelled=0.2)),
        speak | dict(steps=280, batch=8, lr=2e-3, data=dict(voice=0.2, aloud=0.8)))
    c.evals = dict(likelihood=dict(name='likelihood', sources=('voice',)),
                   replies=dict(name='replies', source='voice'),
                   aloud=dict(name='replies', source='aloud', listener='asr'))

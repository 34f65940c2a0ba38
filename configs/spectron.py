# SPDX-License-Identifier: Apache-2.0
"""Spectron: writes down what it hears, goes on in words, then speaks in frames (arXiv 2305.15255).

An encoder's features of a spoken prompt enter; the text of the whole utterance follows, and then
its continuation as a spectrogram, frame by frame, each the input of the next. Cross entropy on the
text; L1 + L2 on the frames, on their differences from bin to bin, and on those from frame to frame.

  look     python -m jaxsd show     --config configs/spectron.py:demo --source told
  smoke    python -m jaxsd train    --config configs/spectron.py:tiny --workdir runs/spectron_tiny
  demo     python -m jaxsd train    --config configs/spectron.py:demo --workdir runs/spectron
  train    python -m jaxsd train    --config configs/spectron.py --workdir $WORKDIR
Size       1 B by the tables of others, with a 600 M encoder; the source does not settle it.
Evidence   the grid against a hand-drawn one, the losses against the arithmetic of three frames,
           generation against the training forward (tests/test_frames.py). Trained by us at scale:
           no. What the source does not state is said where it is set. The encoder is a transformer
           of the 600 M Conformer's depth and width, without its convolutions and its pretraining on
           12 million hours; the sound is heard through Griffin-Lim, not WaveFit. Terms are means
           and not sums. The end of speech is learned (the paper's length is fixed).
           Betas, decay and clipping are the project's defaults.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg

MARKS = ('frame', 'end')


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False)
    c = mlc.ConfigDict()
    c.seed = 0
    # 128 bins in windows of 50 ms every 12.5 ms (from memory). The fields of a codec that are left
    # say that there are no units.
    bins, hz = 128, 80.0
    c.codec = dict(name='kmeans', path='', frame_hz=hz, size=1, codebooks=1)
    c.vocab = dict(name='parallel', text_tokens=256_000, rows=(), text_marks=MARKS)     # PaLM's
    c.columns = 1_024                                       # not stated by the source
    c.layout = dict(name='framed.continued', prompt_s=3.0, stack_frames=4)  # prompt from memory
    # A column hears 50 ms; how far the encoder subsamples is not stated by the source.
    c.frontend = dict(
        name='summed', encoder=dict(name='listener', features=4 * bins, inside=1_024, layers=24,
                                    heads=16, mlp=6_656),
        # Neither its width nor what lies between its maps is stated by the source.
        prenet=dict(name='mlp', features=bins, hidden=256))
    # PaLM 2 of 1 B (quoted elsewhere); its sizes are not stated by any source.
    c.backbone = dict(name='decoder', width=1_536, layers=12, heads=12, kv_heads=12, head_dim=128,
                      mlp=6_144, theta=10_000.0, norm_eps=1e-6)
    c.head = dict(name='spectrogram', features=bins, hidden=256)
    # All weights are 1 and K is 3 (from memory).
    c.objective = dict(name='frames', terms=dict(text=('text',)), bins=bins, delta_frames=3)
    c.data = dict(path='', sources=dict(told=dict(select=('librilight',))))
    # Libri-Light with transcripts of a recognizer; nothing else is stated by the source.
    c.stages = (dict(name='train', steps=100_000, batch=128, lr=1e-4, schedule='rsqrt',
                     warmup_steps=4_000, data=dict(told=1.0)),)
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.demo or arg.tiny:
        demo(c)
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=1, heads=4, mlp=64)
        c.frontend.encoder = dict(name='listener', features=640, inside=16, layers=1, heads=2,
                                  mlp=32)
        parts.tiny(c, columns=256)
    return c


def demo(c) -> None:
    """Stories of the demo corpus, kept with its audio (--keep-wav): 80 bins, 80 ms in a column.

    Some are only read aloud, in whatever voice; what is heard goes on in the voice it began in.
    Half of the columns are not read back while it learns: else the next frame is a copy of the
    last, and what it says alone blurs and never ends. Differences weigh a tenth: until what is said
    is right, theirs are least when all is the same. What is read back goes through gates: of
    rectifiers most died.
    """
    bins, each, mean = 80, 8, -0.6
    c.codec = parts.demo_units()
    c.vocab = dict(name='parallel', rows=(), text_marks=MARKS, **parts.DEMO_TEXT)
    c.columns = 256

    def told(prompt_s: float) -> dict:
        return dict(name='framed.continued', prompt_s=prompt_s, stack_frames=8,
                    frames_per_column=each, weight_frame=0.1, withheld=0.5)
    c.layout = told(1.5)
    c.frontend = dict(name='summed', dtype='float32', encoder=parts.DEMO_EAR,
                      prenet=dict(name='gated', features=each * bins, hidden=64, mean=mean))
    c.backbone = parts.demo_decoder(c.backbone)
    c.head = dict(name='spectrogram', features=each * bins, hidden=256, mean=mean, deviation=0.45)
    c.objective.bins = bins
    c.objective.scales = {'bins': 0.1, 'time 1': 0.1, 'time 2': 0.1, 'time 3': 0.1}
    c.data = dict(path=parts.DEMO, sources=dict(
        told=dict(select=('story',)), aloud=dict(select=('story',), layout=told(0.0))))
    c.stages = (parts.demo_stage('train', 800, dict(told=0.5, aloud=0.5)),)
    c.evals = dict(likelihood=dict(name='likelihood', sources=('told', 'aloud')),
                   written=dict(name='written', source='told'),
                   sounds=dict(name='sounds', source='told'),
                   aloud=dict(name='sounds', source='aloud'))

# SPDX-License-Identifier: Apache-2.0
"""Moshi: full-duplex dialogue with an inner monologue (arXiv 2410.00037).

One column per 80 ms frame: text, then 8 of my codes, then 8 of theirs. A temporal transformer runs
over columns and a small depth transformer over the rows of one column.

  look     python -m jaxsd show     --config configs/moshi.py:demo --source dialogue
  fits?    python -m jaxsd plan     --config configs/moshi.py --topology v5p:8x8x8 --search
  smoke    python -m jaxsd train    --config configs/moshi.py:tiny --workdir runs/moshi_tiny
  demo     python -m jaxsd train    --config configs/moshi.py:demo --workdir runs/moshi
  stages   python -m jaxsd train    --config configs/moshi.py:demo,course=paper --workdir runs/all
  train    python -m jaxsd train    --config configs/moshi.py --stage pretrain --workdir $WORKDIR
  warm     the same with --config configs/moshi.py:text=hf:path/to/helium, as in the paper
  released python -m jaxsd import   --config configs/moshi.py:mine --stage instruct --format kyutai
                                    --source path/to/moshiko --workdir $WORKDIR
  adapt    python -m jaxsd train    --config configs/moshi.py:mine --stage adapt --workdir $WORKDIR
Size       7.69 B released, which `mine` has to the last one (7,687,729,152 with vocab.multiple=1);
           in training both speakers are predicted, with depth steps for each.
Evidence   same logits as the released implementation with tiny random weights
           (tests/test_parity.py); the demo (own codec, own corpus) is trained and judged by make
           quickstart. Trained by us at scale: no.
"""

import ml_collections as mlc

from configs import _parts as parts
from jaxsd.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, demo=False, share=1.0, text='', mine=False, course='short')
    c = mlc.ConfigDict()
    c.seed = 0
    c.codec = dict(name='mimi', path='', codebooks=8, frame_hz=12.5, size=2048)
    c.vocab = dict(name='streams', text_tokens=32_000, tokenizer='', speakers=('mine', 'theirs'),
                   predicted=('mine', 'theirs'), multiple=128)  # both in training (§4.4)
    c.columns = 3_750                                           # 300 s
    c.layout = dict(name='duplex.columns', acoustic_delay_columns=1, weight_pad=0.5,
                    weight_theirs=1.0)
    c.frontend = dict(name='summed')
    c.backbone = parts.helium_7b(window_columns=3_000)
    c.head = dict(name='depth', width=1_024, layers=6, heads=16, mlp=2_816)
    c.objective = dict(name='weighted_ce', terms=dict(text=('text',), audio=('mine', 'theirs')))
    c.data = dict(path='', sources=dict(
        mono=dict(select=('unsupervised',)), simulated=dict(select=('unsupervised',)),
        fisher=dict(select=('fisher',)), instruct=dict(select=('instruct',)),
        text=dict(select=('text',))))
    mono = dict(name='duplex.columns', acoustic_delay_columns=2, weight_pad=0.5, theirs='none',
                text_shift_s=0.6, drop_text=0.3)
    # Whose turn it is to be me is drawn, but for the dialogues written for me (§4.3, 4.4).
    drawn = dict(c.layout) | dict(mine='random')
    written = dict(data=dict(text=1.0))
    speeds = ('head/(inputs|tables|text_table|blocks|outs)/?.*',)

    def at(temporal, depth, text=1.0):      # multipliers, for rates that Table 1 gives by part
        slower = (('head/text_out/.*', text),) if text != 1.0 else ()
        return dict(lr=temporal, train=(*slower, (speeds[0], depth / temporal), ('.*', 1.0)))
    c.stages = (
        # Half the steps read text alone, with moments of their own; the rate of the text head is
        # 0.75 of the others' where there is sound. (So is that of the text's embeddings; here one
        # table holds all embeddings and keeps its rate.) Warm-up: not stated by the source.
        dict(name='pretrain', steps=1_000_000, batch=192, data=dict(mono=1.0),
             apart=written | dict(share=0.5, train=at(3e-5, 2e-4)['train']), layout=mono,
             schedule='cosine', warmup_steps=10_000, **at(3e-5, 2e-4, text=0.75)),
        dict(name='posttrain', steps=100_000, batch=96, data=dict(simulated=1.0), layout=drawn,
             apart=written | dict(share=0.1), start='pretrain', **at(3e-6, 5e-5)),
        dict(name='duplex', steps=10_000, batch=8, data=dict(fisher=1.0), layout=drawn,
             start='posttrain', **at(2e-6, 4e-6)),
        dict(name='instruct', steps=30_000, batch=32, data=dict(instruct=1.0), start='duplex',
             **at(2e-6, 2e-6)),
        dict(name='adapt', steps=2_000, batch=16, data=dict(instruct=1.0), start='instruct',
             lr=2e-6, lora=dict(rank=128, scale=2.0), warmup_steps=100,
             train=(('.*/lora_[ab]', 1.0), ('.*', None))))
    c.mesh = dict(fsdp=-1)
    c.evals = dict()
    if arg.mine:        # speaks for one, as the released checkpoints do
        c.vocab.predicted, c.layout.weight_theirs = ('mine',), 0.0
    if arg.course not in ('short', 'paper'):
        raise ValueError(f'course is short or paper, got {arg.course!r}')
    if arg.demo or arg.tiny:
        if arg.mine and arg.course == 'paper':
            raise ValueError('course=paper of the demo predicts both speakers and mine only one: '
                             'leave one of the two out')
        published = c.stages
        demo(c)
        if arg.course == 'paper':
            paper_course(c, published)
    if not 0.0 < arg.share <= 100.0:
        raise ValueError(f'share lies above 0 and up to 100, got {arg.share}')
    if arg.share != 1.0:        # a shorter or longer run of every stage
        c.stages = tuple(dict(s) | dict(steps=max(1 + s.get('warmup_steps', 0),
                                                  round(arg.share * s['steps'])))
                         for s in c.stages)
    if arg.tiny:
        c.backbone = parts.small(c.backbone, width=32, layers=2, heads=4, mlp=64)
        c.head = dict(name='depth', width=16, layers=1, heads=2, mlp=32, fraction=0.5)
        parts.tiny(c, columns=192)
    if arg.text:        # the temporal transformer begins as a text model of its sizes (Table 1)
        graft = dict(rows=dict(name='normal', sigma=c.backbone['width']**-0.5), fresh=speeds,
                     unlike=('backbone.window_columns',))
        c.stages = (dict(c.stages[0]) | dict(start=arg.text, graft=graft), *c.stages[1:])
    return c


def demo(c) -> None:
    """The system on the demo corpus at a few million parameters; only my stream is spoken.

    It first learns to listen: stories, and the users of dialogues, come in on the other stream and
    are written down a little late, streaming recognition by delay alone (§5.7). Then it converses.
    Some rows are text alone, questions with their answers: the paper's batches of text (§4.3).
    A last stage of larger batches makes it surer of its sums.
    """
    c.codec = parts.demo_codec()
    c.vocab = dict(name='streams', predicted=('mine',), **parts.DEMO_TEXT)
    c.columns = 256
    # Most text cells of this corpus are padding; and it is small enough to be learned by heart.
    quiet = dict(weight_pad=0.1, weight_epad=0.3, mask_theirs=0.2)
    c.layout = dict(name='duplex.columns', weight_semantic=20.0, **quiet)
    c.frontend = dict(name='summed', dtype='float32')
    c.backbone = parts.small(c.backbone, width=160, layers=6, heads=4, mlp=448, window_columns=250,
                             block_columns=64)
    c.head = dict(name='depth', width=96, layers=2, heads=2, mlp=256, fraction=0.125)

    def listening_to(channel):
        return dict(name='duplex.columns', mine='none', theirs=channel, text='theirs',
                    text_delay_columns=8, **quiet)
    c.data = dict(path=parts.DEMO, sources=dict(
        dialogue=dict(select=('dialogue',)),
        stories=dict(select=('story',), layout=listening_to(0)),
        users=dict(select=('dialogue',), layout=listening_to(1)),
        written=dict(select=('exchange',))))
    common = dict(batch=8, schedule='cosine', warmup_steps=40, weight_decay=0.05, save_steps=200,
                  log_steps=20, probe_steps=200)
    c.stages = (
        dict(name='listen', steps=1_000, lr=3e-3, final_lr=0.3,
             data=dict(stories=0.5, users=0.45, written=0.05), **common),
        dict(name='duplex', steps=2_000, lr=2e-3, final_lr=0.05, start='listen',
             data=dict(dialogue=0.7, stories=0.1, users=0.15, written=0.05), **common),
        dict(name='refine', steps=600, lr=1.5e-3, final_lr=0.02, start='duplex',
             data=dict(dialogue=0.8, stories=0.05, users=0.1, written=0.05),
             **common | dict(batch=16)))
    c.evals = dict(likelihood=dict(name='likelihood', sources=('dialogue', 'users')),
                   answers=dict(name='answers', source='dialogue'),
                   turns=parts.turn_taking('dialogue', listener='stories'))


def paper_course(c, published) -> None:
    """The paper's own stages, one after another, on the demo corpus: single stream beside text with
    moments apart, simulated and real two streams, instruction with a user over a bad line, LoRA.

    The corpus needs the copies that data_pipelines.augment adds (source `noisy`); its dialogues
    stand for simulated and real ones alike, its exchanges for text.
    """
    c.vocab.predicted = ('mine', 'theirs')
    c.data = dict(path=parts.DEMO, sources=dict(
        mono=dict(select=('story',)), simulated=dict(select=('dialogue',)),
        fisher=dict(select=('dialogue',)), instruct=dict(select=('noisy',)),
        text=dict(select=('exchange',))))
    c.objective.terms = dict(text=('text',), audio=('mine', 'theirs'))
    c.layout = dict(name='duplex.columns', weight_theirs=1.0)
    sizes = dict(pretrain=(600, 1e-3), posttrain=(200, 5e-4), duplex=(400, 5e-4),
                 instruct=(400, 5e-4), adapt=(100, 5e-4))
    c.stages = tuple(
        dict(s) | dict(steps=sizes[s['name']][0], lr=sizes[s['name']][1], batch=8, save_steps=200,
                       log_steps=20, warmup_steps=20)
        | (dict(lora=dict(rank=8, scale=2.0)) if s['name'] == 'adapt' else {}) for s in published)
    c.evals = dict(likelihood=dict(name='likelihood', sources=('instruct',)),
                   answers=dict(name='answers', source='instruct'),
                   turns=parts.turn_taking('instruct'))

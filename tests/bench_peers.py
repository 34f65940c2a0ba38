# SPDX-License-Identifier: Apache-2.0
"""How fast: our step and the PyTorch implementation's, alternately, on this machine.

    .peers/bin/python tests/bench_peers.py [--cases llama,moshi] [--pairs 9] [--threads 2]

Both sides have the same weights (ours, which the peer loads from our export), inputs, float32 and
optimizer (AdamW, clipping), so the first losses agree; each runs in a process of its own, which
sleeps while the other works. PyTorch runs eagerly and compiled, and the ratio is against the faster
of the two. Prints one line per case: medians in milliseconds, the ratio theirs / ours (above 1: we
are faster) as the median over pairs with its quartiles, and JSON with --json FILE. Of first audio,
a conversation is begun anew every time, untimed: milliseconds of work on the two frames of sound
that must be heard before a frame can be decoded that may answer, on whose time both sides wait.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
WARM = 3            # untimed calls of each side
PROMPT, SPOKEN = 32, 96     # columns of a prompt and of what follows it

LLAMA = dict(head_dim=32, kv_heads=8, heads=8, width=256, layers=8, mlp=704)
MEDIUM = dict(head_dim=64, kv_heads=12, heads=12, width=768, layers=8, mlp=2048)
SPOKEN_SMALL = dict(width=256, heads=4, kv_heads=4, head_dim=64, layers=6, mlp=704)
SPOKEN_MEDIUM = dict(width=640, heads=10, kv_heads=10, head_dim=64, layers=10, mlp=1760)
# name: (what is timed, how the model is built, sizes)
CASES = {
    'llama': ('train', 'llama', LLAMA),
    'llama medium': ('train', 'llama', MEDIUM),
    'mixtral': ('train', 'mixtral', LLAMA | dict(layers=4, mlp=448, experts=8,
                                                 experts_per_column=2)),
    'moshi': ('train', 'streams', SPOKEN_SMALL),
    'moshi medium': ('train', 'streams', SPOKEN_MEDIUM),
    'demo frame': ('frame', 'streams', {}),         # of the demo itself
    'moshi frame': ('frame', 'streams', SPOKEN_SMALL),
    'moshi frame medium': ('frame', 'streams', SPOKEN_MEDIUM),
    'demo first audio': ('first', 'streams', {}),
    'moshi first audio': ('first', 'streams', SPOKEN_SMALL),
    'moshi first audio medium': ('first', 'streams', SPOKEN_MEDIUM),
    'generate': ('speak', 'llama', LLAMA),
    'generate medium': ('speak', 'llama', MEDIUM),
}


def config_of(case: str):
    """The config of a case, on the demo systems' mechanisms."""
    import released
    _, kind, sizes = CASES[case]
    if not sizes:
        from jaxsd import config
        c = config.read(str(ROOT / 'configs/moshi.py:demo'))
        c.codec.path = c.vocab.tokenizer = ''       # random weights need neither
        return c
    if kind == 'streams':
        medium = sizes['width'] > 256
        c = released.multistream(**sizes, window_columns=256, theta=1e4, head=dict(
            width=256 if medium else 128, layers=4, heads=4, mlp=704 if medium else 352))
        c.codec = dict(name='rvq', path='', frame_hz=12.5, codebooks=8,
                       size=1024 if medium else 256)
        c.vocab.text_tokens = 4096
        c.objective = dict(name='weighted_ce', terms=dict(text=('text',), audio=('mine',)))
    else:
        c = released.decoder(kind, **sizes, theta=1e4)
        c.codec = dict(name='kmeans', path='', frame_hz=25.0, size=510, codebooks=1)
        c.vocab = dict(name='line', text_tokens=3584, multiple=128)
    c.columns, c.backbone.block_columns = 512, 128
    return c


def inputs_of(case: str):
    """What both sides read: codes [4, rows, 128] of many streams, or ids [4, 512] of one."""
    import numpy as np

    from jaxsd import model
    rng, rows = np.random.default_rng(0), model.make_vocab(config_of(case)).rows
    if len(rows) == 1:
        return rng.integers(3, rows[0].size, (4, 512)).astype(np.int32)
    return np.stack([rng.integers(0, row.size - 1, (4, 128)) for row in rows], 1).astype(np.int32)


def spoken(kind: str, step, begin):
    """What is timed of a conversation whose `step` hears a frame and returns one, or None: a frame,
    or the first two of a new one, after which both have said what may answer the first."""
    def frame():
        step()

    def first():
        step()
        assert step() is not None
        return 2
    first.before = begin
    return first if kind == 'first' else frame


# Ours.

def ours(case: str, folder: str):
    """A function that does the work once and returns a number to compare (or None)."""
    sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
    from jaxsd import cli
    cli._before_jax()
    import jax
    import numpy as np

    from jaxsd import export, generate, model, trained
    jax.config.update('jax_compilation_cache_dir', None)
    kind, config = CASES[case][0], config_of(case)
    params = jax.jit(lambda key: model.init(config, key))(jax.random.key(0))
    export.save(config, params, os.path.join(folder, 'export'),
                'kyutai' if CASES[case][1] == 'streams' else 'hf')
    given = inputs_of(case)
    np.save(os.path.join(folder, 'inputs.npy'), given)
    if kind == 'train':
        return _our_training(config, params, given)
    (graph, _, axes), v = model.abstract(config), model.make_vocab(config)
    speaker = generate.ready(graph, trained.streamed(params, axes), v, {},
                             config.backbone.get('window_columns'))
    if kind == 'speak':
        stream = None

        def speak():
            nonlocal stream
            stream = generate.Stream(speaker, rows=1, columns=PROMPT + SPOKEN,
                                     key=jax.random.key(0))
            free = np.full((1, 1), generate.FREE, np.int32)
            stream.first([given[:1, :PROMPT]], free)
            out = stream.more(np.full((SPOKEN - 1, 1, 1), generate.FREE, np.int32))
            return float(np.asarray(out)[-1].sum())
        return speak
    room = generate.Room(speaker, trained.layout_delays(config.layout, v), slots=1, columns=256,
                         key=jax.random.key(0))
    frame = 0

    def step():
        nonlocal frame
        frame = (frame + 1) % given.shape[-1]
        return room.step({0: given[0, 9:, frame]}).get(0)
    return spoken(kind, step, lambda: room.begin(0))


def _our_training(config, params, given):
    import numpy as np
    import released

    from jaxsd import state, train
    from jaxsd.stage import Stage
    stage = Stage(name='all', steps=1000, batch=4, data={}, lr=1e-4)
    step, target, by_path = train.step_on(config, stage, state.mesh_of(config))
    held = state.fresh_state(config, stage, target, by_path, params)
    if given.ndim == 3:
        tokens = released.columns_of(config, given)
        late = np.array(released.late(config))[:, None]
        weights = np.arange(tokens.shape[-1]) >= 1 + late
    else:
        tokens = given[:, None]
        weights = np.arange(tokens.shape[-1]) >= 1
    B, _, T = tokens.shape
    batch = dict(tokens=tokens, position=np.tile(np.arange(T, dtype=np.int32), (B, 1)),
                 weights=np.broadcast_to(weights, tokens.shape).astype(np.float32),
                 segment=np.ones((B, T), np.int32))

    def once():
        nonlocal held
        held, sums = step(held, batch)
        return float(sums['loss'])
    return once


# Theirs.

def theirs(case: str, folder: str, compiled: bool, threads: int):
    if not compiled:
        os.environ['NO_TORCH_COMPILE'] = '1'
    import numpy as np
    import torch
    torch.set_num_threads(threads)
    kind, build, _ = CASES[case]
    out, given = os.path.join(folder, 'export'), torch.tensor(
        np.load(os.path.join(folder, 'inputs.npy'))).long()
    if build == 'streams':
        from moshi.models import loaders
        path = pathlib.Path(out)
        lm = loaders.CheckpointInfo.from_hf_repo(
            'nowhere/local', moshi_weights=path / 'model.safetensors',
            mimi_weights=path / 'none', tokenizer=path / 'none',
            config_path=path / 'config.json').get_moshi(device='cpu', dtype=torch.float32)
    else:
        import transformers
        lm = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    if kind == 'train':
        return _their_training(lm, given, compiled)
    lm.eval()
    torch.set_grad_enabled(False)
    if kind == 'speak':
        if compiled:
            lm.forward = torch.compile(lm.forward)
        def speak():
            out = lm.generate(given[:1, :PROMPT], max_new_tokens=SPOKEN, min_new_tokens=SPOKEN,
                              do_sample=False, eos_token_id=None, pad_token_id=0,
                              **(dict(cache_implementation='static') if compiled else {}))
            return float(out[0, -1])
        return speak
    from moshi.models.lm import LMGen
    speaker = LMGen(lm, use_sampling=False)
    speaker.streaming_forever(1)
    frame = 0

    def step():
        nonlocal frame
        frame = (frame + 1) % given.shape[-1]
        return speaker.step(given[:1, 9:, frame:frame + 1])
    return spoken(kind, step, speaker.reset_streaming)


def _their_training(lm, given, compiled: bool):
    import torch
    from torch.nn import functional as F
    lm.train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-4, betas=(.9, .95), weight_decay=.1,
                                  fused=True)
    if given.ndim == 3:
        def loss_of(codes):
            out = lm(codes)
            return (F.cross_entropy(out.text_logits[out.text_mask], codes[:, :1][out.text_mask])
                    + F.cross_entropy(out.logits[out.mask], codes[:, 1:9][out.mask]))
    else:
        def loss_of(tokens):
            return lm(input_ids=tokens, labels=tokens, use_cache=False).loss
    run = torch.compile(loss_of) if compiled else loss_of

    def once():
        loss = run(given)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)
    return once


# Both, alternately.

def worker(side: str, case: str, folder: str, threads: int) -> None:
    """Answers every line on standard input with [seconds, number] of one call."""
    said, sys.stdout = sys.stdout, sys.stderr       # what libraries print is not an answer
    once = (ours(case, folder) if side == 'ours' else
            theirs(case, folder, side == 'compiled', threads))
    before = getattr(once, 'before', lambda: None)
    before()
    first = once()
    for _ in range(WARM - 1):
        before()
        once()
    print(json.dumps(first), file=said, flush=True)
    for _ in sys.stdin:
        before()
        start = time.perf_counter()
        once()
        print(json.dumps(time.perf_counter() - start), file=said, flush=True)


class Side:
    """A worker process."""

    def __init__(self, side: str, case: str, folder: str, threads: int):
        env = os.environ | dict(OMP_NUM_THREADS=str(threads), JAX_PLATFORMS='cpu',
                                TOKENIZERS_PARALLELISM='false')
        self.process = subprocess.Popen(
            [sys.executable, __file__, '--worker', side, '--cases', case, '--folder', folder,
             '--threads', str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if side == 'compiled' else None, text=True, env=env)
        self.first = self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def time(self) -> float:
        self.process.stdin.write('\n')
        self.process.stdin.flush()
        return self._answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure(case: str, pairs: int, threads: int) -> dict:
    """Seconds of every side, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {}
        for name in ('ours', 'eager', 'compiled'):
            side = Side(name, case, folder, threads)
            if side.process.poll() is None:
                sides[name] = side
            else:
                print(f'{case}: {name} does not run here', file=sys.stderr)
        first = {name: side.first for name, side in sides.items()}
        times = {name: [] for name in sides}
        for _ in range(pairs):
            for name, side in sides.items():
                times[name].append(side.time())
        for side in sides.values():
            side.close()
    best = min((n for n in times if n != 'ours'), key=lambda n: statistics.median(times[n]))
    ratios = sorted(b / a for a, b in zip(times['ours'], times[best], strict=True))
    return dict(case=case, first=first, against=best, ratio=statistics.median(ratios),
                ms={n: 1e3 * statistics.median(t) for n, t in times.items()},
                quartiles=(ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--cases', default=','.join(CASES), help=f'among {", ".join(CASES)}')
    p.add_argument('--pairs', type=int, default=9)
    p.add_argument('--threads', type=int, default=os.cpu_count())
    p.add_argument('--json', metavar='FILE')
    p.add_argument('--worker', help=argparse.SUPPRESS)
    p.add_argument('--folder', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        worker(args.worker, args.cases, args.folder, args.threads)
        return
    cases = args.cases.split(',')
    if wrong := set(cases) - set(CASES):
        p.error(f'--cases: {", ".join(sorted(wrong))}; there are {", ".join(CASES)}')
    found = []
    for case in cases:
        r = measure(case, args.pairs, args.threads)
        found.append(r)
        print(f'{case}: ' + ', '.join(f'{n} {t:.1f} ms' for n, t in r['ms'].items())
              + f'; {r["against"]} / ours {r["ratio"]:.2f} '
              f'({r["quartiles"][0]:.2f} to {r["quartiles"][1]:.2f}); first numbers '
              + ', '.join(f'{n} {x}' for n, x in r['first'].items()), flush=True)
    if args.json:
        with open(args.json, 'w', encoding='utf-8') as f:
            json.dump(found, f, indent=1)


if __name__ == '__main__':
    main()

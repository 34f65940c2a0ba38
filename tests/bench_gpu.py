# SPDX-License-Identifier: Apache-2.0
"""Published sizes on one GPU: our step and our frame, and those of the moshi package.

    python tests/bench_gpu.py [--cases adapt,adapt theirs] [--limit-s 150] [--json FILE]

Every case has the GPU for itself, in a process of its own. 'adapt' is moshi-finetune's recipe
(example/moshi_7B.yaml: rank 128 on every linear, 16 dialogues of 100 s, recomputed layers), ours by
`jaxsd bench`, theirs by the package's LMModel as train.py steps it. 'frame' is one frame of one
conversation, sampled, of a full window's ring: ours by the room that `talk` speaks from, theirs by
LMGen, which captures CUDA graphs. Weights and codes are random. 'attention' compares engines.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS, FRAMES, WARM = 6, 100, 20
ROWS, COLUMNS = 16, 1250        # of moshi-finetune's example
RANK = 128


def training(config: str, nth: int, rows: int, columns: int, remat: str = 'full'):
    """What `jaxsd bench` finds of a config's nth stage at a batch of rows of columns."""
    def measure():
        from jaxsd import bench
        from jaxsd.config import overridden, read
        c = overridden(read(str(ROOT / config)), [
            ('mesh.fsdp', '1'), ('columns', str(columns)), ('backbone.remat', remat),
            (f'stages[{nth}].batch', str(rows))])
        return bench.run(c, stage_name=c.stages[nth]['name'], steps=STEPS)
    return measure


def frame():
    """Milliseconds of a frame from the codes heard to the codes said, on the host."""
    import jax
    import numpy as np

    from jaxsd import generate, trained
    from jaxsd.config import read
    c = read(str(ROOT / 'configs/moshi.py:mine'))
    lm = trained.load(c, '', 'instruct', untrained=True)
    speaker = lm.speaker(dict(text=generate.Sampler(0.7, 25), mine=generate.Sampler(0.8, 250)))
    late = trained.layout_delays(dict(c.layout), lm.vocab)
    room = generate.Room(speaker, late, slots=1, columns=c.columns, key=jax.random.key(0))
    heard = np.random.default_rng(0).integers(0, 2048, (WARM + FRAMES, 8))
    return _frames(lambda n: room.step({0: heard[n]}))


def frame_theirs():
    import torch
    from moshi.models.lm import LMGen
    torch.set_grad_enabled(False)
    speaker = LMGen(_their_model().eval())
    speaker.streaming_forever(1)
    heard = torch.randint(0, 2048, (1, 8, WARM + FRAMES), device='cuda')

    def once(n):
        out = speaker.step(heard[:, :, n:n + 1])
        return None if out is None else out.cpu()
    return _frames(once)


def attention(implementation: str = 'cudnn'):
    """The most that cuDNN's outputs and gradients on packed rows differ from those of the engine
    'xla', as a share of the largest number; bfloat16, keys shared by two heads."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxsd import attention as engines
    from jaxsd.types import Where
    rng, T = np.random.default_rng(0), COLUMNS
    q, k, v = (jnp.asarray(rng.normal(size=(2, T, heads, 128)), jnp.bfloat16)
               for heads in (8, 4, 4))
    column, segment = np.arange(T), np.where(np.arange(T) < 500, 1, 2)
    segment[T - 50:] = 0
    where = Where(*(jnp.tile(jnp.asarray(x, jnp.int32), (2, 1)) for x in (
        np.where(segment == 2, column - 500, column), segment)))
    found = {}
    for window in (None, 700):
        def loss(q, k, v, engine, window=window):
            o = engine(q, k, v, where, where, engines.Part(0, 0, 1), window_columns=window,
                       block_columns=512).astype(jnp.float32)
            o = jnp.where((where.segment > 0)[:, :, None, None], o, 0)
            return jnp.sum(o * jnp.sin(jnp.arange(o.size).reshape(o.shape))), o

        def run(engine, loss=loss):
            grads, o = jax.jit(jax.grad(lambda *x: loss(*x, engine), (0, 1, 2), has_aux=True))(
                q, k, v)
            return [np.asarray(x, np.float32) for x in (o, *grads)]
        pairs = zip(run(engines.xla), run(
            functools.partial(engines.cudnn, implementation=implementation)), strict=True)
        found[f'window {window}'] = float(max(np.abs(a - b).max() / np.abs(a).max()
                                              for a, b in pairs))
    return found


def _frames(once):
    spent = []
    for n in range(WARM + FRAMES):
        begun = time.perf_counter()
        once(n)
        spent.append(1e3 * (time.perf_counter() - begun))
    spent = sorted(spent[WARM:])
    return {'frame ms': statistics.median(spent), 'p95 ms': spent[int(.95 * FRAMES)]}


def _their_model(**options):
    import torch
    from moshi.models import loaders
    lm = loaders.get_moshi_lm(None, device='meta', dtype=torch.bfloat16,
                              lm_kwargs_overrides=options)
    lm = lm.to_empty(device='cuda')
    with torch.no_grad():
        for x in lm.parameters():
            if x.ndim > 1:
                torch.nn.init.normal_(x, std=x.shape[-1] ** -0.5)
            else:
                torch.nn.init.ones_(x)
    return lm


def adapt_theirs():
    """Seconds of a step as moshi-finetune's train.py takes it: bf16 weights, float32 copies of the
    trained ones, losses weighted by its finetune/loss.py."""
    import torch
    from torch.nn import functional as F
    lm = _their_model(lora=True, lora_rank=RANK, lora_scaling=2.0, gradient_checkpointing=True)
    lm.train()
    for name, x in lm.named_parameters():
        x.requires_grad = 'lora' in name
    trained = [x for x in lm.parameters() if x.requires_grad]
    masters = [x.detach().float() for x in trained]
    optimizer = torch.optim.AdamW(masters, lr=2e-6, betas=(.9, .95), weight_decay=.1)

    def loss_of(logits, target, mask, weights):
        target = torch.where(mask, target, 0)
        each = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), target.reshape(-1),
                               reduction='none')
        weights = (weights * mask).reshape(-1)
        return torch.where(weights > 0, each * weights, 0).sum() / weights.sum()
    first = torch.ones(1, 8, 1, device='cuda')
    first[:, 0] = 100

    def once():
        codes = torch.randint(0, 2048, (ROWS, 17, COLUMNS), device='cuda')
        out = lm(codes)
        text = 1 - .5 * ((codes[:, :1] == 0) | (codes[:, :1] == 3)).float()
        loss = (loss_of(out.text_logits, codes[:, :1], out.text_mask, text)
                + loss_of(out.logits, codes[:, 1:9], out.mask, first))
        loss.backward()
        for master, x in zip(masters, trained, strict=True):
            master.grad, x.grad = x.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        for master, x in zip(masters, trained, strict=True):
            x.data.copy_(master)
        return loss.item()
    spent = []
    for _ in range(2 + STEPS):
        begun = time.perf_counter()
        once()
        spent.append(time.perf_counter() - begun)
    step_s = statistics.median(spent[2:])
    return {'first step s': spent[0], 'step s': step_s, 'positions/s': ROWS * COLUMNS / step_s,
            'peak memory GB': torch.cuda.max_memory_allocated() / 1e9,
            'parameters trained M': sum(x.numel() for x in trained) / 1e6}


CASES = {
    'attention': attention,
    'adapt': training('configs/moshi.py:mine', 4, ROWS, COLUMNS),
    'adapt theirs': adapt_theirs,
    'frame': frame,
    'frame theirs': frame_theirs,
    'moshi': training('configs/moshi.py:mine', 3, 4, 2048),
    'llama': training('configs/spirit_lm.py', 0, 4, 2048, remat='dots'),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--cases', default=','.join(CASES), help=f'among {", ".join(CASES)}')
    p.add_argument('--limit-s', type=int, default=300, help='of one case')
    p.add_argument('--json', metavar='FILE')
    p.add_argument('--worker', help=argparse.SUPPRESS)
    args = p.parse_args()
    sys.path[:0] = [str(ROOT)]
    if args.worker:
        print(json.dumps(CASES[args.worker]()))
        return
    found = {}
    for case in args.cases.split(','):
        if case not in CASES:
            p.error(f'--cases: {case}; there are {", ".join(CASES)}')
        env = os.environ | dict(XLA_PYTHON_CLIENT_MEM_FRACTION='.94')
        try:
            made = subprocess.run([sys.executable, __file__, '--worker', case], text=True, env=env,
                                  stdout=subprocess.PIPE, timeout=args.limit_s)
            found[case] = json.loads(made.stdout.splitlines()[-1]) if not made.returncode else None
        except subprocess.TimeoutExpired:
            found[case] = None
        print(f'{case}: {found[case]}', flush=True)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(found, indent=1), encoding='utf-8')


if __name__ == '__main__':
    main()

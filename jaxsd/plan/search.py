# SPDX-License-Identifier: Apache-2.0
"""Which mesh, batch and recomputation train a config fastest on a topology: tried, not guessed.

Candidates are ordered by a rough formula, compiled one after another while time is left, and judged
by the same estimate as any plan. A candidate that cannot win, or cannot fit because a smaller one
did not, is not compiled. Each takes the largest chunks of columns in its head that fit: for every
chunk the head's weights are gathered anew, and its products multiplied again.
"""

import copy
import dataclasses
import logging
import time

from jaxsd import model
from jaxsd.config import ConfigError, options_of, override, resolve, typed
from jaxsd.plan import estimate, targets
from jaxsd.stage import Stage, stages

log = logging.getLogger('jaxsd')

REMATS = ('none', 'dots', 'full')       # from most memory to least
RECOMPUTED = dict(none=0.0, dots=0.05, full=1 / 3)      # more work, roughly
TENSORS = (1, 2, 4, 8)
TAKES = 1.7         # times `least`, roughly, is what a step was seen to take
GROWTHS = (0.125, 0.25, 0.5, 1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is tried: the mesh, rows of all devices, `backbone.remat`, `head.chunk_columns` and the
    stage's `accumulate` (0: as the config has it)."""

    data: int
    fsdp: int
    tensor: int
    batch: int
    remat: str
    slices: int = 1
    chunk: int = 0
    accumulate: int = 0

    def pieces(self, stage: Stage) -> int:
        """How many microbatches a step is."""
        return self.accumulate or stage.accumulate

    def overrides(self, index: int) -> tuple[tuple[str, str], ...]:
        """(path, value) pairs for `--config.path=value`; `index` is the stage's."""
        sizes = (('data', self.data), ('fsdp', self.fsdp), ('tensor', self.tensor),
                 *[('slices', self.slices)][:self.slices - 1])
        return (*((f'mesh.{axis}', str(n)) for axis, n in sizes),
                (f'stages[{index}].batch', str(self.batch)), ('backbone.remat', self.remat),
                *[('head.chunk_columns', str(self.chunk))][:self.chunk],
                *[(f'stages[{index}].accumulate', str(self.accumulate))][:self.accumulate])

    def __str__(self):
        mesh = ' '.join(f'{a}={n}' for a, n in (('data', self.data), ('fsdp', self.fsdp),
                                                ('tensor', self.tensor)) if n > 1)
        chunk = f' chunks of {self.chunk}' if self.chunk else ''
        parts = f' accumulate={self.accumulate}' if self.accumulate else ''
        return f'{mesh or "one device"} batch={self.batch}{parts} remat={self.remat}{chunk}'


def index_of(config, stage: Stage) -> int:
    return [s.name for s in stages(config)].index(stage.name)


def changed(config, candidate: Candidate, index: int):
    """`config` with a candidate's choices."""
    out = copy.deepcopy(config)
    for path, value in candidate.overrides(index):
        override(out, path, value)
    return out


def candidates(config, stage: Stage, topology: targets.Topology, batches=()) -> list[Candidate]:
    """Every legal mesh and batch with every kind of recomputation, the most promising first.

    batches: rows to try; () tries the stage's own, its halves and doubles down to an eighth and up
    to eight times as many, and one row for every device that takes rows. A stage that accumulates
    is tried in one piece as well, for which its weights are gathered once.
    """
    n, slices, out = topology.size, topology.slices, set()
    taken = options_of(resolve(config.backbone.name, 'jaxsd.backbone'))
    remats = REMATS if 'remat' in taken else (config.backbone.get('remat', 'full'),)
    for tensor in TENSORS:
        if n % (tensor * slices):
            continue
        rest = n // tensor // slices
        for groups in (1, 8):
            if rest % groups or (groups > 1 and rest // groups < 8):
                continue
            ways = rest * slices
            for accumulate in (0, 1)[:stage.accumulate]:
                least_rows = ways * (accumulate or stage.accumulate)
                grown = batches or [stage.batch * k for k in GROWTHS] + [least_rows]
                for batch in map(int, grown):
                    if batch and batch % least_rows == 0:
                        out |= {Candidate(slices * groups, rest // groups, tensor, batch, remat,
                                          slices, accumulate=accumulate) for remat in remats}
    room = topology.chip.hbm_gib * 2**30 if topology.chip else float('inf')
    out = {c for c in out if 1.1 * least(config, stage, c) < room}

    # Of equals by the formula first what should fit, in one piece, in smaller groups, of more rows.
    def promise(c):
        return (float(f'{guess(config, stage, c, topology):.3g}'),
                TAKES * least(config, stage, c) > room, -c.accumulate, -c.data, -c.batch,
                dataclasses.astuple(c))
    return sorted(out, key=promise)


def guess(config, stage: Stage, c: Candidate, topology: targets.Topology) -> float:
    """Seconds per row, roughly: products, weights gathered, partial sums exchanged."""
    back, chip = config.backbone, topology.chip
    width, layers = back.width, back.layers
    weights = layers * (4 * width * back.heads * back.head_dim + 3 * width * back.mlp)
    columns = c.batch * config.columns / (c.data * c.fsdp)      # on one device
    if chip is None:
        return (1 + RECOMPUTED[c.remat]) * (1 + 0.1 * c.tensor) / c.batch
    peak = targets.peak_tflops(chip) * 1e12 * chip.reached
    products = 6 * weights * columns / c.tensor / peak * (1 + RECOMPUTED[c.remat])
    link = chip.link_gb_s * 1e9 * (2 if topology.platform == 'tpu' else 1)
    gathered = 8 * weights / c.tensor * (1 - 1 / c.fsdp) / link * c.pieces(stage)
    summed = 12 * layers * columns * width * (1 - 1 / c.tensor) / link
    return (max(products, gathered) + summed) / c.batch


def least(config, stage: Stage, c: Candidate) -> float:
    """Bytes that a device needs at least, roughly: weights with their moments, and what the layers
    keep for the backward pass."""
    back = config.backbone
    width, heads = back.width, back.head_dim * (back.heads + 2 * back.kv_heads)
    weights = back.layers * (4 * width * back.heads * back.head_dim + 3 * width * back.mlp)
    kept = dict(full=width, dots=3 * width + (heads + 2 * back.mlp) / c.tensor,
                none=7 * width + 2 * (heads + 2 * back.mlp) / c.tensor)[c.remat]
    columns = c.batch * config.columns / (c.data * c.fsdp * c.pieces(stage))
    return 12 * weights / (c.fsdp * c.tensor) + 2 * back.layers * columns * kept


def best(config, stage: Stage, topology: targets.Topology, *, minutes: float, batches=()
         ) -> tuple[estimate.Plan | None, Candidate | None, list]:
    """(the fastest plan that fits, its candidate, every (candidate, plan or error) that was tried).

    No compilation begins after `minutes`.
    """
    devices, index = targets.devices(topology), index_of(config, stage)
    todo = candidates(config, stage, topology, batches)
    if not todo:
        raise ConfigError(f'--search: no mesh of {topology} takes a multiple of batch '
                          f'{stage.batch}; give --batches')
    found, which, tried, start = None, None, [], time.monotonic()
    refused: list[Candidate] = []
    odd = set()     # placements that do not go up, whatever is recomputed

    def attempt(c: Candidate, place: str) -> bool:
        nonlocal found, which
        try:
            other = changed(config, c, index)
            made = estimate.of(other, stages(other)[index], topology, devices)
        except ValueError as e:         # ConfigError, too
            tried.append((c, str(e)))
            odd.add(_placed(c))
            log.info('search %s: %s: %s', place, c, e)
            return True     # and not for want of memory
        tried.append((c, made))
        log.info('search %s, %.0f s: %s: %s', place, time.monotonic() - start, c, _said(made))
        if not made.fits:
            refused.append(c)
        elif found is None or _rate(made) > _rate(found):
            found, which = made, c
        return made.fits

    sizes = chunks(config, topology)
    for i, c in enumerate(todo):
        if _placed(c) in odd:
            continue
        if which and (guess(config, stage, c, topology)
                      > 1.15 * guess(config, stage, which, topology)):
            continue        # far behind by a formula that errs on both alike
        for chunk in sizes:
            c = dataclasses.replace(c, chunk=chunk)
            if any(_needs_more(c, r) for r in refused) or not _has_room(config, stage, c, topology):
                continue
            if time.monotonic() - start > 60 * minutes:
                log.info('search: %g minutes are over, %d of %d candidates looked at', minutes, i,
                         len(todo))
                return found, which, tried
            if attempt(c, f'{i + 1}/{len(todo)}'):
                break
    return found, which, tried


def _placed(c: Candidate) -> tuple[int, ...]:
    return c.data, c.fsdp, c.tensor, c.batch, c.accumulate


def chunks(config, topology: targets.Topology) -> tuple[int, ...]:
    """`head.chunk_columns` to try: all columns, a half, a quarter, and as the config has it (0),
    which alone is tried where speeds are unknown and memory decides."""
    if topology.chip is None or 'chunk_columns' not in options_of(
            resolve(config.head.name, 'jaxsd.head')):
        return (0,)
    larger = (-(-config.columns // pieces) for pieces in (1, 2, 4))
    return (*(n for n in larger if n > config.head.get('chunk_columns', 512)), 0)


def _has_room(config, stage: Stage, c: Candidate, topology: targets.Topology) -> bool:
    """Whether a chunk's logits, in float32 and as a gradient, should fit beside the rest."""
    if not c.chunk:
        return True
    rows = c.batch / (c.data * c.fsdp * c.pieces(stage))
    ids = sum(row.predicted for row in model.make_vocab(config).rows)
    logits = 6 * rows * c.chunk * ids / c.tensor
    return TAKES * least(config, stage, c) + logits < topology.chip.hbm_gib * 2**30


def _rate(plan: estimate.Plan) -> float:
    """Higher is better: positions per second, or without a chip's speeds the least memory."""
    return plan.positions_per_s or -plan.compiled.peak


def _needs_more(c: Candidate, refused: Candidate) -> bool:
    """Whether `c` needs at least the memory of one that did not fit."""
    return ((c.data, c.fsdp, c.tensor) == (refused.data, refused.fsdp, refused.tensor)
            and c.batch >= refused.batch and c.chunk >= refused.chunk
            and c.accumulate >= refused.accumulate
            and REMATS.index(c.remat) <= REMATS.index(refused.remat))


def _said(plan: estimate.Plan) -> str:
    if not plan.fits:
        return plan.compiled.error
    used = f'{plan.compiled.peak / 2**30:.1f} GiB'
    return f'{used}, {plan.step_s:.3f} s, MFU {plan.mfu:.1%}' if plan.step_s else used


def pasted(overrides) -> str:
    """Overrides as they are typed, without those of axes that have one device."""
    return ' '.join(typed(f'--config.{path}={value}') for path, value in overrides
                    if not (path.startswith('mesh.') and value == '1' and path != 'mesh.fsdp'))

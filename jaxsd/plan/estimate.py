# SPDX-License-Identifier: Apache-2.0
"""One plan: the real train step of a config, compiled for machines that are not here.

Whether it fits is the compiler's word. FLOPs are counted in the traced program, bytes and
collectives in the compiled one; the time of a step is an estimate from published figures, good for
comparing plans with each other, and not a measurement.
"""

import copy
import dataclasses
import hashlib
import json
import os
import time

import jax

from jaxsd import model, run, state, train
from jaxsd.config import ConfigError, options_of, resolve
from jaxsd.plan import targets, traffic, work

CACHE_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said: `error` in one line where it refused, else bytes of one device.

    collectives: (kind, bytes received, calls, overlapping, seconds) per step, by kind. seconds:
    what compiling took.
    """

    error: str = ''
    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    multiplied_bytes: float = 0.0
    other_bytes: float = 0.0
    collectives: tuple = ()
    loops_once: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, record: dict) -> 'Compiled':
        """What `dataclasses.asdict` and JSON made of one. Raises TypeError and KeyError."""
        return cls(**record | dict(collectives=tuple(map(tuple, record['collectives']))))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config's stage on a topology. FLOPs are of a step on all devices, seconds of a step."""

    topology: targets.Topology
    stage: str
    mesh: dict
    batch: int
    columns: int
    remat: str
    parameters: int
    audio_s: float          # of a step's rows, see `seconds_per_column`
    model_flops: float
    executed_flops: float
    unknown_loops: int
    compiled: Compiled

    @classmethod
    def of(cls, record: dict) -> 'Plan':
        """What `dataclasses.asdict` and JSON made of one. Raises TypeError and KeyError."""
        there = record['topology']
        topology = targets.Topology(**there | dict(shape=tuple(there['shape'])))
        return cls(**record | dict(topology=topology, compiled=Compiled.of(record['compiled'])))

    @property
    def fits(self) -> bool:
        return not self.compiled.error

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of a step by what takes them, none overlapping another; {} without a chip."""
        chip = self.topology.chip
        if chip is None:
            return {}
        peak = targets.peak_tflops(chip) * 1e12 * chip.reached
        c, hbm = self.compiled, chip.hbm_gb_s * 1e9
        products = max(self.executed_flops / self.topology.size / peak, c.multiplied_bytes / hbm)
        other = c.other_bytes / hbm
        hidden = sum(s for _, _, _, overlaps, s in c.collectives if overlaps)
        shown = sum(s for _, _, _, overlaps, s in c.collectives if not overlaps)
        return dict(products=products, memory=other, network=shown,
                    waiting=max(0.0, hidden - products - other))

    @property
    def step_s(self) -> float | None:
        return sum(self.parts.values()) or None

    @property
    def mfu(self) -> float | None:
        if not self.step_s:
            return None
        peak = targets.peak_tflops(self.topology.chip) * 1e12
        return self.model_flops / self.topology.size / peak / self.step_s

    @property
    def positions_per_s(self) -> float | None:
        return self.batch * self.columns / self.step_s if self.step_s else None

    @property
    def audio_hours_per_chip_day(self) -> float | None:
        if not self.step_s:
            return None
        return self.audio_s / self.step_s * 24 / self.topology.size

    def cost(self, price: float) -> float | None:
        """Of a million audio-hours, at `price` for an hour of one chip."""
        hours = self.audio_hours_per_chip_day
        return 1e6 / hours * 24 * price if hours else None


def of(config, stage, topology: targets.Topology, devices=None) -> Plan:
    """The plan of a stage on a topology. Raises ConfigError where the config cannot be placed."""
    devices = targets.devices(topology) if devices is None else devices
    config = _compilable(config, topology)
    mesh = state.mesh_of(config, devices)
    train.check_batch(config, stage, mesh)
    step, target, _ = train.step_on(config, stage, mesh)
    traced = step.trace(target, train.abstract_batch(config, stage, mesh))
    executed, unknown = work.count(traced.jaxpr, work.seen(config))
    flops, more = work.model_flops(config, stage, devices)
    return Plan(
        topology, stage.name, {k: int(n) for k, n in mesh.shape.items() if n > 1}, stage.batch,
        config.columns, config.backbone.get('remat', 'full'), model.count(target['params']),
        stage.batch * config.columns * seconds_per_column(config), flops, executed,
        max(unknown, more), _compiled(traced.lower(), topology, mesh))


def _compilable(config, topology: targets.Topology):
    """`config` with attention that can be compiled without the machine: cuDNN's cannot, so that a
    GPU's plan has the attention of 'xla', which takes more memory and time. A head may have a
    backbone of its own."""
    if topology.platform != 'gpu':
        return config
    out = copy.deepcopy(config)
    with out.unlocked():
        for part in (out.backbone, out.head.get('decoder')):
            if part and 'attention' in options_of(resolve(part['name'], 'jaxsd.backbone')):
                part['attention'] = 'xla'
    return out


def seconds_per_column(config) -> float:
    """Seconds of sound that a column stands for: a frame where streams lie side by side; in one
    row, the share of a frame that one of its codes has, as if all columns held codes."""
    one_row = len(model.make_vocab(config).rows) == 1
    return 1 / config.codec.frame_hz / (config.codec.codebooks if one_row else 1)


def assumptions(plan: Plan) -> str:
    """What the estimate takes for granted, in one paragraph."""
    chip = plan.topology.chip
    if chip is None:
        return 'No speeds are published for virtual devices: no step time is estimated.'
    cudnn = (' Attention is XLA\'s, since cuDNN cannot compile without a GPU: the real step takes '
             'less.' if plan.topology.platform == 'gpu' else '')
    audio = f'one column is {plan.audio_s / plan.batch / plan.columns:.3g} s of sound'
    return (f'Estimate: {targets.peak_tflops(chip)} TFLOP/s peak of which matrix products reach '
            f'{chip.reached:.0%}, memory {chip.hbm_gb_s} GB/s, network {chip.link_gb_s:g} GB/s a '
            f'link each way, {chip.far_gb_s:g} GB/s between slices or nodes; products hide their '
            'own memory traffic and the collectives that the compiler starts early, nothing else '
            f'is hidden; rows are full, each one segment; {audio}.{cudnn}')


# Compiling, kept on disk: the same program for the same machine is compiled once.

def _compiled(lowered, topology: targets.Topology, mesh) -> Compiled:
    path = os.path.join(_cache(), _key(lowered, topology, mesh) + '.json')
    try:
        with open(path, encoding='utf-8') as f:
            return Compiled.of(json.load(f))
    except (OSError, ValueError, TypeError, KeyError):
        pass        # not there, or of another version
    out = compiled(lowered, topology, mesh)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    run.write_atomic(path, json.dumps(dataclasses.asdict(out)))
    return out


def _cache() -> str:
    home = os.environ.get('XDG_CACHE_HOME', os.path.expanduser('~/.cache'))
    return os.path.join(home, 'jaxsd', 'plans')


def _key(lowered, topology: targets.Topology, mesh) -> str:
    versions = run.versions() | targets.compilers()
    told = json.dumps([CACHE_FORMAT, str(topology), list(mesh.devices.shape), sorted(
        versions.items()), [d.id for d in mesh.devices.flat]])
    return hashlib.sha256((told + lowered.as_text()).encode()).hexdigest()[:32]


def compiled(lowered, topology: targets.Topology, mesh) -> Compiled:
    """Compiles a lowered step and reads what came out."""
    start = time.perf_counter()
    try:
        made = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if 'RESOURCE_EXHAUSTED' not in str(e):
            raise ConfigError(f'{topology} cannot be compiled for: {targets.first_line(e)}'
                              ) from None
        return Compiled(error=targets.first_line(e), seconds=time.perf_counter() - start)
    seconds = time.perf_counter() - start
    memory = made.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    needed = arguments + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes
    error = ''
    if topology.platform == 'gpu':      # whose compiler does not say
        room = topology.chip.hbm_gib * targets.GPU_USABLE
        if needed / 2**30 > room:
            error = (f'needs {needed / 2**30:.2f}G of {room:.2f}G ({targets.GPU_USABLE:.0%} of the '
                     'memory)')
    moved = traffic.read(made.as_text(), mesh.size)
    return Compiled(error, arguments, temporaries, needed, moved.multiplied_bytes,
                    moved.other_bytes, _by_kind(moved.collectives, topology, mesh),
                    moved.loops_once, seconds)


def _by_kind(collectives, topology: targets.Topology, mesh) -> tuple:
    """Collectives of a kind added up: (kind, bytes, calls, overlapping, seconds)."""
    order, out = list(mesh.devices.flat), {}
    for c in collectives:
        speed = targets.gb_s(topology, [order[i] for i in c.group]) if topology.chip else None
        sums = out.setdefault((c.kind, c.overlaps), [0.0, 0, 0.0])
        sums[0] += c.wire_bytes
        sums[1] += c.times
        sums[2] += c.wire_bytes / speed / 1e9 if speed else 0.0
    return tuple((kind, n, calls, overlaps, s)
                 for (kind, overlaps), (n, calls, s) in sorted(out.items()))

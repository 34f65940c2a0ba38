# SPDX-License-Identifier: Apache-2.0
"""The machines that a plan is made for: their names, their devices, and what their vendors publish.

TPUs are compiled for by libtpu and GPUs by jax's CUDA plugin from a description of the device;
neither needs the machine. `cpu:N` is N virtual devices of this machine, for tests.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from importlib import metadata
from typing import NamedTuple

from jaxsd.config import ConfigError


class Chip(NamedTuple):
    """One device. kind: its name in `journal.PEAK_TFLOPS`. hbm_gb_s: of its memory. link_gb_s: one
    way through one link of its fast network. far_gb_s: one way to other slices or nodes.
    reached: the share of the peak that large matrix products reach."""

    kind: str
    hbm_gib: float
    hbm_gb_s: float
    link_gb_s: float
    far_gb_s: float
    reached: float


CHIPS = {
    'v4': Chip('TPU v4', 30.75, 1228, 45, 6.25, 0.9),
    'v5e': Chip('TPU v5 lite', 15.75, 819, 45, 3.125, 0.9),
    'v5p': Chip('TPU v5', 95.74, 2765, 90, 6.25, 0.9),
    'v6e': Chip('TPU v6 lite', 31.25, 1638, 90, 12.5, 0.9),
    'h100': Chip('NVIDIA H100 80GB HBM3', 79.1, 3352, 360, 40, 0.75),
    'h200': Chip('NVIDIA H200', 141.0, 4800, 360, 40, 0.75),
    'b200': Chip('NVIDIA B200', 178.4, 7672, 720, 40, 0.75),
}
SOURCES = """\
Peaks: vendors' data sheets, bf16 dense. TPU memory: what the compiler says it may use. TPU memory
and network speeds: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e); a link carries one sixth (3D) or
one quarter (2D) of a chip's published one-way bandwidth, of which 0.9 is counted, as in the scaling
book (jax-ml.github.io/scaling-book); between slices, the published bandwidth of a chip's share of
its host's network (v4: taken to be that of v5p). GPU memory: CUDA's device query. NVLink: 0.8 of
the published one-way bandwidth of a GPU; between nodes 0.8 of 400 Gb/s for each GPU. Assumed, not
published: matrix products reach 0.9 of the peak on TPUs and 0.75 on GPUs."""
GPU_USABLE = 0.92       # of a GPU's memory; the rest is the runtime's

TPUS = {'v4': 3, 'v5e': 2, 'v5p': 3, 'v6e': 2}        # dimensions of the network
GPUS = ('h100', 'h200', 'b200')
NODE = 8                # GPUs that NVLink joins
# Product names: v5e-256 counts chips, v5p-512 counts cores, of which a chip has two.
SHAPES = {
    2: {1: '1x1', 4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'},
    3: {4: '2x2x1', 8: '2x2x2', 16: '2x2x4', 32: '2x4x4', 64: '4x4x4', 128: '4x4x8', 256: '4x8x8',
        512: '8x8x8', 1024: '8x8x16', 2048: '8x16x16', 4096: '16x16x16', 6144: '16x16x24'}}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`shape` chips of `family` in each of `slices`; one number for GPUs and virtual devices."""

    family: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def platform(self) -> str:
        return 'tpu' if self.family in TPUS else 'cpu' if self.family == 'cpu' else 'gpu'

    @property
    def chip(self) -> Chip | None:
        return CHIPS.get(self.family)

    def __str__(self):
        name = f'{self.family}:{"x".join(map(str, self.shape))}'
        return name if self.slices == 1 else f'{name}*{self.slices}'


def parse(text: str) -> Topology:
    """`v5p:8x8x8`, `v5e-256`, `v5e:16x16*2` (two slices), `h200:8`, `cpu:8`. Raises ConfigError."""
    found = re.fullmatch(r'(\w+?)(?:-(\d+)|:(\d+(?:x\d+)*))(?:\*(\d+))?', text.strip())
    family = found[1] if found else ''
    if family not in (*TPUS, *GPUS, 'cpu'):
        raise ConfigError(f'--topology: {text!r} is not known; write one of '
                          f'{", ".join(TPUS)} as in v5e:16x16 or v5p:8x8x8, one of '
                          f'{", ".join(GPUS)} as in h200:8, or cpu:8')
    dims = TPUS.get(family, 1)
    shape = found[3]
    if found[2] and family in TPUS:
        chips = int(found[2]) // (2 if dims == 3 else 1)
        shape = SHAPES[dims].get(chips)
        if shape is None or (dims == 3 and int(found[2]) % 2):
            legal = ', '.join(f'{family}-{n * (2 if dims == 3 else 1)}' for n in SHAPES[dims])
            raise ConfigError(f'--topology: there is no {text}; there are {legal}')
    out = Topology(family, tuple(map(int, (shape or found[2]).split('x'))), int(found[4] or 1))
    if len(out.shape) != dims or not all(out.shape) or not out.slices:
        raise ConfigError(f'--topology: {text}: {family} takes {dims} positive dimension(s), as in '
                          f'{family}:{SHAPES[dims][16] if dims > 1 else 8}')
    if family in GPUS and out.size > NODE and out.size % NODE:
        raise ConfigError(f'--topology: {text}: above {NODE} GPUs, give whole nodes of {NODE}')
    if out.slices > 1 and family not in TPUS:
        raise ConfigError(f'--topology: {text}: only TPUs come in slices; write {family}:'
                          f'{out.size}')
    return out


def prepare(topologies) -> None:
    """Sets the environment in which jax compiles for other machines. Call it before importing jax.

    The accelerators of this machine are left alone; the compilation cache is off, since what is
    compiled for an absent device cannot be read back.
    """
    os.environ |= dict(JAX_PLATFORMS='cpu', TPU_ACCELERATOR_TYPE='v5litepod-4',
                       TPU_WORKER_HOSTNAMES='localhost', ALLOW_MULTIPLE_LIBTPU_LOAD='1',
                       TPU_SKIP_MDS_QUERY='1', TF_CPP_MIN_LOG_LEVEL='2')
    os.environ.pop('JAX_COMPILATION_CACHE_DIR', None)
    virtual = max((t.size for t in topologies if t.family == 'cpu'), default=0)
    flag = '--xla_force_host_platform_device_count'
    if virtual > 1 and flag not in os.environ.get('XLA_FLAGS', ''):
        os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flag}={virtual}'.strip()


def compilers() -> dict[str, str]:
    """Versions of what compiles for other machines, where it is installed."""
    out = {}
    for name in ('libtpu', 'jax-cuda13-pjrt'):
        with contextlib.suppress(metadata.PackageNotFoundError):
            out[name] = metadata.version(name)
    return out


def devices(t: Topology) -> list:
    """The devices of a topology, none of which need exist. Raises ConfigError in one line where
    what compiles for them is not installed."""
    import jax
    if t.family == 'cpu':
        here = jax.devices('cpu')
        if len(here) < t.size:
            raise ConfigError(f'--topology {t}: this process has {len(here)} virtual devices')
        return here[:t.size]
    from jax.experimental import topologies
    try:
        if t.family in TPUS:
            if importlib.util.find_spec('libtpu') is None:
                raise ConfigError(f"--topology {t} needs libtpu: pip install 'jaxsd[plan]'")
            return list(topologies.get_topology_desc(
                platform='tpu', topology_name=f'{t.family}:{"x".join(map(str, t.shape))}',
                chip_config_name='megacore' if TPUS[t.family] == 3 else 'default',
                chips_per_host_bounds=_host(t), num_slices=t.slices).devices)
        if not (importlib.util.find_spec('jax_plugins')
                and importlib.util.find_spec('jax_plugins.xla_cuda13')):
            version = jax.__version__
            raise ConfigError(
                f'--topology {t} needs jax\'s CUDA plugin, without CUDA: pip install --no-deps '
                f'jax-cuda13-pjrt=={version} jax-cuda13-plugin=={version}')
        path = os.path.join(os.path.dirname(__file__), 'gpus', f'{t.family}.txtpb')
        with open(path, encoding='utf-8') as f:
            described = f.read()
        nodes, each = (t.size // NODE, NODE) if t.size > NODE else (1, t.size)
        return list(topologies.get_topology_desc(
            platform='cuda', target_config=described, topology=f'1x{nodes}x{each}').devices)
    except (RuntimeError, NotImplementedError) as e:
        raise ConfigError(f'--topology {t}: {first_line(e)}') from None


def _host(t: Topology) -> tuple[int, int, int]:
    """Chips of a host along each dimension: 2 x 2, or as many as there are."""
    shape = (*t.shape, 1)[:3]
    return tuple(min(a, b) for a, b in zip((2, 2, 1), shape, strict=True))


def first_line(error: BaseException) -> str:
    """The compiler's words in one line, without its stack traces and listings."""
    line = next((x for x in str(error).splitlines() if x.strip()), type(error).__name__)
    return ' '.join(line.split())[:400]


def peak_tflops(chip: Chip) -> float:
    from jaxsd import journal  # which imports jax, whose environment `prepare` sets
    return journal.PEAK_TFLOPS[chip.kind]


def gb_s(t: Topology, group: list) -> float:
    """GB/s at which each device of a collective over `group` (devices) receives.

    TPU: every dimension of the network along which the group extends carries it, both ways round
    where the dimension is a ring: 16 long in 2D, a multiple of 4 in 3D. GPU: NVLink inside a node,
    the network between nodes. Between slices, the data center's network.
    """
    chip = t.chip
    if len({getattr(d, 'slice_index', 0) or 0 for d in group}) > 1:
        return chip.far_gb_s
    if t.family in GPUS:
        far = len({d.id // NODE for d in group}) > 1
        return chip.far_gb_s if far else chip.link_gb_s
    links = 0
    for axis, length in enumerate(t.shape):
        if len({d.coords[axis] for d in group}) > 1:
            ring = length == 16 if len(t.shape) == 2 else length % 4 == 0
            links += 2 if ring else 1
    return chip.link_gb_s * max(links, 1)



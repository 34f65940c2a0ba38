# SPDX-License-Identifier: Apache-2.0
"""The mesh, the one table of logical axes, and shardings computed from axis names.

Nothing else decides placement. A parameter carries the names of its axes; `of` looks each name up
in the table and returns a `NamedSharding`. The table is an argument everywhere, never ambient.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ('data', 'fsdp', 'context', 'tensor', 'expert')
"""Mesh axes, from the outermost, whose devices may be far apart, to those that talk the most.

data: rows, parameters held whole (with fsdp beside it, replicas of a group that splits them).
fsdp: rows, parameters split and gathered where they are used. context: columns of a row.
tensor: heads, feed-forward widths, vocabulary. expert: experts of a mixture, and rows as well.
"""

RULES: dict[str, str | tuple[str, ...] | None] = {
    # parameters
    'layer': None, 'stream': None, 'embed': 'fsdp', 'heads': 'tensor', 'kv_heads': 'tensor',
    'head_dim': None, 'mlp': 'tensor', 'expert': 'expert', 'vocab': 'tensor', 'rank': None,
    # activations
    'batch': ('data', 'fsdp', 'expert'), 'column': 'context', 'width': None,
}


def make_mesh(sizes: Mapping[str, int], devices=None) -> Mesh:
    """A mesh over `devices` with the axes of AXES; absent ones have size 1, one -1 takes the rest.

    sizes may also name `slices`: so many pods, each with a fast network of its own, between which
    only the outermost part of `data` runs. Raises ValueError naming `mesh.<axis>` when the sizes do
    not multiply to the device count, or `mesh.slices` when the devices lie in other slices.
    """
    if odd := set(sizes) - {*AXES, 'slices'}:
        raise ValueError(f'mesh names {", ".join(sorted(odd))}; legal: {", ".join(AXES)}, rules, '
                         'slices')
    devices = np.asarray(jax.devices() if devices is None else devices)
    shape = {axis: int(sizes.get(axis, 1)) for axis in AXES}
    free = [axis for axis, n in shape.items() if n == -1]
    if len(free) > 1:
        raise ValueError(f'mesh: only one axis may be -1, got {", ".join(free)}')
    if any(n < 1 and n != -1 for n in shape.values()):
        raise ValueError(f'mesh: sizes are positive or -1, got {shape}')
    fixed = int(np.prod([n for n in shape.values() if n != -1]))
    if free and devices.size % fixed == 0:
        shape[free[0]] = devices.size // fixed
        fixed = devices.size
    if fixed != devices.size:
        wanted = ' x '.join(f'{a} {n}' for a, n in shape.items() if n != 1) or '1'
        raise ValueError(f'mesh: {wanted} does not fit {devices.size} {devices.flat[0].platform} '
                         f'device(s); change mesh.{(free or ["fsdp"])[0]} or the device count')
    slices = int(sizes.get('slices', 1))
    if slices < 1 or shape['data'] % slices:
        raise ValueError(f'mesh: mesh.data {shape["data"]} must be a multiple of mesh.slices '
                         f'{slices}: only data runs between slices')
    shape['data'] //= slices
    parts = [_arranged(part, tuple(shape.values())) for part in _slices(list(devices.flat), slices)]
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: list, slices: int) -> list[list]:
    """`devices` by the slice they lie in. A platform that knows no slices has equal parts of them,
    in the order of its processes, so that the mesh of a pod can be tried on any machine."""
    by_slice: dict[int, list] = {}
    for device in devices:
        by_slice.setdefault(getattr(device, 'slice_index', None) or 0, []).append(device)
    if devices[0].platform != 'tpu' and len(by_slice) != slices:
        size = len(devices) // slices
        by_slice = {i: devices[i * size:(i + 1) * size] for i in range(slices)}
    if len(by_slice) != slices:
        raise ValueError(f'mesh: the devices lie in {len(by_slice)} slices; set '
                         f'mesh.slices={len(by_slice)}, not {slices}')
    return [part for _, part in sorted(by_slice.items())]


def _arranged(devices: list, shape: tuple[int, ...]) -> np.ndarray:
    """`devices` of one slice as an array of `shape`, neighbors in its last axes where possible."""
    if devices[0].platform != 'tpu':
        return np.asarray(devices).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def rules_of(overrides: Mapping[str, str | None]) -> dict:
    """RULES with some cells overridden (`mesh.rules` of a config). Unknown names are an error."""
    unknown = set(overrides) - set(RULES)
    if unknown:
        raise ValueError(f'mesh.rules names {sorted(unknown)}; legal: {", ".join(RULES)}')
    for name, axis in overrides.items():
        if odd := set((axis,) if isinstance(axis, str) else axis or ()) - set(AXES):
            raise ValueError(f'mesh.rules.{name} names {sorted(odd)}; legal: {", ".join(AXES)}')
    return RULES | dict(overrides)


def _mesh_axes(axes, rules: Mapping) -> list[str]:
    """The mesh axes that split arrays with these axes, one entry for every use."""
    parts = [rules[a] if a is not None else None for a in axes]
    return [m for p in parts if p for m in ((p,) if isinstance(p, str) else p)]


def spec(axes: tuple[str | None, ...], rules: Mapping) -> PartitionSpec:
    """The partition of an array with named `axes`. A mesh axis used twice is a ValueError."""
    parts = [rules[a] if a is not None else None for a in axes]
    used = _mesh_axes(axes, rules)
    if len(used) != len(set(used)):
        raise ValueError(f'axes {axes} would use a mesh axis twice: {parts}; override mesh.rules')
    return PartitionSpec(*parts)


def _ways(part, mesh: Mesh) -> int:
    names = () if part is None else (part,) if isinstance(part, str) else part
    return int(np.prod([mesh.shape[n] for n in names], dtype=int))


def of(abstract, axes, rules: Mapping, mesh: Mesh):
    """NamedShardings for a nested dict of shapes, from the parallel dict of axis names.

    An array with one more dimension than names has a leading `layer`. Raises ValueError naming the
    parameter and the cell to override when a dimension does not divide.
    """
    def one(path, leaf, names):
        names = ('layer',) * (len(leaf.shape) - len(names)) + tuple(names)
        partition = spec(names, rules)
        for name, n, part in zip(names, leaf.shape, partition, strict=True):
            if n % _ways(part, mesh):
                where = '/'.join(str(k.key) for k in path)
                raise ValueError(f'{where}: axis {name} of size {n} does not divide over mesh axis '
                                 f'{part} of size {_ways(part, mesh)}; set mesh.rules.{name} to '
                                 'None or change the mesh')
        return NamedSharding(mesh, partition)
    return jax.tree_util.tree_map_with_path(one, abstract, axes,
                                            is_leaf=lambda x: hasattr(x, 'shape'))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


class Place:
    """place(x, *axis names) -> x, constrained to its sharding; the identity without a mesh."""

    def __init__(self, rules: Mapping = RULES, mesh: Mesh | None = None):
        self.rules, self.mesh = rules, mesh

    @property
    def platform(self) -> str:
        """'cpu', 'gpu' or 'tpu': that of the mesh's devices, which need not be this machine's."""
        if self.mesh is None:
            return jax.default_backend()
        platform = self.mesh.devices.flat[0].platform
        return 'gpu' if platform in ('cuda', 'rocm') else platform

    def __call__(self, x, *axes):
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(self.mesh, spec(axes, self.rules)))

    def over(self, *axes: str | None) -> tuple[str, ...]:
        """The mesh axes of more than one device that split any of these axes."""
        if self.mesh is None:
            return ()
        used = _mesh_axes(axes, self.rules)
        return tuple(dict.fromkeys(a for a in used if self.mesh.shape[a] > 1))

    def ways(self, axis: str) -> int:
        """In how many pieces `axis` is held."""
        return math.prod(self.mesh.shape[a] for a in self.over(axis))

    def nth(self, axis: str):
        """Inside `apart`: which piece of `axis` this device holds, from 0."""
        over = self.over(axis)
        return jax.lax.axis_index(over) if over else 0

    def whole(self, x, at: int, axis: str):
        """Inside `apart`: all of an array that is held in pieces; its dimension `at` is `axis`."""
        over = self.over(axis)
        return jax.lax.all_gather(x, over, axis=at, tiled=True) if over else x

    def meet(self, x, axes: tuple, axis: str):
        """Inside `apart`: `x` of `axes`, joined with the pieces of the devices that split `axis`.

        They hold other parts of that (other experts, say): each looks at what all of them have.
        """
        for a in self.over(axis):
            if (at := self._split_by(a, axes)) is not None:
                x = jax.lax.all_gather(x, a, axis=at, tiled=True)
        return x

    def part(self, x, axes: tuple, axis: str):
        """After `meet`: all of `axis`, the last of `axes`, of which `x` has a piece, and this
        device's own piece of the others, which are joined in `x`."""
        last = axes.index(axis)
        for a in reversed(self.over(axis)):
            at = self._split_by(a, axes[:last])
            x = (jax.lax.all_gather(x, a, axis=last, tiled=True) if at is None else
                 jax.lax.all_to_all(x, a, at, last, tiled=True))
        return x

    def _split_by(self, mesh_axis: str, axes: tuple) -> int | None:
        return next((i for i, axis in enumerate(axes) if mesh_axis in self.over(axis)), None)

    def before(self, x, at: int, axis: str, count: int):
        """Inside `apart`: this device's piece with the `count` entries of dimension `at` before it,
        which others hold; zeros before the first of all."""
        over, ways, piece = self.over(axis), self.ways(axis), x.shape[at]
        found = [x]
        for n in range(1, -(-count // piece) + 1):      # from n devices before
            last = min(piece, count - (n - 1) * piece)
            part = jax.lax.slice_in_dim(x, piece - last, piece, axis=at)
            found.insert(0, jax.lax.ppermute(part, over, [(i, i + n) for i in range(ways - n)]))
        return jnp.concatenate(found, axis=at)

    def apart(self, fn: Callable, *parts: tuple, out: tuple, summed: tuple = ()):
        """`fn` of every device's own piece of each of `parts`, (array, *axis names).

        What it returns is the piece of an array with axes `out`, once added up over the mesh axes
        that split the axes `summed`; where such a mesh axis splits one of `out` too, it returns the
        whole of that. For what the compiler cannot split by itself (sorting, say), and for what
        must know how it is split.
        """
        arrays = [x for x, *_ in parts]
        if self.mesh is None or self.mesh.size == 1:
            return fn(*arrays)

        def here(*pieces):
            y = fn(*pieces)
            for a in self.over(*summed):
                at = self._split_by(a, out)
                y = (jax.lax.psum(y, a) if at is None else
                     jax.lax.psum_scatter(y, a, scatter_dimension=at, tiled=True))
            return y
        return jax.shard_map(
            here, mesh=self.mesh, check_vma=False,
            in_specs=tuple(spec(axes, self.rules) for _, *axes in parts),
            out_specs=spec(out, self.rules))(*arrays)


anywhere = Place()
"""The `Place` of a program without a mesh: leaves everything where it is."""


def placer(rules: Mapping, mesh: Mesh) -> Place:
    """The `Place` that constrains activations by their axis names."""
    return Place(rules, mesh)


def batch_sharding(rules: Mapping, mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data axes; all other dimensions whole."""
    return NamedSharding(mesh, spec(('batch',), rules))


def replicated_fraction(abstract, shardings) -> float:
    """The share of parameter bytes that every device of a mesh of several holds whole."""
    whole = total = 0
    for leaf, s in zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True):
        n = int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        total += n
        whole += n if s.is_fully_replicated and s.mesh.size > 1 else 0
    return whole / max(total, 1)

# SPDX-License-Identifier: Apache-2.0
"""Saves and restores all that the next step needs, so that a kill at any moment loses little.

`checkpoints/<stage>/<step>/` in the run directory holds parameters, optimizer and step (`state`),
and beside them a small JSON `meta`: the data iterator's state, the resolved config, the versions
and one checksum per array. Storage flips bytes and files get cut short, and Orbax restores a
flipped byte in silence, so every array is checked after it was read; a checkpoint that fails is
named, left on disk, and the next older one is tried. Nothing else touches Orbax.
"""

import contextlib
import gc
import hashlib
import json
import logging
import math
import os
import pathlib
import re
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxsd.config import ConfigError, fingerprint, to_json
from jaxsd.run import all_processes, differences, ledger, on_first_process, read_ledger, versions

log = logging.getLogger('jaxsd')
FORMAT = 1
META_BYTES = 1 << 26        # bounds what a damaged meta.json may allocate
UNFINISHED = re.compile(r'\d+\.orbax-checkpoint-tmp')


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used, in one line that names it and the reason."""


class CheckpointMismatch(CheckpointError):
    """A sound checkpoint of something else: another config, another tree, another shape."""


# Checksums.

@jax.jit
def checksum(x) -> jax.Array:
    """A uint32 of the bits of `x` that does not depend on how `x` is spread over devices.

    Each element's bits are multiplied by an odd number hashed from its flat index and summed modulo
    2^32. An odd factor is a bijection, so changing any one element always changes the sum; other
    damage escapes with probability 2^-32. Integer sums commute, so every mesh agrees to the bit.
    """
    bits = x
    if not jnp.issubdtype(x.dtype, jnp.integer) and x.dtype != bool:
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(
            x.dtype.itemsize, jnp.uint32))
    elif x.dtype.itemsize == 8:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)      # one more axis: two words
    weight = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1:]) % (1 << 32)
        weight += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
    weight = weight * jnp.uint32(0x9E3779B1)
    weight = (weight ^ (weight >> 15)) * jnp.uint32(0x85EBCA77)
    weight = (weight ^ (weight >> 13)) | jnp.uint32(1)
    return jnp.sum(bits.astype(jnp.uint32) * weight, dtype=jnp.uint32)


# One program for all: many that wait for each other's devices can starve a host of few threads.
_checksums = jax.jit(lambda arrays: {name: checksum(x) for name, x in arrays.items()})


def _named(tree, prefix: str = '') -> dict:
    """The leaves of `tree` by name: `params/head/kernel`, `opt/0/mu/head/kernel`, `step`."""
    return {prefix + jax.tree_util.keystr(path, simple=True, separator='/'): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _describe(arrays: dict) -> dict:
    for name, x in arrays.items():
        if not isinstance(x, jax.Array) or jnp.issubdtype(x.dtype, jax.dtypes.extended):
            raise ValueError(f'state: {name} must be an array of numbers on a device, got '
                             f'{getattr(x, "dtype", type(x).__name__)}')
    sums = jax.device_get(_checksums(arrays))
    return {name: {'shape': list(x.shape), 'dtype': str(x.dtype), 'checksum': int(sums[name])}
            for name, x in arrays.items()}


# Reading. None of these functions changes anything on disk.

def folder_of(workdir: str, stage: str) -> str:
    """Where a stage's checkpoints lie."""
    return os.path.join(os.path.abspath(workdir), 'checkpoints', stage)


def steps(folder: str) -> list[int]:
    """The steps that have a finished checkpoint in `folder`, oldest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    return sorted(int(n) for n in names if n.isdecimal() and str(int(n)) == n)


def read_meta(folder: str, step: int | None = None) -> dict:
    """The meta of the newest readable checkpoint (or of `step`), without reading any array.

    Keys: step, fingerprint, config, data (the iterator's state), versions, leaves (name -> shape,
    dtype, checksum). Raises CheckpointError.
    """
    return _walk(folder, step, lambda s: _read_meta(folder, s))


def restore(folder: str, target, *, step: int | None = None, config=None):
    """The newest sound checkpoint (or `step`) as `(state, meta)`, placed where `target` says.

    `target` is a tree of jax.ShapeDtypeStruct with shardings: any mesh, whatever mesh saved it.
    Steps that cannot be read, or whose arrays fail their checksums, are skipped with one warning
    each and left on disk. Raises CheckpointMismatch if a sound checkpoint belongs to another
    `config` or another tree, CheckpointError if none is sound.
    """
    return _restore(folder, target, step, '', config)


def restore_params(folder: str, target, *, step: int | None = None):
    """As `restore`, but only the parameters (`state['params']`): as `(params, meta)`."""
    return _restore(folder, target, step, 'params/', None)


def fits(folder: str, target) -> dict:
    """The newest readable meta, if its parameters are those of `target`; no array is read.

    Raises what `restore_params` would raise for a folder without checkpoints or of another model.
    """
    meta = read_meta(folder)
    _same_leaves(folder, meta, _named(target, 'params/'), 'params/')
    return meta


def _restore(folder: str, target, step: int | None, prefix: str, config):
    for name, leaf in _named(target).items():
        if getattr(leaf, 'sharding', None) is None:
            raise ValueError(f'target: {name} has no sharding')
    return _walk(folder, step, lambda s: _load(folder, s, target, prefix, config),
                 lambda found: _flaw(found, prefix))


def _walk(folder: str, step: int | None, read, flaw=lambda found: ''):
    """The first of the newest steps that every process can `read` and in which none sees a `flaw`.

    `read` must not communicate: one process may fail in it while the others succeed.
    """
    _quiet()
    found = steps(folder)
    if step is not None and step not in found:
        raise CheckpointError(f'{folder} holds no checkpoint of step {step}; it holds '
                              f'{", ".join(map(str, found)) or "none"}')
    if not found:
        raise CheckpointError(f'{folder} holds no checkpoint; train this stage first')
    tried = [step] if step is not None else found[::-1]
    reasons = []
    for at in tried:
        reason = ''
        with _hushed():
            try:
                out = read(at)
            except CheckpointMismatch:
                raise
            except Exception as e:      # whatever a damaged file makes the layers below raise
                reason = _reason(e)
            if reason:
                gc.collect()
        if all_processes(not reason):
            reason = flaw(out)
            if not reason:
                return out
        reasons.append(reason or 'another process could not read it')
        if at != tried[-1]:
            log.warning('checkpoint of step %d in %s cannot be used, trying an older one: %s',
                        at, folder, reasons[-1])
    raise CheckpointError(f'{folder}: no usable checkpoint among steps '
                          f'{", ".join(map(str, tried))} (step {tried[0]}: {reasons[0]}); '
                          'put back a copy of one, or train in another --workdir')


def _read_meta(folder: str, step: int) -> dict:
    path = os.path.join(folder, str(step), 'meta', 'meta.json')
    if os.path.getsize(path) > META_BYTES:
        raise CheckpointError('meta.json is implausibly large')
    with open(path, encoding='utf-8') as f:
        stored = json.load(f)
    if stored['sha256'] != _digest(stored['body']):
        raise CheckpointError('meta.json does not match its own checksum')
    if stored['body']['format'] != FORMAT or stored['body']['step'] != step:
        raise CheckpointError(f'meta.json is of format {stored["body"]["format"]}, step '
                              f'{stored["body"]["step"]}')
    return stored['body']


def _load(folder: str, step: int, target, prefix: str, config):
    meta = _read_meta(folder, step)
    if config is not None and meta['fingerprint'] != fingerprint(config):
        raise CheckpointMismatch(f'{folder}: the checkpoint of step {step} was made by another '
                                 f'config: {differences(meta["config"], config)}')
    wanted = _named(target, prefix)
    _same_leaves(folder, meta, wanted, prefix)
    # The handler alone, not a Checkpointer, whose barrier would hang when one process fails.
    arrays = ocp.PyTreeCheckpointHandler().restore(
        pathlib.Path(folder, str(step), 'state'), args=ocp.args.PyTreeRestore(
            item=wanted, partial_restore=True,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)))
    for name, leaf in wanted.items():       # Orbax gives back the wish where it finds no array
        x = arrays[name]
        if not isinstance(x, jax.Array) or (x.shape, x.dtype) != (leaf.shape, leaf.dtype):
            raise CheckpointError(f'{name} is not in it')
    return jax.tree.unflatten(jax.tree.structure(target), [arrays[n] for n in wanted]), meta


def _same_leaves(folder: str, meta: dict, wanted: dict, prefix: str) -> None:
    stored = {k: v for k, v in meta['leaves'].items() if k.startswith(prefix)}
    for name in sorted(wanted | stored):
        there = _shape(**stored[name]) if name in stored else 'nothing'
        leaf = wanted.get(name)
        here = 'nothing' if leaf is None else _shape(leaf.shape, leaf.dtype)
        if there != here:
            raise CheckpointMismatch(f'{folder}: the checkpoint of step {meta["step"]} holds '
                                     f'{there} for {name}, but this config has {here}')


def _flaw(found, prefix: str) -> str:
    tree, meta = found
    sums = jax.device_get(_checksums(_named(tree, prefix)))
    wrong = [n for n, x in sums.items() if int(x) != meta['leaves'][n]['checksum']]
    return f'{wrong[0]} does not match its checksum' if wrong else ''


# Writing.

class Checkpoints:
    """The checkpoints of one stage of a run, to be resumed from and then added to.

    The newest `keep` are retained. Saving happens in the background; a failure (a full disk)
    surfaces as CheckpointError at the next `save`, at `wait` or on leaving the `with` block::

        with Checkpoints(workdir, stage, config=config, keep=3) as checkpoints:
            found = checkpoints.resume(target)      # None: this stage begins here
            ...
            checkpoints.save(step, state, data_state=iterator_state)
    """

    def __init__(self, workdir: str, stage: str, *, config, keep: int):
        if keep < 1:
            raise ConfigError(f'the number of checkpoints to keep must be at least 1, got {keep}')
        _quiet()
        self._workdir, self._stage, self._config = workdir, stage, config
        self.folder = folder_of(workdir, stage)
        self._keep, self._manager = keep, None
        self._at, self._pending, self._noted = -1, None, False
        self._sweep()

    def resume(self, target):
        """`(state, meta)` of the newest sound checkpoint, or None where none was ever made.

        Raises CheckpointError where the ledger says that there was one and none can be used, so
        that no run starts over by accident; CheckpointMismatch as `restore` does.
        """
        if not steps(self.folder):
            entries = [e for e in read_ledger(self._workdir) if e.get('stage') == self._stage]
            saved = [e['checkpoint'] for e in entries if 'checkpoint' in e]
            if saved:
                raise CheckpointError(f'{self.folder} holds no checkpoint, but by the ledger step '
                                      f'{saved[-1]} was saved; put one back, or train in another '
                                      '--workdir')
            if any(e.get('event') == 'import' for e in entries):
                raise CheckpointError(f'{self.folder} holds no checkpoint, but by the ledger '
                                      f'weights were to be imported into {self._stage}, which was '
                                      'not finished; import them again')
            return None
        state, meta = restore(self.folder, target, config=self._config)
        self._at = meta['step']
        return state, meta

    def save(self, step: int, state, *, data_state: dict, wait: bool = False):
        """Begins to save `state` (any tree of arrays) and the data iterator's state as `step`.

        Blocks for the checksums and the copy off the devices; `state` may be donated afterwards.
        A step that this run already holds is not written again. Raises CheckpointError, also for a
        save that failed since.
        """
        self.wait()
        if step <= self._at:
            if step == self._at:
                return
            raise CheckpointError(f'{self.folder}: step {step} cannot follow step {self._at}')
        arrays = _named(state)
        body = {'format': FORMAT, 'step': int(step), 'fingerprint': fingerprint(self._config),
                'config': json.loads(to_json(self._config)), 'versions': versions(),
                'data': json.loads(json.dumps(data_state)), 'leaves': _describe(arrays)}
        if self._manager is None:
            on_first_process(self._clear_way)
            self._manager = ocp.CheckpointManager(
                self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=self._keep),
                item_handlers={'state': ocp.PyTreeCheckpointHandler(),
                               'meta': ocp.JsonCheckpointHandler(filename='meta.json')})
        with self._failing(step):
            self._manager.save(step, force=True, args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(arrays),
                meta=ocp.args.JsonSave({'sha256': _digest(body), 'body': body})))
        self._pending = step
        if wait:
            self.wait()

    def wait(self):
        """Waits until the last save is safely on disk. Raises CheckpointError if it is not."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        with self._failing(step):
            self._manager.wait_until_finished()
        self._at = step
        if not self._noted:     # one line per start: enough to know later what must be here
            ledger(self._workdir, {'event': 'checkpoint', 'stage': self._stage, 'checkpoint': step})
            self._noted = True

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self.wait()
        except CheckpointError as e:
            if kind is None or issubclass(kind, OSError):   # a full disk: this says what was lost
                raise
            log.error('%s', e)      # the error that is under way matters more
        finally:
            if self._manager is not None:
                self._manager.close()
            self._sweep()           # late writes of a failed save may have come back

    def _clear_way(self):
        """Sets aside the steps that `resume` had to skip: a run may come to the same step again."""
        later = [s for s in steps(self.folder) if s > self._at]
        if later and self._at < 0:
            raise CheckpointError(f'{self.folder} already holds steps up to {later[-1]}; resume '
                                  'from them, or train in another --workdir')
        os.makedirs(self.folder, exist_ok=True)
        for step in later:
            aside = os.path.join(self.folder, f'unusable.{step}.{time.time_ns()}')
            os.rename(os.path.join(self.folder, str(step)), aside)
            log.warning('set aside the unusable checkpoint of step %d as %s', step, aside)
        return 0

    def _sweep(self):
        """Removes what an interrupted save left: directories that only Orbax names so."""
        if jax.process_index() == 0 and os.path.isdir(self.folder):
            for name in filter(UNFINISHED.match, os.listdir(self.folder)):
                shutil.rmtree(os.path.join(self.folder, name), ignore_errors=True)

    @contextlib.contextmanager
    def _failing(self, step: int):
        try:
            yield
        except Exception as e:      # Orbax and TensorStore raise many kinds, some bare Exceptions
            reason, self._manager = _reason(e), None
            self._sweep()
            kept = steps(self.folder)
            raise CheckpointError(
                f'{self.folder}: the checkpoint of step {step} could not be written ({reason}); '
                f'the last one kept is {f"of step {kept[-1]}" if kept else "none"}') from e


# Small things.

def _shape(shape, dtype, checksum=None) -> str:
    return f'{dtype}[{", ".join(map(str, shape))}]'


def _reason(e: BaseException) -> str:
    """What went wrong at the root, in one line of bounded length."""
    while e.__cause__ is not None:
        e = e.__cause__
    text = ' '.join(str(e).split())
    if 'No space left on device' in text or 'RESOURCE_EXHAUSTED: Error writing' in text:
        return 'no space left on the disk'
    if isinstance(e, CheckpointError):
        return text
    return f'{type(e).__name__}: {text}'[:240]


def _digest(body: dict) -> str:
    return hashlib.sha256(to_json(body).encode()).hexdigest()


@contextlib.contextmanager
def _hushed():
    """Drops what Python prints of reads thrown away half done: the one reason is told by us."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before


def _quiet():
    """Keeps Orbax's own lines off the console: ours name the step and the reason."""
    logging.getLogger('absl').addFilter(_not_orbax)     # adding it twice changes nothing
    logging.getLogger('asyncio').addFilter(_not_forgotten)
    if not isinstance(sys.unraisablehook, _NotOfClosedLoops):
        sys.unraisablehook = _NotOfClosedLoops(sys.unraisablehook)


class _NotOfClosedLoops:
    """Drops what late writes of a failed save say of the event loop that waits no more."""

    def __init__(self, other):
        self._other = other

    def __call__(self, unraisable):
        if str(unraisable.exc_value) != 'Event loop is closed':
            self._other(unraisable)


def _not_orbax(record: logging.LogRecord) -> bool:
    return 'orbax' not in record.pathname


def _not_forgotten(record: logging.LogRecord) -> bool:
    """Of a save's many writes that failed alike the first is told, by us."""
    return 'exception was never retrieved' not in record.getMessage()

# SPDX-License-Identifier: Apache-2.0
"""The loop and the pure train step.

The step is a pure function of plain dicts; modules exist only while it is traced. The loop
dispatches step n and then reads the numbers of step n-1, so the host never waits for the loss it
has just asked for. Everything a run leaves behind goes through `checkpoint` (checkpoints, ledger)
and three small writers here (console, metrics.jsonl, TensorBoard).
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxsd import checkpoint, data, model, sharding
from jaxsd import run as rundir
from jaxsd import stage as stages
from jaxsd.config import ConfigError, fingerprint, plain
from jaxsd.stage import Stage, flatten

log = logging.getLogger('jaxsd')

Probe = Callable
"""probe(step, params) -> {name: value}: held-out numbers, called every probe_steps."""

# bf16 peaks of one device, TFLOP/s, from the vendors' data sheets (dense).
PEAK_TFLOPS = {'TPU v4': 275, 'TPU v5 lite': 197, 'TPU v5e': 197, 'TPU v5': 459, 'TPU v5p': 459,
               'TPU v6 lite': 918, 'NVIDIA A100-SXM4-80GB': 312, 'NVIDIA H100 80GB HBM3': 989,
               'NVIDIA H200': 989, 'NVIDIA B200': 2250}


class TrainingError(RuntimeError):
    """Training cannot go on, said in one line with the step."""


# The step.

def make_step(graph, objective, stage: Stage, by_path: dict, place=sharding.anywhere,
              seed: int = 0):
    """step(state, batch) -> (state, sums), pure.

    state: params (nested dict), opt, step, bad_steps (consecutive) and skipped_steps (in all).
    sums: {'terms': {name: (sum, weight)}, 'metrics': ..., 'loss', 'grad_norm', 'bad_steps',
    'skipped_steps'}, all scalars. A step whose loss or gradient is not finite changes nothing but
    the counters.
    """
    tx = stages.optimizer(stage, by_path)

    def sums_of(params, batch, key):
        logp, hit = nnx.merge(graph, params)(batch, key, place)
        return objective(logp, hit, batch)

    def step(state, batch):
        trainable, frozen = stages.split(state['params'], by_path)
        key = jax.random.fold_in(jax.random.key(seed), state['step'])
        zeros = jnp.zeros(batch['tokens'].shape)
        # Weights depend on the batch alone, so the one division can be known before any forward.
        whole = {name: jnp.maximum(w, 1e-6)
                 for name, (_, w) in objective(zeros, zeros, batch)[0].items()}

        def loss_fn(trainable, part, key):
            terms, metrics = sums_of(stages.join(trainable, frozen), part, key)
            return sum(s / whole[name] for name, (s, _) in terms.items()), (terms, metrics)

        grad = jax.value_and_grad(loss_fn, has_aux=True)
        if stage.accumulate == 1:
            (loss, (terms, metrics)), grads = grad(trainable, batch, key)
        else:
            def split(x):       # every microbatch takes rows from every device
                x = x.reshape(-1, stage.accumulate, *x.shape[1:])
                return jnp.moveaxis(x, 1, 0)

            def add(carry, part):
                out = grad(trainable, part[0], part[1])
                return jax.tree.map(jnp.add, carry, out), None
            parts = (jax.tree.map(split, batch), jax.random.split(key, stage.accumulate))
            first = jax.tree.map(lambda x: x[0], parts)
            empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                                 jax.eval_shape(grad, trainable, *first))
            ((loss, (terms, metrics)), grads), _ = jax.lax.scan(add, empty, parts)
        norm = optax.tree.norm(grads)
        updates, opt = tx.update(grads, state['opt'], trainable)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = (optax.apply_updates(trainable, updates), opt)
        trainable, opt = jax.tree.map(lambda a, b: jnp.where(good, a, b), new,
                                      (trainable, state['opt']))
        bad = jnp.where(good, 0, state['bad_steps'] + 1)
        skipped = state['skipped_steps'] + jnp.where(good, 0, 1)
        state = dict(params=stages.join(trainable, frozen), opt=opt, step=state['step'] + 1,
                     bad_steps=bad, skipped_steps=skipped)
        return state, dict(terms=terms, metrics=metrics, loss=loss, grad_norm=norm, bad_steps=bad,
                           skipped_steps=skipped)
    return step


def abstract_state(config, stage: Stage, mesh):
    """(graph, state of ShapeDtypeStructs with shardings, by_path): everything but the arrays."""
    graph, shapes, axes = model.abstract(config, stage.lora)
    rules = sharding.rules_of(plain(config.mesh).get('rules', {}))
    placed = sharding.of(shapes, axes, rules, mesh)
    by_path = stages.multipliers(stage, flatten(shapes))
    tx = stages.optimizer(stage, by_path)
    opt = jax.eval_shape(tx.init, stages.split(shapes, by_path)[0])
    whole = sharding.replicated(mesh)
    # Left alone, jit(tx.init) would put every moment on one device.
    opt_placed = optax.tree_utils.tree_map_params(
        tx, lambda _, s: s, opt, stages.split(placed, by_path)[0],
        transform_non_params=lambda _: whole)
    def at(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    state = dict(params=jax.tree.map(at, shapes, placed),
                 opt=jax.tree.map(at, opt, opt_placed))
    for name in ('step', 'bad_steps', 'skipped_steps'):
        state[name] = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return graph, state, by_path


def fresh_state(config, stage: Stage, target, by_path, params=None):
    """A state at step 0, placed as `target` says; from `params` where given (already placed)."""
    where = jax.tree.map(lambda x: x.sharding, target)
    if params is None:
        params = jax.jit(lambda key: model.init(config, key, stage.lora),
                         out_shardings=where['params'])(jax.random.key(config.seed))
    tx = stages.optimizer(stage, by_path)
    opt = jax.jit(lambda p: tx.init(stages.split(p, by_path)[0]),
                  out_shardings=where['opt'])(params)
    zero = lambda: jax.device_put(jnp.int32(0), where['step'])      # noqa: E731
    return dict(params=params, opt=opt, step=zero(), bad_steps=zero(), skipped_steps=zero())


def start_params(config, stage: Stage, workdir: str, target):
    """Parameters to begin `stage` with: None for 'init', else those of the stage or path it names.

    A stage with low-rank terms takes them fresh and everything else from there.
    """
    folder = _start_folder(config, stage, workdir)
    if folder is None:
        return None
    flat = flatten(target['params'])
    old = {p: x for p, x in flat.items() if not p.rsplit('/', 1)[-1].startswith('lora_')}
    params, _ = checkpoint.restore_params(folder, stages.unflatten(old))
    if len(old) == len(flat):
        return params
    where = jax.tree.map(lambda x: x.sharding, target['params'])
    fresh = jax.jit(lambda key: model.init(config, key, stage.lora),
                    out_shardings=where)(jax.random.key(config.seed))
    return stages.unflatten(flatten(fresh) | flatten(params))


def _start_folder(config, stage: Stage, workdir: str) -> str | None:
    """The checkpoints that `stage` begins with, if any. ConfigError where they are missing."""
    if stage.start == 'init' or checkpoint.steps(checkpoint.folder_of(workdir, stage.name)):
        return None
    names = [s.name for s in stages.stages(config)]
    folder = (checkpoint.folder_of(workdir, stage.start) if stage.start in names else stage.start)
    if not os.path.isdir(folder):
        raise ConfigError(f'stage {stage.name} starts from {stage.start!r}, but there is no '
                          f'checkpoint in {folder}; train that stage first')
    return folder


# What a run writes.

def model_tflops(config, columns: int, row_columns: float | None = None) -> float:
    """TFLOPs of one forward and backward pass over `columns` columns, attention counted causally.

    Every matrix is counted twice per use (multiply, add) and three times per step (forward and two
    backward products). `row_columns` is the length of a packed segment (default: the whole row).
    Recomputation is not counted: this is the model's work, not the machine's.
    """
    _, shapes, _ = model.abstract(config)
    flat = {p: int(np.prod(x.shape)) for p, x in flatten(shapes).items() if p.endswith('/kernel')}
    used = sum(flat.values())
    head, back = config.head, config.backbone
    if head['name'] == 'tied':
        used += shapes['frontend']['table'].size
    flops = 2.0 * used
    seen = (row_columns or config.columns) / 2
    if back.get('window_columns'):
        seen = min(seen, back.window_columns)
    flops += 4.0 * back.layers * back.heads * back.head_dim * seen
    return 3.0 * flops * columns / 1e12


def peak_tflops(device) -> float | None:
    return PEAK_TFLOPS.get(device.device_kind)


def _revision() -> str:
    try:
        out = subprocess.run(['git', 'describe', '--always', '--dirty'], capture_output=True,
                             text=True, timeout=10, cwd=os.path.dirname(__file__), check=False)
        return out.stdout.strip() or 'unknown'
    except (OSError, subprocess.SubprocessError):
        return 'unknown'


class _Writers:
    """metrics.jsonl and TensorBoard events of one run, from process 0 only."""

    def __init__(self, workdir: str, step: int, stage: str):
        self._first = jax.process_index() == 0
        if not self._first:
            return
        from tensorboardX import SummaryWriter
        path = os.path.join(workdir, 'metrics.jsonl')
        _drop_after(path, stage, step)
        self._file = open(path, 'a', encoding='utf-8')
        self._board = SummaryWriter(os.path.join(workdir, 'tensorboard', stage), purge_step=step)

    def write(self, entry: dict):
        if not self._first:
            return
        self._file.write(json.dumps(entry) + '\n')
        self._file.flush()
        for name, value in _scalars(entry):
            self._board.add_scalar(name.replace(' ', '_'), value, entry['step'])

    def close(self):
        if self._first:
            self._file.close()
            self._board.close()


def _scalars(entry, path=''):
    for key, value in entry.items():
        at = f'{path}/{key}' if path else key
        if isinstance(value, dict):
            yield from _scalars(value, at)
        elif isinstance(value, int | float) and key != 'step':
            yield at, value


def _drop_after(path: str, stage: str, step: int):
    """Removes lines of `stage` past `step`: a killed run wrote them and this run will again."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path, encoding='utf-8') as f:
        for line in f:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry.get('stage') != stage or entry.get('step', 0) <= step:
                kept.append(line if line.endswith('\n') else line + '\n')
    rundir.write_atomic(path, ''.join(kept))


def _finite(x) -> float | None:
    """A float for JSON: None where it is not finite (JSON has no NaN)."""
    x = float(x)
    return x if math.isfinite(x) else None


# The loop.

@contextlib.contextmanager
def _asked_to_stop():
    """A list that becomes non-empty on SIGTERM or SIGINT: save, then leave."""
    asked: list[int] = []
    old = {s: signal.signal(s, lambda n, _: asked.append(n))
           for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def _stop_now(asked: list, step: int) -> bool:
    """Whether to stop at `step`; all processes of a distributed run agree on the step."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils
        return bool(asked) or multihost_utils.reached_preemption_sync_point(step)
    return bool(asked)


def run(config, workdir: str, *, stage_name: str | None = None, probe_of=None, profile_steps=()):
    """Trains the named stage, or every stage in turn, resuming whatever `workdir` holds.

    probe_of(stage) -> Probe or None. profile_steps: (first, last) steps to trace with the profiler.
    Returns the loss of the last step of the last stage (None if nothing was left to do).
    """
    which = [stages.find(config, stage_name)] if stage_name else stages.stages(config)
    try:
        mesh = sharding.make_mesh({k: v for k, v in plain(config.mesh).items() if k != 'rules'})
    except ValueError as e:
        raise ConfigError(str(e)) from None
    v = model.make_vocab(config)
    probes = []
    for i, stage in enumerate(which):   # whatever can be wrong, before a directory is made
        data.check(config, dataclasses.asdict(stage), v)
        abstract_state(config, stage, mesh)
        _check_batch(config, stage, mesh, v)
        if stage.start not in [s.name for s in which[:i]]:
            _start_folder(config, stage, workdir)
        probes.append(probe_of(stage) if probe_of else None)
    rundir.open_run(workdir, config)
    loss = None
    for stage, probe in zip(which, probes, strict=True):
        loss = _run_stage(config, stage, workdir, mesh, v, probe, profile_steps)
    return loss


def _check_batch(config, stage: Stage, mesh, v) -> None:
    """Raises ConfigError for rows that do not divide over devices, ValueError for wrong terms."""
    ways = math.prod(mesh.shape[a] for a in ('data', 'fsdp'))
    if stage.batch // stage.accumulate % ways:
        raise ConfigError(f'stage {stage.name}: batch {stage.batch} / accumulate '
                          f'{stage.accumulate} must divide over {ways} data x fsdp devices')
    cells = jnp.zeros((1, len(v.rows), 2))
    model.objective_of(config)(cells, cells, dict(tokens=cells.astype(int), weights=cells))


def _run_stage(config, stage: Stage, workdir, mesh, v, probe, profile_steps):
    graph, target, by_path = abstract_state(config, stage, mesh)
    rules = sharding.rules_of(plain(config.mesh).get('rules', {}))
    rows = sharding.batch_sharding(rules, mesh)
    share = sharding.replicated_fraction(target['params'],
                                         jax.tree.map(lambda x: x.sharding, target['params']))
    if share > 0.02:
        log.warning('%.1f %% of parameter bytes are replicated on every device', 100 * share)
    step_fn = jax.jit(make_step(graph, model.objective_of(config), stage, by_path,
                                sharding.placer(rules, mesh), config.seed),
                      donate_argnums=0,
                      out_shardings=(jax.tree.map(lambda x: x.sharding, target), None))
    marks = data.fingerprint(config, dataclasses.asdict(stage), v)
    with checkpoint.Checkpoints(workdir, stage.name, config=config, keep=stage.keep) as saved:
        found = saved.resume(target)
        if found:
            state, meta = found
            begin = int(meta['step'])
            data.resume(meta['data'], marks)
        else:
            state = fresh_state(config, stage, target, by_path,
                                start_params(config, stage, workdir, target))
            begin = 0
        parameters = model.count(target['params'])
        trained = model.count(stages.split(target['params'], by_path)[0])
        rundir.ledger(workdir, dict(
            event='resume' if found else 'start', stage=stage.name, step=begin,
            revision=_revision(), fingerprint=fingerprint(config), devices=mesh.size,
            device_kind=mesh.devices.flat[0].device_kind, processes=jax.process_count(),
            mesh={k: int(n) for k, n in mesh.shape.items() if n > 1},
            parameters=parameters, trained_parameters=trained,
            dataset=marks['dataset']))
        if begin >= stage.steps:
            log.info('stage %s is done (%d steps)', stage.name, stage.steps)
            return None
        log.info('stage %s: steps %d..%d, %.2f M parameters (%.2f M trained), mesh %s', stage.name,
                 begin, stage.steps, parameters / 1e6, trained / 1e6,
                 {k: int(n) for k, n in mesh.shape.items() if n > 1} or 'one device')
        batches = data.batches(config, dataclasses.asdict(stage), v, start_step=begin,
                               process_index=jax.process_index(),
                               process_count=jax.process_count())
        drawn_from = dict(fingerprint=marks, codec=data.codec(config))
        with contextlib.closing(batches):
            return _loop(config, stage, workdir, mesh, rows, batches, drawn_from, step_fn, state,
                         begin, saved, probe, profile_steps)


def _loop(config, stage, workdir, mesh, rows, batches, drawn_from, step_fn, state, begin,
          saved, probe, profile_steps):
    rate = stages.learning_rate(stage)
    tflops = model_tflops(config, stage.batch * config.columns) / mesh.size
    peak = peak_tflops(mesh.devices.flat[0])
    writers = _Writers(workdir, begin, stage.name)
    consumed = {}
    for entry in rundir.read_ledger(workdir):       # resumed counts go on where they stopped
        if entry.get('stage') == stage.name and entry.get('consumed_to', begin + 1) <= begin:
            consumed = entry['consumed']
    consumed = {s: dict(c) for s, c in consumed.items()}
    pending = None
    loss = None
    # waited: for data; dispatched: host work of handing a step over; both since the last line.
    waited = dispatched = 0.0
    since, since_step, positions, audio_s = time.perf_counter(), begin, 0, 0.0

    def read(pending):
        """The numbers of an earlier step, checked; written every log_steps."""
        nonlocal waited, dispatched, since, since_step, positions, audio_s, loss
        n, sums, account = pending
        sums = jax.device_get(sums)
        loss = float(sums['loss'])
        if n == begin + 1:      # this one compiled: the clock starts after it
            since, since_step, waited, dispatched = time.perf_counter(), n, 0.0, 0.0
        for source, counts in account.items():
            into = consumed.setdefault(source, {})
            for k, x in counts.items():
                into[k] = into.get(k, 0) + x
            if n > begin + 1:
                positions += counts['tokens']
                audio_s += counts['audio_s']
        if int(sums['bad_steps']) >= stage.bad_steps:
            raise TrainingError(f'stage {stage.name}, step {n}: loss or gradient not finite for '
                                f'{int(sums["bad_steps"])} steps in a row; lower the learning rate '
                                'or look at the data')
        if n % stage.log_steps and n != stage.steps:
            return
        now = time.perf_counter()
        # A first step compiles: it has a loss but no honest time.
        spent_s = now - since if n > since_step else math.nan
        step_s = spent_s / max(n - since_step, 1)
        entry = dict(
            stage=stage.name, step=n, loss=_finite(loss),
            terms={k: _finite(s / max(w, 1e-6)) for k, (s, w) in sums['terms'].items()},
            metrics={k: _finite(s / w) for k, (s, w) in sums['metrics'].items() if w > 0},
            lr=float(rate(n - 1)), grad_norm=_finite(sums['grad_norm']),
            skipped_steps=int(sums['skipped_steps']), step_s=_finite(step_s),
            data_wait_fraction=_finite(waited / spent_s),
            dispatch_fraction=_finite(dispatched / spent_s),
            tokens_per_s=_finite(positions / spent_s),
            audio_hours_per_h=_finite(audio_s / spent_s),
            tokens=sum(c['tokens'] for c in consumed.values()),
            audio_hours=sum(c['audio_s'] for c in consumed.values()) / 3600,
            time_s=round(time.time(), 3))
        writers.write(entry)
        mfu = f'{100 * tflops / step_s / peak:.1f}%' if peak else 'unknown'
        log.info('completed step: %d, seconds: %.3f, TFLOP/s/device: %.3f, MFU: %s, '
                 'tokens/s/device: %.0f, audio-hours/h: %.1f, data-wait: %.2f%%, loss: %.4f',
                 n, step_s, tflops / step_s, mfu, positions / spent_s / mesh.size,
                 audio_s / spent_s, 100 * waited / spent_s, loss)
        waited = dispatched = audio_s = 0.0
        positions, since, since_step = 0, now, n

    def save(n):
        saved.save(n, state, data_state=dict(next_step=n, **drawn_from))
        rundir.ledger(workdir, dict(event='consumed', stage=stage.name, consumed_to=n,
                                        consumed=consumed))

    with _asked_to_stop() as asked, contextlib.closing(writers):
        for n in range(begin, stage.steps):
            if profile_steps and n == profile_steps[0]:
                jax.profiler.start_trace(os.path.join(workdir, 'profile'))
            start = time.perf_counter()
            arrays, account = next(batches)
            waited += time.perf_counter() - start
            start = time.perf_counter()
            batch = {k: jax.make_array_from_process_local_data(rows, x) for k, x in arrays.items()}
            state, sums = step_fn(state, batch)
            dispatched += time.perf_counter() - start
            if pending:
                read(pending)
            pending = (n + 1, sums, account)
            if profile_steps and n + 1 == profile_steps[1]:
                jax.block_until_ready(sums)
                jax.profiler.stop_trace()
            last = n + 1 == stage.steps
            stop = _stop_now(asked, n)
            probing = probe and (last or (not stop and stage.probe_steps
                                          and (n + 1) % stage.probe_steps == 0))
            saving = last or stop or (n + 1) % stage.save_steps == 0
            if probing or saving:
                read(pending)       # what is saved must have been checked and counted
                pending = None
                if probing:
                    held_out = probe(n + 1, state['params'])
                    writers.write(dict(stage=stage.name, step=n + 1, held_out=held_out,
                                       time_s=round(time.time(), 3)))
                    log.info('held out at step %d: %s', n + 1,
                             ', '.join(f'{k} {x:.4f}' for k, x in held_out.items()))
                if saving:
                    save(n + 1)
                since, since_step, positions = time.perf_counter(), n + 1, 0
                waited = dispatched = audio_s = 0.0
            if stop and not last:
                saved.wait()
                log.info('asked to stop: saved step %d of stage %s; the same command goes on',
                         n + 1, stage.name)
                raise SystemExit(0)
    return loss


def connect() -> None:
    """Joins the other processes of a run before any device is touched.

    JAXSD_COORDINATOR=host:port with JAXSD_PROCESSES and JAXSD_PROCESS_INDEX says it outright; on
    TPU pods, Slurm and GKE, JAXSD_DISTRIBUTED=1 lets jax find out by itself.
    """
    coordinator = os.environ.get('JAXSD_COORDINATOR')
    if coordinator:
        if os.environ.get('JAX_PLATFORMS', '') == 'cpu':
            jax.config.update('jax_cpu_collectives_implementation', 'gloo')
        count, index = (os.environ.get(k, '') for k in ('JAXSD_PROCESSES', 'JAXSD_PROCESS_INDEX'))
        if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
            raise ConfigError('JAXSD_COORDINATOR needs JAXSD_PROCESSES and JAXSD_PROCESS_INDEX, a '
                              f'count and a number below it; got {count!r} and {index!r}')
        jax.distributed.initialize(coordinator, int(count), int(index))
    elif os.environ.get('JAXSD_DISTRIBUTED') == '1':
        jax.distributed.initialize()

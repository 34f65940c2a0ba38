# SPDX-License-Identifier: Apache-2.0
"""The loop and the pure train step.

The step is a pure function of plain dicts; modules exist only while it is traced. The loop
dispatches step n and then reads the numbers of step n-1, so the host never waits for the loss it
has just asked for. What a run leaves behind goes through `checkpoint` and `journal`.
"""

import contextlib
import dataclasses
import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxsd import attention, checkpoint, data, journal, model, processes, sharding
from jaxsd import run as rundir
from jaxsd import stage as stages
from jaxsd.config import ConfigError, fingerprint, plain
from jaxsd.export import begin
from jaxsd.stage import Stage
from jaxsd.state import abstract_state, fresh_state, mesh_of

log = logging.getLogger('jaxsd')

Probe = Callable
"""probe(step, params) -> {name: value}: held-out numbers, called every probe_steps; one with a true
attribute `generates` also before the first step, which tells how long the steps will wait."""


class TrainingError(RuntimeError):
    """Training cannot go on, said in one line with the step."""


# The step.

def scorer(graph, objective, place=sharding.anywhere):
    """scored(params, batch, key) -> (terms, metrics): the forward pass, to the objective's sums."""
    def scored(params, batch, key):
        logp, hit, beside = nnx.merge(graph, params).forward(batch, key, place)
        return objective(logp, hit, batch, beside)
    return scored


def make_step(graph, objective, stage: Stage, by_path: dict, place=sharding.anywhere,
              seed: int = 0):
    """step(state, batch) -> (state, sums), pure.

    state: params (nested dict), opt, step, bad_steps (consecutive) and skipped_steps (in all).
    sums: {'terms': {name: (sum, weight)}, 'metrics': ..., 'loss', 'grad_norm', 'lr', 'bad_steps',
    'skipped_steps'}, all scalars. A step whose loss or gradient is not finite changes nothing but
    the counters; the schedule does not move on either.
    """
    tx, rate = stages.optimizer(stage, by_path), stages.learning_rate(stage)
    sums_of = scorer(graph, objective, place)

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
        which = {'apart': batch['apart'][0]} if stage.apart else {}     # the same in every row
        updates, opt = tx.update(grads, state['opt'], trainable, **which)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = (optax.apply_updates(trainable, updates), opt)
        trainable, opt = jax.tree.map(lambda a, b: jnp.where(good, a, b), new,
                                      (trainable, state['opt']))
        lr = jnp.asarray(rate(state['step'] - state['skipped_steps']), jnp.float32)
        bad = jnp.where(good, 0, state['bad_steps'] + 1)
        skipped = state['skipped_steps'] + jnp.where(good, 0, 1)
        state = dict(params=stages.join(trainable, frozen), opt=opt, step=state['step'] + 1,
                     bad_steps=bad, skipped_steps=skipped)
        return state, dict(terms=terms, metrics=metrics, loss=loss, grad_norm=norm, lr=lr,
                           bad_steps=bad, skipped_steps=skipped)
    return step


def step_on(config, stage: Stage, mesh):
    """(step, state, by_path): the jitted step as it runs on `mesh`, whose devices need not be here,
    and the state of ShapeDtypeStructs that it takes and gives back, in the same memory."""
    graph, target, by_path = abstract_state(config, stage, mesh)
    place = sharding.placer(sharding.rules_of(plain(config.mesh).get('rules', {})), mesh)
    step = make_step(graph, model.objective_of(config), stage, by_path, place, config.seed)
    return jax.jit(step, donate_argnums=0,
                   out_shardings=(jax.tree.map(lambda x: x.sharding, target),
                                  sharding.replicated(mesh))), target, by_path


def abstract_batch(config, stage: Stage, mesh) -> dict:
    """The batch that a step takes, as ShapeDtypeStructs placed on `mesh`; see `data.batches`."""
    rows = sharding.batch_sharding(sharding.rules_of(plain(config.mesh).get('rules', {})), mesh)
    streams = len(model.make_vocab(config).rows)
    whole, line = (stage.batch, streams, config.columns), (stage.batch, config.columns)
    kinds = dict(tokens=(whole, jnp.int32), weights=(whole, jnp.float32),
                 position=(line, jnp.int32), segment=(line, jnp.int32))
    kinds |= {name: ((*line, n), jnp.float32) if n else (line, jnp.int32)
              for name, n in data.extras(config, dataclasses.asdict(stage)).items()}
    if stage.apart:
        kinds['apart'] = ((stage.batch,), jnp.bool_)
    return {k: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
            for k, (shape, dtype) in kinds.items()}


# The loop.

@contextlib.contextmanager
def _asked_to_stop():
    """A function to call after every step: which of SIGTERM and SIGINT came, if any (save, then
    leave).

    The processes of a distributed run agree on the step: jax's own service hears SIGTERM there and
    tells the others, so SIGINT is passed on as that. A second SIGINT interrupts at once.
    """
    shared = jax.process_count() > 1
    asked, interrupts, calls = [], [], itertools.count()

    def heard(number, _):
        if number == signal.SIGINT:
            if interrupts:
                raise KeyboardInterrupt
            interrupts.append(number)
        if shared:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            asked.append(number)

    def stop() -> int | None:
        if shared:
            from jax.experimental import multihost_utils
            if multihost_utils.reached_preemption_sync_point(next(calls)):
                asked.append(signal.SIGTERM)
        return (interrupts or asked)[0] if asked else None

    numbers = (signal.SIGINT,) if shared else (signal.SIGTERM, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        numbers = ()        # Python lets only the main thread listen
    old = {s: signal.signal(s, heard) for s in numbers}
    try:
        yield stop
    finally:
        for s, handler in old.items():
            signal.signal(s, handler if handler is not None else signal.SIG_DFL)


def run(config, workdir: str, *, stage_name: str | None = None, probe_of=None, profile_steps=(),
        began_s: float | None = None, made: dict | None = None):
    """Trains the named stage, or every stage in turn, resuming whatever `workdir` holds.

    probe_of(stage) -> Probe or None. profile_steps: (first, last) steps to trace with the profiler.
    began_s: since when this run takes time (Unix; default now), for the ledger. made: as in
    `run.open_run`.
    Raises SystemExit when the run was asked to stop and has saved. Returns the loss of the last
    step of the last stage (None if nothing was left to do).
    """
    began_s = time.time() if began_s is None else began_s
    processes.stopped_status()          # a wrong one is told now and not when it is needed
    which, probes = ready(config, workdir, stage_name=stage_name, probe_of=probe_of)
    mesh, v = mesh_of(config), model.make_vocab(config)
    rundir.open_run(workdir, config, made=made)
    loss = None
    with rundir.held(workdir), _asked_to_stop() as stop:
        for stage, probe in zip(which, probes, strict=True):
            done = _run_stage(config, stage, workdir, mesh, v, probe, profile_steps, stop, began_s)
            if done is not None:
                loss, began_s = done, time.time()
    return loss


def ready(config, workdir: str, *, stage_name: str | None = None, probe_of=None
          ) -> tuple[list[Stage], list]:
    """The stages that `run` would train, and their probes. Raises ConfigError or CheckpointError
    for whatever can be wrong with them on the devices here, before a directory is made."""
    which = [stages.find(config, stage_name)] if stage_name else stages.stages(config)
    mesh = mesh_of(config)
    v = model.make_vocab(config)
    probes = []
    for i, stage in enumerate(which):
        data.check(config, dataclasses.asdict(stage), v)
        target = abstract_state(config, stage, mesh)[1]
        check_batch(config, stage, mesh)
        if (stage.start not in [s.name for s in which[:i]]
                and begin.foreign(config, stage, workdir) is None
                and (folder := begin.start_folder(config, stage, workdir)) == stage.start):
            there = checkpoint.fits(folder, begin.held(folder, stage, target))
            data.same_codec(there['data'], config)
        probes.append(probe_of(stage) if probe_of else None)
    return which, probes


def check_batch(config, stage: Stage, mesh) -> None:
    """Raises ConfigError for rows or columns that do not divide over devices, ValueError for wrong
    terms and for an engine of attention that these devices do not have."""
    place = sharding.placer(sharding.rules_of(plain(config.mesh).get('rules', {})), mesh)
    if stage.batch // stage.accumulate % place.ways('batch'):
        raise ConfigError(f'stage {stage.name}: batch {stage.batch} / accumulate '
                          f'{stage.accumulate} must divide over {place.ways("batch")} '
                          f'{" x ".join(place.over("batch"))} devices')
    if config.columns % place.ways('column'):
        raise ConfigError(f'columns {config.columns} must divide over {place.ways("column")} '
                          f'{" x ".join(place.over("column"))} devices')
    if (engine := config.backbone.get('attention', 'auto')) != 'auto':
        attention.choose(engine, place.platform, columns=config.columns, ways=place.ways('column'),
                         head_dim=config.backbone.head_dim,
                         dtype=config.frontend.get('dtype', 'bfloat16'))
    like = abstract_batch(config, stage, mesh)
    jax.eval_shape(model.objective_of(config), like['weights'], like['weights'], like)


def share_of_rows(rows, batch: int) -> tuple[int, int]:
    """(index, count): which of `count` equal parts of a batch the devices of this process hold.

    Processes that split only the tensor axis hold the same rows, so that count may be below the
    number of processes. Raises ConfigError where they are not one consecutive part.
    """
    held = {s[0].indices(batch)[:2]
            for s in rows.addressable_devices_indices_map((batch,)).values()}
    first, last, size = min(held)[0], max(held)[1], sum(b - a for a, b in held)
    if size != last - first or first % size or batch % size:
        raise ConfigError(f'mesh: the devices of process {jax.process_index()} hold separate rows '
                          'of a batch; make mesh.data x mesh.fsdp a multiple of the process count')
    return first // size, batch // size


def _run_stage(config, stage: Stage, workdir, mesh, v, probe, profile_steps, stop, began_s):
    step_fn, target, by_path = step_on(config, stage, mesh)
    rows = sharding.batch_sharding(sharding.rules_of(plain(config.mesh).get('rules', {})), mesh)
    share = sharding.replicated_fraction(target['params'],
                                         jax.tree.map(lambda x: x.sharding, target['params']))
    if share > 0.02:
        log.warning('%.1f %% of parameter bytes are replicated on every device', 100 * share)
    marks = data.fingerprint(config, dataclasses.asdict(stage), v)
    with checkpoint.Checkpoints(workdir, stage.name, config=config, keep=stage.keep) as saved:
        start = time.perf_counter()
        found = saved.resume(target)
        ready = dict(restore_s=time.perf_counter() - start if found else 0.0)
        if found:
            state, meta = found
            first, counted = int(meta['step']), meta['data'].get('consumed', {})
            data.resume(meta['data'], marks)
            if first >= stage.steps and (not probe or rundir.on_first_process(
                    lambda: journal.measured(workdir, stage.name, first))):
                log.info('stage %s is done (%d steps)', stage.name, stage.steps)
                return None
            begun = dict(event='resume', stage=stage.name, step=first)
            if seen_s := journal.last_seen_s(workdir):
                begun['seen_s'] = seen_s
        else:
            found = begin.start_params(config, stage, workdir, target)
            state = fresh_state(config, stage, target, by_path, found.params)
            first, counted = 0, {}
            begun = dict(event='start', stage=stage.name, step=0, start=found.start,
                         origins=found.origins)
        parameters = model.count(target['params'])
        trained = model.count(stages.split(target['params'], by_path)[0])
        rundir.ledger(workdir, begun | dict(
            began_s=round(began_s, 3), revision=journal.revision(),
            fingerprint=fingerprint(config), devices=mesh.size,
            device_kind=mesh.devices.flat[0].device_kind, processes=jax.process_count(),
            mesh={k: int(n) for k, n in mesh.shape.items() if n > 1},
            parameters=parameters, trained_parameters=trained,
            dataset=marks['dataset']))
        log.info('stage %s: steps %d..%d, %.2f M parameters (%.2f M trained), mesh %s, from %s',
                 stage.name, first, stage.steps, parameters / 1e6, trained / 1e6,
                 {k: int(n) for k, n in mesh.shape.items() if n > 1} or 'one device',
                 begun.get('start', f'step {first}'))
        share = share_of_rows(rows, stage.batch)
        batches = data.batches(config, dataclasses.asdict(stage), v, start_step=first,
                               process_index=share[0], process_count=share[1])
        drawn_from = dict(fingerprint=marks, codec=data.codec(config))
        with contextlib.closing(batches):
            return _loop(config, stage, workdir, mesh, rows, batches, drawn_from, step_fn, state,
                         first, journal.Consumed(stage, counted, share[0]), saved, probe,
                         profile_steps, stop, began_s, ready)


def _loop(config, stage, workdir, mesh, rows, batches, drawn_from, step_fn, state, first,
          consumed, saved, probe, profile_steps, stop, began_s, ready):
    tflops = journal.model_tflops(config, stage.batch * config.columns, stage) / mesh.size
    peak = journal.peak_tflops(mesh.devices.flat[0])
    first_trace, last_trace = profile_steps or (stage.steps, stage.steps)
    if profile_steps and not (first < last_trace and first_trace < stage.steps):
        log.warning('stage %s: steps %d..%d are to be traced, but steps %d..%d are to be trained',
                    stage.name, first_trace, last_trace, first, stage.steps)

    def put(arrays):
        return {k: jax.make_array_from_process_local_data(rows, x) for k, x in arrays.items()}

    # Filling the data pipeline and compiling come before the clock: every step's time is a step's.
    log.info('reading the data of stage %s, then compiling', stage.name)
    start = time.perf_counter()
    ahead = [next(batches)]
    ready['data_s'] = time.perf_counter() - start
    start = time.perf_counter()
    step_fn = step_fn.lower(state, put(ahead[0][0])).compile()
    ready['compile_s'] = time.perf_counter() - start
    log.info('compiled in %.1f s', ready['compile_s'])
    ready['init_s'] = time.time() - began_s - sum(ready.values())
    rundir.ledger(workdir, dict(event='ready', stage=stage.name, **journal.rounded(ready)))
    spent = dict(data_s=0.0, save_s=0.0, probe_s=0.0)       # since then, beside the steps
    saves, first_save_s = 0, 0.0    # the first compiles its checksums

    writers = journal.Writers(workdir, first, stage.name)
    pending = loss = None
    # Since the last line. waited: for data; dispatched: this thread's work to hand a step over, not
    # its waiting for a core, which runs the step before where the host is the device.
    waited = dispatched = 0.0
    since, since_step, before = time.perf_counter(), first, consumed.before

    def read(pending):
        """The numbers of an earlier step, counted and checked; written every log_steps."""
        nonlocal waited, dispatched, since, since_step, before, loss
        n, sums, account = pending
        sums = jax.device_get(sums)
        loss = float(sums['loss'])
        consumed.add(account)
        if n % stage.log_steps == 0 or n == stage.steps:
            now, counted = time.perf_counter(), consumed.total()
            spent_s, count = max(now - since, 1e-9), n - since_step

            def grown(k):
                return sum(c[k] for c in counted.values()) - sum(c[k] for c in before.values())

            finite = journal.finite
            entry = dict(
                stage=stage.name, step=n, loss=finite(loss),
                terms={k: finite(s / max(w, 1e-6)) for k, (s, w) in sums['terms'].items()},
                metrics={k: finite(s / w) for k, (s, w) in sums['metrics'].items() if w > 0},
                lr=float(sums['lr']), grad_norm=finite(sums['grad_norm']),
                skipped_steps=int(sums['skipped_steps']), step_s=spent_s / count,
                data_wait_fraction=waited / spent_s, dispatch_fraction=dispatched / spent_s,
                tokens_per_s=grown('tokens') / spent_s,
                audio_hours_per_h=grown('audio_s') / spent_s,
                tokens=sum(c['tokens'] for c in counted.values()),
                audio_hours=sum(c['audio_s'] for c in counted.values()) / 3600,
                time_s=round(time.time(), 3))
            writers.write(entry)
            speed = tflops * count / spent_s
            log.info('completed step: %d, seconds: %.3f, TFLOP/s/device: %.3f, MFU: %s, '
                     'tokens/s/device: %.0f, audio-hours/h: %.1f, data-wait: %.2f%%, loss: %.4f, '
                     'of: %d steps, left: %.1f min',
                     n, entry['step_s'], speed, f'{100 * speed / peak:.1f}%' if peak else 'unknown',
                     entry['tokens_per_s'] / mesh.size, entry['audio_hours_per_h'],
                     100 * entry['data_wait_fraction'], loss,
                     stage.steps, (stage.steps - n) * entry['step_s'] / 60)
            waited = dispatched = 0.0
            since, since_step, before = now, n, counted
        if int(sums['bad_steps']) >= stage.bad_steps:
            raise TrainingError(f'stage {stage.name}, step {n}: loss or gradient not finite for '
                                f'{int(sums["bad_steps"])} steps in a row; lower the learning rate '
                                'or look at the data')

    def save(n):
        nonlocal saves, first_save_s
        counted, start = consumed.total(), time.perf_counter()
        saved.save(n, state, data_state=dict(next_step=n, consumed=counted, **drawn_from))
        spent['save_s'] += time.perf_counter() - start
        saves, first_save_s = saves + 1, first_save_s or spent['save_s']
        rundir.ledger(workdir, dict(event='consumed', stage=stage.name, step=n, consumed_to=n,
                                    consumed=counted, spent=journal.rounded(spent)))

    def over(event, n):
        """Waits for the last checkpoint and writes the last word of this life of the stage."""
        start = time.perf_counter()
        saved.wait()
        commit_s = time.perf_counter() - start
        spent['save_s'] += commit_s
        rundir.ledger(workdir, dict(event=event, stage=stage.name, step=n, saves=saves,
                                    **journal.rounded(dict(first_save_s=first_save_s,
                                                           commit_s=commit_s)),
                                    spent=journal.rounded(spent)))

    def measure(n):
        """Held-out numbers after n steps, and how long they took."""
        start = time.perf_counter()
        held_out = probe(n, state['params'])
        took_s = time.perf_counter() - start
        spent['probe_s'] += took_s
        writers.write(dict(stage=stage.name, step=n, held_out=held_out,
                           time_s=round(time.time(), 3)))
        log.info('held out at step %d: %s', n,
                 ', '.join(f'{k} {x:.4f}' for k, x in held_out.items()))
        return took_s

    tracing = False
    with contextlib.closing(writers):
        if first == 0 and stage.probe_steps and getattr(probe, 'generates', False):
            log.info('every %d steps the steps will wait at most %.1f s, as now with compiling, '
                     'for what is generated and measured', stage.probe_steps, measure(0))
            since = time.perf_counter()
        for n in range(first, stage.steps):
            if first_trace <= n < last_trace and not tracing:
                jax.profiler.start_trace(os.path.join(workdir, 'profile'))
                tracing = True
            start = time.perf_counter()
            arrays, account = ahead.pop() if ahead else next(batches)
            waited += time.perf_counter() - start
            spent['data_s'] += time.perf_counter() - start
            start = time.thread_time()
            state, sums = step_fn(state, put(arrays))
            dispatched += time.thread_time() - start
            if pending:
                read(pending)
            pending = (n + 1, sums, account)
            last, leaving = n + 1 == stage.steps, stop()
            if tracing and (last or leaving or n + 1 == last_trace):
                jax.block_until_ready(sums)
                jax.profiler.stop_trace()
                tracing = False
            probing = probe and (last or (stage.probe_steps and not leaving
                                          and (n + 1) % stage.probe_steps == 0))
            saving = last or leaving or (n + 1) % stage.save_steps == 0
            if not (probing or saving):
                continue
            read(pending)       # what is saved has been checked and counted
            pending, paused = None, time.perf_counter()
            if saving:          # first, so that an error while probing loses nothing
                save(n + 1)
            if probing:
                measure(n + 1)
            since += time.perf_counter() - paused       # a step's time is without these
            if leaving:
                over('stopped', n + 1)
                log.info('asked to stop: saved step %d of stage %s; the same command goes on',
                         n + 1, stage.name)
                raise SystemExit(processes.stopped_status(leaving))
        if first == stage.steps and probe:      # killed after the last save
            measure(first)
        over('finished', stage.steps)
    return loss

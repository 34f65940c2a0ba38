# SPDX-License-Identifier: Apache-2.0
"""The `bench` verb: how fast a config's train step runs on the devices that are here.

The step is `train.step_on`'s and the batches are those of training, read, drawn and packed as they
come. Where the config's dataset is not at hand, one batch of random ids serves, and nothing is said
of data. Weights are random. Nothing is written.
"""

import contextlib
import dataclasses
import logging
import resource
import statistics
import sys
import time

import jax
import numpy as np

from jaxsd import data, journal, model, sharding, train
from jaxsd import stage as stages
from jaxsd.config import ConfigError, plain
from jaxsd.state import fresh_state, mesh_of

log = logging.getLogger('jaxsd')

WARM_STEPS = 3      # after compiling; not counted


def run(config, *, stage_name: str | None = None, steps: int = 20) -> dict[str, float | None]:
    """Times `steps` steps of a stage (default: the first) one by one and returns the figures.

    Seconds are medians; a step's own are from handing it over to having its loss. None: unknown
    here (the MFU of a device without a known peak; hours and waiting without a dataset).
    """
    stage = stages.find(config, stage_name) if stage_name else stages.stages(config)[0]
    mesh, v = mesh_of(config), model.make_vocab(config)
    train.check_batch(config, stage, mesh)
    step_fn, target, by_path = train.step_on(config, stage, mesh)
    rows = sharding.batch_sharding(sharding.rules_of(plain(config.mesh).get('rules', {})), mesh)

    share = train.share_of_rows(rows, stage.batch)

    def put(arrays):
        return {k: jax.make_array_from_process_local_data(rows, x) for k, x in arrays.items()}
    with contextlib.ExitStack() as stack:
        try:
            data.check(config, dataclasses.asdict(stage), v)
            batches = data.batches(config, dataclasses.asdict(stage), v, process_index=share[0],
                                   process_count=share[1])
            stack.enter_context(contextlib.closing(batches))
        except (ConfigError, ValueError) as e:
            log.warning('random ids instead of data: %s', e)
            batches = None
        drawn = (next(batches)[0] if batches else
                 random_batch(train.abstract_batch(config, stage, mesh), v, share[1]))
        state = fresh_state(config, stage, target, by_path)
        begun = time.perf_counter()
        compiled = step_fn.lower(state, put(drawn)).compile()
        compile_s = time.perf_counter() - begun
        waits, spent, audio_s = [], [], []
        for n in range(WARM_STEPS + steps):
            begun, account = time.perf_counter(), {}
            if batches:
                drawn, account = next(batches)
            ready = time.perf_counter()
            state, sums = compiled(state, put(drawn))
            jax.block_until_ready(sums['loss'])
            done = time.perf_counter()
            if n >= WARM_STEPS:
                waits.append(ready - begun)
                spent.append(done - ready)
                audio_s.append(sum(c['audio_s'] for c in account.values()))
    step_s, wait_s = statistics.median(spent), statistics.median(waits)
    positions = stage.batch * config.columns
    tflops = journal.model_tflops(config, positions, stage) / mesh.size / (step_s + wait_s)
    peak = journal.peak_tflops(mesh.devices.flat[0])
    return {
        'compile s': compile_s, 'step s': step_s, 'slowest step s': max(spent),
        'data wait s': wait_s if batches else None, 'steps/s': 1 / (step_s + wait_s),
        'positions/s': positions / (step_s + wait_s),
        'audio-hours/h': sum(audio_s) / sum(spent + waits) if batches else None,
        'TFLOP/s/device': tflops, 'MFU %': 100 * tflops / peak if peak else None,
        'peak memory GB': _peak_bytes(mesh) / 1e9}


def random_batch(shapes, vocab, parts: int) -> dict[str, np.ndarray]:
    """One of `parts` of a batch of `shapes`: ids drawn from each row's own, all of one segment,
    every cell scored."""
    rng, out = np.random.default_rng(0), {}
    for name, leaf in shapes.items():
        out[name] = np.zeros((leaf.shape[0] // parts, *leaf.shape[1:]), leaf.dtype)
    B, _, T = out['tokens'].shape
    for k, row in enumerate(vocab.rows):
        out['tokens'][:, k] = row.start + rng.integers(0, row.size, (B, T))
        out['weights'][:, k, 1:] = row.predicted > 0
    out['position'][:] = np.arange(T)
    out['segment'][:] = 1
    return out


def _peak_bytes(mesh) -> int:
    """The most that one device held; on CPU, which is not asked, the most of the process."""
    stats = [d.memory_stats() for d in mesh.local_devices]
    if all(s and 'peak_bytes_in_use' in s for s in stats):
        return max(s['peak_bytes_in_use'] for s in stats)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == 'darwin' else 1024)

# SPDX-License-Identifier: Apache-2.0
"""What a run tells about itself while it trains: metrics.jsonl, TensorBoard events, what it read.

A line per `log_steps` says how the model does and how fast it learns; a count per source says what
it has seen. Process 0 writes; numbers that every process holds a part of are added up first.
"""

import contextlib
import json
import math
import os
import subprocess
import time

import jax
import numpy as np

from jaxsd import data, model
from jaxsd import run as rundir
from jaxsd.stage import Stage, flatten, multipliers

# bf16 peaks of one device, TFLOP/s, from the vendors' data sheets (dense).
PEAK_TFLOPS = {'TPU v4': 275, 'TPU v5 lite': 197, 'TPU v5e': 197, 'TPU v5': 459, 'TPU v5p': 459,
               'TPU v6 lite': 918, 'NVIDIA A100-SXM4-80GB': 312, 'NVIDIA H100 80GB HBM3': 989,
               'NVIDIA H200': 989, 'NVIDIA B200': 2250}

TAIL_BYTES = 1 << 16        # of the metrics, to find their last line


# How fast.

def model_tflops(config, columns: int, stage: Stage) -> float:
    """TFLOPs of one forward and backward pass over `columns` columns, attention counted causally.

    Every matrix is counted twice per use (multiply, add) in the forward pass and for the gradient
    of its input, and twice more for its own gradient if the stage trains it; rows as if they held
    one segment each. Recomputation is not counted: this is the model's work, not the machine's.
    """
    _, shapes, _ = model.abstract(config, stage.lora)
    head, back = config.head, config.backbone

    def used(path: str) -> float:       # the share of its numbers that a column meets
        name = path.rsplit('/', 1)[-1]
        if '/experts/' in path and name in ('gate_up', 'down'):
            return back.experts_per_column / back.experts
        table = path == 'frontend/table' and head['name'] == 'tied'
        return float(table or name in ('kernel', 'lora_a', 'lora_b'))
    flat = {p: int(np.prod(x.shape)) for p, x in flatten(shapes).items()}
    trained = multipliers(stage, flat)
    flops = sum(2.0 * size * used(path) * (2 + (trained[path] is not None))
                for path, size in flat.items())
    seen = config.columns / 2
    if back.get('window_columns'):
        seen = min(seen, back.window_columns)
    flops += 3 * 4.0 * back.layers * back.heads * back.head_dim * seen
    return flops * columns / 1e12


def peak_tflops(device) -> float | None:
    return PEAK_TFLOPS.get(device.device_kind)


# What was read.

class Consumed:
    """What a stage has read so far, per source: {source: {columns, tokens, audio_s, ...}}.

    Seconds are added as whole microseconds: a resumed run ends with the sums of a straight one.
    """

    def __init__(self, stage: Stage, before: dict, share: int):
        self.before, self._own, self._share = before, {}, share
        self._sources = sorted(name for name, weight in (
            stage.data | stage.apart.get('data', {})).items() if weight > 0)

    def add(self, account: data.Account):
        """Counts one batch, this process's rows of it."""
        _sum_into(self._own, account)

    def total(self) -> dict:
        """By all processes; they must ask together. Each part of a batch is counted once."""
        own = {}
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils
            names = [(s, k) for s in self._sources for k in next(iter(self._own.values()))]
            mine = np.array([self._share] + [self._own.get(s, {}).get(k, 0) for s, k in names])
            every = np.asarray(multihost_utils.process_allgather(mine.view(np.uint32)))
            for row in {row[0]: row for row in every.view(np.int64).tolist()}.values():
                for (source, k), x in zip(names, row[1:], strict=True):
                    into = own.setdefault(source, {})
                    into[k] = into.get(k, 0) + x
            own = {s: c for s, c in own.items() if any(c.values())}
        else:
            own = {s: dict(c) for s, c in self._own.items()}
        _sum_into(own, self.before)
        return {s: {k: x / 1e6 if k.endswith('_s') else x for k, x in c.items()}
                for s, c in sorted(own.items())}


def _sum_into(total: dict, account: dict):
    """Adds seconds as microseconds and counts as they are."""
    for source, counts in account.items():
        into = total.setdefault(source, dict.fromkeys(counts, 0))
        for k, x in counts.items():
            into[k] += round(x * 1e6) if k.endswith('_s') else int(x)


# What is written.

class Writers:
    """metrics.jsonl and TensorBoard events of one run, from process 0 only.

    Both are written at once and by this thread: a writer with a thread of its own hangs the run
    when the disk is full.
    """

    def __init__(self, workdir: str, step: int, stage: str):
        self._first = jax.process_index() == 0
        if not self._first:
            return
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        path = os.path.join(workdir, 'metrics.jsonl')
        _drop_after(path, stage, step)
        folder = os.path.join(workdir, 'tensorboard', stage)
        os.makedirs(folder, exist_ok=True)
        with _named_in_errors(workdir):
            self._workdir, self._event = workdir, event_pb2.Event
            self._file = open(path, 'a', encoding='utf-8')
            self._board = EventsWriter(os.path.join(folder, 'events'))
            self._board.write_event(self._event(    # hides what a killed run wrote past `step`
                wall_time=time.time(), step=step + 1,
                session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START)))

    def write(self, entry: dict):
        if not self._first:
            return
        from tensorboardX import summary
        with _named_in_errors(self._workdir):
            self._file.write(json.dumps(entry) + '\n')
            self._file.flush()
            for name, value in _scalars(entry):
                self._board.write_event(self._event(
                    wall_time=time.time(), step=entry['step'],
                    summary=summary.scalar(name.replace(' ', '_'), value)))
            self._board.flush()

    def close(self):
        if self._first:
            for opened in (self._file, self._board):
                with contextlib.suppress(OSError):      # every line was flushed when written
                    opened.close()


@contextlib.contextmanager
def _named_in_errors(path: str):
    """Adds `path` to an OSError that names no file, as a full disk raises it."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, f'{e.strerror} while writing', e.filename or path) from None


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
            if not isinstance(entry, dict):
                continue
            if entry.get('stage') != stage or entry.get('step', 0) <= step:
                kept.append(line if line.endswith('\n') else line + '\n')
    rundir.write_atomic(path, ''.join(kept))


def last_seen_s(workdir: str) -> float | None:
    """When the run last wrote metrics (Unix time), the last sign of life of one that was killed."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        with open(os.path.join(workdir, 'metrics.jsonl'), 'rb') as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - TAIL_BYTES))
            lines = f.read().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b'\n')]
        return json.loads(whole[-1]).get('time_s') if whole else None
    return None


def measured(workdir: str, stage: str, step: int) -> bool:
    """Whether the run has held-out numbers of that step."""
    with contextlib.suppress(FileNotFoundError), open(
            os.path.join(workdir, 'metrics.jsonl'), encoding='utf-8', errors='replace') as f:
        for line in f:
            with contextlib.suppress(ValueError, AttributeError):
                entry = json.loads(line)
                if 'held_out' in entry and (entry.get('stage'), entry.get('step')) == (stage, step):
                    return True
    return False


def rounded(seconds: dict) -> dict:
    return {k: round(x, 3) for k, x in seconds.items()}


def finite(x) -> float | None:
    """A float for JSON: None where it is not finite (JSON has no NaN)."""
    x = float(x)
    return x if math.isfinite(x) else None


def revision() -> str:
    try:
        out = subprocess.run(['git', 'describe', '--always', '--dirty'], capture_output=True,
                             text=True, timeout=10, cwd=os.path.dirname(__file__), check=False)
        return out.stdout.strip() or 'unknown'
    except (OSError, subprocess.SubprocessError):
        return 'unknown'

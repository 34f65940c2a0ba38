# SPDX-License-Identifier: Apache-2.0
"""Goodput: the share of a run's time that went into steps which were kept, and where the rest went.

A run is a sequence of lives. Each begins with a start or a resume in the ledger, gets ready
(processes found, checkpoint read, step compiled, first batch made), and then steps until it is
done, asked to stop, or dead. What a dead life did after the checkpoint that the next one begins
from was done for nothing.
"""

import itertools
import math
from collections.abc import Iterable, Mapping

CAUSES = {
    'stepping': 'steps that were kept',
    'init': 'starting: imports, finding processes and devices, opening data',
    'restore': 'reading a checkpoint',
    'compile': 'compiling the step',
    'data': 'waiting for batches',
    'save': 'standing still for a checkpoint',
    'probe': 'measuring held-out records',
    'lost': 'steps done after the last checkpoint of a run that died',
    'idle': 'between one run and the next',
}
_FAILURES = 256     # of the forecast
_BEFORE, _BETWEEN = ('restore', 'compile', 'data'), ('data', 'save', 'probe')


def account(ledger: Iterable[Mapping], last_s: float | None = None) -> dict[str, float]:
    """Seconds by cause from the first start to the last sign of life; they add up to all of it.

    ledger: the entries that training writes, oldest first. last_s: when metrics were last written,
    which may be after the last entry. {} where the entries hold no times to go by.
    """
    lives: list[list[Mapping]] = []
    for entry in ledger:
        if entry.get('event') in ('start', 'resume'):
            lives.append([entry])
        elif lives and _finite(entry.get('time_s')):
            lives[-1].append(entry)
    if not lives or not all(_finite(life[0].get(k)) for life in lives for k in ('began_s',
                                                                               'time_s')):
        return {}
    total = dict.fromkeys(CAUSES, 0.0)
    over = lives[0][0]['began_s']
    for life, after in zip(lives, [*(life[0] for life in lives[1:]), None], strict=True):
        began = max(life[0]['began_s'], over)
        total['idle'] += began - over
        seen = after.get('seen_s') if after else last_s
        over = max([began, *(e['time_s'] for e in life), *([seen] if _finite(seen) else [])])
        if after:       # clocks of two machines may differ: nobody is in two lives at once
            over = max(began, min(over, after['began_s']))
        ready = next((e for e in life if e.get('event') == 'ready'), None)
        if ready is None:
            total['init'] += over - began
            continue
        for cause in _BEFORE:
            total[cause] += ready[f'{cause}_s']
        total['init'] += ready['time_s'] - began - sum(ready[f'{c}_s'] for c in _BEFORE)
        marks = [e for e in life if isinstance(e.get('spent'), Mapping)]
        kept = math.inf
        if after and after.get('stage') == life[0].get('stage'):
            kept = after.get('step', 0)
            marks = [e for e in marks if e['step'] <= kept]
        mark = marks[-1] if marks else {'time_s': ready['time_s'], 'spent': {}}
        spent = {c: mark['spent'].get(f'{c}_s', 0.0) for c in _BETWEEN}
        for cause, seconds in spent.items():
            total[cause] += seconds
        total['stepping'] += mark['time_s'] - ready['time_s'] - sum(spent.values())
        total['stepping' if kept == math.inf else 'lost'] += over - mark['time_s']
    return total


def share(seconds: Mapping[str, float]) -> float:
    """The goodput of an account, 0..1."""
    return seconds['stepping'] / max(sum(seconds.values()), 1e-9)


def simulate(failures_s: Iterable[float], *, wall_s: float, every_s: float, save_s: float,
             commit_s: float, idle_s: float, **starting_s: float) -> dict[str, float]:
    """The account of a run of `wall_s` seconds that fails at the times `failures_s`, sorted.

    every_s: seconds of steps between checkpoints. save_s: how long a checkpoint stops the steps.
    commit_s: how much later it is whole on disk; a failure before that loses it. idle_s: from a
    failure until the next process begins; what fails meanwhile does not matter. starting_s: init=,
    restore=, compile=, data=, all paid before the first step of every life, in this order.
    """
    total = dict.fromkeys(CAUSES, 0.0)
    now = 0.0
    for over in [*failures_s, math.inf]:
        if over < now:
            continue
        end = min(over, wall_s)
        for cause, seconds in starting_s.items():
            total[cause] += min(seconds, end - now)
            now = min(now + seconds, end)
        cycle, left = every_s + save_s, end - now
        if over < wall_s:
            kept = max(0, math.floor((left - commit_s) / cycle))
            total['lost'] += left - kept * cycle
        else:
            kept = math.floor(left / cycle)
            rest = left - kept * cycle
            total['stepping'] += min(rest, every_s)
            total['save'] += max(0.0, rest - every_s)
        total['stepping'] += kept * every_s
        total['save'] += kept * save_s
        now = min(end + idle_s, wall_s)
        total['idle'] += now - end
        if end == wall_s:
            break
    return total


def best_interval_s(save_s: float, failure_every_s: float) -> float:
    """Seconds of steps between checkpoints that lose least (Young 1974): the square root of twice
    the cost of a checkpoint times the time between failures."""
    return math.sqrt(2 * save_s * failure_every_s)


def forecast(ledger: Iterable[Mapping], *, failure_every_s: float, idle_s: float
             ) -> tuple[float, float] | None:
    """(goodput, seconds between checkpoints) if such a run failed again and again, or None.

    Failures come at random, on average `failure_every_s` apart. Every start costs what the
    costliest in `ledger` did, and so does its first checkpoint; the others cost what they did on
    average, and are made as often as loses least. None where the ledger holds no start that ended
    well after two checkpoints.
    """
    entries = list(ledger)
    ready = [e for e in entries if e.get('event') == 'ready']
    ends = [e for e in entries if e.get('event') in ('finished', 'stopped')
            and e.get('saves', 0) > 1]
    if not ready or not ends:
        return None
    saves = sum(e['saves'] - 1 for e in ends)
    save_s = max(1e-3, sum(e['spent']['save_s'] - e['commit_s'] - e['first_save_s']
                           for e in ends) / saves)
    every_s = best_interval_s(save_s, failure_every_s)
    starting = {c: max(e[f'{c}_s'] for e in ready) for c in ('init', *_BEFORE)}
    starting['save'] = max(e['first_save_s'] for e in ends) - save_s
    gaps = (-failure_every_s * math.log1p(-(i + 0.5) / _FAILURES) for i in range(_FAILURES))
    failures = list(itertools.accumulate(gaps))     # the quantiles of an exponential: no luck in it
    seconds = simulate(failures, wall_s=failures[-1], every_s=every_s, save_s=save_s,
                       commit_s=max(e['commit_s'] for e in ends), idle_s=idle_s, **starting)
    return share(seconds), every_s


def _finite(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)

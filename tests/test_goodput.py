# SPDX-License-Identifier: Apache-2.0
"""Does every second of a run find its cause, and do rare failures cost what arithmetic says?"""

import itertools
import math

import numpy as np
import pytest

from jaxsd import goodput

READY = dict(event='ready', stage='a', init_s=10.0, restore_s=2.0, compile_s=20.0, data_s=3.0)


def spent(data_s, save_s, probe_s):
    return dict(spent=dict(data_s=data_s, save_s=save_s, probe_s=probe_s))


# A life that is killed, one that dies before its first step, one that is asked to stop, and one
# that finishes its stage and goes on to the next.
LEDGER = (
    dict(event='start', stage='a', step=0, began_s=1000.0, time_s=1011.0),
    READY | dict(time_s=1035.0),
    dict(event='consumed', stage='a', step=10, time_s=1135.0, **spent(4.0, 1.0, 0.0)),
    dict(event='checkpoint', stage='a', checkpoint=10, time_s=1136.0),
    dict(event='consumed', stage='a', step=20, time_s=1235.0, **spent(5.0, 2.0, 6.0)),
    # ... is still being written when the process dies, last heard of at 1300
    dict(event='resume', stage='a', step=10, began_s=1400.0, time_s=1410.0, seen_s=1300.0),
    # ... dies while it compiles
    dict(event='resume', stage='a', step=10, began_s=1500.0, time_s=1510.0, seen_s=1300.0),
    READY | dict(time_s=1535.0),
    dict(event='consumed', stage='a', step=15, time_s=1600.0, **spent(1.0, 1.0, 0.0)),
    dict(event='stopped', stage='a', step=15, time_s=1601.0, saves=1, commit_s=1.0,
         first_save_s=1.0, **spent(1.0, 2.0, 0.0)),
    dict(event='resume', stage='a', step=15, began_s=1610.0, time_s=1620.0, seen_s=1599.0),
    READY | dict(time_s=1645.0),
    dict(event='finished', stage='a', step=30, time_s=1745.0, saves=2, commit_s=1.0,
         first_save_s=1.5, **spent(0.0, 3.0, 7.0)),
    dict(event='start', stage='b', step=0, began_s=1745.0, time_s=1746.0),
    READY | dict(stage='b', init_s=1.0, restore_s=0.0, time_s=1769.0),
    dict(event='consumed', stage='b', step=5, time_s=1800.0, **spent(2.0, 1.0, 0.0)),
)


def test_every_second_has_one_cause():
    told = goodput.account(LEDGER, last_s=1850.0)
    assert told == dict(
        stepping=(100 - 5) + (66 - 3) + (100 - 10) + (81 - 3), init=10 + 10 + 10 + 10 + 1,
        restore=2 + 2 + 2, compile=20 * 4, data=3 * 4 + 4 + 1 + 0 + 2, save=1 + 2 + 3 + 1,
        probe=7, lost=1300 - 1135, idle=(1400 - 1300) + (1500 - 1410) + (1610 - 1601))
    assert sum(told.values()) == 1850 - 1000
    assert goodput.share(told) == told['stepping'] / 850


def test_any_part_of_a_ledger_adds_up():
    """Also of a run that is over after any of its lines, was cut by a full disk, or is going on."""
    for end in range(1, len(LEDGER) + 1):
        told = goodput.account(LEDGER[:end], last_s=1900.0)
        assert sum(told.values()) == pytest.approx(900) and min(told.values()) >= 0
        alone = goodput.account(LEDGER[:end])
        assert sum(alone.values()) == LEDGER[end - 1]['time_s'] - 1000
    assert goodput.account([]) == {}
    assert goodput.account([dict(event='start', stage='a', time_s=3.0)]) == {}   # of older runs


def ticking(failures, wall, every, save, commit, idle, starting):
    """The same as `simulate`, one second at a time; all times are whole."""
    total = dict.fromkeys(goodput.CAUSES, 0)
    script = [cause for cause, n in starting.items() for _ in range(n)]
    cycle = ['stepping'] * every + ['save'] * save
    life, away = [], 0
    for t in range(wall + 1):
        if t in failures and not away:
            # A checkpoint is whole `commit` seconds after the steps went on.
            steps = life[len(script):]
            whole = max([k for k in range(len(steps) // len(cycle) + 1)
                         if k * len(cycle) + commit <= len(steps)], default=0)
            kept = life[:len(script) + whole * len(cycle)]
            for cause in kept:
                total[cause] += 1
            total['lost'] += len(life) - len(kept)
            life, away = [], idle
        if t == wall:
            break
        if away:
            total['idle'] += 1
            away -= 1
        else:
            n = len(life)
            life.append(script[n] if n < len(script) else cycle[(n - len(script)) % len(cycle)])
    for cause in life:
        total[cause] += 1
    return total


def test_a_schedule_of_failures_is_what_ticking_through_it_gives():
    rng = np.random.default_rng(0)
    for case in range(60):
        wall = int(rng.integers(50, 900))
        every, save, commit, idle = (int(rng.integers(1, n)) for n in (60, 6, 20, 30))
        starting = dict(init=int(rng.integers(0, 9)), restore=int(rng.integers(0, 9)),
                        compile=int(rng.integers(0, 9)), data=int(rng.integers(0, 3)))
        failures = sorted({int(t) for t in rng.integers(1, wall, rng.integers(0, 7))})
        wanted = ticking(set(failures), wall, every, save, commit, idle, starting)
        told = goodput.simulate(failures, wall_s=wall, every_s=every, save_s=save, commit_s=commit,
                                idle_s=idle, **starting)
        assert told == wanted, (case, failures)
        assert sum(told.values()) == wall


def test_the_best_interval_is_the_best():
    def lost(every_s):
        hours = 3 * 3600.0
        rng = np.random.default_rng(1)
        failures = list(itertools.accumulate(rng.exponential(hours, 2_000)))
        told = goodput.simulate(failures, wall_s=failures[-1], every_s=every_s, save_s=2.0,
                                commit_s=0.0, idle_s=0.0)
        return told['save'] + told['lost']
    best = goodput.best_interval_s(2.0, 3 * 3600)
    assert best == pytest.approx(math.sqrt(2 * 2 * 10800))
    assert lost(best) < min(lost(best * 2), lost(best / 2))


# Measured (see BENCHMARKS.md): two processes of a toy on two busy CPU cores, one killed, both
# started again, the compiled step in the cache; the slowest of two such starts. The survivor was
# gone 7.1 s after the kill.
STARTING = dict(init=6.1, restore=1.4, compile=1.6, data=0.03)
CHECKPOINT = dict(save_s=0.24, commit_s=0.45)


def test_a_failure_every_three_hours_costs_less_than_a_hundredth():
    three_h = 3 * 3600.0
    rng = np.random.default_rng(3)
    failures = list(itertools.accumulate(rng.exponential(three_h, 3_000)))
    options = dict(every_s=goodput.best_interval_s(CHECKPOINT['save_s'], three_h), idle_s=10.0,
                   **CHECKPOINT, **STARTING)
    told = goodput.simulate(failures, wall_s=failures[-1], **options)
    print({k: round(100 * s / failures[-1], 3) for k, s in told.items()})
    assert goodput.share(told) >= 0.99
    calm = goodput.simulate([], wall_s=three_h, **options)
    assert goodput.share(calm) > goodput.share(told) and calm['lost'] == calm['idle'] == 0
    # Where a process falls silent without a broken connection, its heartbeats decide, 40 s later.
    late = goodput.simulate(failures, wall_s=failures[-1], **options | dict(idle_s=40.0))
    assert 0.985 < goodput.share(late) < 0.99


def test_the_forecast_takes_its_times_from_the_ledger():
    found = goodput.forecast(LEDGER, failure_every_s=10_800, idle_s=40.0)
    save_s = (3.0 - 1.0 - 1.5) / 1      # the other life has only its first
    assert found[1] == pytest.approx(math.sqrt(2 * save_s * 10_800))
    rng = np.random.default_rng(5)
    failures = list(itertools.accumulate(rng.exponential(10_800, 3_000)))
    told = goodput.simulate(failures, wall_s=failures[-1], every_s=found[1], save_s=save_s,
                            commit_s=1.0, idle_s=40.0, init=10.0, restore=2.0, compile=20.0,
                            data=3.0, save=1.0)
    assert found[0] == pytest.approx(goodput.share(told), abs=5e-4)
    slower = [e | dict(compile_s=900.0) if e['event'] == 'ready' else e for e in LEDGER]
    assert goodput.forecast(slower, failure_every_s=10_800, idle_s=40.0)[0] < found[0] - 0.07
    assert goodput.forecast(LEDGER[:3], failure_every_s=10_800, idle_s=40.0) is None

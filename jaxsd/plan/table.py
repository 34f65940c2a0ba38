# SPDX-License-Identifier: Apache-2.0
"""Plans in words: one as lines for a terminal, several as the page PLANS.md."""

import dataclasses
import json
import os
from typing import NamedTuple

from jaxsd import run
from jaxsd.config import ConfigError
from jaxsd.plan import estimate, targets

GIB = 2**30


class Row(NamedTuple):
    """A plan on the page. overrides: what its search found, as typed; `command` made it, at
    `commit`, with `compilers` (what compiled, 'jax 0.10.2, libtpu 0.0.41')."""

    config: str
    plan: estimate.Plan
    overrides: str
    command: str
    commit: str
    compilers: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.config, str(self.plan.topology), self.plan.stage


def write(rows: list[Row], out: str) -> None:
    """Writes the page of `rows` to `out`, with those that earlier commands put there: a row of the
    same config, stage and machine takes its place. The record beside it (`out` with the ending
    .json) keeps them. Raises ConfigError where that is none."""
    record = os.path.splitext(out)[0] + '.json'
    kept = {row.key: row for row in [*read(record), *rows]}
    found = [kept[key] for key in sorted(kept)]
    plain = [row._asdict() | dict(plan=dataclasses.asdict(row.plan)) for row in found]
    run.write_atomic(record, json.dumps(plain, indent=1) + '\n')
    run.write_atomic(out, page(found))


def read(record: str) -> list[Row]:
    """The rows that an earlier command kept; [] where there is no record yet."""
    try:
        with open(record, encoding='utf-8') as f:
            return [Row(**row | dict(plan=estimate.Plan.of(row['plan']))) for row in json.load(f)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise ConfigError(f'{record} is no record of plans ({e}); move it away') from None


def text(plan: estimate.Plan, price: float | None) -> str:
    """A plan as lines. price: of an hour of one chip, for the cost."""
    c, n = plan.compiled, plan.topology.size
    lines = [('stage', f'{plan.stage}: {plan.batch} rows of {plan.columns} columns, '
                       f'{plan.parameters / 1e6:,.1f} M parameters'),
             ('mesh', f'{mesh(plan)} on {n} devices of {plan.topology}, remat {plan.remat}'),
             ('fits', 'yes' if plan.fits else f'NO: {c.error}')]
    if c.peak:
        lines.append(('memory', f'{c.peak / GIB:.2f} GiB a device: {c.arguments / GIB:.2f} '
                                f'arguments, {c.temporaries / GIB:.2f} temporaries'
                                + (f', of {plan.topology.chip.hbm_gib:g}' if plan.topology.chip
                                   else '')))
    lines.append(('FLOPs', f'{plan.model_flops:.4g} a step, {plan.executed_flops:.4g} with '
                           'recomputation, causal attention counted as causal'
                           + (f'; {plan.unknown_loops} loops of unknown length counted once'
                              if plan.unknown_loops else '')))
    if c.peak:
        lines.append(('bytes', f'{(c.multiplied_bytes + c.other_bytes) / 1e9:.2f} GB of memory '
                               f'traffic a device and step, {c.other_bytes / 1e9:.2f} GB of it '
                               'outside matrix products'))
        lines += [('network', f'{kind}: {moved / 1e9:.3f} GB received by each device in {calls} '
                              f'calls{", overlapping" if overlaps else ""}')
                  for kind, moved, calls, overlaps, _ in c.collectives]
    if plan.fits and plan.step_s:
        parts = ', '.join(f'{name} {s:.3f}' for name, s in plan.parts.items())
        lines += [('step', f'{plan.step_s:.3f} s ({parts}), MFU {plan.mfu:.1%}'),
                  ('speed', f'{plan.positions_per_s:,.0f} positions/s, '
                            f'{plan.audio_hours_per_chip_day:,.1f} audio-hours per chip-day')]
        if price is not None:
            lines.append(('cost', f'{plan.cost(price):,.0f} for a million audio-hours at {price:g} '
                                  'an hour of one chip'))
    lines.append(('', estimate.assumptions(plan)))
    return '\n'.join(f'{name:8}{line}' for name, line in lines)


def mesh(plan: estimate.Plan) -> str:
    return ' '.join(f'{k}={n}' for k, n in plan.mesh.items()) or 'one device'


HEAD = ('config', 'machine', 'mesh', 'rows', 'remat', 'fits', 'GiB: arguments', 'temporaries',
        'together', 'PFLOPs', 'recomputed', 'network GB', 'step s', 'MFU', 'positions/s',
        'audio-hours per chip-day')


def page(rows: list[Row]) -> str:
    """PLANS.md of `rows`."""
    out = ['# Plans', '',
           'What training each config at its published size takes, from the programs that the '
           "machines' own compilers make of the real train step. No machine ran them: what fits, "
           'bytes and collectives are the compiler\'s, FLOPs are counted, times are estimates.', '',
           'Compiled at ' + '; at '.join(dict.fromkeys(
               f'{row.commit} by {row.compilers}' for row in rows))
           + '. `make plans` makes all of it; PLANS.json keeps of each row the command that made '
           'it.', '',
           'What lies in memory together is a bound: compilers pack temporaries tighter than they '
           'say, and more than a device has may fit.', '',
           '| ' + ' | '.join(HEAD) + ' |', '|' + '---|' * len(HEAD)]
    out += ['| ' + ' | '.join(_cells(row.config, row.plan)) + ' |' for row in rows]
    out += ['', '## As overrides', '',
            'What the search found, to paste after `--config`:', '']
    out += [f'- `{row.config}` on {row.plan.topology}: `{row.overrides}`' for row in rows
            if row.overrides]
    out += ['', '## Where the time goes', '',
            '| config | machine | ' + ' | '.join(PARTS) + ' | collectives: kind, GB, calls |',
            '|' + '---|' * (len(PARTS) + 3)]
    for row in rows:
        plan = row.plan
        if plan.fits and plan.step_s:
            moved = '; '.join(f'{kind} {n / 1e9:.2f}, {calls}{"" if overlaps else " (waited for)"}'
                              for kind, n, calls, overlaps, _ in plan.compiled.collectives)
            out.append(f'| {row.config} | {plan.topology} | ' + ' | '.join(
                f'{plan.parts[p]:.3f} s' for p in PARTS) + f' | {moved} |')
    out += ['', '## What is assumed', '']
    out += [f'- {line}' for line in dict.fromkeys(
        f'{row.plan.topology}: {estimate.assumptions(row.plan)}' for row in rows)]
    out += ['', targets.SOURCES]
    return '\n'.join(out) + '\n'


PARTS = ('products', 'memory', 'network', 'waiting')


def _cells(name: str, plan: estimate.Plan):
    c = plan.compiled
    yield from (f'{name}, {plan.stage}', str(plan.topology), mesh(plan), str(plan.batch),
                plan.remat)
    if not c.peak:
        yield from (c.error, *[''] * 3)
    else:
        yield 'yes' if plan.fits else c.error
        yield from (f'{x / GIB:.2f}' for x in (c.arguments, c.temporaries, c.peak))
    yield f'{plan.model_flops / 1e15:,.1f}'
    yield f'{plan.executed_flops / plan.model_flops - 1:.0%}'
    yield f'{sum(x[1] for x in c.collectives) / 1e9:.1f}' if c.peak else ''
    if plan.fits and plan.step_s:
        yield from (f'{plan.step_s:.2f}', f'{plan.mfu:.0%}', f'{plan.positions_per_s:,.0f}',
                    f'{plan.audio_hours_per_chip_day:,.0f}')
    else:
        yield from ('', '', '', '')

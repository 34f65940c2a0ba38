# SPDX-License-Identifier: Apache-2.0
"""The answer of an ablation in words: a table, and a section of a Markdown page with a figure."""

import os
import re

import numpy as np

from jaxsd import draw, verdict
from jaxsd import run as rundir


def _law_said(found: dict) -> str:
    if not found['exponents']:
        return ('No law: fewer than two budgets have a best size inside those tried (of three or '
                'more).')
    by = found['exponents']
    return (f'Best size: parameters grow as computation to the power {by["parameters"]:.2f}, '
            f'positions as {by["positions"]:.2f}, by {len(found["optima"])} budgets'
            + (', a line through two points: how sure it is cannot be said.'
               if len(found['optima']) == 2 else '.'))


def _with_interval(x: dict) -> str:
    if x.get('mean') is None:
        return '-'
    if x.get('low') is None:
        return f'{x["mean"]:.4g}'
    return f'{x["mean"]:.4g} [{x["low"]:.4g}, {x["high"]:.4g}]'


def tables(found: dict) -> list[tuple[list[str], list[list[str]]]]:
    """(heads, rows) of arms with their metrics, and of the comparisons if an order was expected."""
    labels = [m['label'] + (f' ({m["better"]} is better)' if m['better'] != 'shown' else '')
              for m in found['metrics']]
    rows = []
    for arm in found['arms']:
        done = [r for r in arm['runs'] if r['state'] == 'done']
        heard = [r['consumed']['audio_s'] / 3600 for r in done]
        rows.append([arm['name'], f'{len(done)} of {len(arm["runs"])}',
                     ' + '.join(str(s['steps']) for s in arm['stages']),
                     f'{np.mean(heard):.3g}' if heard else '-',
                     *(_with_interval(arm['estimates'].get(m['label'], {}))
                       for m in found['metrics'])])
    out = [(['arm', 'seeds', 'steps', 'hours heard', *labels], rows)]
    if found['comparisons']:
        out.append((['expected', 'metric', 'difference', 'verdict'], [
            [f'{c["better"]} > {c["worse"]}', c['metric'],
             _with_interval(c | dict(mean=c['difference'])), c['verdict']]
            for c in found['comparisons']]))
    elif rows := [[x['arm'], x['metric'], x['best'], _with_interval(x)]
                  for x in found['against_best']]:
        out.append((['arm', 'metric', 'best arm', 'difference to it'], rows))
    return out


def table(found: dict) -> str:
    """The answer as text in columns."""
    parts = [found['question']]
    for heads, rows in tables(found):
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        parts.append('\n'.join('  '.join(x.ljust(w) for x, w in zip(row, widths, strict=True))
                               .rstrip() for row in [heads, *rows]))
    parts += [_law_said(found['law'])] if found['law'] else []
    parts.append(f'Verdict: {found["verdict"]}.')
    return '\n\n'.join(parts)


def document(found: dict, path: str, command: str) -> None:
    """Puts the answer into the Markdown page `path`, in place of an older one to this question, and
    a figure beside the page."""
    picture = f'{os.path.splitext(path)[0]}-{found["name"]}.png'
    panels = [(m['label'], [(a['name'], *(a['estimates'][m['label']][k] for k in (
        'mean', 'low', 'high'))) for a in found['arms'] if m['label'] in a['estimates']])
        for m in found['metrics']]
    if panels := [p for p in panels if p[1]]:
        rundir.write_atomic(picture, draw.intervals_png(panels))
    head = f'## {found["question"]}'
    body = [head, '', f'**Verdict: {found["verdict"]}.** '
            + (f'Expected: {"; ".join(found["expected"])} ({found["source"]}). '
               if found['expected'] else '')
            + f'Base `{" ".join(found["base"])}`, {found["budget"]["said"]} '
            f'{found["budget"]["unit"]} for each arm and seed. {found["date"]}, commit '
            f'{found["revision"]}.', '', f'`{command}`', '']
    if panels:
        body += [f'![Means and intervals of the arms]({os.path.basename(picture)})', '']
    for heads, rows in tables(found):
        body += ['| ' + ' | '.join(x.replace('|', '\\|') for x in row) + ' |' for row in
                 [heads, ['---'] * len(heads), *rows]] + ['']
    body += [_law_said(found['law']), ''] if found['law'] else []
    body += [f'Limits: {found["limits"]}', ''] if found['limits'] else []
    text = ''
    if os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            text = f.read()
    opening, *sections = re.split(r'(?m)^(?=## )', text)
    opening = opening or f'# Ablations\n\n{verdict.RULE}\n\n'
    opening = re.sub(rf'(?m)^{re.escape(verdict.RULE[:20])}.*$', lambda _: verdict.RULE, opening)
    section, old = '\n'.join(body), [s.startswith(head + '\n') for s in sections]
    sections = [section if is_old else s for s, is_old in zip(sections, old, strict=True)]
    sections += [] if any(old) else [section]
    parts = [s.rstrip('\n') + '\n' for s in (opening, *sections)]
    rundir.write_atomic(path, '\n'.join(parts))

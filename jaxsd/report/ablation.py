# SPDX-License-Identifier: Apache-2.0
"""The card of an ablation: its answer, what differs between the arms, how they learned."""

import itertools
import pathlib
import statistics

import numpy as np

from jaxsd import draw
from jaxsd.report.elements import esc, figure, finite, inner, number, short, table_of
from jaxsd.report.files import as_dict, as_dicts, read_json, read_lines, read_run, stages_of


def read_ablation(folder: pathlib.Path) -> dict:
    """results.json of an ablation with what is no arm left out; {} where there is none."""
    found = read_json(folder / 'results.json', dict)
    arms = [{**arm, **{k: as_dict(arm.get(k)) for k in ('differences', 'estimates')},
             **{k: as_dicts(arm.get(k)) for k in ('runs', 'stages')}} for arm in as_dicts(
                 found.get('arms')) if isinstance(arm.get('name'), str)]
    return found | dict(arms=arms, **{k: as_dicts(found.get(k)) for k in (
        'metrics', 'comparisons', 'against_best')}) if arms else {}


def own(folder: pathlib.Path, run: dict) -> pathlib.Path | None:
    """The directory of one of an ablation's runs, if it lies inside."""
    path = folder / str(run.get('folder') or '').replace('\0', '')
    inside = path.resolve().is_relative_to(folder.resolve()) and path != folder
    return path if inside and path.is_dir() else None


def chosen(folder: pathlib.Path, found: dict) -> list[dict]:
    """The run of each arm with the first seed, under the arm's name."""
    return [read_run(path) | dict(name=f'{arm["name"]}, seed {run.get("seed")}', arm=arm['name'])
            for arm in found['arms'] for run in arm['runs'][:1] if (path := own(folder, run))]


def _colors(found: dict) -> list[str]:
    """A color for every arm; of several budgets an arm has the same, more than can be told apart
    are drawn in ink."""
    many = len(as_dict(found.get('budget')).get('amounts') or ()) > 1
    names = [a['name'].rpartition('.')[0] if many else a['name'] for a in found['arms']]
    of = dict(zip(dict.fromkeys(names), itertools.chain(draw.SERIES, itertools.repeat(draw.INK)),
                  strict=False))
    return [of[n] for n in names]


def _key(color: str) -> str:
    return (f'<span class="key" style="background:var(--s{draw.SERIES.index(color)})"></span>'
            if color in draw.SERIES else '')


def _between(x: dict, middle: str = 'mean') -> str:
    if not finite(x.get(middle)):
        return '–'
    bounds = [number(x.get(k)) for k in ('low', 'high')]
    return number(float(x[middle])) + (f' <small>{bounds[0]} to {bounds[1]}</small>'
                                        if finite(x.get('low')) else '')


def answer(folder: pathlib.Path, found: dict) -> str:
    """The card of an ablation: question, verdict, table, what differs, how the arms learned."""
    arms, colors, budget = found['arms'], _colors(found), as_dict(found.get('budget'))
    runs = [r for arm in arms for r in arm['runs']]
    done = [r for r in runs if r.get('state') == 'done']
    where = ' · '.join(f'<code>{esc(x)}</code>' for x in (
        folder, found.get('path'), found.get('date'), found.get('revision')) if x)
    out = [f'<h2>{esc(found.get("question", "A question"))}</h2>',
           f'<p class="soft small">{where}</p>',
           f'<p class="evidence"><b>{esc(str(found.get("verdict", "")).capitalize())}.</b> ']
    if isinstance(found.get('expected'), list) and found['expected']:
        out.append(f'Expected: {esc("; ".join(map(str, found["expected"])))} '
                   f'({esc(found.get("source", ""))}).')
    out.append('</p>')
    tiles = [('arms', number(len(arms))), ('runs done', f'{len(done)} of {len(runs)}'),
             (f'{esc(budget.get("unit", "budget"))}, each', esc(budget.get('said', '–')))]
    out.append('<div class="tiles">' + ''.join(
        f'<div class="tile"><b>{value}</b><span class="soft small">{name}</span></div>'
        for name, value in tiles) + '</div><h3>Answer</h3>')
    labels = [str(m.get('label')) for m in found['metrics']]
    better = [f' <small>{esc(m["better"])} is better</small>'
              if m.get('better') in ('higher', 'lower') else '' for m in found['metrics']]
    figures = []
    for label in labels:
        rows = [(arm['name'], color, *(x.get(k) if finite(x.get(k)) else None
                                       for k in ('mean', 'low', 'high')))
                for arm, color in zip(arms, colors, strict=True)
                for x in [as_dict(arm['estimates'].get(label))] if finite(x.get('mean'))]
        if rows:
            figures.append(figure(esc(label), draw.intervals(rows, label)))
    out.append(f'<div class="wide" style="margin-bottom:14px">{"".join(figures)}</div>')
    rows = [(_key(color) + esc(arm['name']),
             f'{sum(r.get("state") == "done" for r in arm["runs"])} of {len(arm["runs"])}',
             esc(' + '.join(number(s.get('steps')) for s in arm['stages'])), _heard(arm),
             *(_between(as_dict(arm['estimates'].get(label))) for label in labels))
            for arm, color in zip(arms, colors, strict=True)]
    out.append(table_of(('arm', 'seeds', 'steps', 'hours heard', *(esc(x) + b for x, b in zip(
        labels, better, strict=True))), rows, words=(0,)))
    if found['comparisons']:
        out.append('<h4>Against what was expected</h4>' + table_of(
            ('expected', 'by', 'difference', 'verdict'),
            [(esc(f'{c.get("better")} > {c.get("worse")}'), esc(c.get('metric')),
              _between(c, 'difference'), esc(c.get('verdict'))) for c in found['comparisons']],
            words=(0, 1, 3)))
    else:
        rows = [(*(esc(x.get(k)) for k in ('arm', 'metric', 'best')), _between(x))
                for x in found['against_best']]
        out.append('<h4>Against the best</h4>' + table_of(
            ('arm', 'by', 'best arm', 'difference to it'), rows, words=(0, 1, 2)) if rows else '')
    failed = [f'{arm["name"]}, seed {r.get("seed")} {r.get("state")}' for arm in arms
              for r in arm['runs'] if str(r.get('state', '')).startswith('failed')]
    out += [f'<p class="soft">Arm {esc(x)}</p>' for x in failed]
    out += [f'<p>{title}{esc(found[key])}</p>' for key, title in (
        ('limits', '<b>Limits.</b> '), ('rule', '<b>How it is decided.</b> ')) if found.get(key)]
    return (f'<article>{"".join(out)}{_law(found)}{_differences(found)}{_learned(folder, found)}'
            f'<p class="soft small">Below, each arm with its first seed.</p></article>')


def _heard(arm: dict) -> str:
    """Hours of sound that a run of the arm read, on average."""
    heard = [s for r in arm['runs'] if finite(s := as_dict(r.get('consumed')).get('audio_s'))]
    return number(sum(heard) / len(heard) / 3600) if heard else '–'


def _differences(found: dict) -> str:
    """What differs between the arms' configs: a line per option, a column per arm."""
    head, arms = '<h3>What differs</h3>', found['arms']
    keys = sorted({k for arm in arms for k in arm['differences']})
    base = {k: x[0] for arm in arms for k, x in arm['differences'].items()
            if isinstance(x, list) and len(x) == 2}
    if not keys:
        return head + '<p class="soft">Nothing: all arms have the config of the base.</p>'
    rows = []
    for k in keys[:80]:
        values = [x[1] if isinstance(x := arm['differences'].get(k), list) and len(x) == 2 else None
                  for arm in arms]
        rows.append((f'<code>{esc(k)}</code>', esc(short(base.get(k))[:120]),
                     *('' if v is None and k not in arm['differences'] else esc(short(v)[:120])
                       for v, arm in zip(values, arms, strict=True))))
    more = (f'<p class="soft">{len(keys) - 80} more options differ; results.json has all.</p>'
            if len(keys) > 80 else '')
    table = table_of(('option', 'base', *(esc(arm['name']) for arm in arms)), rows,
                   words=range(len(arms) + 2))
    orders = [arm['name'] for arm in arms if arm.get('same_order') is False]
    told = ('All arms read the records of every source in the same order, each as far as its '
            'budget goes.' if not orders else
            f'{", ".join(orders)}: other records than the base, or in another order.')
    details = f'<details><summary>{len(keys)} options</summary>{table}{more}</details>'
    return f'{head}<p>{esc(told)}</p>' + (table if len(keys) <= 12 else details)


def _law(found: dict) -> str:
    """Loss over size at each budget, and which size is best for it."""
    law = as_dict(found.get('law'))
    points = [p for p in as_dicts(law.get('points')) if all(
        finite(p.get(k)) and p[k] > 0 for k in ('flops', 'parameters', 'loss'))]
    if not points:
        return ''
    best = {o['flops']: o for o in as_dicts(law.get('optima')) if finite(o.get('flops'))}
    lines, rows = [], []
    for flops, color in zip(sorted({p['flops'] for p in points}), itertools.cycle(draw.SERIES),
                            strict=False):
        tried = sorted((p['parameters'], p['loss']) for p in points if p['flops'] == flops)
        optimum = best.get(flops, {})
        fit = optimum.get('fit')
        x, y = [], []
        if isinstance(fit, list) and len(fit) == 3 and all(map(finite, fit)):
            x = np.geomspace(tried[0][0], tried[-1][0], 60).tolist()
            y = np.polyval(fit, np.log(x)).tolist()
        lines.append((f'{flops:.3g}', color, x, y, tuple(zip(*tried, strict=True))))
        rows.append((_key(color) + esc(f'{flops:.3g}'), *(number(optimum.get(k)) for k in (
            'parameters', 'positions', 'loss'))))
    svg = draw.curves(lines, 'Loss over parameters', height=2.7, along='parameters', log=True)
    by = as_dict(law.get('exponents'))
    said = (f'The best size grows as computation to the power {number(by.get("parameters"))}, '
            f'what it reads to the power {number(by.get("positions"))}.' if by else
            'No law: fewer than two budgets have a best size inside those tried.')
    return ('<h3>Which size for which budget</h3><div class="pair">'
            + figure('Loss over size', svg, 'Circles: arms. Lines: parabolas in the logarithm.')
            + '<div>' + table_of(('FLOPs', 'best size', 'positions', 'loss'), rows, words=(0,))
            + f'<p>{said}</p></div></div>')


AXES = (('tokens', 'tokens, M', 1e-6), ('audio_hours', 'hours of sound', 1.0),
        ('flops', 'PFLOPs', 1e-15))


def _learned(folder: pathlib.Path, found: dict) -> str:
    """Training and held-out losses of the arms, the mean over seeds, over what they took."""
    lines = {arm['name']: [course(path, arm) for r in arm['runs'] if (path := own(folder, r))]
             for arm in found['arms']}
    held = [n for courses in lines.values() for course in courses for row in course
            for n in (row['held_out'] if isinstance(row.get('held_out'), dict) else ())]
    out = ['<h3>Learning</h3>']
    for title, get in (('Training loss', lambda r: r.get('loss')), *(
            (f'Held out: {n}', lambda r, n=n: inner(r, 'held_out', n))
            for n in list(dict.fromkeys(held))[:6])):
        figures, last = [], {}
        for key, name, scale in AXES:
            curves = []
            for arm, color in zip(found['arms'], _colors(found), strict=True):
                x, y = _mean_course(lines[arm['name']], lambda r, k=key: r.get(k), get)
                if x:
                    last[arm['name']] = (color, y[-1])
                    x, y = draw.thin([scale * v for v in x], y)
                    curves.append((arm['name'], color, x, y, ([], [])))
            if curves:
                figures.append(figure('', draw.curves(curves, f'{title} over {name}', along=name)))
        if figures:
            keys = ' '.join(f'<span class="one">{_key(color)}{esc(name)} {number(y)}</span>'
                            for name, (color, y) in last.items())
            out.append(f'<h4>{esc(title)}</h4><p class="small">{keys}</p>'
                       f'<div class="wide">{"".join(figures)}</div>')
    if len(out) == 1:
        return out[0] + '<p class="soft">No arm has written metrics yet.</p>'
    return ''.join(out) + ('<p class="small soft">Means over seeds, with the last value. Losses of '
                           'arms that are rewarded for other tokens cannot be compared.</p>')


def course(folder: pathlib.Path, arm: dict) -> list[dict]:
    """The metrics of all stages of a run, one after another, with what was taken so far."""
    out, before = [], {'tokens': 0.0, 'audio_hours': 0.0, 'flops': 0.0}
    flops = {str(s.get('name')): s['flops'] for s in arm['stages'] if finite(s.get('flops'))}
    for stage, rows in stages_of(read_lines(folder / 'metrics.jsonl')).items():
        now = dict(before)
        for row in rows:
            now |= {k: before[k] + row[k] for k in ('tokens', 'audio_hours') if finite(row.get(k))}
            if stage in flops:
                now['flops'] = before['flops'] + flops[stage] * row['step']
            out.append(row | now | dict(at=(stage, row['step'])))
        before = now
    return out


def _mean_course(courses: list[list[dict]], along, value) -> tuple[list[float], list[float]]:
    """(x, y) averaged over the runs of an arm at the steps that all of them have."""
    points = [{r['at']: (along(r), value(r)) for r in course
               if finite(along(r)) and finite(value(r))} for course in courses]
    points = [p for p in points if p]
    if not points:
        return [], []
    every = [at for at in points[0] if all(at in p for p in points)]
    x, y = ([statistics.fmean(p[at][i] for p in points) for at in every] for i in (0, 1))
    return (x, y) if max(x, default=0) > 0 else ([], [])

# SPDX-License-Identifier: Apache-2.0
"""One page that shows what runs and ablations did: curves, drawn grids, tables, the audio itself.

The page is a single HTML file. It asks nothing of any network, holds no script, follows the
reader's light or dark setting and fits a phone. It is written from what lies in the run directories
and from nothing else; whatever is missing, damaged or not finite is said in words. All text from
the runs is escaped, and how much is embedded is bounded.
"""

import ast
import base64
import datetime
import html
import io
import itertools
import json
import math
import os
import pathlib
import re
import statistics
import tempfile

import numpy as np

from jaxsd import draw, goodput

LINES = 1_000_000           # of a metrics file that are read
LINE_BYTES = 1 << 18
JSON_BYTES = 1 << 24
GRIDS, GRID_BYTES = 8, 3 << 20
CLIPS, CLIP_S = 16, 30.0
AUDIO_BYTES = 16 << 20      # of sound in one page
FAILURE_EVERY_S, NOTICED_S = 3 * 3600.0, 10.0       # of the forecast: how often, how soon seen


def write(workdirs: list[str], out_path: str, *, note: str = '') -> str:
    """Writes the page of the runs in `workdirs` to `out_path` and returns the path.

    note: a paragraph for the reader, above the runs. Raises ValueError for a directory that does
    not exist; pieces that are missing inside one are said on the page.
    """
    if not workdirs:
        raise ValueError('report: name at least one --workdir')
    for workdir in workdirs:
        if not os.path.isdir(workdir):
            raise ValueError(f'--workdir {workdir}: no such directory')
    folders = [pathlib.Path(workdir) for workdir in workdirs]
    asked = {folder: found for folder in folders if (found := _read_ablation(folder))}
    runs = [run for folder in folders for run in (
        _chosen(folder, asked[folder]) if folder in asked else [_read_run(folder)])]
    style = pathlib.Path(__file__).with_suffix('.css').read_text('utf-8')
    room = [AUDIO_BYTES]
    articles = [_answer(folder, found) for folder, found in asked.items()]
    articles += [_article(run, f'run-{i}', room) for i, run in enumerate(runs)]
    links = ''.join(f'<a href="#run-{i}">{_e(run["name"])}</a>' for i, run in enumerate(runs))
    when = datetime.datetime.now().strftime('%Y-%m-%d %H:%M')
    page = f'''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<title>Spoken language models: what the runs did</title><style>{style}</style></head><body>
<header><h1>Spoken language models: what the runs did</h1>
<p class="soft">Written {when} from {len(runs)} run director{"y" if len(runs) == 1 else "ies"}.</p>
{f"<p>{_e(note)}</p>" if note else ""}
<nav aria-label="Runs">{links if len(runs) > 1 else ""}</nav></header>
<main>{"".join(articles)}</main>
<footer class="small">Made by jaxsd. This page holds everything it shows and loads nothing.</footer>
</body></html>
'''
    _write_whole(out_path, page.encode('utf-8', 'replace'))
    return out_path


def curve_png(workdir: str, out_path: str, *, stage: str = '') -> str:
    """Draws the loss and its terms over the steps of `stage` (default: the last) as a picture.

    Raises ValueError when the run has no such curve.
    """
    stages = _stages(_read_lines(pathlib.Path(workdir) / 'metrics.jsonl'))
    stage = stage or next(reversed(stages), '')
    if stage not in stages:
        raise ValueError(f'{workdir} has no metrics of stage {stage!r} (there are: '
                         f'{", ".join(stages) or "none"})')
    title = f'{pathlib.Path(workdir).resolve().name}: stage {stage}'
    _write_whole(out_path, draw.curves_png(_loss_curves(stages[stage]), title))
    return out_path


def _write_whole(path: str, content: bytes):
    """Writes to a temporary name beside `path`, then renames: the page is there whole or not."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=folder, prefix='.report-')
    try:
        with os.fdopen(handle, 'wb') as f:
            f.write(content)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException as e:
        os.unlink(partial)
        if isinstance(e, OSError):
            raise OSError(e.errno, f'{e.strerror} while writing', path) from None
        raise


# Reading. Nothing below trusts a file: it may be missing, cut short, huge, or of another shape.

def _read_json(path: pathlib.Path, kind: type):
    """The JSON in `path` if it is a `kind`, else an empty one."""
    try:
        with open(path, 'rb') as f:
            found = json.loads(f.read(JSON_BYTES))
    except (OSError, ValueError, RecursionError):
        return kind()
    return found if isinstance(found, kind) else kind()


def _read_lines(path: pathlib.Path) -> list[dict]:
    """The whole lines of a JSON-lines file; a line that a crash cut short is left out."""
    out = []
    try:
        with open(path, 'rb') as f:
            for line in itertools.islice(iter(lambda: f.readline(LINE_BYTES), b''), LINES):
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(entry, dict):
                    out.append(entry)
    except OSError:
        return []
    return out


def _stages(lines: list[dict]) -> dict[str, list[dict]]:
    """Metrics by stage, sorted by step; lines of one step (training, held out) become one."""
    out: dict[str, dict[int, dict]] = {}
    for line in lines:
        if isinstance(line.get('step'), int):
            steps = out.setdefault(str(line.get('stage', '')), {})
            steps[line['step']] = steps.get(line['step'], {}) | line
    return {stage: [rows[step] for step in sorted(rows)] for stage, rows in out.items()}


def _read_run(folder: pathlib.Path) -> dict:
    run = _read_json(folder / 'config.json', dict)
    ledger = _read_lines(folder / 'ledger.jsonl')
    file = next((e['file'] for e in [run, *reversed(ledger)] if isinstance(e.get('file'), str)), '')
    config = run.get('config') if isinstance(run.get('config'), dict) else {}
    file = file or _namesake(folder, config)
    return {'folder': folder, 'name': folder.resolve().name, 'file': file,
            'doc': str(run.get('doc') or ast.get_docstring(_tree(file)) or ''),  # the paper card
            'fingerprint': run.get('fingerprint', ''),
            'config': config, 'ledger': ledger,
            'stages': _stages(_read_lines(folder / 'metrics.jsonl')),
            'evaluation': [e for e in _read_json(folder / 'evaluation.json', list)
                           if isinstance(e, dict)]}


def _tree(spec: str) -> ast.Module:
    """The syntax of a config file, which is parsed and never executed; empty if there is none."""
    path = spec.partition(':')[0]
    try:
        if path.endswith('.py') and os.path.getsize(path) <= JSON_BYTES:
            return ast.parse(pathlib.Path(path).read_text('utf-8'))
    except (OSError, SyntaxError, ValueError, RecursionError):
        pass
    return ast.parse('')


def _namesake(folder: pathlib.Path, config: dict) -> str:
    """configs/NAME.py for a run in folder NAME, if it names all mechanisms of `config`; or ''."""
    spec = os.path.join('configs', folder.resolve().name + '.py')
    named = {str(n.value) for n in ast.walk(_tree(spec)) if isinstance(n, ast.Constant)}
    used = {str(config[slot].get('name')) for slot in ('layout', 'frontend', 'head', 'objective')
            if isinstance(config.get(slot), dict)}
    return spec if used and used <= named else ''


# Words and numbers.

def _e(text) -> str:
    return html.escape(str(text))


def _finite(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _number(x) -> str:
    """A number as people write it, four digits that count; a dash where there is none."""
    if isinstance(x, float) and not math.isfinite(x):
        return 'not finite'
    if not _finite(x):
        return '–'
    if isinstance(x, int) or (abs(x) >= 1e4 and abs(x) < 1e15):
        return f'{x:,.0f}' if abs(x) < 1e9 else f'{x:.3g}'.replace('e+0', 'e').replace('e+', 'e')
    return f'{x:.4g}'


def _unit(x: float, unit: str) -> str:
    return f'{x:.3g} <small>{unit}</small>' if abs(x) < 1e3 else f'{x:,.0f} <small>{unit}</small>'


def _short(value, depth: int = 0) -> str:
    """A value of JSON on one line: `rank 8, scale 2`."""
    if isinstance(value, dict):
        inside = ', '.join(f'{k} {_short(v, depth + 1)}' for k, v in value.items())
        return f'({inside})' if depth else inside
    if isinstance(value, list):
        inside = ', '.join(_short(v, depth + 1) for v in value)
        return f'[{inside}]' if depth else inside
    if isinstance(value, bool) or value is None:
        return {True: 'yes', False: 'no', None: 'none'}[value]
    return _number(value) if isinstance(value, float) else str(value)


def _table(heads, rows, *, words=()) -> str:
    """`rows` of already escaped cells; the columns in `words` hold text, the others numbers."""
    kind = ['w' if i in words else 'n' for i in range(len(heads))]
    head = ''.join(f'<th class="{k}">{h}</th>' for k, h in zip(kind, heads, strict=True))
    body = ''.join('<tr>' + ''.join(f'<td class="{k}">{c}</td>'
                                    for k, c in zip(kind, row, strict=True)) + '</tr>'
                   for row in rows)
    return (f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
            f'<tbody>{body}</tbody></table></div>')


def _data_uri(content: bytes, kind: str) -> str:
    return f'data:{kind};base64,{base64.b64encode(content).decode()}'


# Drawing.

def _xy(rows: list[dict], value) -> tuple[list[float], list[float]]:
    pairs = [(row['step'], y) for row in rows if _finite(y := value(row))]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _inner(row: dict, group: str, name: str):
    return row[group].get(name) if isinstance(row.get(group), dict) else None


def _names(rows: list[dict], group: str) -> list[str]:
    return sorted({str(k) for row in rows if isinstance(row.get(group), dict) for k in row[group]})


def _curve(rows, name: str, color: str, group: str, key: str):
    """(name, color, x, y, held-out points): `key` of `group` in every line, '' for the line itself.

    Held-out values of the same name as a training value belong to its curve.
    """
    def value(row):
        return _inner(row, group, key) if group else row.get(key)
    held = ([], []) if group == 'held_out' else _xy(rows, lambda r: _inner(r, 'held_out', key))
    return (name, color, *draw.thin(*_xy(rows, value)), held)


def _loss_curves(rows):
    """The total and its terms, the total first; a single term is the total and left out."""
    terms = _names(rows, 'terms')
    return [_curve(rows, 'loss', draw.INK, '', 'loss')] + [
        _curve(rows, term, color, 'terms', term)
        for term, color in zip(terms if len(terms) > 1 else (), draw.SERIES, strict=False)]


def _figure(title: str, svg: str, caption: str = '') -> str:
    below = f'<figcaption>{caption}</figcaption>' if caption else ''
    return f'<figure><h4>{title}</h4>{svg}{below}</figure>'


# The parts of a run's card, in reading order.

def _read_ablation(folder: pathlib.Path) -> dict:
    """results.json of an ablation with what is no arm left out; {} where there is none."""
    found = _read_json(folder / 'results.json', dict)
    arms = [{**arm, **{k: _dict(arm.get(k)) for k in ('differences', 'estimates')},
             **{k: _dicts(arm.get(k)) for k in ('runs', 'stages')}} for arm in _dicts(
                 found.get('arms')) if isinstance(arm.get('name'), str)]
    return found | dict(arms=arms, **{k: _dicts(found.get(k)) for k in (
        'metrics', 'comparisons')}) if arms else {}


def _dict(x) -> dict:
    return x if isinstance(x, dict) else {}


def _dicts(x) -> list[dict]:
    return [e for e in x if isinstance(e, dict)] if isinstance(x, list) else []


def _own(folder: pathlib.Path, run: dict) -> pathlib.Path | None:
    """The directory of one of an ablation's runs, if it lies inside."""
    path = folder / str(run.get('folder') or '')
    inside = path.resolve().is_relative_to(folder.resolve()) and path != folder
    return path if inside and path.is_dir() else None


def _chosen(folder: pathlib.Path, found: dict) -> list[dict]:
    """The run of each arm with the first seed, under the arm's name."""
    return [_read_run(path) | dict(name=f'{arm["name"]}, seed {run.get("seed")}', arm=arm['name'])
            for arm in found['arms'] for run in arm['runs'][:1] if (path := _own(folder, run))]


def _colors(arms: list) -> list[str]:
    return [draw.SERIES[i % len(draw.SERIES)] for i in range(len(arms))]


def _key(color: str) -> str:
    return (f'<span class="key" style="background:var(--s{draw.SERIES.index(color)})"></span>'
            if color in draw.SERIES else '')


def _between(x: dict, middle: str = 'mean') -> str:
    if not _finite(x.get(middle)):
        return '–'
    bounds = [_number(x.get(k)) for k in ('low', 'high')]
    return _number(float(x[middle])) + (f' <small>{bounds[0]} to {bounds[1]}</small>'
                                        if _finite(x.get('low')) else '')


def _answer(folder: pathlib.Path, found: dict) -> str:
    """The card of an ablation: question, verdict, table, what differs, how the arms learned."""
    arms, colors, budget = found['arms'], _colors(found['arms']), _dict(found.get('budget'))
    runs = [r for arm in arms for r in arm['runs']]
    done = [r for r in runs if r.get('state') == 'done']
    where = ' · '.join(f'<code>{_e(x)}</code>' for x in (
        folder, found.get('path'), found.get('date'), found.get('revision')) if x)
    out = [f'<h2>{_e(found.get("question", "A question"))}</h2>',
           f'<p class="soft small">{where}</p>',
           f'<p class="evidence"><b>{_e(str(found.get("verdict", "")).capitalize())}.</b> ']
    if isinstance(found.get('expected'), list) and found['expected']:
        out.append(f'Expected: {_e("; ".join(map(str, found["expected"])))} '
                   f'({_e(found.get("source", ""))}).')
    out.append('</p>')
    tiles = [('arms', _number(len(arms))), ('runs done', f'{len(done)} of {len(runs)}'),
             (f'{_e(budget.get("unit", "budget"))}, each', _e(budget.get('said', '–')))]
    out.append('<div class="tiles">' + ''.join(
        f'<div class="tile"><b>{value}</b><span class="soft small">{name}</span></div>'
        for name, value in tiles) + '</div><h3>Answer</h3>')
    labels = [str(m.get('label')) for m in found['metrics']]
    better = [f' <small>{_e(m["better"])} is better</small>'
              if m.get('better') in ('higher', 'lower') else '' for m in found['metrics']]
    figures = []
    for label in labels:
        rows = [(arm['name'], color, *(x.get(k) if _finite(x.get(k)) else None
                                       for k in ('mean', 'low', 'high')))
                for arm, color in zip(arms, colors, strict=True)
                for x in [_dict(arm['estimates'].get(label))] if _finite(x.get('mean'))]
        if rows:
            figures.append(_figure(_e(label), draw.intervals(rows, label)))
    out.append(f'<div class="wide" style="margin-bottom:14px">{"".join(figures)}</div>')
    rows = [(_key(color) + _e(arm['name']),
             f'{sum(r.get("state") == "done" for r in arm["runs"])} of {len(arm["runs"])}',
             _e(' + '.join(_number(s.get('steps')) for s in arm['stages'])),
             *(_between(_dict(arm['estimates'].get(label))) for label in labels))
            for arm, color in zip(arms, colors, strict=True)]
    out.append(_table(('arm', 'seeds', 'steps', *(_e(x) + b for x, b in zip(
        labels, better, strict=True))), rows, words=(0,)))
    if found['comparisons']:
        out.append('<h4>Against what was expected</h4>' + _table(
            ('expected', 'by', 'difference', 'verdict'),
            [(_e(f'{c.get("better")} > {c.get("worse")}'), _e(c.get('metric')),
              _between(c, 'difference'), _e(c.get('verdict'))) for c in found['comparisons']],
            words=(0, 1, 3)))
    failed = [f'{arm["name"]}, seed {r.get("seed")} {r.get("state")}' for arm in arms
              for r in arm['runs'] if str(r.get('state', '')).startswith('failed')]
    out += [f'<p class="soft">Arm {_e(x)}</p>' for x in failed]
    out += [f'<p>{title}{_e(found[key])}</p>' for key, title in (
        ('limits', '<b>Limits.</b> '), ('rule', '<b>How it is decided.</b> ')) if found.get(key)]
    return (f'<article>{"".join(out)}{_law(found)}{_differences(found)}{_learned(folder, found)}'
            f'<p class="soft small">Below, each arm with its first seed.</p></article>')


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
        rows.append((f'<code>{_e(k)}</code>', _e(_short(base.get(k))[:120]),
                     *('' if v is None and k not in arm['differences'] else _e(_short(v)[:120])
                       for v, arm in zip(values, arms, strict=True))))
    more = (f'<p class="soft">{len(keys) - 80} more options differ; results.json has all.</p>'
            if len(keys) > 80 else '')
    table = _table(('option', 'base', *(_e(arm['name']) for arm in arms)), rows,
                   words=range(len(arms) + 2))
    orders = [arm['name'] for arm in arms if arm.get('same_order') is False]
    told = ('All arms read the same records in the same order.' if not orders else
            f'{", ".join(orders)}: other records than the base, or in another order.')
    details = f'<details><summary>{len(keys)} options</summary>{table}{more}</details>'
    return f'{head}<p>{_e(told)}</p>' + (table if len(keys) <= 12 else details)


def _law(found: dict) -> str:
    """Loss over size at each budget, and which size is best for it."""
    law = _dict(found.get('law'))
    points = [p for p in _dicts(law.get('points')) if all(
        _finite(p.get(k)) and p[k] > 0 for k in ('flops', 'parameters', 'loss'))]
    if not points:
        return ''
    best = {o['flops']: o for o in _dicts(law.get('optima')) if _finite(o.get('flops'))}
    lines, rows = [], []
    for flops, color in zip(sorted({p['flops'] for p in points}), itertools.cycle(draw.SERIES),
                            strict=False):
        tried = sorted((p['parameters'], p['loss']) for p in points if p['flops'] == flops)
        optimum = best.get(flops, {})
        fit = optimum.get('fit')
        x, y = [], []
        if isinstance(fit, list) and len(fit) == 3 and all(map(_finite, fit)):
            x = np.geomspace(tried[0][0], tried[-1][0], 60).tolist()
            y = np.polyval(fit, np.log(x)).tolist()
        lines.append((f'{flops:.3g}', color, x, y, tuple(zip(*tried, strict=True))))
        rows.append((_key(color) + _e(f'{flops:.3g}'), *(_number(optimum.get(k)) for k in (
            'parameters', 'positions', 'loss'))))
    svg = draw.curves(lines, 'Loss over parameters', height=2.7, along='parameters', log=True)
    by = _dict(law.get('exponents'))
    said = (f'The best size grows as computation to the power {_number(by.get("parameters"))}, '
            f'what it reads to the power {_number(by.get("positions"))}.' if by else
            'No law: fewer than two budgets have a best size inside those tried.')
    return ('<h3>Which size for which budget</h3><div class="pair">'
            + _figure('Loss over size', svg, 'Circles: arms. Lines: parabolas in the logarithm.')
            + '<div>' + _table(('FLOPs', 'best size', 'positions', 'loss'), rows, words=(0,))
            + f'<p>{said}</p></div></div>')


AXES = (('tokens', 'tokens, M', 1e-6), ('audio_hours', 'hours of sound', 1.0),
        ('flops', 'PFLOPs', 1e-15))


def _learned(folder: pathlib.Path, found: dict) -> str:
    """Training and held-out losses of the arms, the mean over seeds, over what they took."""
    lines = {arm['name']: [_course(path, arm) for r in arm['runs'] if (path := _own(folder, r))]
             for arm in found['arms']}
    held = [n for courses in lines.values() for course in courses for row in course
            for n in (row['held_out'] if isinstance(row.get('held_out'), dict) else ())]
    out = ['<h3>Learning</h3>']
    for title, get in (('Training loss', lambda r: r.get('loss')), *(
            (f'Held out: {n}', lambda r, n=n: _inner(r, 'held_out', n))
            for n in list(dict.fromkeys(held))[:6])):
        figures, last = [], {}
        for key, name, scale in AXES:
            curves = []
            for arm, color in zip(found['arms'], _colors(found['arms']), strict=True):
                x, y = _mean_course(lines[arm['name']], lambda r, k=key: r.get(k), get)
                if x:
                    last[arm['name']] = (color, y[-1])
                    x, y = draw.thin([scale * v for v in x], y)
                    curves.append((arm['name'], color, x, y, ([], [])))
            if curves:
                figures.append(_figure('', draw.curves(curves, f'{title} over {name}', along=name)))
        if figures:
            keys = ' '.join(f'<span class="one">{_key(color)}{_e(name)} {_number(y)}</span>'
                            for name, (color, y) in last.items())
            out.append(f'<h4>{_e(title)}</h4><p class="small">{keys}</p>'
                       f'<div class="wide">{"".join(figures)}</div>')
    if len(out) == 1:
        return out[0] + '<p class="soft">No arm has written metrics yet.</p>'
    return ''.join(out) + ('<p class="small soft">Means over seeds, with the last value. Losses of '
                           'arms that are rewarded for other tokens cannot be compared.</p>')


def _course(folder: pathlib.Path, arm: dict) -> list[dict]:
    """The metrics of all stages of a run, one after another, with what was taken so far."""
    out, before = [], {'tokens': 0.0, 'audio_hours': 0.0, 'flops': 0.0}
    flops = {str(s.get('name')): s['flops'] for s in arm['stages'] if _finite(s.get('flops'))}
    for stage, rows in _stages(_read_lines(folder / 'metrics.jsonl')).items():
        now = dict(before)
        for row in rows:
            now |= {k: before[k] + row[k] for k in ('tokens', 'audio_hours') if _finite(row.get(k))}
            if stage in flops:
                now['flops'] = before['flops'] + flops[stage] * row['step']
            out.append(row | now | dict(at=(stage, row['step'])))
        before = now
    return out


def _mean_course(courses: list[list[dict]], along, value) -> tuple[list[float], list[float]]:
    """(x, y) averaged over the runs of an arm at the steps that all of them have."""
    points = [{r['at']: (along(r), value(r)) for r in course
               if _finite(along(r)) and _finite(value(r))} for course in courses]
    points = [p for p in points if p]
    if not points:
        return [], []
    every = [at for at in points[0] if all(at in p for p in points)]
    x, y = ([statistics.fmean(p[at][i] for p in points) for at in every] for i in (0, 1))
    return (x, y) if max(x, default=0) > 0 else ([], [])


def _article(run: dict, anchor: str, room: list[int]) -> str:
    parts = [_card(run), _tiles(run), _grids(run), '<h3>Learning</h3>']
    parts += [_learning(stage, rows) for stage, rows in run['stages'].items()]
    if not run['stages']:
        parts.append('<p class="soft">No metrics were written: nothing has been trained here.</p>')
    parts += [_evaluation(run), _listen(run, room), _ledger(run), _time(run), _config(run),
              _exports(run)]
    return f'<article id="{anchor}">{"".join(parts)}</article>'


def _card(run: dict) -> str:
    text = run['doc'].strip()
    title, _, rest = text.partition('\n')
    evidence = re.search(r'^\s*Evidence\s+(.*?)(?:\n\s*\n|\Z)', rest, re.DOTALL | re.MULTILINE)
    title = f'{run["name"]}: {title}' if title and 'arm' in run else title or run['name']
    out = [f'<h2>{_e(title)}</h2>']
    where = ' · '.join(f'{name}<code>{_e(run[key])}</code>' for name, key in
                       (('', 'folder'), ('', 'file'), ('fingerprint ', 'fingerprint')) if run[key])
    out.append(f'<p class="soft small">{where}</p>')
    paragraph = rest.strip().partition('\n\n')[0]
    if paragraph and not paragraph.lstrip().startswith('Evidence'):
        out.append(f'<p>{_e(paragraph)}</p>')
    if evidence:
        words = ' '.join(evidence[1].split())
        out.append(f'<p class="evidence"><b>Evidence.</b> {_e(words)}</p>')
    if not text:
        out.append('<p class="soft">The config file that describes this run was not found.</p>')
    return ''.join(out)


def _tiles(run: dict) -> str:
    if not run['stages']:
        return ''
    rows = list(run['stages'].values())
    last = rows[-1][-1]
    tiles = [('final loss', _number(last.get('loss'))),
             (f'step of {_e(next(reversed(run["stages"])) or "training")}', _number(last['step']))]
    if _finite(last.get('tokens')):
        many = last['tokens'] >= 1e6        # a tile is too narrow for more digits
        tiles.append(('tokens trained on', _unit(last['tokens'] / 1e6, 'M') if many
                      else _number(last['tokens'])))
    if _finite(last.get('audio_hours')):
        tiles.append(('audio trained on', _unit(last['audio_hours'], 'h')))
    for key, name, scale, unit in (('audio_hours_per_h', 'real time, training', 1, '×'),
                                   ('step_s', 'time per step', 1, 's'),
                                   ('data_wait_fraction', 'waiting for data', 100, '%'),
                                   ('dispatch_fraction', 'starting steps', 100, '%')):
        found = [r[key] for stage in rows for r in stage if _finite(r.get(key))]
        if found:
            tiles.append((name, _unit(scale * statistics.median(found), unit)))
    if seconds := _seconds(run):
        tiles.append(('goodput', _unit(100 * goodput.share(seconds), '%')))
    skipped = sum(stage[-1]['skipped_steps'] for stage in rows
                  if _finite(stage[-1].get('skipped_steps')))
    if skipped:
        tiles.append(('steps skipped, not finite', _number(skipped)))
    return ('<div class="tiles">' + ''.join(
        f'<div class="tile"><b>{value}</b><span class="soft small">{name}</span></div>'
        for name, value in tiles) + '</div>')


def _panel(title: str, curves, caption: str, note: str = '') -> str:
    """A drawing of `curves` beside the table that is its legend; '' if they hold no points."""
    curves = [c for c in curves if c[2] or c[4][0]]
    if not curves:
        return ''
    keys = {draw.INK: 'var(--ink)'} | {c: f'var(--s{i})' for i, c in enumerate(draw.SERIES)}
    held = any(c[4][0] for c in curves)
    rows = []
    for name, color, _, y, (_, later) in curves:
        mark = f'<span class="key" style="background:{keys[color]}"></span>' if color else ''
        rows.append((mark + _e(name), _number(y[0] if y else None), _number(y[-1] if y else None),
                     *([_number(later[-1] if later else None)] if held else [])))
    table = _table(('', 'first', 'last', *(['held out'] if held else [])), rows[:60], words=(0,))
    svg = draw.curves([c for c in curves if c[1]], f'{title}: {caption}', height=2.7)
    caption += ' Circles: held-out records.' if held else ''
    return f'<div class="pair">{_figure(_e(title), svg, _e(caption))}<div>{table}{note}</div></div>'


def _colored(rows, group: str, keys: list[str], prefix: str = ''):
    """Curves of `keys`, as many in color as can be told apart; the others only have numbers."""
    colors = itertools.chain(draw.SERIES, itertools.repeat(''))
    return [_curve(rows, key.removeprefix(prefix), color, group, key)
            for key, color in zip(keys, colors, strict=False)]


def _learning(stage: str, rows: list[dict]) -> str:
    name = f'stage {stage}' if stage else 'training'
    head = f'<h4>{_e(name.capitalize())}</h4>'
    bad = sum(1 for r in rows if 'loss' in r and not _finite(r['loss']))
    note = (f'<p class="soft small">{_number(bad)} of {_number(len(rows))} lines have a loss that '
            'is not a finite number; they are left out of the curve.</p>') if bad else ''
    out = _panel('Loss', _loss_curves(rows), f'Training batches, {name}.', note)
    if not out:
        out = f'<p class="soft">The losses of {_e(name)} hold no finite numbers.</p>'
    drawn = {'loss', *_names(rows, 'terms')}
    held = [n for n in _names(rows, 'held_out') if n not in drawn]
    losses = [n for n in held if '/loss/' in n or '/' not in n]
    out += _panel('Held out', _colored(rows, 'held_out', losses), f'Records kept apart, {name}.')
    others = [n for n in held if n not in losses]
    for task in dict.fromkeys(n.partition('/')[0] for n in others):
        keys = [n for n in others if n.partition('/')[0] == task]
        unit = keys[0].partition(' ')[2]        # an axis has one; the others are numbers only
        drawn_keys = [n for n in keys if n.partition(' ')[2] == unit]
        out += _panel(task, [
            *_colored(rows, 'held_out', drawn_keys, f'{task}/'),
            *(_curve(rows, n.removeprefix(f'{task}/'), '', 'held_out', n) for n in keys
              if n not in drawn_keys)], f'{unit or "Figures"} on records kept apart, {name}.')
    more = ''
    names = _names(rows, 'metrics')
    for kind in dict.fromkeys(n.partition('/')[0] for n in names):
        keys = [n for n in names if n.partition('/')[0] == kind]
        more += _panel(kind, _colored(rows, 'metrics', keys, f'{kind}/'), f'{name}.'.capitalize())
    small = []
    for key, title, zero, scale in (
            ('lr', 'Learning rate', False, 1), ('grad_norm', 'Gradient norm', False, 1),
            ('tokens_per_s', 'Tokens per second', True, 1),
            ('audio_hours_per_h', 'Audio hours per hour', True, 1),
            ('data_wait_fraction', 'Waiting for data, %', True, 100)):
        x, y = draw.thin(*_xy(rows, lambda r, k=key: r.get(k)))
        if x:
            line = (key, draw.SERIES[0], x, [scale * v for v in y], ([], []))
            small.append(_figure(title, draw.curves([line], f'{title}, {name}', zero=zero)))
    more += f'<div class="wide">{"".join(small)}</div>' if small else ''
    rest = ('<details><summary>By stream; learning rate, gradients and speed</summary>'
            f'{more}</details>') if more else ''
    return head + out + rest


def _evaluation(run: dict) -> str:
    out = ['<h3>Evaluation</h3>']
    if not run['evaluation']:
        return out[0] + '<p class="soft">No evaluation was written for this run.</p>'
    tasks: dict[str, list[dict]] = {}
    for entry in run['evaluation']:
        tasks.setdefault(str(entry.get('task', 'unnamed')), []).append(entry)
    for task, entries in tasks.items():
        names = []
        for entry in entries:
            metrics = entry.get('metrics')
            names += [k for k in (metrics if isinstance(metrics, dict) else ()) if k not in names]
        heads = ['split', 'stage', 'step', 'items', *map(_e, names)]
        rows = [[_e(e.get('split') or '–'), _e(e.get('stage') or '–'), _number(e.get('step')),
                 _number(e.get('items')), *(_number(_inner(e, 'metrics', n)) for n in names)]
                for e in entries]
        if len(names) > 6 and len(entries) <= 3:    # tall reads better than wide
            labels = [' '.join(filter(None, (str(e.get('split') or ''), str(e.get('stage') or ''))))
                      for e in entries]
            heads = ['', *map(_e, labels)]
            rows = [[_e(n), *(_number(_inner(e, 'metrics', n)) for e in entries)] for n in names]
            rows.append(['items', *(_number(e.get('items')) for e in entries)])
            rows.append(['step', *(_number(e.get('step')) for e in entries)])
        out.append(f'<h4>{_e(task)}</h4>'
                   + _table(heads, rows, words=(0, 1) if heads[0] else (0,)))
        notes = dict.fromkeys(str(e['note']) for e in entries if e.get('note'))
        out += [f'<p class="small soft">{_e(note)}</p>' for note in notes]
        out += [_histogram(e) for e in entries if isinstance(e.get('histogram'), dict)]
    return ''.join(out)


def _histogram(entry: dict) -> str:
    name = str(entry['histogram'].get('name', 'values'))
    given = entry['histogram'].get('values')
    given = given if isinstance(given, list) else ()
    values = np.asarray([v for v in given if _finite(v)], float)
    if not values.size:
        return f'<p class="soft">The histogram of {_e(name)} holds no finite values.</p>'
    quarter, middle, most = np.percentile(values, [25, 50, 95])
    svg = draw.histogram(values, name)
    return '<div class="wide" style="margin-top:14px">' + _figure(
        f'{_e(name)}, {_e(entry.get("split", ""))}', svg,
        f'{_number(int(values.size))} items; quartile {_number(float(quarter))}, median '
        f'{_number(float(middle))}, 95th percentile {_number(float(most))}.') + '</div>'


def _grids(run: dict) -> str:
    out, folder = ['<h3>What the model reads</h3>'], run['folder'] / 'grids'
    found = sorted(p for p in folder.glob('*') if p.suffix in ('.png', '.txt') and p.is_file())
    if not found:
        return out[0] + '<p class="soft">No grid was drawn for this run.</p>'
    for path in found[:GRIDS]:
        name = _e(path.stem.replace('_', ' ').replace('-', ' '))
        if path.stat().st_size > GRID_BYTES:
            out.append(f'<p class="soft">{_e(path.name)} is too large to show here.</p>')
            continue
        content = path.read_bytes()
        if path.suffix == '.txt':
            shown = f'<pre>{_e(content.decode("utf-8", "replace"))}</pre>'
        elif content.startswith(b'\x89PNG\r\n\x1a\n'):
            shown = f'<img src="{_data_uri(content, "image/png")}" alt="Drawn grid: {name}">'
        else:
            out.append(f'<p class="soft">{_e(path.name)} is not a PNG picture.</p>')
            continue
        out.append(f'<figure><h4>{name}</h4><div class="scroll grid" tabindex="0">{shown}</div>'
                   '</figure>')
    if len(found) > GRIDS:
        out.append(f'<p class="soft">{len(found) - GRIDS} more lie in {_e(folder)}.</p>')
    return ''.join(out)


def _listen(run: dict, room: list[int]) -> str:
    folder = run['folder'] / 'samples'
    listed = [e for e in _read_json(folder / 'samples.json', list)
              if isinstance(e, dict) and isinstance(e.get('file'), str)]
    known = {e['file'] for e in listed}
    listed += [{'file': p.name, 'title': p.stem} for p in sorted(folder.glob('*.wav'))
               if p.name not in known]
    if not listed:
        return '<h3>Listen</h3><p class="soft">No audio was generated in this run.</p>'
    kinds: dict[str, list[dict]] = {}       # tts-000.wav is of the kind tts
    for entry in listed:
        kinds.setdefault(re.split(r'[-_.\d]', entry['file'])[0], []).append(entry)
    out, left = ['<h3>Listen</h3>'], len(listed)
    for entries in itertools.islice(kinds.values(), CLIPS):
        shown = entries[:max(1, CLIPS // len(kinds))]
        left -= len(shown)
        out += [_clip(folder, entry, room) + _beside(folder, entry, room) for entry in shown]
    if left > 0:
        out.append(f'<p class="soft">{left} more lie in {_e(folder)}.</p>')
    return ''.join(out)


def _beside(folder: pathlib.Path, entry: dict, room: list[int]) -> str:
    """What a recognizer heard in a clip (heard.json), and the recording it stands for (true/)."""
    name, heard = entry['file'], _read_json(folder / 'heard.json', dict).get('heard')
    texts = [clips[name] for clips in (heard.values() if isinstance(heard, dict) else ())
             if isinstance(clips, dict) and isinstance(clips.get(name), str)]
    out = f'<p class="soft">Heard by the judge: {_e(texts[0])}</p>' if texts else ''
    if name == os.path.basename(name) and (folder / 'true' / name).is_file():
        out += _clip(folder / 'true', dict(file=name, title='The same from the true recording'),
                     room)
    return out


def _clip(folder: pathlib.Path, entry: dict, room: list[int]) -> str:
    path = folder / entry['file']
    head = f'<h4>{_e(entry.get("title") or entry["file"])}</h4>'
    lines = entry.get('lines') if isinstance(entry.get('lines'), dict) else {}
    head += ''.join(f'<p class="soft">{_e(name)}: {_e(line)}</p>' for name, line in lines.items())
    head += f'<p>{_e(entry["text"])}</p>' if entry.get('text') else ''
    try:
        if path.resolve().parent != folder.resolve():
            raise ValueError('it lies outside the samples folder')
        if not path.is_file():
            raise ValueError('no such file')
        rate_hz, length, wav = _read_sound(path)
        if wav.nbytes > room[0]:
            raise ValueError('this page is full of sound; it can be heard where it lies')
    except (OSError, ValueError) as e:
        why = f'{_e(entry["file"])} is not played here: {_e(e)}.'
        return f'<div class="clip">{head}<p class="soft">{why}</p></div>'
    room[0] -= wav.nbytes
    names = entry.get('channels') if isinstance(entry.get('channels'), list) else []
    names = [_e(n) for n in names] if len(names) == len(wav) else [
        f'channel {i + 1}' if len(wav) > 1 else '' for i in range(len(wav))]
    pictures = ''.join(
        f'<span class="small soft">{name}</span><img alt="Spectrogram {name}" '
        f'src="{_data_uri(draw.spectrogram(channel, rate_hz), "image/png")}">'
        for name, channel in zip(names, wav, strict=True))
    cut = f', the first {CLIP_S:.0f} s here' if wav.shape[1] < length else ''
    sound = _data_uri(_wav_bytes(wav, rate_hz), 'audio/wav')
    return (f'<div class="clip">{head}<audio controls preload="metadata" src="{sound}"></audio>'
            f'{pictures}<span class="small soft">{length / rate_hz:.1f} s{cut}; '
            f'{_e(entry["file"])}</span></div>')


def _read_sound(path: pathlib.Path) -> tuple[int, int, np.ndarray]:
    """Rate, length in samples, and the first int16 [C, S] of a sound file. Raises ValueError."""
    try:
        import soundfile
    except ImportError:
        raise ValueError('reading sound needs pip install jaxsd[audio]') from None
    try:
        with soundfile.SoundFile(path) as f:
            if not f.frames or f.channels > 8:
                raise ValueError(f'it has {f.frames} samples on {f.channels} channels')
            return f.samplerate, f.frames, f.read(int(CLIP_S * f.samplerate), dtype='int16',
                                                  always_2d=True).T
    except RuntimeError as e:
        raise ValueError(str(e).strip(' .').replace(str(path), 'it')) from None


def _wav_bytes(wav: np.ndarray, rate_hz: int) -> bytes:
    """int16 [C, S] as a wav file."""
    import soundfile
    out = io.BytesIO()
    soundfile.write(out, wav.T, rate_hz, format='WAV', subtype='PCM_16')
    return out.getvalue()


def _ledger(run: dict) -> str:
    head = '<h3>What was trained, on what</h3>'
    if not run['ledger']:
        return head + '<p class="soft">No ledger was written for this run.</p>'
    consumed = {str(e.get('stage', '')): e['consumed'] for e in run['ledger']
                if isinstance(e.get('consumed'), dict)}     # each counts from the stage's start
    rows = [(_e(stage), _e(source),
             _number(c['audio_s'] / 3600.0 if _finite(c.get('audio_s')) else None),
             _number(c.get('tokens')), _number(c.get('records')))
            for stage, sources in consumed.items() for source, c in sources.items()
            if isinstance(c, dict)]
    out = [head]
    if rows:
        out.append(_table(('stage', 'source', 'hours', 'tokens', 'records'), rows, words=(0, 1)))
    begun = [e for e in run['ledger'] if e.get('event') not in ('consumed', 'checkpoint', 'ready')]
    keys = [k for k in ('time_s', 'event', 'stage', 'step', 'revision', 'devices', 'device_kind',
                        'processes', 'mesh', 'dataset') if any(e.get(k) for e in begun)]
    rows = []
    for entry in begun[-40:]:
        when = entry.get('time_s')
        if _finite(when) and 0 <= when < 4e9:
            entry = entry | {'time_s': f'{datetime.datetime.fromtimestamp(when):%Y-%m-%d %H:%M}'}
        rows.append(['' if entry.get(k) is None else _e(_short(entry[k])[:120]) for k in keys])
    if rows:
        out.append('<h4>Starts and resumes</h4>' + _table(
            ['time' if k == 'time_s' else k.replace('_', ' ') for k in keys], rows,
            words=range(len(keys))))
    whole = '\n'.join(json.dumps(e) for e in run['ledger'][-40:])[:200_000]
    out.append(f'<details><summary>The ledger as written</summary><div class="scroll"><pre>'
               f'{_e(whole)}</pre></div></details>')
    return ''.join(out)


def _seconds(run: dict) -> dict[str, float]:
    """Where the run's time went, by cause; {} where the ledger does not tell."""
    seen = [row['time_s'] for rows in run['stages'].values() for row in rows
            if _finite(row.get('time_s'))]
    try:
        return goodput.account(run['ledger'], max(seen, default=None))
    except (KeyError, TypeError, ValueError, AttributeError):       # lines of another shape
        return {}


def _time(run: dict) -> str:
    seconds, head = _seconds(run), '<h3>Where the time went</h3>'
    total = sum(seconds.values())
    if not total > 0:
        return head + '<p class="soft">The ledger holds no times of this run.</p>'
    rows = [(_e(cause), f'{s:,.1f}', f'{100 * s / total:.1f}', _e(goodput.CAUSES[cause]))
            for cause, s in seconds.items()]
    out = head + (f'<p>Goodput <b>{100 * goodput.share(seconds):.1f} %</b> of {total:,.0f} s: '
                  'the share of time in steps that were kept.</p>')
    out += _table(('cause', 'seconds', '%', ''), rows, words=(0, 3))
    try:
        found = goodput.forecast(run['ledger'], failure_every_s=FAILURE_EVERY_S, idle_s=NOTICED_S)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        found = None
    if found:
        out += (f'<p class="small soft">With what starting and saving cost here, a failure every '
                f'{FAILURE_EVERY_S / 3600:.0f} hours, noticed after {NOTICED_S:.0f} s, would leave '
                f'{100 * found[0]:.1f} %, saving every {found[1]:.0f} s.</p>')
    return out


SLOTS = ('codec', 'vocab', 'layout', 'frontend', 'backbone', 'head', 'objective', 'data', 'mesh')


def _config(run: dict) -> str:
    config, out = run['config'], ['<h3>Configuration</h3>']
    if not config:
        return out[0] + '<p class="soft">No readable config.json lies in this run.</p>'
    lines = [(slot, config[slot]) for slot in SLOTS if slot in config]
    stages = config.get('stages')
    lines += [(f'stage {s.get("name", i)}', {k: v for k, v in s.items() if k != 'name'})
              for i, s in enumerate(stages if isinstance(stages, list) else ())
              if isinstance(s, dict)]
    out.append('<dl>')
    for name, value in lines:
        if isinstance(value, dict):
            rest = {k: v for k, v in value.items() if k != 'name'}
            head = f'<b>{_e(value["name"])}</b> ' if 'name' in value else ''
            out.append(f'<dt>{_e(name)}</dt><dd>{head}{_e(_short(rest))}</dd>')
        else:
            out.append(f'<dt>{_e(name)}</dt><dd>{_e(_short(value))}</dd>')
    whole = json.dumps(config, indent=1)[:200_000]
    out.append('</dl><details><summary>The whole resolved config</summary><div class="scroll">'
               f'<pre>{_e(whole)}</pre></div></details>')
    return ''.join(out)


def _exports(run: dict) -> str:
    head = '<h3>Exports</h3>'
    folders = {p.parent for pattern in ('*/*.safetensors', '*/*/*.safetensors', '*/*.stablehlo',
                                        '*/*.gguf')
               for p in run['folder'].glob(pattern) if not p.is_relative_to(
                   run['folder'] / 'checkpoints')}
    if not folders:
        return head + '<p class="soft">Nothing was exported from this run.</p>'
    rows = []
    for folder in sorted(folders)[:20]:
        files = sorted(p for p in folder.iterdir() if p.is_file())
        size = sum(p.stat().st_size for p in files)
        rows.append((f'<code>{_e(folder)}</code>', f'{size / 1e6:,.1f} MB',
                     _e(', '.join(p.name for p in files[:8]))))
    return head + _table(('folder', 'size', 'files'), rows, words=(0, 2))

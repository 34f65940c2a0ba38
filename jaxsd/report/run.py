# SPDX-License-Identifier: Apache-2.0
"""The card of a run, its parts in reading order."""

import datetime
import io
import itertools
import json
import os
import pathlib
import re
import statistics

import numpy as np

from jaxsd import draw, goodput, verdict
from jaxsd.report.elements import (
    curve,
    data_uri,
    esc,
    figure,
    finite,
    inner,
    loss_curves,
    names_in,
    number,
    short,
    table_of,
    with_unit,
    xy,
)
from jaxsd.report.files import as_dicts, read_json

GRIDS, GRID_BYTES = 8, 3 << 20
CLIPS, CLIP_S = 16, 30.0
ITEMS_DRAWN = 5_000         # samples of more items than these would take seconds and gigabytes
FAILURE_EVERY_S, NOTICED_S = 3 * 3600.0, 10.0       # of the forecast: how often, how soon seen


def article(run: dict, anchor: str, room: list[int]) -> str:
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
    out = [f'<h2>{esc(title)}</h2>']
    where = ' · '.join(f'{name}<code>{esc(run[key])}</code>' for name, key in
                       (('', 'folder'), ('', 'file'), ('fingerprint ', 'fingerprint')) if run[key])
    out.append(f'<p class="soft small">{where}</p>')
    paragraph = rest.strip().partition('\n\n')[0]
    if paragraph and not paragraph.lstrip().startswith('Evidence'):
        out.append(f'<p>{esc(paragraph)}</p>')
    if evidence:
        words = ' '.join(evidence[1].split())
        out.append(f'<p class="evidence"><b>Evidence.</b> {esc(words)}</p>')
    if not text:
        out.append('<p class="soft">The config file that describes this run was not found.</p>')
    return ''.join(out)


def _tiles(run: dict) -> str:
    if not run['stages']:
        return ''
    rows = list(run['stages'].values())
    last = rows[-1][-1]
    name = next(reversed(run['stages']))
    planned = next((s.get('steps') for s in as_dicts(run['config'].get('stages'))
                    if s.get('name') == name), None)
    whole = not finite(planned) or last['step'] >= planned
    tiles = [('final loss' if whole else 'loss so far', number(last.get('loss'))),
             (f'step of {esc(name or "training")}' + (
                 '' if whole else f', of {number(planned)}'), number(last['step']))]

    def in_all(key):        # each stage counts from its own start
        return sum(stage[-1][key] for stage in rows if finite(stage[-1].get(key)))
    if tokens := in_all('tokens'):          # a tile is too narrow for more digits
        tiles.append(('tokens trained on', with_unit(tokens / 1e6, 'M') if tokens >= 1e6
                      else number(tokens)))
    if hours := in_all('audio_hours'):
        tiles.append(('audio trained on', with_unit(hours, 'h')))
    for key, name, scale, unit in (('audio_hours_per_h', 'real time, training', 1, '×'),
                                   ('step_s', 'time per step', 1, 's'),
                                   ('data_wait_fraction', 'waiting for data', 100, '%'),
                                   ('dispatch_fraction', 'starting steps', 100, '%')):
        found = [r[key] for r in rows[-1] if finite(r.get(key))]    # stages differ in batch
        if found:
            tiles.append((name, with_unit(scale * statistics.median(found), unit)))
    if seconds := _seconds(run):
        tiles.append(('goodput', with_unit(100 * goodput.share(seconds), '%')))
    skipped = sum(stage[-1]['skipped_steps'] for stage in rows
                  if finite(stage[-1].get('skipped_steps')))
    if skipped:
        tiles.append(('steps skipped, not finite', number(skipped)))
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
        rows.append((mark + esc(name), number(y[0] if y else None), number(y[-1] if y else None),
                     *([number(later[-1] if later else None)] if held else [])))
    table = table_of(('', 'first', 'last', *(['held out'] if held else [])), rows[:60], words=(0,))
    svg = draw.curves([c for c in curves if c[1]], f'{title}: {caption}', height=2.7)
    caption += ' Circles: held-out records.' if held else ''
    drawn = figure(esc(title), svg, esc(caption))
    return f'<div class="pair">{drawn}<div>{table}{note}</div></div>'


def _colored(rows, group: str, keys: list[str], prefix: str = ''):
    """Curves of `keys`, as many in color as can be told apart; the others only have numbers."""
    colors = itertools.chain(draw.SERIES, itertools.repeat(''))
    return [curve(rows, key.removeprefix(prefix), color, group, key)
            for key, color in zip(keys, colors, strict=False)]


def _learning(stage: str, rows: list[dict]) -> str:
    name = f'stage {stage}' if stage else 'training'
    head = f'<h4>{esc(name.capitalize())}</h4>'
    bad = sum(1 for r in rows if 'loss' in r and not finite(r['loss']))
    note = (f'<p class="soft small">{number(bad)} of {number(len(rows))} lines have a loss that '
            'is not a finite number; they are left out of the curve.</p>') if bad else ''
    out = _panel('Loss', loss_curves(rows), f'Training batches, {name}.', note)
    if not out:
        out = f'<p class="soft">The losses of {esc(name)} hold no finite numbers.</p>'
    drawn = {'loss', *names_in(rows, 'terms')}
    held = [n for n in names_in(rows, 'held_out') if n not in drawn]
    losses = [n for n in held if '/loss/' in n or '/' not in n]
    out += _panel('Held out', _colored(rows, 'held_out', losses), f'Records kept apart, {name}.')
    others = [n for n in held if n not in losses]
    for task in dict.fromkeys(n.partition('/')[0] for n in others):
        keys = [n for n in others if n.partition('/')[0] == task]
        unit = keys[0].partition(' ')[2]        # an axis has one; the others are numbers only
        drawn_keys = [n for n in keys if n.partition(' ')[2] == unit]
        out += _panel(task, [
            *_colored(rows, 'held_out', drawn_keys, f'{task}/'),
            *(curve(rows, n.removeprefix(f'{task}/'), '', 'held_out', n) for n in keys
              if n not in drawn_keys)], f'{unit or "Figures"} on records kept apart, {name}.')
    more = ''
    names = names_in(rows, 'metrics')
    for kind in dict.fromkeys(n.partition('/')[0] for n in names):
        keys = [n for n in names if n.partition('/')[0] == kind]
        more += _panel(kind, _colored(rows, 'metrics', keys, f'{kind}/'), f'{name}.'.capitalize())
    small = []
    for key, title, zero, scale in (
            ('lr', 'Learning rate', False, 1), ('grad_norm', 'Gradient norm', False, 1),
            ('tokens_per_s', 'Tokens per second', True, 1),
            ('audio_hours_per_h', 'Audio hours per hour', True, 1),
            ('data_wait_fraction', 'Waiting for data, %', True, 100)):
        x, y = draw.thin(*xy(rows, lambda r, k=key: r.get(k)))
        if x:
            line = (key, draw.SERIES[0], x, [scale * v for v in y], ([], []))
            small.append(figure(title, draw.curves([line], f'{title}, {name}', zero=zero)))
    more += f'<div class="wide">{"".join(small)}</div>' if small else ''
    rest = ('<details><summary>By stream; learning rate, gradients and speed</summary>'
            f'{more}</details>') if more else ''
    return head + out + rest


def _measured(entry: dict, name: str) -> str:
    """A metric of a task, and where it lies when its items are drawn again, if they were kept."""
    value = inner(entry, 'metrics', name)
    kept = inner(entry, 'per_item', name)
    if not finite(value) or not isinstance(kept, dict):
        return number(value)
    try:
        if len(kept['sum']) > ITEMS_DRAWN:
            return number(value)
        found = verdict.estimate([(value, kept)], percent='%' in name)
        low, high = float(found['low']), float(found['high'])
    except (KeyError, TypeError, ValueError):       # of another shape
        return number(value)
    return (f'{number(value)} <small>{number(low)} to {number(high)}</small>'
            if finite(low) and finite(high) else number(value))


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
        heads = ['split', 'stage', 'step', 'items', *map(esc, names)]
        rows = [[esc(e.get('split') or '–'), esc(e.get('stage') or '–'), number(e.get('step')),
                 number(e.get('items')), *(_measured(e, n) for n in names)]
                for e in entries]
        if len(names) > 6 and len(entries) <= 3:    # tall reads better than wide
            labels = [' '.join(filter(None, (str(e.get('split') or ''), str(e.get('stage') or ''))))
                      for e in entries]
            heads = ['', *map(esc, labels)]
            rows = [[esc(n), *(_measured(e, n) for e in entries)] for n in names]
            rows.append(['items', *(number(e.get('items')) for e in entries)])
            rows.append(['step', *(number(e.get('step')) for e in entries)])
        out.append(f'<h4>{esc(task)}</h4>'
                   + table_of(heads, rows, words=(0, 1) if heads[0] else (0,)))
        notes = dict.fromkeys(str(e['note']) for e in entries if e.get('note'))
        out += [f'<p class="small soft">{esc(note)}</p>' for note in notes]
        out += [_histogram(e) for e in entries if isinstance(e.get('histogram'), dict)]
    if any(isinstance(e.get('per_item'), dict) and e['per_item'] for e in run['evaluation']):
        out.append(f'<p class="small soft">Small: 95 % of what {verdict.DRAWS:,} samples of the '
                   'same items give; another seed may differ by more.</p>')
    return ''.join(out)


def _histogram(entry: dict) -> str:
    name = str(entry['histogram'].get('name', 'values'))
    given = entry['histogram'].get('values')
    given = given if isinstance(given, list) else ()
    values = np.asarray([v for v in given if finite(v)], float)
    if not values.size:
        return f'<p class="soft">The histogram of {esc(name)} holds no finite values.</p>'
    quarter, middle, most = np.percentile(values, [25, 50, 95])
    svg = draw.histogram(values, name)
    return '<div class="wide" style="margin-top:14px">' + figure(
        f'{esc(name)}, {esc(entry.get("split", ""))}', svg,
        f'{number(int(values.size))} items; quartile {number(float(quarter))}, median '
        f'{number(float(middle))}, 95th percentile {number(float(most))}.') + '</div>'


def _grids(run: dict) -> str:
    out, folder = ['<h3>What the model reads</h3>'], run['folder'] / 'grids'
    found = sorted(p for p in folder.glob('*') if p.suffix in ('.png', '.txt') and p.is_file())
    if not found:
        return out[0] + ('<p class="soft">No grid was drawn for this run. This draws one: '
                         f'<code>jaxsd show --config {esc(run["file"] or "FILE.py")} --png '
                         f'{esc(folder / "grid.png")}</code></p>')
    for path in found[:GRIDS]:
        name = esc(path.stem.replace('_', ' ').replace('-', ' '))
        if path.stat().st_size > GRID_BYTES:
            out.append(f'<p class="soft">{esc(path.name)} is too large to show here.</p>')
            continue
        content = path.read_bytes()
        if path.suffix == '.txt':
            shown = f'<pre>{esc(content.decode("utf-8", "replace"))}</pre>'
        elif content.startswith(b'\x89PNG\r\n\x1a\n'):
            shown = f'<img src="{data_uri(content, "image/png")}" alt="Drawn grid: {name}">'
        else:
            out.append(f'<p class="soft">{esc(path.name)} is not a PNG picture.</p>')
            continue
        out.append(f'<figure><h4>{name}</h4><div class="scroll grid" tabindex="0">{shown}</div>'
                   '</figure>')
    if len(found) > GRIDS:
        out.append(f'<p class="soft">{len(found) - GRIDS} more lie in {esc(folder)}.</p>')
    return ''.join(out)


def _listen(run: dict, room: list[int]) -> str:
    folder = run['folder'] / 'samples'
    listed = [e for e in read_json(folder / 'samples.json', list)
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
        out.append(f'<p class="soft">{left} more lie in {esc(folder)}.</p>')
    return ''.join(out)


def _beside(folder: pathlib.Path, entry: dict, room: list[int]) -> str:
    """What a recognizer heard in a clip (heard.json), and the recording it stands for (true/)."""
    name, heard = entry['file'], read_json(folder / 'heard.json', dict).get('heard')
    texts = [clips[name] for clips in (heard.values() if isinstance(heard, dict) else ())
             if isinstance(clips, dict) and isinstance(clips.get(name), str)]
    out = f'<p class="soft">Heard by the judge: {esc(texts[0])}</p>' if texts else ''
    if name == os.path.basename(name) and (folder / 'true' / name).is_file():
        out += _clip(folder / 'true', dict(file=name, title='The same from the true recording'),
                     room)
    return out


def _clip(folder: pathlib.Path, entry: dict, room: list[int]) -> str:
    path = folder / entry['file']
    head = f'<h4>{esc(entry.get("title") or entry["file"])}</h4>'
    lines = entry.get('lines') if isinstance(entry.get('lines'), dict) else {}
    head += ''.join(f'<p class="soft">{esc(name)}: {esc(line)}</p>' for name, line in lines.items())
    head += f'<p>{esc(entry["text"])}</p>' if entry.get('text') else ''
    try:
        if path.resolve().parent != folder.resolve():
            raise ValueError('it lies outside the samples folder')
        if not path.is_file():
            raise ValueError('no such file')
        rate_hz, length, wav = _read_sound(path)
        if wav.nbytes > room[0]:
            raise ValueError('this page is full of sound; it can be heard where it lies')
    except (OSError, ValueError) as e:
        why = f'{esc(entry["file"])} is not played here: {esc(e)}.'
        return f'<div class="clip">{head}<p class="soft">{why}</p></div>'
    room[0] -= wav.nbytes
    names = entry.get('channels') if isinstance(entry.get('channels'), list) else []
    names = [esc(n) for n in names] if len(names) == len(wav) else [
        f'channel {i + 1}' if len(wav) > 1 else '' for i in range(len(wav))]
    pictures = ''.join(
        f'<span class="small soft">{name}</span><img alt="Spectrogram {name}" '
        f'src="{data_uri(draw.spectrogram(channel, rate_hz), "image/png")}">'
        for name, channel in zip(names, wav, strict=True))
    cut = f', the first {CLIP_S:.0f} s here' if wav.shape[1] < length else ''
    sound = data_uri(_wav_bytes(wav, rate_hz), 'audio/wav')
    return (f'<div class="clip">{head}<audio controls preload="metadata" src="{sound}"></audio>'
            f'{pictures}<span class="small soft">{length / rate_hz:.1f} s{cut}; '
            f'{esc(entry["file"])}</span></div>')


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
    rows = [(esc(stage), esc(source),
             number(c['audio_s'] / 3600.0 if finite(c.get('audio_s')) else None),
             number(c.get('tokens')), number(c.get('records')))
            for stage, sources in consumed.items() for source, c in sources.items()
            if isinstance(c, dict)]
    out = [head]
    if rows:
        out.append(table_of(('stage', 'source', 'hours', 'tokens', 'records'), rows, words=(0, 1)))
    begun = [e for e in run['ledger'] if e.get('event') not in ('consumed', 'checkpoint', 'ready')]
    keys = [k for k in ('time_s', 'event', 'stage', 'step', 'revision', 'devices', 'device_kind',
                        'processes', 'mesh', 'dataset') if any(e.get(k) for e in begun)]
    rows = []
    for entry in begun[-40:]:
        when = entry.get('time_s')
        if finite(when) and 0 <= when < 4e9:
            entry = entry | {'time_s': f'{datetime.datetime.fromtimestamp(when):%Y-%m-%d %H:%M}'}
        rows.append(['' if entry.get(k) is None else esc(short(entry[k])[:120]) for k in keys])
    if rows:
        out.append('<h4>Starts and resumes</h4>' + table_of(
            ['time' if k == 'time_s' else k.replace('_', ' ') for k in keys], rows,
            words=range(len(keys))))
    whole = '\n'.join(json.dumps(e) for e in run['ledger'][-40:])[:200_000]
    out.append(f'<details><summary>The ledger as written</summary><div class="scroll"><pre>'
               f'{esc(whole)}</pre></div></details>')
    return ''.join(out)


def _seconds(run: dict) -> dict[str, float]:
    """Where the run's time went, by cause; {} where the ledger does not tell."""
    seen = [row['time_s'] for rows in run['stages'].values() for row in rows
            if finite(row.get('time_s'))]
    try:
        return goodput.account(run['ledger'], max(seen, default=None))
    except (KeyError, TypeError, ValueError, AttributeError):       # lines of another shape
        return {}


def _time(run: dict) -> str:
    seconds, head = _seconds(run), '<h3>Where the time went</h3>'
    total = sum(seconds.values())
    if not total > 0:
        return head + '<p class="soft">The ledger holds no times of this run.</p>'
    rows = [(esc(cause), f'{s:,.1f}', f'{100 * s / total:.1f}', esc(goodput.CAUSES[cause]))
            for cause, s in seconds.items()]
    out = head + (f'<p>Goodput <b>{100 * goodput.share(seconds):.1f} %</b> of {total:,.0f} s: '
                  'the share of time in steps that were kept.</p>')
    out += table_of(('cause', 'seconds', '%', ''), rows, words=(0, 3))
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
            head = f'<b>{esc(value["name"])}</b> ' if 'name' in value else ''
            out.append(f'<dt>{esc(name)}</dt><dd>{head}{esc(short(rest))}</dd>')
        else:
            out.append(f'<dt>{esc(name)}</dt><dd>{esc(short(value))}</dd>')
    whole = json.dumps(config, indent=1)[:200_000]
    out.append('</dl><details><summary>The whole resolved config</summary><div class="scroll">'
               f'<pre>{esc(whole)}</pre></div></details>')
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
        rows.append((f'<code>{esc(folder)}</code>', f'{size / 1e6:,.1f} MB',
                     esc(', '.join(p.name for p in files[:8]))))
    return head + table_of(('folder', 'size', 'files'), rows, words=(0, 2))

# SPDX-License-Identifier: Apache-2.0
"""Draws a grid so that a person can check it against a paper's figure: as text or as a picture.

Ids are shown as they count inside their own range, so a code reads as the codec wrote it. The text
form is what goldens store and reviews quote; the picture is for reports.
"""

import os
from collections.abc import Callable

import numpy as np

from jaxsd.types import NOTHING, Grid
from jaxsd.vocab import Vocab, initial

WIDTH = 110
LEGEND = {'*': 'initial', '·': 'nothing', '_': 'pad', '~': 'a frame of sound',
          'EP': 'a word comes next', "'": 'seen, never scored'}
SHORT = {'pad': '_', 'epad': 'EP', 'bos': 'BOS', 'eos': 'EOS', 'end': 'END',
         'frame': '~'}


def text(grid: Grid, vocab: Vocab, *, columns: tuple[int, int] | None = None,
         pieces: Callable[[int], str] | None = None) -> str:
    """The columns `columns` (first, after the last) of `grid`, at most 110 characters wide.

    Without `columns`: the first 24 of a grid of streams, the first 240 of a grid of one row.
    `pieces` turns a text id into its piece; without it text shows as numbers, like everything else.
    A grid of one row is written as a text that starts a new line at every marker.
    """
    first, stop = _window(grid, columns)
    cells = _cells(grid, vocab, first, stop, pieces)
    rows, total = grid.tokens.shape
    names = _names(grid, vocab)
    lines = _streams(cells, names, first) if rows > 1 else _flow(cells[0])
    head = (f'K={rows}  T={total}  columns {first}..{stop - 1}   weights: '
            + ' | '.join(f'{name} {value}' for name, value in _weights(grid, vocab)))
    marks = '   '.join(f'{mark} {meaning}' for mark, meaning in LEGEND.items()
                       if _appears(mark, cells, names))
    more = [f'... {total - stop} more columns'] if stop < total else []
    return '\n'.join([*_wrap(head.split(' '), '', '    '), *([marks] if marks else []), *lines,
                      *more])


def _window(grid: Grid, columns: tuple[int, int] | None) -> tuple[int, int]:
    rows, total = grid.tokens.shape
    first, stop = columns or (0, 24 if rows > 1 else 240)
    if not 0 <= first < stop or first >= total:
        raise ValueError(f'columns {first}..{stop} lie outside a grid of {total} columns')
    return first, min(stop, total)


def _cells(grid: Grid, vocab: Vocab, first: int, stop: int, pieces) -> list[list[str]]:
    """What stands in each cell, with a mark on a token that is seen and not scored.

    Column 0 goes unmarked (it is never scored), and so does a row of which nothing is scored (its
    name carries the mark).
    """
    one = len(vocab.rows) == 1
    out = []
    for row, ids, weights in zip(vocab.rows, grid.tokens, grid.weights, strict=True):
        line = []
        for t in range(first, stop):
            cell = _token(int(ids[t]), row, one, vocab, pieces)
            seen = t and cell not in '·*' and not weights[t] and (one or weights.any())
            line.append(cell + "'" * bool(seen))
        out.append(line)
    return out


def _token(token: int, row, one: bool, vocab: Vocab, pieces) -> str:
    if token == NOTHING:
        return '·'
    if not one and token == initial(row):
        return '*'
    special = _special(vocab, token, one)
    if special:
        return SHORT.get(special, special)
    name, local = vocab.name(token)
    if name == 'text':
        return pieces(local) if pieces else f't{local}' if one else str(local)
    return f'{name[0]}{local}' if one else str(local)


def _names(grid: Grid, vocab: Vocab) -> list[str]:
    """The rows' names, with the mark where tokens are seen and none of them is scored."""
    return [row.name + "'" * bool(not weights.any() and np.any((ids != NOTHING)
                                                               & (ids != initial(row))))
            for row, ids, weights in zip(vocab.rows, grid.tokens, grid.weights, strict=True)]


def _weights(grid: Grid, vocab: Vocab) -> list[tuple[str, str]]:
    """The distinct weights of the scored cells, largest first, rows that agree taken together."""
    out = []
    for row, weights in zip(vocab.rows, grid.weights, strict=True):
        values = ' '.join(f'{w:g}' for w in sorted(set(weights[weights > 0].tolist()))[::-1]) or '0'
        stem, _, number = row.name.partition(' ')
        if out and out[-1][0] == stem and number and out[-1][3] == values:
            out[-1][2] = number
        else:
            out.append([stem, number, number, values])
    return [(f'{stem} {low}..{high}' if low != high else f'{stem} {low}'.strip(), values)
            for stem, low, high, values in out]


def _appears(mark: str, cells, names) -> bool:
    if mark == "'":
        return any(name.endswith(mark) for name in names) or any(
            cell.endswith(mark) for line in cells for cell in line)
    return any(cell.rstrip("'") == mark for line in cells for cell in line)


def _streams(cells, names, first: int) -> list[str]:
    """One line per stream, in as many blocks as the width asks for."""
    margin = max(len('column'), *map(len, names)) + 2
    table = [[str(first + t) for t in range(len(cells[0]))], *cells]
    widths = [max(len(line[t]) for line in table) for t in range(len(cells[0]))]
    blocks, start = [], 0
    while start < len(widths):
        stop, used = start + 1, margin + widths[start]
        while stop < len(widths) and used + 1 + widths[stop] <= WIDTH:
            used += 1 + widths[stop]
            stop += 1
        blocks.append([
            (name.ljust(margin) + ' '.join(line[t].rjust(widths[t]) for t in range(start, stop)))
            for name, line in zip(['column', *names], table, strict=True)])
        start = stop
    return [line for i, block in enumerate(blocks) for line in [*[''] * bool(i), *block]]


def _flow(cells: list[str]) -> list[str]:
    """One row as running text; a marker opens a line and what it announces hangs below itself."""
    lines, stretch = [], []
    indent = 0
    for cell in [*cells, '[']:
        if cell.startswith('[') and stretch:
            indent = max(indent, len(stretch[0]) + 1 if stretch[0].startswith('[') else 0)
            lines.append(stretch)
            stretch = []
        stretch.append(cell)
    out = []
    for stretch in lines:
        opens = stretch[0].startswith('[')
        head = stretch[0].ljust(indent) if opens else ' ' * indent * bool(out)
        out += _wrap(stretch[1:] if opens else stretch, head, ' ' * indent)
    return out


def _special(vocab: Vocab, token: int, one: bool) -> str:
    """The name of a special id; of several rows, without its row's: 'audio 0 end' is 'end'."""
    name = vocab.special_name(token)
    return name if one else name.rpartition(' ')[2]


def _wrap(words, head: str, indent: str) -> list[str]:
    lines, line, fresh = [], head, True
    for word in words:
        if not fresh and len(line) + 1 + len(word) > WIDTH:
            lines.append(line.rstrip())
            line, fresh = indent, True
        line += ('' if fresh else ' ') + word
        fresh = False
    return [*lines, line.rstrip()]


# Pictures. One hue per stream; lighter and darker by code, so that a delay shows as a shifted
# texture and silence as a flat one.
HUES = {'text': '#e9a23b', 'markers': '#39395a', 'mine': '#3b78b5', 'units': '#3b78b5',
        'audio': '#3b78b5', 'codes': '#3b78b5',
        'theirs': '#4f9d69', 'nothing': '#ffffff', 'pad': '#f3efe6', 'epad': '#d8cbb0',
        'initial': '#8a8a94'}
HATCH = '#94949e'
MEANINGS = {'text': 'words', 'markers': 'marker, BOS, EOS', 'mine': 'my voice', 'units': 'units',
            'audio': 'speech', 'codes': 'speech',
            'theirs': 'their voice', 'pad': 'pad', 'epad': 'a word comes next',
            'initial': 'initial token', 'nothing': 'nothing, or masked'}


def picture(grid: Grid, vocab: Vocab, path: str, *, columns: tuple[int, int] | None = None,
            pieces: Callable[[int], str] | None = None, title: str = ''):
    """Writes the columns that `text` would show as a PNG, SVG or PDF, by the ending of `path`.

    Rows are streams and columns are time; hatching covers what is seen and never scored, and the
    right margin gives each row's loss weights. A grid of one row flows over several lines.
    Folders on the way are made. Raises ValueError for another ending; nothing half-written is left
    behind.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = os.path.splitext(path)[1][1:].lower()
    if kind not in ('png', 'svg', 'pdf'):
        raise ValueError(f'a picture ends in .png, .svg or .pdf, got {path!r}')
    first, stop = _window(grid, columns)
    cells = _cells(grid, vocab, first, stop, pieces)
    figure = Figure(facecolor='white')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw = _draw_streams if len(cells) > 1 else _draw_flow
    width_in, height_in, hues = draw(axes, grid, vocab, cells, first, stop)
    figure.set_size_inches(width_in, height_in + 0.9)
    _legend(axes, hues, bool(any(c.endswith("'") for line in cells for c in line)
                             or any(n.endswith("'") for n in _names(grid, vocab))))
    rows, total = grid.tokens.shape
    axes.set_title(title or f'{rows} {"streams" if rows > 1 else "stream"}, columns {first} to '
                   f'{stop - 1} of {total}', loc='left', fontsize=11, pad=8)
    partial = f'{path}.partial'
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        figure.savefig(partial, format=kind, dpi=130, bbox_inches='tight', pad_inches=0.15)
        os.replace(partial, path)
    except OSError as e:
        raise OSError(e.errno, f'{e.strerror} while writing', path) from None
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def _hue(token: int, row, one: bool, vocab: Vocab) -> tuple[str, float]:
    """The name of a token's hue, and where it lies in its range (0 light .. 1 dark)."""
    if token == NOTHING:
        return 'nothing', 0.5
    if not one and token == initial(row):
        return 'initial', 0.5
    special = _special(vocab, token, one)
    if special:
        return special if special in HUES else 'markers', 0.5
    name, local = vocab.name(token)
    hue = name.split()[0]
    return hue, 0.5 if hue in ('text', 'markers') else local / max(1, vocab.ranges[name][1] - 1)


def _color(hue: str, shade: float, scored: bool):
    from matplotlib.colors import to_rgb
    rgb = np.array(to_rgb(HUES.get(hue, '#999999')))
    rgb = rgb + (1 - rgb) * (0.5 - shade) if shade < 0.5 else rgb * (1.25 - 0.5 * shade)
    return np.clip(rgb if scored else rgb + (1 - rgb) * 0.55, 0, 1)


def _ink(color) -> str:
    return '#ffffff' if np.dot(color, [0.299, 0.587, 0.114]) < 0.55 else '#222222'


def _draw_streams(axes, grid: Grid, vocab: Vocab, cells, first: int, stop: int):
    from matplotlib.patches import Rectangle

    height, gap = [2.6 if row.name == 'text' else 1.0 for row in vocab.rows], 0.3
    top, tops, last = 0.0, [], None
    for row, h in zip(vocab.rows, height, strict=True):
        speaker = row.name.split()[0]
        top += gap * (last is not None and speaker != last)
        tops.append(top)
        top, last = top + h, speaker
    across = stop - first
    hues = []
    for k, row in enumerate(vocab.rows):
        for t in range(first, stop):
            cell = cells[k][t - first]
            hue, shade = _hue(int(grid.tokens[k, t]), row, False, vocab)
            hues.append(hue)
            scored = grid.weights[k, t] > 0
            color = _color(hue, shade, scored or hue == 'initial')
            unscored = not scored and hue not in ('nothing', 'initial')
            axes.add_patch(Rectangle((t - 0.5, tops[k]), 1, height[k], facecolor=color,
                                     edgecolor=HATCH if unscored else 'white',
                                     hatch='////' if unscored else None, linewidth=0.4))
            label = cell.rstrip("'")
            tall = row.name == 'text' and len(label) > (3 if across <= 40 else 0)
            if hue != 'nothing' and (across <= 40 or hue in ('text', 'markers')):
                axes.text(t, tops[k] + height[k] / 2, label, ha='center', va='center',
                          fontsize=8 if row.name == 'text' else 6,
                          rotation=90 if tall else 0, color=_ink(color))
    axes.set_xlim(first - 0.5, stop - 0.5)
    axes.set_ylim(top, 0)
    axes.set_yticks([a + h / 2 for a, h in zip(tops, height, strict=True)],
                    [row.name for row in vocab.rows], fontsize=8)
    axes.set_xticks(range(first, stop, max(1, across // 16)))
    axes.tick_params(length=0, labelsize=8)
    axes.set_xlabel('column', fontsize=9)
    for side in axes.spines.values():
        side.set_visible(False)
    for k, weights in enumerate(grid.weights):
        values = ' '.join(f'{w:g}' for w in sorted(set(weights[weights > 0].tolist()))[::-1])
        axes.text(stop - 0.2, tops[k] + height[k] / 2, values or '0', va='center', fontsize=7,
                  color='#555555')
    axes.text(stop - 0.2, -0.2, 'weight', va='bottom', fontsize=7, color='#555555')
    return max(6.0, min(16.0, 0.34 * across + 1.5)), 0.24 * top + 0.4, hues


def _draw_flow(axes, grid: Grid, vocab: Vocab, cells, first: int, stop: int):
    from matplotlib.patches import Rectangle

    x, y, hues = 0.0, 0, []
    for t in range(first, stop):
        scored = grid.weights[0, t] > 0
        hue, shade = _hue(int(grid.tokens[0, t]), vocab.rows[0], True, vocab)
        hues.append(hue)
        color = _color(hue, shade, scored)
        label = cells[0][t - first].rstrip("'")
        width = len(label) + 1.0
        opens = hue == 'markers' and x > 8      # BOS keeps its first marker company
        if x and (opens or x + width > WIDTH):
            x, y = 0.0, y + 1
        axes.add_patch(Rectangle((x, y), width, 0.8, facecolor=color,
                                 edgecolor='white' if scored else HATCH,
                                 hatch=None if scored else '////', linewidth=0.6))
        axes.text(x + width / 2, y + 0.4, label, ha='center', va='center', fontsize=7,
                  family='monospace', color=_ink(color))
        x += width
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(y + 1, -0.1)
    axes.axis('off')
    return 11.0, 0.3 * (y + 1), hues


def _legend(axes, hues, unscored: bool):
    from matplotlib.patches import Patch
    handles = [Patch(facecolor=HUES[hue], label=meaning) for hue, meaning in MEANINGS.items()
               if hue in hues]
    if unscored:
        handles.append(Patch(facecolor='#eeeeee', edgecolor=HATCH, hatch='////',
                             label='seen, never scored'))
    axes.legend(handles=handles, loc='upper left', bbox_to_anchor=(0, -0.02), ncols=8, fontsize=8,
                frameon=False, borderaxespad=2.2, handlelength=1.2)

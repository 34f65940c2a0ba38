# SPDX-License-Identifier: Apache-2.0
"""Pictures of curves, distributions and sound, for a page or for a README.

An SVG for a page is drawn in placeholder colors that are then exchanged for the page's own, so that
one drawing follows the reader's light or dark setting; its text stays text. Matplotlib is imported
when something is drawn, and never through its global state.
"""

import html
import io
import re

import numpy as np

POINTS = 300                # of a curve that are drawn; more are averaged into these
TERMS = 8                   # curves in one drawing, as many as there are colors to tell apart

INK, FAINT = '#010203', '#040506'       # the page's --ink and --line
SERIES = tuple(f'#0a0b{i:02x}' for i in range(TERMS))       # the page's --s0 ...
PRINTED = ('#2a78d6', '#d95f1e', '#128a60', '#b07600', '#c9447e', '#0f7d0f', '#4a3aa7', '#d03b3b')


def thin(x, y, points: int = POINTS):
    """Averages neighbors until at most `points` are left."""
    if len(x) <= points:
        return x, y
    parts = [np.array_split(np.asarray(a, float), points) for a in (x, y)]
    return [p.mean() for p in parts[0]], [p.mean() for p in parts[1]]


def _svg(draw, alt: str, *, height: float = 2.1) -> str:
    """What `draw(axes)` draws, as an SVG in the page's own colors and typeface."""
    import matplotlib
    from matplotlib.figure import Figure
    style = {'svg.fonttype': 'none', 'svg.hashsalt': alt, 'text.parse_math': False,
             'font.size': 10.5, 'text.color': INK, 'axes.edgecolor': FAINT, 'axes.labelcolor': INK,
             'xtick.color': FAINT, 'ytick.color': FAINT, 'xtick.labelcolor': INK,
             'ytick.labelcolor': INK, 'grid.color': FAINT, 'grid.linewidth': .6,
             'axes.spines.top': False, 'axes.spines.right': False, 'axes.spines.left': False,
             'path.simplify_threshold': .2}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.3, height), layout='constrained')
        figure.patch.set_visible(False)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        axes.grid(axis='y')
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format='svg', metadata={'Date': None})
    text = out.getvalue()
    text = re.sub(r'<metadata>.*?</metadata>', '', text[text.index('<svg'):], flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', text)[1]
    text = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" role="img" '
            f'aria-label="{html.escape(alt)}">' + text.partition('>')[2])
    # What is not referred to needs no id, and several drawings share one page and its typeface.
    text = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"|font-family: [^;]*; ?', '', text)
    text = text.replace(INK, 'var(--ink)').replace(FAINT, 'var(--line)')
    for i, color in enumerate(SERIES):
        text = text.replace(color, f'var(--s{i})')
    return text.replace('xlink:href', 'href')


def _few_ticks(axes, whole: bool = True):
    from matplotlib.ticker import FuncFormatter, MaxNLocator
    low, high = axes.get_xlim()     # of nearly one value the labels are long
    axes.xaxis.set_major_locator(MaxNLocator(5 if whole or high - low > .05 * abs(high) else 2,
                                             integer=whole))
    axes.xaxis.set_major_formatter(FuncFormatter(
        lambda x, _: f'{x:,.0f}' if whole or abs(x) >= 1000 else f'{x:g}'))
    if axes.get_yscale() == 'linear':
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(
            lambda y, _: f'{y:,.0f}' if abs(y) >= 1000 and abs(y) < 1e9 else f'{y:g}'))


def curves(lines, alt: str, *, height: float = 2.1, zero: bool = False, along: str = 'step',
           log: bool = False) -> str:
    """Lines over steps, or whatever `along` says; held-out points as circles. `zero`: the axis
    begins at nothing; `log`: it counts factors along.

    `lines` holds (name, color, x, y, (held-out x, held-out y)); at least one point is finite.
    """
    def draw(axes):
        for i, (_, color, x, y, held) in enumerate(lines):
            axes.plot(x, y, color=color, linewidth=1.9 if i == 0 else 1.3,
                      marker='o' if len(x) == 1 else None, markersize=4, zorder=3 - bool(i))
            if held[0]:
                axes.plot(*held, 'o', color=color, markersize=4.5, markerfacecolor='none',
                          markeredgewidth=1.4, zorder=4)
        low = [v for c in lines for v in (*c[3], *c[4][1])]
        if zero:
            axes.set_ylim(bottom=0, top=max(low) * 1.08 or 1)
        elif min(low) > 0 and max(low) > 60 * min(low):
            axes.set_yscale('log')
        axes.set_xlabel(along)
        _few_ticks(axes, along == 'step')
        if log:     # ticks where something was measured; matplotlib's own are formulas
            axes.set_xscale('log')
            ticks = sorted({v for c in lines for v in (*c[2][:1], *c[2][-1:], *c[4][0])})
            axes.set_xticks(ticks, [f'{v:.2g}'.replace('e+0', 'e') for v in ticks])
            axes.minorticks_off()
    return _svg(draw, alt, height=height)


def intervals(rows, name: str) -> str:
    """A dot and its interval for each (label, color, mean, low, high), one below the other; low and
    high may be None."""
    def draw(axes):
        for i, (_, color, mean, low, high) in enumerate(rows):
            if low is not None:
                axes.plot([low, high], [-i, -i], color=color, linewidth=2.2, alpha=.55)
            axes.plot([mean], [-i], 'o', color=color, markersize=6)
        axes.set_yticks([-i for i in range(len(rows))], [label for label, *_ in rows])
        axes.set_ylim(-len(rows) + .4, .6)
        axes.grid(axis='y', visible=False)
        axes.grid(axis='x')
        axes.locator_params(axis='x', nbins=5)
    return _svg(draw, f'{name}: means and intervals', height=.75 + .27 * len(rows))


def intervals_png(panels) -> bytes:
    """Side by side, each (name, rows of (label, mean, low, high)), as a PNG on white."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context({'text.parse_math': False, 'font.size': 9}):
        most = max(len(rows) for _, rows in panels)
        figure = Figure(figsize=(1.2 + 2.6 * len(panels), .9 + .3 * most), dpi=160,
                        layout='constrained')
        for axes, (name, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels,
                                      strict=True):
            for i, (_, mean, low, high) in enumerate(rows):
                color = PRINTED[i % len(PRINTED)]
                if low is not None:
                    axes.plot([low, high], [-i, -i], color=color, linewidth=2, alpha=.55)
                axes.plot([mean], [-i], 'o', color=color, markersize=5)
            axes.set_yticks([-i for i in range(len(rows))], [row[0] for row in rows])
            axes.set(xlabel=name, ylim=(.6 - most, .6))
            axes.spines[['top', 'right', 'left']].set_visible(False)
            axes.grid(axis='x', linewidth=.5, alpha=.5)
            axes.tick_params(length=0)
        out = io.BytesIO()
        figure.savefig(out, format='png')
    return out.getvalue()


def histogram(values: np.ndarray, name: str) -> str:
    """Finite `values` as bars: one bar a value when they are whole and close, else 24 bins."""
    low, high = float(values.min()), float(values.max())
    if np.all(values == np.round(values)) and high - low <= 40:
        edges = np.arange(low - .5, high + 1)
    else:
        edges = np.linspace(low, high, 25) if high > low else np.array([low - .5, low + .5])
    counts, edges = np.histogram(values, edges)

    def draw(axes):
        axes.bar((edges[:-1] + edges[1:]) / 2, counts, width=np.diff(edges) * .86, color=SERIES[0])
        axes.set(xlabel=name, ylabel='items')
        _few_ticks(axes)
    return _svg(draw, f'Distribution of {name}')


def curves_png(lines, title: str) -> bytes:
    """The lines of `curves` as a PNG with a legend, on white."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context({'text.parse_math': False}):
        figure = Figure(figsize=(7, 3.6), dpi=160, layout='constrained')
        axes = figure.subplots()
        for i, (name, color, x, y, held) in enumerate(lines):
            color = '#1b1b19' if color == INK else PRINTED[SERIES.index(color)]
            axes.plot(x, y, color=color, linewidth=2.4 if i == 0 else 1.4, label=name)
            if held[0]:
                axes.plot(*held, 'o', color=color, markersize=5, markerfacecolor='white',
                          label=f'{name}, held out')
        axes.set(xlabel='step', ylabel='loss', title=title)
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(axis='y', linewidth=.5, alpha=.5)
        axes.legend(frameon=False, fontsize=8, ncols=2)
        out = io.BytesIO()
        figure.savefig(out, format='png')
    return out.getvalue()


def spectrogram(wav: np.ndarray, rate_hz: int, *, width: int = 720, height: int = 96) -> bytes:
    """A picture of int16 [S]: time to the right, 0 to 8 kHz upward, 70 dB from dark to bright."""
    from matplotlib.image import imsave
    size = max(64, int(rate_hz * .032))
    hop = max(1, len(wav) // width)
    padded = np.pad(wav.astype(np.float32) / 32768, (0, size))
    starts = np.arange(0, max(len(wav), 1), hop)[:width]
    frames = padded[starts[:, None] + np.arange(size)] * np.hanning(size)
    power = np.abs(np.fft.rfft(frames, axis=1))[:, :max(2, int(size * min(8000, rate_hz / 2)
                                                              / rate_hz))]
    level = 20 * np.log10(power + 1e-6)
    rows = np.linspace(0, level.shape[1] - 1, height).astype(int)
    picture = level[:, rows].T
    top = max(float(picture.max()), -40.0)
    out = io.BytesIO()
    imsave(out, picture, vmin=top - 70, vmax=top, cmap='magma', origin='lower', format='png')
    return out.getvalue()

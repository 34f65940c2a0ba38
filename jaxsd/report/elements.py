# SPDX-License-Identifier: Apache-2.0
"""Elements of a report: words, numbers, tables, curves; all text from the runs is escaped."""

import base64
import html
import math

from jaxsd import draw


def esc(text) -> str:
    return html.escape(str(text))


def finite(x) -> bool:
    """A number that can be drawn; not what overflows when it is."""
    return isinstance(x, int | float) and not isinstance(x, bool) and -1e300 < x < 1e300


def number(x) -> str:
    """A number as people write it, four digits that count; a dash where there is none."""
    if isinstance(x, float) and not math.isfinite(x):
        return 'not finite'
    if not finite(x):
        return '–'
    if isinstance(x, int) or (abs(x) >= 1e4 and abs(x) < 1e15):
        return f'{x:,.0f}' if abs(x) < 1e9 else f'{x:.3g}'.replace('e+0', 'e').replace('e+', 'e')
    return f'{x:.4g}'


def with_unit(x: float, unit: str) -> str:
    return f'{x:.3g} <small>{unit}</small>' if abs(x) < 1e3 else f'{x:,.0f} <small>{unit}</small>'


def short(value, depth: int = 0) -> str:
    """A value of JSON on one line: `rank 8, scale 2`."""
    if isinstance(value, dict):
        inside = ', '.join(f'{k} {short(v, depth + 1)}' for k, v in value.items())
        return f'({inside})' if depth else inside
    if isinstance(value, list):
        inside = ', '.join(short(v, depth + 1) for v in value)
        return f'[{inside}]' if depth else inside
    if isinstance(value, bool) or value is None:
        return {True: 'yes', False: 'no', None: 'none'}[value]
    return number(value) if isinstance(value, float) else str(value)


def table_of(heads, rows, *, words=()) -> str:
    """`rows` of already escaped cells; the columns in `words` hold text, the others numbers."""
    kind = ['w' if i in words else 'n' for i in range(len(heads))]
    head = ''.join(f'<th class="{k}">{h}</th>' for k, h in zip(kind, heads, strict=True))
    body = ''.join('<tr>' + ''.join(f'<td class="{k}">{c}</td>'
                                    for k, c in zip(kind, row, strict=True)) + '</tr>'
                   for row in rows)
    return (f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
            f'<tbody>{body}</tbody></table></div>')


def data_uri(content: bytes, kind: str) -> str:
    return f'data:{kind};base64,{base64.b64encode(content).decode()}'


# Drawing.

def xy(rows: list[dict], value) -> tuple[list[float], list[float]]:
    pairs = [(row['step'], y) for row in rows if finite(y := value(row))]
    return [x for x, _ in pairs], [y for _, y in pairs]


def inner(row: dict, group: str, name: str):
    return row[group].get(name) if isinstance(row.get(group), dict) else None


def names_in(rows: list[dict], group: str) -> list[str]:
    return sorted({str(k) for row in rows if isinstance(row.get(group), dict) for k in row[group]})


def curve(rows, name: str, color: str, group: str, key: str):
    """(name, color, x, y, held-out points): `key` of `group` in every line, '' for the line itself.

    Held-out values of the same name as a training value belong to its curve.
    """
    def value(row):
        return inner(row, group, key) if group else row.get(key)
    held = ([], []) if group == 'held_out' else xy(rows, lambda r: inner(r, 'held_out', key))
    return (name, color, *draw.thin(*xy(rows, value)), held)


def loss_curves(rows):
    """The total and its terms, the total first; a single term is the total and left out."""
    terms = names_in(rows, 'terms')
    return [curve(rows, 'loss', draw.INK, '', 'loss')] + [
        curve(rows, term, color, 'terms', term)
        for term, color in zip(terms if len(terms) > 1 else (), draw.SERIES, strict=False)]


def figure(title: str, svg: str, caption: str = '') -> str:
    below = f'<figcaption>{caption}</figcaption>' if caption else ''
    return f'<figure><h4>{title}</h4>{svg}{below}</figure>'

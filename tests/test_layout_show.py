# SPDX-License-Identifier: Apache-2.0
"""Can a person read the drawing? Width, windows, marks, and pictures that are whole or not there.

What the drawings say cell by cell is fixed by the goldens of test_layout_flat and _duplex.
"""

import numpy as np
import pytest

from jaxsd import vocab as vocabs
from jaxsd.layout import show
from jaxsd.types import NOTHING, Grid

FLAT = vocabs.line({'size': 500}, text_tokens=1_000)
WIDE = vocabs.streams({'size': 2048, 'codebooks': 8}, text_tokens=32_000)


def wide(columns: int) -> Grid:
    rng = np.random.default_rng(0)
    tokens = np.stack([rng.integers(row.start, row.start + 2048, columns) for row in WIDE.rows])
    return Grid.of(tokens, np.ones(tokens.shape))


def flat(tokens: int) -> Grid:
    words = np.random.default_rng(0).integers(10, 1_000, tokens)
    words[::50] = FLAT.specials['[Text]']
    return Grid.of(words, np.ones(tokens))


@pytest.mark.parametrize('grid, vocab', [(wide(300), WIDE), (flat(900), FLAT)])
@pytest.mark.parametrize('columns', [None, (0, 200), (123, 200), (199, 300)])
def test_fits_a_terminal(grid, vocab, columns):
    lines = show.text(grid, vocab, columns=columns).splitlines()
    assert max(map(len, lines)) <= 110 and max(map(len, lines)) > 90
    total = grid.tokens.shape[1]
    stop = columns[1] if columns else 24 if len(vocab.rows) > 1 else 240
    assert lines[-1] == f'... {total - stop} more columns' or stop == total
    # Every cell of the window is there: nothing is lost where lines break.
    first = columns[0] if columns else 0
    if len(vocab.rows) > 1:
        for row, ids in zip(vocab.rows, grid.tokens, strict=True):
            cells = ' '.join(line.removeprefix(row.name) for line in lines
                             if line.startswith(row.name + ' ')).split()
            assert cells == [str(i - row.start) for i in ids[first:stop].tolist()]
    else:
        cells = ' '.join(line for line in lines[1:] if not line.startswith('...')).split()
        assert cells == ['[Text]' if i == 1_000 else f't{i}'
                         for i in grid.tokens[0, first:stop].tolist()]


def test_the_width_is_exact():
    """34 columns of two digits behind ten characters of names would take 111."""
    tokens = np.array([row.start + 5 for row in WIDE.rows])[:, None] * np.ones(90, np.int32)
    lines = show.text(Grid.of(tokens, np.ones(tokens.shape)), WIDE, columns=(10, 90)).splitlines()
    assert max(map(len, lines)) == 10 + 33 * 2 + 32


def test_marks():
    """Not scored inside a scored row, a row never scored, nothing, padding, and column 0."""
    start = [row.start for row in WIDE.rows]
    tokens = np.full((17, 4), NOTHING)
    tokens[0] = [1, 3, 0, 50]
    tokens[1, 1:] = np.array([7, 8, 9]) + start[1]
    tokens[9, 1:] = np.array([7, 8, 9]) + start[9]
    weights = np.zeros((17, 4))
    weights[:2, 1:] = [[.5, 0, 1], [100, 0, 100]]
    lines = show.text(Grid.of(tokens, weights), WIDE).splitlines()
    rows = {line[:9].strip(): line[9:].split() for line in lines}
    assert rows['text'] == ['BOS', '_', "EP'", '50']
    assert rows['mine 0'] == ['·', '7', "8'", '9']
    assert rows["theirs 0'"] == ['·', '7', '8', '9']
    assert rows['theirs 1'] == ['·'] * 4
    assert lines[0] == ('K=17  T=4  columns 0..3   weights: text 1 0.5 | mine 0 100 | mine 1..7 0'
                        ' | theirs 0..7 0')
    assert lines[1] == "· nothing   _ pad   EP a word comes next   ' seen, never scored"


@pytest.mark.parametrize('columns', [(5, 5), (9, 4), (-1, 4), (300, 310)])
def test_a_window_outside_the_grid_is_named(columns):
    with pytest.raises(ValueError, match=rf'columns {columns[0]}\.\.{columns[1]} lie outside'):
        show.text(wide(300), WIDE, columns=columns)


@pytest.mark.parametrize('ending, magic', [('png', b'\x89PNG\r\n'), ('svg', b'<?xml'),
                                           ('PDF', b'%PDF')])
@pytest.mark.parametrize('grid, vocab', [(wide(12), WIDE), (flat(60), FLAT)])
def test_pictures(tmp_path, grid, vocab, ending, magic):
    path = tmp_path / f'grid.{ending}'
    show.picture(grid, vocab, str(path), columns=(0, 10), pieces=lambda i: f'p{i}', title='toy')
    assert path.read_bytes().startswith(magic) and path.stat().st_size > 2_000
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_picture_shows_what_stands_in_the_grid(tmp_path):
    """Its labels, read back from the SVG's text, are those of the text form."""
    import matplotlib
    grid = flat(20)
    with matplotlib.rc_context({'svg.fonttype': 'none'}):
        show.picture(grid, FLAT, str(tmp_path / 'grid.svg'), pieces=lambda i: f'piece{i}')
        show.picture(wide(8), WIDE, str(tmp_path / 'a' / 'b' / 'wide.svg'), title='two speakers')
    drawn = (tmp_path / 'grid.svg').read_text()
    assert all(f'>piece{i}<' in drawn for i in grid.tokens[0].tolist() if i != 1_000)
    assert '>[Text]<' in drawn and '>1 stream, columns 0 to 19 of 20<' in drawn
    drawn = (tmp_path / 'a' / 'b' / 'wide.svg').read_text()
    assert all(f'>{row.name}<' in drawn for row in WIDE.rows) and '>two speakers<' in drawn


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"ends in .png, .svg or .pdf, got 'grid.gif'"):
        show.picture(wide(4), WIDE, 'grid.gif')
    (tmp_path / 'grid.png').mkdir()
    with pytest.raises(OSError):
        show.picture(wide(4), WIDE, str(tmp_path / 'grid.png'))
    assert [p.name for p in tmp_path.iterdir()] == ['grid.png']

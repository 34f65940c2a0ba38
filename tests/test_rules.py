# SPDX-License-Identifier: Apache-2.0
"""Is a part of our array read from just the right part of the peer's tensor, however it is cut?"""

import math

import numpy as np
import pytest

from jaxsd.export import rules

CASES = {       # rules of one tensor, and the shapes of our arrays
    'rows': (rules.rule('t', ('x', 'V D', 'V D')), {'x': (11, 4)}),
    'transposed': (rules.rule('t', ('x', 'D V', 'V D')), {'x': (4, 11)}),
    'stretch': (rules.rule('t', ('x', 'V D', 'V D', (3, 5))), {'x': (11, 4)}),
    'heads': (rules.rule('t.{L}', ('x', 'L D N H', '(N H) D')), {'x': (2, 4, 6, 3)}),
    'output': (rules.rule('t.{L}', ('x', 'L N H D', 'D (N H)')), {'x': (2, 6, 3, 4)}),
    'rotary': (rules.rule('t.{L}', ('x', 'L D N (h 2)', '(N 2 h) D')), {'x': (2, 4, 6, 8)}),
    'gate and up': (rules.rule('t.{L}', ('x', 'L D U F', '(U F) D')), {'x': (2, 4, 2, 7)}),
    'columns split': (rules.rule('t', ('x', 'U F D', 'D (U F)')), {'x': (2, 7, 4)}),
    'named': (rules.rule('{U}.{L}', ('x', 'L D U F', 'F D'), U=('gate', 'up')),
              {'x': (2, 4, 2, 7)}),
    'gain': (rules.rule('t.{L}', ('x', 'L D', '1 1 D')), {'x': (2, 5)}),
    'behind one another': (rules.rule('t.{L}', ('x', 'L D N', 'N D'), ('y', 'L D N', 'N D')),
                           {'x': (2, 3, 4), 'y': (2, 3, 5)}),
    'stacked steps': (rules.rule('t', ('x', 'S D E', 'S E D')), {'x': (3, 4, 5)}),
}

ROW = {'rows': (1,), 'transposed': (0,), 'heads': (1,), 'gate and up': (1,)}
"""Our axes that a row of the peer's tensor is made of."""


def gathered(made, tensors, path, shape, region, most):
    """(what lies in `region` of our array, how many numbers were read, the largest rectangle)."""
    held = np.full([b - a for a, b in region], np.nan)
    read, largest = 0, 0
    for piece in made:
        for section in piece.sections:
            if section.path != path:
                continue
            for box in rules.boxes(section, region, most):
                taken = tensors[piece.key][box.there]
                assert taken.shape == tuple(s.stop - s.start for s in box.there)
                read, largest = read + taken.size, max(largest, taken.size)
                at = tuple(slice(s.start - a, s.stop - a)
                           for s, (a, _) in zip(box.at, region, strict=True))
                assert np.isnan(held[at]).all()         # no number twice
                held[at] = box.unfold(taken)
    return held, read, largest


@pytest.mark.parametrize('name', CASES)
def test_any_part_is_what_the_whole_has_there(name):
    """Against exporting the whole, which is written without boxes."""
    rule, shapes = CASES[name]
    rng = np.random.default_rng(7)
    made = list(rules.pieces([rule], shapes))
    ours = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
    tensors = {piece.key: rules.forward(piece, ours) for piece in made}
    assert {k: t.shape for k, t in tensors.items()} == {p.key: p.shape for p in made}
    for path, shape in shapes.items():
        for _ in range(60):
            region = [tuple(sorted(rng.choice(n + 1, 2, replace=False))) for n in shape]
            most = int(rng.choice([1, 5, 12, 1000]))
            held, read, largest = gathered(made, tensors, path, shape, region, most)
            there = ~np.isnan(held)
            want = ours[path][tuple(slice(a, b) for a, b in region)]
            np.testing.assert_array_equal(held[there], want[there])
            if name == 'stretch':       # rows 3..7 of ours have a place in the file
                (a, b), _ = region
                np.testing.assert_array_equal(there.any(1), [3 <= r < 8 for r in range(a, b)])
            else:
                assert there.all()
            if name not in ('rotary', 'columns split', 'output'):   # columns of two axes: whole
                assert read == there.sum()
            if name in ROW:                     # a single row of the peer's is never cut
                assert largest <= max(most, math.prod(b - a for i, (a, b) in enumerate(region)
                                                      if i in ROW[name]))

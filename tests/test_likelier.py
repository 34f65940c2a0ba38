# SPDX-License-Identifier: Apache-2.0
"""Is what a model was given really another's, and is the rest scored as if it stood alone?"""

import numpy as np
import pytest
from test_evaluate import alone, made

from jaxsd import data, evaluate, likelier, reply
from jaxsd.config import ConfigError
from jaxsd.types import NOTHING, Grid, Record, Row, Word

ROWS = (Row('text', 0, 10, 10), Row('mine 0', 10, 10, 10), Row('mine 1', 20, 10, 10))


def grid(text, first, second, scored) -> Grid:
    return Grid.of([text, first, second], np.tile(scored, (3, 1)))


OWN = grid([1, 2, 3, 4, 5], [11, 12, 13, 14, 15], [21, 22, 23, 24, 25], [0, 0, 1, 1, 1])
WRONG = grid([6, 7, 8, 9], [16, 17, 18, 19], [26, 27, 28, 29], [0, 1, 1, 1])


@pytest.mark.parametrize('given, own, wrong, weights', [
    # The columns before the first that is scored: two of mine, one of the other.
    ('before', [[1, 2, 3, 4, 5], [11, 12, 13, 14, 15]], [[6, 3, 4, 5], [16, 13, 14, 15]],
     ([0, 0, 1, 1, 1], [0, 1, 1, 1])),
    # Halves, rounded down; a quarter of five columns is scored, one.
    ('half', [[1, 2, 3, 4, 5], [11, 12, 13, 14, 15]], [[6, 7, 3, 4, 5], [16, 17, 13, 14, 15]],
     ([0, 0, 0, 0, 1], [0, 0, 0, 0, 1])),
    # A row, as far as both go; it is not scored.
    ('text', [[1, 2, 3, 4], [11, 12, 13, 14]], [[6, 7, 8, 9], [11, 12, 13, 14]],
     ([0, 0, 1, 1], [0, 0, 1, 1]))])
def test_what_is_given_by_hand(given, own, wrong, weights):
    made = likelier.given_another(OWN, WRONG, given, ROWS)
    for g, tokens, w in zip(made, (own, wrong), weights, strict=True):
        assert g.tokens[:2].tolist() == tokens
        assert g.weights[1:].tolist() == [w, w]
        assert g.weights[0].tolist() == ([0] * len(w) if given == 'text' else w)


def test_what_is_heard_all_along():
    """Columns that are never learned change, as far as both go, where both have them."""
    own = grid([1, 2, 3, 4, 5], [11, 12, 13, 14, 15], [21, 22, 23, 24, 25], [0, 1, 0, 1, 0])
    wrong = grid([6, 7, 8, 9], [16, 17, 18, 19], [26, 27, 28, 29], [0, 1, 0, 1])
    for g, first in ((own, 0.), (wrong, 10.)):
        g.extra['feats'] = first + np.arange(g.tokens.shape[1] * 2.).reshape(-1, 2)
    mine, mixed = likelier.given_another(own, wrong, 'heard', ROWS)
    assert mine.extra['feats'][:, 0].tolist() == [0, 2, 4, 6]
    assert mixed.extra['feats'].tolist() == [[10, 11], [2, 3], [14, 15], [6, 7]]
    rows = likelier.given_another(own, wrong, 'text', ROWS)     # no column is another's
    assert rows[1].extra['feats'].tolist() == mine.extra['feats'].tolist()
    assert mine.tokens.tolist() == [[1, 2, 3, 4], [11, 12, 13, 14], [21, 22, 23, 24]]
    assert mixed.tokens.tolist() == [[6, 2, 8, 4], [16, 12, 18, 14], [26, 22, 28, 24]]
    assert mine.weights.tolist() == mixed.weights.tolist() == [[0, 1, 0, 1]] * 3
    with pytest.raises(ConfigError, match="given='heard': what is heard lies in other columns"):
        likelier.given_another(OWN, WRONG, 'heard', ROWS)


def test_the_first_columns():
    grid = likelier.first(OWN, 3)
    assert grid.tokens.tolist() == [[1, 2, 3], [11, 12, 13], [21, 22, 23]]
    assert grid.weights.tolist() == [[0, 0, 1]] * 3 and len(grid.position) == 3


def test_what_cannot_be_given():
    for name in ('theirs', 'nothing'):
        with pytest.raises(ConfigError, match=f"'heard' or the name of rows.*mine, got '{name}"):
            likelier.given_another(OWN, WRONG, name, ROWS)


def test_another_says_something_else_in_the_same_voice():
    def record(text, voice):
        return Record(text, 't', 'en', 1.0, words=(Word(text, 0, 0.0, 1.0),), style=(voice,))
    records = [record('a', 'x pace=slow'), record('a', 'x pace=fast'), record('b', 'y'),
               record('c', 'x')]

    def said(r):
        return r.words[0].text
    assert [likelier.other(records, i, said) for i in range(4)] == [3, 3, 3, 0]
    assert likelier.other(records[:2], 0, said) is None
    pairs = likelier.beside_another(records, list('abcd'))
    assert pairs == [('a', 'd'), ('b', 'd'), ('c', 'd'), ('d', 'a')]
    assert likelier.beside_another(records[:2], list('ab')) == []


@pytest.mark.parametrize('name, source, given', [
    ('delayed_tts', 'read', 'text'), ('parler_tts', 'sound', 'before'),
    ('twist', 'speech', 'half')])
def test_matched_is_every_grid_read_alone(name, source, given, corpus):
    lm = made(corpus, name)
    found = evaluate.matched(lm, split='train', limit=3, source=source, given=given, batch=2)
    records = list(data.examples(lm.config, 'train', source, vocab=lm.vocab, limit=3))
    grids = [likelier.first(g, lm.config.columns) for g in reply.drawn(lm, source, records)[0]]
    scores = []
    for pair in likelier.beside_another(records, grids):
        for g in likelier.given_another(*pair, given, lm.vocab.rows):
            rows = alone(lm, g.tokens)
            at = [(k, t) for k, t in np.argwhere(g.weights > 0) if g.tokens[k, t] != NOTHING]
            logp = [rows[k][t - 1, g.tokens[k, t] - lm.vocab.rows[k].start] for k, t in at]
            scores.append(np.average(logp, weights=[g.weights[k, t] for k, t in at]))
    own, wrong = np.array(scores[0::2]), np.array(scores[1::2])
    assert found['items'] == 3 and found['judged'] == ('right %', 50.0)
    assert found['metrics'] == pytest.approx({
        'right %': 100 * np.mean(own > wrong), 'nats': -own.mean(), 'nats/another': -wrong.mean()},
        rel=1e-4)

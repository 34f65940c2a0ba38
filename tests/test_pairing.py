# SPDX-License-Identifier: Apache-2.0
"""Is a choice between two answers what the model's own scores say, in whatever layout?"""

import jax
import numpy as np
import pytest
from test_configs import ROOT, on
from test_evaluate import alone

from jaxsd import config as configs
from jaxsd import data, model, pairing, trained
from jaxsd import stage as stages
from jaxsd.layout import template
from jaxsd.types import Grid, Record, Turn, Word
from jaxsd.vocab import line

LAYOUTS = ('chain', 'interleaved', 'parallel', 'grouped', 'chunks', 'multistream')


def made(corpus, layout) -> trained.LM:
    c = on(corpus, configs.read(f'{ROOT}/configs/ablations/_paradigms.py:tiny,layout={layout}'))
    stage = stages.find(c, None)
    graph, _, _ = model.abstract(c)
    params = jax.tree.map(lambda x: 2 * x, model.init(c, jax.random.key(7)))
    return trained.LM(c, stage, model.make_vocab(c), graph, params, 3, '')


def dialogue(name: str, units: int, question: str, answer: str, gap_s: float = .25) -> Record:
    """A question of a second by channel 1, and an answer of half a second after a pause."""
    end = 1.5 + gap_s
    n = int(end * 8)
    said = (Word(question, 1, .1, .3, (3,)), Word(answer, 0, 1.1 + gap_s, 1.2 + gap_s, (4,)))
    return Record(name, 'dialogue', 'en', end, units=(np.arange(n) + units,
                                                      np.arange(n) + units + 50),
                  words=said, turns=(Turn(1, 0., 1., question),
                                            Turn(0, 1. + gap_s, 1.5 + gap_s, answer)))


def test_an_exchange_of_two_records_by_hand():
    a, b = dialogue('a', 0, 'one', 'two'), dialogue('b', 100, 'three', 'four', gap_s=.5)
    (ea,), (eb,) = (template.exchanges(r, 0) for r in (a, b))
    both = pairing.exchange_of(a, ea, b, eb, 8.0)
    np.testing.assert_array_equal(both.units[0], [*range(10), *range(112, 116)])
    np.testing.assert_array_equal(both.units[1], [*range(50, 60), *range(162, 166)])
    assert both.turns == (Turn(1, 0.0, 1.0, 'one'), Turn(0, 1.25, 1.75, 'four'))
    assert [(w.text, w.channel, round(w.start_s, 6)) for w in both.words] == [
        ('one', 1, .1), ('four', 0, 1.35)]
    same = pairing.exchange_of(a, ea, a, ea, 8.0)
    np.testing.assert_array_equal(same.units[0], a.units[0])
    assert same.turns == a.turns and [w.text for w in same.words] == ['one', 'two']


def test_couples_agree_in_kind_and_differ_in_answer():
    found = [('a', 'place', 'box'), ('b', 'place', 'box'), ('c', 'color', 'red'),
             ('d', 'place', 'bag'), ('e', 'color', 'red'), ('f', 'place', 'tin')]
    assert [(x[0], y[0]) for x, y in pairing.matched(found)] == [('a', 'd'), ('b', 'f')]


def test_the_first_sound_by_hand():
    v = line(dict(size=20, codebooks=1), text_tokens=10)
    u = v.ranges['units'][0]
    a = Grid.of([1, u, u + 1, 5, 6, u + 3, u + 4], [0, 0, 0, 1, 1, 1, 1])
    b = Grid.of([1, u, u + 1, 5, 7, u + 3, u + 5], [0, 0, 0, 1, 1, 1, 1])
    assert pairing.first_sound(a, b, v, None) == 3.0        # two words, and a unit they share
    assert pairing.first_sound(a, b, v, 2 / 7) == 4.0


@pytest.mark.parametrize('layout', [x if x == 'chain' else pytest.param(
    x, marks=pytest.mark.slow) for x in LAYOUTS])
def test_a_choice_is_what_the_scores_say(corpus, layout):
    lm = made(corpus, layout)
    options = dict(configs.plain(lm.config.evals.pairings), split='train', limit=40)
    del options['name']
    found = pairing.pairings(lm, **options)
    assert found['items'] >= 2 and 0 <= found['metrics']['right %'] <= 100
    late = found['per_item']['columns to sound']['sum']
    if layout in ('parallel', 'grouped', 'interleaved'):
        assert max(late) <= 40
    assert min(late) > -5
    drawn = [data.drawn(lm.config, 'dialogue', lm.vocab, r) for r in
             data.examples(lm.config, 'train', 'dialogue', limit=2)]
    told = pairing.log_likelihoods(lm, drawn, 2)
    if layout == 'grouped':         # its rows are said together: no scores of one row alone
        return
    for grid, total in zip(drawn, told, strict=True):
        mine = 0.0
        for row, logp, ids, w in zip(lm.vocab.rows, alone(lm, grid.tokens), grid.tokens,
                                     grid.weights, strict=True):
            mine += sum(logp[t - 1, ids[t] - row.start] for t in np.flatnonzero(w))
        assert total == pytest.approx(mine, rel=1e-4)

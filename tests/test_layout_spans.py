# SPDX-License-Identifier: Apache-2.0
"""Do spans follow the laws of the papers, and do relations say what stands beside what?"""

import hashlib
import itertools
import json
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsd import vocab as vocabs
from jaxsd.layout import flat, spans
from jaxsd.types import Record, Turn, Word

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'layout'
QUICK = settings(derandomize=True, max_examples=60, deadline=None)
CONTINUE, CORRESPOND = '<|continue|>', '<|correspond|>'
RELATED = vocabs.line({'size': 50}, text_tokens=2000, markers=(CONTINUE, CORRESPOND))
MARKED = vocabs.line({'size': 50}, text_tokens=500,
                     markers=('[Text]', '[Speech]', '/h/', '/e/', '/l/', '/o/'))


def clip(words: int, frames_per_word: int = 5, turns=(), phones=()) -> Record:
    """Words of `frames_per_word` frames at 25 Hz, word i with the one id 100 + i."""
    said = tuple(Word(f'w{i}', 0, i * frames_per_word / 25, (i + 1) * frames_per_word / 25,
                      (100 + i,)) for i in range(words))
    units = (np.arange(words * frames_per_word) % 50).astype(np.int16)
    return Record('clip', 'toy', 'en', words * frames_per_word / 25, words=said, units=(units,),
                  turns=tuple(turns), phones=tuple(phones))


# Laws.

LAWS = [lambda n, rng: spans.uniform(n, rng, text=(1, 4), speech=(2, 3)),
        lambda n, rng: spans.poisson(n, rng, mean=3.0, share=0.4),
        lambda n, rng: spans.poisson(n, rng, mean=10.0, share=1.0),
        lambda n, rng: spans.coin(n, rng, share=0.3, spread=0.2)]


@QUICK
@given(st.integers(1, 80), st.integers(0, 2**32), st.sampled_from(LAWS))
def test_every_atom_is_in_one_span(count, seed, law):
    drawn = law(count, np.random.default_rng(seed))
    assert [first for _, first, _ in drawn] == [0, *(stop for _, _, stop in drawn[:-1])]
    assert drawn[-1][2] == count and all(first < stop for _, first, stop in drawn)
    assert {kind for kind, _, _ in drawn} <= {'text', 'speech'}
    assert law(count, np.random.default_rng(seed)) == drawn


def test_poisson_spans_have_the_published_statistics():
    """200 words, spans of Poisson(10) until 30% are spoken: between 30% and 40%, about 32% on
    average; a spoken stretch is about ten words long."""
    shares, runs = [], []
    for seed in range(300):
        spoken = [stop - first for kind, first, stop in spans.poisson(
            200, np.random.default_rng(seed), mean=10.0, share=0.3) if kind == 'speech']
        shares.append(sum(spoken) / 200)
        runs += spoken
    assert 0.30 <= min(shares) and max(shares) <= 0.40
    assert np.mean(shares) == pytest.approx(0.32, abs=0.01)
    assert np.mean(runs) == pytest.approx(9.6, abs=0.5)


def test_poisson_spans_are_thrown_as_the_paper_says():
    """The rule with lists and sets, from the same draws: overlaps are thrown again, and no span
    begins with the word behind another."""
    for seed in range(60):
        rng, spoken, eligible = np.random.default_rng(seed), set(), list(range(60))
        while len(spoken) < math.ceil(0.4 * 60):
            first = eligible[rng.integers(len(eligible))]
            span = set(range(first, min(60, first + rng.poisson(4.0))))
            if span and not span & spoken:
                spoken |= span
                eligible = [i for i in eligible if i not in span and i != max(span) + 1]
        drawn = spans.poisson(60, np.random.default_rng(seed), mean=4.0, share=0.4)
        assert {i for kind, a, b in drawn if kind == 'speech' for i in range(a, b)} == spoken


def test_a_fixed_ratio_and_a_coin():
    drawn = spans.uniform(40, np.random.default_rng(0), text=(3, 3), speech=(5, 5))
    assert {(k, b - a) for k, a, b in drawn[:-1]} == {('text', 3), ('speech', 5)}
    share = np.mean([kind == 'speech' for kind, _, _ in spans.coin(
        20_000, np.random.default_rng(0), share=0.3)])
    assert share == pytest.approx(0.3, abs=0.01)
    each = [np.mean([k == 'speech' for k, _, _ in spans.coin(
        400, np.random.default_rng(seed), share=0.5, spread=0.5)]) for seed in range(200)]
    assert min(each) < 0.1 and max(each) > 0.9 and np.mean(each) == pytest.approx(0.5, abs=0.06)


# Atoms.

def test_segments_are_snapped_to_words():
    """About ten seconds each: floor(N / 500) + 1 are wished for, borders lie between words."""
    rng = np.random.default_rng(0)
    middles = np.cumsum(rng.uniform(5, 30, 120))
    frames = int(middles[-1] + 10)
    counts, firsts = [], []
    for seed in range(200):
        inner = spans.segments(middles, frames, np.random.default_rng(seed), 500.0)
        assert inner == sorted(set(inner)) and all(1 <= i <= 120 for i in inner)
        counts.append(len(inner))
        firsts.append(middles[inner[0] - 1])
    assert max(counts) == frames // 500 and np.mean(counts) > 0.9 * (frames // 500)
    assert np.std(firsts) > 100         # drawn, not even
    assert spans.segments(middles[:20], 400, rng, 500.0) == []      # short: one segment
    assert spans.segments(np.array([]), 4000, rng, 500.0) == []     # a word cannot be cut


def test_levels_of_one_utterance():
    """The same words and times, cut as phones, words, and turns."""
    phones = [Word(p, 0, i * 0.1, (i + 1) * 0.1) for i, p in enumerate('helo')]
    turns = (Turn(0, 0.0, 0.2, ''), Turn(0, 0.2, 0.4, ''))
    words = tuple(Word('w', 0, i * 0.1, (i + 1) * 0.1, (100 + i,)) for i in range(4))
    record = Record('r', 'toy', 'en', 0.4, words=words, units=(np.arange(10),), turns=turns,
                    phones=tuple(phones))

    def rows(level, **options):
        found = set()
        for seed in range(40):
            grid = flat.interleave(record, vocab=MARKED, rng=np.random.default_rng(seed),
                                   level=level, text_words=(1, 1), speech_words=(1, 1), **options)
            found.add(' '.join(said(grid, MARKED)))
        return found
    assert rows('word') == {
        '[Text] t100 [Speech] u2 u3 u4 [Text] t102 [Speech] u7 u8 u9',
        '[Speech] u0 u1 [Text] t101 [Speech] u5 u6 [Text] t103'}
    assert rows('phone') == {
        '[Text] /h/ [Speech] u2 u3 u4 [Text] /l/ [Speech] u7 u8 u9',
        '[Speech] u0 u1 [Text] /e/ [Speech] u5 u6 [Text] /o/'}
    assert rows('utterance') == {
        '[Text] t100 t101 [Speech] u5 u6 u7 u8 u9', '[Speech] u0 u1 u2 u3 u4 [Text] t102 t103'}
    # The whole of it, said twice: correspondence at the level of utterances and of words.
    once = rows('utterance', again=1.0)
    assert '[Text] t100 t101 [Speech] u0 u1 u2 u3 u4 u5 u6 u7 u8 u9 [Text] t102 t103' in once
    assert '[Text] t100 [Speech] u0 u1 u2 u3 u4 [Text] t101 t102 [Speech] u5 u6 u7 u8 u9 [Text] ' \
        't103' in rows('word', again=1.0)


def said(grid, vocab) -> list[str]:
    """What stands in a row after BOS: names of markers, t100, u7."""
    return [vocab.special_name(t) or vocab.name(t)[0][0] + str(vocab.name(t)[1])
            for t in grid.tokens[0, 1:].tolist()]


# Relations.

def related(words: list, units: list, choices) -> list[str]:
    """A row by the paper's rule: for each segment its main modality and whether it corresponds."""
    out, last = [], None
    for w, u, (main, again) in zip(words, units, choices, strict=True):
        for i, now in enumerate([main, not main] if again else [main]):
            if i:
                out.append(CORRESPOND)
            elif last is not None and now != last:
                out.append(CONTINUE)
            out += u if now else w
            last = now
    return out


def test_relations_are_what_the_rule_allows():
    """Two segments, two coins each: exactly the sixteen rows that the rule writes, drawn by hand
    among them."""
    record = clip(4, turns=(Turn(0, 0.0, 0.4, ''), Turn(0, 0.4, 0.8, '')))
    words = [['t100', 't101'], ['t102', 't103']]
    units = [[f'u{i}' for i in range(10)], [f'u{i}' for i in range(10, 20)]]
    legal = {tuple(related(words, units, [(a, b), (c, d)]))
             for a, b, c, d in itertools.product((False, True), repeat=4)}
    rows = set()
    for seed in range(300):
        grid = flat.interleave(record, vocab=RELATED, rng=np.random.default_rng(seed), again=0.5,
                               level='utterance', spans=dict(name='coin', share=0.5), end='eos',
                               relations=(CONTINUE, CORRESPOND))
        assert grid.weights[0].tolist() == [0.0] + [1.0] * (grid.tokens.shape[1] - 1)
        row = said(grid, RELATED)
        assert row.pop() == 'eos'
        rows.add(tuple(row))
    assert rows == legal
    u = ' '.join
    assert tuple(f'{u(units[0])} {CONTINUE} t102 t103 {CORRESPOND} {u(units[1])}'.split()) in rows
    assert tuple(f't100 t101 {CORRESPOND} {u(units[0])} {u(units[1])}'.split()) in rows


def test_relations_have_the_derived_statistics():
    """Each modality of a segment appears with 0.75, half the segments correspond, and about half of
    the later ones begin with a token of continuation."""
    record = clip(1500)
    text = speech = segments = corresponding = continued = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        grid = flat.interleave(record, vocab=RELATED, rng=rng, level='segment', segment_s=2.0,
                               spans=dict(name='coin', share=0.5), again=0.5,
                               relations=(CONTINUE, CORRESPOND))
        row = said(grid, RELATED)
        corresponding += row.count(CORRESPOND)
        continued += row.count(CONTINUE)
        text += sum(t[0] == 't' for t in row)
        speech += sum(t[0] == 'u' for t in row)
        segments += 1 + len(spans.segments(
            spans.borders(record.words, 25.0)[1:-1], 7500, np.random.default_rng(seed), 50.0))
    assert text / (8 * 1500) == pytest.approx(0.75, abs=0.03)
    assert speech / (8 * 7500) == pytest.approx(0.75, abs=0.03)
    assert corresponding / segments == pytest.approx(0.5, abs=0.04)
    assert continued / segments == pytest.approx(0.5, abs=0.04)


# Streams merged by time.

SIDES = (('style', 1.0, False), ('pitch', 12.5, True))
TOLD = vocabs.line({'size': 501}, text_tokens=32_000, sides=(('pitch', 64), ('style', 100)))
SHORT = {'units': 'Hu', 'pitch': 'Pi', 'style': 'St'}


def merged(units, pitch, style, unit_hz=25.0) -> str:
    record = Record('r', 'toy', 'en', len(units) / 25, units=(np.array(units),),
                    sides=dict(pitch=(np.array(pitch),), style=(np.array(style),)))
    grid = flat.sequence(record, vocab=TOLD, rng=None, sides=SIDES, unit_hz=unit_hz)
    assert grid.tokens[0, :2].tolist() == [1, 32_001]
    return ''.join(f'[{SHORT[n]}{i}]'
                   for n, i in map(TOLD.name, grid.tokens[0, 2:].tolist()))


def test_side_streams_are_told_by_time():
    assert merged([5, 5, 6, 7, 7], [1, 1, 2], [9]) == '[St9][Pi1][Hu5][Hu6][Hu7][Pi2]'
    assert TOLD.encode('units', 500) == 32_502 and TOLD.encode('pitch', 0) == 32_503
    assert TOLD.encode('style', [0, 99]).tolist() == [32_567, 32_666] and TOLD.size == 32_768


def test_a_side_token_belongs_to_the_span_in_which_it_begins():
    """Three pitches at frames 0, 2 and 4; a border at frame 4 leaves the third to what follows,
    while the unit that ends there belongs to what came before."""
    record = Record('r', 'toy', 'en', 0.24, units=(np.arange(6),),
                    sides=dict(pitch=(np.array([7, 8, 9]),)))
    parts = flat.tracks(record, 0, TOLD, dedup=True, unit_hz=25.0, sides=SIDES[1:], within=None)
    names = [[''.join(map(str, (SHORT[n], i))) for n, i in map(TOLD.name, ids.tolist())]
             for ids in (flat.merged(parts, last=4.0), flat.merged(parts, 4.0))]
    assert names == [['Pi7', 'Hu0', 'Hu1', 'Pi8', 'Hu2', 'Hu3'], ['Pi9', 'Hu4', 'Hu5']]


def test_side_streams_need_the_rate_of_the_units():
    with pytest.raises(ValueError, match='by time: say layout.unit_hz'):
        merged([5], [1], [9], unit_hz=None)


def test_the_released_tokenizer_tells_the_same():
    """The nine seconds of spiritlm's tests/test_tokenizer.py: its streams, and the hash of its
    string of 167 units, 90 pitches and 10 styles."""
    with open(GOLDEN / 'merged_streams.json', encoding='utf-8') as f:
        released = json.load(f)
    told = merged(released['units'], released['pitch'], released['style'])
    assert (told.count('Hu'), told.count('Pi'), told.count('St')) == (167, 90, 10)
    assert hashlib.sha256(told.encode()).hexdigest() == released['sha256']


@settings(derandomize=True, max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 12), st.booleans())
def test_interleaving_loses_no_side_token(seed, words, dedup):
    """What one drawing writes the other speaks: together they tell each stream once, in order."""
    rng = np.random.default_rng(seed)
    base = clip(words, int(rng.integers(1, 9)))
    units = rng.integers(0, 4, len(base.units[0]))
    pitch = rng.integers(0, 4, -(-len(units) // 2))
    record = Record('r', 'toy', 'en', base.duration_s, words=base.words, units=(units,),
                    sides=dict(pitch=(pitch,), style=(np.arange(-(-len(units) // 25)),)))
    sides = (('style', 1.0, False), ('pitch', 12.5, dedup))
    wanted = flat.merged(flat.tracks(record, 0, TOLD, dedup=dedup, unit_hz=25.0, sides=sides,
                                     within=None))
    heard = {}
    for start in range(8):          # until both kinds of beginnings were drawn
        grid = flat.interleave(record, vocab=TOLD, rng=np.random.default_rng(start),
                               text_words=(1, 1), speech_words=(1, 1), dedup=dedup, sides=sides)
        at, spoken = 0, False
        for token in grid.tokens[0, 1:].tolist():
            if token in (32_000, 32_001):
                spoken = token == 32_001
                at += spoken        # a spoken word
                if spoken:
                    heard[at - 1] = []
            elif spoken:
                heard[at - 1].append(token)
            else:
                at = token - 100 + 1
    told = [t for at in sorted(heard) for t in heard[at]]
    for kind in ('units', 'pitch', 'style'):
        assert [t for t in told if TOLD.name(t)[0] == kind] == [
            t for t in wanted.tolist() if TOLD.name(t)[0] == kind]


@pytest.mark.parametrize('options, says', [
    (dict(level='syllable'), 'layout.level must be one of phone, word, segment, utterance'),
    (dict(level='phone'), 'clip: it has no phones'),
    (dict(again=1.5), 'layout.again is a probability, got 1.5'),
    (dict(relations=('[Text]',)), 'layout.relations names two markers'),
    (dict(relations=(CONTINUE, CORRESPOND)), r'needs <\|continue\|> and <\|correspond\|>'),
    (dict(spans=dict(name='poison')), "no option 'poison'.*did you mean 'poisson'"),
    (dict(spans=dict(name='coin', share=2.0)), 'layout.spans.share is a probability'),
    (dict(spans=dict(name='coin', mean=2.0)), "no option 'mean'"),
    (dict(sides=SIDES), "clip has no stream 'style'")])
def test_bad_options_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        flat.interleave(clip(4), vocab=MARKED, rng=np.random.default_rng(0), **options)

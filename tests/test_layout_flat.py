# SPDX-License-Identifier: Apache-2.0
"""Is text and speech in one row what the papers draw, and is nothing lost or said twice?"""

import itertools
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsd import vocab as vocabs
from jaxsd.layout import flat, show
from jaxsd.types import Record, Word

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'layout'
VOCAB = vocabs.line({'size': 501}, text_tokens=32_000)
TEXT, SPEECH = VOCAB.specials['[Text]'], VOCAB.specials['[Speech]']
PIECES = ['<unk>', '<s>', '</s>', '', 'the', 'cat', 'sat', 'on', 'mat', 'hello', 'there', 'this',
          'is', 'a', 'text', 'sentence', '.']
QUICK = settings(derandomize=True, max_examples=60, deadline=None)


def word(text: str, start_s: float = 0.0, end_s: float = 0.0, channel: int = 0) -> Word:
    ids = [PIECES.index(text.rstrip('.')), *[PIECES.index('.')] * text.endswith('.')]
    return Word(text, channel, start_s, end_s, tuple(ids))


def record(words=(), units=(), codes=None) -> Record:
    return Record('clip 7', 'toy', 'en', 1.0, codes=codes, words=tuple(words),
                  units=tuple(np.array(u, np.int16) for u in units))


def starting(kind: str) -> np.random.Generator:
    """A generator whose first draw makes an interleaving start with `kind`."""
    seed = next(s for s in itertools.count()
                if ('text', 'speech')[np.random.default_rng(s).integers(2)] == kind)
    return np.random.default_rng(seed)


# 28 frames at 25 Hz: silence, "the cat sat on", silence, "the mat", silence. `sat` and `on` share
# the run of unit 7 (frames 12 and 13; the border between them is at 13).
SENTENCE = record(
    [word('the', .12, .24), word('cat', .24, .40), word('sat', .40, .52), word('on', .52, .64),
     word('the', .80, .88), word('mat', .88, 1.0)],
    [[0, 0, 0, 1, 1, 2, 4, 4, 5, 5, 3, 3, 7, 7, 200, 200, 0, 0, 0, 0, 1, 2, 6, 6, 9, 0, 0, 0]])
PAIR = record([word('hello'), word('there')], [[262, 262, 208, 499, 499, 499, 105]])
PROSE = record([word(w) for w in 'this is a text sentence.'.split()])

DRAWN = {
    'text_only': lambda: flat.sequence(PROSE, vocab=VOCAB, rng=None, fields=('text',)),
    'speech_only': lambda: flat.sequence(PAIR, vocab=VOCAB, rng=None),
    'speech_only_undeduplicated': lambda: flat.sequence(PAIR, vocab=VOCAB, rng=None, dedup=False),
    'recognition': lambda: flat.sequence(PAIR, vocab=VOCAB, rng=None, fields=('speech', 'text'),
                                         score=('text',), end='eos'),
    'synthesis': lambda: flat.sequence(PAIR, vocab=VOCAB, rng=None, fields=('text', 'speech')),
    'interleaved_text_first': lambda: flat.interleave(
        SENTENCE, vocab=VOCAB, rng=starting('text'), text_words=(2, 2), speech_words=(2, 2)),
    'interleaved_speech_first': lambda: flat.interleave(
        SENTENCE, vocab=VOCAB, rng=starting('speech'), text_words=(2, 2), speech_words=(2, 2)),
    'interleaved_words_text_first': lambda: flat.interleave(
        SENTENCE, vocab=VOCAB, rng=starting('text'), text_words=(1, 1), speech_words=(1, 1)),
    'interleaved_words_speech_first': lambda: flat.interleave(
        SENTENCE, vocab=VOCAB, rng=starting('speech'), text_words=(1, 1), speech_words=(1, 1),
        end='eos'),
}


@pytest.mark.parametrize('name', DRAWN)
def test_drawn_by_hand(name):
    assert show.text(DRAWN[name](), VOCAB, pieces=PIECES.__getitem__) + '\n' == (
        GOLDEN / f'{name}.txt').read_text()


def test_released_id_map():
    """Text 0-31999, markers 32000 and 32001, unit u at 32002 + u (spiritlm model/utils.py)."""
    ids = flat.sequence(record(units=[[0, 500]]), vocab=VOCAB, rng=None).tokens[0]
    assert ids.tolist() == [1, 32_001, 32_002, 32_502]
    assert flat.speech_tokens([3, 3, 4], VOCAB).tolist() == [32_005, 32_006]
    assert flat.speech_tokens([3, 3, 4], VOCAB, dedup=False).tolist() == [32_005, 32_005, 32_006]
    assert VOCAB.size == 32_512


@pytest.mark.parametrize('score, want', [
    (('text', 'speech', 'markers'), [0, 1, 1, 1, 1, 1, 1, 1, 1]),
    (('speech',), [0, 0, 1, 1, 1, 0, 0, 0, 0]),
    (('text',), [0, 0, 0, 0, 0, 0, 1, 1, 1]),
    (('markers',), [0, 1, 0, 0, 0, 1, 0, 0, 0]),
    ((), [0] * 9),
])
def test_score_masks_typed_fields(score, want):
    pair = record([word('hello'), word('there')], [[5, 6, 7, 7]])
    grid = flat.sequence(pair, vocab=VOCAB, rng=None, fields=('speech', 'text'), score=score,
                         end='eos')
    assert grid.weights[0].tolist() == want


def test_runs():
    for units, values, ends in (([], [], []), ([4], [4], [1]), ([4, 4], [4], [2]),
                                ([4, 4, 5, 4], [4, 5, 4], [2, 3, 4])):
        got = flat.runs(units)
        assert got[0].tolist() == values and got[1].tolist() == ends


spoken = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)), min_size=1, max_size=40)


@st.composite
def utterances(draw):
    """Words of 0-12 frames with gaps of 0-5, on units of a small alphabet so that runs are long.

    Every word has an id of its own, so that a grid tells which words it wrote.
    """
    words, t = [], draw(st.integers(0, 6))
    for i, (length, gap) in enumerate(draw(spoken)):
        words.append(Word(f'w{i}', 0, t / 25, (t + length) / 25, (100 + i,)))
        t += length + gap
    frames = t + draw(st.integers(1, 8))
    return record(words, [draw(st.lists(st.integers(0, 3), min_size=frames, max_size=frames))])


def stretches(grid) -> list[tuple[int, list[int]]]:
    """(marker, what follows it) for each stretch after BOS."""
    out = []
    for token in grid.tokens[0, 1:].tolist():
        if token in (TEXT, SPEECH):
            out.append((token, []))
        else:
            out[-1][1].append(token)
    return out


lengths = st.tuples(st.integers(1, 4), st.integers(0, 4)).map(lambda x: (x[0], x[0] + x[1]))


@QUICK
@given(utterances(), st.integers(0, 2**32), lengths, lengths, st.booleans())
def test_every_word_is_written_or_spoken(utterance, seed, text_words, speech_words, dedup):
    grid = flat.interleave(utterance, vocab=VOCAB, rng=np.random.default_rng(seed),
                           text_words=text_words, speech_words=speech_words, dedup=dedup)
    words, units = utterance.words, utterance.units[0]

    # An owner for every run, by the definition: how many borders lie at or before its last frame.
    owned = []
    for t, unit in enumerate(units.tolist(), start=1):
        if dedup and t < len(units) and units[t] == unit:
            continue
        borders = [(a.end_s + b.start_s) / 2 * 25 for a, b in itertools.pairwise(words)]
        owned.append((sum(t > b + 1e-6 for b in borders), 32_002 + unit))

    found = stretches(grid)
    assert all(a[0] != b[0] for a, b in itertools.pairwise(found)), 'a marker at every switch only'
    at = 0
    for i, (marker, tokens) in enumerate(found):
        if marker == TEXT:
            assert tokens == list(range(100 + at, 100 + at + len(tokens)))
            at += len(tokens)
        else:
            after = found[i + 1][1][0] - 100 if i + 1 < len(found) else len(words)
            assert tokens and tokens == [u for w, u in owned if at <= w < after]
            at = after
    assert at == len(words)
    assert grid.weights.sum() == grid.tokens.size - 1 and grid.weights[0, 0] == 0


@QUICK
@given(utterances(), st.integers(1, 5))
def test_complementary_spans_say_every_run_once(utterance, length):
    """What one drawing writes, the other speaks: together they say each unit once and in order."""
    drawn = [flat.interleave(utterance, vocab=VOCAB, rng=starting(kind),
                             text_words=(length, length), speech_words=(length, length))
             for kind in ('text', 'speech')]
    wrote = [{} for _ in drawn]
    for order, grid in zip(wrote, drawn, strict=True):
        at = 0
        for marker, tokens in stretches(grid):
            # The words written so far tell at which word a spoken stretch starts.
            if marker == TEXT:
                at = tokens[-1] - 100 + 1
            else:
                order[at] = tokens
    both = [tokens for _, tokens in sorted((wrote[0] | wrote[1]).items())]
    assert not set(wrote[0]) & set(wrote[1])
    assert sum(both, []) == flat.speech_tokens(utterance.units[0], VOCAB).tolist()


def test_spans_are_redrawn():
    words = [Word('w', 0, t / 25, (t + 1) / 25, (9,)) for t in range(200)]
    clip = record(words, [np.arange(200) % 7])
    draw = [flat.interleave(clip, vocab=VOCAB, rng=np.random.default_rng(seed)).tokens
            for seed in (0, 0, 1, 2, 3)]
    assert np.array_equal(draw[0], draw[1])
    assert len({d.tobytes() for d in draw[1:]}) == 4
    rng = np.random.default_rng(0)
    again = [flat.interleave(clip, vocab=VOCAB, rng=rng).tokens.tobytes() for _ in range(5)]
    assert len(set(again)) == 5, 'the same generator draws anew at every call'
    firsts = {int(d[0, 1]) for d in draw}
    assert firsts == {TEXT, SPEECH}


def test_a_third_of_the_words_is_spoken():
    """Spans of 10-30 and 5-15 words: 1/3 of words spoken, and at 5 units a word 5/7 of tokens."""
    words = [Word('w', 0, t / 5, (t + 1) / 5, (9,)) for t in range(2_000)]
    clip = record(words, [np.arange(10_000) % 7])
    text = speech = 0
    rng = np.random.default_rng(0)
    for _ in range(40):
        for marker, tokens in stretches(flat.interleave(clip, vocab=VOCAB, rng=rng)):
            text += len(tokens) * (marker == TEXT)
            speech += len(tokens) * (marker == SPEECH)
    assert speech / 5 / (text + speech / 5) == pytest.approx(1 / 3, abs=0.01)
    assert speech / (text + speech) == pytest.approx(5 / 7, abs=0.01)


def test_unit_rate_is_an_option():
    """The same times at 50 Hz cut twice as many units."""
    clip = record([word('the', 0, .4), word('cat', .4, .8)], [np.arange(40)])
    spoken = [stretches(flat.interleave(clip, vocab=VOCAB, rng=starting('speech'), unit_hz=hz,
                                        text_words=(1, 1), speech_words=(1, 1)))[0][1]
              for hz in (25.0, 50.0)]
    assert [len(s) for s in spoken] == [10, 20]


def test_single_precision_times_move_no_border():
    """0.24 s stored in single precision is 5.9999998 frames, and still the sixth border."""
    clip = record([word('the', 0., float(np.float32(.24))),
                   word('cat', float(np.float32(.24)), .4)], [np.arange(10)])
    grid = flat.interleave(clip, vocab=VOCAB, rng=starting('speech'), text_words=(1, 1),
                           speech_words=(1, 1))
    assert stretches(grid)[0][1] == list(range(32_002, 32_008))


def test_words_that_overlap_or_hold_no_run():
    """A word inside another, and one too short for a run to end in it, lose and repeat nothing."""
    clip = record([word('the', 0., .8), word('cat', .04, .08), word('sat', .08, .08),
                   word('on', .8, 1.2)], [np.arange(30)])
    for kind in ('text', 'speech'):
        found = stretches(flat.interleave(clip, vocab=VOCAB, rng=starting(kind), text_words=(1, 1),
                                          speech_words=(1, 1)))
        said = [t for marker, tokens in found if marker == SPEECH for t in tokens]
        assert said == sorted(set(said)) and all(tokens for _, tokens in found)
        assert len(found) == len(list(itertools.groupby(m for m, _ in found)))


def test_channel_of_a_dialogue():
    dialogue = record([word('hello', 0., .2, 0), word('there', .1, .3, 1), word('cat', .3, .4, 0)],
                      [[1] * 10, [2] * 10])
    for channel, text, unit in ((0, [9, 5], 1), (1, [10], 2)):
        grid = flat.sequence(dialogue, vocab=VOCAB, rng=None, fields=('text', 'speech'),
                             channel=channel)
        assert grid.tokens[0].tolist() == [1, TEXT, *text, SPEECH, 32_002 + unit]
        mixed = flat.interleave(dialogue, vocab=VOCAB, rng=starting('speech'), channel=channel)
        assert mixed.tokens[0].tolist() == [1, SPEECH, 32_002 + unit]
    for channel in (2, -1):
        with pytest.raises(ValueError, match=f'layout.channel is 0 or 1, .*, got {channel}'):
            flat.sequence(dialogue, vocab=VOCAB, rng=None, channel=channel)
    # A record with one channel is that channel, whatever the option says.
    assert flat.sequence(PAIR, vocab=VOCAB, rng=None, channel=1).tokens.shape == (1, 6)


@pytest.mark.parametrize('call, message', [
    (lambda: flat.sequence(PROSE, vocab=VOCAB, rng=None), 'clip 7 has no units'),
    (lambda: flat.interleave(PROSE, vocab=VOCAB, rng=starting('text')), 'clip 7 has no units'),
    (lambda: flat.sequence(record(units=[[1]]), vocab=VOCAB, rng=None, fields=('text',)),
     'clip 7: its text is empty'),
    (lambda: flat.interleave(record(units=[[1]]), vocab=VOCAB, rng=starting('text')),
     'clip 7: no words on channel 0'),
    (lambda: flat.sequence(record(units=[[501]]), vocab=VOCAB, rng=None),
     r'clip 7: units ids must lie in 0\.\.500, got 501'),
    (lambda: flat.sequence(record([Word('cat', 0, 0, 0)]), vocab=VOCAB, rng=None,
                           fields=('text',)), "clip 7: the word 'cat' has no ids"),
    (lambda: flat.sequence(PAIR, vocab=VOCAB, rng=None, fields=('speech', 'image')),
     'layout.fields must name fields among text, speech'),
    (lambda: flat.sequence(PAIR, vocab=VOCAB, rng=None, fields=()), 'layout.fields'),
    (lambda: flat.sequence(PAIR, vocab=VOCAB, rng=None, score=('units',)), 'layout.score'),
    (lambda: flat.sequence(PAIR, vocab=VOCAB, rng=None, end='stop'),
     "layout.end must be one of none, eos, got 'stop'"),
    (lambda: flat.interleave(SENTENCE, vocab=vocabs.line({'size': 501}, text_tokens=9,
                                                         markers=('[Text]',)),
                             rng=starting('text')), r'needs \[Text\] and \[Speech\] in vocab.mark'),
    (lambda: flat.interleave(SENTENCE, vocab=VOCAB, rng=starting('text'), text_words=(0, 3)),
     'layout.text_words must be'),
    (lambda: flat.interleave(SENTENCE, vocab=VOCAB, rng=starting('text'), speech_words=(4, 3)),
     'layout.speech_words must be'),
    (lambda: flat.sequence(PAIR, vocab=vocabs.streams({'size': 9, 'codebooks': 1}, text_tokens=9),
                           rng=None), 'needs the vocabulary of vocab.line'),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

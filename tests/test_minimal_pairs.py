# SPDX-License-Identifier: Apache-2.0
"""Pairs of the demo corpus: is one of them right, the other wrong, and nothing else different?"""

import csv
import filecmp

import numpy as np
import pytest
import soundfile
from test_evaluate import made as untrained

from data_pipelines import demo, espeak, grammar, minimal_pairs
from jaxsd import evaluate, likelier


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp('pairs') / 'out'
    assert minimal_pairs.main(['--out', str(out), '--items', '6']) == 0
    return out


def test_a_non_word_differs_by_a_letter_and_sounds_as_no_word():
    found = minimal_pairs.pairs('words', 40, 0)
    sounds = {minimal_pairs.sound_of(w): w for w in grammar.vocabulary()}
    assert len(found) == len({right for right, _ in found}) == 40
    for right, wrong in found:
        assert right in grammar.vocabulary() and wrong not in grammar.vocabulary()
        assert sum(a != b for a, b in zip(right, wrong, strict=True)) == 1
        assert minimal_pairs.sound_of(wrong) not in sounds
    # "read" alone sounds as "red", which is a word: spelled otherwise, and yet no non-word.
    assert minimal_pairs.sound_of('redd') == minimal_pairs.sound_of('red')


def test_a_wrong_sentence_has_two_words_in_each_others_place():
    train = set(grammar.sentences('train'))
    found = minimal_pairs.pairs('sentences', 40, 0)
    assert len(found) == 40
    for right, wrong in found:
        a, b = right.split(), wrong.split()
        assert right in grammar.sentences('test') and right not in train
        assert wrong not in train and wrong not in grammar.sentences('test')
        odd = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        assert odd == [odd[0], odd[0] + 1] and a[odd[0]] == b[odd[1]] and a[odd[1]] == b[odd[0]]


@pytest.mark.parametrize('kind', ['words', 'sentences'])
def test_the_list_is_that_of_the_task_and_both_are_said_alike(made, kind):
    items = likelier.gold_pairs(str(made / kind / 'gold.csv'))
    assert len(items) == 6 and all(len(voices) == 2 for voices in items.values())
    with open(made / kind / 'gold.csv', newline='') as f:
        texts = {row['filename']: row['text'] for row in csv.DictReader(f)}
    assert {p.name for p in (made / kind).glob('*.wav')} == set(texts)
    for i, voices in enumerate(items.values()):
        for pair in voices:
            said = tuple(texts[name] for name in pair)
            assert said == minimal_pairs.pairs(kind, 6, 0)[i]
            lengths = []
            for name in pair:
                wav, hz = soundfile.read(made / kind / name)
                assert hz == espeak.SAMPLE_RATE_HZ and 0.02 < np.abs(wav).max() < 1
                lengths.append(len(wav) / hz)
            assert abs(lengths[0] - lengths[1]) < 0.5
            assert pair[0].split('-', 1)[1].rsplit('-', 1)[0] in demo.VOICES


def test_stories_end_wrongly_in_two_ways():
    told = {s.sentences for split in ('train', 'test') for s in grammar.stories(split)}
    for kind in ('stories', 'topics'):
        found = minimal_pairs.endings(kind, 40, 0)
        assert len(found) == len({first + second for first, second, _ in found}) == 40
        for first, second, wrong in found:
            assert (first, second) in told and (first, wrong) not in told and wrong != second
            a, b = second.split(), wrong.split()
            if kind == 'stories':       # a word or a place of its kind in the place of another
                assert sum(x == y for x, y in zip(a, b, strict=False)) + 3 >= min(len(a), len(b))


@pytest.mark.parametrize('kind', ['stories', 'topics'])
def test_stories_are_read_by_their_task(made, kind, corpus):
    names = {p.name for p in (made / kind).iterdir()}
    assert names == {f'{i:04d}_{part}.{end}' for i in range(6) for end in ('wav', 'txt')
                     for part in ('mutual', 'correct', 'incorrect')}
    texts = [tuple((made / kind / f'{i:04d}_{part}.txt').read_text().strip()
                   for part in ('mutual', 'correct', 'incorrect')) for i in range(6)]
    assert texts == minimal_pairs.endings(kind, 6, 0)
    found = evaluate.cloze(untrained(corpus, 'spirit_lm'), split='', limit=4, path=str(made / kind))
    assert found['items'] == 4
    assert {f'right %/{a}->{b}' for a in 'ST' for b in 'ST'} <= set(found['metrics'])


def test_the_same_again_and_never_over_what_is_there(made, tmp_path, capsys):
    again = tmp_path / 'again'
    assert minimal_pairs.build(str(again), items=6) == dict(
        words=6, sentences=6, stories=6, topics=6)
    for kind, files in dict(words=25, sentences=25, stories=36, topics=36).items():
        names = [p.name for p in (made / kind).iterdir()]
        match, other, lost = filecmp.cmpfiles(made / kind, again / kind, names, shallow=False)
        assert not other and not lost and len(match) == files
    assert minimal_pairs.main(['--out', str(again)]) == 1
    assert 'is there already; remove it, or name another --out' in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ['again']

# SPDX-License-Identifier: Apache-2.0
"""Is every id on the line where the released systems have it, and is a wrong one refused?"""

import io

import numpy as np
import pytest
import sentencepiece

from jaxsd import vocab


def test_line_is_the_released_map():
    """Spirit-LM: text 0-31999, [Text] 32000, [Speech] 32001, units 32002-32502, padded to 32512."""
    v = vocab.line({'size': 501}, text_tokens=32_000)
    assert v.ranges == {'text': (0, 32_000), 'markers': (32_000, 2), 'units': (32_002, 501)}
    assert v.specials == {'bos': 1, 'eos': 2, '[Text]': 32_000, '[Speech]': 32_001}
    assert v.size == 32_512 and v.rows == (('tokens', 0, 32_512, 32_512),)
    assert v.encode('units', [0, 500]).tolist() == [32_002, 32_502]
    assert v.encode('units', []).shape == (0,)


def test_streams_are_the_released_map():
    """Moshi: one text row of 32000 + 1, sixteen of 2048 + 1, the initial token last in each."""
    v = vocab.streams({'size': 2048, 'codebooks': 8}, text_tokens=32_000)
    assert [row.name for row in v.rows] == ['text', *(f'mine {k}' for k in range(8)),
                                            *(f'theirs {k}' for k in range(8))]
    assert [row.size for row in v.rows] == [32_001] + [2049] * 16
    assert [row.predicted for row in v.rows] == [32_000] + [2048] * 8 + [0] * 8
    assert v.size == 32_001 + 16 * 2049
    local = [vocab.initial(row) - row.start for row in v.rows]
    assert local == [32_000] + [2048] * 16
    assert v.specials == {'bos': 1, 'eos': 2, 'pad': 3, 'epad': 0}
    assert v.sizes(64) == (v.rows, v.size, 64)


def test_rows_tile_the_line():
    v = vocab.streams({'size': 10, 'codebooks': 3}, text_tokens=20, multiple=64,
                      predicted=('mine', 'theirs'))
    at = 0
    for row in v.rows:
        assert row.start == at and v.ranges[row.name] == (row.start, row.size)
        at += row.size
    assert at <= v.size == 128 and all(row.predicted == row.size - 1 for row in v.rows)
    heard = vocab.streams({'size': 10, 'codebooks': 3}, text_tokens=20, speakers=('theirs',),
                          predicted=())
    assert [row.predicted for row in heard.rows] == [20, 0, 0, 0]


def test_special_ids_are_options():
    v = vocab.line({'size': 3}, text_tokens=5, bos=3, eos=4, markers=('[A]', '[B]', '[C]'),
                   multiple=1, tokenizer='text.model')
    assert v.specials == {'bos': 3, 'eos': 4, '[A]': 5, '[B]': 6, '[C]': 7}
    assert v.size == 11 and v.tokenizer == 'text.model'
    v = vocab.streams({'size': 3, 'codebooks': 1}, text_tokens=9, bos=5, eos=6, pad=7, epad=8,
                      tokenizer='text.model')
    assert v.specials == {'bos': 5, 'eos': 6, 'pad': 7, 'epad': 8} and v.tokenizer == 'text.model'


def test_names():
    v = vocab.line({'size': 501}, text_tokens=32_000)
    assert v.name(7) == ('text', 7) and v.name(32_001) == ('markers', 1)
    assert v.name(32_502) == ('units', 500)
    assert v.name(32_503) == v.name(-1) == ('nothing', 0)
    assert v.special_name(1) == 'bos' and v.special_name(32_001) == '[Speech]'
    assert v.special_name(9) == v.special_name(-1) == ''


@pytest.mark.parametrize('ids, seen', [([0, 501], r'0\.\.501'), ([-1], r'-1\.\.-1')])
def test_ids_outside_their_range_are_refused(ids, seen):
    v = vocab.line({'size': 501}, text_tokens=32_000)
    with pytest.raises(ValueError, match=rf'units ids must lie in 0\.\.500, got {seen}'):
        v.encode('units', np.array(ids, np.int16))


def test_speakers_who_are_not_there_cannot_be_predicted():
    with pytest.raises(ValueError, match=r"vocab.predicted names \['theirs'\]"):
        vocab.streams({'size': 3, 'codebooks': 1}, text_tokens=9, speakers=('mine',),
                      predicted=('mine', 'theirs'))


@pytest.mark.parametrize('options, says', [
    (dict(bos=9), r'vocab.bos must be an id of the text, in 0\.\.8, got 9'),
    (dict(eos=-1), r'vocab.eos must be an id of the text, in 0\.\.8, got -1'),
    (dict(markers=('[A]', '[A]')), r"names of their own, each once, got \('\[A\]', '\[A\]'\)"),
    (dict(markers=('[A]', 'eos')), 'names of their own'),
    (dict(text_tokens=0), 'vocab.text_tokens must be at least 1, got 0')])
def test_special_ids_that_cannot_be(options, says):
    with pytest.raises(ValueError, match=says):
        vocab.line({'size': 3}, **dict(text_tokens=9) | options)


@pytest.mark.parametrize('options, says', [
    (dict(pad=9), 'vocab.pad must be an id of the text'),
    (dict(pad=4, epad=4), 'vocab.pad and vocab.epad must differ, both are 4'),
    (dict(speakers=('mine', 'mine')), 'vocab.speakers names one twice')])
def test_special_ids_of_streams_that_cannot_be(options, says):
    with pytest.raises(ValueError, match=says):
        vocab.streams({'size': 3, 'codebooks': 1}, text_tokens=9, **options)


def test_text(tmp_path):
    """Words come back from their pieces, and the reserved ids stand where the line says."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(['the cat sat on the mat', 'a cat ate the hat'] * 20),
        model_writer=model, vocab_size=40, hard_vocab_limit=False, bos_id=1, eos_id=2, unk_id=4,
        pad_id=3, user_defined_symbols=[], control_symbols=['<epad>'], minloglevel=2)
    path = tmp_path / 'text.model'
    path.write_bytes(model.getvalue())
    text = vocab.Text(str(path))
    ids = text.encode(' cat ')
    assert ids == text.encode('cat') and all(5 <= i < text.size for i in ids)
    assert text.decode([*ids, *text.encode('mat')]) == 'cat mat'
    assert [text.piece(i) for i in (1, 2, 3)] == ['<s>', '</s>', '<pad>']
    assert text.piece(ids[0]).startswith('▁')


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / 'text.model'
    for broken in (None, b'', b'no protobuf'):
        if broken is not None:
            path.write_bytes(broken)
        with pytest.raises(ValueError, match='vocab.tokenizer: cannot read .*text.model'):
            vocab.Text(str(path))

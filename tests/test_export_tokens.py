# SPDX-License-Identifier: Apache-2.0
"""Does an exported tokenizer write every id, and cut text as the sentencepiece model does?"""

import json

import pytest
import released
import sentencepiece
import small

from jaxsd import export, model
from jaxsd.config import ConfigError
from jaxsd.export import tokens

TEXTS = (*small.SENTENCES, *small.NONSENSE, 'the  shells   sang', ' unseen wörds zzz ', 'a',
         '3 cats\tand \U0001f600')


def config_with(path: str, **vocab):
    config = released.decoder('llama')
    config.vocab = dict(name='line', text_tokens=400, tokenizer=path, multiple=64) | vocab
    return config


def joined(text: str, ranks: dict[str, int], ids: dict[str, int]) -> list[int]:
    """Byte-pair encoding by the definition: again and again the best pair, the leftmost first."""
    parts = list(tokens.SPACE + text.strip().replace(' ', tokens.SPACE))
    while True:
        found = [(ranks[pair], i) for i, pair in enumerate(map(' '.join, zip(parts, parts[1:],
                                                                        strict=False)))
                 if pair in ranks]
        if not found:
            break
        i = min(found)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return [i for p in parts for i in ([ids[p]] if p in ids else
                                       [ids[f'<0x{b:02X}>'] for b in p.encode()])]


def test_pairs_are_joined_in_the_order_of_their_scores(tmp_path):
    path = small.text_model(tmp_path, 'bpe', normalization_rule_name='identity')
    config = config_with(path)
    export.save(config, released.random_params(config, 1), str(tmp_path / 'out'), 'hf')
    made = json.loads((tmp_path / 'out' / 'tokenizer.json').read_text())
    ranks = {pair: i for i, pair in enumerate(made['model']['merges'])}
    theirs = sentencepiece.SentencePieceProcessor(model_file=path)
    assert len(ranks) > 100
    for text in TEXTS:
        plain = ' '.join(text.split(' ')).strip()
        while '  ' in plain:
            plain = plain.replace('  ', ' ')
        assert joined(plain, ranks, made['model']['vocab']) == theirs.encode(text), text


@pytest.mark.parametrize('algorithm', ['bpe', 'unigram'])
def test_every_id_has_its_place(algorithm, tmp_path):
    path = small.text_model(tmp_path, algorithm)
    config = config_with(path, markers=('[Text]', '[Speech]', '[ASR]'))
    vocab = model.make_vocab(config)
    tokens.write_tokenizer(str(tmp_path), vocab, 99)
    made = json.loads((tmp_path / 'tokenizer.json').read_text())
    theirs = sentencepiece.SentencePieceProcessor(model_file=path)
    own = theirs.get_piece_size()
    held = made['model']['vocab']
    held = {t: i for i, (t, _) in enumerate(held)} if algorithm == 'unigram' else held
    # Ids behind the model's own are numbered in the order of the list, whatever it says.
    assert sorted(held.values()) == list(range(400))
    assert all(held[theirs.id_to_piece(i)] == i for i in range(own))
    added = [(t['id'], t['content']) for t in made['added_tokens'] if t['content'] not in held]
    assert added == [(400 + i, m) for i, m in enumerate(('[Text]', '[Speech]', '[ASR]'))] + [
        (403 + i, f'[Hu{i}]') for i in range(34)]
    special = {t['content'] for t in made['added_tokens'] if t['special']}
    assert special == {'<s>', '</s>', '<pad>', '<unk>', '<epad>', '[Text]', '[Speech]', '[ASR]'}
    if algorithm == 'unigram':
        scores = [score for _, score in made['model']['vocab'][:own]]
        assert scores == [theirs.get_score(i) for i in range(own)]
    kept = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    assert (kept['bos_token'], kept['eos_token'], kept['model_max_length']) == ('<s>', '</s>', 99)


def test_what_cannot_be_written(tmp_path):
    path = small.text_model(tmp_path)

    def refuse(match, **vocab):
        with pytest.raises(ValueError, match=match) as e:
            tokens.line(model.make_vocab(config_with(path, **vocab)))
        assert '\n' not in str(e.value)
    refuse('pieces, vocab.text_tokens is 60', text_tokens=60)
    refuse(r"ids 401 and 402 are both written '\[Hu0\]'; rename", markers=('[Text]', '[Hu0]'))
    refuse("vocab.unit must hold {} once", unit='<unit>')
    (tmp_path / 'text.model').write_bytes(b'\xff' * 40)
    refuse('text.model is not a sentencepiece model')
    (tmp_path / 'text.model').write_bytes(b'')
    refuse('has 0 pieces')
    path = small.text_model(tmp_path, 'char')
    refuse('of kind 4; only unigram and bpe')
    config = config_with(str(tmp_path / 'gone'))
    with pytest.raises(ConfigError, match='vocab.tokenizer: cannot copy'):
        export.save(config, released.random_params(config, 1), str(tmp_path / 'two'), 'hf')
    assert not (tmp_path / 'two').exists()


def test_side_streams_are_spelled_like_units(tmp_path):
    vocab = model.make_vocab(config_with(small.text_model(tmp_path), sides=(('pitch', 3),
                                                                            ('style', 2))))
    made, first = tokens.line(vocab), sum(vocab.ranges['units'])
    assert [p.text for p in made.pieces[first - 1:first + 5]] == [
        f'[Hu{vocab.ranges["units"][1] - 1}]', '[Pi0]', '[Pi1]', '[Pi2]', '[St0]', '[St1]']
    assert made.pieces[first + 5].text.startswith('[unused')

# SPDX-License-Identifier: Apache-2.0
"""The text tokenizer with the added markers and units, as other programs want it.

A flat model's line is the sentencepiece model's pieces, then markers, then units, then padding.
Here every id gets its written form, and the whole becomes the tokenizer.json of Hugging Face's
`tokenizers` (by its own format, without that package) or, in `gguf`, a token list.
"""

import base64
import collections
import json
import os
from collections.abc import Sequence
from typing import NamedTuple

from jaxsd.config import ConfigError
from jaxsd.export.safetensors import read_json
from jaxsd.vocab import Vocab

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces, as sentencepiece and GGUF number them."""

SPACE = '\u2581'
ALGORITHMS = {1: 'unigram', 2: 'bpe'}


class Piece(NamedTuple):
    """How a token is written, its score (log-probability or minus its rank) and its kind."""

    text: str
    score: float
    kind: int


class Line(NamedTuple):
    """The written form of every id of a flat vocabulary, and how text becomes ids.

    algorithm: 'bpe' or 'unigram'. prefix: whether a space is put before text. squeeze: whether
    spaces at the ends are dropped and several become one. charsmap: sentencepiece's compiled
    normalization, b'' for none. own: how many of the pieces are the sentencepiece model's.
    """

    pieces: tuple[Piece, ...]
    algorithm: str
    prefix: bool
    squeeze: bool
    byte_fallback: bool
    charsmap: bytes
    own: int


def line(vocab: Vocab) -> Line:
    """The Line of a one-row vocabulary with a tokenizer.

    Markers are control tokens and units user-defined ones, so that a decoder hides the former and
    shows the latter. Raises ConfigError for a sentencepiece model that cannot be written so.
    """
    from sentencepiece import sentencepiece_model_pb2
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        with open(vocab.tokenizer, 'rb') as f:
            proto.ParseFromString(f.read())
        algorithm = ALGORITHMS[proto.trainer_spec.model_type]
    except KeyError:
        raise ConfigError(f'vocab.tokenizer: {vocab.tokenizer} is a sentencepiece model of kind '
                          f'{proto.trainer_spec.model_type}; only unigram and bpe can be exported'
                          ) from None
    except (OSError, ValueError, RuntimeError) as e:
        raise ConfigError(f'vocab.tokenizer: cannot read the sentencepiece model '
                          f'{vocab.tokenizer}: {e}') from e
    except Exception as e:      # protobuf's DecodeError is a plain Exception
        raise ConfigError(f'vocab.tokenizer: {vocab.tokenizer} is not a sentencepiece model: {e}'
                          ) from e
    own = [Piece(p.piece, p.score, p.type) for p in proto.pieces]
    start, text_tokens = vocab.ranges['text']
    if not own or len(own) > text_tokens or start:
        raise ConfigError(f'vocab.tokenizer: {vocab.tokenizer} has {len(own)} pieces, '
                          f'vocab.text_tokens is {text_tokens}')
    pieces = own + [Piece(f'[unused{i}]', 0.0, UNUSED) for i in range(len(own), vocab.size)]
    first, markers = vocab.ranges['markers']
    for i in range(first, first + markers):
        pieces[i] = Piece(vocab.special_name(i), 0.0, CONTROL)
    first, units = vocab.ranges['units']
    for i in range(units):
        pieces[first + i] = Piece(vocab.unit.format(i), 0.0, USER_DEFINED)
    for name in vocab.ranges.keys() - {'text', 'markers', 'units'}:
        first, count = vocab.ranges[name]       # [Pi0], [St0]: as the released tokenizer's
        for i in range(count):
            pieces[first + i] = Piece(f'[{name[:2].title()}{i}]', 0.0, USER_DEFINED)
    seen: dict[str, int] = {}
    for i, piece in enumerate(pieces):
        if piece.text in seen:
            raise ConfigError(f'vocab: ids {seen[piece.text]} and {i} are both written '
                              f'{piece.text!r}; rename the marker or the unit')
        seen[piece.text] = i
    norm = proto.normalizer_spec
    return Line(tuple(pieces), algorithm, norm.add_dummy_prefix, norm.remove_extra_whitespaces,
                proto.trainer_spec.byte_fallback, norm.precompiled_charsmap, len(own))


def with_added(made: Line, files: Sequence[str]) -> Line:
    """`made` with the tokens that the files of a Hugging Face tokenizer add behind a sentencepiece
    model, which are written nowhere else. Special ones are control tokens.

    Raises ConfigError naming the file for one that is damaged or writes two ids alike.
    """
    pieces = list(made.pieces)
    read = {'added_tokens.json': lambda said: [(i, t, False) for t, i in said.items()],
            'tokenizer_config.json': lambda said: [
                (int(i), t['content'], t.get('special'))
                for i, t in (said.get('added_tokens_decoder') or {}).items()],
            'tokenizer.json': lambda said: [(t['id'], t['content'], t.get('special'))
                                            for t in said.get('added_tokens') or ()]}
    for name, tokens in read.items():
        for path in files:
            if os.path.basename(path) != name:
                continue
            try:
                for i, text, special in tokens(read_json(path)):
                    if made.own <= i < len(pieces) and made.pieces[i].kind == UNUSED:
                        pieces[i] = Piece(str(text), -1000.0, CONTROL if special else USER_DEFINED)
            except (AttributeError, KeyError, TypeError, ValueError) as e:
                raise ConfigError(f'{path}: added tokens cannot be read ({e})') from e
    if len({piece.text for piece in pieces}) < len(pieces):
        twice, = collections.Counter(piece.text for piece in pieces).most_common(1)
        raise ConfigError(f'{os.path.dirname(files[0])}: {twice[0]!r} is written for several ids')
    return made._replace(pieces=tuple(pieces))


def merges(pieces: Sequence[Piece]) -> list[str]:
    """'left right' for every way to make a piece out of two, best piece first.

    sentencepiece joins the neighbors whose union has the best score; a merge list says the same.
    """
    ids = {p.text: i for i, p in enumerate(pieces) if p.kind == NORMAL}
    found = []
    for text in ids:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                found.append((-pieces[ids[text]].score, ids[text], ids[left], left, right))
    return [f'{left} {right}' for *_, left, right in sorted(found)]


def write_tokenizer(folder: str, vocab: Vocab, columns: int) -> None:
    """tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer loads.

    Text begins with BOS. Markers and units are recognized where they are written.
    """
    made = line(vocab)
    text_end = sum(vocab.ranges['text'])
    named = {k: made.pieces[vocab.specials[k]].text for k in ('bos', 'eos')}
    unknown = next((p.text for p in made.pieces[:made.own] if p.kind == UNKNOWN), None)
    # Ids behind the model's own are given in order, so the model must hold all of the text range.
    if made.algorithm == 'bpe':
        model = dict(type='BPE', dropout=None, unk_token=unknown, continuing_subword_prefix=None,
                     end_of_word_suffix=None, fuse_unk=True, byte_fallback=made.byte_fallback,
                     ignore_merges=False,
                     vocab={p.text: i for i, p in enumerate(made.pieces[:text_end])},
                     merges=merges(made.pieces[:made.own]))
    else:
        rare = min(p.score for p in made.pieces[:made.own]) - 1e3
        model = dict(type='Unigram', byte_fallback=made.byte_fallback,
                     unk_id=next((i for i, p in enumerate(made.pieces) if p.kind == UNKNOWN), None),
                     vocab=[[p.text, rare if p.kind == UNUSED else p.score]
                            for p in made.pieces[:text_end]])
    clean = []
    if made.charsmap:
        clean.append(dict(type='Precompiled',
                          precompiled_charsmap=base64.b64encode(made.charsmap).decode()))
    if made.squeeze:
        clean += [dict(type='Strip', strip_left=True, strip_right=True),
                  dict(type='Replace', pattern=dict(Regex=' {2,}'), content=' ')]
    if made.prefix:
        clean.append(dict(type='Prepend', prepend=SPACE))
    clean.append(dict(type='Replace', pattern=dict(String=' '), content=SPACE))
    spoken = [dict(type='Replace', pattern=dict(String=SPACE), content=' '),
              dict(type='ByteFallback'), dict(type='Fuse')]
    if made.prefix:
        spoken.append(dict(type='Strip', content=' ', start=1, stop=0))
    bos = dict(SpecialToken=dict(id=named['bos'], type_id=0))

    def sequence(letter, type_id):
        return dict(Sequence=dict(id=letter, type_id=type_id))
    tokenizer = dict(
        version='1.0', truncation=None, padding=None,
        added_tokens=[dict(id=i, content=p.text, single_word=False, lstrip=False, rstrip=False,
                           normalized=False, special=p.kind != USER_DEFINED)
                      for i, p in enumerate(made.pieces)
                      if p.kind in (UNKNOWN, CONTROL, USER_DEFINED)],
        normalizer=dict(type='Sequence', normalizers=clean), pre_tokenizer=None,
        post_processor=dict(
            type='TemplateProcessing', single=[bos, sequence('A', 0)],
            pair=[bos, sequence('A', 0), sequence('B', 1)],
            special_tokens={named['bos']: dict(id=named['bos'], ids=[vocab.specials['bos']],
                                               tokens=[named['bos']])}),
        decoder=dict(type='Sequence', decoders=spoken), model=model)
    config = dict(tokenizer_class='PreTrainedTokenizerFast', bos_token=named['bos'],
                  eos_token=named['eos'], model_max_length=columns,
                  clean_up_tokenization_spaces=False)
    if unknown is not None:
        config['unk_token'] = unknown
    for name, value in (('tokenizer.json', tokenizer), ('tokenizer_config.json', config)):
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
            json.dump(value, f, ensure_ascii=False, indent=1)
            f.write('\n')

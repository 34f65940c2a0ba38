# SPDX-License-Identifier: Apache-2.0
"""Byte-level BPE: a tokenizer.json such as Llama 3's and Qwen's, as llama.cpp takes it.

How text is cut into words before pairs are joined is code in llama.cpp, chosen by a name
(src/llama-vocab.cpp, tokenizer_pre). So a tokenizer goes along only where its regular expression is
one of those, and where nothing else in it does what that code does not.
"""

import collections
import os
from collections.abc import Mapping
from typing import NamedTuple

from jaxsd.config import ConfigError
from jaxsd.export.safetensors import read_json
from jaxsd.export.tokens import CONTROL, NORMAL, UNUSED, USER_DEFINED

WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r'|\s*[\r\n]+|\s+(?!\S)|\s+')
ITS_OWN = 'the one of ByteLevel'        # GPT-2's, which a tokenizer.json does not spell out
PRE = {     # (how words are cut, whether a word that is a token is one at once): llama.cpp's name
    (WORDS % '{1,3}', True): 'llama-bpe', (WORDS % '{1,3}', False): 'smaug-bpe',
    (WORDS % '', False): 'qwen2', (ITS_OWN, False): 'gpt-2'}
WITHOUT = 'leave the file out of the source for a model without tokenizer'


class Tokenizer(NamedTuple):
    """Every id's written form and kind (`tokens.NORMAL` and so on), and llama.cpp's name of how
    text is cut. composed: whether text is composed first (NFC), which llama.cpp does not do."""

    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    pre: str
    composed: bool


def read(path: str, size: int) -> Tokenizer:
    """The tokenizer.json `path` for a model of `size` ids, the rest of which are unused.

    Raises ConfigError in one line for another kind of tokenizer, and ValueError for a damaged file.
    """
    said = read_json(path)
    try:
        return _read(said, path, size)
    except (AttributeError, IndexError, KeyError, TypeError) as e:
        raise ConfigError(f'{path}: not a tokenizer.json of byte-level BPE ({type(e).__name__}: '
                          f'{e}); {WITHOUT}') from e


def _read(said: Mapping, path: str, size: int) -> Tokenizer:
    def refused(what):
        return ConfigError(f'{path}: {what}, with which llama.cpp has no byte-level BPE; {WITHOUT}')
    model = said['model']
    if model['type'] != 'BPE' or model.get('byte_fallback'):
        raise refused(f'model {model["type"]}' + ' with byte_fallback' * (model['type'] == 'BPE'))
    for key in ('dropout', 'unk_token', 'continuing_subword_prefix', 'end_of_word_suffix'):
        if model.get(key):
            raise refused(f'{key} {model[key]!r}')
    normalizer = said.get('normalizer')
    if normalizer not in (None, {'type': 'NFC'}):
        raise refused(f'normalizer {normalizer["type"]}')
    cut = words(said['pre_tokenizer'])
    at_once = bool(model.get('ignore_merges'))
    if (cut, at_once) not in PRE:
        raise refused(f'pre-tokenizer {cut or said["pre_tokenizer"]["type"]!r} and ignore_merges '
                      f'{at_once}')
    if not model['merges']:
        raise refused('no merges')
    found: dict[int, str] = {}
    kinds: dict[int, int] = {}
    for text, i in model['vocab'].items():
        if type(i) is not int or not 0 <= i < size or i in found:
            raise ConfigError(f'{path}: {text!r} has id {i!r}, which is another\'s or none of the '
                              f'{size} of the model')
        found[i], kinds[i] = text, NORMAL
    for token in said.get('added_tokens') or ():
        text, i = token['content'], token['id']
        if type(i) is not int or not 0 <= i < size or found.get(i, text) != text:
            raise ConfigError(f'{path}: {text!r} has id {i!r}, which is another\'s or none of the '
                              f'{size} of the model')
        if any(token.get(k) for k in ('single_word', 'lstrip', 'rstrip')):
            raise refused(f'{text!r} taking the spaces around it')
        found[i], kinds[i] = text, CONTROL if token['special'] else USER_DEFINED
    tokens = tuple(found.get(i, f'[PAD{i}]') for i in range(size))      # the converter's name
    if len(set(tokens)) < size:
        twice, = collections.Counter(tokens).most_common(1)
        raise ConfigError(f'{path}: {twice[0]!r} is written for several ids')
    return Tokenizer(tokens, tuple(kinds.get(i, UNUSED) for i in range(size)), PRE[cut, at_once],
                     normalizer is not None)


def words(steps: Mapping) -> str:
    """The regular expression by which a pre-tokenizer cuts text; '' where that is not all it does.
    """
    *splits, last = steps['pretokenizers'] if steps['type'] == 'Sequence' else [steps]
    if last['type'] != 'ByteLevel' or last.get('add_prefix_space') or len(splits) > 1:
        return ''
    if not splits:
        return ITS_OWN if last.get('use_regex', True) else ''
    split, = splits
    plain = (split['type'], split.get('behavior'), split.get('invert')) == (
        'Split', 'Isolated', False)
    return split['pattern']['Regex'] if plain and not last.get('use_regex', True) else ''


def beside(path: str, size: int) -> tuple[dict[str, bool], str | list | None]:
    """Which of bos and eos are put around text, where that is stated, and the chat template: of the
    tokenizer of `size` tokens whose files lie beside `path`, as llama.cpp's converter reads them.
    """
    import gguf
    try:
        said = gguf.SpecialVocab(os.path.dirname(path), load_merges=False, n_vocab=size)
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as e:
        raise ConfigError(f'{path}: it or a file beside it is damaged ({type(e).__name__}: {e})'
                          ) from e
    return dict(said.add_special_token), said.chat_template


def add(writer, path: str, made: Tokenizer, ids: Mapping[str, int]) -> None:
    """Writes the tokenizer `made` of the file `path` to a gguf.GGUFWriter.

    Pairs that join, special ids, what is put around text and the chat template are read as
    llama.cpp's converter reads them, from the files beside `path` too. ids: of bos and eos, for
    where those do not say: llama.cpp would take 11 for both.
    """
    import gguf
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre(made.pre)
    writer.add_token_list(made.tokens)
    writer.add_token_types(made.kinds)
    try:
        said = gguf.SpecialVocab(os.path.dirname(path), load_merges=True, n_vocab=len(made.tokens))
        said.add_to_gguf(writer, quiet=True)
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as e:
        raise ConfigError(f'{path}: it or a file beside it is damaged ({type(e).__name__}: {e})'
                          ) from e
    for name in ('bos', 'eos'):
        around = said.add_special_token.get(name)
        if around is None:
            getattr(writer, f'add_add_{name}_token')(False)
        if name in said.special_token_ids:
            continue
        if name in ids:
            getattr(writer, f'add_{name}_token_id')(ids[name])
        elif around:
            raise ConfigError(f'{path}: text begins or ends with {name}, whose id no file states')

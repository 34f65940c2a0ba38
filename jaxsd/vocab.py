# SPDX-License-Identifier: Apache-2.0
"""One integer line divided into named ranges: text, markers, units, codebooks. All id arithmetic.

Every token of every grid is an id on this line, so one embedding table serves all streams and no
other module ever adds an offset. A flat system has one row that may hold any id; a multistream
system has one row per stream, each owning its range::

    line (flat)   | text 0..V-1 | [Text] [Speech] | units | pitch ... | padding |
    streams       | text + initial | mine 0 + initial | ... | theirs 0 + initial | ...
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxsd.types import Row, Sizes, positive


@dataclasses.dataclass(frozen=True)
class Vocab:
    """Named ranges on one line, the rows that use them, and the special ids."""

    ranges: dict[str, tuple[int, int]]      # name -> (start, size)
    rows: tuple[Row, ...]
    specials: dict[str, int]                # name -> id
    size: int                               # length of the line, padding included
    tokenizer: str = ''                     # path of a sentencepiece model; '' when ids come ready
    unit: str = ''                          # how a unit is written where text and units mix

    def encode(self, name: str, ids) -> np.ndarray:
        """Local ids of range `name` as ids on the line. Raises ValueError for one outside it."""
        start, size = self.ranges[name]
        ids = np.asarray(ids, np.int32)
        if ids.size and (ids.min() < 0 or ids.max() >= size):
            raise ValueError(f'{name} ids must lie in 0..{size - 1}, got {ids.min()}..{ids.max()}')
        return ids + start

    def name(self, token: int) -> tuple[str, int]:
        """The range that `token` lies in and its local id there; ('nothing', 0) outside all."""
        for name, (start, size) in self.ranges.items():
            if start <= token < start + size:
                return name, int(token - start)
        return 'nothing', 0

    def special_name(self, token: int) -> str:
        """The name of a special id, or '' if `token` is none."""
        return next((name for name, i in self.specials.items() if i == token), '')

    def sizes(self, width: int) -> Sizes:
        return Sizes(self.rows, self.size, width)


def _round_up(n: int, multiple: int) -> int:
    if multiple < 1:
        raise ValueError(f'vocab.multiple must be at least 1, got {multiple}')
    return -(-n // multiple) * multiple


def _checked(text_tokens: int, **ids: int) -> dict[str, int]:
    """Special ids by name. Raises ValueError for one that is no id of the text."""
    positive('vocab', text_tokens=text_tokens)
    for name, i in ids.items():
        if not 0 <= i < text_tokens:
            raise ValueError(f'vocab.{name} must be an id of the text, in 0..{text_tokens - 1}, '
                             f'got {i}')
    return ids


def line(codec, *, text_tokens: int, tokenizer: str = '', bos: int = 1, eos: int = 2,
         markers: Sequence[str] = ('[Text]', '[Speech]'), unit: str = '[Hu{}]',
         names: dict | None = None, sides: Sequence[tuple[str, int]] = (),
         multiple: int = 128) -> Vocab:
    """One row: text, then markers, then the codec's units and side streams, padded to a multiple.

    unit: how an exported tokenizer writes a unit, with {} for its number. names: ids of the text
    that a layout writes as it writes markers, such as dict(newline=13). sides: (name, size) of
    slower streams beside the units. A model without text has the text ids of its BOS and EOS only.

    The id map and the spelling of released Spirit-LM checkpoints are these with 32,000 text tokens,
    two markers and 501 units (spiritlm model/utils.py).
    """
    units = codec['size']
    specials = _checked(text_tokens, **dict(names or {}) | dict(bos=bos, eos=eos))
    if len({*specials, *markers}) < len(specials) + len(markers):
        raise ValueError(f'vocab.markers must be names of their own, each once, got '
                         f'{tuple(markers)}')
    ranges = {'text': (0, text_tokens), 'markers': (text_tokens, len(markers)),
              'units': (text_tokens + len(markers), units)}
    used = text_tokens + len(markers) + units
    for name, count in sides:
        if name in ranges or count < 1:
            raise ValueError(f'vocab.sides needs names of their own and sizes, got {name!r} '
                             f'{count}')
        ranges[name] = (used, count)
        used += count
    size = _round_up(used, multiple)
    specials |= {m: text_tokens + i for i, m in enumerate(markers)}
    if unit.count('{}') != 1:
        raise ValueError(f'vocab.unit must hold {{}} once, for the number, got {unit!r}')
    return Vocab(ranges, (Row('tokens', 0, size, size),), specials, size, tokenizer, unit)


def streams(codec, *, text_tokens: int, tokenizer: str = '', bos: int = 1, eos: int = 2,
            pad: int = 3, epad: int = 0, speakers: Sequence[str] = ('mine', 'theirs'),
            predicted: Sequence[str] = ('mine',), multiple: int = 1) -> Vocab:
    """One text row, then a row per speaker and codebook, each with an initial token after its ids.

    Row names are `text`, `mine 0`, `mine 1`, ..., `theirs 0`, ... Speakers outside `predicted` are
    heard and never spoken. Ids follow kyutai's LMModel: the initial token is the first id past the
    predictable ones (arXiv 2410.00037 §3.4; moshi/models/lm.py).
    """
    specials = _checked(text_tokens, bos=bos, eos=eos, pad=pad, epad=epad)
    if pad == epad:
        raise ValueError(f'vocab.pad and vocab.epad must differ, both are {pad}')
    if len(set(speakers)) < len(speakers):
        raise ValueError(f'vocab.speakers names one twice: {tuple(speakers)}')
    unknown = set(predicted) - set(speakers)
    if unknown:
        raise ValueError(f'vocab.predicted names {sorted(unknown)}, not among {tuple(speakers)}')
    rows = [Row('text', 0, text_tokens + 1, text_tokens)]
    for speaker in speakers:
        for k in range(codec['codebooks']):
            start = rows[-1].start + rows[-1].size
            rows.append(Row(f'{speaker} {k}', start, codec['size'] + 1,
                            codec['size'] if speaker in predicted else 0))
    ranges = {row.name: (row.start, row.size) for row in rows}
    size = _round_up(rows[-1].start + rows[-1].size, multiple)
    return Vocab(ranges, tuple(rows), specials, size, tokenizer)


def parallel(codec, *, text_tokens: int, rows: Sequence[str], tokenizer: str = '', bos: int = 1,
             eos: int = 2, pad: int = 3, text_marks: Sequence[str] = (),
             marks: Sequence[str] = (), room: int = 1, turns: int = 0, multiple: int = 1
             ) -> Vocab:
    """One text row, then `rows`: each the codec's ids, marks of its own, and an initial token.

    text_tokens 0 leaves the text row out. Marks are ids that a row may be given and may speak (the
    end of a stretch, padding): `text_marks` are specials under their own names, after the text, and
    replace bos, eos and pad where they are called so; `marks` are specials as 'audio 0 end'. room:
    how many ids a row keeps for marks and its initial token, which is always the last; released
    tables keep more than they use. turns: how many ranges the rows take turns in, `units 0` and so
    on, as when several frames of as many codebooks stand in a column; 0 gives each row its own.
    """
    if len({*rows, 'text'}) <= len(rows):
        raise ValueError(f'vocab.rows must be names of their own, none of them text, got '
                         f'{tuple(rows)}')
    specials, made, ranges = {}, [], {}
    if text_tokens:
        specials = _checked(text_tokens, bos=bos, eos=eos, pad=pad)
        specials |= {m: text_tokens + i for i, m in enumerate(text_marks)}
        size = text_tokens + max(room, len(text_marks) + 1)
        made, ranges = [Row('text', 0, size, text_tokens + len(text_marks))], {'text': (0, size)}
    if turns < 0 or turns and len(rows) % turns:
        raise ValueError(f'vocab.turns {turns} must divide the {len(rows)} rows')
    first, units = made[0].size if made else 0, codec['size']
    size = units + max(room, len(marks) + 1)
    for r, name in enumerate(rows):
        start = first + (r % turns if turns else r) * size
        made.append(Row(name, start, size, units + len(marks)))
        ranges[f'units {r % turns}' if turns else name] = (start, size)
        specials |= {f'{name} {m}': start + units + i for i, m in enumerate(marks)}
    end = first + (turns or len(rows)) * size
    return Vocab(ranges, tuple(made), specials, _round_up(end, multiple), tokenizer)


def patches(codec, *, text_tokens: int, rows: int, tokenizer: str = '', bos: int = 1, eos: int = 2,
            multiple: int = 1) -> Vocab:
    """One line for everything, and `rows` rows that may each hold any id of it.

    A column is a patch of the line: `rows` tokens one after another, text or codes. Every codebook
    has a range of its own, `codes 0`, ...; the last id is an initial token.
    """
    specials = _checked(text_tokens, bos=bos, eos=eos)
    positive('vocab', rows=rows)
    ranges, end = {'text': (0, text_tokens)}, text_tokens
    for k in range(codec['codebooks']):
        ranges[f'codes {k}'] = (end, codec['size'])
        end += codec['size']
    size = _round_up(end + 1, multiple)
    return Vocab(ranges, tuple(Row(f'patch {k}', 0, size, size - 1) for k in range(rows)), specials,
                 size, tokenizer)


def initial(row: Row) -> int:
    """The id that fills `row` before its first real token (the last id of the row's range)."""
    return row.start + row.size - 1


class Text:
    """A sentencepiece model: words to ids and ids to words. Pieces never cross a word."""

    def __init__(self, path: str):
        import sentencepiece
        try:
            with open(path, 'rb') as f:
                proto = f.read()
            if not proto:       # which sentencepiece would take for a model without pieces
                raise RuntimeError('the file is empty')
            self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except (OSError, RuntimeError) as e:
            raise ValueError(f'vocab.tokenizer: cannot read the sentencepiece model {path}: '
                             f'{e}') from e
        self.size = self._model.get_piece_size()

    def encode(self, word: str) -> tuple[int, ...]:
        return tuple(self._model.encode(word.strip()))

    def decode(self, ids) -> str:
        return self._model.decode([int(i) for i in ids])

    def piece(self, i: int) -> str:
        return self._model.id_to_piece(int(i))

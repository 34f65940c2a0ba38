# SPDX-License-Identifier: Apache-2.0
"""Answers of the systems that write and speak side by side, by the one engine of `generate`.

A question is read, an answer follows whose rows end when they end: several rows a column, groups
of units where the text says so, or units that hidden states say by CTC. What is asked is drawn by
the layout that trained the model: the columns before the first one that is scored.
"""

from collections.abc import Callable

import jax
import numpy as np

from jaxsd import codec as codecs
from jaxsd import data, trained
from jaxsd.config import ConfigError, bind
from jaxsd.generate import FREE, GREEDY, Manners, Sampler, Speaker, Stream, few
from jaxsd.layout import parallel
from jaxsd.types import NOTHING, Grid, Record, Word
from jaxsd.vocab import Vocab, initial


def manners_of(vocab: Vocab, *, pairs: bool = False) -> Manners:
    """How answers of the layouts of `layout.parallel` go on, read from the vocabulary's marks."""
    rows, special = vocab.rows, vocab.specials
    ends = (special['eos'], *(special.get(f'{row.name} end', NOTHING) for row in rows[1:]))
    if 'speech' in special:
        return Manners(mark=special['speech'])
    if ends[1:] == (NOTHING,) * (len(rows) - 1):
        return Manners()
    return Manners(ends, (special['pad'], *(special[f'{row.name} pad'] for row in rows[1:])),
                   pairs=pairs)


def answer(speaker: Speaker, prompts: list[np.ndarray], *, stop: Callable, most_columns: int,
           heard=None, key=None, chunk: int = 16, plan: np.ndarray | None = None,
           wanted: slice = slice(None)) -> list[np.ndarray]:
    """What follows each prompt [K, T_i]: columns [K, n] up to where `stop` says.

    stop: columns [K, n] -> how many of them the answer has, or None while it goes on. plan: [B, K],
    what every column of a sequence is given (FREE where it chooses). wanted: the sequences whose
    answers are waited for and returned.
    """
    key = jax.random.key(0) if key is None else key
    rows = len(speaker.rows)
    plan = np.full((len(prompts), rows), FREE, np.int32) if plan is None else plan
    longest = few(max(p.shape[1] for p in prompts))
    stream = Stream(speaker, rows=len(prompts), columns=longest + most_columns + chunk, key=key)
    out = [np.asarray(stream.first(prompts, plan, padded=longest, heard=heard))[None]]
    while True:
        said = np.moveaxis(np.concatenate(out), 0, 2)[wanted]       # [B, K, n]
        lengths = [stop(x) for x in said]
        if said.shape[2] >= most_columns or None not in lengths:
            return [x[:, :most_columns if n is None else min(n, most_columns)]
                    for x, n in zip(said, lengths, strict=True)]
        out.append(np.asarray(stream.more(np.tile(plan, (chunk, 1, 1)))))


def ended(vocab: Vocab) -> Callable:
    """A `stop` for `answer`: every row that can end has, and its column counts."""
    ends = manners_of(vocab).ends or (vocab.specials['eos'],)

    def stop(columns_KT):
        said = [np.flatnonzero(columns_KT[k] == end) for k, end in enumerate(ends)
                if end != NOTHING]
        return 1 + max(int(x[0]) for x in said) if all(map(len, said)) else None
    return stop


def in_pairs(speaker: Speaker, vocab: Vocab, both: list[np.ndarray], written: list[np.ndarray], *,
             most_columns: int, heard=None, key=None) -> list[np.ndarray]:
    """Answers [K, n] spoken and written at once, each guided by one that is only written.

    A request stands in the batch twice: asked for both (`both`) and for text alone (`written`, the
    same prompt but for its last column). Both read the text of the second and each its own rows of
    speech, which are padding in the second; text is what models of this kind are surest of (arXiv
    2408.16725 §3.3). heard: features of each request.
    """
    speaker = speaker._replace(manners=manners_of(vocab, pairs=True))
    prompts = [p for pair in zip(both, written, strict=True) for p in pair]
    plan = np.full((len(prompts), len(vocab.rows)), FREE, np.int32)
    plan[1::2, 1:] = speaker.manners.pads[1:]
    return answer(speaker, prompts, stop=ended(vocab), most_columns=most_columns, plan=plan,
                  heard=None if heard is None else [x for x in heard for _ in range(2)], key=key,
                  wanted=slice(0, None, 2))


def collapse(frames, blank: int) -> np.ndarray:
    """Frames as the units they say: repeats merged, then blanks dropped.

    What a longer stretch says begins with what any prefix of it says, so it can be heard while it
    is still being said.
    """
    frames = np.asarray(frames)
    return frames[np.append(True, frames[1:] != frames[:-1])[:frames.size] & (frames != blank)]


def spoken_units(vocab: Vocab, columns_KT: np.ndarray) -> np.ndarray:
    """Local units that the columns of a CTC head say, one frame per row of speech."""
    row = vocab.rows[1]
    return collapse(columns_KT[1:].T.reshape(-1), initial(row)) - row.start


def as_they_come(parts, vocab: Vocab, least: int):
    """Yields units of a CTC head's columns as soon as there are `least` new ones, then the rest.

    parts: stretches [K, n] of one answer's columns, in order.
    """
    said, given = None, 0
    for part in parts:
        said = part if said is None else np.concatenate([said, part], axis=1)
        units = spoken_units(vocab, said)
        if len(units) - given >= least:
            yield units[given:]
            given = len(units)
    if said is not None and given < len(units):
        yield units[given:]


# What a trained stage is asked, and what its columns say.

def asked(grid: Grid) -> tuple[np.ndarray, tuple | None]:
    """(prompt [K, T], (feats, slot) or None): the columns before the first that is scored."""
    n = int(np.flatnonzero(grid.weights.any(0))[0])
    return grid.tokens[:, :n], ((grid.extra['feats'][:n], grid.extra['slot'][:n])
                                if 'slot' in grid.extra else None)


def written(vocab: Vocab, columns_KT: np.ndarray) -> list[int]:
    """The text of columns: ids of the first row that are pieces, up to EOS."""
    out, marks = [], set(vocab.specials.values())
    for token in columns_KT[0]:
        if token == vocab.specials['eos']:
            break
        if token >= 0 and token not in marks:
            out.append(int(token))
    return out


def spoken(config, layout: dict, vocab: Vocab, columns_KT: np.ndarray) -> np.ndarray:
    """The codes [books, frames] that columns say, delays and groups undone, up to their end."""
    if config.head.name == 'ctc':
        return spoken_units(vocab, columns_KT)[None]
    rows = vocab.rows[1:]
    cells = columns_KT[1:]
    if 'speech' in vocab.specials:
        cells = cells[:, columns_KT[0] == vocab.specials['speech']]
    books, size = config.codec.codebooks, config.codec['size']
    late = layout.get('late') or (0,) * len(rows)
    frames = cells.shape[1] * (len(rows) // books)
    local = np.where(cells < 0, NOTHING, cells - np.array([[row.start] for row in rows]))
    codes = parallel.undo(local, parallel.pattern(books, frames, late, 'crop'), books, frames)
    over = ((codes < 0) | (codes >= size)).any(0)
    return codes[:, :int(np.argmax(over)) if over.any() else frames]


def true(config, layout: dict, grid: Grid, vocab: Vocab) -> np.ndarray:
    """The codes [books, frames] of the answer that a grid holds; for CTC, units without repeats."""
    cells = grid.tokens[:, int(np.flatnonzero(grid.weights.any(0))[0]):]
    if config.head.name == 'ctc':       # a target is written in order and not in time
        units = collapse(cells[1:].T.reshape(-1), NOTHING) - vocab.rows[1].start
        return units[(units >= 0) & (units < config.codec['size'])][None]
    return spoken(config, layout, vocab, cells)


def on_the_clock(lm: trained.LM, codes: list[np.ndarray]) -> list[np.ndarray]:
    """What `spoken` or `true` say, [books, frames] each, a frame each: the units of a CTC head
    have lost how long they last, and get what is usual."""
    if lm.config.head.name != 'ctc':
        return codes
    held = trained.unit_frames(lm.config, lm.config.codec['size'])
    return [np.repeat(x, held[x[0]], axis=1) for x in codes]


def as_heard(lm: trained.LM, said: list[str], codes: list[np.ndarray]) -> list[Record]:
    """Records of one voice that says `codes` ([books, frames] each, on the clock), for a listener.

    The words `said` stand in them as the right answer, at no particular time. What is said in no
    frame at all is heard as one frame of the first code.
    """
    codec, text, hz = None, lm.text(), lm.config.codec.frame_hz
    if 'encoder' in lm.config.frontend:
        codec = bind(lm.config.codec, 'jaxsd.codec', 'codec')()
    out = []
    for i, (words, spoken) in enumerate(zip(said, codes, strict=True)):
        if not spoken.size:
            spoken = np.zeros((max(1, len(spoken)), 1), np.int32)
        wav = codecs.flac(codec.decode(spoken)) if codec else b''
        out.append(Record(
            f'said-{i}', 'said', 'en', spoken.shape[1] / hz, codes=spoken[None], units=(spoken[0],),
            words=tuple(Word(w, 0, 0.0, 0.0, tuple(text.encode(w))) for w in words.split()),
            wav=wav, feats=codecs.log_mel(wav) if wav else ()))
    return out


def drawn(lm: trained.LM, source: str, records: list[Record]) -> tuple[list[Grid], dict]:
    """The grids of `records` as `source` draws them, and that layout's options."""
    options = data.layout_of(lm.config, source)
    make = bind(options, 'jaxsd.layout', f'data.sources.{source}.layout', given=('vocab', 'rng'))
    grids = [make(r, vocab=lm.vocab, rng=np.random.default_rng(i)) for i, r in enumerate(records)]
    return grids, options


def replies(lm: trained.LM, grids: list[Grid], layout: dict, *, most_columns: int,
            voice: Sampler = GREEDY, seed: int = 0, batch: int = 16
            ) -> list[tuple[list[int], np.ndarray]]:
    """(text ids, codes [books, frames]) of the answer to each grid's question, its text greedy.

    voice: how the rows of speech are drawn, by `seed`. Where a model can be asked in text alone,
    too, that answer guides the spoken one (`in_pairs`). Raises ConfigError for grids of other
    layouts than those of `layout.parallel`.
    """
    if not layout['name'].startswith('parallel.'):
        raise ConfigError(f'replies are those of the layouts of layout.parallel, not of '
                          f'{layout["name"]}')
    v, out = lm.vocab, []
    speaker = lm.speaker({row.name.split()[0]: voice for row in v.rows[1:]})._replace(
        manners=manners_of(v))
    paired = 'answer' in v.specials and bool(speaker.manners.ends) and layout.get('said') != 'text'
    for n, part in enumerate(trained.in_parts(grids, batch)):
        part = [*part, *[part[-1]] * (batch - len(part))]       # few shapes, few compilations
        key = jax.random.fold_in(jax.random.key(seed), n)
        prompts, heard = (list(x) for x in zip(*map(asked, part), strict=True))
        heard = None if None in heard else heard
        if paired:
            alone = [p.copy() for p in prompts]
            for p in alone:
                p[1:, -1] = speaker.manners.pads[1:]
            found = in_pairs(speaker, v, prompts, alone, most_columns=most_columns, heard=heard,
                             key=key)
        else:
            found = answer(speaker, prompts, stop=ended(v), most_columns=most_columns, heard=heard,
                           key=key)
        out += [(written(v, x), spoken(lm.config, layout, v, x)) for x in found]
    return out[:len(grids)]


def examples(lm: trained.LM, source: str, *, split: str, limit: int | None) -> list[Record]:
    """The records of `source` that have an answer and, where something is heard, its audio."""
    records = list(data.examples(lm.config, split, source, vocab=lm.vocab, limit=limit))
    if 'encoder' in lm.config.frontend and not any(r.feats for r in records):
        raise ConfigError(f'{lm.config.data.path} keeps no audio for frontend.encoder: make it '
                          'with --keep-wav')
    return records

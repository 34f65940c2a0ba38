# SPDX-License-Identifier: Apache-2.0
"""Somebody else's checkpoint as our config and parameters, and as an object for a notebook.

::

    from jaxsd.export import load
    lm = load('path/to/checkpoint')
    lm.config, lm.params, lm.scores(tokens)
    lm.save('elsewhere', format='hf')
"""

import contextlib
import dataclasses
import filecmp
import functools
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_collections as mlc
import numpy as np
from flax import nnx

from jaxsd import model, sharding
from jaxsd.config import ConfigError, plain
from jaxsd.export import surgery, write
from jaxsd.export.facts import Json, config_of, disagreements, facts
from jaxsd.export.families import FAMILIES, described, family_of
from jaxsd.export.safetensors import folder_of, read_json, regular
from jaxsd.export.streaming import array, blocks, open_source, whole
from jaxsd.layout import duplex
from jaxsd.stage import flatten, unflatten
from jaxsd.types import NOTHING

log = logging.getLogger('jaxsd')

TEXT_BYTES = 1 << 20        # of a card or a license that is read
TOKENIZER = ('tokenizer.json', 'vocab.json', 'merges.txt', 'tokenizer_config.json',
             'special_tokens_map.json', 'added_tokens.json', 'chat_template.jinja')


# As parameters of a config of ours.

def import_params(config, source: str, format: str) -> dict:
    """The parameters of the checkpoint in folder (or file) `source`, as `config` arranges them.

    Float32 numpy arrays in the shapes of `model.abstract(config)`. The checkpoint's config.json is
    compared with the config first. Raises ConfigError where they disagree, and ValueError naming
    file and key for a damaged file and for missing, unused or misshapen tensors.
    """
    return unflatten(dict(stream(config, source, format)))


def stream(config, source: str, format: str) -> Iterator[tuple[str, np.ndarray]]:
    """`import_params`, one (path, array) at a time, so that a caller may use each as it comes."""
    opened = open_source(config, *agreeing(config, source, format), source)
    for path, shape in opened.shapes.items():
        held = np.zeros(shape, np.float32)
        for at, block in blocks(opened, path, [(0, n) for n in shape]):
            held[at] = block
        yield path, held


def agreeing(config, source: str, format: str, place: str = ''):
    """(family, facts) of the checkpoint `source` of `format`, if they are those of `config`.

    place: of the graft in the config that can declare a difference, where there is one.
    """
    family, have = family_of(format), facts(config)
    _, values, path = described(source, format)
    family.check(have)
    said = family.read(values, path)
    if wrong := disagreements(have, family.cut(have, said)):
        raise ConfigError(f'the config is not that of {path}: '
                          + surgery.declaring(wrong, {}, place))
    return family, said


@dataclasses.dataclass(frozen=True)
class Start:
    """A checkpoint of another program that was found fit to start a config from.

    origin: see `origin_of`.
    """

    config: mlc.ConfigDict
    graft: Mapping
    source: object
    patches: dict
    origin: dict

    def params(self, target: Mapping, key) -> dict:
        """The parameters by path, each placed as `target` (ShapeDtypeStructs by path) says.

        Streamed: what the host holds at one time is a box of a tensor, not an array of ours.
        """
        arrays = {path: array(self.source, self.patches[path], target[path])
                  for path in self.patches if self.patches[path]}
        where = {path: leaf.sharding for path, leaf in target.items()}
        return surgery.begin(self.patches, arrays, self.graft, self.config, key, where)


def open_start(config, start: str, *, graft: Mapping | None = None, where: str = '',
               place: str = '') -> Start:
    """The checkpoint that `start` names, 'FORMAT:PATH' or a path, held against `config`.

    Without a `graft` it must be a checkpoint of this very config; with one, see `surgery`. Only
    headers are read. Raises ConfigError and ValueError in one line that says what does not fit,
    beginning with `where`, and what to declare in the graft, which lies at `place` of a config.
    """
    format, path = split_start(start)
    format, values, said_in = described(path, format)
    family = family_of(format)
    origin = origin_of(path, format)
    if other := other_tokenizer(config, path):
        log.warning('%s cuts text by its %s, this config by %s: unless both cut alike, ids of text '
                    'stand for other pieces than the weights learned', path, other,
                    config.vocab.tokenizer)
    if not graft:
        source = open_source(config, *agreeing(config, path, format, place), path)
        patches = {p: [whole(p, shape)] for p, shape in source.shapes.items()}
        return Start(config, {}, source, patches, origin)
    said = family.read(values, said_in)
    with _told(said_in):
        theirs = config_of(said, like=config)
    patches = surgery.check(config, theirs, said, graft, where or f'start {start}', place)
    return Start(config, graft, open_source(theirs, family, said, path), patches, origin)


def split_start(start: str) -> tuple[str, str]:
    """('hf', '/path') of 'hf:/path'; ('', path) of a path without the name of a format."""
    format, colon, path = start.partition(':')
    return (format, path) if colon and format in FAMILIES else ('', start)


def is_foreign(start: str) -> bool:
    """Whether a stage's `start` names a checkpoint of another program (and not a run's folder)."""
    format, path = split_start(start)
    if format or os.path.isfile(path):
        return True
    names = os.listdir(path) if os.path.isdir(path) else ()
    return 'ledger.jsonl' not in names and any(
        name == 'config.json' or name.endswith('.safetensors') for name in names)


def origin_of(path: str, format: str) -> dict:
    """What a ledger and a card keep of a checkpoint of another program."""
    out = dict(format=format, name=os.path.basename(os.path.abspath(path)),
               license=stated_license(path))
    files = [name for x in tokenizer_files(folder_of(path))
             if (name := os.path.basename(x)) in TOKENIZER[:2]]
    return out | (dict(tokenizer=files[0]) if files and format == 'hf' else {})


def tokenizer_files(folder: str) -> list[str]:
    """The files of a tokenizer, if one is there: all but a sentencepiece model, and with one what
    lies beside it (added tokens, a chat template)."""
    found = [path for name in TOKENIZER if os.path.isfile(path := os.path.join(folder, name))]
    whole = found and os.path.basename(found[0]) in TOKENIZER[:2]
    return found if whole or os.path.isfile(os.path.join(folder, 'tokenizer.model')) else []


def other_tokenizer(config, source: str) -> str:
    """The name of a checkpoint's tokenizer if it is not the file that the config reads text by; ''
    where it is, and where one of both has none."""
    ours, folder = config.vocab.get('tokenizer', ''), folder_of(source)
    if not ours or not os.path.isfile(ours):
        return ''
    pieces = [name for name in sorted(os.listdir(folder)) if name.endswith('.model')]
    if any(filecmp.cmp(os.path.join(folder, name), ours, shallow=False) for name in pieces):
        return ''
    return next(iter([*map(os.path.basename, tokenizer_files(folder)), *pieces]), '')


def stated_license(source: str) -> str:
    """The license that a checkpoint's card states, or its LICENSE file's first line, as they say.
    """
    folder = folder_of(source)

    def head(name):
        path = os.path.join(folder, name)
        try:
            regular(path)
            with open(path, encoding='utf-8', errors='replace') as f:
                return f.read(TEXT_BYTES)
        except (OSError, ValueError):
            return ''

    if card := re.match(r'---\n(.*?)\n---', head('README.md'), re.DOTALL):
        said = dict(re.findall(r'^(license(?:_name)?):[ \t]*(\S.*)$', card[1], re.MULTILINE))
        if stated := said.get('license_name', said.get('license', '')).strip(' \'"'):
            return stated[:200]
    for name in ('LICENSE', 'LICENSE.txt', 'LICENSE.md'):
        if lines := head(name).split('\n'):
            if first := next((line.strip(' #') for line in lines if line.strip(' #')), ''):
                return first[:200]
    return 'not stated'


# As an object.

@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint of another program as a config of ours and its parameters.

    params: nested dict of float32 arrays. format: what it was read as. history: what it tells of
    its origin and of how to generate, which `save` passes on.
    """

    config: mlc.ConfigDict
    params: dict
    format: str
    history: dict

    @functools.cached_property
    def _model(self):
        return jax.jit(functools.partial(_logits, model.abstract(self.config)[0]))

    def __repr__(self) -> str:
        rows, text = len(model.make_vocab(self.config).rows), self.config.vocab.text_tokens
        stated = [s.get('license') or 'not stated' for s in self.history.get('sources', ())]
        return (f'{self.format}: {model.count(self.params) / 1e6:.2f} M parameters, rows: {rows}, '
                f'ids of text: {text}, license: {", ".join(stated) or "not stated"}')

    def scores(self, tokens, *, mask=None, segment=None):
        """Logits for what comes next, float32.

        One row of tokens: [B, T] -> [B, T, V], entry t being about token t + 1. Many streams: the
        peer's own ids [B, K, T], frame by frame without delays, -1 where a stream says nothing ->
        {'text': [B, T, V], 'audio': [B, Q, T, card]}, entry t being about frame t itself, as the
        moshi package aligns them: NaN in a stream's last frames, which its delay pushes off the
        end.

        mask [B, T]: False is padding, on either side; segment [B, T]: several pieces in a row,
        numbered from 1, 0 being padding. Every piece is scored as if alone; padding gets NaN.
        """
        vocab = model.make_vocab(self.config)
        tokens = np.asarray(tokens)
        flat = len(vocab.rows) == 1
        letters = '[B, T]' if flat else f'[B, {len(vocab.rows)}, T]'
        if tokens.ndim != (2 if flat else 3) or (not flat and tokens.shape[1] != len(vocab.rows)):
            raise ValueError(f'tokens must be {letters}, got shape {tokens.shape}')
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f'tokens must be integers, got {tokens.dtype}')
        segment = _segments(tokens.shape[0], tokens.shape[-1], mask, segment)
        least = np.array([0 if flat else NOTHING] * len(vocab.rows))
        sizes = np.array([row.size for row in vocab.rows])
        streams = tokens[:, None] if flat else tokens
        streams = np.where(segment[:, None] > 0, streams, 0)
        wrong = (streams < least[:, None]) | (streams >= sizes[:, None])
        if wrong.any():
            b, k, t = np.argwhere(wrong)[0]
            raise ValueError(f'tokens of row {vocab.rows[k].name} lie in {least[k]}..'
                             f'{sizes[k] - 1}, got {streams[b, k, t]}')
        if flat:
            out, = self._model(self.params, _batch(streams, segment))
            return np.where((segment > 0)[..., None], np.asarray(out), np.float32(np.nan))
        return _each_alone(vocab, facts(self.config)['layout.delays'], streams, segment,
                           lambda batch: self._model(self.params, batch))

    def save(self, path: str, format: str | None = None, **options) -> dict:
        """Writes the checkpoint to the new folder `path`, in the format that it came in or another.

        options: what that format lets its user choose. dtype, of 'hf', 'kyutai' and 'kyutai-hf':
        'f32' (the default) or 'bf16', of all tensors; of 'gguf': 'f32', 'f16' (the default) or
        'q8_0', of the matrices; the others have none. Returns {'bytes', 'tensors', 'files'}; raises
        as `export.save` does.
        """
        return write.save(self.config, self.params, path, format or self.format,
                          history=self.history, **options)


def _logits(graph, params, batch):
    return [x for x in nnx.merge(graph, params).scores(batch) if x is not None]


def _segments(rows: int, columns: int, mask, segment) -> np.ndarray:
    """int32 [B, T] from whichever of the two is given."""
    if mask is not None and segment is not None:
        raise ValueError('give mask or segment, not both: segment 0 is padding')
    given = np.ones((rows, columns), bool) if mask is None and segment is None else (
        np.asarray(mask).astype(bool) if segment is None else np.asarray(segment))
    if given.shape != (rows, columns):
        raise ValueError(f'{"mask" if segment is None else "segment"} must be [B, T] = '
                         f'{[rows, columns]}, got shape {given.shape}')
    return given.astype(np.int32)


def _runs(segment_T) -> list[tuple[int, int]]:
    """(first, last + 1) of every piece; padding belongs to none."""
    edges = np.flatnonzero(np.diff(segment_T, prepend=-1, append=-1))
    return [(int(a), int(b)) for a, b in zip(edges[:-1], edges[1:], strict=True)
            if segment_T[a] > 0]


def _batch(tokens_BKT, segment_BT) -> dict:
    """A batch whose pieces count their columns from 0."""
    position, number = np.zeros_like(segment_BT), np.zeros_like(segment_BT)
    for b, row in enumerate(segment_BT):
        for i, (first, last) in enumerate(_runs(row)):
            position[b, first:last], number[b, first:last] = np.arange(last - first), i + 1
    return dict(tokens=np.asarray(tokens_BKT, np.int32), position=position, segment=number)


def _each_alone(vocab, late: Sequence[int], streams, segment, logits_of) -> dict:
    """Scores of delayed streams: a piece gets its own initial tokens, so it goes alone."""
    pieces = [(b, *run) for b, row in enumerate(segment) for run in _runs(row)]
    B, K, T = streams.shape
    start = np.array([row.start for row in vocab.rows])[:, None]
    spoken = [k for k, row in enumerate(vocab.rows) if k and row.predicted]
    longest = max((last - first for _, first, last in pieces), default=0)
    tokens = np.full((len(pieces), K, longest + 1), NOTHING, np.int32)
    where = np.zeros((len(pieces), longest + 1), np.int32)
    for i, (b, first, last) in enumerate(pieces):
        codes = streams[b, :, first:last]
        tokens[i, :, :last - first + 1] = duplex.delay(
            np.where(codes < 0, NOTHING, codes + start), vocab, late)
        where[i, :last - first + 1] = 1
    out = {'text': np.full((B, T, vocab.rows[0].predicted), np.nan, np.float32)}
    if spoken:
        card = vocab.rows[spoken[0]].predicted
        out['audio'] = np.full((B, len(spoken), T, card), np.nan, np.float32)
    if pieces:
        text, *audio = (np.asarray(x) for x in logits_of(_batch(tokens, where)))
        for i, (b, first, last) in enumerate(pieces):
            for q, k in enumerate([0, *spoken]):
                kept = max(0, last - first - late[k])
                found = (text, *audio)[q][i, late[k]:late[k] + kept]
                (out['text'][b] if not q else out['audio'][b, q - 1])[first:first + kept] = found
    return out


def load(path: str, *, format: str = '', mesh: Mapping | None = None,
         dtype: str = 'float32') -> Loaded:
    """The checkpoint in folder (or file) `path`, whatever program it belongs to.

    The model is built from the checkpoint's own config.json. format: what to read it as, which
    'hf:PATH' says too; by default what it says it is. mesh: how parameters spread over the devices,
    such as dict(fsdp=4); by default all lie on the first. dtype: of the activations; weights are
    float32. Raises ValueError in one line for whatever is damaged, missing or of no known kind.
    """
    stated, path = split_start(os.fspath(path))
    format, family, said, config, speaks = _bare(path, format or stated)
    config.frontend.dtype = dtype
    config.mesh = dict(mesh or {})
    source = open_source(config, family, said, path)
    target = flatten(placed(config, None if mesh else jax.devices()[:1]))
    params = {p: array(source, [whole(p, source.shapes[p])], leaf) for p, leaf in target.items()}
    history = dict(sources=[origin_of(path, format)], speaks=speaks, bundled=family.bundled(path))
    return Loaded(config, unflatten(params), format, history)


def _bare(path: str, format: str = ''):
    """(format, family, facts, config, how it generates) of the checkpoint in folder `path`: all but
    its tensors. See `_speaks` for the last."""
    format, values, said_in = described(path, format)
    family, folder = family_of(format), folder_of(path)
    columns = Json(values, said_in).number('max_position_embeddings', 4096)
    said = family.read(values, said_in)
    speaks, specials = _speaks(format, values, said_in, folder)
    with _told(said_in):
        config = config_of(said, columns=columns, specials=specials)
        family.check(facts(config))
        model.abstract(config)      # numbers that no model has
    _name_ids(config, folder)
    tokenizer = values.get('tokenizer_name', 'tokenizer.model')
    if isinstance(tokenizer, str) and tokenizer == os.path.basename(tokenizer) and os.path.isfile(
            os.path.join(folder, tokenizer)):
        config.vocab.tokenizer = os.path.join(folder, tokenizer)
    speaks['vocab'] = plain(config.vocab)
    return format, family, said, config, speaks


@contextlib.contextmanager
def _told(said_in: str):
    """Says of an error in what a file states which file it is."""
    try:
        yield
    except ValueError as e:
        if str(e).startswith(said_in):
            raise
        raise ValueError(f'{said_in}: ' + str(e).partition('\n')[0]) from None


def placed(config, devices=None):
    """The config's parameters as ShapeDtypeStructs that say where each lies on its mesh."""
    _, shapes, axes = model.abstract(config)
    options = plain(config.mesh)
    mesh = sharding.make_mesh({k: v for k, v in options.items() if k != 'rules'}, devices)
    where = sharding.of(shapes, axes, sharding.rules_of(options.get('rules', {})), mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=s),
                        shapes, where)


def _speaks(format: str, values: Mapping, said_in: str, folder: str
            ) -> tuple[dict, dict[str, int]]:
    """How a checkpoint generates, in its own words, and the bos and eos that it states, if any.

    The words: {'format', 'config': the ids that config.json states, as it states them, 'file': its
    generation_config.json or None, 'unstated': which of bos and eos nothing states, 'tokenizer':
    the files of its tokenizer}. Of several ids a config of ours gets the first, config.json's
    before the other file's.
    """
    path = os.path.join(folder, 'generation_config.json')
    file = read_json(path) if os.path.exists(path) else None
    stated = Json(values, said_in), Json(file or {}, path)
    specials = {name: ids[0] for name in ('bos', 'eos')
                if (ids := sum((j.ids(f'{name}_token_id') for j in stated), ()))}
    words = dict(format=format, config={k: values[k] for k in write.STATED if k in values},
                 file=file, unstated=[k for k in ('bos', 'eos') if k not in specials],
                 tokenizer=tokenizer_files(folder))
    return words, specials


def _name_ids(config, folder: str) -> None:
    """Which ids of a line are markers and units, and of which codec, where a `vocabulary.json` that
    fits says so. It is somebody's file: only plain names and numbers are taken from it."""
    path = os.path.join(folder, 'vocabulary.json')
    if not os.path.lexists(path):
        return
    said = read_json(path)
    codec, ranges, specials = (said.get(k) for k in ('codec', 'ranges', 'specials'))
    try:
        name, hz = codec['name'], float(codec['frame_hz'])
        known = dict(name=name, path='', frame_hz=hz, codebooks=config.codec.codebooks,
                     size=config.codec.size)
        if not re.fullmatch(r'\w{1,64}', name) or not 0 <= hz < 1e5:
            return
        if config.vocab.name == 'line':
            text, units = ranges['text']['size'], ranges['units']['size']
            first, count = ranges['markers']['start'], ranges['markers']['size']
            if any(type(n) is not int for n in (text, units, first, count)):
                return
            markers = sorted((i, m) for m, i in specials.items() if first <= i < first + count)
            vocab = dict(plain(config.vocab), text_tokens=text, multiple=config.vocab.text_tokens,
                         markers=tuple(str(m) for _, m in markers))
            known['size'] = units
            made = model.make_vocab(mlc.ConfigDict(dict(codec=known, vocab=vocab)))
            stated = {k: (r['start'], r['size']) for k, r in ranges.items()}
            if made.ranges != stated or made.size != config.vocab.text_tokens:
                return
            config.vocab = vocab
        config.codec = known
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        return      # no vocabulary of ours: the line stays unnamed

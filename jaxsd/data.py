# SPDX-License-Identifier: Apache-2.0
"""From a dataset directory to the batch of any step: read, choose, draw, pack, mix, cut for a host.

The order law: the batch at step n is a pure function of the configuration, the dataset, the seed
and n. It does not depend on how many processes share it, on threads, on the clock or on how often
the run was stopped. So an iterator's state is one number, restoring it replays nothing, and a
fingerprint beside it says what the number means.

A *source* is a choice of records and the layout that draws them; a stage mixes sources by their
share of columns. Nothing here imports jax: a worker that reads data must not wake an accelerator.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator

import numpy as np

from jaxsd import codec as codec_lib
from jaxsd import config as config_lib
from jaxsd import packing
from jaxsd.config import ConfigError
from jaxsd.dataset import Dataset, open_dataset
from jaxsd.types import Batch, Grid, Phrase, Record, Word
from jaxsd.vocab import Text, Vocab

REHEARSED = 1024        # grids drawn when a source is opened, to learn how wide its grids are;
                        # no record more than four times
_SOURCE = ('select', 'layout', 'fields')
_GROUPS_KEPT = 32       # packed groups kept per source: batches in flight share their groups
_AHEAD = 4              # batches made ahead of the step that asks for them

Account = dict[str, dict[str, float]]
"""What a batch consumed, per source: columns, tokens (cells that hold something), audio_s, records,
cropped_columns."""

_log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------- choosing

def _data_options(config) -> dict:
    """c.data as a plain dict after checking its names. Raises ConfigError."""
    data = config_lib.plain(config['data'])
    for key in data:
        if key not in ('path', 'sources'):
            raise config_lib.unknown('data', key, ('path', 'sources'))
    if not data.get('path'):
        raise ConfigError('data.path is empty: name a dataset directory, as in '
                          '--config.data.path=data/demo')
    if not data.get('sources'):
        raise ConfigError('data.sources must name at least one source')
    for name, source in data['sources'].items():
        for key in source:
            if key not in _SOURCE:
                raise config_lib.unknown(f'data.sources.{name}', key, _SOURCE)
        if not source.get('select') or isinstance(source['select'], str):
            raise ConfigError(f'data.sources.{name}.select must be a tuple of sources of the '
                              'dataset, as in select=(\'story\',)')
        for field, said in source.get('fields', {}).items():
            if not all(isinstance(x, str) and x for x in _phrases(said)) or not _phrases(said):
                raise ConfigError(f'data.sources.{name}.fields.{field} is a text or a tuple of '
                                  f'texts, got {said!r}')
    return data


def _phrases(said) -> tuple:
    return said if isinstance(said, tuple) else (said,)


def _source_options(config, name: str, layout=None) -> tuple[dict, str]:
    """The options of source `name` with its layout filled in, and where that layout was written.

    A source's own layout goes before the stage's (`layout`), and that before the config's.
    """
    sources = _data_options(config)['sources']
    if name not in sources:
        raise config_lib.unknown('data.sources', name, sources)
    options = dict(sources[name])
    if 'layout' in options:
        return options, f'data.sources.{name}.layout'
    options['layout'] = config_lib.plain(layout or config['layout'])
    return options, 'stage.layout' if layout else 'layout'


def _mixture(config, stage) -> dict[str, float]:
    """The stage's positive weights by source name. Raises ConfigError for bad names and weights."""
    name, weights = stage.get('name', ''), config_lib.plain(stage['data'])
    sources = _data_options(config)['sources']
    for source, weight in weights.items():
        if source not in sources:
            raise config_lib.unknown(f'stages {name!r} data', source, sources)
        if isinstance(weight, bool) or not isinstance(weight, int | float) \
                or not 0 <= weight < float('inf'):
            raise ConfigError(f'stages {name!r} data.{source} must be a weight of 0 or more, got '
                              f'{weight!r}')
    weights = {k: float(w) for k, w in sorted(weights.items()) if w > 0}
    if not weights:
        raise ConfigError(f'stages {name!r} data gives no source a positive weight')
    return weights


def _apart(config, stage) -> dict[str, float]:
    """The weights of the mixture that a stage reads in steps apart; {} where there is none."""
    apart = stage.get('apart')
    return _mixture(config, dict(stage) | {'data': apart['data']}) if apart else {}


def _tokenizer(vocab: Vocab) -> Callable[[Record, dict], Record]:
    """A function (record, fields of its source) that fills in the ids of everything written.

    The labels of a channel's style become fields of their own: 'tone=low' of channel 1 is the field
    'tone 1'. It remembers the ids of common words.
    """
    encode = lambda text: ()    # noqa: E731 - no tokenizer: ids come ready or not at all
    if vocab.tokenizer:
        encode = functools.lru_cache(1 << 18)(Text(vocab.tokenizer).encode)

    def fill(record: Record, given: dict) -> Record:
        fields = {name: tuple(p if p.ids else Phrase(p.text, encode(p.text)) for p in said)
                  for name, said in record.fields.items()}
        for name, said in given.items():
            fields[name] = tuple(Phrase(text, encode(text)) for text in _phrases(said))
        for channel, style in enumerate(record.style):
            for label in style.split():
                key, is_label, value = label.partition('=')
                if is_label and value:
                    fields[f'{key} {channel}'] = (Phrase(value, encode(value)),)
        words = tuple(Word(*word[:4], encode(word.text)) if vocab.tokenizer else word
                      for word in record.words)
        return dataclasses.replace(record, words=words, fields=fields)
    return fill


_EXTRAS = {'frontend.encoder.features': ('slot', 'feats'),
           'frontend.prenet.features': ('framed', 'frames'),
           'head.latents': ('framed', 'frames', 'means')}
"""Where a config says how wide what columns carry is: what says where there is some, and names."""


def extras(config, stage) -> dict[str, int]:
    """What columns carry beside tokens: by name how many numbers, 0 for one integer (see `lay`).

    feats, in the columns whose slot is not 0, for an encoder; frames, where framed is not 0, that a
    head speaks and a prenet hears; means, what they are expected to be before. Frames are left out
    of a stage of which every layout is one of ours that draws none.
    """
    out, tree = {}, config_lib.plain(config)
    sources = tree.get('data', {}).get('sources', {})
    drawn = [(sources[name].get('layout') or stage.get('layout') or tree['layout'])['name']
             for name in {**stage['data'], **(stage.get('apart') or {}).get('data', {})}
             if name in sources]
    silent = not any(':' in name or name.startswith('framed.') for name in drawn)
    for place, (where, *names) in _EXTRAS.items():
        at = tree
        for key in place.split('.'):
            at = at.get(key, {})
        if at and not (where == 'framed' and silent):
            out |= dict.fromkeys(names, int(at)) | {where: 0}
    return out


def _filler(config, vocab: Vocab) -> Callable[[Record, dict], Record]:
    """As `_tokenizer` makes it; it fills in log-mel frames, too, where columns carry sound, and
    latents where a head speaks them. On a line, units are the codes of the first codebook."""
    words = _tokenizer(vocab)
    tree = {slot: config_lib.plain(config[slot]) for slot in ('frontend', 'head', 'codec')
            if slot in config}
    frontend, head = tree.get('frontend', {}), tree.get('head', {})
    first = 'units' in vocab.ranges and tree['codec'].get('codebooks', 1) > 1
    codec = None
    if 'latents' in head:
        codec = config_lib.bind(tree['codec'], 'jaxsd.codec', 'codec')()
    elif not first and not {'encoder', 'prenet'} & set(frontend):
        return words

    def fill(record: Record, given: dict) -> Record:
        filled = {}
        if record.wav and {'encoder', 'prenet'} & set(frontend):
            filled['feats'] = codec_lib.log_mel(record.wav)
        if record.codes is not None and first:
            filled['units'] = tuple(record.codes[:, 0])
        if record.codes is not None and codec:
            filled['latents'] = tuple(codec_lib.Latents(codec, codes) for codes in record.codes)
        return dataclasses.replace(words(record, given), **filled)
    return fill


# -------------------------------------------------------------------------------------- drawing

@dataclasses.dataclass
class _Source:
    """Records of one split, drawn by one layout into rows of `columns`."""

    name: str
    dataset: Dataset
    split: str
    numbers: np.ndarray         # int64: which records of the split
    layout: Callable[..., Grid]
    vocab: Vocab
    columns: int
    fill: Callable[[Record, dict], Record]
    fields: dict
    extras: dict[str, int]

    def record(self, i: int) -> Record:
        return self.fill(self.dataset.record(self.split, int(self.numbers[i])), self.fields)

    def draw(self, i: int, *key) -> tuple[Record, Grid]:
        """Record `i` of the source and its grid, drawn from a generator seeded by `key` and it."""
        record = self.record(i)
        rng = packing.generator(*key, self.name, int(self.numbers[i]))
        try:
            grid = self.layout(record, vocab=self.vocab, rng=rng)
        except ValueError as e:
            raise ValueError(f'data.sources.{self.name}: record {record.id!r} of '
                             f'{self.dataset.path} cannot be drawn: {e}') from e
        if grid.tokens.shape[0] != len(self.vocab.rows):
            raise ValueError(f'data.sources.{self.name}: its layout draws {grid.tokens.shape[0]} '
                             f'streams, the vocabulary has {len(self.vocab.rows)} rows')
        for place, (_, *names) in _EXTRAS.items():
            for name in names:
                wanted = self.extras.get(name, 0)
                drawn = grid.extra[name].shape[1] if name in grid.extra else wanted
                if wanted and drawn != wanted:
                    raise ValueError(f'data.sources.{self.name}: its layout draws {drawn} features '
                                     f'per column, {place} is {wanted}')
        if set(grid.extra) - set(self.extras):
            raise ValueError(f'data.sources.{self.name}: its layout draws {", ".join(grid.extra)} '
                             'beside the grid, which rows cannot hold')
        return record, grid

    def rows(self, drawn: list[tuple[Record, Grid]], *, rows: int
             ) -> list[tuple[dict, dict, list[int]]]:
        """`drawn` packed into `rows` rows: per row, its arrays, its account and which of `drawn`
        its segments are."""
        widths = [grid.tokens.shape[1] for _, grid in drawn]
        out = []
        for placed in packing.best_fit(widths, rows=rows, columns=self.columns):
            row = packing.lay([(drawn[i][1], kept) for i, kept in placed],
                              streams=len(self.vocab.rows), columns=self.columns,
                              extras=self.extras)
            kept = sum(n for _, n in placed)
            out.append((row, {
                'columns': kept,
                'tokens': int((row['tokens'] >= 0).sum()),
                'audio_s': sum(self._audio_s(*drawn[i]) * n / widths[i] for i, n in placed),
                'records': len(placed),
                'cropped_columns': sum(widths[i] for i, _ in placed) - kept},
                [i for i, n in placed if n]))
        return out

    def _audio_s(self, record: Record, grid: Grid) -> float:
        """Seconds of sound behind `grid`: none when it was drawn as text alone."""
        first = min((start for name, (start, _) in self.vocab.ranges.items()
                     if name not in ('text', 'markers')), default=self.vocab.size)
        sounds = grid.tokens.max(initial=-1) >= first or any(
            grid.extra[where].any() for where, *_ in _EXTRAS.values() if where in grid.extra)
        return record.duration_s if sounds else 0.0


def _open_source(dataset: Dataset, config, name: str, vocab: Vocab, *, split: str, layout, fill,
                 extras: dict[str, int]) -> _Source:
    options, where = _source_options(config, name, layout)
    draw = config_lib.bind(options['layout'], 'jaxsd.layout', where, given=('vocab', 'rng'))
    _check_layout(draw, config, where)
    numbers = dataset.select(split, options['select'], f'data.sources.{name}.select')
    return _Source(name, dataset, split, numbers, draw, vocab, int(config['columns']), fill,
                   options.get('fields', {}), extras)


def _own_extras(config, source: str) -> dict[str, int]:
    return extras(config, dict(data={source: 1.0}))


def _check_layout(draw: functools.partial, config, where: str):
    """Raises ConfigError for a layout on another clock than the codec's, or later than a row."""
    options = {k: p.default for k, p in config_lib.options_of(draw.func).items()} | draw.keywords
    frame_hz = config['codec'].get('frame_hz')
    for key, value in options.items():
        if not isinstance(value, int | float):
            continue
        if key.endswith('_hz') and frame_hz is not None and value != frame_hz:
            raise ConfigError(f'{where}.{key} is {value}, but codec.frame_hz is {frame_hz}: they '
                              'must be the same')
        if key.endswith('_columns') and abs(value) >= config['columns']:
            raise ConfigError(f'{where}.{key} is {value}, but a row has only {config["columns"]} '
                              'columns')


class _Rows:
    """The endless rows of a source, any of them on its own: epoch after epoch, permuted anew."""

    def __init__(self, source: _Source, key: tuple):
        self._source, self._key = source, key
        _some_records(source)
        count = len(source.numbers)
        sample = np.linspace(0, count - 1, min(REHEARSED, 4 * count)).astype(int)
        widths = np.array([source.draw(i, *key, 'rehearsal', n)[1].tokens.shape[1]
                           for n, i in enumerate(sample)])
        facts = source.dataset.facts(source.split)[source.numbers]
        self.plan = packing.plan(facts, sample, widths, columns=source.columns)
        if self.plan.long:
            _log.warning('data.sources.%s: about %d of %d records are wider than a row of %d '
                         'columns and are cropped', source.name, self.plan.long, count,
                         source.columns)
        self._epoch = functools.lru_cache(2)(self._permuted)
        self._groups: collections.OrderedDict = collections.OrderedDict()
        self._lock = threading.Lock()

    def _permuted(self, epoch: int) -> list[np.ndarray]:
        return self.plan.epoch(packing.generator(*self._key, self._source.name, epoch, 'order'))

    def __getitem__(self, row: int) -> tuple[dict, dict]:
        number, row = divmod(row, self.plan.rows)
        with self._lock:                # so that two threads never draw the same group
            if number not in self._groups:
                epoch, group = divmod(number, self.plan.groups)
                drawn = [self._source.draw(int(i), *self._key, epoch)
                         for i in self._epoch(epoch)[group]]
                self._groups[number] = self._source.rows(drawn, rows=self.plan.rows)
                if len(self._groups) > _GROUPS_KEPT:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(number)
            return self._groups[number][row][:2]


# ------------------------------------------------------------------------------------- batching

def _collate(rows: list[tuple[str, dict, dict]]) -> tuple[Batch, Account]:
    arrays = {k: np.stack([row[k] for _, row, _ in rows]) for k in rows[0][1]}
    account: Account = {}
    for name, _, used in rows:
        total = account.setdefault(name, dict.fromkeys(used, 0))
        for key, value in used.items():
            total[key] += value
    return arrays, account


def _slice(batch: int, process_index: int, process_count: int) -> slice:
    """The rows of a batch that one of several processes makes."""
    if batch % process_count:
        raise ConfigError(f'a batch of {batch} rows cannot be shared by {process_count} processes: '
                          'make stage.batch a multiple of the process count')
    if not 0 <= process_index < process_count:
        raise ValueError(f'process_index must lie in 0..{process_count - 1}, got {process_index}')
    share = batch // process_count
    return slice(process_index * share, (process_index + 1) * share)


def _batch_rows(stage) -> int:
    batch = stage.get('batch')
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ConfigError(f'stages {stage.get("name", "")!r} batch must be a positive count of '
                          f'rows, got {batch!r}')
    return batch


class Batches:
    """This process's part of one batch after another, made ahead by threads: see `batches`."""

    def __init__(self, make: Callable[[int], tuple[Batch, Account]], fingerprint: dict[str, str], *,
                 start_step: int, threads: int):
        import grain  # late, for it imports jax's tree library (and wakes no device)

        self._fingerprint, self._next_step = fingerprint, start_step
        options = grain.ReadOptions(num_threads=threads,
                                    prefetch_buffer_size=_AHEAD if threads else 0)
        steps = grain.MapDataset.range(start_step, 2 ** 62).map(make)
        self._iterator = iter(steps.to_iter_dataset(options))

    def __iter__(self) -> 'Batches':
        return self

    def __next__(self) -> tuple[Batch, Account]:
        out = next(self._iterator)
        self._next_step += 1
        return out

    def state(self) -> dict:
        """What a checkpoint keeps: the step whose batch comes next, and what that means."""
        return {'next_step': self._next_step, 'fingerprint': self._fingerprint}

    def close(self):
        """Stops the threads."""
        self._iterator.close()


def batches(config, stage, vocab: Vocab, *, split: str = 'train', start_step: int = 0,
            process_index: int = 0, process_count: int = 1, threads: int = 2) -> Batches:
    """The training batches of a stage from `start_step` on, without end: (arrays, account) each.

    arrays: tokens int32 and weights float32 [B, K, T], position and segment int32 [B, T]. B is this
    process's consecutive part of the stage's batch; joined over processes in order, the parts are
    the same for any process count. account: what this part consumed, per source.
    stage: options with `batch` (rows), `data` (source: share of columns) and perhaps `layout`.
    Raises ConfigError for options that do not fit each other or the dataset, ValueError (from
    `next`, too) for damaged data.
    """
    weights, rows_per_batch = _mixture(config, stage), _batch_rows(stage)
    if start_step < 0:
        raise ValueError(f'start_step must not be negative, got {start_step}')
    part = _slice(rows_per_batch, process_index, process_count)
    dataset = open_dataset(_data_options(config)['path'], config['codec'])
    marks = _fingerprint(dataset, config, stage, vocab, split)
    key, fill = (int(config['seed']), stage.get('name', ''), split), _filler(config, vocab)
    apart = _apart(config, stage)
    rows = {name: _Rows(_open_source(dataset, config, name, vocab, split=split, fill=fill,
                                     layout=stage.get('layout'), extras=extras(config, stage)),
                        key)
            for name in sorted(weights | apart)}

    def turns(weights):
        """A share of columns: where rows are fuller, fewer of them make the share."""
        shares = packing.shares({n: w / rows[n].plan.fill for n, w in weights.items()})
        return tuple(shares), tuple(shares.values())
    kinds = [turns(weights), *([turns(apart)] if apart else [])]
    share = stage['apart']['share'] if apart else 0.0
    steps = tuple(packing.shares({'main': 1.0 - share, 'apart': share}).values())

    def make(step: int) -> tuple[Batch, Account]:
        kind, nth = packing.pick(step, steps) if apart else (0, step)
        names, weights = kinds[kind]
        made = []
        for row in range(nth * rows_per_batch + part.start, nth * rows_per_batch + part.stop):
            which, number = packing.pick(row, weights)
            made.append((names[which], *rows[names[which]][number]))
        arrays, account = _collate(made)
        return arrays | ({'apart': np.full(len(made), kind, bool)} if apart else {}), account

    return Batches(make, marks, start_step=start_step, threads=threads)


def check(config, stage, vocab: Vocab, *, split: str = 'train') -> None:
    """Raises what `batches` would raise for options that do not fit each other or the dataset.

    Opens every source of the stage and draws the first record of each kind; makes nothing.
    """
    weights = _mixture(config, stage) | _apart(config, stage)
    _batch_rows(stage)
    dataset = open_dataset(_data_options(config)['path'], config['codec'])
    fill = _filler(config, vocab)
    for name in weights:
        source = _open_source(dataset, config, name, vocab, split=split, fill=fill,
                              layout=stage.get('layout'), extras=extras(config, stage))
        _some_records(source)
        for kind in _source_options(config, name)[0]['select']:
            first = dataset.select(split, (kind,), f'data.sources.{name}.select')[:1]
            for i in np.flatnonzero(np.isin(source.numbers, first)):
                source.draw(i, int(config['seed']), 'check')


def _some_records(source: _Source) -> None:
    if not len(source.numbers):
        raise ConfigError(f'data.sources.{source.name} selects no record of split '
                          f'{source.split!r} of {source.dataset.path}')


def one_pass(config, source: str, vocab: Vocab, *, batch: int, split: str = 'test', layout=None,
             limit: int | None = None, process_index: int = 0, process_count: int = 1
             ) -> Iterator[tuple[Batch, Account, list[list[int]]]]:
    """Every record of `source` in `split` once (the first `limit`), packed, as (arrays, account,
    which): which[row][n] counts in stored order the record that is segment n + 1 of the row.

    The last batch is filled with empty rows. Drawn the same way at every call. `layout` takes the
    place of every other one, so that one set of records can be scored in several ways.
    """
    part = _slice(batch, process_index, process_count)
    dataset = open_dataset(_data_options(config)['path'], config['codec'])
    own = _with_layout(config, source, layout)
    source = _open_source(dataset, own, source, vocab, split=split, layout=None,
                          fill=_filler(config, vocab), extras=_own_extras(own, source))
    numbers = source.numbers[:limit]
    empty = packing.lay([], streams=len(vocab.rows), columns=source.columns,
                        extras=source.extras)
    waiting: list[tuple[str, dict, dict, list[int]]] = []
    for first in range(0, len(numbers), 256):
        drawn = [source.draw(i, int(config['seed']), 'one pass')
                 for i in range(first, min(first + 256, len(numbers)))]
        waiting += [(source.name, arrays, used, [first + i for i in which])
                    for arrays, used, which in source.rows(drawn, rows=len(drawn))
                    if used['records']]
        last = first + 256 >= len(numbers)
        while len(waiting) >= batch or (last and waiting):
            whole, waiting = waiting[:batch], waiting[batch:]
            none = dict.fromkeys(whole[0][2], 0)
            whole = (whole + [(source.name, empty, none, [])] * (batch - len(whole)))[part]
            yield *_collate([row[:3] for row in whole]), [row[3] for row in whole]


def _with_layout(config, source: str, layout):
    """The parts of `config` that drawing needs, with `source` drawn by `layout` if one is given."""
    data = _data_options(config)
    if layout is not None and source in data['sources']:
        data['sources'][source] = data['sources'][source] | {'layout': config_lib.plain(layout)}
    parts = ('codec', 'columns', 'layout', 'frontend', 'head')
    return {k: config[k] for k in parts if k in config} | {'data': data}


def examples(config, split: str, source: str, *, vocab: Vocab | None = None,
             limit: int | None = None) -> Iterator[Record]:
    """The records of `source` in `split`, in stored order; with `vocab`, their words carry ids."""
    options, _ = _source_options(config, source)
    dataset = open_dataset(_data_options(config)['path'], config['codec'])
    fill = _filler(config, vocab) if vocab is not None else (lambda record, fields: record)
    for i in dataset.select(split, options['select'], f'data.sources.{source}.select')[:limit]:
        yield fill(dataset.record(split, int(i)), options.get('fields', {}))


def layout_of(config, source: str) -> dict:
    """The options of the layout that draws `source`: its own or the config's."""
    return _source_options(config, source)[0]['layout']


def grid(config, source: str, vocab: Vocab, *, split: str = 'train', index: int = 0) -> Grid:
    """Record `index` of `source` as its layout draws it. Raises ConfigError past the end."""
    dataset = open_dataset(_data_options(config)['path'], config['codec'])
    opened = _open_source(dataset, config, source, vocab, split=split, layout=None,
                          fill=_filler(config, vocab), extras=_own_extras(config, source))
    if not 0 <= index < len(opened.numbers):
        raise ConfigError(f'--index {index}: source {source} has records 0..'
                          f'{len(opened.numbers) - 1} in split {split}')
    return opened.draw(index, int(config['seed']), 'show')[1]


def drawn(config, source: str, vocab: Vocab, record: Record) -> Grid:
    """A record that lies in no dataset, as `source` would draw it."""
    options, where = _source_options(config, source)
    draw = config_lib.bind(options['layout'], 'jaxsd.layout', where, given=('vocab', 'rng'))
    return draw(_tokenizer(vocab)(record, options.get('fields', {})), vocab=vocab,
                rng=packing.generator('drawn', record.id))


# -------------------------------------------------------------------------------------- identity

def _digest(value) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprint(config, stage, vocab: Vocab, *, split: str = 'train') -> dict[str, str]:
    """What the batches of a stage depend on: a short hash per part, so that a refusal names it."""
    dataset = open_dataset(_data_options(config)['path'], config['codec'])
    return _fingerprint(dataset, config, stage, vocab, split)


def _fingerprint(dataset: Dataset, config, stage, vocab: Vocab, split: str) -> dict[str, str]:
    weights, apart, words = _mixture(config, stage), _apart(config, stage), ''
    if vocab.tokenizer:
        Text(vocab.tokenizer)           # a file that is no tokenizer fails here, in one line
        with open(vocab.tokenizer, 'rb') as f:
            words = hashlib.file_digest(f, 'sha256').hexdigest()
    parts = {
        'order': packing.ORDER,
        'seed': [int(config['seed']), stage.get('name', '')],
        'columns': int(config['columns']),
        'batch': _batch_rows(stage),
        'mixture': [weights, stage['apart']['share'], apart] if apart else weights,
        'sources': {n: _source_options(config, n, stage.get('layout'))[0]
                    for n in weights | apart},
        'vocab': dataclasses.asdict(dataclasses.replace(vocab, tokenizer=words)),
        'dataset': [split, dataset.identity],
    }
    return {name: _digest(part) for name, part in parts.items()}


def codec(config) -> dict:
    """The identity of the codec whose ids the config's dataset holds (units for one codebook)."""
    manifest = open_dataset(_data_options(config)['path'], config['codec']).manifest
    return manifest['units' if config['codec']['codebooks'] == 1 else 'codes']


def same_codec(state: dict, config) -> None:
    """Raises ConfigError if the ids of the config's dataset are not those a checkpoint learned."""
    learned = state.get('codec')
    if learned and learned['sha256'] != codec(config)['sha256']:
        raise ConfigError(f'the model learned the ids of codec {learned["name"]} '
                          f'{learned["sha256"][:12]}, but {config["data"]["path"]} was encoded by '
                          f'{codec(config)["name"]} {codec(config)["sha256"][:12]}; use the '
                          'dataset it was trained on, or one encoded by the same codec file')


def resume(state: dict, fingerprint: dict[str, str]) -> int:
    """The step to start from so that batches go on where `state` was taken.

    Raises ConfigError naming what differs when `fingerprint` is not the one in `state`.
    """
    saved = state['fingerprint']
    differ = sorted(k for k in saved.keys() | fingerprint.keys()
                    if saved.get(k) != fingerprint.get(k))
    if differ:
        raise ConfigError(f'the checkpoint was made with other data: {", ".join(differ)} changed '
                          'since; undo the change or begin a new workdir')
    return int(state['next_step'])

# SPDX-License-Identifier: Apache-2.0
"""A dataset directory, read with suspicion: manifest, index, and records checked against both.

A directory holds a manifest (what the data are, how they were made, the hash of every file), the
records as ArrayRecord shards of a tensorflow-datasets builder, and per split an index with what
planning needs to know of every record. Sizes are checked when it is opened, each record's checksum
when it is read; nothing read from it decides how much memory is taken before it was checked against
the size of the files, and nothing in it is executed.
"""

import functools
import glob
import hashlib
import json
import os
import re
import shlex
import zipfile
import zlib

import numpy as np

from jaxsd.config import ConfigError, plain
from jaxsd.types import Phrase, Record, Turn, Word

FORMAT = 1
_INDEX = {'duration_s': 'f4', 'words': 'i4', 'units': 'i4', 'source_id': 'i2', 'crc32': 'u4'}
_MANIFEST_BYTES = 64 << 20
_HASHED_BYTES = 64 << 20        # files beside the shards are hashed at opening up to this size
_REMEMBERED_S = 30 * 3600       # a split no longer than this stays decoded in memory (about 0.4 GB)
_IDENTITY = ('name', 'frame_hz', 'codebooks', 'size')


_STORED = {
    **dict.fromkeys(('id', 'source', 'language', 'style', 'word_text', 'phone_text', 'turn_text')),
    **dict.fromkeys(('codes', 'units'), '<i2'), 'codes_shape': '<i4', 'units_lengths': '<i4',
    **{f'{kind}_{k}': dtype for kind in ('word', 'phone', 'turn')
       for k, dtype in (('channel', 'i1'), ('start_s', '<f4'), ('end_s', '<f4'))},
    'duration_s': '<f4', 'wav': 'u1', 'crc32': '<i8'}     # the type of each feature; None is text
_ADDED = {'field_name': None, 'field_text': None, 'side_name': None, 'side_lengths': '<i4',
          'sides': '<i2'}       # features that datasets made before them lack


def parse(stored: bytes) -> dict:
    """The features of a stored tf.train.Example, as `decode` takes them.

    What TFDS's own parser gives, at a seventh of its cost: one contract instead of any features.
    """
    from tensorflow_datasets.proto import tf_example_pb2
    features, out = tf_example_pb2.Example.FromString(stored).features.feature, {}
    for name, dtype in (_STORED | _ADDED).items():
        if name not in features:
            if name in _ADDED:
                out[name] = b'' if dtype is None else np.zeros(0, dtype)
                continue
            raise ValueError(f'it has no feature {name!r}')
        feature = features[name]
        kind = feature.WhichOneof('kind')
        values = getattr(feature, kind).value if kind else ()
        if kind == 'bytes_list':
            value = values[0] if values else b''
            out[name] = value if dtype is None else np.frombuffer(value, dtype)
        else:
            out[name] = np.array(values, dtype)
    return out


def decode(features: dict) -> Record:
    """One stored dict of arrays and strings as a Record.

    Raises ValueError when the parts contradict each other or the record's checksum.
    """
    text = {k: bytes(features[k]).decode() for k in ('id', 'source', 'language', 'style')}

    def bad(what: str) -> ValueError:
        return ValueError(f'record {text["id"]!r}: {what}')

    codes = np.asarray(features['codes'], '<i2')
    units = np.asarray(features['units'], '<i2')
    sides = np.asarray(features['sides'], '<i2')
    times = {k: np.asarray(features[k], '<f4') for k in ('word_start_s', 'word_end_s')}
    found = zlib.crc32(b''.join([
        bytes(features['id']), codes.tobytes(), units.tobytes(), bytes(features['word_text']),
        times['word_start_s'].tobytes(), times['word_end_s'].tobytes(),
        bytes(features['field_name']), bytes(features['field_text']), sides.tobytes()]))
    if found != _scalar(features['crc32']):
        raise bad('its content does not match its checksum')

    shape = tuple(int(n) for n in features['codes_shape'])
    if len(shape) != 3 or min(shape) < 0 or int(np.prod(shape, dtype=object)) != codes.size:
        raise bad(f'codes of shape {shape} cannot have {codes.size} values')
    lengths = [int(n) for n in features['units_lengths']]
    if sum(lengths) != units.size or min(lengths, default=0) < 0:
        raise bad(f'units of lengths {lengths} cannot have {units.size} values')

    def columns(kind: str):
        joined = bytes(features[f'{kind}_text']).decode()
        parts = [joined.split('\n') if joined else [],
                 *(np.asarray(features[f'{kind}_{k}']).tolist()
                   for k in ('channel', 'start_s', 'end_s'))]
        if len({len(p) for p in parts}) != 1:
            raise bad(f'{kind} texts, channels and times differ in number')
        return parts

    names, written = (bytes(features[k]).decode() for k in ('field_name', 'field_text'))
    if names.count('\n') != written.count('\n'):
        raise bad('names and texts of fields differ in number')
    fields: dict[str, tuple[Phrase, ...]] = {}
    for name, phrase in zip(names.split('\n'), written.split('\n'), strict=True):
        if name:
            fields[name] = (*fields.get(name, ()), Phrase(phrase))

    beside = list(filter(None, bytes(features['side_name']).decode().split('\n')))
    tall = [int(n) for n in features['side_lengths']]
    if len(tall) != len(beside) or sum(tall) != sides.size or min(tall, default=0) < 0:
        raise bad(f'side streams {beside} of lengths {tall} cannot have {sides.size} values')
    streams: dict[str, tuple[np.ndarray, ...]] = {}
    for name, values in zip(beside, np.split(sides, np.cumsum(tall[:-1])), strict=False):
        streams[name] = (*streams.get(name, ()), values)

    texts, channels, starts, ends = columns('turn')
    return Record(
        **{k: text[k] for k in ('id', 'source', 'language')},
        duration_s=float(_scalar(features['duration_s'])),
        codes=codes.reshape(shape) if codes.size else None,
        units=tuple(np.split(units, np.cumsum(lengths[:-1]))) if lengths else (),
        words=tuple(map(Word, *columns('word'))), phones=tuple(map(Word, *columns('phone'))),
        turns=tuple(map(Turn, channels, starts, ends, texts)),
        style=tuple(text['style'].split('\n')) if text['style'] else (),
        sides=streams, fields=fields,
        wav=bytes(np.asarray(features['wav'], np.uint8)))


def _scalar(value):
    return np.asarray(value).reshape(()).item()


class Dataset:
    """An opened dataset directory. Make one with `open_dataset`."""

    def __init__(self, path: str, manifest: dict, builder, index: dict[str, dict[str, np.ndarray]]):
        self.path, self.manifest, self._index = path, manifest, index
        self._split_info = {name: builder.info.splits[name] for name in index}
        from tensorflow_datasets import decode as tfds_decode
        self._open = functools.cache(lambda split: builder.as_data_source(
            split, deserialize_method=tfds_decode.DeserializeMethod.RAW_BYTES))
        self._remember = {name: float(i['duration_s'].sum()) < _REMEMBERED_S
                          for name, i in index.items()}
        self._records: dict[tuple[str, int], Record] = {}

    @property
    def identity(self) -> dict[str, str]:
        """The hash of every file that batches are made from, by name."""
        return {name: entry['sha256'] for name, entry in sorted(_listed(self.manifest).items())
                if name in self.manifest['shards'] or name.startswith('index-')}

    def _of(self, split: str) -> dict[str, np.ndarray]:
        if split not in self._index:
            raise ConfigError(f'{self.path} has no split {split!r} (it has: '
                              f'{", ".join(sorted(self._index))})')
        return self._index[split]

    def facts(self, split: str) -> np.ndarray:
        """What a grid's width depends on, float64 [records, 3]: seconds, words, units."""
        index = self._of(split)
        return np.stack([index[k].astype(np.float64) for k in ('duration_s', 'words', 'units')], 1)

    def select(self, split: str, sources, path: str) -> np.ndarray:
        """The numbers of the records of `split` whose source is among `sources`, in order.

        Raises ConfigError naming `path`, the place in the config, for a source that is not there.
        """
        known = self.manifest['sources']
        for name in sources:
            if name not in known:
                raise ConfigError(f'{path} names {name!r}; the records of {self.path} come from: '
                                  f'{", ".join(sorted(known))}')
        wanted = [known.index(name) for name in sources]
        return np.flatnonzero(np.isin(self._of(split)['source_id'], wanted))

    def record(self, split: str, number: int) -> Record:
        """Record `number` of `split`. Raises ValueError naming file and record if it is damaged."""
        key = split, number
        if key in self._records:
            return self._records[key]
        index = self._of(split)
        try:
            features = parse(self._open(split)[number])
            record = decode(features)
            if _scalar(features['crc32']) != int(index['crc32'][number]):
                raise ValueError(f'record {record.id!r}: not the one that the index describes')
        except Exception as e:      # array_record and TFDS raise many kinds for damaged bytes
            raise ValueError(f'{self._shard(split, number)}: record {number} of split {split!r} '
                             f'cannot be read: {_line(e)}; copy or make the dataset again') from e
        if self._remember[split] and not record.wav:
            self._records[key] = record
        return record

    def _shard(self, split: str, number: int) -> str:
        info = self._split_info[split]
        last = np.cumsum(info.shard_lengths)
        name = sorted(info.filenames)[int(np.searchsorted(last, number, side='right'))]
        return os.path.join(self.path, 'speech', name)


def _line(error: Exception) -> str:
    """The first line of an error's text, or its kind when it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _listed(manifest: dict) -> dict[str, dict]:
    return manifest['shards'] | manifest.get('files', {})


def _read_manifest(path: str) -> dict:
    file = os.path.join(path, 'manifest.json')
    if not os.path.isfile(file):
        raise ConfigError(f'no dataset at {path}: make one with python -m data_pipelines.demo '
                          f'--out {shlex.quote(path)}')
    try:
        if os.path.getsize(file) > _MANIFEST_BYTES:
            raise ValueError(f'it is larger than {_MANIFEST_BYTES >> 20} MiB')
        with open(file, encoding='utf-8') as f:
            manifest = json.load(f)
        if manifest['format'] != FORMAT:
            raise ValueError(f'it has format {manifest["format"]!r}, this program reads {FORMAT}')
        for name, entry in _listed(manifest).items():
            if os.path.isabs(name) or '..' in name.split('/') or '\\' in name:
                raise ValueError(f'it lists a file outside the dataset: {name!r}')
            if not isinstance(entry['bytes'], int) or not isinstance(entry['sha256'], str):
                raise ValueError(f'bytes and sha256 of {name!r} are not a number and a text')
        for name, split in manifest['splits'].items():
            if not isinstance(split['records'], int) or split['records'] < 0:
                raise ValueError(f'split {name!r} has {split["records"]!r} records')
        if not all(isinstance(name, str) for name in manifest['sources']):
            raise ValueError('sources are not texts')
        for stream in ('units', 'codes'):
            if manifest[stream] is not None:
                {key: manifest[stream][key] for key in (*_IDENTITY, 'sha256')}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        what = f'it lacks {e}' if isinstance(e, KeyError) else _line(e)
        raise ValueError(f'{file} is no manifest of a dataset: {what}') from e
    return manifest


def _check_files(path: str, manifest: dict):
    for name, entry in _listed(manifest).items():
        file = os.path.join(path, name)
        if not os.path.isfile(file):
            raise ValueError(f'{file} is missing: the manifest lists it; copy or make the dataset '
                             'again')
        found = os.path.getsize(file)
        if found != entry['bytes']:
            raise ValueError(f'{file} has {found} bytes, the manifest says {entry["bytes"]}: it '
                             'was cut short or replaced; copy or make the dataset again')
        if name not in manifest['shards'] and found <= _HASHED_BYTES:
            with open(file, 'rb') as f:
                if hashlib.file_digest(f, 'sha256').hexdigest() != entry['sha256']:
                    raise ValueError(f'{file} does not match its hash in the manifest: it was '
                                     'damaged or replaced; copy or make the dataset again')


def _check_codec(path: str, manifest: dict, codec):
    """Raises ConfigError when the dataset was tokenized by another codec than the config's."""
    codec = plain(codec)
    streams = ('units', 'codes') if codec.get('codebooks', 1) == 1 else ('codes', 'units')
    identity, other = (manifest[s] for s in streams)
    if identity is None:
        if other is None:
            return                  # text only: there is nothing to disagree about
        raise ConfigError(f'codec {codec["name"]!r} expects {streams[0]}, {path} has only '
                          f'{streams[1]}, made by {other["name"]!r}')
    expected = {'codebooks': 1} | {k: codec[k] for k in _IDENTITY if k in codec}
    if weights := codec.get('path'):        # no path: nothing but training, which needs no file
        if os.path.isdir(weights):
            weights = os.path.join(weights, 'model.safetensors')
        if not os.path.isfile(weights):
            raise ConfigError(f'codec.path: no file {weights}; name the codec of the dataset, or '
                              'none with --config.codec.path= (then nothing is heard or spoken)')
        with open(weights, 'rb') as f:
            expected['sha256'] = hashlib.file_digest(f, 'sha256').hexdigest()
    own = [name for name, about in manifest['files'].items()
           if about['sha256'] == identity['sha256']]
    for key, value in expected.items():
        if identity[key] == value:
            continue
        if key == 'sha256' and own:
            raise ConfigError(f'codec.path: {weights} is not the codec that made the {streams[0]} '
                              f'of {path}; give --config.codec.path='
                              f'{shlex.quote(os.path.join(path, own[0]))}')
        raise ConfigError(f'codec.{key} is {value!r}, but the {streams[0]} of {path} were made '
                          f'with {key} {identity[key]!r}: use the codec of the dataset or make '
                          'the dataset again')


def _read_index(path: str, split: str, records: int, sources: int) -> dict[str, np.ndarray]:
    """The arrays of a split's index. Sizes are checked before anything is allocated."""
    file, out = os.path.join(path, f'index-{split}.npz'), {}
    try:
        with zipfile.ZipFile(file) as archive:
            for name, kind in _INDEX.items():
                with archive.open(f'{name}.npy') as f:
                    version = np.lib.format.read_magic(f)
                    if version != (1, 0):
                        raise ValueError(f'{name} is stored in a version of .npy that is not 1.0')
                    shape, _, dtype = np.lib.format.read_array_header_1_0(f)
                    if shape != (records,) or dtype != np.dtype('<' + kind):
                        raise ValueError(f'{name} is {dtype} {shape}, not {kind} ({records},)')
                    data = f.read(records * dtype.itemsize + 1)     # the end checks the CRC
                    if len(data) != records * dtype.itemsize:
                        raise ValueError(f'{name} has {len(data)} bytes for {records} records')
                    out[name] = np.frombuffer(data, dtype)
        if not np.isfinite(out['duration_s']).all() or min(
                out[k].min(initial=0) for k in ('duration_s', 'words', 'units', 'source_id')) < 0:
            raise ValueError('it holds negative or infinite numbers')
        if out['source_id'].max(initial=0) >= max(sources, 1):
            raise ValueError(f'it names source {out["source_id"].max()} of {sources}')
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, RuntimeError,
            zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f'{file} cannot be used as the index of {records} records: {_line(e)}; '
                         'copy or make the dataset again') from e
    return out


def _open_builder(path: str):
    """The TFDS builder in `path`/speech, after checking that its files name only TFDS classes."""
    folder = os.path.join(path, 'speech')
    try:
        for file in glob.glob(os.path.join(glob.escape(folder), '*.json')):
            with open(file, encoding='utf-8') as f:
                named = re.findall(r'"pythonClassName"\s*:\s*"([^"]*)"', f.read(_MANIFEST_BYTES))
            for name in named:      # TFDS imports whatever stands there
                if not name.startswith('tensorflow_datasets.'):
                    raise ValueError(f'{file} names a class outside tensorflow_datasets: {name}')
        import tensorflow_datasets as tfds
        return tfds.builder_from_directory(folder)
    except Exception as e:          # TFDS raises many kinds for a damaged directory
        raise ValueError(f'{folder} is no readable tensorflow-datasets directory: {_line(e)}; copy '
                         'or make the dataset again') from e


def open_dataset(path: str, codec=None) -> Dataset:
    """Opens the dataset directory `path` after checking its manifest, file sizes and indices.

    codec: the config's codec options, which must describe the codec that made the dataset.
    Raises ConfigError when there is no dataset or another codec made it, ValueError for damage.
    """
    manifest = _read_manifest(path)
    _check_files(path, manifest)
    if codec is not None:
        _check_codec(path, manifest, codec)
    size = sum(entry['bytes'] for entry in manifest['shards'].values())
    builder, index = None, {}
    for split, entry in manifest['splits'].items():
        if entry['records'] > size:
            raise ValueError(f'{path}/manifest.json says {entry["records"]} records in split '
                             f'{split!r}, more than the {size} bytes of its shards can hold')
        index[split] = _read_index(path, split, entry['records'], len(manifest['sources']))
    builder = _open_builder(path)
    for split, entry in manifest['splits'].items():
        stored = builder.info.splits.get(split)
        if stored is None or stored.num_examples != entry['records']:
            raise ValueError(f'{path}/speech holds {stored.num_examples if stored else 0} records '
                             f'of split {split!r}, the manifest says {entry["records"]}')
        for name in stored.filenames:
            if f'speech/{name}' not in manifest['shards']:
                raise ValueError(f'{path}/speech/{name} is not among the shards of the manifest')
    return Dataset(path, manifest, builder, index)

# SPDX-License-Identifier: Apache-2.0
"""Records to disk: ArrayRecord through a TFDS builder, an index beside it, and a manifest.

A dataset is a directory that either is whole or is not there. Everything is written under
`<out>.partial`, read back, summed up, and only then given its name in one step, so a reader never
meets half of it and a pipeline that was killed finds what it had finished::

    out/manifest.json           what it is, how it was made, the hash of every file
    out/speech/                 the TFDS builder directory: splits of ArrayRecord shards
    out/index-<split>.npz       lengths and checksums in the order of the split's data source
    out/text.model ...          whatever else the pipeline placed there (tokenizers, codecs)
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import time
import types
import zlib
from collections.abc import Iterable, Mapping

import numpy as np

from jaxsd.types import Record

FORMAT = 1
_MARK = 'partial.json'
_WORK = 'work'
_locks = {}             # staging directory -> its open, locked mark; held until the process ends


def _put(path: str, text: str):
    """Writes `text` to `path` in one step."""
    with open(path + '.new', 'w', encoding='utf-8') as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + '.new', path)


def told(out: str, error: Exception) -> str:
    """An error in words: one of the system that names no file came of writing `out`."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return (f'{error.filename}: {error.strerror}' if error.filename else
            f'{out} cannot be written: {error.strerror}')


def sha256(path: str) -> str:
    """Hex digest of a file's bytes."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


# ------------------------------------------------------------------------------------ one record

def crc32(record: Record) -> int:
    """Checksum of what a model learns from: id, codes, units, words with their times, and the rest.

    Fields and side streams change nothing where there are none.
    """
    parts = [record.id.encode()]
    if record.codes is not None:
        parts.append(np.ascontiguousarray(record.codes, '<i2').tobytes())
    parts += [np.ascontiguousarray(u, '<i2').tobytes() for u in record.units]
    parts.append('\n'.join(w.text for w in record.words).encode())
    parts.append(np.array([w.start_s for w in record.words], '<f4').tobytes())
    parts.append(np.array([w.end_s for w in record.words], '<f4').tobytes())
    parts += [text.encode() for text in _fields(record)]
    parts += [np.ascontiguousarray(s, '<i2').tobytes() for _, s in _sides(record)]
    return zlib.crc32(b''.join(parts))


def _fields(record: Record) -> tuple[str, str]:
    """The names and the texts of all phrases, a line each; of several under one name, in order."""
    pairs = [(name, phrase.text) for name, said in sorted(record.fields.items()) for phrase in said]
    return '\n'.join(name for name, _ in pairs), '\n'.join(text for _, text in pairs)


def _sides(record: Record) -> list[tuple[str, np.ndarray]]:
    """(name, values) of every side stream, channel by channel."""
    return [(name, values) for name, of in sorted(record.sides.items()) for values in of]


def _checked(record: Record):
    """Raises ValueError naming the record when it contradicts itself."""
    def bad(what):
        return ValueError(f'record {record.id!r}: {what}')

    if not record.id or not record.source:
        raise bad('id and source must not be empty')
    spoken = record.codes is not None or record.units
    if record.codes is not None:
        if record.codes.ndim != 3 or not np.issubdtype(record.codes.dtype, np.integer):
            raise bad(f'codes must be integers [C, K, T], got {record.codes.dtype} '
                      f'{record.codes.shape}')
        if record.units and len(record.units) != record.codes.shape[0]:
            raise bad(f'{len(record.units)} channels of units, {record.codes.shape[0]} of codes')
    for name, said in record.fields.items():
        if not name or '\n' in name or any(not p.text or '\n' in p.text for p in said):
            raise bad(f'field {name!r} is empty or has a line break')
    for name, array in [('codes', record.codes), *(('units', u) for u in record.units),
                        *_sides(record)]:
        if array is not None and array.size and not 0 <= array.min() <= array.max() < 32768:
            raise bad(f'{name} must lie in 0..32767, got {array.min()}..{array.max()}')
    channels = record.codes.shape[0] if record.codes is not None else max(len(record.units), 1)
    slack_s = 1e-3
    for kind in ('words', 'phones', 'turns'):
        last = 0.0
        for item in getattr(record, kind):
            if '\n' in item.text or not item.text:
                raise bad(f'{kind} hold an empty text or one with a line break')
            if not 0 <= item.channel < channels:
                raise bad(f'{kind}: {item.text!r} is on channel {item.channel} of {channels}')
            if not (0 <= item.start_s <= item.end_s <= record.duration_s + slack_s):
                raise bad(f'{kind}: {item.text!r} at {item.start_s:.3f}..{item.end_s:.3f} s lies '
                          f'outside 0..{record.duration_s:.3f} s')
            if item.start_s < last:
                raise bad(f'{kind} must be sorted by start: {item.text!r}')
            last = item.start_s
    if not spoken and any(w.end_s for w in record.words):
        raise bad('words of a text-only record must have times 0')


def encode(record: Record) -> dict:
    """`record` as the flat dict of arrays and strings that is stored. Raises ValueError when bad.

    codes are flattened from [C, K, T] with their shape beside them (0, 0, 0 for text only), units
    are joined over channels with their lengths, texts are joined by line breaks.
    """
    _checked(record)
    codes = np.zeros((0, 0, 0), np.int16) if record.codes is None else record.codes
    units = [np.asarray(u, np.int16) for u in record.units]
    out = {
        'id': record.id, 'source': record.source, 'language': record.language,
        'duration_s': np.float32(record.duration_s),
        'codes': np.ascontiguousarray(codes, np.int16).reshape(-1),
        'codes_shape': np.array(codes.shape, np.int32),
        'units': np.concatenate(units) if units else np.zeros(0, np.int16),
        'units_lengths': np.array([len(u) for u in units], np.int32),
        'style': '\n'.join(record.style),
        'wav': np.frombuffer(record.wav, np.uint8),
        'crc32': np.int64(crc32(record)),
    }
    out['field_name'], out['field_text'] = _fields(record)
    sides = _sides(record)
    out['side_name'] = '\n'.join(name for name, _ in sides)
    out['side_lengths'] = np.array([len(s) for _, s in sides], np.int32)
    out['sides'] = np.concatenate([np.zeros(0, np.int16), *(s for _, s in sides)]).astype(np.int16)
    for name, items in (('word', record.words), ('phone', record.phones), ('turn', record.turns)):
        out[f'{name}_text'] = '\n'.join(i.text for i in items)
        out[f'{name}_channel'] = np.array([i.channel for i in items], np.int8)
        out[f'{name}_start_s'] = np.array([i.start_s for i in items], np.float32)
        out[f'{name}_end_s'] = np.array([i.end_s for i in items], np.float32)
    return out


@functools.cache
def _builder_class():
    """The TFDS builder; made on first use because importing TFDS takes seconds."""
    import tensorflow_datasets as tfds
    tfds.disable_progress_bar()

    def many(dtype):
        # The default encoding of integers is a varint each: about half the reading speed.
        return tfds.features.Tensor(shape=(None,), dtype=dtype, encoding='bytes')

    features = {'duration_s': tfds.features.Scalar(np.float32),
                'crc32': tfds.features.Scalar(np.int64),
                'codes': many(np.int16), 'units': many(np.int16), 'wav': many(np.uint8),
                'codes_shape': tfds.features.Tensor(shape=(3,), dtype=np.int32),
                'units_lengths': many(np.int32), 'sides': many(np.int16),
                'side_lengths': many(np.int32)}
    features |= {k: tfds.features.Text() for k in ('id', 'source', 'language', 'style',
                                                   'field_name', 'field_text', 'side_name')}
    for name in ('word', 'phone', 'turn'):
        features |= {f'{name}_text': tfds.features.Text(), f'{name}_channel': many(np.int8),
                     f'{name}_start_s': many(np.float32), f'{name}_end_s': many(np.float32)}

    with tfds.core.registered.skip_registration():
        class Speech(tfds.core.GeneratorBasedBuilder):
            """Aligned utterances and dialogues as tokens."""

            VERSION = tfds.core.Version('1.0.0')
            splits: Mapping[str, Iterable[Record]] = {}

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features),
                    description='Aligned utterances and dialogues, tokenized.')

            def _split_generators(self, dl_manager):
                return {name: self._generate_examples(name) for name in self.splits}

            def _generate_examples(self, name):
                for record in self.splits[name]:
                    yield record.id, encode(record)

    return Speech


@contextlib.contextmanager
def _features_in_order():
    """Makes TFDS write the features of an example in a fixed order.

    They are a protobuf map, whose order on disk otherwise changes from one process to the next, so
    that the same records would never give the same shards.
    """
    from tensorflow_datasets.core.example_serializer import ExampleSerializer
    before = ExampleSerializer.serialize_example
    ExampleSerializer.serialize_example = lambda self, example: self.get_tf_example(
        example).SerializeToString(deterministic=True)
    try:
        yield
    finally:
        ExampleSerializer.serialize_example = before


@contextlib.contextmanager
def _spilling_without_tensorflow():
    """TFDS sorts up to 1 GB of a split in memory and the rest through a thousand files, which it
    opens by TensorFlow's functions; Python's own do the same.
    """
    import resource

    from tensorflow_datasets.core import shuffle
    files = types.SimpleNamespace(GFile=open, exists=os.path.exists, remove=os.remove)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = shuffle.tf
    shuffle.tf = types.SimpleNamespace(
        io=types.SimpleNamespace(gfile=files),
        errors=types.SimpleNamespace(ResourceExhaustedError=()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        shuffle.tf = before
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ------------------------------------------------------------------------------- the directory

def begin(out: str, arguments: dict) -> str:
    """The directory `<out>.partial` to work in, new or left by an earlier run alike.

    `arguments` is what the content depends on, as JSON types. Raises ValueError when `out` already
    holds something, or the partial directory is not ours, in use, or of other arguments.
    """
    out = os.path.abspath(out)
    staging, mark = out + '.partial', os.path.join(out + '.partial', _MARK)
    if os.path.lexists(out):
        if not os.path.isdir(out) or os.path.islink(out):
            raise ValueError(f'{out} exists and is not a directory: choose another --out')
        if os.path.exists(os.path.join(out, 'manifest.json')):
            raise ValueError(f'{out} already holds a finished dataset: choose another --out or '
                             f'delete it')
        if os.listdir(out):
            raise ValueError(f'{out} holds files that no pipeline made: choose another --out')
    text = json.dumps(arguments, sort_keys=True)
    if not os.path.exists(mark):
        if os.path.isdir(staging) and os.listdir(staging):
            raise ValueError(f'{staging} holds files that no pipeline made: move it away')
        os.makedirs(staging, exist_ok=True)
        _put(mark, text)
    if mark not in _locks:
        handle = open(mark, encoding='utf-8')   # stays open: closing it would drop the lock
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            raise ValueError(f'{staging} is being written by another process') from None
        _locks[mark] = handle
    with open(mark, encoding='utf-8') as f:
        before = f.read()
    if before != text:
        _locks.pop(mark).close()
        raise ValueError(f'{staging} was begun with other arguments ({before}): finish it with '
                         f'those or delete it')
    os.makedirs(os.path.join(staging, _WORK), exist_ok=True)
    return staging


def work(staging: str) -> str:
    """The part of `staging` that is thrown away when the dataset is finished."""
    return os.path.join(staging, _WORK)


def source_of(directory: str, split: str):
    """Random access to the stored dicts of one split, without TensorFlow."""
    import tensorflow_datasets as tfds
    builder = tfds.builder_from_directory(os.path.join(directory, 'speech'))
    return builder.as_data_source(split)


def _index(source, sources: list[str], hours: dict) -> dict:
    """Per-record arrays in the order of `source`; adds to `sources` and `hours`.

    Raises ValueError when a record does not come back as it was written.
    """
    columns = {'duration_s': np.zeros(len(source), np.float32),
               'words': np.zeros(len(source), np.int32),
               'units': np.zeros(len(source), np.int32),
               'source_id': np.zeros(len(source), np.int16),
               'crc32': np.zeros(len(source), np.uint32)}
    for i in range(len(source)):
        row = source[i]
        name = row['source'].decode()
        if name not in sources:
            sources.append(name)
        check = zlib.crc32(b''.join(
            [row['id'], row['codes'].astype('<i2').tobytes(), row['units'].astype('<i2').tobytes(),
             row['word_text'], row['word_start_s'].astype('<f4').tobytes(),
             row['word_end_s'].astype('<f4').tobytes(), row['field_name'], row['field_text'],
             row['sides'].astype('<i2').tobytes()]))
        if check != int(row['crc32']):
            raise ValueError(f'record {row["id"].decode()!r} did not come back as it was written')
        columns['duration_s'][i] = row['duration_s']
        columns['words'][i] = len(row['word_channel'])
        columns['units'][i] = len(row['units'])
        columns['source_id'][i] = sources.index(name)
        columns['crc32'][i] = check
        hours[name] = hours.get(name, 0.0) + float(row['duration_s']) / 3600
    return columns


def write(out: str, splits: Mapping[str, Iterable[Record]], *, units: dict | None,
          codes: dict | None, aligner: dict, license: str, command: str,
          sample_rate_hz: int) -> dict:
    """Writes `splits` (name -> records) as the finished dataset `out`; returns what was measured.

    units, codes: identities of the tokenizers that made them, None where records carry none.
    aligner: where word times come from. Files that the caller placed in `begin(out, ...)` become
    part of the dataset. Splits without records are left out; at least one record is needed.
    Raises ValueError for a bad record and OSError when the disk is full; `out` then does not exist.
    Returns {'records', 'bytes', 'written_per_s', 'read_per_s', 'manifest'}.
    """
    out = os.path.abspath(out)
    staging = out + '.partial'
    if os.path.join(staging, _MARK) not in _locks:
        begin(out, {'command': command})
    target, scratch = os.path.join(staging, 'speech'), os.path.join(work(staging), 'tfds')
    for old in (target, scratch):               # left by a run that was killed in this function
        shutil.rmtree(old, ignore_errors=True)

    kept = {}
    for name, stream in splits.items():
        stream = iter(stream)
        first = next(stream, None)
        if first is not None:
            kept[name] = itertools.chain([first], stream)
    if not kept:
        raise ValueError('no records to write')

    import tensorflow_datasets as tfds
    began = time.perf_counter()
    builder = _builder_class()(data_dir=scratch, file_format='array_record')
    builder.splits = kept
    # TFDS announces itself on stdout, which belongs to the pipeline that calls.
    try:
        with (contextlib.redirect_stdout(io.StringIO()), _features_in_order(),
              _spilling_without_tensorflow()):
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(
                compute_stats=tfds.download.ComputeStatsMode.SKIP, try_download_gcs=False))
    except concurrent.futures.BrokenExecutor:       # a RuntimeError too, of the caller's own
        raise
    except RuntimeError as e:                       # what array_record makes of a full disk
        raise OSError(f'{out} cannot be written: {" ".join(str(e).split())}') from e
    written_s = time.perf_counter() - began
    os.rename(builder.data_path, target)

    sources, summary, count = [], {}, 0
    began = time.perf_counter()
    for name in kept:
        source, hours = source_of(staging, name), {}
        index = _index(source, sources, hours)
        np.savez(os.path.join(staging, f'index-{name}.npz'), **index)
        count += len(source)
        summary[name] = {'records': len(source), 'hours': round(sum(hours.values()), 6),
                         'hours_by_source': {k: round(v, 6) for k, v in sorted(hours.items())}}
    read_s = time.perf_counter() - began

    def described(paths):
        return {os.path.relpath(p, staging): {'bytes': os.path.getsize(p), 'sha256': sha256(p)}
                for p in sorted(paths)}

    shards = described(e.path for e in os.scandir(target) if '.array_record-' in e.name)
    files = described(e.path for e in os.scandir(staging)
                      if e.is_file() and e.name not in (_MARK, 'manifest.json'))
    manifest = {'format': FORMAT, 'units': units, 'codes': codes, 'aligner': aligner,
                'splits': summary, 'sources': sources, 'shards': shards, 'files': files,
                'license': license, 'command': command, 'sample_rate_hz': sample_rate_hz}
    _put(os.path.join(staging, 'manifest.json'), json.dumps(manifest, indent=1, sort_keys=True))
    shutil.rmtree(work(staging))
    os.replace(staging, out)
    os.remove(os.path.join(out, _MARK))
    _locks.pop(os.path.join(staging, _MARK)).close()
    return {'records': count, 'bytes': sum(s['bytes'] for s in shards.values()),
            'written_per_s': count / written_s, 'read_per_s': count / read_s,
            'manifest': manifest}


def overrides(out: str, manifest: dict, sources: Iterable[str]) -> str:
    """What lets a config train on `sources` of the dataset `out`, for people to copy."""
    from jaxsd import vocab
    text = os.path.join(out, 'text.model')
    told = [f'to train on it, with a config of one stream (units) or of several (codes):\n  '
            f'--config.data.path={out} --config.vocab.tokenizer={text} '
            f'--config.vocab.text_tokens={vocab.Text(text).size}']
    for kind, file in (('units', 'units.safetensors'), ('codes', 'codec.safetensors')):
        if (made := manifest[kind]) and os.path.exists(os.path.join(out, file)):
            told.append(f'  {kind}: --config.codec.path={os.path.join(out, file)} ' + ' '.join(
                f'--config.codec.{k}={made[k]}' for k in ('name', 'frame_hz', 'codebooks', 'size')))
    names = ', '.join(f"'{s}'" for s in sources)
    return '\n'.join([*told, '  and for each SOURCE of the config (its data.sources): '
                      f'"--config.data.sources.SOURCE.select=({names},)"'])

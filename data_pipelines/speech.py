# SPDX-License-Identifier: Apache-2.0
"""Your own speech to a dataset directory: wav, flac or mp3 with transcripts or word times.

Manifests are JSON lines; paths are relative to the manifest. Two kinds of rows may be mixed::

    {"path": "calls/17.wav", "duration": 61.4}          two channels, word times in calls/17.json
    {"path": "clips/a.flac", "text": "hello there"}     one channel, aligned here by pocketsphinx

The first is the format of kyutai's moshi-finetune: channel 0 is the model's voice, channel 1 the
other speaker, and the .json beside the sound holds {"alignments": [[word, [start, end],
"SPEAKER_MAIN"], ...]} in seconds, often of the main speaker alone. Either may hold what is written
beside the speech, for layouts that ask for it by name: "fields": {"task": "translate into French",
"ask": ["of several texts", "one is drawn"]}::

    python -m data_pipelines.speech --manifest calls.jsonl --out data/calls --fit
    python -m data_pipelines.speech --manifest calls.jsonl --out data/calls \\
        --units data/demo/units.safetensors --codec data/demo/codec.safetensors \\
        --text-model data/demo/text.model

A row that cannot be used is named by manifest and line, counted, kept in bad_rows.jsonl, and
skipped or fatal by --bad; nothing is repaired in silence. An interrupted run starts over.
"""

import argparse
import collections
import concurrent.futures
import io
import json
import math
import multiprocessing
import os
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from data_pipelines import align, records
from jaxsd import codec
from jaxsd.flags import Parser
from jaxsd.types import Phrase, Record, Turn, Word

MAIN = 'SPEAKER_MAIN'
SLACK_S = 0.1               # by which a stated duration or a word's end may miss the audio
TURN_GAP_S = 0.8            # a pause that ends a turn
FIT_S, FIT_CLIP_S = 900.0, 60.0
_RATE_HZ = codec.SAMPLE_RATE_HZ
_MAX_LINE, _MAX_SIDECAR = 1 << 20, 1 << 26


class BadRow(ValueError):
    """Why a row cannot be used: `kind` is counted in the summary, `said` is what is wrong."""

    def __init__(self, kind: str, said: str):
        super().__init__(kind, said)        # both, so that it survives the way between processes
        self.kind, self.said = kind, said


class Row(NamedTuple):
    """One usable line of a manifest. `text` is None when a file beside the sound has the words."""

    manifest: str
    line: int
    id: str
    path: str
    text: str | None
    duration_s: float | None
    fields: dict[str, tuple[Phrase, ...]]


# -------------------------------------------------------------------------------- reading rows

def _number(x, name: str, kind: str) -> float:
    if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x):
        raise BadRow(kind, f'{name} should be a finite number, got {x!r:.40}')
    return float(x)


def _parsed(manifest: str, line: int, data: bytes) -> Row:
    if len(data) > _MAX_LINE:
        raise BadRow('bad JSON', f'the line is longer than {_MAX_LINE} bytes')
    try:
        row = json.loads(data.decode('utf-8-sig'))
    except (ValueError, RecursionError) as e:
        raise BadRow('bad JSON', f'not JSON: {e}') from None
    if not isinstance(row, dict) or not isinstance(row.get('path'), str) or not row['path']:
        raise BadRow('bad JSON', 'should be an object with a "path"')
    text = row.get('text')
    if text is not None and not isinstance(text, str):
        raise BadRow('bad JSON', '"text" should be a string')
    if text is not None and not text.split():
        raise BadRow('empty transcript', '"text" holds no words')
    duration_s = row.get('duration')
    if duration_s is not None:
        duration_s = _number(duration_s, '"duration"', 'wrong duration')
    fields = row.get('fields', {})
    if not isinstance(fields, dict):
        raise BadRow('bad fields', '"fields" should be an object of texts by name')
    written = {}
    for name, said in fields.items():
        said = said if isinstance(said, list) else [said]
        if not name or '\n' in name or not said or any(
                not isinstance(x, str) or not x.strip() or '\n' in x for x in said):
            raise BadRow('bad fields', f'field {name!r:.40} should be a text or a list of texts, '
                                       'none of them empty or with a line break')
        written[name] = tuple(map(Phrase, said))
    path = os.path.join(os.path.dirname(os.path.abspath(manifest)), row['path'])
    return Row(manifest, line, row['path'], path, text, duration_s, written)


def rows_of(manifest: str) -> Iterator[tuple[int, Row | BadRow]]:
    """(line number, row or what is wrong with it) of each line that is not blank.

    Raises ValueError when the manifest cannot be read.
    """
    try:
        with open(manifest, 'rb') as f:
            line = 0
            while data := f.readline(_MAX_LINE + 1):
                line += 1
                whole = data
                while len(whole) > _MAX_LINE and whole and not whole.endswith(b'\n'):
                    whole = f.readline(_MAX_LINE + 1)       # the rest of an endless line
                if not data.strip():
                    continue
                try:
                    yield line, _parsed(manifest, line, data)
                except BadRow as e:
                    yield line, e
    except OSError as e:
        raise ValueError(f'cannot read the manifest {manifest}: {e.strerror}') from e


def check_manifest(manifest: str) -> None:
    """Raises ValueError for a file that cannot be read or that has lines, but none in JSON."""
    first = None
    for line, row in rows_of(manifest):
        if isinstance(row, Row) or row.kind != 'bad JSON':
            return
        first = first or f'{manifest} is no manifest of JSON lines: line {line}: {row.said}'
    if first:
        raise ValueError(f'{first}; write a line like {{"path": "a.wav", "text": "what is said"}} '
                         'for each sound file (see --help)')


def sound(row: Row, max_s: float, *, load: bool = True) -> tuple[np.ndarray, int]:
    """float32 [C, S] and the rate of a row's file; the header is checked before anything is loaded.

    With load=False the header alone is checked and S is 0. Raises BadRow.
    """
    import soundfile
    if not os.path.isfile(row.path):
        raise BadRow('missing file', f'no file {row.path}')
    try:
        codec.whole_wav(row.path)
        with soundfile.SoundFile(row.path) as f:
            channels, rate, frames = f.channels, f.samplerate, f.frames
            want = 2 if row.text is None else 1
            if channels != want:
                raise BadRow('wrong channel count', f'{row.path} has {channels} channels, ' + (
                    'a dialogue has 2' if want == 2 else 'speech with a "text" has 1'))
            if frames <= 0:
                raise BadRow('zero-length audio', f'{row.path} holds no sound')
            if not 4000 <= rate <= 192_000:     # also bounds what a lying header may allocate
                raise BadRow('unreadable audio', f'{row.path} claims {rate} samples a second, not '
                                                 '4000..192000')
            seconds = frames / rate
            if row.duration_s is not None and abs(row.duration_s - seconds) > SLACK_S:
                raise BadRow('wrong duration', f'{row.path} lasts {seconds:.3f} s, the row says '
                                               f'{row.duration_s:.3f} s')
            if seconds > max_s:
                raise BadRow('too long', f'{row.path} lasts {seconds:.1f} s, more than '
                                         f'--max-seconds {max_s:g}')
            wav = f.read(frames if load else 0, dtype='float32', always_2d=True).T
    except BadRow:
        raise
    except ValueError as e:
        raise BadRow('unreadable audio', str(e)) from None
    except (soundfile.SoundFileError, OSError, RuntimeError) as e:
        said = str(e).splitlines()[0]
        raise BadRow('unreadable audio', f'{row.path}: {said}') from None
    if load and abs(wav.shape[1] - frames) > SLACK_S * rate:    # mp3 headers may be a little off
        raise BadRow('unreadable audio', f'{row.path}: the header says {frames} samples, '
                                         f'{wav.shape[1]} could be read')
    if not np.isfinite(wav).all():
        raise BadRow('unreadable audio', f'{row.path} holds samples that are not finite')
    return wav, rate


def alignments(path: str, duration_s: float) -> tuple[Word, ...]:
    """The words of a sidecar file, sorted; channel 0 is the main speaker's. Raises BadRow."""
    try:
        if os.path.getsize(path) > _MAX_SIDECAR:
            raise BadRow('bad alignment', f'{path} is larger than {_MAX_SIDECAR} bytes')
        with open(path, encoding='utf-8-sig') as f:
            data = json.load(f)
    except FileNotFoundError:
        raise BadRow('missing alignment', f'no file {path}, and the row has no "text"') from None
    except (OSError, ValueError, RecursionError) as e:
        raise BadRow('bad alignment', f'{path} cannot be read as JSON: {e}') from None
    items = data.get('alignments') if isinstance(data, dict) else None
    if not isinstance(items, list):
        raise BadRow('bad alignment', f'{path} has no list "alignments"')
    words = []
    for i, item in enumerate(items):
        at = f'{path}: alignment {i}'
        if not (isinstance(item, list) and len(item) == 3 and isinstance(item[0], str)
                and isinstance(item[1], list) and len(item[1]) == 2 and isinstance(item[2], str)):
            raise BadRow('bad alignment', f'{at} should be [word, [start, end], speaker], '
                                          f'got {item!r:.60}')
        start_s, end_s = (_number(x, f'{at}: a time', 'bad alignment') for x in item[1])
        text = ' '.join(item[0].split())
        if not text:
            raise BadRow('bad alignment', f'{at} has no word')
        if end_s < start_s:
            raise BadRow('bad alignment', f'{at}: {text!r} ends before it starts '
                                          f'({start_s:.3f}..{end_s:.3f} s)')
        if start_s < 0 or start_s > duration_s or end_s > duration_s + SLACK_S:
            raise BadRow('alignment outside the audio',
                         f'{at}: {text!r} at {start_s:.3f}..{end_s:.3f} s, the audio lasts '
                         f'{duration_s:.3f} s')
        words.append(Word(text, 0 if item[2] == MAIN else 1, start_s, min(end_s, duration_s)))
    if not words:
        raise BadRow('empty transcript', f'{path} holds no words')
    return tuple(sorted(words, key=lambda w: w.start_s))


def turns_of(words: Iterable[Word]) -> tuple[Turn, ...]:
    """Stretches of one speaker's words without a long pause, sorted by start."""
    open_turns, turns = {}, []
    for word in words:
        turn = open_turns.get(word.channel)
        if turn and word.start_s - turn.end_s <= TURN_GAP_S:
            turn = Turn(turn.channel, turn.start_s, max(turn.end_s, word.end_s),
                        f'{turn.text} {word.text}')
        else:
            turns += [turn] if turn else []
            turn = Turn(word.channel, word.start_s, word.end_s, word.text)
        open_turns[word.channel] = turn
    return tuple(sorted([*turns, *open_turns.values()], key=lambda t: (t.start_s, t.channel)))


# -------------------------------------------------------------------------------- making records

class Settings(NamedTuple):
    """What a worker needs to turn a row into a record."""

    units: str              # file of a fitted codec, or ''
    codes: str
    mimi: str               # weights of Mimi, or ''
    codebooks: int          # of Mimi
    max_s: float
    language: str
    keep_wav: bool
    pronunciations: tuple[tuple[str, str], ...]


_settings: Settings | None = None
_codecs: tuple = ()


def _start(settings: Settings) -> None:
    global _settings, _codecs
    _settings = settings
    codes = codec.fitted(settings.codes) if settings.codes else None
    if settings.mimi:
        codes = codec.mimi(path=settings.mimi, codebooks=settings.codebooks)
    _codecs = (codec.fitted(settings.units) if settings.units else None, codes)


def _resampled(wav: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    import soxr
    if rate == wanted:
        return wav
    return np.stack([soxr.resample(channel, rate, wanted) for channel in wav])


def _record(row: Row) -> Record | BadRow:
    """A row as a record, or what is wrong with it."""
    try:
        wav, rate = sound(row, _settings.max_s)
        wav_16k = _resampled(wav, rate, _RATE_HZ)
        duration_s, phones = wav.shape[1] / rate, ()
        if row.text is None:
            words = alignments(os.path.splitext(row.path)[0] + '.json', duration_s)
            turns = turns_of(words)
        else:
            try:
                aligned = align.align(wav_16k[0], row.text.split(),
                                      pronunciations=dict(_settings.pronunciations))
            except ValueError as e:
                raise BadRow('cannot be aligned', f'{row.path}: {e}') from None
            words, phones = (tuple(Word(t, 0, min(a, duration_s), min(b, duration_s))
                                   for t, a, b in timed) for timed in aligned)
            turns = turns_of(words)
        units, codes = _codecs
        tokens = None
        if codes:
            at = _resampled(wav, rate, codes.identity['sample_rate_hz'])
            tokens = np.stack([codes.encode(np.ascontiguousarray(c)) for c in at])
        flac = io.BytesIO()
        if _settings.keep_wav:
            import soundfile
            soundfile.write(flac, wav_16k.T, _RATE_HZ, format='FLAC', subtype='PCM_16')
        return Record(
            id=row.id, source=os.path.splitext(os.path.basename(row.manifest))[0],
            language=_settings.language, duration_s=duration_s, codes=tokens,
            units=tuple(units.encode(c)[0] for c in wav_16k) if units else (),
            words=words, phones=phones, turns=turns, wav=flac.getvalue(), fields=row.fields)
    except BadRow as e:
        return e


def _each(rows: list[Row], settings: Settings, jobs: int) -> Iterator[tuple[Row, Record | BadRow]]:
    """Rows with their records in order, made by `jobs` processes a few rows ahead."""
    if jobs == 1:
        _start(settings)
        for row in rows:
            yield row, _record(row)
        return
    with concurrent.futures.ProcessPoolExecutor(
            jobs, multiprocessing.get_context('spawn'), _start, (settings,)) as pool:
        waiting, left = collections.deque(), iter(rows)
        try:
            while True:
                while len(waiting) < 4 * jobs and (row := next(left, None)):
                    waiting.append((row, pool.submit(_record, row)))
                if not waiting:
                    return
                row, future = waiting.popleft()
                yield row, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# -------------------------------------------------------------------------------- fitting

def _heard(rows: list[Row], max_s: float, seed: int) -> Iterator[np.ndarray]:
    """Up to FIT_S seconds of channels of rows in a random order, at 16 kHz; bad rows wait."""
    left = FIT_S
    for i in np.random.default_rng(seed).permutation(len(rows)):
        if left <= 0:
            return
        try:
            wav, rate = sound(rows[i], max_s)
        except BadRow:              # named when its turn comes
            continue
        for channel in _resampled(wav[:, :int(FIT_CLIP_S * rate)], rate, _RATE_HZ):
            left -= len(channel) / _RATE_HZ
            yield np.ascontiguousarray(channel)


def _texts(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        if row.text is not None:
            yield row.text
            continue
        try:
            words = alignments(os.path.splitext(row.path)[0] + '.json', math.inf)
        except BadRow:
            continue
        yield ' '.join(w.text for w in words)


def fit_text(path: str, texts: Iterable[str], size: int) -> None:
    """A sentencepiece model with the ids that layouts expect, able to write any text (bytes).

    Ids: 0 <epad>, 1 <s>, 2 </s>, 3 <pad>, 4 <unk>. Raises ValueError when there is too little text.
    """
    import sentencepiece
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=out, vocab_size=size, byte_fallback=True,
            hard_vocab_limit=False, model_type='unigram', unk_id=4, bos_id=1, eos_id=2, pad_id=3,
            control_symbols=['<epad>'], num_threads=1, minloglevel=2)
    except RuntimeError as e:
        raise ValueError(f'no text model of {size} pieces can be learned from this text: '
                         f'{str(e).splitlines()[0]}') from e
    with open(path + '.new', 'wb') as f:
        f.write(out.getvalue())
    os.replace(path + '.new', path)


# -------------------------------------------------------------------------------- the pipeline

class Report:
    """Bad rows, said at once and counted: in bad_rows.jsonl, on stderr, and in the summary."""

    def __init__(self, fatal: bool, path: str):
        self.kinds, self._fatal, self._path, self._first = collections.Counter(), fatal, path, ''

    def settle(self) -> None:
        """Raises ValueError if there were bad rows and they are fatal: all are said by then."""
        if self._fatal and self._first:
            raise ValueError(f'bad rows: {self.kinds.total()}, the first {self._first} (--bad skip '
                             'goes on without such rows)')

    def __call__(self, manifest: str, line: int, bad: BadRow) -> None:
        said = f'{manifest}:{line}: {bad.kind}: {bad.said}'
        self._first = self._first or said
        self.kinds[bad.kind] += 1
        print(f'{"bad" if self._fatal else "skipped"} {said}', file=sys.stderr)
        with open(self._path, 'a', encoding='utf-8') as f:
            f.write(json.dumps({'manifest': manifest, 'line': line, 'kind': bad.kind,
                                'said': bad.said}) + '\n')


def _accepted(manifests: Iterable[str], report: Report, seen: dict[str, str],
              max_s: float) -> list[Row]:
    """Rows whose line and sound header are good, so that no split is cut from bad ones."""
    rows = []
    for manifest in manifests:
        for line, row in rows_of(manifest):
            if isinstance(row, Row) and row.id in seen:
                row = BadRow('repeated path', f'{row.id} stands at {seen[row.id]} already')
            if isinstance(row, Row):
                try:
                    sound(row, max_s, load=False)
                except BadRow as e:
                    row = e
            if isinstance(row, BadRow):
                report(manifest, line, row)
            else:
                seen[row.id] = f'{manifest}:{line}'
                rows.append(row)
    return rows


def _divided(rows: list[Row], share: float, seed: int) -> dict[str, list[Row]]:
    """Train and test rows: the test rows are those whose hashed ids are lowest, at least one."""
    count = max(round(share * len(rows)), 1) if share > 0 and len(rows) > 1 else 0
    order = sorted(rows, key=lambda r: zlib.crc32(f'{seed}:{r.id}'.encode()))
    test = {r.id for r in order[:count]}
    return {'train': [r for r in rows if r.id not in test],
            'test': [r for r in rows if r.id in test]}


def _tokenizers(staging: str, rows: list[Row], args) -> tuple[str, str]:
    """Puts tokenizers into `staging`, given or learned; returns the paths of units and codes."""
    units, codes, text = (os.path.join(staging, n) for n in
                          ('units.safetensors', 'codec.safetensors', 'text.model'))
    if args.fit:
        print(f'learn tokenizers from up to {FIT_S:g} s of speech', file=sys.stderr)
        fit_text(text, _texts(rows), args.text_pieces)
        wavs = list(_heard(rows, args.max_seconds, args.seed))
        flag = '--unit-size'
        try:
            codec.fit_kmeans(wavs, path=units, frame_hz=25.0, size=args.unit_size, seed=args.seed)
            flag = '--code-size'
            if not args.mimi:
                codec.fit_rvq(wavs, path=codes, frame_hz=12.5, codebooks=args.codebooks,
                              size=args.code_size, seed=args.seed)
        except ValueError as e:
            raise ValueError(f'{e} ({flag})') from None
    for given, target, books in ((args.units, units, 'one'), (args.codec, codes, 'several')):
        if given:
            many = codec.fitted(given).identity['codebooks'] > 1
            if many != (books == 'several'):
                raise ValueError(f'{given} has {"several codebooks" if many else "one codebook"}: '
                                 f'--units takes one, --codec several')
            shutil.copyfile(given, target)
    if args.text_model:
        from jaxsd import vocab
        vocab.Text(args.text_model)         # raises ValueError when it is none
        shutil.copyfile(args.text_model, text)
    return (units if os.path.exists(units) else ''), (codes if os.path.exists(codes) else '')


def _pronunciations(path: str) -> tuple[tuple[str, str], ...]:
    if not path:
        return ()
    try:
        with open(path, encoding='utf-8') as f:
            data = json.load(f)
    except (OSError, ValueError) as e:
        raise ValueError(f'cannot read the pronunciations {path}: {e}') from e
    if not isinstance(data, dict) or not all(
            isinstance(v, str) and v.split() and set(v.split()) <= set(align.PHONES)
            for v in data.values()):
        raise ValueError(f'{path} should map words to ARPAbet, like {{"zorblax": '
                         f'"Z AO R B L AE K S"}}')
    return tuple(sorted(data.items()))


def build(args) -> tuple[dict, Report]:
    """Makes the dataset that the command line asks for. Raises ValueError in one clear line."""
    for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'):
        os.environ[name] = '1'      # inherited by the workers: one thread each, on every core
    if args.fit and (args.units or args.codec or args.text_model):
        raise ValueError('--fit learns the tokenizers: drop it, or --units, --codec and '
                         '--text-model')
    if args.codec and args.mimi:
        raise ValueError('--codec and --mimi both name a codec: give one')
    if not args.fit and not (args.text_model and (args.units or args.codec or args.mimi)):
        raise ValueError('name the tokenizers with --text-model and --units, --codec or --mimi, '
                         'or learn them with --fit')
    for manifest in [*args.manifest, *args.test]:
        check_manifest(manifest)        # say so before anything is made
    pronunciations = _pronunciations(args.pronunciations)
    command = 'python -m data_pipelines.speech ' + ' '.join(
        f'--{k.replace("_", "-")}' + ('' if v is True else ' ' + ' '.join(
            map(str, v if isinstance(v, list) else [v])))
        for k, v in sorted(vars(args).items()) if v and k not in ('out', 'jobs', 'bad'))
    staging = records.begin(args.out, {
        'command': command, 'manifests': [records.sha256(m) for m in args.manifest + args.test]})
    try:
        return _made(args, staging, command, pronunciations)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _made(args, staging: str, command: str, pronunciations) -> tuple[dict, Report]:
    from tqdm import tqdm
    for left in ('bad_rows.jsonl', 'units.safetensors', 'codec.safetensors', 'text.model'):
        if os.path.exists(os.path.join(staging, left)):     # of a run that was killed
            os.remove(os.path.join(staging, left))
    report = Report(args.bad == 'fatal', os.path.join(staging, 'bad_rows.jsonl'))

    seen = {}
    train = _accepted(args.manifest, report, seen, args.max_seconds)
    if args.test:
        test = _accepted(args.test, report, seen, args.max_seconds)
        parts = {'train': train, 'test': test}
    else:
        parts = _divided(train, args.test_share, args.seed)
    report.settle()
    if not parts['train']:
        raise ValueError(f'no row to train on in {", ".join(args.manifest)}')
    units, codes = _tokenizers(staging, parts['train'], args)
    settings = Settings(units, codes, args.mimi, args.codebooks, args.max_seconds, args.language,
                        args.keep_wav, pronunciations)
    with tqdm(desc='read, align and encode', total=sum(map(len, parts.values())), unit='row',
              mininterval=0.5) as bar:
        def stream(split):
            for row, made in _each(parts[split], settings, args.jobs):
                bar.update()
                if isinstance(made, BadRow):
                    report(row.manifest, row.line, made)
                    continue
                if row.text is not None and not made.phones:
                    bar.write(f'{row.manifest}:{row.line}: {row.path} has words but no phones',
                              sys.stderr)
                yield made
            report.settle()

        _start(settings)                    # also reads the identities
        units, codes = (c.identity if c else None for c in _codecs)
        texts = [row.text is not None for rows in parts.values() for row in rows]
        aligner = align.identity() if any(texts) else {}
        if not all(texts):
            aligner |= {'dialogues': 'as given'}
        measured = records.write(
            args.out, {split: stream(split) for split in parts}, units=units, codes=codes,
            aligner=aligner, license=args.license, command=command, sample_rate_hz=_RATE_HZ)
    return measured, report


def main(argv=None) -> int:
    parser = Parser(
        prog='python -m data_pipelines.speech', epilog=__doc__.partition('\n\n')[2],
        description=__doc__.partition('\n\n')[0],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--manifest', nargs='+', required=True, help='JSON lines of "path" and "duration", or of '
        '"path" and "text"')
    add('--test', nargs='+', default=[], help='manifests held out for evaluation')
    add('--test-share', type=float, default=0.05, help='of the rows, where --test is not '
        'given (default: %(default)s)')
    add('--out', required=True, help='dataset directory to make')
    add('--fit', action='store_true', help='learn the tokenizers from this speech')
    add('--units', default='', help='a units file to encode with')
    add('--codec', default='', help='a codec file to encode with')
    add('--mimi', default='', help='weights of Mimi to encode with: a local file or directory')
    add('--text-model', default='', help='the sentencepiece model that goes with them')
    add('--unit-size', type=int, default=500, help='units to learn (default: %(default)s)')
    add('--code-size', type=int, default=256, help='codes per codebook to learn (default: '
        '%(default)s)')
    add('--codebooks', type=int, default=8, help='codebooks to learn, or to use of Mimi '
        '(default: %(default)s)')
    add('--text-pieces', type=int, default=1000, help='text pieces to learn (default: '
        '%(default)s)')
    add('--bad', choices=('skip', 'fatal'), default='fatal', help='what a row that cannot be used '
        'does (default: %(default)s, once all rows were looked at)')
    add('--max-seconds', type=float, default=align.MAX_S, help='longer files are bad rows '
        '(default: %(default)s)')
    add('--pronunciations', default='', help='JSON of words the dictionary lacks, in ARPAbet')
    add('--language', default='en')
    add('--license', default='unknown')
    add('--seed', type=int, default=0)
    add('--jobs', type=int, default=len(os.sched_getaffinity(0)))
    add('--keep-wav', action='store_true', help='store the audio too, as FLAC at 16 kHz')
    args = parser.parse_args(argv)
    parser.at_least(args, jobs=1, seed=0, unit_size=1, code_size=1, codebooks=1, text_pieces=1)
    if not 0 <= args.test_share < 1 or not args.max_seconds > 0:
        parser.error('--test-share lies in 0..1 and --max-seconds above 0')
    report = None
    try:
        measured, report = build(args)
    except (ValueError, OSError) as e:
        print(f'speech: {records.told(args.out, e)}', file=sys.stderr)
        return 1
    except concurrent.futures.BrokenExecutor:
        print('speech: a worker process was killed (out of memory?): run again with fewer --jobs '
              'or a smaller --max-seconds', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('speech: interrupted', file=sys.stderr)
        return 130
    hours = 0.0
    splits = measured['manifest']['splits']
    for split in ('train', 'test'):
        s = splits.get(split, {'records': 0, 'hours': 0.0})
        hours += s['hours']
        print(f'{split}: {s["records"]} records, {s["hours"]:.3f} h')
    bad = ', '.join(f'{n} {kind}' for kind, n in sorted(report.kinds.items()))
    print(f'skipped: {sum(report.kinds.values())} rows{": " if bad else ""}{bad}')
    print(f'{args.out}: {hours:.3f} h of audio in {measured["records"]} records, '
          f'{measured["bytes"] / max(hours, 1e-9) / 1e6:.2f} MB per audio hour')
    print(records.overrides(args.out, measured['manifest'], measured['manifest']['sources']))
    return 0


if __name__ == '__main__':
    sys.exit(main())

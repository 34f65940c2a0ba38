# SPDX-License-Identifier: Apache-2.0
"""The demo corpus: real synthesized speech with true word times, made from nothing in minutes.

    python -m data_pipelines.demo --out data/demo

composes stories and dialogues (`grammar`), speaks them in several voices (`espeak`), learns a text
tokenizer, a unit tokenizer and a codec on the training part, encodes everything and writes one
dataset directory (`records`). The result is a function of --hours, --seed and --keep-wav alone:
work is cut into fixed shards, each spoken by a fresh process, so neither the number of processes
nor an interruption changes a byte. A killed run goes on where it stopped.

Splits: `train`; `test`, stories and questions whose wording never occurs in train, in the same
voices; `voice`, sentences of the training side in a voice that is never heard in training.
"""

import concurrent.futures
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import sys
import threading
import time
import zlib
from typing import NamedTuple

import numpy as np

from data_pipelines import espeak, grammar, prosody, records
from jaxsd import codec
from jaxsd.flags import Parser
from jaxsd.types import Record, Turn, Word

SYSTEM_VOICE = 'en-us'
VOICES = ('en-us+m1', 'en-us+m3', 'en-us+m6', 'en-us+f1', 'en-us+steph', 'en-gb-x-rp', 'en-us-nyc')
HELD_OUT_VOICE = 'en-us+m2'
RATES_WPM = (140, 155, 170, 185, 200)
PITCHES = (35, 45, 55, 65)
PACES = ((160, 'slow'), (180, 'even'), (999, 'fast'))       # up to a rate: how it is called
TONES = ((40, 'low'), (60, 'even'), (999, 'high'))

SPLITS = {'train': 0.86, 'test': 0.09, 'voice': 0.05}       # shares of the hours
STORY_SHARE = 0.3
TEXTS_PER_HOUR, MOST_TEXTS = 1500, 3000
SHARD_S = 240.0
FIT_S = 900.0               # channel-seconds that tokenizers learn from
DITHER = 5 / 32768          # standard deviation: digital silence would be a sound of its own
TEXT_PIECES = 320
UNITS = dict(frame_hz=25.0, size=500)
CODES = dict(frame_hz=12.5, codebooks=8, size=256)
PAIRS = 300

_RATE_HZ = espeak.SAMPLE_RATE_HZ


class Manner(NamedTuple):
    """How one speaker of one item speaks."""

    voice: str
    rate_wpm: int
    pitch: int
    pitch_range: int


class Item(NamedTuple):
    """One record before it is spoken: a line per turn, a manner per channel, a seed of its own."""

    id: str
    split: str
    source: str
    manners: tuple[Manner, ...]
    lines: tuple[grammar.Line, ...]
    seed: tuple[int, ...]


# ---------------------------------------------------------------------------------------- compose

def _endless(items, rng):
    """Items in one random order after another: every one comes up before any comes again."""
    while True:
        for i in rng.permutation(len(items)):
            yield items[i]


def _estimate_s(item: Item) -> float:
    """Seconds that an item will roughly last, from its words and rates (fitted to the engine)."""
    total = 0.3
    for line in item.lines:
        if line.share is None:
            words = len(line.text.split())
            total += (words * 36 + 18) / item.manners[line.channel].rate_wpm + max(line.after_s, 0)
    return total


def _of(value: int, names) -> str:
    """The name of the first range that `value` lies below."""
    return next(name for most, name in names if value < most)


def compose(hours: float, seed: int) -> tuple[list[Item], list[Item]]:
    """What to speak, about `hours` of it, and what stays text.

    Text are stories that are never spoken (source 'text') and every question of the training side
    with each of its answers, once, as people would write to each other (source 'exchange').
    """
    spoken, texts = [], []

    def manner(split, rng):
        voice = HELD_OUT_VOICE if split == 'voice' else VOICES[rng.integers(len(VOICES))]
        return Manner(voice, int(rng.choice(RATES_WPM)), int(rng.choice(PITCHES)),
                      int(rng.integers(30, 71)))

    rng = np.random.default_rng((seed, 0))
    train = [grammar.stories('train')[i] for i in rng.permutation(len(grammar.stories('train')))]
    count = min(MOST_TEXTS, round(TEXTS_PER_HOUR * hours), len(train) // 2)
    only_text, train = train[:count], train[count:]
    for i, story in enumerate(only_text):
        lines = tuple(grammar.Line(0, s, -1) for s in story.sentences)
        texts.append(Item(f'train-text-{i:06d}', 'train', 'text', (), lines, ()))
    written = [(q.text, answer) for q in grammar.questions('train') for answer in q.answers]
    for i, (question, answer) in enumerate(written):
        lines = (grammar.Line(grammar.USER, question, -1), grammar.Line(grammar.SYSTEM, answer, 0))
        texts.append(Item(f'train-exchange-{i:06d}', 'train', 'exchange', (), lines, ()))

    for k, (split, share) in enumerate(SPLITS.items()):
        side = 'test' if split == 'test' else 'train'
        rng = np.random.default_rng((seed, 1, k))
        stories = _endless(train if side == 'train' else grammar.stories('test'), rng)
        sums = _endless([q for q in grammar.questions(side) if grammar.is_sum(q)], rng)
        facts = _endless([q for q in grammar.questions(side) if not grammar.is_sum(q)], rng)
        for source, part in (('story', STORY_SHARE), ('dialogue', 1 - STORY_SHARE)):
            left_s, i = hours * 3600 * share * part, 0
            while left_s > 0 or not i:
                name = f'{split}-{source}-{i:06d}'
                own = (seed, zlib.crc32(name.encode()))
                if source == 'story':
                    lines = tuple(grammar.Line(0, s, j - 1, grammar.gap_s(rng, 0.25))
                                  for j, s in enumerate(next(stories).sentences))
                    # The system's voice tells stories too, so flat and duplex models share it.
                    told = manner(split, rng)
                    if split != 'voice' and rng.random() < 1 / 8:
                        told = told._replace(voice=SYSTEM_VOICE)
                    manners = (told,)
                else:
                    asked = [next(sums if rng.random() < 0.5 else facts)
                             for _ in range(rng.integers(1, 5))]
                    lines = grammar.dialogue(asked, rng)
                    manners = (Manner(SYSTEM_VOICE, 170, 50, 50), manner(split, rng))
                item = Item(name, split, source, manners, lines, own)
                left_s -= _estimate_s(item)
                spoken.append(item)
                i += 1
    return spoken, texts


def shards(items: list[Item]) -> list[list[Item]]:
    """Items cut, in order, into runs of about four minutes; the same for any number of workers."""
    out, length_s = [[]], 0.0
    for item in items:
        if length_s >= SHARD_S:
            out.append([])
            length_s = 0.0
        out[-1].append(item)
        length_s += _estimate_s(item)
    return out


# ------------------------------------------------------------------------------------------ speak

def perform(item: Item) -> tuple[np.ndarray, list[Word], list[Word], list[Turn]]:
    """An item as sound: int16 [C, S], and its words, phones and turns sorted by start."""
    rng = np.random.default_rng(item.seed)
    gains = rng.uniform(0.5, 0.8, len(item.manners))
    said, spans, free_s = [], [], [0.0] * len(item.manners)
    breaks = {line.anchor: i for i, line in enumerate(item.lines) if line.kind == 'interruption'}
    for line in item.lines:
        said.append(espeak.speak(line.text + ('?' if line.kind == 'question' else '.'),
                                 **item.manners[line.channel]._asdict()))

    def start_of(i):
        line = item.lines[i]
        before = spans[line.anchor] if line.anchor >= 0 else (0.0, 0.0)
        if line.share is None:
            start_s = before[1] + line.after_s
        else:
            start_s = before[0] + line.share * (before[1] - before[0])
        # Nobody talks over himself.
        return max(start_s, free_s[line.channel] + 0.1 if free_s[line.channel] else 0.0)

    for i, line in enumerate(item.lines):
        start_s = start_of(i)
        spans.append((start_s, start_s + len(said[i].wav) / _RATE_HZ))
        cut = item.lines[line.anchor].cut_s if i == breaks.get(line.anchor) else None
        if cut is not None:                     # the one who is broken in on finishes his word
            begun_s = spans[line.anchor][0]
            ends = [end for _, start, end in said[line.anchor].words
                    if begun_s + start < start_s + cut]
            wav, words, phones = said[line.anchor]
            stop = round(max(ends) * _RATE_HZ)
            wav = wav[:stop].copy()
            fade = min(160, len(wav))
            wav[len(wav) - fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
            said[line.anchor] = espeak.Spoken(
                wav, words[:len(ends)],
                [(p, a, min(b, max(ends))) for p, a, b in phones if a < max(ends)])
            spans[line.anchor] = (begun_s, begun_s + len(wav) / _RATE_HZ)
            free_s[item.lines[line.anchor].channel] = spans[line.anchor][1]
        free_s[line.channel] = max(free_s[line.channel], spans[i][1])

    samples = round((max(end for _, end in spans) + float(rng.uniform(0.1, 0.3))) * _RATE_HZ)
    wav = rng.normal(0, DITHER, (len(item.manners), samples)).astype(np.float32)
    words, phones, turns = [], [], []
    for line, spoken, (start_s, _) in zip(item.lines, said, spans, strict=True):
        at = round(start_s * _RATE_HZ)
        start_s = at / _RATE_HZ
        wav[line.channel, at:at + len(spoken.wav)] += gains[line.channel] * spoken.wav
        for out, timed in ((words, spoken.words), (phones, spoken.phones)):
            out += [Word(text, line.channel, a + start_s, b + start_s) for text, a, b in timed]
        turns.append(Turn(line.channel, start_s, start_s + len(spoken.wav) / _RATE_HZ,
                          ' '.join(text for text, _, _ in spoken.words)))
    wav = np.clip(np.round(wav * 32768), -32768, 32767).astype(np.int16)
    return (wav, sorted(words, key=lambda w: w.start_s), sorted(phones, key=lambda w: w.start_s),
            sorted(turns, key=lambda t: t.start_s))


def _store(path: str, arrays: dict):
    """Writes arrays behind their own checksum, in one step."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    data = buffer.getvalue()
    temporary = f'{path}.{os.getpid()}.new'
    with open(temporary, 'wb') as f:
        f.write(hashlib.sha256(data).digest() + data)
    os.replace(temporary, path)


def _fetch(path: str) -> dict | None:
    """What `_store` wrote, or None when it is absent or damaged."""
    try:
        with open(path, 'rb') as f:
            digest, data = f.read(32), f.read()
    except FileNotFoundError:
        return None
    if hashlib.sha256(data).digest() != digest:
        return None
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def _json_array(x) -> np.ndarray:
    return np.frombuffer(json.dumps(x).encode(), np.uint8)


def _speak_shard(path: str, items: list[Item]) -> float:
    """Speaks a shard into `path` unless it is there; returns its seconds."""
    held = _fetch(path)
    if held is None:
        wavs, about = [], []
        for item in items:
            wav, words, phones, turns = perform(item)
            about.append({'shape': wav.shape, 'words': [w[:4] for w in words],
                          'phones': [p[:4] for p in phones], 'turns': turns})
            wavs.append(wav.reshape(-1))
        held = {'wav': np.concatenate(wavs), 'about': _json_array(about)}
        _store(path, held)
    return sum(a['shape'][1] for a in json.loads(held['about'].tobytes())) / _RATE_HZ


def _performed(path: str):
    """(wav int16 [C, S], about) of every item of a spoken shard."""
    held = _fetch(path)
    if held is None:
        raise ValueError(f'{path} was damaged while it was being used: run again')
    offset = 0
    for about in json.loads(held['about'].tobytes()):
        channels, samples = about['shape']
        yield held['wav'][offset:offset + channels * samples].reshape(channels, samples), about
        offset += channels * samples


# ------------------------------------------------------------------------------- learn and encode

def _heard(paths: list[str], kept: list[list[bool]]):
    """Up to FIT_S seconds of channels of the items that are `kept`, in order."""
    left = FIT_S * _RATE_HZ
    for path, keep in zip(paths, kept, strict=True):
        for (wav, _), wanted in zip(_performed(path), keep, strict=True):
            for channel in wav if wanted else ():
                if left > 0:
                    yield channel.astype(np.float32) / 32768
                    left -= len(channel)


def _fit(kind: str, path: str, paths: list[str], kept: list[list[bool]], seed: int) -> str:
    """Learns the tokenizer `kind` into `path` unless it is there."""
    if not os.path.exists(path):
        wavs = list(_heard(paths, kept))
        if kind == 'kmeans':
            codec.fit_kmeans(wavs, path=path, **UNITS, seed=seed)
        else:
            codec.fit_rvq(wavs, path=path, **CODES, seed=seed)
    return path


def fit_text(path: str, sentences):
    """A byte-pair model in which every word of `sentences` is one piece.

    Ids: 0 <epad>, 1 <s>, 2 </s>, 3 <pad>, 4 <unk>; every letter is a piece, so any word can be
    written. Words count equally: pieces follow the vocabulary, not how often a word is said.
    """
    import sentencepiece
    words = sorted({w for s in sentences for w in s.split()})
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([w for w in words for _ in range(50)]), model_writer=out,
        vocab_size=TEXT_PIECES, hard_vocab_limit=False, model_type='bpe',
        required_chars='abcdefghijklmnopqrstuvwxyz', unk_id=4, bos_id=1, eos_id=2, pad_id=3,
        control_symbols=['<epad>'], num_threads=1, minloglevel=2,
        normalization_rule_name='identity')
    with open(path + '.new', 'wb') as f:
        f.write(out.getvalue())
    os.replace(path + '.new', path)


@functools.cache
def _tokenizers(units_path: str, codes_path: str):
    return codec.kmeans(path=units_path, **UNITS), codec.rvq(path=codes_path, **CODES)


def _encode_shard(spoken: str, path: str, units_path: str, codes_path: str, keep_wav: bool) -> str:
    """Units and codes of a spoken shard into `path`, unless they are there."""
    if _fetch(path) is not None:
        return path
    units, codes = _tokenizers(units_path, codes_path)
    arrays = {}
    for i, (wav, _) in enumerate(_performed(spoken)):
        channels = wav.astype(np.float32) / 32768
        arrays[f'units {i}'] = np.stack([units.encode(c)[0] for c in channels])
        arrays[f'codes {i}'] = np.stack([codes.encode(c) for c in channels])
        for name, of in prosody.streams(channels, _RATE_HZ).items():
            arrays[f'{name} {i}'] = np.stack(of)
        if keep_wav:
            import soundfile
            flac = io.BytesIO()
            soundfile.write(flac, wav.T, _RATE_HZ, format='FLAC')
            arrays[f'wav {i}'] = np.frombuffer(flac.getvalue(), np.uint8)
    _store(path, arrays)
    return path


# ------------------------------------------------------------------------------------------ write

def _records(split: str, cut, spoken: list[str], encoded: list[str], texts: list[Item], advance):
    """The finished records of one split."""
    for items, heard, tokens in zip(cut, spoken, encoded, strict=True):
        if not any(item.split == split for item in items):
            continue
        arrays = _fetch(tokens)
        for i, (item, (wav, about)) in enumerate(zip(items, _performed(heard), strict=True)):
            if item.split != split:
                continue
            yield Record(
                id=item.id, source=item.source, language='en',
                duration_s=wav.shape[1] / _RATE_HZ, codes=arrays[f'codes {i}'],
                units=tuple(arrays[f'units {i}']), words=tuple(Word(*w) for w in about['words']),
                phones=tuple(Word(*p) for p in about['phones']),
                turns=tuple(Turn(*t) for t in about['turns']),
                style=tuple(f'voice={m.voice} rate_wpm={m.rate_wpm} pitch={m.pitch} '
                            f'pace={_of(m.rate_wpm, PACES)} tone={_of(m.pitch, TONES)}'
                            for m in item.manners),
                sides={name: tuple(arrays[f'{name} {i}']) for name in ('pitch', 'style')},
                wav=arrays.get(f'wav {i}', np.zeros(0, np.uint8)).tobytes())
            advance()
    for item in texts:
        if item.split == split:
            yield Record(id=item.id, source=item.source, language='en', duration_s=0.0,
                         words=tuple(Word(w, 0, 0.0, 0.0) for line in item.lines
                                     for w in line.text.split()),
                         turns=tuple(Turn(0, 0.0, 0.0, line.text) for line in item.lines))
            advance()


def described(seed: int) -> dict:
    """What an evaluation must know of the corpus: its words, questions, sentences and pairs."""
    rng = np.random.default_rng((seed, 2))
    test = grammar.stories('test')
    chosen = sorted(rng.permutation(len(test))[:PAIRS])
    pairs = []
    for i in chosen:
        wrong = grammar.wrong_continuation(test[i], rng)
        pairs.append({'first': test[i].sentences[0], 'right': test[i].sentences[1],
                      'wrong': wrong.sentences[1], 'kind': test[i].kind})
    asked = {split: [q._asdict() for q in grammar.questions(split)] for split in ('train', 'test')}
    facts = {q.about: q.want for q in grammar.questions('train') if not grammar.is_sum(q)}
    return {'vocabulary': list(grammar.vocabulary()), 'kinds': grammar.KINDS, 'facts': facts,
            'questions': asked, 'pairs': pairs,
            'sentences': {s: list(grammar.sentences(s)) for s in ('train', 'test')},
            'transcripts': {s: list(grammar.transcripts(s)) for s in ('train', 'test')},
            'rules': {'answer': 'right when its last word that is listed under kinds[kind] is want',
                      'match': 'a question is a turn on channel 1 whose text is in questions; its '
                               'answer is the first turn on channel 0 that starts after it ended'}}


def _outlive_nobody():
    """A worker ends when the process that started it was killed."""
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _workers(jobs: int) -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context('spawn'),
                                                  _outlive_nobody)


def alone(function, *arguments):
    """The result of a call in a process of its own. (One pool whose workers end after each call,
    max_tasks_per_child, can wait forever: https://github.com/python/cpython/issues/115634.)"""
    with _workers(1) as pool:
        return pool.submit(function, *arguments).result()


def _each(title: str, jobs: int, calls: list, *, fresh: bool = False) -> list:
    """Results of `calls` (function, arguments) in their order, from `jobs` processes at a time.

    fresh: each call has a process of its own.
    """
    from tqdm import tqdm
    jobs = min(jobs, len(calls))
    with concurrent.futures.ThreadPoolExecutor(jobs) if fresh else _workers(jobs) as pool:
        futures = [pool.submit(alone, function, *arguments) if fresh else
                   pool.submit(function, *arguments) for function, arguments in calls]
        try:
            for future in tqdm(concurrent.futures.as_completed(futures), title, len(futures),
                               mininterval=0.5):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def build(out: str, *, hours: float = 2.0, seed: int = 0, jobs: int = 1,
          keep_wav: bool = False) -> dict:
    """Makes the dataset `out`; returns what was measured. Raises ValueError in one clear line."""
    from tqdm import tqdm
    command = f'python -m data_pipelines.demo --hours {hours:g} --seed {seed}'
    command += ' --keep-wav' if keep_wav else ''
    for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'):
        os.environ[name] = '1'      # inherited by the workers: one thread each, on every core
    staging = records.begin(out, {'command': command})
    work = records.work(staging)
    began = time.perf_counter()
    spoken_items, texts = compose(hours, seed)
    cut = shards(spoken_items)
    print(f'compose: {len(spoken_items)} spoken items in {len(cut)} shards, {len(texts)} texts, '
          f'{len(grammar.vocabulary())} words', file=sys.stderr)
    heard = [os.path.join(work, f'spoken-{i:05d}') for i in range(len(cut))]
    tokens = [os.path.join(work, f'tokens-{i:05d}') for i in range(len(cut))]
    audio_s = sum(_each('speak', jobs, [(_speak_shard, a) for a in zip(heard, cut, strict=True)],
                        fresh=True))

    fit_text(os.path.join(staging, 'text.model'), grammar.sentences('train'))
    units_path = os.path.join(staging, 'units.safetensors')
    codes_path = os.path.join(staging, 'codec.safetensors')
    # A spread of the training part: every so manieth item, so that all voices and sources occur.
    total_s = sum(_estimate_s(item) * len(item.manners) for item in spoken_items
                  if item.split == 'train')
    stride = max(1, math.floor(total_s / FIT_S))
    kept, seen = [], 0
    for items in cut:
        kept.append([])
        for item in items:
            kept[-1].append(item.split == 'train' and seen % stride == 0)
            seen += item.split == 'train'
    _each('learn tokenizers', jobs, [(_fit, (kind, path, heard, kept, seed)) for kind, path in
                                     (('kmeans', units_path), ('rvq', codes_path))])
    _each('encode', jobs, [(_encode_shard, (a, b, units_path, codes_path, keep_wav))
                           for a, b in zip(heard, tokens, strict=True)])

    with open(os.path.join(staging, 'grammar.json'), 'w', encoding='utf-8') as f:
        json.dump(described(seed), f, indent=1)
    units, codes = _tokenizers(units_path, codes_path)
    aligner = {'name': 'espeak-ng', 'kind': 'synthesizer events',
               'version': importlib.metadata.version('espeakng-loader')}
    with tqdm(desc='write', total=len(spoken_items) + len(texts), mininterval=0.5) as bar:
        measured = records.write(
            out, {split: _records(split, cut, heard, tokens, texts, bar.update)
                  for split in SPLITS},
            units=units.identity, codes=codes.identity, aligner=aligner, command=command,
            license='CC0-1.0', sample_rate_hz=_RATE_HZ)
    measured |= {'audio_s': audio_s, 'wall_s': time.perf_counter() - began}
    return measured


def main(argv=None) -> int:
    parser = Parser(prog='python -m data_pipelines.demo', description=(
        'Makes the demo corpus: stories and two-speaker dialogues of synthesized speech with true '
        'word times, as a dataset directory.'))
    parser.add_argument('--out', required=True, help='dataset directory to make')
    parser.add_argument('--hours', type=float, default=2.0, help='about how much audio')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--jobs', type=int, default=len(os.sched_getaffinity(0)),
                        help='processes; does not change the result')
    parser.add_argument('--keep-wav', action='store_true', help='store the audio too, as FLAC')
    args = parser.parse_args(argv)
    if not 0 < args.hours <= 10000:
        parser.error(f'--hours must lie in 0..10000, got {args.hours}')
    parser.at_least(args, jobs=1, seed=0)
    try:
        done = build(args.out, hours=args.hours, seed=args.seed, jobs=args.jobs,
                     keep_wav=args.keep_wav)
    except (ValueError, OSError) as e:
        print(f'demo: {records.told(args.out, e)}', file=sys.stderr)
        return 1
    except concurrent.futures.BrokenExecutor:
        print('demo: a worker process was killed (out of memory?): run again to go on from here, '
              'with fewer --jobs', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('demo: interrupted; run again to go on from here', file=sys.stderr)
        return 130
    for split, s in done['manifest']['splits'].items():
        print(f'{split}: {s["records"]} records, {s["hours"]:.3f} h ' +
              ', '.join(f'{k} {v:.3f} h' for k, v in s['hours_by_source'].items()))
    hours = done['audio_s'] / 3600
    print(f'{args.out}: {hours:.3f} h of audio in {done["records"]} records, '
          f'{done["bytes"] / hours / 1e6:.2f} MB per audio hour, '
          f'{done["written_per_s"]:.0f} records/s written, '
          f'{done["read_per_s"]:.0f} records/s read, {done["wall_s"]:.0f} s in all')
    return 0


if __name__ == '__main__':
    sys.exit(main())

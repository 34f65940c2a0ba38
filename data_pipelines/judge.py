# SPDX-License-Identifier: Apache-2.0
"""A recognizer as a judge: did the intended words come out of the speaker?

Pocketsphinx listens to 16 kHz speech with a bigram made from the task's own sentences, and its word
error rate is printed beside a ceiling (the same words resynthesized from true units) and floors
(the wrong sentences, white noise). The language model carries much of the accuracy, so a figure
means something only next to its floors, and is never an open-vocabulary word error rate::

    python -m data_pipelines.judge --sentences grammar.json --wav RUN/samples --refs refs.json \\
        --ceiling RUN/ceiling --out judge.json --workdir RUN
"""

import collections
import concurrent.futures
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np

from jaxsd.flags import Parser

SAMPLE_RATE_HZ = 16000
NOISE = 50.0            # standard deviation in 16-bit steps: pocketsphinx fails on digital silence
PAD_S = 0.3
LEVEL = 3000.0          # rms that speech is brought to, in 16-bit steps
_INLINE = 4             # fewer clips than this are not worth starting processes for


def bigram(sentences: Sequence[Sequence[str]], discount: float = 0.5) -> str:
    """An ARPA bigram with absolute discounting, backing off to unigrams, of sentences of words."""
    pairs, heads, words = collections.Counter(), collections.Counter(), collections.Counter()
    for sentence in sentences:
        line = ['<s>', *sentence, '</s>']
        words.update(line[1:])
        pairs.update(itertools.pairwise(line))
        heads.update(line[:-1])
    total = sum(words.values())
    unigram = {w: n / total for w, n in words.items()}
    kinds, seen = collections.Counter(), collections.Counter()
    for (head, word) in pairs:
        kinds[head] += 1
        seen[head] += unigram[word]
    out = ['\\data\\', f'ngram 1={len(unigram) + 1}', f'ngram 2={len(pairs)}', '', '\\1-grams:']
    for word in ['<s>', *sorted(unigram)]:
        backoff = 1.0
        if heads[word]:
            backoff = discount * kinds[word] / heads[word] / max(1 - seen[word], 1e-6)
        p = math.log10(unigram[word]) if word in unigram else -99.0
        out.append(f'{p:.5f} {word} {math.log10(backoff):.5f}')
    out += ['', '\\2-grams:']
    for (head, word), n in sorted(pairs.items()):
        out.append(f'{math.log10((n - discount) / heads[head]):.5f} {head} {word}')
    return '\n'.join([*out, '', '\\end\\', ''])


def words_of(text: str) -> list[str]:
    """The words of `text` as the dictionary spells them: lower case, apostrophes kept."""
    text = text.lower().replace('\N{RIGHT SINGLE QUOTATION MARK}', "'")
    kept = ''.join(c if c.isalnum() or c == "'" else ' ' for c in text)
    return [w for w in (w.strip("'") for w in kept.split()) if w]


def dictionary(words, pronunciations: Mapping[str, str] = {}) -> dict[str, list[str]]:
    """ARPAbet pronunciations of `words` from pocketsphinx's own dictionary.

    `pronunciations` ({'zorblax': 'Z AO R B L AE K S'}) adds words and overrides. Raises ValueError
    naming the words that neither knows.
    """
    import pocketsphinx
    wanted = set(words)
    found = {w: [p] for w, p in pronunciations.items() if w in wanted}
    path = os.path.join(pocketsphinx.get_model_path(), 'en-us', 'cmudict-en-us.dict')
    with open(path, encoding='utf-8') as f:
        for line in f:
            name, _, phones = line.strip().partition(' ')
            word = name.partition('(')[0]
            if word in wanted and word not in pronunciations:
                found.setdefault(word, []).append(phones.strip())
    missing = sorted(wanted - set(found))
    if missing:
        raise ValueError(f'judge: {len(missing)} words have no pronunciation: '
                         f'{", ".join(missing[:10])}; give them under "pronunciations"')
    return found


def to_int16(wav: np.ndarray, seed: int, *, noise: float = NOISE, pad_s: float = PAD_S,
             level: float | None = LEVEL) -> np.ndarray:
    """A wave in -1..1 as the recognizer likes it: `level` rms, padded, with a little noise."""
    x = np.asarray(wav, np.float32) * 32768
    rms = math.sqrt(float(np.mean(x * x))) if x.size else 0.0
    if level and rms > 1.0:
        x = x * (level / rms)
    x = np.pad(x, int(pad_s * SAMPLE_RATE_HZ))
    x = x + np.random.default_rng(seed).normal(0, noise, x.size)
    return np.clip(x, -32768, 32767).astype(np.int16)


_decoder = None         # one recognizer per worker process


def _start(folder: str) -> None:
    global _decoder
    import pocketsphinx
    _decoder = pocketsphinx.Decoder(lm=f'{folder}/task.lm', dict=f'{folder}/task.dict',
                                    samprate=float(SAMPLE_RATE_HZ), loglevel='FATAL')


def _hear(job: tuple[int, np.ndarray]) -> str:
    index, wav = job
    _decoder.reinit_feat()      # else its noise estimate, and so the words, depend on the last clip
    _decoder.start_utt()
    _decoder.process_raw(to_int16(wav, index).tobytes(), False, True)
    _decoder.end_utt()
    heard = _decoder.hyp()
    return heard.hypstr if heard else ''


def recognize(wavs: Sequence[np.ndarray], sentences: Sequence[str], *,
              pronunciations: Mapping[str, str] = {}, processes: int | None = None,
              progress: str = '') -> list[str]:
    """What a recognizer that knows only `sentences` hears in `wavs` (float [S] at 16 kHz).

    Works in `processes` processes (all cores by default) and shows a bar titled `progress`.
    Raises ValueError for no sentences and for words without a pronunciation.
    """
    from tqdm import tqdm
    lines = [words_of(s) for s in sentences]
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError('judge: no sentences to make a language model from')
    entries = dictionary((w for line in lines for w in line), pronunciations)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        with open(f'{folder}/task.lm', 'w') as f:
            f.write(bigram(lines))
        with open(f'{folder}/task.dict', 'w') as f:
            for word, variants in sorted(entries.items()):
                for i, phones in enumerate(variants):
                    f.write(f'{word}{f"({i + 1})" if i else ""} {phones}\n')
        processes = min(processes or os.cpu_count() or 1, len(wavs))
        if processes <= 1 or len(wavs) < _INLINE:
            _start(folder)
            heard = map(_hear, enumerate(wavs))
        else:
            pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(
                processes, multiprocessing.get_context('spawn'), _start, (folder,)))
            heard = pool.map(_hear, enumerate(wavs), chunksize=2)
        return list(tqdm(heard, progress, total=len(wavs), disable=not progress, unit='clip'))


def wer(references: Sequence[str], heard: Sequence[str]) -> float:
    """Word error rate over all sentences together, as a fraction (it may exceed 1)."""
    import jiwer
    return float(jiwer.wer([' '.join(words_of(t)) for t in references],
                           [' '.join(words_of(t)) for t in heard]))


# ------------------------------------------------------------------------------------ command line

def sentences_of(path: str) -> tuple[list[str], dict[str, str]]:
    """The sentences and extra pronunciations of a JSON file. Raises ValueError.

    Either a list of sentences, or an object with `transcripts` or `sentences` (a list, or a list
    per split; transcripts of whole clips are preferred) and perhaps `pronunciations`.
    """
    data = _json(path)
    given = data if isinstance(data, dict) else {'sentences': data}
    found = given.get('transcripts', given.get('sentences'))
    if isinstance(found, dict):
        found = [s for split in found.values() if isinstance(split, list) for s in split]
    extra = given.get('pronunciations', {})
    if not isinstance(found, list) or not all(isinstance(s, str) for s in found) \
            or not isinstance(extra, dict):
        raise ValueError(f'judge: {path} should hold a list of sentences, or an object with '
                         '"sentences" and perhaps "pronunciations"')
    return found, extra


def _json(path: str):
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except OSError as e:
        raise ValueError(f'judge: cannot read {path}: {e.strerror}') from e
    except ValueError as e:
        raise ValueError(f'judge: {path} is not JSON: {e}') from e


def _wave(path: str, max_s: float = 600.0) -> np.ndarray:
    """The first channel of a sound file as float32 at 16 kHz. Raises ValueError."""
    import soundfile
    import soxr
    try:
        with soundfile.SoundFile(path) as f:
            if f.frames > max_s * f.samplerate:
                raise ValueError(f'judge: {path} is longer than {max_s:g} s')
            wav, rate = f.read(dtype='float32', always_2d=True)[:, 0], f.samplerate
    except (OSError, soundfile.SoundFileError) as e:
        raise ValueError(f'judge: cannot read {path}: {e}') from e
    return wav if rate == SAMPLE_RATE_HZ else soxr.resample(wav, rate, SAMPLE_RATE_HZ)


def _clips(paths: Sequence[str]) -> dict[str, str]:
    """File name -> path of the given sound files, and of those in the given directories."""
    found = {}
    for path in paths:
        if os.path.isdir(path):
            names = [n for n in sorted(os.listdir(path)) if n.endswith(('.wav', '.flac'))]
            found.update({n: os.path.join(path, n) for n in names})
        else:
            found[os.path.basename(path)] = path
    return found


def judge(generated: Mapping[str, np.ndarray], references: Mapping[str, str],
          sentences: Sequence[str], *, ceiling: Mapping[str, np.ndarray] = {},
          pronunciations: Mapping[str, str] = {}, processes: int | None = None,
          task: str = 'judge', seed: int = 0) -> tuple[list[dict], dict[str, dict[str, str]]]:
    """Word error rates of `generated` clips, of their ceiling and of two floors.

    generated, ceiling: clip name -> float [S] at 16 kHz; references: clip name -> intended words.
    Returns rows (task, metrics, items, note) and, per row, what was heard in every clip. The floors
    are always there: what was heard in the generated clips against other clips' words, and white
    noise of the same lengths. Raises ValueError for a clip without words or under two clips.
    """
    for name in [*generated, *ceiling]:
        if not words_of(references.get(name, '')):
            raise ValueError(f'judge: the references have no words for {name}')
    names = sorted(generated)
    if len({' '.join(words_of(references[n])) for n in names}) < 2:
        raise ValueError('judge: the floor of wrong sentences needs clips of two different texts')
    rng = np.random.default_rng(seed)
    noise = {n: rng.normal(0, 0.1, len(generated[n])).astype(np.float32) for n in names}
    parts = [('', generated, 'generated speech'),
             (' ceiling', ceiling, 'true units or codes, resynthesized'),
             (' floor: noise', noise, 'white noise of the same lengths')]
    parts = [p for p in parts if p[1]]
    wavs = [clips[n] for _, clips, _ in parts for n in sorted(clips)]
    heard = iter(recognize(wavs, sentences, pronunciations=pronunciations, processes=processes,
                           progress=f'{task}: recognize'))
    rows, texts = [], {}
    for suffix, clips, note in parts:
        texts[task + suffix] = {n: next(heard) for n in sorted(clips)}
        rate = wer([references[n] for n in sorted(clips)], list(texts[task + suffix].values()))
        rows.append({'task': task + suffix, 'metrics': {'wer': rate}, 'items': len(clips),
                     'note': note})
    wrong = []
    for i, name in enumerate(names):        # the next clip that says something else
        own = words_of(references[name])
        other = next(references[m] for m in names[i + 1:] + names[:i + 1]
                     if words_of(references[m]) != own)
        wrong.append(other)
    rate = wer(wrong, [texts[task][n] for n in names])
    rows.append({'task': task + ' floor: wrong sentences', 'metrics': {'wer': rate},
                 'items': len(names), 'note': 'heard words against another clip\'s text'})
    return rows, texts


def _put(path: str, data) -> None:
    temporary = f'{path}.{os.getpid()}.tmp'
    with open(temporary, 'w', encoding='utf-8') as f:
        json.dump(data, f, indent=1)
    os.replace(temporary, path)


def main(argv=None) -> int:
    parser = Parser(prog='python -m data_pipelines.judge', description=(
        'Recognizes speech with a language model of the task and prints word error rates beside a '
        'ceiling and floors.'))
    parser.add_argument('--sentences', required=True, help='JSON: what may be said (grammar.json)')
    parser.add_argument('--wav', required=True, nargs='+', help='sound files, or directories')
    parser.add_argument('--refs', required=True, help='JSON: {"clip.wav": "intended words"}')
    parser.add_argument('--ceiling', nargs='+', default=[],
                        help='the same clips resynthesized from true units')
    parser.add_argument('--out', help='JSON file for the rows and what was heard')
    parser.add_argument('--workdir', help='run directory whose evaluation.json gets the rows')
    parser.add_argument('--task', default='judge', help='name of the rows')
    parser.add_argument('--split', default='test')
    parser.add_argument('--step', type=int)
    parser.add_argument('--stage')
    parser.add_argument('--jobs', type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args(argv)
    parser.at_least(args, jobs=1)
    try:
        sentences, extra = sentences_of(args.sentences)
        references = _json(args.refs)
        if not isinstance(references, dict) or \
                not all(isinstance(t, str) for t in references.values()):
            raise ValueError(f'judge: {args.refs} should map clip names to words')
        held = []
        if args.workdir:
            if not os.path.isdir(args.workdir):
                raise ValueError(f'judge: no run directory {args.workdir}')
            target = os.path.join(args.workdir, 'evaluation.json')
            held = _json(target) if os.path.exists(target) else []
            if not isinstance(held, list):
                raise ValueError(f'judge: {target} is not a list of evaluations')
        found, ceiling = _clips(args.wav), _clips(args.ceiling)
        clips = {n: p for n, p in found.items() if n in references}
        if not clips:
            raise ValueError(f'judge: no clip in {" ".join(args.wav)} is named in {args.refs}')
        missing = sorted(set(references) - set(clips))
        if missing:
            raise ValueError(f'judge: {len(missing)} clips of {args.refs} are missing, '
                             f'first {missing[0]}')
        ceiling = {n: p for n, p in ceiling.items() if n in references}
        if args.ceiling and set(ceiling) != set(clips):
            raise ValueError('judge: --ceiling must hold the same clips as --wav')
        rows, heard = judge({n: _wave(p) for n, p in clips.items()}, references, sentences,
                            ceiling={n: _wave(p) for n, p in ceiling.items()},
                            pronunciations=extra, processes=args.jobs, task=args.task)
        rows = [{**row, 'split': args.split, 'step': args.step, 'stage': args.stage}
                for row in rows]
        if args.out:
            _put(args.out, {'rows': rows, 'heard': heard, 'references': references})
        if args.workdir:
            where = {k: rows[0][k] for k in ('task', 'split', 'step', 'stage')}
            names = {r['task'].removeprefix(args.task).strip() or 'generated': r for r in rows}
            entry = where | dict(
                metrics={f'{name}, WER %': 100 * r['metrics']['wer'] for name, r in names.items()},
                items=rows[0]['items'],
                note='; '.join(f'{name}: {r["note"]}' for name, r in names.items()))
            held = [r for r in held if not isinstance(r, dict) or {
                k: r.get(k) for k in where} != where]
            _put(target, [*held, entry])
    except (ValueError, OSError) as e:
        print(e, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('judge: interrupted', file=sys.stderr)
        return 130
    if len(found) > len(clips):
        print(f'{len(found) - len(clips)} clips that {args.refs} does not name were left out')
    for row in rows:
        print(f'{row["task"]:<32} WER {100 * row["metrics"]["wer"]:6.1f} %  {row["items"]:4d} clips'
              f'  {row["note"]}')
    return 0


if __name__ == '__main__':
    sys.exit(main())

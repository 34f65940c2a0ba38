# SPDX-License-Identifier: Apache-2.0
"""How fast are rows of 17 streams made, on one core, from records that were never read before?

    python tests/bench_loader.py                    speaks a made-up corpus, measures, prints a line
    python tests/bench_loader.py --hours 40 --profile

Two speakers of 8 codebooks and the words of one, as a full-duplex model reads them: dialogues of
half a minute to five minutes, 2.5 words a second, in rows of 3,750 columns, batches of 8. A
*position* is a column of all 17 streams. One thread makes everything (decode, check, tokenize,
draw, pack, collate), and what is counted is the time of the processor, so that other work on the
machine changes little. `restore_s` is what a run waits that goes on at step 1,000,000; it is
measured against step 0.
"""

import argparse
import cProfile
import json
import os
import pstats
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COLUMNS, BATCH, HZ, CODES = 3_750, 8, 12.5, 2048


def dialogues(hours: float, seed: int = 0):
    """Records of two channels until `hours` are full; the words are those of a small lexicon."""
    from jaxsd.types import Record, Turn, Word
    rng = np.random.default_rng(seed)
    lexicon = [''.join(rng.choice(list('aeiourstnlmkp'), n)) for n in rng.integers(2, 9, 5_000)]
    total, number = 0.0, 0
    while total < 3600 * hours:
        duration_s = float(np.float32(rng.uniform(30, 300)))
        starts = np.sort(rng.uniform(0, duration_s - 0.5, int(2.5 * duration_s)))
        words = tuple(Word(lexicon[i], int(c), float(np.float32(a)), float(np.float32(a + 0.3)))
                      for i, c, a in zip(rng.integers(0, len(lexicon), len(starts)),
                                         rng.integers(0, 2, len(starts)), starts, strict=True))
        frames = int(np.ceil(duration_s * HZ))
        codes = rng.integers(0, CODES, (2, 8, frames)).astype(np.int16)
        yield Record(f'd{number}', 'dialogue', 'en', duration_s, codes, (), words, (),
                     (Turn(0, 0.0, duration_s, 'all'),), (), b'')
        total, number = total + duration_s, number + 1


def make(folder: str, hours: float) -> str:
    """A dataset of `hours` with its tokenizer in `folder`/set."""
    import sentencepiece

    from data_pipelines import records
    path = os.path.join(folder, 'set')
    staging = records.begin(path, {})
    spoken = list(dialogues(hours))
    with open(os.path.join(staging, 'text.model'), 'wb') as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([' '.join(w.text for w in r.words)[:4000] for r in spoken]),
            model_writer=f, vocab_size=2_000, model_type='bpe', minloglevel=2, pad_id=3, unk_id=4)
    codec = dict(name='mimi', frame_hz=HZ, codebooks=8, size=CODES, sample_rate_hz=24_000,
                 sha256='0' * 64)
    records.write(path, {'train': spoken}, units=None, codes=codec, aligner={'name': 'none'},
                  license='CC0', command='bench', sample_rate_hz=24_000)
    return path


def setup(path: str):
    """(config, stage, vocabulary): the 17 streams of both speakers, packed."""
    import ml_collections as mlc

    from jaxsd import vocab
    tokenizer = os.path.join(path, 'text.model')
    c = mlc.ConfigDict(dict(
        seed=0, columns=COLUMNS, codec=dict(name='mimi', path='', frame_hz=HZ, codebooks=8,
                                            size=CODES),
        layout=dict(name='duplex.columns', frame_hz=HZ, mine='random', weight_theirs=1.0),
        data=dict(path=path, sources=dict(talk=dict(select=('dialogue',))))))
    v = vocab.streams(c.codec, text_tokens=vocab.Text(tokenizer).size, tokenizer=tokenizer,
                      speakers=('mine', 'theirs'), predicted=('mine', 'theirs'), multiple=128)
    return c, dict(name='bench', batch=BATCH, data=dict(talk=1.0)), v


def first(data, arranged, step: int) -> float:
    """Processor seconds from nothing to the batch of `step`."""
    start = time.process_time()
    batches = data.batches(*arranged, start_step=step, threads=0)
    next(batches)
    spent = time.process_time() - start
    batches.close()
    return spent


def measure(path: str, profile: bool) -> dict:
    from jaxsd import data
    arranged = setup(path)
    fresh, far = first(data, arranged, 0), first(data, arranged, 1_000_000)
    batches = data.batches(*arranged, threads=0)
    next(batches)                   # the group that was drawn for it is not counted
    profiler = cProfile.Profile()
    steps = columns = 0
    start = time.process_time()
    if profile:
        profiler.enable()
    while time.process_time() - start < 8:
        columns += sum(used['columns'] for used in next(batches)[1].values())
        steps += 1
    spent = time.process_time() - start
    if profile:
        profiler.disable()
        pstats.Stats(profiler).sort_stats('tottime').print_stats(25)
    batches.close()
    return dict(positions_per_s=round(columns / spent), batches=steps, cpu_s=round(spent, 2),
                first_batch_s=round(fresh, 2), restore_s=round(far, 2), streams=17,
                row_columns=COLUMNS, numpy=np.__version__, python=sys.version.split()[0])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--hours', type=float, default=12.0, help='of dialogue in the corpus')
    parser.add_argument('--keep', metavar='DIR', help='makes the corpus there, or uses it again')
    parser.add_argument('--profile', action='store_true', help='also prints where the time goes')
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(args.keep or folder, 'set')
        if not os.path.exists(path):
            path = make(args.keep or folder, args.hours)
        print(json.dumps(measure(path, args.profile)))
    return 0


if __name__ == '__main__':
    sys.path.insert(0, ROOT)
    sys.exit(main())

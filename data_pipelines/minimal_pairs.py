# SPDX-License-Identifier: Apache-2.0
"""Spoken pairs of which one is right, for the tasks `pairs` and `cloze`.

    python -m data_pipelines.minimal_pairs --out data/pairs

In the layout of ZeroSpeech 2021, a gold.csv and the wav files that it names: `words` are words of
the demo corpus beside what it never says, one letter of them changed (as sWUGGY); `sentences` are
sentences of its test split beside the same with two neighbours in each other's place (as sBLIMP).
In the layout of the spoken StoryCloze, wav and txt of X_mutual, X_correct and X_incorrect: stories
of the test split with a false end beside their own, `stories` (as sStoryCloze), and with the end of
another story, `topics` (as tStoryCloze). Both of a pair are said by one voice in one manner. The
result is a function of --items and --seed.
"""

import csv
import os
import sys
import tempfile

import numpy as np

from data_pipelines import demo, espeak, grammar, records
from jaxsd.flags import Parser

VOWELS, CONSONANTS = 'aeiou', 'bcdfghklmnprstvwz'
LEAST_LETTERS, LEAST_WORDS = 4, 4
TRIES = 100


def sound_of(word: str) -> tuple[str, ...]:
    """The phones of a word alone, by which it is heard to be another one."""
    return tuple(name for name, _, _ in espeak.speak(word, voice=demo.SYSTEM_VOICE).phones)


def misspelled(word: str, known: frozenset, rng: np.random.Generator) -> str | None:
    """`word` with a vowel for a vowel or a consonant for a consonant, so that it sounds as no word
    of `known` (phones of all words); None where no such one is found."""
    for _ in range(TRIES):
        at = int(rng.integers(len(word)))
        kind = VOWELS if word[at] in VOWELS else CONSONANTS
        made = word[:at] + kind[rng.integers(len(kind))] + word[at + 1:]
        if made != word and sound_of(made) not in known:
            return made
    return None


def misplaced(sentence: str, known: frozenset, rng: np.random.Generator) -> str | None:
    """`sentence` with two neighbours in each other's place, so that it is none of `known`."""
    words = sentence.split()
    for at in rng.permutation(len(words) - 1):
        made = ' '.join((*words[:at], words[at + 1], words[at], *words[at + 2:]))
        if made not in known:
            return made
    return None


def endings(kind: str, items: int, seed: int) -> list[tuple[str, str, str]]:
    """(first sentence, its own second one, a wrong one) of up to `items` stories of the test split.

    The wrong one of 'stories' has another word of the same kind, that of 'topics' is the end of
    another story; neither ever follows the first sentence in the corpus.
    """
    rng = np.random.default_rng((seed, 2, ('stories', 'topics').index(kind)))
    every = grammar.stories('test')
    true = {story.sentences for split in ('train', 'test') for story in grammar.stories(split)}
    out = []
    for i in rng.permutation(len(every))[:items]:
        first, second = every[i].sentences
        for _ in range(TRIES):
            wrong = (grammar.wrong_continuation(every[i], rng) if kind == 'stories' else
                     every[rng.integers(len(every))]).sentences[1]
            if (first, wrong) not in true:
                out.append((first, second, wrong))
                break
    return out


def pairs(kind: str, items: int, seed: int) -> list[tuple[str, str]]:
    """(right, wrong) of up to `items` pairs of `kind`, 'words' or 'sentences', in a drawn order."""
    rng = np.random.default_rng((seed, ('words', 'sentences').index(kind)))
    if kind == 'words':
        every = [w for w in grammar.vocabulary() if len(w) >= LEAST_LETTERS and w.isalpha()]
        known, wrong = frozenset(map(sound_of, grammar.vocabulary())), misspelled
    else:
        train = frozenset(grammar.sentences('train'))
        every = [s for s in grammar.sentences('test')
                 if s not in train and len(s.split()) >= LEAST_WORDS]
        known, wrong = train | frozenset(grammar.sentences('test')), misplaced
    out = []
    for i in rng.permutation(len(every)):
        if len(out) < items and (made := wrong(every[i], known, rng)):
            out.append((every[i], made))
    return out


def spoken(text: str, manner: demo.Manner, seed: tuple[int, ...]) -> np.ndarray:
    """int16 [samples]: `text` as the demo corpus would hold it."""
    line = grammar.Line(0, text, -1)
    wav, *_ = demo.perform(demo.Item('', 'test', 'story', (manner,), (line,), seed))
    return wav[0]


def build(out: str, *, items: int = 100, voices: int = 2, seed: int = 0) -> dict[str, int]:
    """Makes the four folders of `out`, whole or not at all, and says how many pairs each has.

    voices: how many, drawn for each item, say a word or a sentence. Raises FileExistsError where
    `out` is.
    """
    if os.path.lexists(out):
        raise FileExistsError(f'{out} is there already; remove it, or name another --out')
    above = os.path.dirname(os.path.abspath(out))
    os.makedirs(above, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=above) as folder:
        inside = os.path.join(folder, 'pairs')
        made = demo.alone(_speak, inside, items, voices, seed)  # the engine remembers what it said
        os.rename(inside, out)
    return made


def _speak(out: str, items: int, voices: int, seed: int) -> dict[str, int]:
    import soundfile

    def manner(voice, rng):
        return demo.Manner(str(voice), int(rng.choice(demo.RATES_WPM)),
                           int(rng.choice(demo.PITCHES)), 50)

    def say(path, text, how, own):
        soundfile.write(path, spoken(text, how, own), espeak.SAMPLE_RATE_HZ)
    made = {}
    for k, kind in enumerate(('words', 'sentences')):
        folder, found = os.path.join(out, kind), pairs(kind, items, seed)
        os.makedirs(folder)
        with open(os.path.join(folder, 'gold.csv'), 'w', newline='', encoding='utf-8') as f:
            rows = csv.writer(f, lineterminator='\n')
            rows.writerow(('id', 'filename', 'voice', 'correct', 'text'))
            for i, texts in enumerate(found):
                rng = np.random.default_rng((seed, k, i))
                for voice in map(str, rng.choice(demo.VOICES, voices, replace=False)):
                    how = manner(voice, rng)
                    for correct, text in zip((1, 0), texts, strict=True):
                        name = f'{i:04d}-{voice}-{correct}.wav'
                        say(os.path.join(folder, name), text, how, (seed, k, i))
                        rows.writerow((i, name, voice, correct, text))
        made[kind] = len(found)
    for k, kind in enumerate(('stories', 'topics'), 2):
        folder, found = os.path.join(out, kind), endings(kind, items, seed)
        os.makedirs(folder)
        for i, texts in enumerate(found):
            rng = np.random.default_rng((seed, k, i))
            how = manner(rng.choice(demo.VOICES), rng)
            for part, text in zip(('mutual', 'correct', 'incorrect'), texts, strict=True):
                stem = os.path.join(folder, f'{i:04d}_{part}')
                say(f'{stem}.wav', text, how, (seed, k, i))
                with open(f'{stem}.txt', 'w', encoding='utf-8') as f:
                    f.write(f'{text}\n')
        made[kind] = len(found)
    return made


def main(argv=None) -> int:
    parser = Parser(prog='python -m data_pipelines.minimal_pairs', description=(
        'Makes spoken pairs of which one is right, for the tasks pairs and cloze: words of the '
        'demo corpus and non-words, sentences and such with two words swapped, stories '
        'and such with a false end or that of another one.'))
    parser.add_argument('--out', required=True, help='directory to make')
    parser.add_argument('--items', type=int, default=100, help='pairs of each kind, at most')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args(argv)
    parser.at_least(args, items=1, seed=0)
    try:
        made = build(args.out, items=args.items, seed=args.seed)
    except (ValueError, OSError) as e:
        print(f'minimal_pairs: {records.told(args.out, e)}', file=sys.stderr)
        return 1
    print(f'{args.out}: ' + ', '.join(f'{n} pairs of {kind}' for kind, n in made.items()))
    return 0


if __name__ == '__main__':
    sys.exit(main())

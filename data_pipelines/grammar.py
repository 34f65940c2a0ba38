# SPDX-License-Identifier: Apache-2.0
"""What the demo corpus says: a closed-vocabulary grammar of little stories and dialogues.

A *story* is two short sentences; the second follows from the first, so a model that has understood
the first can tell the right continuation from a wrong one. A *dialogue* has a user who asks and a
system that answers, and every answer can be checked: sums and differences of small numbers, and
two dozen facts that hold throughout the corpus. Dialogues are written with the turn-taking of real
talk (Stivers et al. 2009, Heldner and Edlund 2010): most turns start a fraction of a second after
the other's end, some overlap it, the listener says "uh huh" in between, and a user who has heard
enough breaks in and the system falls silent.

Nothing here makes sound: timing that depends on how long a phrase takes is given as rules (an
offset from another turn's end, a share of another turn's length) which `demo` resolves.
"""

import functools
import itertools
import zlib
from typing import NamedTuple

import numpy as np

SYSTEM, USER = 0, 1
NUMBERS = 'zero one two three four five six seven eight nine ten'.split()
NAMES = 'tom anna ben mary sam lucy'.split()
COLORS = 'red blue green yellow black white'.split()
OBJECTS = 'key book ball cup hat coin'.split()
COUNTED = 'dogs cats books hats keys'.split()
PLACES = {'box': 'in the box', 'bag': 'in the bag', 'car': 'in the car',
          'kitchen': 'in the kitchen', 'garden': 'in the garden', 'table': 'on the table',
          'bed': 'under the bed', 'chair': 'on the chair'}
KINDS = {'number': NUMBERS, 'name': NAMES, 'color': COLORS, 'place': list(PLACES)}
"""The words that may be the point of an answer, by kind."""

HELD_OUT_STORIES = 12       # one first sentence in so many belongs to the test split


class Story(NamedTuple):
    """`sentences` are two; `point` is the word of the second that the first determines."""

    sentences: tuple[str, str]
    kind: str
    point: str


class Question(NamedTuple):
    """A question as asked, what it is about, and the word that a right answer has last of its kind.

    answers: ways to say it, each ending the checkable part with `want`. They name what was asked
    about before they say the point: a careful speaker shows what he has understood, and a model
    whose text comes first can look the point up by words that it has written itself.
    """

    text: str
    about: str
    kind: str
    want: str
    answers: tuple[str, ...]


class Line(NamedTuple):
    """One turn before it is spoken.

    anchor: the index of the line that it is timed by, or -1 for the start of the dialogue.
    after_s: with `share` None, seconds from the anchor's end to this line's start, which may be
    negative (overlap).
    share: otherwise the line starts at this share of the anchor's length (a backchannel inside it).
    kind: greeting, question, answer, statement, backchannel, interruption or closing.
    cut_s: the system falls silent at the end of the word it is saying this long after the next line
    of the other speaker breaks in; None where nobody interrupts.
    """

    channel: int
    text: str
    anchor: int
    after_s: float = 0.0
    share: float | None = None
    cut_s: float | None = None
    kind: str = 'statement'


# ---------------------------------------------------------------------------------------- stories

def _stories():
    for name, color, thing, place in itertools.product(NAMES, COLORS, OBJECTS, PLACES):
        where = PLACES[place]
        yield Story((f'{name} put the {color} {thing} {where}',
                     f'the {thing} is {where}'), 'place', place)
        yield Story((f'{name} saw a {color} {thing} {where}',
                     f'the {thing} was {color}'), 'color', color)
    for name, color, thing in itertools.product(NAMES, COLORS, OBJECTS):
        yield Story((f'{name} has a {color} {thing}', f'the {thing} is {color}'), 'color', color)
        for other in NAMES:
            if other != name:
                yield Story((f'{name} gave the {color} {thing} to {other}',
                             f'now {other} has the {thing}'), 'name', other)
    for name, things, count in itertools.product(NAMES, COUNTED, range(2, 10)):
        yield Story((f'{name} had {NUMBERS[count]} {things} and found one more',
                     f'now {name} has {NUMBERS[count + 1]} {things}'), 'number',
                    NUMBERS[count + 1])
    for name, other in itertools.permutations(NAMES, 2):
        for place in ('garden', 'kitchen', 'car'):
            yield Story((f'{name} and {other} went to the {place}',
                         f'they are {PLACES[place]}'), 'place', place)


@functools.cache
def stories(split: str) -> tuple[Story, ...]:
    """All stories of 'train' or 'test'; no first sentence of one occurs in the other."""
    if split not in ('train', 'test'):
        raise ValueError(f'stories: split must be train or test, got {split!r}')
    held_out = split == 'test'
    return tuple(s for s in _stories()
                 if (zlib.crc32(s.sentences[0].encode()) % HELD_OUT_STORIES == 0) == held_out)


def wrong_continuation(story: Story, rng: np.random.Generator) -> Story:
    """`story` with another word of the same kind as its point: as well said, but false."""
    first, second = story.sentences
    words = second.split()
    others = [w for w in KINDS[story.kind] if w != story.point and w not in words]
    point = others[rng.integers(len(others))]
    if story.kind == 'place' and PLACES[story.point] in second:
        second = second.replace(PLACES[story.point], PLACES[point])
    else:
        second = ' '.join(point if w == story.point else w for w in words)
    return Story((first, second), story.kind, point)


# -------------------------------------------------------------------------------------- questions

_WHERE = {'red key': 'box', 'blue ball': 'garden', 'green book': 'table', 'yellow hat': 'chair',
          'black cup': 'kitchen', 'white coin': 'bag', 'dog': 'bed', 'cat': 'car'}
_COLOR = {'door': 'red', 'boat': 'white', 'house': 'yellow', 'bird': 'blue', 'horse': 'black',
          'tree': 'green'}
_HAS = {'bell': 'anna', 'map': 'sam', 'phone': 'lucy'}
_COUNT = {('tom', 'dogs'): 3, ('anna', 'cats'): 2, ('ben', 'books'): 7, ('mary', 'hats'): 5,
          ('lucy', 'keys'): 9}


def _asked():
    """Every question in every wording, wordings of one subject together."""
    for thing, place in _WHERE.items():
        where = PLACES[place]
        for text in (f'where is the {thing}', f'where can i find the {thing}',
                     f'do you know where the {thing} is', f'tell me where the {thing} is'):
            yield Question(text, f'where {thing}', 'place', place,
                           (f'the {thing} is {where}', f'you can find the {thing} {where}'))
    for thing, color in _COLOR.items():
        for text in (f'what color is the {thing}', f'what is the color of the {thing}',
                     f'do you know the color of the {thing}', f'tell me the color of the {thing}'):
            yield Question(text, f'color {thing}', 'color', color,
                           (f'the {thing} is {color}', f'the color of the {thing} is {color}'))
    for thing, name in _HAS.items():
        for text in (f'who has the {thing}', f'who has the {thing} now',
                     f'do you know who has the {thing}', f'tell me who has the {thing}'):
            yield Question(text, f'who {thing}', 'name', name,
                           (f'{name} has the {thing}', f'the {thing} is with {name}'))
    for (name, things), count in _COUNT.items():
        n = NUMBERS[count]
        for text in (f'how many {things} does {name} have',
                     f'what is the number of {things} {name} has',
                     f'do you know how many {things} {name} has',
                     f'tell me how many {things} {name} has'):
            yield Question(text, f'count {name} {things}', 'number', n,
                           (f'{name} has {n} {things}', f'the number of {things} is {n}'))
    for a, b in itertools.product(range(6), range(6)):
        for sign, result in (('plus', a + b), ('minus', a - b)):
            if 0 <= result <= 10:
                sum_, n = f'{NUMBERS[a]} {sign} {NUMBERS[b]}', NUMBERS[result]
                for text in (f'what is {sum_}', f'how much is {sum_}', f'do you know {sum_}',
                             f'tell me {sum_}'):
                    yield Question(text, sum_, 'number', n,
                                   (f'{sum_} is {n}', f'{sum_} makes {n}'))


@functools.cache
def questions(split: str) -> tuple[Question, ...]:
    """The questions of 'train' or 'test'.

    About one sentence in ten is held out for 'test': for four subjects in ten, one of the four
    wordings. Its subject is asked about in 'train' in the other three.
    """
    if split not in ('train', 'test'):
        raise ValueError(f'questions: split must be train or test, got {split!r}')
    out = []
    for about, group in itertools.groupby(_asked(), lambda q: q.about):
        group = list(group)
        draw = zlib.crc32(about.encode())
        chosen = draw // 5 % len(group) if draw % 5 < 2 else None
        out += [q for i, q in enumerate(group) if (i == chosen) == (split == 'test')]
    return tuple(out)


@functools.cache
def _by_text() -> dict[str, Question]:
    return {q.text: q for q in _asked()}


def is_sum(question: Question) -> bool:
    """Whether it asks for a sum or a difference, not for a fact."""
    return question.about.split()[1] in ('plus', 'minus')


def is_question(text: str) -> bool:
    """Whether `text` is exactly one of the corpus's questions."""
    return text in _by_text()


def check_answer(question: str, answer: str) -> bool:
    """Whether `answer` says what `question` asks for: its last word of the asked kind is the one.

    Raises ValueError for a sentence that is not a question of the corpus.
    """
    if question not in _by_text():
        raise ValueError(f'not a question of the corpus: {question!r}')
    asked = _by_text()[question]
    said = [w for w in answer.split() if w in KINDS[asked.kind]]
    return bool(said) and said[-1] == asked.want


# -------------------------------------------------------------------------------------- dialogues

_GREETINGS = (('hello', 'hello'), ('hello', 'hello can i help you'))
_OPENINGS = ('i have a question for you', 'can you help me', 'i want to know more')
_LONG = ('do you want to know more', 'you can ask me a question now',
         'i want to help you more')
_BACKCHANNELS = ('uh huh', 'okay', 'right')
_INTERRUPTIONS = ('okay stop', 'thank you stop', 'right i know')
_THANKS = (('thank you', 'you are welcome'), ('okay thank you', 'you are welcome'),
           ('goodbye', 'goodbye'))


def gap_s(rng: np.random.Generator, median_s: float = 0.3) -> float:
    """Seconds of silence between turns, lognormal and always positive."""
    return float(np.clip(rng.lognormal(np.log(median_s), 0.4), 0.1, 1.2))


def _pick(rng, items):
    return items[rng.integers(len(items))]


def dialogue(asked: list[Question], rng: np.random.Generator) -> tuple[Line, ...]:
    """The lines of a dialogue in which the user asks `asked`, in the order in which they start.

    The first system line that starts after a question's end is its answer.
    """
    lines = []
    last = -1                       # the line that holds the floor

    def say(channel, text, after_s=0.0, **kwargs):
        nonlocal last
        lines.append(Line(channel, text, last, after_s, **kwargs))
        last = len(lines) - 1
        return last

    def murmur(channel, anchor):
        text, share = _pick(rng, _BACKCHANNELS), float(rng.uniform(0.35, 0.65))
        lines.append(Line(channel, text, anchor, share=share, kind='backchannel'))

    start_s = float(rng.uniform(0.2, 0.5))
    if rng.random() < 0.35:
        hello, reply = _pick(rng, _GREETINGS)
        say(USER, hello, start_s, kind='greeting')
        say(SYSTEM, reply, gap_s(rng) if rng.random() < 0.8 else -float(rng.uniform(0.05, 0.2)),
            kind='greeting')
    for question in asked:
        pause_s = start_s if last < 0 else gap_s(rng, 0.4)
        if rng.random() < 0.25:
            statement = say(USER, _pick(rng, _OPENINGS), pause_s)
            if rng.random() < 0.6:
                murmur(SYSTEM, statement)
            pause_s = gap_s(rng, 0.5)
        elif lines and lines[last].kind == 'answer' and rng.random() < 0.15:
            pause_s = -float(rng.uniform(0.05, 0.2))    # the user knows what is coming
        say(USER, question.text, pause_s, kind='question')
        answer = say(SYSTEM, _pick(rng, question.answers), gap_s(rng), kind='answer')
        if rng.random() < 0.25:
            more = say(SYSTEM, _pick(rng, _LONG), float(rng.uniform(0.15, 0.3)))
            if rng.random() < 0.5:
                cut_s = float(rng.uniform(0.15, 0.4))
                lines[more] = lines[more]._replace(cut_s=cut_s)
                lines.append(Line(USER, _pick(rng, _INTERRUPTIONS), more,
                                  share=float(rng.uniform(0.3, 0.6)), kind='interruption'))
                last = len(lines) - 1
            elif rng.random() < 0.6:
                murmur(USER, more)
        elif rng.random() < 0.1:
            murmur(USER, answer)
    if rng.random() < 0.3:
        thanks, reply = _pick(rng, _THANKS)
        say(USER, thanks, gap_s(rng), kind='closing')
        say(SYSTEM, reply, gap_s(rng) if rng.random() < 0.8 else -float(rng.uniform(0.05, 0.15)),
            kind='closing')
    return tuple(lines)


@functools.cache
def transcripts(split: str) -> tuple[str, ...]:
    """Every whole utterance of a split, sorted: stories in one piece, turns one by one."""
    halves = {s for story in stories(split) for s in story.sentences}
    whole = {' '.join(story.sentences) for story in stories(split)}
    return tuple(sorted(set(sentences(split)) - halves | whole))


@functools.cache
def sentences(split: str) -> tuple[str, ...]:
    """Every sentence that may be said in 'train' or 'test', sorted, for a task language model."""
    out = {s for story in stories(split) for s in story.sentences}
    for q in questions(split):
        out |= {q.text, *q.answers}
    for pair in (*_GREETINGS, *_THANKS):
        out |= set(pair)
    return tuple(sorted(out | {*_OPENINGS, *_LONG, *_BACKCHANNELS, *_INTERRUPTIONS}))


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Every word of the corpus, sorted."""
    return tuple(sorted({w for split in ('train', 'test') for s in sentences(split)
                         for w in s.split()}))

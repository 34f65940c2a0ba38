# SPDX-License-Identifier: Apache-2.0
"""Are samples of typed parts what the papers draw, with the weights that they say?

Every row below is drawn by hand from a paper's own example of its format, with its system's config
and the same two turns: on channel 1 "hello there" (units 1 1 2 2 3 3 3 4 4 4), then on channel 0
"the cat" (5 5 6 6 7 7 8 8 9 9). A ' marks what is seen and never scored.
"""

import pathlib

import numpy as np
import pytest

from jaxsd import config as configs
from jaxsd import model
from jaxsd import vocab as vocabs
from jaxsd.config import bind, plain
from jaxsd.layout import show, template
from jaxsd.types import Phrase, Record, Turn, Word

ROOT = pathlib.Path(__file__).resolve().parents[1]
PIECES = ['<unk>', '<s>', '</s>', '', 'the', 'cat', 'hello', 'there']
WRITTEN = ('preamble user agent assistant instruction streaming task input ta ua eoa chat hear say '
           'sad low merry high').split()
PIECE = dict(enumerate(PIECES)) | {100 + i: name for i, name in enumerate(WRITTEN)} | {
    200 + i: f'J{i}' for i in range(7)} | {207: 'JE'}
IDS = {name: i for i, name in PIECE.items()}


def word(text: str, channel: int, start_s: float, end_s: float) -> Word:
    return Word(text, channel, start_s, end_s, (IDS[text],))


FIELDS = {name: (Phrase(name, (IDS[name],)),) for name in WRITTEN} | {
    f'json {i}': (Phrase('', (IDS[f'J{i}'],)),) for i in range(7)} | {
    'json end': (Phrase('', (IDS['JE'],)),)} | {
    f'{key} {channel}': (Phrase(label, (IDS[label],)),) for key, channel, label in (
        ('emotion', 1, 'sad'), ('pitch', 1, 'low'), ('emotion', 0, 'merry'), ('pitch', 0, 'high'))}
SILENCE = [0] * 10
TALK = Record(
    'talk', 'toy', 'en', 0.8,
    units=(np.array(SILENCE + [5, 5, 6, 6, 7, 7, 8, 8, 9, 9]),
           np.array([1, 1, 2, 2, 3, 3, 3, 4, 4, 4] + SILENCE)),
    words=(word('hello', 1, 0.0, 0.2), word('there', 1, 0.2, 0.4), word('the', 0, 0.4, 0.56),
           word('cat', 0, 0.56, 0.8)),
    turns=(Turn(1, 0.0, 0.4, 'hello there'), Turn(0, 0.4, 0.8, 'the cat')), fields=FIELDS)
CLIP = Record('clip', 'toy', 'en', 0.4, units=(TALK.units[1][:10],), fields=FIELDS,
              words=tuple(w._replace(channel=0) for w in TALK.words[:2]))

U = 'u1 u1 u2 u2 u3 u3 u3 u4 u4 u4'
A = 'u5 u5 u6 u6 u7 u7 u8 u8 u9 u9'
Q = ' '.join(f"{unit}'" for unit in U.split())
DRAWN = (       # ((system, source, record, options), row)
    (('usdm', 'dialogue', TALK, 'mine=0 unit_hz=25'), f"""
        BOS preamble' newline' newline' user' newline' {Q} <|correspond|>' hello there newline
        agent' newline' the cat <|correspond|> {A} space newline' EOS'"""),
    (('audiopalm', 'asr_ast_s2st_french', TALK, ''), f"""
        BOS task' {' '.join(f"{u}'" for u in [*U.split(), *['u0'] * 10])}
        hello there the cat {' '.join(['u0'] * 10)} {A} EOS"""),
    (('audiopalm', 'mt_french', TALK, ''), "BOS task' hello' there' the cat EOS"),
    (('voxtlm', 'text', CLIP, ''), "BOS <generatetext>' hello there EOS"),
    (('voxtlm', 'speech', CLIP, ''), "BOS <generatespeech>' u1 u2 u3 u4 EOS"),
    (('voxtlm', 'asr', CLIP, ''), """
        BOS <startofspeech>' u1' u2' u3' u4' <generatetext>' hello there EOS"""),
    (('voxtlm', 'tts', CLIP, ''), """
        BOS <startoftext>' hello' there' <generatespeech>' u1 u2 u3 u4 EOS"""),
    (('twist', 'speech', CLIP, ''), 'BOS u1 u2 u3 u4 BOS'),       # one id opens and closes
    (('speechgpt', 'units', CLIP, ''), 'BOS <sosp> u1 u2 u3 u4 <eosp>'),
    (('speechgpt', 'asr', CLIP, ''), """
        BOS preamble' [Human] task input <sosp> u1 u2 u3 u4 <eosp> <eoh> [SpeechGPT] hello there
        eoa EOS"""),
    (('speechgpt', 's2s', TALK, 'unit_hz=25'), """
        BOS preamble' [Human] <sosp> u1 u2 u3 u4 <eosp> <eoh> [SpeechGPT] hello there ta the cat
        ua <sosp> u5 u6 u7 u8 u9 <eosp> eoa EOS"""),
    (('speechgpt', 't2s', TALK, 'unit_hz=25'), """
        BOS preamble' [Human] hello there <eoh> [SpeechGPT] the cat
        ua <sosp> u5 u6 u7 u8 u9 <eosp> eoa EOS"""),
    (('emova', 'tts', CLIP, ''), """
        BOS header' user' header_end' say' hello' there' turn_end'
        header' assistant' header_end' u1 u2 u3 u4 turn_end"""),
    (('emova', 'dialogue', TALK, ''), """
        BOS header' user' header_end' chat' u1' u2' u3' u4' turn_end' header' assistant' header_end'
        J0 hello there J1 sad J2 low J3 the cat J4 merry J5 high J6 u5 u6 u7 u8 u9 JE turn_end"""),
    (('glm4_voice', 'spoken', TALK, 'unit_hz=25 ratio=1,3'), f"""
        BOS <|system|>' instruction' <|user|>' <|begin_of_audio|>' {Q} <|end_of_audio|>'
        <|assistant|>' streaming' the' u5 u5 u6 cat' u6 u7 u7 u8 u8 u9 u9 <|user|>"""),
    (('glm4_voice', 'written', TALK, 'unit_hz=25 ratio=1,9'), f"""
        BOS <|system|>' instruction' <|user|>' <|begin_of_audio|>' {Q} <|end_of_audio|>'
        <|assistant|>' streaming' the u5' u5' u6' u6' u7' u7' u8' u8' u9' cat u9' <|user|>"""),
    (('omniflatten', 'tts', CLIP, ''), f'BOS [TTS] [SOT] hello there [EOT] [SOS] {U} [EOS]'),
    (('omniflatten', 'half', TALK, 'unit_hz=25'), f"""
        BOS [SOS]' {Q} [EOS]' [SOT]' hello' there' [EOT]' [SOT] the cat [EOT] [SOS] {A} [EOS]"""),
    (('omniflatten', 'three', TALK, 'unit_hz=25'), f"""
        BOS {Q} {'[Silent text] ' * 2} {'[Silent speech] ' * 10}
        {"u0' " * 10} the cat {A}"""),
    (('omniflatten', 'two', TALK, 'unit_hz=25 chunk_frames=5'), f"""
        BOS u1' u1' u2' u2' u3' {'[Silent speech] ' * 5}
        u3' u3' u4' u4' u4' {'[Silent speech] ' * 5}
        {"u0' " * 5} u5 u5 u6 u6 u7 {"u0' " * 5} u7 u8 u8 u9 u9"""),
)


def options_of(text: str) -> dict:
    out = {}
    for item in text.split():
        key, value = item.split('=')
        numbers = tuple(map(int, value.split(',')))
        out[key] = numbers if len(numbers) > 1 else float(value) if '_hz' in key else numbers[0]
    return out


@pytest.mark.parametrize('case, drawn', DRAWN, ids=['-'.join(case[:2]) for case, _ in DRAWN])
def test_drawn_by_hand(case, drawn):
    system, source, record, options = case
    c = configs.read(f'{ROOT}/configs/{system}.py')
    layout = plain(c.data.sources[source].get('layout') or c.layout) | options_of(options)
    draw = bind(layout, 'jaxsd.layout', source, given=('vocab', 'rng'))
    v = model.make_vocab(c)
    grid = draw(record, vocab=v, rng=np.random.default_rng(0))
    lines = show.text(grid, v, pieces=lambda i: PIECE.get(i, f'?{i}')).splitlines()
    cells = [line for line in lines if not line.startswith(('K=1', "' seen"))]
    assert ' '.join(cells).split() == drawn.split()


# Rules of the template.

V = vocabs.line({'size': 10}, text_tokens=300, markers=('<a>', '<b>'))
PARTS = (('mark', '<a>'), ('text', 'theirs', 0), ('blocks', 'mine', 2.0), ('field', 'ta'))


def chain(record, seed: int = 0, **options):
    return template.chain(record, vocab=V, rng=np.random.default_rng(seed),
                          **dict(parts=PARTS, over='exchange') | options)


def test_kinds_that_are_learned_apart_add_up():
    """A sample learned for its text and then for its speech is learned once in all."""
    whole = chain(TALK, ratio=(1, 3), end='eos')
    parts = [chain(TALK, ratio=(1, 3), score=(kind,)).weights for kind in template.KINDS]
    np.testing.assert_array_equal(sum(parts), whole.weights[:, :-1])
    assert whole.weights[0, -1] == 1
    text, speech = parts[template.KINDS.index('text')], parts[template.KINDS.index('speech')]
    assert text.sum() == 2 * 2 and speech.sum() == 2 * 5 and not (text * speech).any()


@pytest.mark.parametrize('ratio', [(1, 1), (2, 3), (13, 26), (40, 1)])
def test_blocks_tell_both_streams_once(ratio):
    for words, units in ((0, 5), (5, 0), (7, 31), (31, 7)):
        made = template.blocks(np.arange(words), np.arange(units), ratio)
        for kind, total, size in (('text', words, ratio[0]), ('speech', units, ratio[1])):
            said = [ids.tolist() for k, ids in made if k == kind]
            assert sum(said, []) == list(range(total))
            assert all(len(x) == size for x in said[:-1])
        kinds = [k for k, _ in made]
        both = 2 * min(kinds.count('text'), kinds.count('speech'))
        assert kinds[:both] == ['text', 'speech'] * (both // 2)


def dialogue() -> Record:
    """The user asks twice; the second answer comes in two turns, and somebody says uh huh."""
    turns = (Turn(1, 0.0, 0.4, ''), Turn(0, 0.4, 1.2, ''), Turn(1, 0.6, 0.8, 'uh huh'),
             Turn(1, 1.2, 1.6, ''), Turn(0, 1.6, 2.0, ''), Turn(0, 2.2, 2.6, ''))
    words = tuple(Word('w', t.channel, t.start_s, t.end_s, (100 + i,)) for i, t in enumerate(turns))
    frames = np.arange(65)
    return Record('d', 'toy', 'en', 2.6, units=(frames % 10, (frames + 5) % 10), words=words,
                  turns=turns, fields=FIELDS)


def test_exchanges_are_what_is_said_and_what_answers_it():
    record = dialogue()
    found = template.exchanges(record, 0)
    assert [[w.ids[0] for w in (*t['theirs'].words, *t['mine'].words)] for t in found] == [
        [100, 101], [103, 104, 105]]
    assert (found[1]['mine'].start_s, found[1]['mine'].end_s) == (1.6, 2.6)
    # The other way round: what the agent says is answered by the user.
    assert [w.ids[0] for t in template.exchanges(record, 1) for w in (
        *t['theirs'].words, *t['mine'].words)] == [101, 103]
    parts = (('text', 'theirs'), ('speech', 'mine'))
    rows = {tuple(chain(record, seed, parts=parts).tokens[0].tolist()) for seed in range(20)}
    assert len(rows) == 2           # one exchange, drawn
    whole = chain(record, parts=parts, over='dialogue', opening=(('mark', '<b>', 0),))
    tokens = whole.tokens[0].tolist()
    assert tokens[:2] == [1, V.specials['<b>']] and whole.weights[0, 1] == 0
    assert [t for t in tokens if 100 <= t < 300] == [100, 103]
    assert len(tokens) == 2 + 2 + 20 + 25
    mine = {chain(record, seed, parts=parts, over='dialogue', mine='random').tokens.shape[1]
            for seed in range(20)}
    assert mine == {1 + 2 + 20 + 25, 1 + 1 + 10}


def test_a_written_exchange_needs_no_sound():
    """The words of a text-only record belong to its turns in order: theirs, mine, ..."""
    words = tuple(Word(w, 0, 0.0, 0.0, (IDS[w],)) for w in 'hello there the cat'.split())
    record = Record('r', 'toy', 'en', 0.0, words=words,
                    turns=(Turn(0, 0.0, 0.0, 'hello there'), Turn(0, 0.0, 0.0, 'the cat')))
    grid = chain(record, parts=(('text', 'theirs', 0), ('text', 'mine')))
    assert grid.tokens[0].tolist() == [1, 6, 7, 4, 5]
    assert grid.weights[0].tolist() == [0, 0, 0, 1, 1]


def test_one_of_several_phrases_is_drawn():
    fields = FIELDS | {'ta': tuple(Phrase('', (250 + i,)) for i in range(4))}
    record = Record('r', 'toy', 'en', 0.4, units=TALK.units[1:], fields=fields)
    last = {int(chain(record, seed, parts=(('field', 'ta'),), over='record').tokens[0, -1])
            for seed in range(60)}
    assert last == {250, 251, 252, 253}


@pytest.mark.parametrize('call, says', [
    (lambda: chain(TALK, parts=(('speach', 'mine'),)), r"\('speach', 'mine'\) is no part"),
    (lambda: chain(TALK, parts=(('speech', 'ours'),)), r"\('speech', 'ours'\) is no part"),
    (lambda: chain(TALK, opening=(('text',),)), r'layout.opening: .* is no part'),
    (lambda: chain(TALK, over='turn'), "layout.over must be one of record, exchange, dialogue"),
    (lambda: chain(TALK, mine=2), 'layout.mine must be 0, 1 or random, got 2'),
    (lambda: chain(TALK, ratio=(0, 3)), r'layout.ratio is \(text, speech\) tokens'),
    (lambda: chain(TALK, parts=(('mark', '<c>'),)), 'talk: the layout needs <c> in vocab.markers'),
    (lambda: chain(TALK, parts=(('field', 'nope'),)), "talk: it has no field 'nope'"),
    (lambda: chain(TALK, parts=(('label', 'mine age'),)), "talk: it has no field 'age 0'"),
    (lambda: chain(Record('r', 'toy', 'en', 0.4, fields={'x': (Phrase('x'),)}),
                   parts=(('field', 'x'),), over='record'), "r: the field 'x' has no ids"),
    (lambda: chain(CLIP), 'clip: nobody answers anybody in it'),
    (lambda: chain(TALK, end='stop'), 'layout.end must be one of none, eos'),
])
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# Turn by turn.

def turns(record, seed: int, **options):
    v = vocabs.line({'size': 10}, text_tokens=300, markers=('[S0]', '[S1]'))
    grid = template.turns(record, vocab=v, rng=np.random.default_rng(seed), **options)
    return ' '.join(v.special_name(t) or v.name(t)[0][0] + str(v.name(t)[1])
                    for t in grid.tokens[0, 1:].tolist())


def test_every_turn_is_written_or_spoken_behind_its_speaker():
    record = dialogue()
    assert turns(record, 0, share=0.0) == (
        '[S1] t100 [S0] t101 [S1] t102 t103 [S0] t104 t105')
    assert turns(record, 0, share=1.0).count('t') == 0
    assert turns(record, 0, share=1.0).startswith('[S1] u5 u6 u7 u8 u9 u0 u1 u2 u3 u4 [S0] u0 u1')
    rows = {turns(record, seed) for seed in range(60)}
    assert len(rows) > 30           # every turn on its own
    share = np.mean([turns(record, s, share=0.25, spread=0.1).count('t') / 6 for s in range(300)])
    assert share == pytest.approx(0.75, abs=0.03)

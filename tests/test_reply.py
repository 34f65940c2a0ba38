# SPDX-License-Identifier: Apache-2.0
"""Answers whose rows end when they end: does streaming say what the training forward would have?"""

import functools
import itertools
import json
import os

import jax
import jax.numpy as jnp
import ml_collections as mlc
import numpy as np
import pytest
import test_layout_parallel as drawn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluate import made as untrained

from jaxsd import answering, cli, codec, evaluate, generate, model, reply, train
from jaxsd import config as configs
from jaxsd.config import ConfigError
from jaxsd.generate import FREE
from jaxsd.types import NOTHING
from jaxsd.vocab import initial

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROWS = ('audio 0', 'audio 1', 'audio 2')
MARKS = dict(marks=('end', 'pad', 'input', 'answer'),
             text_marks=('eos', 'pad', 'input', 'answer', 'asr'))
EAR = dict(name='listener', features=5, inside=8, layers=1, heads=2, mlp=12)
BACKBONE = dict(name='decoder', width=12, layers=2, heads=2, kv_heads=2, head_dim=6, mlp=16,
                theta=100.0, remat='none', block_columns=16)
KINDS = {
    'rows': dict(vocab=MARKS, frontend=dict(name='averaged', encoder=EAR), head=dict(name='flat')),
    'groups': dict(vocab=dict(turns=1, marks=('pad',),
                              text_marks=('eos', 'open', 'speech', 'close')),
                   frontend=dict(name='grouped', inside=6),
                   head=dict(name='group', width=8, layers=1, heads=2, mlp=12)),
    'ctc': dict(vocab=dict(turns=1, text_marks=('eos', 'answer')),
                frontend=dict(name='summed', heard=('text',), encoder=EAR),
                head=dict(name='ctc', most_units=12, decoder=BACKBONE | dict(width=8, head_dim=4))),
    'patches': dict(vocab=dict(name='patches', rows=3), frontend=dict(name='grouped', inside=4),
                    head=dict(name='local', width=8, layers=2, heads=2, mlp=12)),
}


@functools.cache
def made(kind: str):
    """(vocabulary, graph, parameters) of a model with scales large enough to have preferences."""
    c, k = mlc.ConfigDict(), KINDS[kind]
    c.codec = dict(codebooks=3 if kind == 'patches' else 1, size=6)
    c.vocab = (dict(name='parallel', text_tokens=8, rows=ROWS) if kind != 'patches'
               else dict(text_tokens=8)) | k['vocab']
    c.frontend = k['frontend'] | dict(dtype='float32')
    c.backbone, c.head = BACKBONE, k['head']
    graph, _, _ = model.abstract(c)
    params = jax.tree.map(lambda x: 1.5 * x, model.init(c, jax.random.key(2)))
    return model.make_vocab(c), graph, params


def speaker_of(kind: str, **options):
    v, graph, params = made(kind)
    return v, generate.ready(graph, params, v, {}, manners=reply.manners_of(v, **options))


@functools.partial(jax.jit, static_argnums=0)
def _scores(graph, params, tokens, segment, feats, slot):
    return nnx.merge(graph, params).scores(dict(
        tokens=tokens[None], position=jnp.arange(tokens.shape[1])[None], segment=segment[None],
        feats=feats[None], slot=slot[None]))


def teacher(speaker, tokens_KT, heard=None):
    """Scores per row [T, V] of the training forward over a sequence that is already there."""
    K, T = tokens_KT.shape
    n = 40
    tokens, segment = np.full((K, n), NOTHING, np.int32), np.zeros(n, np.int32)
    tokens[:, :T], segment[:T] = tokens_KT, 1
    feats, slot = np.zeros((n, 5), np.float32), np.zeros(n, np.int32)
    if heard is not None:
        feats[:len(heard[0])], slot[:len(heard[0])] = heard
    out = _scores(speaker.graph, speaker.params, tokens, segment, feats, slot)
    return [np.asarray(s[0, :T]) for s in out]


def asked(v, kind: str, n: int, seed: int, said: str = 'both'):
    """(prompt [K, n + 3], (feats, slot)) of a question of n columns, as the layouts draw it."""
    rng = np.random.default_rng(seed)
    feats, slot = np.zeros((n + 3, 5), np.float32), np.zeros(n + 3, np.int32)
    feats[1:1 + n], slot[1:1 + n] = 2 * rng.standard_normal((n, 5)), 1
    prompt = np.full((4, n + 3), NOTHING, np.int32)
    s = v.specials
    if kind == 'ctc':
        prompt[0, 0], prompt[0, -1] = s['bos'], s['answer']
        return prompt, (feats, slot)
    prompt[0] = [s['input'], *[s['pad']] * n, s['eos'], s['answer']]
    for k, row in enumerate(ROWS, start=1):
        prompt[k] = [s[f'{row} input'], *[s[f'{row} pad']] * n, s[f'{row} end'],
                     s[f'{row} answer' if said == 'both' else f'{row} pad']]
    return prompt, (feats, slot)


def best(s_TV, t: int, chosen: int) -> bool:
    return s_TV[t - 1, chosen] > s_TV[t - 1].max() - 1e-4


def test_an_answer_is_the_training_forward_until_its_rows_end():
    """Several questions heard at once, of different lengths: every cell the best one given all
    before it, until its row has ended; padding from there on; over when all rows are."""
    v, speaker = speaker_of('rows')
    questions = [asked(v, 'rows', n, seed) for n, seed in ((3, 0), (7, 1), (1, 2), (4, 3))]
    manners, stops = speaker.manners, reply.ended(v)
    answers = reply.answer(speaker, [p for p, _ in questions], stop=stops, most_columns=24,
                              heard=[h for _, h in questions], chunk=5)
    padded = free = 0
    for (prompt, heard), answer in zip(questions, answers, strict=True):
        whole = np.concatenate([prompt, answer], axis=1)
        n = prompt.shape[1]
        for k, (row, s) in enumerate(zip(v.rows, teacher(speaker, whole, heard), strict=True)):
            over = False
            for t in range(n, whole.shape[1]):
                if over:
                    assert whole[k, t] == manners.pads[k]
                    padded += 1
                else:
                    assert best(s, t, whole[k, t] - row.start), (row.name, t)
                    free += 1
                over = over or whole[k, t] == manners.ends[k]
        ends = [(answer[k] == manners.ends[k]).any() for k in range(4)]
        assert answer.shape[1] == 24 or all(ends)
        assert stops(answer[:, :-1]) is None
    assert free > 20 and padded > 5
    # What is heard matters.
    deaf = reply.answer(speaker, [p for p, _ in questions], stop=stops, most_columns=24,
                           heard=[(0 * f, s) for _, (f, s) in questions])
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(answers, deaf, strict=True))


def test_of_two_of_a_request_the_written_one_guides_the_spoken_one():
    """Text of both is what the second would write; speech is what the first says next to it; and it
    is another answer than the first would have given alone."""
    v, speaker = speaker_of('rows')
    both = [asked(v, 'rows', n, seed) for n, seed in ((3, 0), (6, 5), (4, 3))]
    written = [asked(v, 'rows', n, seed, 'text') for n, seed in ((3, 0), (6, 5), (4, 3))]
    answers = reply.in_pairs(speaker, v, [p for p, _ in both], [p for p, _ in written],
                                most_columns=16, heard=[h for _, h in both])
    alone = reply.answer(speaker, [p for p, _ in both], stop=reply.ended(v), most_columns=16,
                            heard=[h for _, h in both])
    manners, pads = speaker.manners, np.array(speaker.manners.pads)[:, None]
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(answers, alone, strict=True))
    for (spoken, heard), (quiet, _), answer in zip(both, written, answers, strict=True):
        n = spoken.shape[1]
        silent = np.broadcast_to(pads, answer.shape).copy()
        silent[0] = answer[0]
        first = teacher(speaker, np.concatenate([spoken, answer], axis=1), heard)
        second = teacher(speaker, np.concatenate([quiet, silent], axis=1), heard)
        for k, s in enumerate([second[0], *first[1:]]):
            for i, x in enumerate(answer[k]):
                if (answer[k, :i] == manners.ends[k]).any():
                    assert x == manners.pads[k]
                else:
                    assert best(s, n + i, x - v.rows[k].start), (k, i)


def test_groups_stand_only_where_there_is_speech():
    v, speaker = speaker_of('groups')
    rng, s = np.random.default_rng(0), v.specials
    prompts = []
    for n in (2, 5, 3):
        prompt = np.full((4, n + 2), NOTHING, np.int32)
        prompt[0] = [s['bos'], *rng.integers(4, 8, n), s['open']]
        prompts.append(prompt)
    answers = reply.answer(speaker, prompts, stop=lambda x: None, most_columns=20)
    spoke = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = np.concatenate([prompt, answer], axis=1)
        scores = teacher(speaker, whole)
        for t in range(prompt.shape[1], whole.shape[1]):
            assert best(scores[0], t, whole[0, t])
            for k in (1, 2, 3):
                if whole[0, t] == s['speech']:
                    assert best(scores[k], t, whole[k, t] - v.rows[k].start)
                    spoke += 1
                else:
                    assert whole[k, t] == NOTHING
    assert 0 < spoke < 180


def test_patches_are_the_training_forward():
    v, speaker = speaker_of('patches')
    rng = np.random.default_rng(0)
    prompts = [np.tile(rng.integers(3, 8, n), (3, 1)).astype(np.int32) for n in (2, 6)]
    for prompt, answer in zip(prompts, reply.answer(
            speaker, prompts, stop=lambda x: None, most_columns=20), strict=True):
        whole = np.concatenate([prompt, answer], axis=1)
        scores = teacher(speaker, whole)
        for k, t in itertools.product(range(3), range(prompt.shape[1], whole.shape[1])):
            assert best(scores[k], t, whole[k, t])


def test_repeats_that_speak_are_those_of_training():
    """A CTC head with its own memory, in the same loop: text and every repeat as training scores
    them, for questions of different lengths, chunk by chunk."""
    v, speaker = speaker_of('ctc')
    questions = [asked(v, 'ctc', n, seed) for n, seed in ((3, 0), (7, 1))]
    answers = reply.answer(speaker, [p for p, _ in questions], stop=lambda x: None,
                              most_columns=12, heard=[h for _, h in questions], chunk=5)
    for (prompt, heard), answer in zip(questions, answers, strict=True):
        n = prompt.shape[1]
        whole = np.concatenate([prompt, answer], axis=1)
        for k, s in enumerate(teacher(speaker, whole, heard)):
            for t in range(n, whole.shape[1]):
                assert best(s, t, whole[k, t] - v.rows[k].start), (k, t)
        units = reply.spoken_units(v, answer)
        assert ((units >= 0) & (units < 6)).all()
    assert len({tuple(reply.spoken_units(v, a)) for a in answers}) > 1


# What columns say.

@pytest.mark.parametrize('name, kind', [('answer', 'flat'), ('answer_to_text', 'flat'),
                                        ('dealt', 'flat'), ('groups_from_text', 'group'),
                                        ('unaligned', 'ctc')])
def test_what_a_layout_has_written_is_read_back(name, kind):
    """The question is what comes before the first scored column, and the answer's words and codes
    are those of the record's turn: delays, dealing and groups undone."""
    _, v, record, options = drawn.DRAWN[name]
    grid = drawn.draw(*drawn.DRAWN[name])
    prompt, heard = reply.asked(grid)
    n = prompt.shape[1]
    assert grid.weights[:, :n].max() == 0 < grid.weights[:, n].max()
    assert (heard is None) == (not grid.extra)
    if heard:
        assert len(heard[0]) == len(heard[1]) == n and heard[1].sum() == grid.extra['slot'].sum()
    columns = grid.tokens[:, n:]
    assert reply.written(v, columns) == ([] if name == 'groups_from_text' else [7, 8, 9])
    books = 1 if record.codes is None else 3
    c = mlc.ConfigDict(dict(head=dict(name=kind), codec=dict(codebooks=books, size=200)))
    true = record.units[0][None] if books == 1 else record.codes[0, :, 2:]
    np.testing.assert_array_equal(reply.spoken(c, options, v, columns), true)


# Units of repeats.

def test_collapse_by_hand():
    assert reply.collapse([9, 1, 1, 9, 1, 2, 2, 9, 9, 3], 9).tolist() == [1, 1, 2, 3]
    assert reply.collapse([9, 9], 9).tolist() == reply.collapse([], 9).tolist() == []


@settings(derandomize=True, max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 30))
def test_what_is_said_so_far_stays_said(frames, cut):
    """A prefix says a prefix; and merging by the definition, symbol by symbol."""
    whole = reply.collapse(frames, 3).tolist()
    assert whole[:len(part := reply.collapse(frames[:cut], 3).tolist())] == part
    assert whole == [x for x, _ in itertools.groupby(frames) if x != 3]


def test_units_come_in_chunks_as_soon_as_there_are_enough():
    v, _, _ = made('ctc')
    row = v.rows[1]
    frames = np.array([[0, 1, 6], [6, 6, 2], [2, 2, 2], [3, 6, 3], [4, 5, 6]]).T + row.start
    columns = np.concatenate([np.full((1, 5), 4), frames])
    assert initial(row) == row.start + 6
    parts = [columns[:, t:t + 1] for t in range(5)]
    got = [x.tolist() for x in reply.as_they_come(parts, v, least=3)]
    assert got == [[0, 1, 2], [3, 3, 4, 5]]
    assert [x.tolist() for x in reply.as_they_come(parts, v, least=100)] == [
        [0, 1, 2, 3, 3, 4, 5]]
    assert list(reply.as_they_come([], v, least=1)) == []


@pytest.mark.parametrize('kind, want', [
    ('rows', generate.Manners((8, 20, 31, 42), (9, 21, 32, 43))),
    ('groups', generate.Manners(mark=10)), ('ctc', generate.Manners()),
    ('patches', generate.Manners())])
def test_manners_are_read_from_the_marks(kind, want):
    assert reply.manners_of(made(kind)[0]) == want
    assert FREE not in want.pads


@pytest.mark.parametrize('name', ['intrinsic_voice', 'llama_omni'])
def test_a_listener_is_given_what_was_said(name, corpus, tmp_path):
    """True codes, heard as an answer, make the prompt that the record itself makes: of units the
    same, of sound as many columns, whose features are those of the resynthesized sound."""
    lm = untrained(corpus, name)
    records = reply.examples(lm, 'asr', split='test', limit=3)
    want, layout = reply.drawn(lm, 'asr', records)
    said = [' '.join(w.text for w in r.words) for r in records]
    grids, _ = reply.drawn(lm, 'asr', reply.as_heard(lm, said, [r.units[0][None] for r in records]))
    for a, b, r, text in zip(want, grids, records, said, strict=True):
        (tokens, heard), (same, again) = reply.asked(a), reply.asked(b)
        assert text == lm.text().decode(reply.written(lm.vocab, b.tokens[:, same.shape[1]:]))
        if heard is None:
            assert again is None
            np.testing.assert_array_equal(tokens, same)
        else:
            assert abs(tokens.shape[1] - same.shape[1]) <= 1
            wav = codec.kmeans(**{k: x for k, x in lm.config.codec.items() if k != 'name'}).decode(
                r.units[0][None])
            mel = codec.log_mel(codec.flac(wav))[0][:8 * layout['stack_frames']]
            n = int(np.flatnonzero(again[1])[0])
            np.testing.assert_allclose(again[0][n], mel[:layout['stack_frames']].reshape(-1),
                                       atol=1e-5)
    (silent,) = reply.as_heard(lm, ['red'], [np.zeros((1, 0), int)])
    assert reply.asked(reply.drawn(lm, 'asr', [silent])[0][0])[0].shape[1] > 0


def test_a_voice_is_drawn_and_its_text_is_not(corpus):
    """By a seed; greedy at no temperature. Of the first columns, before texts differ by what was
    said beside them, the text is the same."""
    lm = untrained(corpus, 'pslm')
    records = reply.examples(lm, 'dialogue', split='test', limit=2)
    grids, layout = reply.drawn(lm, 'dialogue', records)

    def said(temperature, seed=0):
        found = reply.replies(lm, grids, layout, most_columns=16, batch=2, seed=seed,
                              voice=generate.Sampler(temperature))
        return [codes.tolist() for _, codes in found], [ids[:1] for ids, _ in found]
    greedy, text = said(0.0)
    assert (greedy, text) == said(0.0, seed=1)
    assert any(map(np.size, greedy))
    a, b = said(1.0), said(1.0, seed=1)
    assert a == said(1.0) and a[0] != b[0] != greedy and a[1] == b[1] == text

    def judged(temperature):
        found = answering.replies(lm, split='test', limit=2, source='dialogue', most_columns=16,
                                  temperature=temperature)
        return found['metrics']['UER %'], found['note']
    assert judged(0.0)[1].startswith('greedy;') and judged(0.0)[0] != judged(1.0)[0]
    assert judged(1.0)[1].startswith('speech drawn at temperature 1.0;')
    for wrong in (-1, float('nan')):
        with pytest.raises(ConfigError, match=f'temperature is 0 .greedy. or above, got {wrong}'):
            judged(wrong)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mini_omni', 'pslm', 'llama_omni', 'intrinsic_voice'])
def test_a_trained_stage_replies(name, corpus, tmp_path):
    """By the task of the config itself: errors in words and units, each beside its floor."""
    c = configs.read(f'{ROOT}/configs/{name}.py:tiny')
    c.data.path = str(corpus)
    c.codec.path = str(corpus / os.path.basename(c.codec.path))
    c.vocab.tokenizer = str(corpus / 'text.model')
    train.run(c, str(tmp_path / 'run'))
    entry, = evaluate.run(c, str(tmp_path / 'run'), tasks=('replies',), split='train',
                          limit=3)
    assert {'WER %', 'exact %', 'WER %/floor'} <= set(entry['metrics'])
    spoken = 'UER %' in entry['metrics']
    assert spoken == (name != 'intrinsic_voice')        # whose task of that name is written
    assert entry['items'] == 3 and all(x >= 0 for x in entry['metrics'].values())
    if 'listener' in (task := dict(c.evals).get({'llama_omni': 'aloud'}.get(name, 'tts'), {})):
        entry, = evaluate.run(c, str(tmp_path / 'run'), tasks=(
            'aloud' if name == 'llama_omni' else 'tts',), split='train', limit=2)
        assert {'spoken WER %', 'spoken WER %/floor'} <= set(entry['metrics']), task
    samples = str(tmp_path / 'samples')
    assert cli.main(['generate', '--workdir', str(tmp_path / 'run'), '--task', 's2s', '--split',
                     'train', '--count', '2', '--output', samples]) == 0
    with open(os.path.join(samples, 'samples.json')) as f:
        assert [x['file'] for x in json.load(f)] == ['s2s-000.wav', 's2s-001.wav']
    assert all(os.path.getsize(os.path.join(samples, f's2s-00{i}.wav')) > 44 for i in range(2))

# SPDX-License-Identifier: Apache-2.0
"""Is what `evaluate` reports what a plain reading of the model's own scores says?"""

import copy
import dataclasses
import functools
import io
import json
import math
import os
import shutil

import jax
import jiwer
import numpy as np
import pytest
import soundfile
from flax import nnx
from test_configs import NAMES, on, read

from jaxsd import (
    answering,
    checkpoint,
    data,
    evaluate,
    generate,
    likelier,
    model,
    recognition,
    speak,
    trained,
)
from jaxsd import run as rundir
from jaxsd import stage as stages
from jaxsd.config import ConfigError, bind
from jaxsd.layout import flat
from jaxsd.trained import words_at
from jaxsd.types import NOTHING


def made(corpus, name, work=None, stage=None) -> trained.LM:
    """A tiny model with random weights, large enough that its choices differ; on disk in `work`."""
    c = on(corpus, read(name, 'tiny'))
    stage = stages.find(c, stage)
    graph, _, _ = model.abstract(c, stage.lora)
    params = jax.tree.map(lambda x: 2 * x, model.init(c, jax.random.key(7), stage.lora))
    if work:
        rundir.open_run(str(work), c)
        with checkpoint.Checkpoints(str(work), stage.name, config=c, keep=1) as saved:
            saved.save(3, dict(params=params), data_state={}, wait=True)
    return trained.LM(c, stage, model.make_vocab(c), graph, params, 3, str(work))


@pytest.fixture(scope='module')
def flat_lm(corpus, tmp_path_factory):
    return made(corpus, 'spirit_lm', tmp_path_factory.mktemp('spirit') / 'run')


@pytest.fixture(scope='module')
def streams_lm(corpus, tmp_path_factory):
    return made(corpus, 'moshi', tmp_path_factory.mktemp('moshi') / 'run')


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def alone(lm, tokens_KT):
    """Per row, log-probabilities [T, V] of what follows each column of one unpacked example.

    The example stands in a row of a multiple of 64 columns; what comes after it is empty.
    """
    K, T = tokens_KT.shape
    columns = -(-T // 64) * 64
    tokens = np.full((1, K, columns), NOTHING, np.int32)
    tokens[0, :, :T] = tokens_KT
    inside = (np.arange(columns) < T).astype(np.int32)[None]
    batch = dict(tokens=tokens, segment=inside, position=np.arange(columns)[None].astype(np.int32))
    rows = _jitted(lm.graph)(lm.params, batch)
    return [None if r is None else log_softmax(r[0, :T]) for r in rows]


@functools.cache
def _jitted(graph):
    return jax.jit(lambda params, batch: nnx.merge(graph, params).scores(batch))


# Likelihood.

@pytest.mark.parametrize(('system', 'source'), [
    ('flat_lm', 'aligned'), ('flat_lm', 'asr'), ('flat_lm', 'text'), ('streams_lm', 'dialogue'),
    ('streams_lm', 'users')])
def test_likelihood_is_that_of_every_record_alone(request, system, source):
    """Packing, chunks, a head's random share of columns: nothing of it may show in the numbers."""
    lm, limit = request.getfixturevalue(system), 5
    result = evaluate.likelihood(lm, split='train', limit=limit, sources=(source,), batch=2)
    found, kept = result['metrics'], result['per_item']
    sums, weights, examples = {}, {}, []

    def add(name, value, weight):       # of the record that is being looked at
        for total, x in ((sums, value), (weights, weight)):
            total.setdefault(name, np.zeros(limit))[examples[-1]] += x
    objective = lm.config.objective.terms
    for arrays, _, which in data.one_pass(lm.config, source, lm.vocab, batch=2, split='train',
                                          limit=limit):
        for i, segment in enumerate(arrays['segment']):
            for s in range(1, segment.max() + 1):
                at = np.flatnonzero(segment == s)
                tokens, weight = arrays['tokens'][i][:, at], arrays['weights'][i][:, at]
                examples.append(which[i][s - 1])
                for row, logp, ids, w in zip(lm.vocab.rows, alone(lm, tokens), tokens, weight,
                                             strict=True):
                    for t in np.flatnonzero(w):
                        local = ids[t] - row.start
                        nats = -logp[t - 1, local]
                        for term, names in objective.items():
                            if row.name.split()[0] in names:
                                add(f'loss/{term}', w[t] * nats, w[t])
                        name = lm.vocab.name(int(ids[t]))[0]
                        add(f'nats/{name}', nats, 1)
                        add(f'accuracy/{name}', float(logp[t - 1].argmax() == local), 1)
    assert sorted(examples) == list(range(limit))
    wanted = {f'{source}/{k}': sums[k].sum() / weights[k].sum() for k in sums}
    assert found.keys() == wanted.keys() == kept.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-4, err_msg=name)
        alike = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4, err_msg=name)
        alike(kept[name]['sum'], sums[name.partition('/')[2]])
        alike(kept[name]['of'], weights[name.partition('/')[2]])


def test_a_probe_is_the_likelihood_of_the_first_records(flat_lm):
    held_out = evaluate.probe(flat_lm.config, flat_lm.stage)(7, jax.device_get(flat_lm.params))
    sources = flat_lm.config.evals.likelihood.sources
    whole = evaluate.likelihood(flat_lm, split='test', limit=64, sources=sources)['metrics']
    assert held_out == pytest.approx({k: v for k, v in whole.items() if '/loss/' in k}, rel=1e-5)
    c = copy.deepcopy(flat_lm.config)
    c.evals = {}
    assert evaluate.probe(c, flat_lm.stage) is None


# Recognition and synthesis.

def greedy(lm, prompt, kind, most):
    """One sequence continued by argmax over whole forward passes of what there is so far."""
    start, size = lm.vocab.ranges['text' if kind == 'text' else 'units']
    legal = set(range(start, start + size)) - {lm.vocab.specials['bos']}
    legal = sorted(legal | {lm.vocab.specials['eos']})
    ids, out = list(prompt), []
    while len(out) < most:
        logp = alone(lm, np.array([ids], np.int32))[0][-1]
        chosen = legal[int(np.argmax(logp[legal]))]
        if chosen == lm.vocab.specials['eos']:
            break
        ids.append(chosen)
        out.append(chosen)
    return out


@pytest.fixture(scope='module')
def heard(flat_lm):
    """The first test records, and what the model writes down of each: plain greedy decoding."""
    records = list(data.examples(flat_lm.config, 'train', 'asr', vocab=flat_lm.vocab, limit=3))
    v, text = flat_lm.vocab, flat_lm.text()
    out = []
    for r in records:
        runs = [int(u) for i, u in enumerate(r.units[0]) if i == 0 or u != r.units[0][i - 1]]
        units = [v.ranges['units'][0] + u for u in runs]
        prompt = [v.specials['bos'], v.specials['[Speech]'], *units, v.specials['[ASR]']]
        out.append(text.decode(greedy(flat_lm, prompt, 'text', 48)))
    return records, out


def test_recognition_is_greedy_and_scored_over_all_words(flat_lm, heard):
    records, wrote = heard
    found = evaluate.asr(flat_lm, split='train', limit=3, source='asr')
    said = [' '.join(w.text for w in r.words) for r in records]
    assert found['metrics']['WER %'] == pytest.approx(100 * jiwer.wer(said, wrote))
    assert found['metrics']['wrong-sentence WER %'] == pytest.approx(
        100 * jiwer.wer([said[1], said[2], said[0]], wrote))
    assert found['metrics']['exact %'] == 0 and found['items'] == 3
    assert any(wrote)


def test_few_shots_stand_before_what_is_asked(flat_lm):
    """Two training records, whole, and the asked one up to its answer, go on by plain argmax."""
    v, text = flat_lm.vocab, flat_lm.text()
    records = list(data.examples(flat_lm.config, 'train', 'asr', vocab=v, limit=recognition.POOL))
    lines = [data.drawn(flat_lm.config, 'asr', v, r) for r in records]
    wrote, said = {0: [], 2: []}, [' '.join(w.text for w in r.words) for r in records[:2]]
    for i in range(2):
        n = int(np.argmax(lines[i].weights[0] > 0))
        chosen = np.random.default_rng(i).choice(len(records), 2, replace=False)
        shown = np.concatenate([lines[chosen[0]].tokens[0], lines[chosen[1]].tokens[0][1:],
                                lines[i].tokens[0][1:n]])
        assert (shown == v.specials['bos']).sum() == 1 == (shown[0] == v.specials['bos'])
        assert (shown == v.specials['[ASR]']).sum() == 3 and shown[-1] == v.specials['[ASR]']
        assert (shown == v.specials['eos']).sum() == 2      # those of the examples
        for shots, prompt in ((2, shown), (0, lines[i].tokens[0][:n])):
            wrote[shots].append(text.decode(greedy(flat_lm, prompt, 'text', 8)))
    found = evaluate.few_shot(flat_lm, split='train', limit=2, source='asr', shots=2, most_tokens=8)
    assert found['metrics']['WER %'] == pytest.approx(100 * jiwer.wer(said, wrote[2]))
    assert found['metrics']['WER %/0 shots'] == pytest.approx(100 * jiwer.wer(said, wrote[0]))
    assert wrote[0] != wrote[2] and set(found['metrics']) == set(
        evaluate.MEASURED[evaluate.few_shot])
    aloud = evaluate.few_shot(flat_lm, split='train', limit=1, source='tts', shots=1, most_tokens=8)
    assert aloud['items'] == 1 and aloud['metrics']['WER %'] >= 0
    with pytest.raises(ConfigError, match='training records for 999 shots'):
        evaluate.few_shot(flat_lm, split='train', limit=1, source='asr', shots=999)


def test_a_manner_is_kept_or_not(corpus):
    """The classifier knows the recorded halves; continuations are those of the sampler."""
    lm = made(corpus, 'spirit_lm')
    found = evaluate.preserved(lm, split='train', limit=6, source='speech', label='pace',
                               most_tokens=8)
    metrics = found['metrics']
    assert set(metrics) == set(evaluate.MEASURED[evaluate.preserved]) and found['items'] == 6
    assert metrics['true %'] >= 80          # it was made from them
    assert all(0 <= x <= 100 for x in metrics.values())
    assert metrics['preserved %'] == pytest.approx(np.mean(found['per_item']['preserved %']['sum']))
    again = evaluate.preserved(lm, split='train', limit=6, source='speech', label='pace',
                               most_tokens=8)
    assert again['metrics'] == metrics
    with pytest.raises(ConfigError, match='no two styles of mood'):
        evaluate.preserved(lm, split='train', limit=6, source='speech', label='mood')


def test_errors_are_counted_in_percent():
    """Known transcripts in, known rates out: one word added, one replaced, one lost, of ten."""
    said = ['the cat sat', 'two and two', 'yes', 'i do not']
    assert recognition.error_rates(said, said) == {'WER %': 0, 'exact %': 100}
    heard = ['the cat sat down', 'two and three', 'yes', 'i do']
    assert recognition.error_rates(said, heard) == pytest.approx({'WER %': 30, 'exact %': 25})
    assert recognition.error_rates(['a', 'b'], ['b', 'a']) == {'WER %': 100, 'exact %': 0}


def test_the_round_trip_is_read_aloud_and_then_written_down(flat_lm, heard):
    """Through the model's own units; the floor compares with the sentences of others."""
    said = [' '.join(w.text for w in r.words) for r in heard[0]]
    found = evaluate.tts(flat_lm, split='train', limit=3, source='tts')['metrics']
    spoken = trained.read_aloud(flat_lm, said, '[Text]', '[TTS]')
    wrote = trained.transcribe(flat_lm, spoken, '[Speech]', '[ASR]')
    assert found == pytest.approx({
        'round-trip WER %': 100 * jiwer.wer(said, wrote),
        'wrong-sentence WER %': 100 * jiwer.wer([said[1], said[2], said[0]], wrote)})


def test_reading_aloud_stays_in_its_units(flat_lm):
    start, size = flat_lm.vocab.ranges['units']
    spoken = trained.read_aloud(flat_lm, ['the'], '[Text]', '[TTS]', most_tokens=40)
    assert len(spoken) == 1 and 0 < len(spoken[0]) <= 40
    assert ((spoken[0] >= start) & (spoken[0] < start + size)).all()
    v = flat_lm.vocab
    prompt = [v.specials['bos'], v.specials['[Text]'], *flat_lm.text().encode('the'),
              v.specials['[TTS]']]
    assert list(spoken[0]) == greedy(flat_lm, prompt, 'speech', 40)


def test_listening_is_greedy_frame_by_frame(streams_lm):
    """By whole forward passes over what there is so far: their codes are given, mine are nothing,
    and words are read off the text row that many columns late."""
    lm, v = streams_lm, streams_lm.vocab
    found = evaluate.listening(lm, split='train', limit=2, source='stories')
    said, heard, mine = [], [], [k for k, r in enumerate(v.rows) if r.name.startswith('mine')]
    records = data.examples(lm.config, 'train', 'stories', vocab=v, limit=2)
    for r in sorted(records, key=lambda r: r.codes.shape[-1]):
        true = data.drawn(lm.config, 'stories', v, r).tokens
        tokens = true.copy()
        for k, row in enumerate(v.rows):
            if row.name.startswith('theirs'):       # nothing is masked when it is measured
                late = 0 if row.name == 'theirs 0' else 1
                tokens[k, 1 + late:] = (row.start + r.codes[0, int(row.name.split()[1])]
                                        )[:tokens.shape[1] - 1 - late]
        assert (tokens[mine, 2:] == NOTHING).all()
        for t in range(9, tokens.shape[1]):
            tokens[0, t] = alone(lm, tokens[:, :t])[0][-1].argmax() + v.rows[0].start
        for out, columns in ((said, true), (heard, tokens)):
            out.append(' '.join(w for _, w in words_at(v, lm.text(), columns[0, 9:])))
    assert all(said) and any(heard)
    assert all(r.startswith(x) for r, x in zip(
        sorted(' '.join(w.text for w in r.words) for r in data.examples(
            lm.config, 'train', 'stories', vocab=v, limit=2)), sorted(said), strict=True))
    assert found['metrics'] == pytest.approx(recognition.beside_others(said, heard))


# Stories.

def test_stories_are_scored_like_a_reader_would(flat_lm):
    found = evaluate.stories(flat_lm, split='train', limit=6, source='aligned')
    lm, v = flat_lm, flat_lm.vocab
    records = [r for r in data.examples(lm.config, 'train', 'aligned', vocab=v, limit=6)
               if len(r.turns) == 2]
    assert found['items'] == len(records) >= 2
    halves = []
    for r in records:
        cut_s = (r.turns[0].end_s + r.turns[1].start_s) / 2
        frame = round(cut_s * 25)
        words = [[w for w in r.words if w.start_s < cut_s],
                 [w for w in r.words if w.start_s >= cut_s]]
        assert ' '.join(w.text for w in words[0]) == r.turns[0].text
        assert ' '.join(w.text for w in words[1]) == r.turns[1].text
        halves.append(dict(T=[flat.text_tokens(w, v) for w in words],
                           S=[flat.speech_tokens(u, v) for u in (r.units[0][:frame],
                                                                 r.units[0][frame:])]))

    def nats(prompt, continuation):
        ids = np.concatenate([prompt, continuation]).astype(np.int32)
        logp = alone(lm, ids[None])[0]
        return -np.mean([logp[t - 1, ids[t]] for t in range(len(prompt), len(ids))])
    for a in 'TS':
        for b in 'TS':
            good, right = [], []
            for i, r in enumerate(records):
                others = [j for k in range(1, len(records)) for j in [(i + k) % len(records)]
                          if records[j].turns[1].text != r.turns[1].text]
                voice = [j for j in others
                         if records[j].style[0].split()[0] == r.style[0].split()[0]]
                j = (voice or others)[0]
                marker = {'T': v.specials['[Text]'], 'S': v.specials['[Speech]']}
                prompt = [v.specials['bos'], marker[a], *halves[i][a][0], *[marker[b]] * (a != b)]
                good.append(nats(prompt, halves[i][b][1]))
                right.append(good[-1] < nats(prompt, halves[j][b][1]))
            np.testing.assert_allclose(found['metrics'][f'nats/{a}->{b}'], np.mean(good), rtol=1e-4)
            assert found['metrics'][f'right %/{a}->{b}'] == pytest.approx(100 * np.mean(right))


def test_cloze_reads_the_published_files(flat_lm, tmp_path):
    """Two stories cut in two and written as files; every direction against whole forward passes."""
    lm, v, files = flat_lm, flat_lm.vocab, {}
    codec = bind(lm.config.codec, 'jaxsd.codec', 'codec')()
    records = [r for r in data.examples(lm.config, 'train', 'aligned', vocab=v)
               if len(r.turns) == 2][:2]
    for i, r in enumerate(records):
        wav = soundfile.read(io.BytesIO(r.wav), dtype='float32', always_2d=True)[0][:, 0]
        cut = round((r.turns[0].end_s + r.turns[1].start_s) / 2 * 16000)
        files[f'{i}_mutual'] = r.turns[0].text, wav[:cut]
        files[f'{i}_correct'] = files[f'{1 - i}_incorrect'] = r.turns[1].text, wav[cut:]
    for name, (said, wav) in files.items():
        (tmp_path / f'{name}.txt').write_text(said + '\n')
        speak.write_wav(str(tmp_path / f'{name}.wav'), wav, 16000)
        files[name] = said, soundfile.read(tmp_path / f'{name}.wav', dtype='float32')[0]
    found = evaluate.cloze(lm, split='', limit=None, path=str(tmp_path))
    assert found['items'] == 2 and len(found['metrics']) == 8
    marker = {'T': v.specials['[Text]'], 'S': v.specials['[Speech]']}

    def units(wav):
        return [int(u) for u in codec.encode(wav)[0]]

    def ids(kind, said, runs):
        if kind == 'T':
            return [v.ranges['text'][0] + i for w in said.split() for i in lm.text().encode(w)]
        return [v.ranges['units'][0] + u for i, u in enumerate(runs) if i == 0 or u != runs[i - 1]]
    for a in 'TS':
        for b in 'TS':
            nats = []
            for i in range(2):
                for end in ('correct', 'incorrect'):
                    (t1, w1), (t2, w2) = files[f'{i}_mutual'], files[f'{i}_{end}']
                    u1, u2 = units(w1), units(w2)
                    if a == b == 'S':
                        whole = units(np.concatenate([w1, w2]))
                        u1, u2 = whole[:len(u1)], whole[len(u1):]
                    head = [v.specials['bos'], marker[a], *ids(a, t1, u1), *[marker[b]] * (a != b)]
                    row = np.array(head + ids(b, t2, u2), np.int32)
                    logp = alone(lm, row[None])[0]
                    nats.append(-np.mean([logp[t - 1, row[t]] for t in range(len(head), len(row))]))
            assert found['metrics'][f'nats/{a}->{b}'] == pytest.approx(np.mean(nats[::2]), rel=1e-4)
            right = [nats[0] < nats[1], nats[2] < nats[3]]
            assert found['metrics'][f'right %/{a}->{b}'] == 100 * np.mean(right)
    with pytest.raises(ConfigError, match='holds no X_correct.wav'):
        evaluate.cloze(lm, split='', limit=None, path=str(tmp_path / '..'))


def test_scores_of_pairs_are_what_they_say():
    """Ten tokens at -1.0 against eight at -1.1: the sum prefers the second, the mean the first."""
    def score(values, norm, weight=1.0):
        return likelier.sequence_score(np.array([values]), np.full((1, len(values)), weight), norm)
    first, second = [-1.0] * 10, [-1.1] * 8
    assert score(first, 'sum') == -10 and score(second, 'sum') == pytest.approx(-8.8)
    assert score(first, 'mean') == -1 and score(second, 'mean') == pytest.approx(-1.1)
    # A column of eight codebooks, weighted 100 and 1 (arXiv 2410.00037 §5.4).
    logp, weights = -np.array([[2.0], *[[1.5]] * 7]), np.array([[100.0], *[[1.0]] * 7])
    assert likelier.sequence_score(logp, weights, 'mean') == pytest.approx(-210.5)
    # What weighs nothing is not scored, even where it is impossible.
    never, weights = np.array([[-np.inf, -1.0]]), np.array([[0.0, 1.0]])
    assert likelier.sequence_score(never, weights, 'mean') == -1
    assert likelier.preferred([1, 2, 3, 4], [0, 2, 5, 4]) == 0.5
    with pytest.raises(ConfigError, match="norm is 'mean' or 'sum', got 'max'"):
        score(first, 'max')


@pytest.mark.parametrize('norm, scope, only', [
    ('mean', 'continuation', None), ('sum', 'full', None), ('mean', 'full', 'text'),
    ('sum', 'continuation', 'speech')])
def test_pair_scores_by_reading_each_alone(flat_lm, norm, scope, only):
    lm, v, rng = flat_lm, flat_lm.vocab, np.random.default_rng(0)
    start = v.ranges['units'][0]
    rows = [(np.array([1, *rng.integers(5, 300, 4)]), start + rng.integers(0, 500, 3)),
            (np.array([1, 9]), np.array([30, start + 2, 40, start]))]
    legal = None if only is None else generate.allowed_ids(v, only)
    found = likelier.pair_scores(lm, rows, norm=norm, scope=scope, legal=legal)
    for (prompt, continuation), got in zip(rows, found, strict=True):
        ids = np.concatenate([prompt, continuation]).astype(np.int32)
        logp = alone(lm, ids[None])[0]
        if legal is not None:
            logp = np.where(legal, logp, -np.inf)
            logp = logp - np.log(np.exp(logp).sum(-1, keepdims=True))
        at = [t for t in range(len(prompt) if scope == 'continuation' else 1, len(ids))
              if legal is None or legal[ids[t]]]
        values = [logp[t - 1, ids[t]] for t in at]
        want = np.sum(values) / (max(1, len(values)) if norm == 'mean' else 1)
        assert got == pytest.approx(want, rel=1e-4, abs=1e-4)
    with pytest.raises(ConfigError, match="scope is 'continuation' or 'full', got 'half'"):
        likelier.pair_scores(lm, rows, norm=norm, scope='half')


def test_pairs_are_read_from_their_public_list(tmp_path):
    """ZeroSpeech's gold.csv, whatever the order and the other columns; one mistake is named."""
    file = tmp_path / 'gold.csv'
    head = 'id,filename,voice,type,correct'
    lines = ['0,a1,A,x,1', '1,c0,A,x,0', '0,a0,A,x,0', '0,b0,B,x,0', '1,c1,A,x,1', '0,b1,B,x,1']
    file.write_text('\n'.join([head, *lines]))
    assert likelier.gold_pairs(str(file)) == {'0': [('a1', 'a0'), ('b1', 'b0')],
                                              '1': [('c1', 'c0')]}
    for text, says in (('\n'.join([head, *lines[:-1]]), 'item 0 of voice B has no pair'),
                       ('\n'.join([head, *lines, lines[0]]), 'item 0 of voice A is no pair'),
                       (head, 'it lists nothing'), ('id,voice\n0,A', "no column 'correct'")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=says):
            likelier.gold_pairs(str(file))
    with pytest.raises(ConfigError, match='lists no pairs: .*No such file'):
        likelier.gold_pairs(str(tmp_path / 'none.csv'))


def test_the_likelier_of_two_recordings(flat_lm, tmp_path):
    """Against the same files scored one by one; voices are averaged before items."""
    lm, v = flat_lm, flat_lm.vocab
    codec = bind(lm.config.codec, 'jaxsd.codec', 'codec')()
    rng, lines, score = np.random.default_rng(0), ['id,filename,voice,correct'], {}
    for item, voice, right in ((0, 'A', 1), (0, 'A', 0), (0, 'B', 1), (0, 'B', 0), (1, 'A', 1),
                               (1, 'A', 0)):
        name = f'{item}{voice}{right}'
        lines.append(f'{item},{name},{voice},{right}')
        speak.write_wav(str(tmp_path / f'{name}.wav'),
                        codec.decode(rng.integers(0, 500, (1, 20))), 16_000)
        units = codec.encode(speak.read_wav(str(tmp_path / f'{name}.wav'), 16_000).mean(0))[0]
        ids = trained.prompt(v, '[Speech]', flat.speech_tokens(units, v), [v.specials['eos']])
        logp = alone(lm, ids[None].astype(np.int32))[0]
        score[item, voice, right] = np.mean([logp[t - 1, ids[t]] for t in range(1, len(ids))])
    (tmp_path / 'gold.csv').write_text('\n'.join(lines))
    found = evaluate.pairs(lm, split='', limit=None, path=str(tmp_path), source='speech')
    a, b, c = (float(score[i, w, 1] > score[i, w, 0]) for i, w in ((0, 'A'), (0, 'B'), (1, 'A')))
    assert found['items'] == 2
    assert found['metrics']['right %'] == pytest.approx(100 * np.mean([(a + b) / 2, c]))


# Answers by a template.

def test_every_question_is_answered_through_the_template(corpus):
    """As many items as there are questions with an answer; each answer by the training forward."""
    lm = made(corpus, 'usdm')
    found = evaluate.exchanges(lm, split='train', limit=2, source='dialogue')
    with open(corpus / 'grammar.json', encoding='utf-8') as f:
        asked = {q['text'] for part in json.load(f)['questions'].values() for q in part}
    records = list(data.examples(lm.config, 'train', 'dialogue', vocab=lm.vocab, limit=2))
    questions = [t for r in records for t in r.turns if t.channel == 1 and t.text in asked]
    assert 1 <= found['items'] <= len(questions)
    assert 0 <= found['metrics']['correct %'] <= 100
    with pytest.raises(ConfigError, match='must be drawn by template.chain over exchanges'):
        evaluate.exchanges(lm, split='train', limit=2, source='aligned')
    near = evaluate.translations(lm, split='train', limit=2, source='dialogue')
    assert near['items'] >= found['items']      # every answer in words, to whatever was said
    assert set(near['metrics']) == set(evaluate.MEASURED[evaluate.translations])
    with pytest.raises(ConfigError, match='translations: .* by template.chain over exchanges'):
        evaluate.translations(lm, split='train', limit=2, source='aligned')


def test_translations_are_scored_as_others_score_them(monkeypatch):
    """By sacrebleu's own figures for a corpus: one sentence right, of one a word wrong."""
    told = [('the red hat is on the big table', 'the red hat is on the big table'),
            ('anna has six small black dogs', 'anna has two small black dogs')]
    monkeypatch.setattr(answering, '_answered', lambda *_, **__: told)
    found = answering.translations(None, split='test', limit=None, source='x')
    # 14 words: 13 of 14 alone, 10 of 12 pairs, 7 of 10 triples and 5 of 8 fours; as long as asked.
    by_hand = 100 * (13 / 14 * 10 / 12 * 7 / 10 * 5 / 8) ** 0.25
    assert found['metrics']['BLEU'] == pytest.approx(by_hand)
    assert found['metrics']['BLEU/floor'] < 10 and found['metrics']['chrF/floor'] < 30
    assert found['per_item']['chrF']['sum'][0] == 100 > found['metrics']['chrF'] > 80


# Conversation.

NUMBERS = {'one', 'two', 'three'}


@pytest.mark.parametrize(('said', 'good', 'waited', 'latency'), [
    ([(30, 'it'), (31, 'is'), (32, 'two')], True, True, 10),            # right
    ([(30, 'it'), (31, 'is'), (32, 'three')], False, True, 10),         # wrong
    ([(25, 'two'), (27, 'no'), (28, 'three')], False, True, 5),         # the last one counts
    ([(25, 'three'), (27, 'no'), (28, 'two'), (30, 'yes')], True, True, 5),
    ([(15, 'two')], False, False, None),                                # early, and no answer
    ([(15, 'well'), (24, 'two')], True, False, 4),                      # early, but then right
    ([(11, 'bye'), (24, 'two')], True, True, 4),                        # still of what came before
    ([(12, 'bye'), (24, 'two')], True, False, 4),
    ([(19, 'two')], False, False, None),
    ([(20, 'two')], True, True, 0),                                     # in its last frame
    ([(21, 'two')], True, True, 1),
    ([(50, 'two')], False, True, None), ([(49, 'two')], True, True, 29),  # the next one has begun
    ([(30, 'it'), (31, 'rains')], False, True, 10),                     # no word of the kind
    ([], False, True, None)])
def test_one_answer(said, good, waited, latency):
    """A question in frames 10 to 20.5; the next one begins in frame 50."""
    found = answering.score_answer(said, NUMBERS, 'two', begin=10.0, end=20.5, until=50.0)
    assert (found.good, found.waited, found.latency) == (good, waited, latency)
    late = [w for t, w in said if 19.5 <= t < 50 and w in NUMBERS]
    assert found.named == (late[-1] if late else None)


def test_chance_is_what_others_of_the_kind_wanted():
    a, b, c, d = (dict(kind=k, want=w) for k, w in (('x', 1), ('y', 2), ('x', 3), ('x', 4)))
    assert answering.others([a, b, c, d]) == [c, b, d, a]


def test_the_last_question_has_all_the_time():
    found = answering.score_answer([(999, 'two')], NUMBERS, 'two', begin=1, end=9.25,
                                   until=math.inf)
    assert found == (True, True, 990, 'two')


def test_answers_are_counted_over_questions(streams_lm):
    """What was said is written by hand into the text rows of the corpus's own dialogues.

    The first question of a dialogue is answered rightly 7 frames late and the others are not
    answered; one dialogue says a wrong word at once, and another one talks into its question.
    """
    lm, v = streams_lm, streams_lm.vocab
    text, hz = lm.text(), lm.config.codec.frame_hz
    asked, kinds = answering.questions_of(f'{lm.config.data.path}/grammar.json')
    found, latencies, questions, right = [], [], 0, []
    records = [r for r in data.examples(lm.config, 'train', 'dialogue', vocab=v)
               if any(t.channel == 1 and t.text in asked for t in r.turns)]
    assert len(records) >= 3
    for n, r in enumerate(records):
        turns = [t for t in r.turns if t.channel == 1 and t.text in asked]
        questions += len(turns)
        q, end = asked[turns[0].text], math.floor(turns[0].end_s * hz)
        wrong = next(w for w in sorted(kinds[q['kind']]) if w != q['want'])
        row = np.full(1 + r.codes.shape[-1], v.specials['pad'])
        at, word = (end, wrong) if n == 1 else (end + 7, q['want'])
        ids = text.encode(word)
        assert at + len(ids) <= len(row) and (len(turns) == 1 or at < turns[1].start_s * hz)
        row[at:at + len(ids)] = ids
        latencies.append(at - end)
        right.append(n != 1)
        if n == 2:
            row[end - 4] = text.encode('the')[0]
        said = trained.words_at(v, text, row)
        scored = answering.score_dialogue(said, r.turns, asked, kinds, hz)
        assert len(scored) == len(turns)
        assert all((a.good, a.waited, a.latency) == (False, True, None) for _, a in scored[1:])
        assert (' plus ' in q['about'] or ' minus ' in q['about']) == (scored[0][0] == 'sums')
        found += scored
    metrics, spread = answering.summary(found)
    assert spread == latencies and latencies.count(0) == 1
    assert metrics['correct %'] == pytest.approx(100 * sum(right) / questions)
    assert metrics['waited %'] == pytest.approx(100 * (questions - 1) / questions)
    assert metrics['answered %'] == pytest.approx(100 * len(records) / questions)
    assert metrics['latency frames median'] == 7
    for of in ('sums', 'facts'):
        these = [a.good for o, a in found if o == of]
        if these:
            assert metrics[f'correct %/{of}'] == pytest.approx(100 * sum(these) / len(these))


def test_no_answer_at_all_has_no_latency():
    metrics, spread = answering.summary([('facts', answering.Answer(False, True, None))])
    assert spread == [] and math.isnan(metrics['latency frames median'])
    assert metrics['answered %'] == 0 and 'correct %/sums' not in metrics


def test_answers_of_a_model_that_is_listening(streams_lm):
    """The real loop: everything is counted, whatever an untrained model says."""
    found = evaluate.answers(streams_lm, split='test', limit=2, source='dialogue', batch=2)
    assert found['items'] >= 1
    assert all(0 <= v <= 100 for k, v in found['metrics'].items() if '%' in k)


def test_answers_need_questions(streams_lm, tmp_path):
    with pytest.raises(ConfigError, match='does not list questions with answers'):
        evaluate.answers(streams_lm, split='test', limit=1, source='dialogue', questions='nosuch')
    (tmp_path / 'other.json').write_text('{"questions": {}, "kinds": {}}')
    with pytest.raises(ConfigError, match='asks no question of /.*/other.json'):
        evaluate.answers(streams_lm, split='test', limit=1, source='dialogue',
                         questions=str(tmp_path / 'other.json'), batch=2)


def test_words_stand_where_their_first_piece_does(streams_lm):
    v, text = streams_lm.vocab, streams_lm.text()
    word = next(w for w in ('qzx', 'zqj') if len(text.encode(w)) > 1)       # letter by letter
    s = v.specials
    row = [s['pad'], s['epad'], *text.encode('the'), s['pad'], *text.encode(word), s['epad'],
           *text.encode('the'), NOTHING, s['eos'], v.rows[0].size - 1]
    first, second = 2, 3 + len(text.encode('the'))
    third = second + len(text.encode(word)) + 1
    assert words_at(v, text, np.array(row)) == [(first, 'the'), (second, word), (third, 'the')]
    pieces = list(text.encode(word))        # a word whose pieces are spread goes on
    spread = [pieces[0], s['pad'], *pieces[1:]]
    assert words_at(v, text, np.array(spread)) == [(0, word)]
    inner = next(i for i in pieces if not text.piece(i).startswith('\u2581'))
    assert words_at(v, text, np.array([s['pad'], inner])) == [(1, text.decode([inner]))]


# What is written.

def test_results_replace_those_of_the_same_task_and_split(flat_lm, capsys):
    lm = flat_lm
    first = evaluate.run(lm.config, lm.workdir, tasks=('likelihood',), limit=1)
    assert (first[0]['task'], first[0]['split'], first[0]['stage'], first[0]['step']) == (
        'likelihood', 'test', 'pretrain', 3)
    said = capsys.readouterr().out
    assert 'aligned/loss/tokens' in said
    assert 'likelihood on test (3 items, stage pretrain, step 3)' in said.splitlines()
    evaluate.run(lm.config, lm.workdir, tasks=('likelihood',), split='train', limit=2)
    evaluate.run(lm.config, lm.workdir, tasks=('stories',), limit=4)
    evaluate.run(lm.config, lm.workdir, tasks=('likelihood',), limit=2)
    stored = evaluate.recorded(lm.workdir)
    assert [(e['task'], e['split']) for e in stored] == [
        ('likelihood', 'train'), ('stories', 'test'), ('likelihood', 'test')]
    assert stored[2]['metrics'] != first[0]['metrics']
    # The model as it was drawn is measured beside it, and does not take its place.
    floor, = evaluate.run(lm.config, lm.workdir, tasks=('likelihood',), limit=2, untrained=True)
    assert (floor['stage'], floor['step']) == ('untrained', 0)
    drawn = model.init(lm.config, jax.random.key(lm.config.seed))
    assert floor['metrics'] == pytest.approx(evaluate.likelihood(
        dataclasses.replace(lm, params=drawn), split='test', limit=2,
        sources=tuple(lm.config.evals.likelihood.sources))['metrics'], rel=1e-5)
    assert evaluate.recorded(lm.workdir) == stored + json.loads(json.dumps([floor]))
    assert evaluate.likelihood(lm, split='test', limit=2, sources=tuple(
        lm.config.evals.likelihood.sources))['metrics'] == pytest.approx(stored[2]['metrics'])


def test_a_task_that_cannot_be_run_loses_no_other(flat_lm, tmp_path):
    lm = flat_lm
    work = tmp_path / 'run'
    shutil.copytree(lm.workdir, work)
    (work / 'evaluation.json').unlink(missing_ok=True)
    c = lm.config.copy_and_resolve_references()
    c.evals = dict(asr=dict(name='asr', source='nowhere'), likelihood=c.evals.likelihood)
    with pytest.raises(ConfigError, match="evals.asr: .*nowhere.*; all else was measured and kept"):
        evaluate.run(c, str(work), limit=1)
    assert [e['task'] for e in evaluate.recorded(str(work))] == ['likelihood']


def test_fewer_items_do_not_replace_more_of_the_same_step(tmp_path):
    work, before = str(tmp_path), dict(task='asr', split='test', stage='a', step=3, limit=100)
    for entry, stays in ((before, False), (dict(before, limit=20), True),
                         (dict(before, step=4, limit=20), False), (dict(before, step=4), False),
                         (dict(before, step=4, limit=None), False), (before | dict(step=4), True)):
        evaluate.record(work, [entry])
        assert (evaluate.recorded(work) != [entry]) == stays


def test_what_is_not_a_number_is_written_as_none(tmp_path):
    entry = dict(task='answers', split='test', items=0, metrics={'a': math.nan, 'b': math.inf,
                                                                 'c': 1.5},
                 histogram=dict(name='x', values=[math.nan, 2.0]))
    evaluate.record(str(tmp_path), [entry])
    with open(tmp_path / 'evaluation.json') as f:
        text = f.read()
    assert 'NaN' not in text and 'Infinity' not in text
    stored = json.loads(text)[0]
    assert stored['metrics'] == {'a': None, 'b': None, 'c': 1.5}
    assert stored['histogram']['values'] == [None, 2.0]
    evaluate.record(str(tmp_path), [dict(entry, split='voice')])
    assert len(evaluate.recorded(str(tmp_path))) == 2
    assert os.listdir(tmp_path) == ['evaluation.json']


@pytest.mark.parametrize('name', NAMES)
def test_what_a_demo_is_judged_by_can_be_read(corpus, name):
    """Sources that are there, and what is no source is not taken for one."""
    c = on(corpus, read(name, 'demo'))
    vocab = model.make_vocab(c)
    for task in c.evals:
        evaluate.check(c, task, vocab)
    if 'likelihood' in c.evals:
        c.evals.likelihood.sources = ('nowhere',)
        with pytest.raises(ConfigError, match='evals.likelihood: .*nowhere'):
            evaluate.check(c, 'likelihood', vocab)


def test_without_a_listener_nothing_is_heard():
    c = read('mini_omni', 'demo')
    task = next(t for t, o in c.evals.items() if o.name == 'replies')
    for listener in ('asr', None):
        c.evals[task].listener = listener
        assert ('spoken WER %' in evaluate.measured(c, task)) == bool(listener)
        assert 'UER %/floor' in evaluate.measured(c, task)

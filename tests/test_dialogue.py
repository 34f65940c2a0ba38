# SPDX-License-Identifier: Apache-2.0
"""Do systems of every layout talk, and is what is measured of it what stands in the grids?"""

import copy
import json
import math
import pathlib
import re

import jax
import numpy as np
import pytest
from test_evaluate import made

from jaxsd import cli, data, dialogue, evaluate, generate, turns
from jaxsd.config import ConfigError
from jaxsd.report.elements import number
from jaxsd.types import NOTHING, Record, Turn

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = dict(moshi='dialogue', dgslm='dialogue', omniflatten='three', syncllm='duplex')


@pytest.fixture(scope='module', params=SOURCES)
def system(request, corpus):
    return made(corpus, request.param), SOURCES[request.param]


@pytest.fixture(scope='module')
def moshi(corpus):
    return made(corpus, 'moshi')


def test_every_duplex_system_talks_and_is_measured(system):
    lm, source = system
    layout = dialogue.layout_of(lm.config, source)
    records = list(data.examples(lm.config, 'train', source, limit=2))
    heard = [dialogue.tokens_of(r, 1, layout)[:, :60] for r in records]
    said = dialogue.talk(lm, heard, layout, batch=2)
    late = max(dialogue.delays(lm, layout)) if layout['name'].startswith('duplex') else 0
    for one, theirs in zip(said, heard, strict=True):
        assert one.codes.shape == (theirs.shape[0], theirs.shape[1] - late)
        assert NOTHING <= one.codes.min() and one.codes.max() < lm.config.codec['size']
        assert (one.words is None) == (source == 'duplex' or layout['name'] == 'duplex.units')
    found = evaluate.turn_taking(lm, split='train', limit=2, source=source, batch=2)
    assert found['items'] == 2
    assert all(math.isfinite(x) for x in found['metrics'].values())
    assert {f'{e} s/min' for e in turns.EVENTS} <= found['metrics'].keys()


def test_order_and_batches_do_not_matter(moshi):
    layout = dialogue.layout_of(moshi.config, 'dialogue')
    heard = [np.asarray(r.codes[1][:, :n]) for r, n in zip(
        data.examples(moshi.config, 'train', 'dialogue', limit=3), (50, 20, 40), strict=True)]
    together = dialogue.talk(moshi, heard, layout, batch=2)
    for one, theirs in zip(together, heard, strict=True):
        plan = generate.conversation_plan(moshi.vocab, theirs, dialogue.delays(moshi, layout))
        alone = generate.converse(moshi.speaker(), [plan])[0]
        np.testing.assert_array_equal(
            one.codes[0], alone[1, 1:theirs.shape[1]] - moshi.vocab.rows[1].start)


def test_codes_of_silence_find_the_turns(moshi):
    """Learned on the training side, measured on the other: frames in which activity is right."""
    silent = dialogue.silence(moshi.config, 'dialogue')
    right = total = 0
    for r in data.examples(moshi.config, 'train', 'dialogue'):
        for c in (0, 1):
            active = turns.voiced(r.codes[c, 0], silent)
            spans = [(t.start_s, t.end_s) for t in r.turns if t.channel == c]
            right += (active == turns.during(spans, len(active), 12.5)).sum()
            total += len(active)
    assert right / total > 0.93


def test_figures_against_dialogues_known_by_heart():
    """Every figure that is measured of a model, worked out by hand; a frame is 0.1 s."""
    told = [    # mine, theirs, spans of their turns, what they say, frames of my words
        # They are answered after 0.3 s, murmur, then interrupt: I stop after 0.5 s, wait, answer.
        ('.............' + 'a' * 37 + '.' * 18 + 'a' * 12, 'b' * 10 + '.' * 10 + 'bbb' + '.' * 22
         + 'b' * 20, [(0, 1), (2, 2.3), (4.5, 6.5)], ['so?', 'uh huh', 'but'], [13, 30, 68]),
        # I murmur while they speak, they pause and go on, and I never answer.
        ('.aa', 'b' * 4 + '.' * 4 + 'b' * 9, [(0, 1.7)], ['well...'], [1]),
        # Two answers, after 0.5 and 0.9 s; I go on while interrupted, and stop at a murmur.
        ('.' * 15 + 'a' * 55 + '.' * 29 + 'a' * 11, 'b' * 10 + '.' * 35 + 'b' * 12 + '.' * 23
         + 'b' * 10 + '.' * 18 + 'b' * 5, [(0, 1), (4.5, 5.7), (8, 9), (10.8, 11.3)],
         ['so?', 'but', 'so?', 'uh huh'], [15, 40, 60, 100])]
    actives = [np.array([[c != '.' for c in line.ljust(150, '.')] for line in (mine, theirs)])
               for mine, theirs, *_ in told]
    records = [Record(str(i), 'd', 'en', 15.0, turns=tuple(
        [Turn(1, a, b, text) for text, (a, b) in zip(texts, spans, strict=True)]
        + [Turn(0, a / 10, b / 10, '') for a, b in turns.spans(active[0])]))
        for i, ((_, _, spans, texts, _), active) in enumerate(zip(told, actives, strict=True))]
    found = dialogue._figures(actives, [t[4] for t in told], records, 10.0,
                              ('uh huh',))
    mine = 37 + 12 + 2 + 55 + 11
    assert found['silence %'] == pytest.approx(100 * (1 - mine / 450))
    wanted = {
        'events/turn': 4, 'takeover %/turn': 75.0, 'latency ms/turn': 500.0,    # of 300, 500, 900
        'events/pause': 1, 'takeover %/pause': 0.0,
        'events/interruption': 2, 'takeover %/interruption': 100.0,
        'success %/interruption': 50.0, 'stop ms/interruption': 850.0,          # of 500, 1200
        'talked through %/interruption': 50.0,
        'latency ms/interruption': 150.0,                                       # of 300, 0
        'events/murmur': 2, 'went on %/murmur': 50.0,
        'backchannels/min': 1 / 45 * 60}
    assert {k: found[k] for k in wanted} == pytest.approx(wanted)
    assert found['ipus/min'] == pytest.approx((2 + 3 + 1 + 2 + 2 + 4) / 45 * 60)
    assert not {n for n in found if n.startswith('stop ms/turn')}


def test_words_are_of_the_turn_they_are_heard_in():
    active = np.array([[c != '.' for c in line] for line in (
        '..aaaaa..........aaaaa...', '.........bbbbb...........')])
    said = dialogue.Said(np.zeros((1, 25), int), [(0, 'one'), (6, 'two'), (7, 'no'), (14, 'nor'),
                                                  (15, 'three'), (21, 'four'), (22, 'end')])
    assert dialogue._by_turn([said], [active], 10.0) == [['one', 'two'], ['three', 'four']]


def test_who_says_what_was_recorded_has_the_recorded_figures(moshi, monkeypatch):
    """All that is measured of a model, measured of a speaker whose side is the recorded one."""
    records = list(data.examples(moshi.config, 'train', 'dialogue', vocab=moshi.vocab, limit=6))
    said = [dialogue.Said(r.codes[0], [(int(w.start_s * 12.5), w.text) for w in r.words
                                       if w.channel == 0]) for r in records]
    monkeypatch.setattr(dialogue, 'talk', lambda *_, **__: said)
    result = evaluate.turn_taking(moshi, split='train', limit=6, source='dialogue')
    found = result['metrics']
    pairs = [n.removesuffix('/true') for n in found if n.endswith('/true')]
    assert len(pairs) > 12
    for name in pairs:
        assert found[name] == found[f'{name}/true'], name
    silent = dialogue.silence(moshi.config, 'dialogue')
    late = [1000 * s for r in records for who, s in turns.transfers(
        turns.voiced(r.codes[:, 0], silent), 12.5) if who == 0]
    assert result['histogram']['values'] == late and len(late) > 5
    for p in (10, 50, 90):
        assert found[f'response ms p{p}'] == pytest.approx(np.percentile(late, p))
    if 'backchannel timing' in found:
        assert found['backchannel timing'] == pytest.approx(0.0, abs=1e-9)
    assert 0 <= found['repetition %'] < 20
    # Twice as late, and everything said twice: the figures move, the recorded ones stay.
    slow = [dialogue.Said(np.roll(s.codes, 5, 1), [w for w in s.words for _ in range(2)])
            for s in said]
    monkeypatch.setattr(dialogue, 'talk', lambda *_, **__: slow)
    moved = evaluate.turn_taking(moshi, split='train', limit=6, source='dialogue')['metrics']
    assert moved['response ms p50'] > found['response ms p50'] + 100
    assert {n: x for n, x in moved.items() if n.endswith('/true')} == {
        n: x for n, x in found.items() if n.endswith('/true')}


def test_figures_of_recorded_dialogues(moshi):
    """Those ending in /true come from the records alone, and a minute has 60 seconds."""
    found = evaluate.turn_taking(moshi, split='train', limit=8, source='dialogue')['metrics']
    silent = dialogue.silence(moshi.config, 'dialogue')
    records = list(data.examples(moshi.config, 'train', 'dialogue', limit=8))
    tallies = [turns.tally(turns.voiced(r.codes[:, 0], silent), 12.5) for r in records]
    for name, value in turns.per_minute(tallies, 12.5).items():
        assert found[f'{name}/true'] == pytest.approx(value)
    edge = 60 * sum(t.edge for t in tallies) / sum(t.total for t in tallies)
    assert sum(sign * found[f'{k} s/min/true'] for k, sign in dict(
        ipu=1, pause=1, gap=1, overlap=-1).items()) + edge == pytest.approx(60)
    # The recorded system answers: that it waits and takes over is known of this corpus.
    assert found['takeover %/turn/true'] > 20 and 0 < found['latency ms/turn/true'] < 1500


def test_what_is_said_can_be_listened_to(moshi):
    """The listener hears a voice on the other's rows; nothing of mine is in what it reads."""
    codes = [np.asarray(r.codes[0][:, :30]) for r in data.examples(
        moshi.config, 'train', 'dialogue', limit=2)]
    heard = dialogue.transcripts(moshi, codes, 'stories')
    assert len(heard) == 2 and all(isinstance(t, str) for t in heard)
    with pytest.raises(ConfigError, match='does not write down what is heard'):
        dialogue.transcripts(moshi, codes, 'dialogue')
    found = dialogue._agreement(['a b c d', 'e f', ''], ['a b x d', 'e f', 'g'])
    assert found['text/audio WER %'] == pytest.approx(100 / 6)


def test_turns_are_probed_while_training(moshi):
    c = copy.deepcopy(moshi.config)
    c.evals = dict(turns=dict(name='turn_taking', source='dialogue', batch=2, probed=2))
    held_out = evaluate.probe(c, moshi.stage)(7, jax.device_get(moshi.params))
    whole = evaluate.turn_taking(moshi, split='test', limit=2, source='dialogue', batch=2)
    seconds = held_out.pop('turns/seconds')
    assert held_out == pytest.approx({f'turns/{k}': x for k, x in whole['metrics'].items()})
    assert seconds > 0
    c.evals.turns.source = 'nowhere'
    with pytest.raises(ConfigError, match='evals.turns'):
        evaluate.probe(c, moshi.stage)


def test_turns_of_a_run_reach_its_metrics_and_its_report(corpus, tmp_path, caplog):
    """Trained by the verb: measured before the first step, which says how long the steps will wait,
    and on schedule; no later probe takes longer."""
    work, page = tmp_path / 'run', tmp_path / 'page.html'
    argv = ['--config', f'{ROOT}/configs/moshi.py:tiny', '--workdir', str(work),
            f'--config.data.path={corpus}', f'--config.codec.path={corpus}/codec.safetensors',
            f'--config.vocab.tokenizer={corpus}/text.model',
            "--config.stages=({'name': 'duplex', 'steps': 4, 'batch': 8, 'lr': 1e-3, "
            "'probe_steps': 2, 'log_steps': 1, 'data': {'dialogue': 1.0}},)",
            "--config.evals={'turns': {'name': 'turn_taking', 'source': 'dialogue', 'batch': 1, "
            "'probed': 1}}"]
    assert cli.main(['train', *argv]) == 0
    rows = [json.loads(line) for line in (work / 'metrics.jsonl').read_text().splitlines()]
    held = {r['step']: r['held_out'] for r in rows if 'held_out' in r}
    assert sorted(held) == [0, 2, 4] and [r['step'] for r in rows if 'loss' in r] == [1, 2, 3, 4]
    assert {'turns/ipus/min', 'turns/silence %', 'turns/seconds'} <= held[4].keys()
    said, = [r.message for r in caplog.records if 'the steps will wait' in r.message]
    stated_s = float(re.match(r'every 2 steps the steps will wait at most ([\d.]+) s', said)[1])
    assert held[0]['turns/seconds'] <= stated_s + .05
    assert max(held[n]['turns/seconds'] for n in (2, 4)) <= stated_s
    assert cli.main(['report', '--workdir', str(work), '--out', str(page)]) == 0
    text = page.read_text()
    for name, x in held[4].items():
        if not name.endswith('seconds'):
            assert name.removeprefix('turns/') in text and number(x) in text
    # Going on does not measure what was measured.
    assert cli.main(['train', *argv]) == 0
    assert (work / 'metrics.jsonl').read_text().count('"held_out"') == 3


def test_what_holds_no_two_speakers_is_refused(moshi, corpus):
    with pytest.raises(ConfigError, match='data.sources has no nowhere'):
        dialogue.layout_of(moshi.config, 'nowhere')
    flat = made(corpus, 'spirit_lm')
    with pytest.raises(ConfigError, match='a conversation needs one of duplex.columns'):
        dialogue.layout_of(flat.config, 'aligned')


def test_options_that_a_config_leaves_out_are_the_layout_s_own(corpus):
    c = made(corpus, 'omniflatten').config
    whole = dialogue.layout_of(c, 'three')
    assert whole['streams'] == ('theirs', 'text', 'mine') and whole['chunk_frames'] == 10
    for name in ('streams', 'chunk_frames', 'chunk_text', 'silences'):
        del c.data.sources.three.layout[name]
    assert dialogue.layout_of(c, 'three') == whole

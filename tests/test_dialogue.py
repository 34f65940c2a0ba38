# SPDX-License-Identifier: Apache-2.0
"""Do systems of every layout talk, and is what is measured of it what stands in the grids?"""

import copy
import math

import jax
import numpy as np
import pytest
from test_evaluate import made

from jaxsd import data, dialogue, evaluate, generate, turns
from jaxsd.config import ConfigError
from jaxsd.types import NOTHING

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


def test_what_holds_no_two_speakers_is_refused(moshi, corpus):
    with pytest.raises(ConfigError, match='data.sources has no nowhere'):
        dialogue.layout_of(moshi.config, 'nowhere')
    flat = made(corpus, 'spirit_lm')
    with pytest.raises(ConfigError, match='a conversation needs one of duplex.columns'):
        dialogue.layout_of(flat.config, 'aligned')

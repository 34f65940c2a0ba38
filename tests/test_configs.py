# SPDX-License-Identifier: Apache-2.0
"""Every file of configs/ three ways: it resolves, its full size builds, its tiny variant learns.

`JAXSD_GOLDEN=write python -m pytest tests/test_configs.py` draws the goldens anew; look at what
changed before committing it.
"""

import dataclasses
import json
import os
import pathlib
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipelines import augment
from jaxsd import config as configs
from jaxsd import evaluate, model, train, trained
from jaxsd import run as rundir
from jaxsd import stage as stages
from jaxsd.config import bind, plain
from jaxsd.layout import show
from jaxsd.stage import flatten
from jaxsd.state import mesh_of
from jaxsd.types import Phrase, Record, Turn, Where, Word

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT / 'tests' / 'golden' / 'configs'
NAMES = sorted(p.stem for p in (ROOT / 'configs').glob('*.py') if not p.stem.startswith('_'))
# Files and their recipes that are systems of their own, as FILE,RECIPE.
SYSTEMS = (*NAMES, 'speechgpt,gen', 'spirit_lm,expressive', 'twist,recipe=sims',
           'twist,recipe=slam')


def decoder(width, layers, heads, kv_heads, head_dim, mlp, biased=False):
    """Parameters of a decoder without its tables: attention, gated feed-forward, norms."""
    out, kv = heads * head_dim, kv_heads * head_dim
    return width + layers * (2 * width * (out + kv) + 3 * width * mlp + 2 * width
                             + biased * (out + 2 * kv))


def within(width, layers, mlp):
    """Of a small transformer inside a column."""
    return width + layers * (4 * width ** 2 + 3 * width * mlp + 2 * width)


def depth(of, text, width, layers, mlp, cells, card, size, sets):
    """Of a depth head on a model of width `of`: `cells` codebooks, `sets` sets of weights."""
    return (of * text[0] + text[1] * width + (cells - 1) * size * width + cells * width * card
            + sets * of * width
            + layers * (2 * width + sets * (4 * width ** 2 + 3 * width * mlp)))


LLAMA_2_7B = 6_738_415_616       # the same size as the first LLaMA's
LLAMA_3_8B = 8_030_261_248
MISTRAL_7B = 7_241_732_096
QWEN_HALF_B, QWEN_7B = 494_032_768, 7_615_616_512
GLM_4_9B = 9_399_951_360
PARAMETERS = {      # of the published size, by overrides
    # Tables of the whole line, heads of what may be said, and what else a system has.
    'dgslm': {(): decoder(512, 6, 8, 8, 64, 1365) + 512 * (1002 + 1000)},
    # 494 million of Qwen2-0.5B without its table; 181,120 rows as in the released one.
    'mini_omni': {(): decoder(896, 24, 14, 2, 64, 4864, True) + 896 * 181_120
                  + 896 * (151_941 + 7 * 4100) + 4864 * (2 * 768 + 896)},
    'pslm': {(): decoder(4096, 32, 32, 32, 128, 11008, True) + 4096 * 153_088
             + 4096 * (151_938 + 2 * 514)},
    # Llama-3.1-8B; the adaptor of five Whisper states; the decoder of 425 million.
    'llama_omni': {(): 8_030_261_248 + 4096 * (129_259 - 128_256 + 1)
                   + 6400 * 2048 + 2048 + 2048 * 4096 + 4096
                   + 4096 * 4097 + decoder(4096, 2, 32, 32, 128, 11008) + 4096 * 1001},
    'intrinsic_voice': {(): decoder(3584, 28, 28, 4, 128, 18944, True)
                        + 3584 * (151_940 + 151_939) + 502 * 512 + 5 * 512 * 3584
                        + 3584 * 1024 + 5 * 1024 + within(1024, 4, 2816) + 1024 * 501},
    'musicgen': {(): decoder(1536, 48, 24, 24, 64, 4096) + 1536 * (40_448 + 32_128 + 4 * 2048)},
    'parler_tts': {(): decoder(1024, 24, 16, 16, 64, 2730)
                   + 1024 * (41_984 + 32_128 + 9 * 1025)},
    'voicecraft': {(): decoder(2048, 16, 16, 16, 128, 5461) + 2048 * (8320 + 100 + 4 * 2053)},
    'uniaudio': {(): decoder(1536, 24, 16, 16, 96, 4096) + 512 * 35_200 + 1536 * 1536
                 + 512 * 1536 + 35_200 * 1536 + 1536 + 3 * 1536 + within(1536, 8, 4096)
                 + 1536 * 35_199},
    'delayed_asr': {(): decoder(2048, 16, 16, 16, 128, 5632) + 2048 * (73_569 + 8000)},
    'delayed_tts': {(): decoder(2560, 24, 20, 20, 128, 7040) + 2560 * 80_785
                    + depth(2560, (48_000, 48_001), 1024, 6, 2816, 16, 2048, 2049, 9)},
    'csm': {(): decoder(2048, 16, 32, 8, 64, 8192) + 2048 * 193_920
            + depth(2048, (128_256, 128_259), 1024, 4, 8192, 32, 2049, 2051, 1)},
    'mimo_audio': {(): decoder(4096, 36, 32, 8, 128, 11008, True) + 4096 * 151_684
                   + 8 * 1026 * 1024 + 4 * 1024 * 4096 + within(1024, 6, 2730) + 4 * 1024
                   + depth(4096, (151_683, 151_684), 1024, 16, 2730, 32, 1025, 1026, 1)},
    # Llama-2-7B with 512 more rows in each of its two tables: 32,000 pieces, 2 markers and 501
    # units, rounded up to a multiple of 128 (32,512).
    'spirit_lm': {(): LLAMA_2_7B + 2 * 512 * 4096},
    # 10,000 units and two relations; the released table has one more row, for padding.
    'usdm': {(): MISTRAL_7B + 2 * 10_002 * 4096},
    # The size of OPT-350M (331,196,416) with three matrices in a gated feed-forward and without
    # its projected embeddings and learned positions.
    'voxtlm': {(): 24 * (4 * 1024 * 1024 + 3 * 1024 * 4096 + 2 * 1024) + 1024 + 11_008 * 1024},
    # PaLM 8B (8.63e9 in its paper, a tied table of 256,000) and 1,024 units.
    'audiopalm': {(): 8_632_143_872 + 1024 * 4096},
    # LLaMA 7B, whose 32,000 rows in both tables become 502.
    'twist': {(): LLAMA_2_7B - 2 * 31_498 * 4096},
    # 1,000 units and six markers.
    'speechgpt': {(): LLAMA_2_7B + 2 * 1_006 * 4096},
    'emova': {(): LLAMA_3_8B + 2 * 4096 * 4096},
    # The released table has 168,960 rows.
    'glm4_voice': {(): GLM_4_9B + 2 * (168_960 - 151_552) * 4096},
    # 501 units and two markers, rounded up.
    'syncllm': {(): LLAMA_3_8B + 2 * 512 * 4096},
    # An encoder, a decoder of two tables, and two linear maps on either side of a frame.
    'spectron': {(): 512 * 1024 + 1024 + within(1024, 24, 6656) + 1024 * 1536
                 + decoder(1536, 12, 12, 12, 128, 6144) + 1536 * (256_003 + 256_002)
                 + 128 * 256 + 256 + 256 * 1536 + 1536 + 1536 * 256 + 256 + 256 * 128 + 128},
    # 4,096 units and eight markers, rounded up; one table.
    'omniflatten': {(): QWEN_HALF_B + 4_224 * 896},
    # Both speakers are predicted in training. The released checkpoint keeps the depth steps of one
    # and does not round its 64,785 rows up: 7,687,729,152.
    'moshi': {(): 8_371_863_552,
              (('vocab.predicted', "('mine',)"), ('vocab.multiple', '1')): 7_687_729_152},
}


def read(name, arg='', *overrides):
    """The config of a file, or of a recipe of one, at a size."""
    name, _, recipe = name.partition(',')
    arg = ','.join(filter(None, (arg, recipe)))
    c = configs.read(f'{ROOT}/configs/{name}.py' + (f':{arg}' if arg else ''))
    for path, value in overrides:
        configs.override(c, path, value)
    return c


def on(corpus, c):
    """`c` with the files of the small corpus."""
    c.data.path = str(corpus)
    c.codec.path = str(corpus / os.path.basename(c.codec.path))
    if c.vocab.get('tokenizer'):        # a model of speech alone has none
        c.vocab.tokenizer = str(corpus / os.path.basename(c.vocab.tokenizer))
    return c


def toy(c) -> Record:
    """Twenty seconds of two speakers whose every number is a small formula, with the ids given."""
    hz, books = c.codec.frame_hz, c.codec.codebooks
    ids = max(1, min(300, c.vocab.text_tokens - 20))
    frames = np.arange(int(20 * hz))
    words = tuple(Word(f'w{i}', i // 20 % 2, 0.4 * i + 0.1, 0.4 * i + 0.4,
                       tuple(10 + (7 * i + j) % ids for j in range(1 + i % 3 // 2)))
                  for i in range(48))
    codes = np.stack([[(frames + 3 * k + 100 * channel) % c.codec.size for k in range(books)]
                      for channel in (0, 1)]).astype(np.int16)
    units = tuple((frames // 3 * 5 + channel) % c.codec.size for channel in (0, 1))
    if books > 1 and c.vocab.name == 'line':        # as `data` fills them in
        units = tuple(codes[:, 0])
    sides = {name: tuple(np.arange(int(20 * hz)) // 3 % size for _ in units)
             for (name, size), hz in zip(c.vocab.get('sides', ()), (12.5, 1.0), strict=False)}
    parts = [part for _, o in layouts(c) for part in (*o.get('opening', ()), *o.get('parts', ()))]
    names = {part[1] for part in parts if part[0] == 'field'} | {
        f'{part[1].split()[1]} {channel}' for part in parts if part[0] == 'label'
        for channel in (0, 1)}
    fields = {name: (Phrase(name, tuple(300 + i for i in range(1 + len(name) % 3))),)
              for name in names}
    return Record('toy', 'toy', 'en', 20.0, None if books == 1 else codes,
                  tuple(u.astype(np.int16) for u in units) if books == 1 or c.vocab.name == 'line'
                  else (), words,
                  tuple(w._replace(text=('n', 'ˈæ', 'ˌaɪ')[i % 3], ids=())
                        for i, w in enumerate(words)),
                  turns=(Turn(0, 0.0, 8.0, ''), Turn(1, 8.0, 16.0, ''), Turn(0, 16.0, 20.0, '')),
                  sides=sides, fields=fields)


def layouts(c):
    """(place, options) of every layout in a config."""
    yield 'layout', c.layout
    for name, source in c.data.sources.items():
        if 'layout' in source:
            yield f'data.sources.{name}.layout', source.layout
    for i, s in enumerate(stages.stages(c)):
        if s.layout:
            yield f'stages[{i}].layout', s.layout


def draw(c, options, where):
    make, record = bind(options, 'jaxsd.layout', where, given=('vocab', 'rng')), toy(c)
    if 'encoder' in c.frontend:     # a few frames of features a second, so that a question is short
        width = c.frontend.encoder.features // options.get('stack_frames', 1)
        count = 200 if 'prenet' in c.frontend else 40
        record = dataclasses.replace(record, feats=(np.ones((count, width), np.float32),) * 2)
    if 'latents' in c.head:
        shape = (int(20 * c.codec.frame_hz), 2, c.head.latents)
        record = dataclasses.replace(record, latents=(np.ones(shape, np.float32),) * 2)
    return make(record, vocab=model.make_vocab(c), rng=np.random.default_rng(0))


def test_every_config_is_counted():
    assert NAMES == sorted(PARAMETERS)


@pytest.mark.parametrize('name', NAMES)
def test_the_published_size_builds_with_its_parameters(name):
    for overrides, parameters in PARAMETERS[name].items():
        c = read(name, '', *overrides)
        assert model.count(model.abstract(c)[1]) == parameters


@pytest.mark.parametrize('name, arg, parameters', [
    ('spirit_lm', 'expressive', LLAMA_2_7B + 2 * 768 * 4096),     # 164 rows more, rounded up
    ('twist', 'recipe=slam', QWEN_HALF_B - (151_936 - 502) * 896),
    ('speechgpt', 'gen', LLAMA_2_7B + 2 * 1_030 * 4096        # and the flow
     + (3 * 1024 + 1) * 1536 + 1536 + 1536 ** 2 + within(1536, 32, 4096) + 1536 * 1024 + 1024),
    ('speechgpt', 'demo,gen', None),
    ('twist', 'recipe=sims', QWEN_7B + 2 * 512 * 3584), ('twist', 'demo,recipe=sims', None),
    ('spirit_lm', 'level=phone', LLAMA_2_7B + 2 * 640 * 4096),   # and 51 phones, rounded up
    *(('spirit_lm', f'demo,{arg}', None) for arg in (
        'expressive', 'level=phone', 'level=utterance,again=1.0', 'again=0.5'))])
def test_a_recipe_builds_and_draws(name, arg, parameters):
    c = read(name, arg)
    assert parameters in (None, model.count(model.abstract(c)[1]))
    for where, options in layouts(c):
        assert (draw(c, options, where).weights > 0).any()


def test_the_budget_of_tokens_reads_each_corpus_as_often_as_the_paper_says():
    """Spirit-LM's 100,000 steps over 28.2, 8.4 and 307 billion tokens (arXiv 2402.05755 Table 2:
    1.24, 3.81 and 0.11 epochs, of steps a twentieth longer or shorter)."""
    c = read('spirit_lm')
    (s,) = stages.stages(c)
    tokens = s.steps * s.batch * c.columns
    assert s.data == dict(aligned=1.0, speech=1.0, text=1.0) and 0.95 < tokens / 100e9 < 1.05
    for size, published in ((28.2e9, 1.24), (8.4e9, 3.81), (307e9, 0.11)):
        assert tokens / 3 / size == pytest.approx(published, rel=0.1)


@pytest.mark.parametrize('arg', ['', 'demo', 'tiny'])
@pytest.mark.parametrize('name', SYSTEMS)
def test_everything_a_config_names_is_there(name, arg):
    """Stages cover every parameter and start from earlier ones; layouts draw; the rest binds."""
    c = read(name, arg)
    v, earlier = model.make_vocab(c), []
    for s in stages.stages(c):
        paths = flatten(model.abstract(c, s.lora)[1])
        by_path = stages.multipliers(s, paths)
        deciding = {next(i for i, (pattern, _) in enumerate(s.train) if re.fullmatch(pattern, path))
                    for path in by_path}
        assert deciding == set(range(len(s.train))), s.name         # and no rule is in vain
        assert s.start in ('init', *earlier)
        earlier.append(s.name)
        assert s.data and set(s.data) <= set(c.data.sources)
        stages.learning_rate(s)
        stages.optimizer(s, by_path)
    assert set().union(*(s.data | s.apart.get('data', {}) for s in stages.stages(c))) == set(
        c.data.sources)
    for where, options in layouts(c):
        grid = draw(c, options, where)
        assert grid.tokens.shape[0] == len(v.rows)
        assert (grid.weights > 0).any(), where
        for row, tokens, weights in zip(v.rows, grid.tokens, grid.weights, strict=True):
            inside = (tokens >= row.start) & (tokens < row.start + row.size)
            assert (inside | (tokens == -1)).all(), (where, row.name)
            scored = tokens[weights > 0]
            assert (scored < row.start + row.predicted).all(), (where, row.name)
    bind(c.codec, 'jaxsd.codec', 'codec')
    for task, options in c.evals.items():
        bound = bind(options, 'jaxsd.evaluate', f'evals.{task}', given=('split', 'limit')).keywords
        assert {bound.get('source', 'none'), *bound.get('sources', ())} <= {'none', *c.data.sources}
    batch = train.abstract_batch(c, stages.stages(c)[-1], mesh_of(c))
    terms = jax.eval_shape(model.objective_of(c), batch['weights'], batch['weights'], batch)[0]
    spoken = {row.name.split()[0] for row in v.rows if row.predicted}
    assert spoken <= {row for names in plain(c.objective.terms).values() for row in names}
    beside = ('frames', 'bins', 'flow', 'time 1', 'time 2', 'time 3') if 'frames' in batch else ()
    assert set(c.objective.terms) <= set(terms) <= {*c.objective.terms, *beside}


@pytest.mark.parametrize('name', SYSTEMS)
def test_the_grid_of_a_fixed_record_is_unchanged(name):
    c = read(name)
    v, parts = model.make_vocab(c), []
    for where, options in layouts(c):
        grid = draw(c, options, where)
        first = max(0, int(np.flatnonzero(grid.weights.any(0))[0]) - 6)     # of what is learned
        values, counts = np.unique(grid.weights, return_counts=True)
        weights = ', '.join(f'{n} of {w:.3g}' for w, n in zip(values, counts, strict=True))
        mark = zlib.crc32(grid.tokens.astype('<i4').tobytes()
                          + grid.weights.astype('<f4').tobytes())
        parts.append(f'{where}: cells by weight {weights}; all of it {mark:08x}\n' + show.text(
            grid, v, columns=(first, first + 40)).rstrip())
    found, path = '\n\n'.join(parts) + '\n', GOLDEN / f'{name}.txt'
    if os.environ.get('JAXSD_GOLDEN') == 'write':
        path.write_text(found, encoding='utf-8')
    assert found == path.read_text(encoding='utf-8')


# One of each kind at once: two modalities, streams, low-rank terms, two speakers, features, CTC.
# The others' code is the same, or they differ in a head or a frontend, and their compilations take
# minutes: they are slow tests.
AT_ONCE = ('spirit_lm', 'moshi', 'usdm')


@pytest.mark.parametrize('name', [n if n in AT_ONCE else pytest.param(n, marks=pytest.mark.slow)
                                  for n in SYSTEMS])
def test_tiny_learns(name, corpus, tmp_path):
    """Real steps on real speech: every stage ends, and the held-out loss is below that at random.

    Two steps do not show learning through the noise of a batch, so each stage takes a few.
    """
    c = on(corpus, read(name, 'tiny'))
    assert all(s.steps == 2 for s in stages.stages(c))
    c.stages = tuple(dict(s) | dict(steps=6, save_steps=6) for s in plain(c.stages))
    work = str(tmp_path / 'run')
    first = {}

    def probe_of(stage):
        probe = evaluate.probe(c, stage)
        if stage.start == 'init':
            first.update(probe(0, model.init(c, jax.random.key(c.seed), stage.lora)))
        return probe
    loss = train.run(c, work, probe_of=probe_of)
    assert np.isfinite(loss)
    with open(f'{work}/metrics.jsonl') as f:
        lines = [json.loads(line) for line in f]
    for s in stages.stages(c):
        mine = [x for x in lines if x['stage'] == s.name]
        assert max(x['step'] for x in mine) == 6
        assert all(x['skipped_steps'] == 0 for x in mine if 'loss' in x)
    held_out = [x['held_out'] for x in lines if 'held_out' in x][-1]
    assert held_out.keys() == first.keys()
    assert sum(held_out.values()) < 0.97 * sum(first.values())
    # A stage moves what it trains and nothing else, to the bit.
    after = {s.name: flatten(trained.load(c, work, s.name).params) for s in stages.stages(c)}
    for s in stages.stages(c):
        before = after.get(s.start) or flatten(trained.load(c, work, s.name, untrained=True).params)
        by_path = stages.multipliers(s, after[s.name])
        fresh = {p for p in before for x in s.graft.get('fresh', ()) if re.fullmatch(x, p)}
        for path in before.keys() & after[s.name].keys() - fresh:
            same = np.array_equal(before[path], after[s.name][path])
            assert same == (by_path[path] is None), (s.name, path)
        for path in after[s.name].keys() - before.keys():       # low-rank terms that begin here
            if path.endswith('lora_b'):
                still = not any(np.any(x) for x in jax.tree.leaves(after[s.name][path]))
                assert still == (by_path[path] is None), (s.name, path)


@pytest.mark.slow
@pytest.mark.parametrize('name', SYSTEMS)
def test_a_demo_is_judged_beside_its_floor(name, corpus, tmp_path):
    """Every task of the config runs, on the model as it is drawn, and most name what judges them.
    """
    c, work = on(corpus, read(name, 'tiny')), str(tmp_path / 'run')
    rundir.open_run(work, c)
    entries = evaluate.run(c, work, split='train', limit=3, untrained=True)
    judged = [e for e in entries if e['task'] not in ('likelihood', 'turns')]  # those are told only
    assert judged
    for e in judged:
        metric, floor = e['judged']
        assert e['items'] >= 1 and np.isfinite(e['metrics'][metric])
        assert floor is None or isinstance(floor, float) or np.isfinite(e['metrics'][floor])


def test_a_course_for_both_speakers_is_not_mine_alone():
    for size in ('demo', 'tiny'):
        with pytest.raises(ValueError, match='course=paper .* predicts both speakers and mine'):
            read('moshi', f'{size},course=paper,mine')
    assert read('moshi', 'mine').vocab.predicted == ('mine',)


@pytest.mark.slow
def test_the_stages_of_a_paper_follow_one_another(corpus, tmp_path):
    """One command trains all five, each from the one before, the first with two optimizer states
    and the last with low-rank terms, on a corpus with users over a bad line."""
    noisy = tmp_path / 'noisy'
    assert augment.main(['--source', str(corpus), '--out', str(noisy)]) == 0
    c, work = on(noisy, read('moshi', 'tiny,course=paper')), str(tmp_path / 'run')
    assert np.isfinite(train.run(c, work))
    with open(f'{work}/ledger.jsonl') as f:
        lines = [json.loads(line) for line in f]
    begun = [x for x in lines if x['event'] == 'start']
    names = ['pretrain', 'posttrain', 'duplex', 'instruct', 'adapt']
    assert [x['stage'] for x in begun] == names
    for before, after in zip(names[:-1], begun[1:], strict=True):
        assert before in after['start']
    read_by = {x['stage']: set(x['consumed']) for x in lines if x['event'] == 'consumed'}
    assert read_by == dict(pretrain={'mono', 'text'}, posttrain={'simulated'}, duplex={'fisher'},
                           instruct={'instruct'}, adapt={'instruct'})


@pytest.mark.slow
@pytest.mark.parametrize('name', SYSTEMS)
def test_no_score_sees_a_later_column_or_a_later_row(name):
    """Every predicted row of a grid as it is drawn: another token in one cell moves the scores of
    later columns and of later rows of its own column at most, and it does move some."""
    c = read(name, 'tiny')
    v = model.make_vocab(c)
    grid = draw(c, c.layout, 'layout')
    T = min(grid.tokens.shape[1], 48)
    tokens, rng, changes = grid.tokens[:, :T], np.random.default_rng(0), []
    for k in range(len(v.rows)):
        there = np.flatnonzero(tokens[k, 2:] >= 0) + 2
        changes += [(k, int(t)) for t in rng.choice(there, min(len(there), 2), replace=False)]
    many = np.tile(tokens, (1 + len(changes), 1, 1))
    for b, (k, t) in enumerate(changes, start=1):
        row = v.rows[k]
        other = rng.integers(row.start, row.start + max(row.predicted, row.size - 1))
        many[b, k, t] = other + (other == many[b, k, t])
    batch = dict(tokens=many, position=np.tile(np.arange(T), (len(many), 1)),
                 segment=np.ones((len(many), T), np.int32),
                 **{n: np.tile(x[:T], (len(many), *[1] * x.ndim)) for n, x in grid.extra.items()})
    graph, _, _ = model.abstract(c)
    params = model.init(c, jax.random.key(0))
    found = jax.jit(lambda p, b: nnx.merge(graph, p).scores(b))(params, batch)
    later = 0
    for row, scores in enumerate(found):
        if scores is None:
            continue
        moved = np.abs(np.asarray(scores[1:] - scores[:1])).max(-1) > 1e-5      # [changes, T]
        for b, (k, t) in enumerate(changes):
            first = t - 1 if row > k else t         # scores at t - 1 are of column t
            assert not moved[b, :first].any(), (v.rows[row].name, v.rows[k].name, t)
            later += moved[b].sum()
    assert later > 0


@pytest.mark.slow
@pytest.mark.parametrize('name', SYSTEMS)
def test_generation_is_the_training_forward(name):
    """The grid of every layout, its prompt read at once and then column by column, each cell said
    as it is written: what every row is picked from, earlier rows of its column known, is what the
    training forward scores there."""
    c = read(name, 'tiny')
    rows, drawn = model.make_vocab(c).rows, {}
    for where, options in layouts(c):
        grid = draw(c, options, where)
        drawn.setdefault(str(options), (where, grid))
    graph, _, _ = model.abstract(c)
    params = model.init(c, jax.random.key(0))
    whole_of = jax.jit(lambda p, b: nnx.merge(graph, p).scores(b))

    @jax.jit
    def said(params, tokens, at, cache, target_K, heard):
        found = {}

        def pick(k, logits, key):
            found[k] = logits
            local = target_K[k] - rows[k].start
            return jnp.clip(local, 0, rows[k].predicted - 1)[None].astype(jnp.int32)
        _, cache = nnx.merge(graph, params).step(tokens, at, cache, None, pick, heard or None)
        return found, cache
    for where, grid in drawn.values():
        n = max(1, int(np.flatnonzero(grid.weights.any(0))[0]))
        T = min(grid.tokens.shape[1], n + 8)
        one = dict(tokens=grid.tokens[:, :T], position=np.arange(T), segment=np.ones(T, np.int32),
                   **{k: x[:T] for k, x in grid.extra.items()})
        whole = whole_of(params, {k: x[None] for k, x in one.items()})
        cache = jax.jit(lambda p, n: nnx.merge(graph, p).empty_cache(1, n),
                        static_argnums=1)(params, T)
        compared = 0
        for first, last in ((0, n), *((t, t + 1) for t in range(n, T - 1))):
            part = {k: x[..., first:last] if k == 'tokens' else x[first:last]
                    for k, x in one.items()}
            heard = {k: part[k][None] for k in ('feats', 'slot', 'frames', 'framed') if k in part}
            target = one['tokens'][:, last]
            found, cache = said(params, part['tokens'][None],
                                Where(part['position'][None], part['segment'][None]), cache,
                                target, heard)
            for k, row in enumerate(rows):
                if not row.predicted:
                    assert whole[k] is None and k not in found
                    continue
                known = all(0 <= target[j] - rows[j].start < rows[j].predicted for j in range(k)
                            if rows[j].predicted)
                if known and (c.head.name != 'ctc' or not k or target[1] >= 0):
                    np.testing.assert_allclose(found[k][0], whole[k][0, last - 1], atol=2e-4,
                                               err_msg=f'{where}: {row.name} of column {last}')
                    compared += 1
        assert compared >= T - n - 1, where


def test_a_stage_is_all_options():
    """What `stages` may say is what a Stage has: this table is the one that users read."""
    legal = {f.name for f in dataclasses.fields(stages.Stage)}
    used = {key for name in NAMES for arg in ('', 'demo') for s in read(name, arg).stages
            for key in s}
    assert used <= legal

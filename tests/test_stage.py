# SPDX-License-Identifier: Apache-2.0
"""Does a stage train what it says, at the speed it says, from where it says, and nothing else?"""

import math

import jax
import numpy as np
import optax
import pytest
from small import batch, config, run

from jaxsd import checkpoint, model, sharding, train
from jaxsd import run as rundir
from jaxsd import stage as stages
from jaxsd.config import ConfigError
from jaxsd.export import begin
from jaxsd.stage import Stage, flatten

ONE = dict(name='one', steps=4, batch=2, data=dict(x=1.0), lr=1e-2)


def a_stage(**options):
    return Stage(**ONE | options)


def one_device():
    return sharding.make_mesh({}, jax.devices()[:1])


def trained(c, stage, workdir='', steps=3):
    """(state before, state after, by_path) of `steps` steps on one device."""
    graph, target, by_path = train.abstract_state(c, stage, one_device())
    params = begin.start_params(c, stage, workdir, target).params
    state = train.fresh_state(c, stage, target, by_path, params)
    before = jax.tree.map(np.asarray, state)
    step = jax.jit(train.make_step(graph, model.objective_of(c), stage, by_path))
    for i in range(steps):
        state, _ = step(state, batch(c, seed=i))
    return before, jax.tree.map(np.asarray, state), by_path


def moved(before, after) -> set[str]:
    a, b = flatten(before['params']), flatten(after['params'])
    return {p for p in a if a[p].tobytes() != b[p].tobytes()}


# Which parameters, how fast.

def test_the_first_rule_that_matches_the_whole_path_decides():
    paths = ('head/out/kernel', 'head/out', 'backbone/head/kernel')
    found = stages.multipliers(a_stage(train=(('head/.*', 0.5), ('head/out', 2.0), ('.*', None))),
                               paths)
    assert found == {'head/out/kernel': 0.5, 'head/out': 0.5, 'backbone/head/kernel': None}


@pytest.mark.parametrize('rules, words', [
    ((('head/.*', 1.0),), 'no rule of train covers backbone/kernel'),
    ((('backbone', 1.0), ('head/.*', 1.0)), 'no rule of train covers backbone/kernel'),
    ((('.*', None),), 'freezes every parameter'),
    ((('(', 1.0),), 'regular expression'),
    (('.*',), 'regular expression'),
])
def test_rules_that_do_not_cover_or_train_nothing_are_refused(rules, words):
    with pytest.raises(ConfigError, match=words):
        stages.multipliers(a_stage(train=rules), ('head/kernel', 'backbone/kernel'))


@pytest.mark.parametrize('system', ('flat', 'streams'))
def test_frozen_parameters_stay_to_the_bit_and_have_no_moments(system):
    c = config(system)
    stage = a_stage(train=(('backbone/.*', None), ('.*', 1.0)), weight_decay=0.5)
    before, after, by_path = trained(c, stage)
    free = {p for p, m in by_path.items() if m is not None}
    assert free and free != set(by_path)
    assert moved(before, after) == free
    adam = after['opt'][1]
    assert set(flatten(adam.mu)) == set(flatten(adam.nu)) == free
    moments = sum(x.size for x in jax.tree.leaves((adam.mu, adam.nu)))
    assert moments == 2 * sum(x.size for p, x in flatten(after['params']).items() if p in free)


def test_a_multiplier_scales_the_whole_update():
    """The decay too, as a rate of its own would."""
    c = config('flat')
    slow = a_stage(train=(('head/.*', 0.25), ('.*', 1.0)))
    even = a_stage()
    start, a, _ = trained(c, even, steps=1)
    _, b, _ = trained(c, slow, steps=1)
    for p, x in flatten(start['params']).items():
        whole = flatten(a['params'])[p] - x
        share = flatten(b['params'])[p] - x
        np.testing.assert_allclose(share, whole * (0.25 if p.startswith('head/') else 1.0),
                                   rtol=1e-3, atol=2e-7)


def test_an_update_is_adamw_with_clipping():
    """Two steps by hand, in float64."""
    stage = a_stage(clip=0.5, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, lr=0.1,
                    schedule='cosine', warmup_steps=2)
    x = np.array([1.0, -2.0, 3.0])
    tx = stages.optimizer(stage, {'x': 1.0})
    params = {'x': jax.numpy.array(x, jax.numpy.float32)}
    opt, m, v = tx.init(params), np.zeros(3), np.zeros(3)
    for n, g in enumerate((np.array([3.0, 4.0, 0.0]), np.array([0.1, -0.2, 0.1])), 1):
        updates, opt = tx.update({'x': jax.numpy.array(g, jax.numpy.float32)}, opt, params)
        params = optax.apply_updates(params, updates)
        g = g * min(1, 0.5 / np.linalg.norm(g))
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        adam = (m / (1 - 0.8 ** n)) / (np.sqrt(v / (1 - 0.9 ** n)) + 1e-6)
        x = x - 0.1 * (n - 1) / 2 * (adam + 0.3 * x)
        np.testing.assert_allclose(params['x'], x, rtol=1e-5)
    assert not np.allclose(x, [1, -2, 3])


@pytest.mark.parametrize('warmup', (0, 10))
@pytest.mark.parametrize('schedule', ('constant', 'cosine', 'linear', 'rsqrt'))
def test_schedules_in_closed_form(schedule, warmup):
    stage = a_stage(steps=50, schedule=schedule, warmup_steps=warmup, lr=0.3, final_lr=0.2)
    rate = stages.learning_rate(stage)
    for n in range(51):
        wanted = 0.3
        if n < warmup:
            wanted = 0.3 * n / warmup
        elif schedule == 'cosine':
            done = (n - warmup) / (50 - warmup)
            wanted = 0.3 * (0.2 + 0.8 * (1 + math.cos(math.pi * done)) / 2)
        elif schedule == 'linear':
            wanted = 0.3 * (1 - 0.8 * (n - warmup) / (50 - warmup))
        elif schedule == 'rsqrt':
            wanted = 0.3 * math.sqrt(warmup / n if warmup else 1 / (n + 1))
        assert float(rate(n)) == pytest.approx(wanted, rel=1e-5, abs=1e-8), n


# Where a stage begins.

def saved(tmp_path, c, stage, state):
    work = str(tmp_path / 'run')
    rundir.open_run(work, c)
    with checkpoint.Checkpoints(work, stage.name, config=c, keep=1) as out:
        out.save(3, jax.device_put(state), data_state={})
    return work


def logits(c, state, lora=None):
    graph, _, _ = model.abstract(c, lora)
    scores = jax.jit(lambda params: run(graph, params, 'scores', batch(c)))
    return [np.asarray(x) for x in scores(state['params']) if x is not None]


@pytest.mark.parametrize('system', ('flat', 'streams'))
def test_low_rank_terms_start_from_the_earlier_stage_and_move_alone(system, tmp_path):
    c = config(system)
    lora = dict(rank=2, scale=2.0)
    c.stages = (ONE, dict(ONE, name='two', start='one', lora=lora, lr=0.1,
                          train=(('.*/lora_[ab]', 1.0), ('.*', None))))
    first, second = stages.stages(c)
    _, end, _ = trained(c, first)
    work = saved(tmp_path, c, first, end)
    before, after, _ = trained(c, second, work)

    base, here = flatten(end['params']), flatten(before['params'])
    added = set(here) - set(base)
    assert added and all('lora_' in p for p in added) and set(base) < set(here)
    assert all(here[p].tobytes() == base[p].tobytes() for p in base)
    assert moved(before, after) == added
    assert set(flatten(after['opt'][1].mu)) == added
    for a, b, d in zip(logits(c, end), logits(c, before, lora), logits(c, after, lora),
                       strict=True):
        np.testing.assert_array_equal(a, b)     # the new term is nothing yet
        assert np.abs(a - d).max() > 1e-3


def test_low_rank_terms_go_on_with_the_stage_that_has_them(tmp_path):
    c = config('flat')
    lora = dict(rank=2, scale=2.0)
    terms = dict(ONE, name='two', start='one', lora=lora,
                 train=(('.*/lora_[ab]', 1.0), ('.*', None)))
    c.stages = (ONE, terms, dict(ONE, name='three', start='two', lora=lora,
                                 train=(('.*/lora_[ab]', None), ('.*', 1.0))))
    first, second, third = stages.stages(c)
    work = saved(tmp_path, c, first, trained(c, first)[1])
    _, end, _ = trained(c, second, work)
    work = saved(tmp_path, c, second, end)
    before, after, _ = trained(c, third, work)
    end, before, after = (flatten(x['params']) for x in (end, before, after))
    assert end.keys() == before.keys() and any(end[p].any() for p in end if p.endswith('lora_b'))
    for p in end:
        np.testing.assert_array_equal(end[p], before[p], p)
        assert np.array_equal(before[p], after[p]) == ('lora_' in p), p
    c.stages = (ONE, terms, dict(ONE, name='three', start='two'))
    with pytest.raises(ConfigError, match="three starts from 'two', whose checkpoint has low-rank"):
        trained(c, stages.stages(c)[2], work)


def test_a_stage_starts_from_the_parameters_of_a_path_and_fresh_moments(tmp_path):
    c = config('flat')
    c.stages = (ONE,)
    _, end, _ = trained(c, a_stage())
    work = saved(tmp_path, c, a_stage(), end)
    other = config('flat')
    other.seed = 5
    path = checkpoint.folder_of(work, 'one')
    other.stages = (dict(ONE, name='next', start=path),)
    stage, = stages.stages(other)
    _, target, _ = train.abstract_state(other, stage, one_device())
    begun = begin.start_params(other, stage, str(tmp_path / 'new'), target)
    assert begun.start == f'step 3 of {path}' and begun.origins == ()
    before, _, _ = trained(other, stage, str(tmp_path / 'new'), steps=0)
    assert int(before['step']) == 0 and not any(np.any(x) for x in jax.tree.leaves(before['opt']))
    for params in (end['params'], begun.params):
        assert not moved(dict(params=params), before)


def test_a_stage_draws_anew_what_its_graft_calls_fresh_and_takes_the_rest(tmp_path):
    """As a speech model that begins with a text model's body and none of its rows."""
    c = config('flat')
    c.stages = (ONE, dict(ONE, name='two', start='one', graft=dict(
        fresh=('frontend/table', 'head/out/.*'))))
    first, second = stages.stages(c)
    drawn, end, _ = trained(c, first)
    work = saved(tmp_path, c, first, end)
    assert moved(drawn, end) >= {'frontend/table', 'head/out/kernel', 'backbone/norm/weight'}
    before, after, _ = trained(c, second, work)
    assert not moved(before, dict(params=stages.unflatten(
        flatten(end['params']) | {p: flatten(drawn['params'])[p]
                                  for p in ('frontend/table', 'head/out/kernel')})))
    assert moved(before, after) == set(flatten(after['params']))
    c.stages = (ONE, dict(ONE, name='two', start='one', graft=dict(fresh=('nowhere/.*',))))
    with pytest.raises(ConfigError, match=r"stages\[1\].graft.fresh: 'nowhere/.\*' names no"):
        trained(c, stages.stages(c)[1], work)


def test_a_start_that_is_not_there_or_does_not_fit_is_one_line(tmp_path):
    c = config('flat')
    c.stages = (ONE, dict(ONE, name='two', start='one'), dict(ONE, name='three', start='x/y'))
    _, two, three = stages.stages(c)
    _, target, _ = train.abstract_state(c, two, one_device())
    with pytest.raises(ConfigError, match="stage two starts from 'one', .* train that stage first"):
        begin.start_params(c, two, str(tmp_path / 'none'), target)
    with pytest.raises(ConfigError, match="stage three starts from 'x/y', .* no checkpoint in x/y"):
        begin.start_params(c, three, str(tmp_path / 'none'), target)
    _, end, _ = trained(c, a_stage(), steps=1)
    work = saved(tmp_path, c, a_stage(), end)
    wider = config('flat')
    wider.backbone.mlp = 32
    _, target, _ = train.abstract_state(wider, two, one_device())
    with pytest.raises(checkpoint.CheckpointMismatch, match=r'\[2, 24, 16\] for .*down.* has '):
        begin.start_params(c, two, work, target)


# What a config may say.

@pytest.mark.parametrize('changes, words', [
    (dict(stpes=3), r"stages\[0\] has no option 'stpes'; did you mean 'steps'\?"),
    (dict(steps=0), r'stages\[0\].steps must be positive'),
    (dict(batch=-2), r'stages\[0\].batch must be positive'),
    (dict(save_steps=0), r'stages\[0\].save_steps must be positive'),
    (dict(log_steps=0), r'stages\[0\].log_steps must be positive'),
    (dict(bad_steps=0), r'stages\[0\].bad_steps must be positive'),
    (dict(keep=0), r'stages\[0\].keep must be positive'),
    (dict(steps=2.5), r'stages\[0\].steps takes int, got 2.5'),
    (dict(lr='fast'), r"stages\[0\].lr takes float, got 'fast'"),
    (dict(data='x'), r"stages\[0\].data takes dict, got 'x'"),
    (dict(accumulate=3), r'accumulate 3 must divide stages\[0\].batch 2'),
    (dict(schedule='steps'), r"schedule is one of constant, .*, rsqrt, got 'steps'"),
    (dict(warmup_steps=-1), r'stages\[0\].warmup_steps must be finite and not negative'),
    (dict(warmup_steps=4, schedule='cosine'), 'warmup_steps 4 must be below .*steps 4'),
    (dict(probe_steps=-1), r'stages\[0\].probe_steps must be finite and not negative'),
    (dict(lr=float('nan')), r'stages\[0\].lr must be finite'),
    (dict(lora=dict(rnak=2)), r"stages\[0\].lora has no option 'rnak'; did you mean 'rank'\?"),
    (dict(lora=dict(rank=2)), r'stages\[0\].lora needs scale'),
    (dict(start='two'), r"stages\[0\].start 'two' is a later stage"),
    (dict(start='one'), r"stages\[0\].start 'one' is the stage itself"),
    (dict(name='../x'), r"stages\[0\].name '../x' must be a plain name"),
])
def test_a_wrong_option_is_one_line(changes, words):
    c = config('flat')
    c.stages = (ONE | changes, dict(ONE, name='two'))
    with pytest.raises(ConfigError, match=words) as e:
        stages.stages(c)
    assert '\n' not in str(e.value)


def test_missing_and_double_names():
    c = config('flat')
    c.stages = (dict(name='one', steps=1),)
    with pytest.raises(ConfigError, match=r'stages\[0\] needs batch, data, lr'):
        stages.stages(c)
    c.stages = (ONE, ONE)
    with pytest.raises(ConfigError, match=r"stages\[1\].name 'one' is taken"):
        stages.stages(c)
    c.stages = ()
    with pytest.raises(ConfigError, match='stages is empty'):
        stages.stages(c)
    c.stages = (ONE, dict(ONE, name='two'))
    assert stages.find(c, None).name == 'two' and stages.find(c, 'one').name == 'one'
    with pytest.raises(ConfigError, match="no option 'onee'; did you mean 'one'"):
        stages.find(c, 'onee')


def test_splitting_and_joining_lose_nothing():
    tree = dict(a=dict(b=1, c=dict(d=2)), e=3)
    assert flatten(tree) == {'a/b': 1, 'a/c/d': 2, 'e': 3}
    assert stages.unflatten(flatten(tree)) == tree
    free, frozen = stages.split(tree, {'a/b': 1.0, 'a/c/d': None, 'e': 0.5})
    assert free == dict(a=dict(b=1), e=3) and frozen == dict(a=dict(c=dict(d=2)))
    assert stages.join(free, frozen) == tree


# Two kinds of batch, two optimizer states.

def test_steps_apart_have_moments_and_speeds_of_their_own():
    """After steps of both kinds, each state is what a stage of that kind alone would have, given
    the same gradients; the rate is one; and a step apart moves at the speed of its own rules."""
    own = dict(share=0.5, data=dict(x=1.0),
               train=(('a/.*', 0.25), ('frozen', None), ('.*', 2.0)))
    stage = a_stage(steps=6, clip=1e9, schedule='cosine', warmup_steps=1, apart=own,
                    train=(('a/.*', 1.0), ('frozen', None), ('.*', 0.5)))
    rng = np.random.default_rng(0)
    params = dict(a=dict(x=rng.standard_normal(3)), b=rng.standard_normal(2))
    by_path = stages.multipliers(stage, ('a/x', 'b', 'frozen'))
    tx = stages.optimizer(stage, by_path)
    kinds = [False, True, True, False, True, False]
    grads = [jax.tree.map(lambda x: rng.standard_normal(x.shape), params) for _ in kinds]
    state, updates = tx.init(params), []
    for kind, g in zip(kinds, grads, strict=True):
        u, state = tx.update(g, state, params, apart=np.bool_(kind))
        updates.append(u)
    rate = stages.learning_rate(stage)
    for which, speed in ((False, dict(a=1.0, b=0.5)), (True, dict(a=0.25, b=2.0))):
        adam = optax.scale_by_adam(0.9, 0.95, eps=stage.eps)
        alone = adam.init(params)
        for step, (kind, g) in enumerate(zip(kinds, grads, strict=True)):
            if kind != which:
                continue
            u, alone = adam.update(g, alone, params)
            for key in ('a', 'b'):
                got, u_key, p = (jax.tree.leaves(x[key])[0] for x in (updates[step], u, params))
                want = -float(rate(step)) * speed[key] * (u_key + 0.1 * p)
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)
        moments = state[0]['apart' if which else 'main'][1]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
                     moments.mu, alone.mu)
        assert int(moments.count) == 3


def test_a_step_apart_leaves_the_other_moments_alone():
    """In the train step itself, told by the batch."""
    c = config('streams')
    stage = a_stage(apart=dict(share=0.5, data=dict(x=1.0)))
    graph, target, by_path = train.abstract_state(c, stage, one_device())
    state = train.fresh_state(c, stage, target, by_path, model.init(c, jax.random.key(0)))
    step = jax.jit(train.make_step(graph, model.objective_of(c), stage, by_path))
    for kind in (False, True):
        arrays = batch(c, seed=0) | dict(apart=np.full(2, kind))
        after, _ = step(state, arrays)
        moved = {name: any(float(np.abs(x).max()) > 0 for x in jax.tree.leaves(
            after['opt'][0][name][1].mu)) for name in ('main', 'apart')}
        assert moved == {'main': not kind, 'apart': kind}


@pytest.mark.parametrize('apart, words', [
    (dict(share=0.5), 'needs data and a share'), (dict(share=1.0, data=dict(x=1.0)), 'and 1, got'),
    (dict(share=0.5, data=dict(x=1.0), steps=3), "no option 'steps'")])
def test_what_apart_needs(apart, words):
    c = config('flat')
    c.stages = (dict(ONE, apart=apart),)
    with pytest.raises(ConfigError, match=words):
        stages.stages(c)


def test_apart_freezes_what_the_stage_freezes():
    stage = a_stage(train=(('a', None), ('.*', 1.0)), apart=dict(
        share=0.5, data=dict(x=1.0), train=(('.*', 1.0),)))
    with pytest.raises(ConfigError, match='apart.train must freeze what train freezes'):
        stages.optimizer(stage, stages.multipliers(stage, ('a', 'b')))

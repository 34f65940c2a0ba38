# SPDX-License-Identifier: Apache-2.0
"""Eight virtual devices must compute what one does, whatever the mesh; and no more communication
than was agreed on."""

import collections
import functools
import json
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import batch, config
from test_configs import ROOT

from jaxsd import config as configs
from jaxsd import model, nn, sharding, train
from jaxsd import stage as stages

GOLDEN = os.path.join(os.path.dirname(__file__), 'golden', 'collectives.json')

SYSTEMS = {     # every kind of head and of layout, with what only some meshes could get wrong
    'flat': lambda: config('flat', chunk_columns=5),            # loss in chunks, the last ragged
    'tied': lambda: config('tied', 'qwen2'),
    'streams': lambda: config('streams', 'helium'),             # a window, a depth loop
    'parallel': lambda: config('parallel', 'mistral'),
    # 7 of 24, by maps that the steps share
    'some columns': lambda: config('streams', fraction=0.3, chunk_columns=3,
                                   step_weights='shared'),
    'experts': lambda: balanced(config('flat', 'mixtral')),
    'groups': lambda: beside(dict(name='grouped', inside=8, layers=1, heads=2, mlp=12),
                             dict(name='group', width=8, layers=1, heads=2, mlp=12),
                             marks=('pad',)),
    'patches': lambda: patched(config('flat')),
    'heard': lambda: beside(dict(name='averaged', encoder=dict(name='mlp', features=6, hidden=8)),
                            dict(name='flat')),
    'unaligned': lambda: beside(
        dict(name='summed', heard=('text',), encoder=dict(
            name='listener', features=6, inside=8, layers=1, heads=2, mlp=12)),
        dict(name='ctc', most_units=8, decoder=dict(
            name='decoder', width=8, layers=1, heads=2, kv_heads=2, head_dim=4, mlp=12,
            theta=100.0)), turns=1),
    'frames': lambda: sound(dict(prenet=dict(name='mlp', features=6, hidden=8)),
                            dict(name='spectrogram', features=6, hidden=8),
                            dict(name='frames', bins=3, delta_frames=2)),
    'flow': lambda: sound({}, dict(name='flowing', latents=6, scale=2.0, sigma=0.5, inside=8,
                                   layers=1, heads=2, mlp=12), dict(name='flow')),
}
EVERY_AXIS = (dict(data=8), dict(data=2, fsdp=4), dict(fsdp=4, tensor=2), dict(context=8),
              dict(data=2, context=2, tensor=2))
MIXED = dict(fsdp=2, context=2, tensor=2)
ROWS = dict(data=2, fsdp=2, context=2)      # what any vocabulary and any heads divide over
EQUAL = [(system, mesh) for system in ('flat', 'streams') for mesh in EVERY_AXIS] + [
    ('tied', MIXED | dict(rules=(('kv_heads', None),))), ('parallel', MIXED),
    ('some columns', ROWS), ('experts', dict(fsdp=2, tensor=2, expert=2)),
    ('experts', dict(data=2, context=2, expert=2)), ('groups', ROWS), ('patches', ROWS),
    ('heard', ROWS), ('unaligned', ROWS), ('frames', ROWS), ('flow', ROWS)]


def balanced(c):
    c.objective.balance = 0.5
    return c


def beside(frontend, head, **marks):
    """Text beside three rows of speech, through these mechanisms."""
    c = config('flat', chunk_columns=6)
    c.codec = dict(codebooks=3, size=12)
    c.vocab = dict(name='parallel', text_tokens=14, rows=('audio 0', 'audio 1', 'audio 2'),
                   multiple=8, **marks)
    c.frontend = dict(dtype='float32') | frontend
    c.head = head | dict(chunk_columns=6)
    c.objective.terms = dict(text=('text',), audio=('audio',))
    return c


def sound(frontend, head, objective):
    """One row, and sound beside it that is no tokens."""
    c = config('flat', chunk_columns=6)
    c.frontend = dict(name='summed', dtype='float32') | frontend
    c.head = head | dict(chunk_columns=6)
    c.objective = objective | dict(terms=dict(ce=('tokens',)))
    return c


def patched(c):
    """Four tokens of one line a column, spoken one after another."""
    c.vocab = dict(name='patches', text_tokens=14, rows=4, multiple=8)
    c.frontend = dict(name='grouped', dtype='float32', inside=8, steps=2)
    c.head = dict(name='local', width=8, layers=1, heads=2, mlp=12, chunk_columns=6)
    c.objective.terms = dict(patch=('patch',))
    return c


def a_stage(**options):
    return stages.Stage(**dict(name='s', steps=10, batch=8, data=dict(x=1.0), lr=1e-2) | options)


def prepared(c, mesh_sizes, **options):
    """(stage, state's target, by_path, jitted step, batch) of a config on a mesh."""
    sizes = dict(mesh_sizes)
    overrides = dict(sizes.pop('rules', ()))
    c.mesh, stage = sizes | dict(rules=overrides), a_stage(**options)
    mesh = sharding.make_mesh(sizes, jax.devices()[:math.prod(
        n for k, n in sizes.items() if k != 'slices')])
    rules = sharding.rules_of(overrides)
    graph, target, by_path = train.abstract_state(c, stage, mesh)
    where = jax.tree.map(lambda x: x.sharding, target)
    step = jax.jit(train.make_step(graph, model.objective_of(c), stage, by_path,
                                   sharding.placer(rules, mesh)), out_shardings=(where, None))
    rows = sharding.batch_sharding(rules, mesh)
    b = {k: jax.device_put(x, rows) for k, x in batch(c, rows=8).items()}
    return stage, target, by_path, step, b


@functools.cache
def two_steps(system, mesh_sizes, accumulate=1):
    """Loss and gradient norm of two packed steps from the same parameters anywhere, and the first
    gradient: Adam's first moment is a tenth of it."""
    c = SYSTEMS[system]()
    stage, target, by_path, step, b = prepared(c, dict(mesh_sizes), accumulate=accumulate)
    whole = model.init(c, jax.random.key(3))
    params = jax.tree.map(lambda x, t: jax.device_put(np.asarray(x), t.sharding), whole,
                          target['params'])
    state = train.fresh_state(c, stage, target, by_path, params)
    out, gradient = [], None
    for _ in range(2):
        state, sums = step(state, b)
        out += [float(sums['loss']), float(sums['grad_norm'])]
        if gradient is None:
            gradient = stages.flatten(jax.tree.map(lambda m: 10 * np.asarray(m),
                                                   state['opt'][1].mu))
    return out, gradient


SLOW = [('streams', mesh) for mesh in EVERY_AXIS[:3]]       # half a minute each to compile


@pytest.mark.parametrize('system, mesh', [
    pytest.param(*case, marks=pytest.mark.slow if case in SLOW else ()) for case in EQUAL], ids=str)
def test_every_mesh_equals_one_device(system, mesh):
    """Every axis alone and mixed: loss, the gradient of every parameter, and the step after it."""
    one, gradient = two_steps(system, (('fsdp', 1),))
    many, other = two_steps(system, tuple(mesh.items()))
    np.testing.assert_allclose(many, one, rtol=1e-5)
    assert gradient.keys() == other.keys()
    most = max(np.abs(g).max() for g in gradient.values())
    for path, g in gradient.items():
        assert g.any(), path
        np.testing.assert_allclose(other[path], g, rtol=0, err_msg=path,
                                   atol=2e-6 * most + 2e-5 * np.abs(g).max())


@pytest.mark.parametrize('sizes, rules', (
    (dict(data=2, fsdp=2, tensor=2), {}), (dict(fsdp=2, context=2, expert=2), {}),
    (dict(fsdp=2, context=2, tensor=2), dict(embed=('fsdp', 'context'))),
    (dict(fsdp=2, context=2, expert=2), dict(embed=('expert', 'context', 'fsdp'))),
    (dict(data=2, fsdp=2, tensor=2), dict(vocab=None, embed=('tensor', 'fsdp')))), ids=str)
def test_a_table_held_in_slices(sizes, rules):
    """Rows and width of the table split in several ways: the same sums, the same gradient."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((10, 16)), jnp.float32)
    token = jnp.asarray(rng.integers(-1, 10, (8, 3, 4)), jnp.int32)

    def sums(place):
        def loss(table):
            x = nn.embedded(table, token, place)
            return jnp.sum(jnp.sin(x)), x
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(table)
    (_, want), gradient = sums(sharding.anywhere)
    by_hand = np.where((token >= 0)[..., None], np.asarray(table)[np.maximum(token, 0)], 0).sum(1)
    np.testing.assert_allclose(want, by_hand, atol=1e-6)
    place = sharding.placer(sharding.rules_of(rules), sharding.make_mesh(sizes))
    (_, got), other = sums(place)
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_allclose(other, gradient, atol=1e-5)


def test_experts_on_their_own_devices():
    """Half of the experts here, half there, each halved again."""
    _, target, _, _, _ = prepared(SYSTEMS['experts'](), dict(fsdp=2, tensor=2, expert=2))
    held = target['params']['backbone']['blocks']['experts']
    assert held['gate_up'].sharding.spec == jax.sharding.PartitionSpec(
        None, 'expert', 'fsdp', None, 'tensor')


@pytest.mark.parametrize('system', ('flat', 'streams'))
def test_accumulation_is_one_large_batch(system):
    """Unequal weights per microbatch, one division: the same loss and gradient."""
    one, _ = two_steps(system, (('fsdp', 1),))
    four, _ = two_steps(system, (('fsdp', 1),), accumulate=4)
    sharded, _ = two_steps(system, (('fsdp', 2),), accumulate=2)
    np.testing.assert_allclose(four, one, rtol=1e-5)
    np.testing.assert_allclose(sharded, one, rtol=1e-5)


def test_moments_lie_where_their_parameters_do():
    _, target, _, _, _ = prepared(SYSTEMS['streams'](), dict(fsdp=4, tensor=2))
    params = stages.flatten(jax.tree.map(lambda x: x.sharding.spec, target['params']))
    adam = target['opt'][1]
    for moments in (adam.mu, adam.nu):
        assert stages.flatten(jax.tree.map(lambda x: x.sharding.spec, moments)) == params
    assert sum(s != jax.sharding.PartitionSpec() for s in params.values()) > len(params) / 2


def collectives(c, mesh) -> list[tuple[str, list]]:
    """(kind, groups of devices) of every collective of the compiled step."""
    _, target, _, step, b = prepared(c, mesh)
    abstract = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
                for k, x in b.items()}
    text = step.lower(target, abstract).compile().as_text()
    kinds = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute'
    return [(kind, groups_in(rest)) for kind, rest in re.findall(
        rf'= (?:\(.*?\)|\S+) ({kinds})(?:-start)?\((.*)', text)]


def groups_in(text: str) -> list:
    """The groups of devices that a line of HLO names, in any of the three ways it has."""
    def ids(shape, order):
        shape = [int(n) for n in shape.split(',')]
        made = np.arange(math.prod(shape)).reshape(shape)
        return made.transpose([int(n) for n in order.split(',')]) if order else made
    if m := re.search(r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text):
        return ids(m[3], m[4]).reshape(int(m[1]), int(m[2])).tolist()
    if m := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]"
                      r"(?:T\(([\d,]+)\))?\))? \{([^}]*)\}", text):
        axes = dict(re.findall(r"('\w+')=(\d+)", m[1]))
        sizes = [int(n) for n in axes.values()]
        mesh = ids(m[2] or str(math.prod(sizes)), m[3]).reshape(sizes)
        over = [list(axes).index(name) for name in m[4].split(',')]
        return np.moveaxis(mesh, over, range(-len(over), 0)).reshape(
            -1, math.prod(sizes[i] for i in over)).tolist()
    m = re.search(r'(?:replica_groups|source_target_pairs)=\{(\{[^=]*?\})\}', text)
    return [[int(n) for n in group.split(',')] for group in re.findall(r'\{([\d,]+)\}', m[1])]


def test_hybrid_sharding_gathers_only_within_a_replica():
    """data x fsdp over two slices: parameters are split and gathered inside a slice of four; only
    sums (the gradient, the loss) pass between slices."""
    found = collectives(SYSTEMS['streams'](), dict(data=2, fsdp=4, slices=2))
    across = {kind for kind, groups in found
              if any(len({n // 4 for n in group}) > 1 for group in groups)}
    inside = {kind for kind, groups in found
              if all(len({n // 4 for n in group}) == 1 < len(group) for group in groups)}
    assert across == {'all-reduce'} and 'all-gather' in inside
    _, target, _, _, _ = prepared(SYSTEMS['streams'](), dict(data=2, fsdp=4, slices=2))
    kernel = target['params']['backbone']['blocks']['q']['kernel'].sharding
    assert kernel.shard_shape((2, 16, 4, 4)) == (2, 4, 4, 4)


BUDGETS = {     # of one mesh for each test system, and of one for two configs in their tiny form
    **{f'{system} {mesh}': (SYSTEMS[system], mesh) for system, mesh in (
        ('flat', dict(fsdp=8)), ('flat', EVERY_AXIS[-1]), ('streams', dict(fsdp=8)),
        ('streams', EVERY_AXIS[-1]), ('experts', dict(fsdp=2, tensor=2, expert=2)))},
    **{f'{name} {ROWS}': (functools.partial(configs.read, f'{ROOT}/configs/{name}.py:tiny'), ROWS)
       for name in ('moshi', 'spirit_lm')},
}


@pytest.mark.parametrize('name', BUDGETS)
def test_collectives_stay_within_budget(name):
    """A stray reshard fails here, not on a pod. After a change that is meant to add or remove some:
    JAXSD_GOLDEN=write python -m pytest tests/test_sharding.py -k budget. Releases of jax differ by
    one here and there: the budget is the larger."""
    make, mesh = BUDGETS[name]
    found = dict(sorted(collections.Counter(k for k, _ in collectives(make(), mesh)).items()))
    with open(GOLDEN) as f:
        budget = json.load(f)
    if os.environ.get('JAXSD_GOLDEN') == 'write':
        budget = {k: x for k, x in budget.items() if k in BUDGETS} | {name: found}
        with open(GOLDEN, 'w') as f:
            json.dump(budget, f, indent=1)
            f.write('\n')
    assert budget.keys() <= BUDGETS.keys()
    over = {k: (n, budget[name].get(k, 0)) for k, n in found.items() if n > budget[name].get(k, 0)}
    assert not over, f'{name}: more collectives (found, agreed) than agreed: {over}'


def test_slices_are_the_outermost_part_of_data():
    devices = jax.devices()
    mesh = sharding.make_mesh(dict(data=4, fsdp=-1, slices=2), devices)
    assert mesh.shape['data'] == 4 and mesh.shape['fsdp'] == 2
    first, second = mesh.devices[:2].flat, mesh.devices[2:].flat
    assert {*first} == {*devices[:4]} and {*second} == {*devices[4:]}
    for sizes in (dict(data=1, fsdp=-1, slices=2), dict(data=3, slices=2), dict(data=8, slices=0)):
        with pytest.raises(ValueError, match='a multiple of mesh.slices|does not fit'):
            sharding.make_mesh(sizes, devices)


def test_a_mesh_that_does_not_fit_is_one_line():
    devices = jax.devices()
    with pytest.raises(ValueError, match='fsdp 3 does not fit 8 cpu'):
        sharding.make_mesh(dict(fsdp=3), devices)
    with pytest.raises(ValueError, match='only one axis may be -1'):
        sharding.make_mesh(dict(fsdp=-1, tensor=-1), devices)
    with pytest.raises(ValueError, match='positive'):
        sharding.make_mesh(dict(fsdp=0), devices)
    assert sharding.make_mesh(dict(fsdp=-1, tensor=2), devices).shape['fsdp'] == 4


def test_a_dimension_that_does_not_divide_names_parameter_and_cell():
    mesh = sharding.make_mesh(dict(tensor=8), jax.devices())
    shapes = dict(q=dict(kernel=jax.ShapeDtypeStruct((2, 16, 4, 8), jnp.float32)))
    axes = dict(q=dict(kernel=('embed', 'heads', 'head_dim')))
    with pytest.raises(ValueError, match=r'q/kernel: axis heads of size 4 .* mesh.rules.heads'):
        sharding.of(shapes, axes, sharding.RULES, mesh)
    rules = sharding.rules_of(dict(heads=None))
    assert sharding.of(shapes, axes, rules, mesh)['q']['kernel'].is_fully_replicated
    with pytest.raises(ValueError, match='nonsense'):
        sharding.rules_of(dict(nonsense='fsdp'))
    with pytest.raises(ValueError, match='twice'):
        sharding.spec(('mlp', 'heads'), sharding.RULES)


def test_replicated_bytes_are_counted():
    mesh = sharding.make_mesh(dict(fsdp=8), jax.devices())
    shapes = dict(a=jax.ShapeDtypeStruct((8, 3), jnp.float32),
                  b=jax.ShapeDtypeStruct((8,), jnp.float32))
    placed = sharding.of(shapes, dict(a=('embed', 'width'), b=('width',)), sharding.RULES, mesh)
    assert sharding.replicated_fraction(shapes, placed) == pytest.approx(8 / 32)

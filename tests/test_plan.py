# SPDX-License-Identifier: Apache-2.0
"""Plans: operations against closed forms, traffic against programs whose traffic is known, the
verb on virtual devices. Nothing here needs a compiler for other machines; tests/plans has those."""

import dataclasses
import importlib.util
import math
import os
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small import config
from test_configs import ROOT, on, read

from jaxsd import cli, data, model, sharding, train
from jaxsd import stage as stages
from jaxsd.config import ConfigError
from jaxsd.plan import estimate, search, table, targets, traffic, work

DEVICES = jax.devices()
SPIRIT = str(ROOT / 'configs' / 'spirit_lm.py:tiny')


def a_stage(**options):
    return stages.Stage(**dict(name='s', steps=10, batch=8, data=dict(x=1.0), lr=1e-2) | options)


def small(system='flat', kind='llama', **backbone):
    c = config(system, kind)
    c.backbone = dict(c.backbone) | backbone
    c.codec = dict(c.codec) | dict(frame_hz=12.5)
    c.stages = (dict(name='s', steps=10, batch=8, data=dict(x=1.0), lr=1e-2),)
    return c


@pytest.fixture
def env(monkeypatch, tmp_path):
    """An environment that a verb may change, and a cache of its own."""
    monkeypatch.setattr(os, 'environ', os.environ.copy())
    os.environ['XDG_CACHE_HOME'] = str(tmp_path / 'cache')
    return tmp_path


# Operations, against closed forms.

def layer_products(c):
    """Multiply-adds of one layer's maps on one column."""
    b = c.backbone
    return (2 * b.width * b.heads * b.head_dim + 2 * b.width * b.kv_heads * b.head_dim
            + 3 * b.width * b.mlp)


def attention(c):
    """Multiply-adds of one layer's attention on one row."""
    seen = sum(min(t + 1, c.backbone.get('window_columns', c.columns)) for t in range(c.columns))
    return 2 * c.backbone.heads * c.backbone.head_dim * seen


@pytest.mark.parametrize('kind', ['llama', 'mistral', 'qwen3'])
def test_a_flat_model_takes_six_operations_per_parameter_and_column(kind):
    c, rows = small('flat', kind), 8
    b = c.backbone
    line = sum(r.predicted for r in model.make_vocab(c).rows)
    per_row = c.columns * (b.layers * layer_products(c) + b.width * line) + b.layers * attention(c)
    found, unknown = work.model_flops(c, a_stage(batch=rows), DEVICES)
    assert unknown == 0
    assert found == pytest.approx(3 * 2 * rows * per_row, rel=1e-12)


def test_frozen_maps_have_no_gradient_of_their_own():
    c, rank, rows = small('flat'), 3, 8
    b = c.backbone
    line = sum(r.predicted for r in model.make_vocab(c).rows)
    stage = a_stage(lora=dict(rank=rank, scale=1.0), batch=rows,
                    train=(('.*/lora_[ab]', 1.0), ('.*', None)))
    frozen = b.layers * layer_products(c) + b.width * line
    nh, gh = b.heads * b.head_dim, b.kv_heads * b.head_dim
    terms = rank * (b.layers * ((b.width + nh) * 2 + (b.width + gh) * 2
                                + b.width + 2 * b.mlp + b.mlp + b.width) + b.width + line)
    expected = rows * (c.columns * (2 * frozen + 3 * terms) + 3 * b.layers * attention(c))
    assert work.model_flops(c, stage, DEVICES)[0] == pytest.approx(2 * expected, rel=1e-12)


def test_the_depth_loop_is_counted():
    c, rows = small('streams', 'helium'), 8
    b, h, text = c.backbone, c.head, model.make_vocab(c).rows[0].predicted
    steps, card = c.codec.codebooks, c.codec.size
    depth = steps * (b.width * h.width + h.width * card + h.layers * (
        4 * h.width ** 2 + 3 * h.width * h.mlp + 2 * steps * h.width))
    per_row = (c.columns * (b.layers * layer_products(c) + b.width * text + depth)
               + b.layers * attention(c))
    found, _ = work.model_flops(c, a_stage(batch=rows), DEVICES)
    assert found == pytest.approx(6 * rows * per_row, rel=1e-12)


def test_a_column_uses_the_experts_it_chose():
    c, rows = small('flat', 'mixtral'), 8
    b = c.backbone
    line = sum(r.predicted for r in model.make_vocab(c).rows)
    maps = (2 * b.width * b.heads * b.head_dim + 2 * b.width * b.kv_heads * b.head_dim
            + b.width * b.experts + 3 * b.experts_per_column * b.width * b.mlp)
    exact = 6 * rows * (c.columns * (b.layers * maps + b.width * line) + b.layers * attention(c))
    found, unknown = work.model_flops(c, a_stage(batch=rows), DEVICES)
    assert unknown == 0
    assert exact <= found <= 1.25 * exact       # blocks of columns are not all full


def test_published_sizes_agree_with_what_training_reports():
    """`journal` counts from shapes, `work` in the program: the same within what each leaves out."""
    from jaxsd import journal
    for name, n in (('spirit_lm', 0), ('moshi', 0), ('moshi', -1)):     # the last trains LoRA alone
        c = read(name)
        stage = dataclasses.replace(stages.stages(c)[n], batch=1)
        found, _ = work.model_flops(c, stage, DEVICES)
        assert found / 1e12 == pytest.approx(journal.model_tflops(c, c.columns, stage), rel=0.02)


def test_scans_repeat_and_recomputation_is_executed():
    def traced(remat, layers=2):
        c = small('flat', remat=remat, layers=layers)
        stage, mesh = a_stage(), sharding.make_mesh(dict(fsdp=1), DEVICES[:1])
        step, target, _ = train.step_on(c, stage, mesh)
        return c, work.count(step.trace(target, train.abstract_batch(c, stage, mesh)).jaxpr)[0]
    c, kept = traced('none')
    _, again = traced('full')
    forward = 2 * 8 * c.columns * c.backbone.layers * layer_products(c)
    assert 0.8 * forward < again - kept < 1.6 * forward
    deeper = traced('none', layers=4)[1] - kept
    assert deeper == pytest.approx(traced('none', layers=6)[1] - kept - deeper, rel=1e-9)

    def thrice(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=3)[0]
    f32 = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert work.count(jax.make_jaxpr(thrice)(f32, f32)) == (3 * 2 * 4 ** 3, 0)


def test_what_each_device_does_is_done_on_all():
    mesh = sharding.make_mesh(dict(fsdp=8), DEVICES)
    product = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(P('fsdp'), P()),
                            out_specs=P('fsdp'))
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((16, 4), (4, 6))]
    assert work.count(jax.make_jaxpr(product)(*shapes))[0] == 2 * 16 * 4 * 6


@pytest.mark.parametrize('T, window, share', [
    (1024, None, 3 / 4), (4096, None, 36 / 64), (4096, 1024, (1 + 2 + 6 * 3) / 64),
    (4096, 1, 8 / 64), (3712, 129, 57 / 29 ** 2)])
def test_kernels_of_attention_skip_what_nobody_sees(T, window, share):
    """Two products forward; seven backward, where two kernels each compute the scores anew. With a
    window, whatever part of the hidden blocks their grids leave out."""
    H, heads, block = 64, 2, math.gcd(512, T)
    mask = masks.MultiHeadMask([masks.CausalMask((T, T)) if window is None else
                                masks.LocalMask((T, T), (window - 1, 0), 0)] * heads)
    sizes = {f'block_{x}': block for x in ('q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv',
                                           'kv_dkv_compute', 'q_dq', 'kv_dq')}
    kernel = kernels.make_splash_mha(mask, block_sizes=kernels.BlockSizes(**sizes), head_shards=1,
                                     q_seq_shards=1)
    x = jax.ShapeDtypeStruct((3, heads, T, H), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.grad(lambda q, k, v: jax.vmap(kernel)(q, k, v).astype(
        jnp.float32).sum(), argnums=(0, 1, 2)))(x, x, x)
    c = small(window_columns=window)
    c.columns = T
    assert work.seen(c) == pytest.approx(share)
    assert work.count(jaxpr, share)[0] == pytest.approx(
        9 * 2 * 3 * heads * T * T * H * share, rel=1e-3)
    info = kernel.fwd_mask_info.block_mask      # of the kernel: 0 is a block that it skips
    assert np.count_nonzero(info) == round(share * (T // block) ** 2) * len(info)


# Traffic, of programs whose traffic is known.

def compiled(fn, *args, out=None):
    return jax.jit(fn, out_shardings=out).lower(*args).compile().as_text()


def test_a_loop_of_collectives_counts_every_turn():
    mesh = sharding.make_mesh(dict(data=2, fsdp=4), DEVICES)

    def body(x):
        return jax.lax.scan(lambda x, _: (jax.lax.psum(x, 'fsdp') * 0.5, None), x, length=7)[0]
    fn = jax.shard_map(body, mesh=mesh, in_specs=P('data', 'fsdp'), out_specs=P('data', 'fsdp'),
                       check_vma=False)
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, P('data', 'fsdp')))
    found = traffic.read(compiled(fn, x), 8)
    assert found.loops_once == 0
    (one,) = found.collectives
    assert one[:4] == ('all-reduce', 4 * 16 * 4, 7, (0, 1, 2, 3))
    assert one.wire_bytes == pytest.approx(7 * 2 * 3 / 4 * 256)


@pytest.mark.parametrize('kind, fn, axes, out, whole, received', [
    ('all-gather', lambda x: jax.lax.all_gather(x, 'data', tiled=True), P('data'), P(), 8, 7 / 8),
    ('reduce-scatter', lambda x: jax.lax.psum_scatter(x, 'data', tiled=True), P(), P('data'), 8,
     7 / 8),
    ('all-to-all', lambda x: jax.lax.all_to_all(x, 'data', 1, 0, tiled=True), P('data'),
     P(None, 'data'), 1, 7 / 8),
    ('collective-permute', lambda x: jax.lax.ppermute(x, 'data', [(i, (i + 1) % 8)
                                                                  for i in range(8)]),
     P('data'), P('data'), 1, 1),
])
def test_every_kind_of_collective(kind, fn, axes, out, whole, received):
    mesh = sharding.make_mesh(dict(data=8), DEVICES)
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=axes, out_specs=out, check_vma=False)
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, axes))
    found = traffic.read(compiled(mapped, x), 8)
    (one,) = found.collectives
    assert one.kind == kind and one.times == 1
    assert one.wire_bytes == pytest.approx(received * whole * 64 * 32 * 4 / 8)


def test_products_and_the_rest_are_told_apart():
    n = 256
    x = jax.ShapeDtypeStruct((n, n), jnp.float32)
    found = traffic.read(compiled(lambda a, b: jnp.cumsum(a, axis=1) @ b, x, x), 1)
    assert found.multiplied_bytes == pytest.approx(3 * n * n * 4, rel=0.05)
    assert found.other_bytes > 2 * n * n * 4 * 0.9


# A module in the accents of an accelerator's compiler, written by hand: its traffic is known.
BY_HAND = (pathlib.Path(__file__).parent / 'golden' / 'step_by_hand.hlo').read_text()


def test_the_text_of_an_accelerator():
    found = traffic.read(BY_HAND, 16)
    by_kind = {c.kind: c for c in found.collectives}
    assert {k: (c.bytes, c.times, c.group, c.overlaps) for k, c in by_kind.items()} == {
        'all-gather': (512 * 4, 32, (0, 4, 8, 12), True),
        'all-reduce': (512 * 4, 32, (0, 1, 2, 3), False),
        'reduce-scatter': (1024 * 2, 1, (0, 2, 4, 6, 8, 10, 12, 14), False)}
    # Of a turn: the copy that feeds the gather, and the row put into the stack, in and out. What
    # lies in the vector memory is no traffic.
    turn = (4 + 128 * 4) + (4 + 2 * 512 * 4)
    assert found.other_bytes == 32 * (turn + 4 + 4 + 1) + (1024 + 128) * 2
    assert found.loops_once == 0


SLICES = """ENTRY %main (x: f32[4,128]) -> f32[4,128] {
  %x = f32[4,128]{1,0} parameter(0)
  %after = token[] after-all()
  %send = (f32[4,128]{1,0}, u32[], token[]) send(%x, %after), channel_id=2, ATTRIBUTES
  %recv = (f32[4,128]{1,0}, u32[], token[]) recv(%after), channel_id=1, ATTRIBUTES
  MEANWHILE
  %sent = token[] send-done(%send), channel_id=2
  %received = (f32[4,128]{1,0}, token[]) recv-done(%recv), channel_id=1
  ROOT %sum = f32[4,128]{1,0} get-tuple-element(%received), index=0
}"""


@pytest.mark.parametrize('meanwhile, overlaps', [
    ('', False), ('%y = f32[4,128]{1,0} fusion(%x), kind=kLoop, calls=%f', True)])
@pytest.mark.parametrize('ids, slices, received', [('1,2', 2, 1.0), ('1,2,3,4', 4, 1.5)])
def test_what_goes_between_slices(ids, slices, received, meanwhile, overlaps):
    """A sum over n slices: 2 (n - 1) / n of its bytes, whatever the chips of a slice."""
    text = SLICES.replace('MEANWHILE', meanwhile).replace(
        'ATTRIBUTES', 'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name='
        f'"xla_megascale_runtime",_xla_megascale_target="{{{ids}}}x{{0:7}}"}}')
    one, = traffic.read(text, 8 * slices).collectives
    assert (one.kind, one.overlaps) == (traffic.BETWEEN_SLICES, overlaps)
    assert one.group == tuple(range(0, 8 * slices, 8))
    assert one.wire_bytes == received * 4 * 128 * 4


def test_a_loop_that_tells_nothing_is_said():
    text = BY_HAND.replace('constant(32)', 'parameter(1)')
    assert traffic.read(text, 16).loops_once == 1
    with pytest.raises(ValueError, match='no ENTRY'):
        traffic.read('nothing', 1)


def test_sizes_of_types():
    assert traffic.size('(bf16[2,3]{1,0}, s4[8]{0:E(4)}, pred[], f8e4m3fn[5])') == 12 + 4 + 1 + 5
    assert traffic.size('f32[4,512]{1,0:T(4,128)S(1)}', memory_only=True) == 0


# Machines.

@pytest.mark.parametrize('name, shape, size', [
    ('v5e:16x16', (16, 16), 256), ('v5e-256', (16, 16), 256), ('v5p:8x8x8', (8, 8, 8), 512),
    ('v5p-512', (4, 8, 8), 256), ('v4-128', (4, 4, 4), 64), ('v6e:4x4*2', (4, 4), 32),
    ('h200:8', (8,), 8), ('h100:16', (16,), 16), ('cpu:8', (8,), 8)])
def test_names_of_machines(name, shape, size):
    t = targets.parse(name)
    assert (t.shape, t.size) == (shape, size)
    assert targets.parse(str(t)) == t
    if t.chip:
        assert targets.peak_tflops(t.chip) > 100


@pytest.mark.parametrize('name, says', [
    ('v9:2x2', 'v5e:16x16'), ('v5e-3', 'there are v5e-1, v5e-4'), ('v5p:8x8', '3 positive'),
    ('v5e:0x4', '2 positive'), ('h200:12', 'nodes of 8'), ('cpu:4*2', 'cpu:8'), ('', 'not known'),
    ('v5p-513', 'there are v5p-8')])
def test_a_machine_that_does_not_exist_is_one_line(name, says):
    with pytest.raises(ConfigError, match=says) as e:
        targets.parse(name)
    assert '\n' not in str(e.value)


def test_the_network_between_devices():
    def at(*coords, n=0, slice_index=0):
        return types.SimpleNamespace(id=n, coords=(*coords, 0)[:3], slice_index=slice_index)
    v5e, v5p, h200 = map(targets.parse, ('v5e:16x16', 'v5p:4x4x2', 'h200:16'))
    assert targets.gb_s(v5e, [at(0, i) for i in range(16)]) == 2 * 45          # one ring
    assert targets.gb_s(v5e, [at(i, j) for i in range(16) for j in range(16)]) == 4 * 45
    assert targets.gb_s(v5p, [at(0, 0, k) for k in range(2)]) == 90            # no ring
    assert targets.gb_s(v5p, [at(i, 0, 0) for i in range(4)]) == 180
    assert targets.gb_s(v5e, [at(0, 0), at(0, 0, slice_index=1)]) == 3.125
    assert targets.gb_s(h200, [at(0, n=i) for i in range(8)]) == 360
    assert targets.gb_s(h200, [at(0, n=0), at(0, n=8)]) == 40


# Plans.

@pytest.mark.parametrize('name, arg, source', [
    ('moshi', 'tiny', 'stories'), ('moshi', 'tiny,course=paper', 'mono'),
    ('mini_omni', 'tiny', 'text_qa')])
def test_a_batch_as_data_makes_it(corpus, name, arg, source):
    """Two speakers' rows; steps apart; features, of which these texts have none."""
    c = on(corpus, read(name, arg))
    stage = dataclasses.replace(stages.stages(c)[0], data={source: 1.0})
    mesh = sharding.make_mesh(dict(fsdp=8), DEVICES)
    batches = data.batches(c, dataclasses.asdict(stage), model.make_vocab(c))
    real = next(batches)[0]
    batches.close()
    assert {k: (x.shape, x.dtype) for k, x in train.abstract_batch(c, stage, mesh).items()} == {
        k: (x.shape, x.dtype) for k, x in real.items()}


def a_plan(**changes):
    """A plan of a billion parameters on 256 chips, with round numbers."""
    compiled = estimate.Compiled(
        arguments=2**30, temporaries=2**31, peak=3 * 2**30, multiplied_bytes=1e9,
        other_bytes=8.19e9,
        collectives=(('all-gather', 9e9, 64, True, 0.1), ('all-reduce', 4.5e9, 32, False, 0.05)))
    return estimate.Plan(**dict(
        topology=targets.parse('v5e:16x16'), stage='s', mesh=dict(fsdp=256), batch=256,
        columns=4096, remat='full', parameters=10**9, audio_s=256 * 4096 / 25,
        model_flops=256 * 197e12 * 0.9, executed_flops=256 * 197e12 * 1.8, unknown_loops=0,
        compiled=compiled) | changes)


def test_the_arithmetic_of_an_estimate():
    plan = a_plan()
    assert plan.parts == pytest.approx(dict(products=2.0, memory=0.01, network=0.05, waiting=0.0))
    assert plan.step_s == pytest.approx(2.06)
    assert plan.mfu == pytest.approx(0.9 / 2.06)
    assert plan.positions_per_s == pytest.approx(256 * 4096 / 2.06)
    hours = 256 * 4096 / 25 / 3600 / 2.06 * 86400 / 256
    assert plan.audio_hours_per_chip_day == pytest.approx(hours)
    assert plan.cost(1.2) == pytest.approx(1e6 / hours * 24 * 1.2)
    slow = dataclasses.replace(plan.compiled, collectives=(('all-gather', 9e9, 64, True, 3.0),))
    assert a_plan(compiled=slow).step_s == pytest.approx(3.0)      # computing waits for it
    assert a_plan(topology=targets.parse('cpu:8')).step_s is None


def test_a_plan_of_a_real_step(env):
    c = small('streams', 'helium')
    c.mesh = dict(fsdp=4, tensor=2)
    stage = stages.stages(c)[0]
    plan = estimate.of(c, stage, targets.parse('cpu:8'))
    assert plan.fits and plan.mesh == dict(fsdp=4, tensor=2)
    # Three floats for every parameter, of which this device holds at least an eighth.
    assert plan.compiled.arguments >= 12 * plan.parameters / 8
    assert plan.compiled.peak >= plan.compiled.arguments + plan.compiled.temporaries
    assert plan.executed_flops > plan.model_flops
    assert plan.audio_s == pytest.approx(8 * 24 / 12.5)
    assert {k for k, *_ in plan.compiled.collectives} >= {'all-gather', 'all-reduce'}
    text = table.text(plan, price=1.0)
    assert 'fits    yes' in text and 'all-gather' in text
    again = estimate.of(c, stage, targets.parse('cpu:8'))
    assert again == plan and again.compiled.seconds == plan.compiled.seconds    # not compiled again
    twice = dataclasses.replace(stage, batch=16)
    assert work.model_flops(c, twice, DEVICES)[0] == 2 * plan.model_flops


def test_what_a_step_holds_is_shared(env):
    """Eight devices hold about an eighth each: no part of the step is done whole by all of them."""
    held = {}
    for n in (1, 8):
        c = small('streams', 'helium', layers=1)
        c.mesh, c.columns, c.head.layers = dict(fsdp=n), 64, 1
        c.stages = (dict(c.stages[0]) | dict(batch=64),)
        plan = estimate.of(c, stages.stages(c)[0], targets.parse(f'cpu:{n}'))
        held[n] = plan.compiled.temporaries
    assert held[8] < held[1] / 4


def test_a_search_returns_the_best_of_what_it_tried(env):
    c = small('flat')
    stage = stages.stages(c)[0]
    best, which, tried = search.best(c, stage, targets.parse('cpu:8'), minutes=0.08, batches=(8,))
    made = [p for _, p in tried if not isinstance(p, str)]
    assert made and best.compiled.peak == min(p.compiled.peak for p in made)
    again = search.changed(c, which, 0)
    assert estimate.of(again, stages.stages(again)[0], targets.parse('cpu:8')) == best
    words = search.pasted(which.overrides(0))
    assert f'--config.stages[0].batch={which.batch}' in words and '--config.mesh.fsdp=' in words


def test_a_search_takes_the_largest_chunks_that_fit(monkeypatch):
    """All columns, else a half, and so on; and none larger than one that did not fit."""
    c, seen = read('moshi'), []
    stage, t = stages.stages(c)[0], targets.parse('v5p:8x8x8')
    assert search.chunks(c, t) == (3750, 1875, 938, 0)
    assert search.chunks(c, targets.parse('cpu:8')) == (0,)

    def of(config, stage, *_):
        seen.append((stage.batch, chunk := config.head.get('chunk_columns', 512)))
        return a_plan(compiled=estimate.Compiled(error='too much')) if chunk > 2000 else a_plan()
    monkeypatch.setattr(estimate, 'of', of)
    monkeypatch.setattr(search.targets, 'devices', lambda topology: [])
    best, which, tried = search.best(c, stage, t, minutes=1, batches=(stage.batch,))
    assert best.fits and which.chunk == 1875
    assert [n for _, n in seen[:2]] == [3750, 1875] and {n for _, n in seen} == {3750, 1875}


def test_a_search_asks_once_of_a_mesh_that_cannot_be(monkeypatch):
    """A size that does not divide over the mesh does not, whatever is recomputed."""
    c, seen = read('moshi'), []
    stage, t = stages.stages(c)[0], targets.parse('v5p:8x8x8')

    def of(config, stage, *_):
        seen.append(mesh := (config.mesh.data, config.mesh.fsdp, config.mesh.tensor, stage.batch))
        if mesh[2] > 1:
            raise ConfigError('axis vocab does not divide')
        return a_plan()
    monkeypatch.setattr(estimate, 'of', of)
    monkeypatch.setattr(search.targets, 'devices', lambda topology: [])
    best, which, tried = search.best(c, stage, t, minutes=1)
    assert best.fits and which.tensor == 1
    odd = [mesh for mesh in seen if mesh[2] > 1]
    assert odd and len(odd) == len(set(odd)) == sum(isinstance(p, str) for _, p in tried)


def test_candidates_divide():
    c = read('moshi')
    stage, t = stages.stages(c)[0], targets.parse('v5p:8x8x8')
    found = search.candidates(c, stage, t)
    assert len(found) == len(set(found)) > 20
    for x in found:
        assert x.data * x.fsdp * x.tensor == t.size
        assert x.batch % (x.data * x.fsdp) == 0
    # First what spreads over groups and has most rows of what should fit, then fewer.
    first = found[0]
    alike = [x.batch for x in found if x == dataclasses.replace(first, batch=x.batch)]
    assert first.data == 8 and len(alike) > 1
    held = [search.least(c, stage, dataclasses.replace(first, batch=n)) / 2**30 for n in alike]
    fits = [search.TAKES * gib < t.chip.hbm_gib for gib in held]
    assert fits == sorted(fits, reverse=True) and alike[:sum(fits)] == sorted(
        alike[:sum(fits)], reverse=True)
    slices = search.candidates(c, stage, targets.parse('v5e:16x16*2'))
    assert slices and all(x.data % 2 == 0 for x in slices)


def test_what_accumulates_is_tried_in_one_piece():
    """Its weights are then gathered once, which is tried first where it should fit."""
    c = read('voxtlm')
    stage, t = stages.stages(c)[0], targets.parse('v5p:8x8x8')
    assert stage.accumulate == 4
    found = search.candidates(c, stage, t)
    assert {x.accumulate for x in found} == {0, 1} and found[0].accumulate == 1
    whole, parts = (dataclasses.replace(found[0], accumulate=n) for n in (1, 0))
    assert search.least(c, stage, whole) > search.least(c, stage, parts)
    assert search.guess(c, stage, whole, t) < search.guess(c, stage, parts, t)
    assert ('stages[0].accumulate', '1') in whole.overrides(0) and 'accumulate=1' in str(whole)
    assert stages.stages(search.changed(c, whole, 0))[0].accumulate == 1
    assert not any('accumulate' in path for path, _ in parts.overrides(0))
    # Rows that four pieces cannot be made of are tried, too; and who had no room in parts has none.
    assert any(x.batch % (4 * x.data * x.fsdp) for x in found)
    assert search._needs_more(whole, parts) and not search._needs_more(parts, whole)
    c = read('moshi')
    assert {x.accumulate for x in search.candidates(c, stages.stages(c)[0], t)} == {0}


def test_a_gpu_is_planned_with_attention_that_needs_none():
    """In the head's own backbone, too."""
    c = read('llama_omni')
    made = estimate._compilable(c, targets.parse('h200:8'))
    assert made.backbone.attention == made.head.decoder['attention'] == 'xla'
    assert 'attention' not in c.backbone and 'attention' not in c.head.decoder
    assert estimate._compilable(c, targets.parse('v5p:8x8x8')) is c
    assert 'decoder' not in estimate._compilable(read('moshi'), targets.parse('h200:8')).head


def a_row(name, plan=None, overrides='', **how):
    return table.Row(name, plan or a_plan(), overrides, **dict(
        command='plan x', commit='abc', compilers='jax 1, libtpu 2') | how)


def test_the_page(env):
    rows = [a_row('configs/a.py', overrides='--config.mesh.fsdp=256'),
            a_row('configs/b.py', a_plan(compiled=estimate.Compiled(error='needs 33G of 15.75G')))]
    page = table.page(rows)
    assert '| configs/a.py, s | v5e:16x16 | fsdp=256 | 256 | full | yes | 1.00 | 2.00 |' in page
    assert 'needs 33G of 15.75G' in page and '--config.mesh.fsdp=256' in page
    assert page.count('abc by jax 1, libtpu 2') == 1
    widths = {line.count('|') for line in page.splitlines() if line.startswith('| configs/') and
              'v5e' in line and line.count('|') > 10}
    assert widths == {len(table.HEAD) + 1}


def test_a_page_keeps_what_earlier_commands_made(env):
    """One row of a config, stage and machine: the newest, in the same order whatever came first."""
    elsewhere = a_plan(topology=targets.parse('v5e:16x16*2'), compiled=estimate.Compiled(
        peak=2**30, collectives=(('all-gather', 1e9, 4, True, 0.5),)))
    out = str(env / 'PLANS.md')
    table.write([a_row('configs/b.py')], out)
    table.write([a_row('configs/a.py', elsewhere, commit='later')], out)
    table.write([a_row('configs/b.py', a_plan(batch=512))], out)
    found = table.read(str(env / 'PLANS.json'))
    assert found == [a_row('configs/a.py', elsewhere, commit='later'),
                     a_row('configs/b.py', a_plan(batch=512))]
    assert (env / 'PLANS.md').read_text() == table.page(found)
    (env / 'PLANS.json').write_text('[{"config": 1}]')
    before = (env / 'PLANS.md').read_text()
    with pytest.raises(ConfigError, match='no record of plans.*move it away'):
        table.write([a_row('configs/b.py')], out)
    assert (env / 'PLANS.md').read_text() == before


def run(capsys, *argv):
    status = cli.main(['plan', *argv])
    return status, capsys.readouterr()


def test_the_verb(env, capsys):
    page = env / 'PLANS.md'
    status, said = run(capsys, '--config', SPIRIT, '--topology', 'cpu:8',
                       '--out', str(page))
    assert status == 0, said.err
    assert 'fits    yes' in said.out and SPIRIT in page.read_text()


@pytest.mark.parametrize('argv, says', [
    (('--topology', 'v9:4'), "'v9:4' is not known"),
    (('--topology', 'cpu:8', '--config.stages[0].batch=6'), 'must divide over 8'),
    (('--topology', 'cpu:8', '--config.mesh.tensor=3'), 'does not fit 8 cpu'),
    (('--topology', 'cpu:8', '--stage', 'nope'), 'pretrain'),
    (('--topology', 'cpu:8', '--search', '-1'), 'above 0'),
    (('--topology', 'cpu:8', '--search', '--batches', 'x'), 'x'),
    (('--topology', 'cpu:8', '--price', '-3'), '--price'),
])
def test_what_is_wrong_is_one_line(env, capsys, argv, says):
    status, said = run(capsys, '--config', SPIRIT, *argv)
    assert status == 1 and says in said.err
    assert len(said.err.strip().splitlines()) == 1


@pytest.mark.parametrize('topology, package', [('v5e:2x2', 'libtpu'), ('h200:8', 'jax_plugins')])
def test_a_compiler_that_is_not_installed_is_one_line(monkeypatch, topology, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec',
                        lambda name: None if name.startswith(package) else found(name))
    with pytest.raises(ConfigError, match='pip install') as e:
        targets.devices(targets.parse(topology))
    assert '\n' not in str(e.value)


def test_arrays_are_never_made():
    """A plan of the published size holds shapes alone; numpy would need 100 GB."""
    c = read('spirit_lm')
    mesh = sharding.make_mesh(dict(fsdp=8), DEVICES)
    stage = stages.stages(c)[0]
    batch = train.abstract_batch(c, stage, mesh)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in batch.values())
    assert np.prod(batch['tokens'].shape) == 256 * 4096

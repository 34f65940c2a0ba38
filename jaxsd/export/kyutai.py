# SPDX-License-Identifier: Apache-2.0
"""kyutai's LMModel: multistream models of the moshi package (models/lm.py, loaders.py)."""

import logging
import os
import re
from collections.abc import Mapping

from jaxsd.config import ConfigError
from jaxsd.export import safetensors
from jaxsd.export.facts import BLOCKS, WINDOW, Json, Plan, need
from jaxsd.export.rules import rule

log = logging.getLogger('jaxsd')

ROWS = 'rows (size, predicted)'
STEPS = 'head.step_weights'
LOW_RANK = 'file.low_rank'      # of the depth embeddings, None where they are whole
NORMS = {'rms_norm_f32': 1e-8, 'rms_norm': 1e-5}
ROTARY = {'rope': 'interleaved', 'rope_concat': 'half'}
RELEASED = dict(    # what a checkpoint without config.json is (moshi models/loaders.py)
    dim=4096, text_card=32000, existing_text_padding_id=3, n_q=16, dep_q=8, card=2048, num_heads=32,
    num_layers=32, hidden_scale=4.125, context=3000, max_period=10000, gating='silu',
    norm='rms_norm_f32', positional_embedding='rope', depformer_dim=1024,
    depformer_dim_feedforward=4224, depformer_num_heads=16, depformer_num_layers=6,
    depformer_multi_linear=True, depformer_gating='silu', depformer_pos_emb='none',
    depformer_weights_per_step=True, delays=[0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1])

OF_USE = ('model_type', 'lm_gen_config', 'tts_config', 'stt_config', 'model_id')    # how to sample
WITHOUT_EFFECT = (  # on the model: names of files, and what its loader overrides
    *OF_USE, 'moshi_name', 'mimi_name', 'mimi_config_name', 'tokenizer_name', 'lora_name',
    'lora_rank', 'lora_scaling', 'extra_heads_dim', 'gradient_checkpointing', 'depformer_causal',
    'depformer_context', 'depformer_max_period')


def check(have: Mapping, format: str = 'kyutai') -> None:
    """ConfigError unless a kyutai LMModel can be what `have` describes, for `format`."""
    family = f'format {format!r}'
    need(have, {'frontend.name': ('summed',), 'frontend.heard': ((),),
                 'frontend.encoder': (None,), 'backbone.name': ('decoder',),
                 'head.name': ('depth',), 'backbone.norm_eps': tuple(NORMS.values()),
                 'head.norm_eps': (have['backbone.norm_eps'],), 'backbone.norm_gain': ('early',),
                 'head.norm_gain': ('early',), 'backbone.qkv_bias': (False,),
                 'backbone.rope_scaling': ('none',), 'backbone.qk_norm': ('none',),
                 'backbone.experts': (0,),
                 'backbone.head_dim': (have['backbone.width'] / have['backbone.heads'],)}, family)
    if 'layout.delays' not in have:
        raise ConfigError(f'{family} needs a layout with acoustic_delay_columns')
    if len({row.size for row in have['vocab.rows'][1:]}) != 1:
        raise ConfigError(f'{family} needs codebooks of one size')


def rules_of(have: Mapping) -> Plan:
    """The current dialect: one tensor per step (`in_projs.S`). `dialect` knows the older."""
    layer, own = 'transformer.layers.{L}.', have[STEPS] != 'shared'
    depth, step = 'depformer.layers.{L}.', '{S}' if own else '0'
    deep = 'head/blocks/'
    rules = [
        rule('text_emb.weight', _table(have, 0)),
        *(rule(f'emb.{k}.weight', _table(have, k + 1))
          for k in range(len(have['vocab.rows']) - 1)),
        rule(layer + 'norm1.alpha', (BLOCKS + 'norm_attention/weight', 'L D', '1 1 D')),
        rule(layer + 'self_attn.in_projs.0.weight',
             (BLOCKS + 'q/kernel', 'L D N H', '(N H) D'),
             (BLOCKS + 'k/kernel', 'L D G H', '(G H) D'),
             (BLOCKS + 'v/kernel', 'L D G H', '(G H) D')),
        rule(layer + 'self_attn.out_projs.0.weight',
             (BLOCKS + 'out/kernel', 'L N H D', 'D (N H)')),
        rule(layer + 'norm2.alpha', (BLOCKS + 'norm_mlp/weight', 'L D', '1 1 D')),
        rule(layer + 'gating.linear_in.weight',
             (BLOCKS + 'gate_up/kernel', 'L D U F', '(U F) D')),
        rule(layer + 'gating.linear_out.weight', (BLOCKS + 'down/kernel', 'L F D', 'D F')),
        rule('out_norm.alpha', ('backbone/norm/weight', 'D', '1 1 D')),
        rule('text_linear.weight', ('head/text_out/kernel', 'D V', 'V D')),
        rule('depformer_text_emb.weight', ('head/text_table', 'V D', 'V D')),
        rule('depformer_in.{S}.weight', ('head/inputs/kernel', 'S D E', 'E D')),
        rule(depth + 'norm1.alpha', (deep + 'norm_attention/weight', 'L D', '1 1 D')),
        rule(depth + f'self_attn.in_projs.{step}.weight',
             (deep + 'qkv/kernel', _per_step('D U N H', own), '(U N H) D')),
        rule(depth + f'self_attn.out_projs.{step}.weight',
             (deep + 'out/kernel', _per_step('N H D', own), 'D (N H)')),
        rule(depth + 'norm2.alpha', (deep + 'norm_mlp/weight', 'L D', '1 1 D')),
        rule(depth + ('gating.{S}.linear_in.weight' if own else 'gating.linear_in.weight'),
             (deep + 'gate_up/kernel', _per_step('D U F', own), '(U F) D')),
        rule(depth + ('gating.{S}.linear_out.weight' if own else 'gating.linear_out.weight'),
             (deep + 'down/kernel', _per_step('F D', own), 'D F')),
        rule('linears.{P}.weight', ('head/outs/kernel', 'P D V', 'V D')),
    ]
    spare = ['frontend/table']                  # rows that only pad the line to a multiple
    if _spoken(have) > 1:
        rules.append(rule('depformer_emb.{P}.weight', ('head/tables', 'P V D', 'V D')))
    else:
        spare.append('head/tables')             # the last codebook is never an input
    factors = ()
    if rank := have.get('checkpoint', have).get(LOW_RANK):      # as Hibiki's
        tables = ('depformer_text_emb', *(f'depformer_emb.{p}' for p in range(_spoken(have) - 1)))
        factors = tuple((f'{t}.weight', f'{t}.low_rank.weight', rank) for t in tables)
    return Plan(tuple(rules), tuple(spare), factors=factors)


def _table(have: Mapping, k: int) -> tuple:
    row = have['vocab.rows'][k]
    return 'frontend/table', 'V D', 'V D', (row.start, row.size)


def _per_step(axes: str, own: bool) -> str:
    """Depth weights are [L, S, ...]; with one set for all steps S is an axis of length one."""
    return f'L S {axes}' if own else f'L 1 {axes}'


def _spoken(facts: Mapping) -> int:
    return sum(predicted > 0 for _, predicted in facts[ROWS][1:])


def _sets(facts: Mapping) -> int:
    """How many sets of weights the depth steps choose from."""
    return {'own': _spoken(facts), 'shared': 1}.get(facts[STEPS]) or max(facts[STEPS]) + 1


def cut(have: Mapping, said: Mapping) -> dict:
    """The checkpoint's facts `said` without the depth steps after those of the config `have`.

    A model that was trained to predict both speakers speaks with the first steps alone, since a
    step reads only those before it; released checkpoints were cut so (moshi scripts/import_rust.py
    max_out_n_q). The other speaker's tables stay: they are heard.
    """
    spoken, of = _spoken(have), _spoken(said)
    if not 0 < spoken < of:
        return dict(said)
    log.info('takes the first %d of %d depth steps; what speaks the other rows is left behind',
             spoken, of)
    steps, rows = said[STEPS], said[ROWS]
    if not isinstance(steps, str):
        steps = _named(steps[:spoken])
    return dict(said) | {STEPS: steps, ROWS: tuple(
        (size, predicted if k <= spoken else 0) for k, (size, predicted) in enumerate(rows))}


def _named(schedule: tuple[int, ...]) -> str | tuple[int, ...]:
    return 'own' if schedule == tuple(range(len(schedule))) else schedule


STACKED = {     # in each older name, what all steps are stacked under, and its current name
    r'in_proj(?:_weight|\.(weight|lora_[AB]\.weight))': 'in_projs',
    r'out_proj\.(weight|lora_[AB]\.weight)': 'out_projs'}
PER_SET = (r'depformer_in\.(\d+)\..*', r'depformer\.layers\.\d+\.self_attn\.\w+_projs\.(\d+)\..*',
           r'depformer\.layers\.\d+\.gating\.(\d+)\..*')


def dialect(key: str, have: Mapping) -> tuple[str, ...]:
    """The current names of a key: published checkpoints stack all steps of a projection.

    '' for what belongs to steps that the checkpoint (`have['checkpoint']`) has and `have` has not.
    """
    said = have.get('checkpoint', have)
    names = (key,)
    for old, new in STACKED.items():
        if match := re.fullmatch(rf'(.*\.self_attn\.){old}', key):
            sets = _sets(said) if key.startswith('depformer.') else 1
            names = tuple(f'{match[1]}{new}.{s}.{match[2] or "weight"}' for s in range(sets))
    return tuple('' if _left_behind(name, have, said) else name for name in names)


def _left_behind(name: str, have: Mapping, said: Mapping) -> bool:
    spoken, of = _spoken(have), _spoken(said)
    for pattern, kept, held in (
            *((pattern, _sets(have), _sets(said)) for pattern in PER_SET),
            (r'linears\.(\d+)\..*', spoken, of), (r'depformer_emb\.(\d+)\..*', spoken - 1, of - 1)):
        if match := re.fullmatch(pattern, name):
            return kept <= int(match[1]) < held
    return False


def _feedforward(hidden: int, width: int) -> int:
    """The dim_feedforward that kyutai's gating turns into `hidden` (moshi modules/gating.py)."""
    least = -(-3 * hidden // 2)
    return next(n for n in (least, least + 1) if _hidden(n, width) == hidden)


def _hidden(feedforward: int, width: int) -> int:
    return 21 * width // 8 if feedforward == 4 * width else 2 * feedforward // 3


def bundled(source: str) -> tuple[dict, dict]:
    """What the config.json of the checkpoint `source` says of its use, which no weight depends on;
    and no tensors."""
    path = os.path.join(safetensors.folder_of(source), 'config.json')
    values = safetensors.read_json(path) if os.path.isfile(path) else {}
    return {k: values[k] for k in OF_USE if k in values}, {}


def spell(have: Mapping) -> dict:
    """config.json for moshi's loaders: arguments of LMModel, and nothing that it would not take."""
    rows, width = have['vocab.rows'], have['backbone.width']
    feedforward = _feedforward(have['backbone.mlp'], width)
    scale = feedforward / width
    if int(scale * width) != feedforward:
        scale = (feedforward + .5) / width
    own = have[STEPS] != 'shared'
    repeat = have['backbone.heads'] // have['backbone.kv_heads']
    out = dict(
        dim=width, text_card=rows[0].predicted, existing_text_padding_id=have['vocab.pad'],
        existing_text_end_padding_id=have['vocab.epad'], n_q=len(rows) - 1, dep_q=_spoken(have),
        card=rows[1].size - 1, num_heads=have['backbone.heads'],
        num_layers=have['backbone.layers'], hidden_scale=scale, causal=True, layer_scale=None,
        context=have['backbone.window_columns'], max_period=have['backbone.theta'], gating='silu',
        norm=next(name for name, eps in NORMS.items() if eps == have['backbone.norm_eps']),
        positional_embedding=next(k for k, v in ROTARY.items() if v == have['backbone.pairs']),
        depformer_dim=have['head.width'],
        depformer_dim_feedforward=_feedforward(have['head.mlp'], have['head.width']),
        depformer_num_heads=have['head.heads'], depformer_num_layers=have['head.layers'],
        depformer_layer_scale=None, depformer_multi_linear=own, depformer_gating='silu',
        depformer_pos_emb='none', depformer_weights_per_step=own,
        delays=list(have['layout.delays']))
    if isinstance(have[STEPS], tuple):
        out |= dict(depformer_weights_per_step_schedule=list(have[STEPS]))
    if repeat > 1:
        out |= dict(kv_repeat=repeat, depformer_kv_repeat=1)
    return out


def read(values: Mapping, path: str) -> dict:
    """The facts of a kyutai config.json."""
    j = Json(values, path)
    if j.flag('lora'):
        raise ValueError(f'{path}: these are low-rank terms and no model; import the model that '
                         "they adapt, then them, in the format 'kyutai-lora', into a stage with "
                         'lora')
    own = j.flag('depformer_weights_per_step')
    j.only(gating=('silu',), positional_embedding=tuple(ROTARY), depformer_pos_emb=('none',),
           norm=tuple(NORMS), causal=(True,), layer_scale=(None,), depformer_layer_scale=(None,),
           depformer_gating=('silu',), depformer_norm=(None,), norm_emb=(False,),
           bias_proj=(False,), extra_heads_num_heads=(0,), demux_second_text_stream=(False,),
           demux_second_stream=(False,), depformer_multi_linear=(own,), quantize=(False,),
           cross_attention=(False,), conditioners=(None, {}), condition_provider=(None,),
           fuser=(None,))
    for key in ('norm', 'gating', 'positional_embedding', 'depformer_pos_emb'):
        if key not in values:
            raise ValueError(f'{path}: {key} is missing')
    eps = NORMS[values['norm']]
    width, heads = j.number('dim'), j.number('num_heads', high=1 << 12)
    repeat = j.number('kv_repeat', 1, high=heads)
    if j.number('depformer_kv_repeat', repeat, high=heads) != 1:
        raise ValueError(f'{path}: shared key and value heads in the depth transformer '
                         '(depformer_kv_repeat) are not supported')
    scale = j.number('hidden_scale', 4, low=.1, high=64, kind=float)
    deep = j.number('depformer_dim', 256)
    deep_mlp = j.number('depformer_dim_feedforward', int(scale * deep))
    codebooks, card = j.number('n_q', 8, high=256), j.number('card', 1024)
    spoken = j.number('dep_q', 8, high=codebooks)
    text = j.number('text_card', 32000)
    j.only(text_card_out=(None, text))
    steps = 'own' if own else 'shared'
    if (schedule := values.get('depformer_weights_per_step_schedule')) is not None:
        if (not own or not isinstance(schedule, list) or len(schedule) != spoken
                or any(type(s) is not int for s in schedule)
                or set(schedule) != set(range(len(set(schedule))))):
            raise ValueError(f'{path}: depformer_weights_per_step_schedule must be a list that '
                             f'names a set of weights for each of the dep_q = {spoken} steps, and '
                             'leaves out none')
        steps = _named(tuple(schedule))
    delays = values.get('delays')
    if (not isinstance(delays, list) or len(delays) != codebooks + 1
            or any(type(d) is not int or not 0 <= d < 1 << 16 for d in delays)):
        raise ValueError(f'{path}: delays must be n_q + 1 = {codebooks + 1} numbers of columns')
    context, rank = values.get('context'), values.get('depformer_low_rank_embeddings')
    out = {
        'backbone.width': width, 'backbone.layers': j.number('num_layers', high=1 << 12),
        'backbone.heads': heads, 'backbone.kv_heads': heads // repeat,
        'backbone.head_dim': width // heads, 'backbone.mlp': _hidden(int(scale * width), width),
        'backbone.theta': j.number('max_period', 1e4, high=1e12, kind=float),
        'backbone.pairs': ROTARY[values['positional_embedding']],
        'backbone.window_columns': None if context is None else j.number('context', high=WINDOW),
        'backbone.norm_eps': eps, 'head.norm_eps': eps, 'backbone.norm_gain': 'early',
        'head.norm_gain': 'early', 'head.name': 'depth', 'head.width': deep,
        'head.layers': j.number('depformer_num_layers', high=1 << 12),
        'head.heads': j.number('depformer_num_heads', heads, high=1 << 12),
        'head.mlp': _hidden(deep_mlp, deep), STEPS: steps,
        'vocab.pad': j.number('existing_text_padding_id', 3, low=0),
        'vocab.epad': j.number('existing_text_end_padding_id', 0, low=0),
        ROWS: ((text + 1, text), *[(card + 1, card)] * spoken,
                                   *[(card + 1, 0)] * (codebooks - spoken)),
        'layout.delays': tuple(delays),
        LOW_RANK: None if rank is None else j.number('depformer_low_rank_embeddings'),
    }
    j.closed(*WITHOUT_EFFECT, 'delays', 'context', 'depformer_weights_per_step_schedule',
             'depformer_low_rank_embeddings')
    return out

# SPDX-License-Identifier: Apache-2.0
"""Hugging Face decoders: Llama, Mistral, Mixtral, Qwen2, Qwen3, Helium (transformers models/)."""

from collections.abc import Mapping

from jaxsd.config import ConfigError
from jaxsd.export.facts import BLOCKS, WINDOW, Json, Plan, need, rotary_objects
from jaxsd.export.rules import rule

LAYER = 'model.layers.{L}.'
# What a config.json means that is silent: the defaults of transformers' configuration classes.
SILENT = {
    'llama': dict(rms_norm_eps=1e-6, rope_theta=1e4),
    'mistral': dict(rms_norm_eps=1e-6, rope_theta=1e4, num_key_value_heads=8, sliding_window=4096),
    'mixtral': dict(rms_norm_eps=1e-5, rope_theta=1e6, num_key_value_heads=8, num_local_experts=8,
                    num_experts_per_tok=2),
    'qwen2': dict(rms_norm_eps=1e-6, rope_theta=1e4, num_key_value_heads=32, sliding_window=4096,
                  max_window_layers=28),
    'qwen3': dict(rms_norm_eps=1e-6, rope_theta=1e4, num_key_value_heads=32, sliding_window=4096,
                  max_window_layers=28, head_dim=128),
    'helium': dict(rms_norm_eps=1e-8, rope_theta=1e5, num_key_value_heads=20, head_dim=128)}
CLASSES = {'llama': 'Llama', 'mistral': 'Mistral', 'mixtral': 'Mixtral', 'qwen2': 'Qwen2',
           'qwen3': 'Qwen3', 'helium': 'Helium'}
SCALINGS = {        # the peer's numbers in our words
    'linear': {'factor': 'factor'},
    'llama3': {'factor': 'factor', 'low_freq_factor': 'low_freq_factor',
               'high_freq_factor': 'high_freq_factor',
               'original_max_position_embeddings': 'original_columns'}}


def check(have: Mapping, format: str = 'hf') -> None:
    """ConfigError unless one of the decoders above can be what `have` describes.

    format: the one that was asked for, where it writes a decoder in other files.
    """
    family = f'format {format!r}'
    need(have, {'frontend.name': ('summed',), 'frontend.heard': ((),),
                 'frontend.encoder': (None,), 'head.name': ('flat', 'tied'),
                 'backbone.name': ('decoder',)}, family)
    if len(have['vocab.rows']) != 1:
        raise ConfigError(f'{family} is one row of tokens, this config has '
                          f"{len(have['vocab.rows'])} rows; use format 'kyutai'")
    if have['backbone.norm_gain'] == 'early':
        need(have, {'backbone.pairs': ('interleaved',), 'backbone.window_columns': (None,),
                    'backbone.qkv_bias': (False,), 'backbone.qk_norm': ('none',),
                    'backbone.experts': (0,), 'backbone.head_dim': (
                        have['backbone.width'] / have['backbone.heads'],)},
             f"{family} with norm_gain 'early', a Helium,")
    if have['backbone.qk_norm'] != 'none' or have['backbone.experts']:
        need(have, {'backbone.qkv_bias': (False,)}, f'{family} with experts or qk_norm')
    if have['backbone.experts']:
        need(have, {'backbone.qk_norm': ('none',)}, f'{family} with experts')


def kind_of(have: Mapping) -> str:
    """The model_type that says what `have` describes; Llama where several could."""
    if have['backbone.norm_gain'] == 'early':
        return 'helium'
    if have['backbone.experts']:
        return 'mixtral'
    if have['backbone.qk_norm'] == 'head':
        return 'qwen3'
    if have['backbone.qkv_bias']:
        return 'qwen2'
    return 'mistral' if have['backbone.window_columns'] else 'llama'


def rules_of(have: Mapping) -> Plan:
    """All of them. Interleaved rotary pairs become halves by permuting q and k, except in Helium,
    which interleaves them too."""
    kind = kind_of(have)
    permuted = have['backbone.pairs'] == 'interleaved' and kind != 'helium'
    ours, theirs = ('(h 2)', '2 h') if permuted else ('H', 'H')
    attention, experts = LAYER + 'self_attn.', LAYER + 'block_sparse_moe.'
    rules = [
        rule('model.embed_tokens.weight', ('frontend/table', 'V D', 'V D')),
        rule(LAYER + 'input_layernorm.weight', (BLOCKS + 'norm_attention/weight', 'L D', 'D')),
        rule(attention + 'q_proj.weight',
             (BLOCKS + 'q/kernel', f'L D N {ours}', f'(N {theirs}) D')),
        rule(attention + 'k_proj.weight',
             (BLOCKS + 'k/kernel', f'L D G {ours}', f'(G {theirs}) D')),
        rule(attention + 'v_proj.weight', (BLOCKS + 'v/kernel', 'L D G H', '(G H) D')),
        rule(attention + 'o_proj.weight', (BLOCKS + 'out/kernel', 'L N H D', 'D (N H)')),
        rule(LAYER + 'post_attention_layernorm.weight', (BLOCKS + 'norm_mlp/weight', 'L D', 'D')),
        rule('model.norm.weight', ('backbone/norm/weight', 'D', 'D')),
    ]
    if kind == 'mixtral':
        rules += [
            rule(experts + 'gate.weight', (BLOCKS + 'experts/router/kernel', 'L D E', 'E D')),
            rule(experts + 'experts.{E}.{U}.weight',
                 (BLOCKS + 'experts/gate_up', 'L E D U F', 'F D'), U=('w1', 'w3')),
            rule(experts + 'experts.{E}.w2.weight', (BLOCKS + 'experts/down', 'L E F D', 'D F'))]
    else:
        rules += [
            rule(LAYER + 'mlp.{U}_proj.weight', (BLOCKS + 'gate_up/kernel', 'L D U F', 'F D'),
                 U=('gate', 'up')),
            rule(LAYER + 'mlp.down_proj.weight', (BLOCKS + 'down/kernel', 'L F D', 'D F'))]
    if kind == 'qwen3':
        rules += [rule(attention + f'{x}_norm.weight',
                       (BLOCKS + f'norm_{x}/weight', f'L {ours}', f'({theirs})')) for x in 'qk']
    if have['backbone.qkv_bias']:
        rules += [
            rule(attention + 'q_proj.bias', (BLOCKS + 'q/bias', f'L N {ours}', f'(N {theirs})')),
            rule(attention + 'k_proj.bias', (BLOCKS + 'k/bias', f'L G {ours}', f'(G {theirs})')),
            rule(attention + 'v_proj.bias', (BLOCKS + 'v/bias', 'L G H', '(G H)'))]
    copies: tuple[tuple[str, str, str], ...] = ()
    if have['head.name'] == 'flat':
        rules.append(rule('lm_head.weight', ('head/out/kernel', 'D V', 'V D')))
    else:
        # Old files bring a copy of the table along. One that differs is a head of its own, with
        # which transformers 5 runs whatever tie_word_embeddings says.
        copies = (('lm_head.weight', 'model.embed_tokens.weight',
                   'it is a head of its own: set tie_word_embeddings to false in config.json, and '
                   "the config's head to 'flat'"),)
    return Plan(tuple(rules), (), r'.*\.rotary_emb\.inv_freq', copies)


def spell(have: Mapping) -> dict:
    """config.json in the spelling of transformers 4, which 5 reads too (the reverse is not so)."""
    kind, window = kind_of(have), have['backbone.window_columns']
    out = dict(
        architectures=[CLASSES[kind] + 'ForCausalLM'],
        model_type=kind, vocab_size=have['vocab.size'], hidden_size=have['backbone.width'],
        intermediate_size=have['backbone.mlp'], num_hidden_layers=have['backbone.layers'],
        num_attention_heads=have['backbone.heads'], num_key_value_heads=have['backbone.kv_heads'],
        head_dim=have['backbone.head_dim'], hidden_act='silu',
        rms_norm_eps=have['backbone.norm_eps'], rope_theta=float(have['backbone.theta']),
        rope_scaling=_spell_scaling(have['backbone.rope_scaling']),
        max_position_embeddings=have['columns'], attention_dropout=0.0,
        tie_word_embeddings=have['head.name'] == 'tied', use_cache=True, torch_dtype='float32',
        bos_token_id=have['vocab.bos'], eos_token_id=have['vocab.eos'])
    if kind in ('llama', 'qwen3', 'helium'):
        out |= dict(attention_bias=False)
    if kind in ('llama', 'helium'):
        out |= dict(mlp_bias=False)
    if kind in ('mistral', 'mixtral'):
        out |= dict(sliding_window=window)
    if kind == 'mixtral':
        out |= dict(num_local_experts=have['backbone.experts'],
                    num_experts_per_tok=have['backbone.experts_per_column'])
    if kind in ('qwen2', 'qwen3'):
        out |= dict(use_sliding_window=window is not None, sliding_window=window,
                    max_window_layers=0 if window else have['backbone.layers'])
    return out


def _spell_scaling(scaling) -> dict | None:
    if scaling == 'none':
        return None
    return {'rope_type': scaling['name']} | {
        theirs: int(scaling[ours]) if ours == 'original_columns' else float(scaling[ours])
        for theirs, ours in SCALINGS[scaling['name']].items()}


def read(values: Mapping, path: str) -> dict:
    """The facts of a Hugging Face config.json, in the spelling of transformers 4 or 5."""
    kind = values.get('model_type')
    if kind not in tuple(SILENT):
        raise ValueError(f'{path}: model_type must be one of {", ".join(SILENT)}, got {kind!r}')
    j = Json(SILENT[kind] | dict(values), path)
    j.only(hidden_act=('silu',), attention_bias=(False,), mlp_bias=(False,),
           partial_rotary_factor=(None, 1))
    width, heads = j.number('hidden_size'), j.number('num_attention_heads', high=1 << 12)
    layers = j.number('num_hidden_layers', high=1 << 12)
    theta, scaling = _read_rotary(j)
    mixtral, helium = kind == 'mixtral', kind == 'helium'
    out = {
        'vocab.size': j.number('vocab_size'), 'backbone.width': width, 'backbone.layers': layers,
        'backbone.heads': heads,
        'backbone.kv_heads': j.number('num_key_value_heads', heads, high=1 << 12),
        'backbone.head_dim': j.number('head_dim', width // heads),
        'backbone.mlp': j.number('intermediate_size'), 'backbone.qkv_bias': kind == 'qwen2',
        'backbone.theta': theta, 'backbone.rope_scaling': scaling,
        'backbone.norm_eps': j.number('rms_norm_eps', low=0, high=1, kind=float),
        'backbone.norm_gain': 'early' if helium else 'late',
        'backbone.qk_norm': 'head' if kind == 'qwen3' else 'none',
        'backbone.window_columns': _read_window(j, kind, layers),
        'backbone.experts': j.number('num_local_experts', high=1 << 12) if mixtral else 0,
        'head.name': 'tied' if j.flag('tie_word_embeddings') else 'flat',
    }
    for name in ('bos', 'eos'):     # one of several will do, and nothing where nothing is stated
        if ids := j.ids(f'{name}_token_id'):
            out[f'vocab.{name}'] = frozenset(ids)
    if mixtral:
        out['backbone.experts_per_column'] = j.number('num_experts_per_tok',
                                                      high=out['backbone.experts'])
    if helium:
        out['backbone.pairs'] = 'interleaved'
        if out['backbone.head_dim'] * heads != width:
            raise ValueError(f'{path}: head_dim times num_attention_heads must be hidden_size')
    return out


def _read_rotary(j: Json) -> tuple[float, str | dict]:
    """The rotary base and our `rope_scaling`. transformers 5 has both in `rope_parameters`."""
    new, old = rotary_objects(j)
    scaling = new or old
    theta = Json({'rope_theta': j.values['rope_theta']} | dict(new), j.path).number(
        'rope_theta', high=1e12, kind=float)
    s = Json(scaling, j.path)
    s.only(partial_rotary_factor=(None, 1))
    name = scaling.get('rope_type', scaling.get('type', 'default'))
    if name == 'default':
        return theta, 'none'
    if name not in tuple(SCALINGS):
        raise ValueError(f'{j.path}: rotary scaling {name!r} is not supported '
                         f'({", ".join(SCALINGS)} are)')
    numbers = {ours: s.number(theirs, low=1e-3, high=1e9,
                              kind=int if ours == 'original_columns' else float)
               for theirs, ours in SCALINGS[name].items()}
    return theta, {'name': name} | numbers


def _read_window(j: Json, kind: str, layers: int) -> int | None:
    """Columns that a layer sees; None for all. Layers that differ in it are refused."""
    if kind in ('mistral', 'mixtral'):
        used = j.values.get('sliding_window') is not None
    elif kind in ('qwen2', 'qwen3') and j.flag('use_sliding_window'):
        full = j.number('max_window_layers', low=0, high=1 << 31)
        kinds = j.values.get('layer_types') or ['full_attention' if i < full else
                                                'sliding_attention' for i in range(layers)]
        used = kinds == ['sliding_attention'] * layers
        if not used and kinds != ['full_attention'] * layers:
            raise ValueError(f'{j.path}: use_sliding_window on some layers only is not supported')
    else:
        used = False
    return j.number('sliding_window', high=WINDOW) if used else None

# SPDX-License-Identifier: Apache-2.0
"""Hugging Face decoders: Llama, Mistral and Qwen2 (transformers modeling_llama and its kin)."""

from collections.abc import Mapping

from jaxsd.config import ConfigError
from jaxsd.export.facts import BLOCKS, Json, Plan, need
from jaxsd.export.rules import rule

LAYER = 'model.layers.{L}.'
TYPES = ('llama', 'mistral', 'qwen2')


def check(have: Mapping) -> None:
    """ConfigError unless a Hugging Face Llama, Mistral or Qwen2 can be what `have` describes."""
    family = "format 'hf'"
    need(have, {'frontend.name': ('summed',), 'head.name': ('flat', 'tied'),
                 'backbone.name': ('decoder',)}, family)
    if len(have['vocab.rows']) != 1:
        raise ConfigError(f'{family} is one row of tokens, this config has '
                          f"{len(have['vocab.rows'])} rows; use format 'kyutai'")


def rules_of(have: Mapping) -> Plan:
    """Llama, Mistral, Qwen2. Interleaved rotary pairs become halves by permuting q and k."""
    ours, theirs = {'half': ('H', 'H'), 'interleaved': ('(h 2)', '2 h')}[have['backbone.pairs']]
    attention = LAYER + 'self_attn.'
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
        rule(LAYER + 'mlp.{U}_proj.weight', (BLOCKS + 'gate_up/kernel', 'L D U F', 'F D'),
             U=('gate', 'up')),
        rule(LAYER + 'mlp.down_proj.weight', (BLOCKS + 'down/kernel', 'L F D', 'D F')),
        rule('model.norm.weight', ('backbone/norm/weight', 'D', 'D')),
    ]
    if have['backbone.qkv_bias']:
        rules += [
            rule(attention + 'q_proj.bias', (BLOCKS + 'q/bias', f'L N {ours}', f'(N {theirs})')),
            rule(attention + 'k_proj.bias', (BLOCKS + 'k/bias', f'L G {ours}', f'(G {theirs})')),
            rule(attention + 'v_proj.bias', (BLOCKS + 'v/bias', 'L G H', '(G H)'))]
    ignored = r'.*\.rotary_emb\.inv_freq'
    if have['head.name'] == 'flat':
        rules.append(rule('lm_head.weight', ('head/out/kernel', 'D V', 'V D')))
    else:
        ignored += r'|lm_head\.weight'      # a copy of the table, which transformers ignores too
    return Plan(tuple(rules), (), ignored)


def spell(have: Mapping) -> dict:
    """config.json in the spelling of transformers 4, which 5 reads too (the reverse is not so)."""
    bias, window = have['backbone.qkv_bias'], have['backbone.window_columns']
    kind = 'qwen2' if bias else 'mistral' if window else 'llama'
    out = dict(
        architectures=[{'llama': 'LlamaForCausalLM', 'mistral': 'MistralForCausalLM',
                        'qwen2': 'Qwen2ForCausalLM'}[kind]],
        model_type=kind, vocab_size=have['vocab.size'], hidden_size=have['backbone.width'],
        intermediate_size=have['backbone.mlp'], num_hidden_layers=have['backbone.layers'],
        num_attention_heads=have['backbone.heads'], num_key_value_heads=have['backbone.kv_heads'],
        head_dim=have['backbone.head_dim'], hidden_act='silu',
        rms_norm_eps=have['backbone.norm_eps'], rope_theta=float(have['backbone.theta']),
        rope_scaling=None, max_position_embeddings=have['columns'], attention_dropout=0.0,
        tie_word_embeddings=have['head.name'] == 'tied', use_cache=True, torch_dtype='float32',
        bos_token_id=have['vocab.bos'], eos_token_id=have['vocab.eos'])
    if kind == 'llama':
        out |= dict(attention_bias=False, mlp_bias=False)
    if kind == 'mistral':
        out |= dict(sliding_window=window)
    if kind == 'qwen2':
        out |= dict(use_sliding_window=window is not None, sliding_window=window,
                    max_window_layers=0 if window else have['backbone.layers'])
    return out


def read(values: Mapping, path: str) -> dict:
    """The facts of a Hugging Face config.json, in the spelling of transformers 4 or 5."""
    j = Json(values, path)
    kind = values.get('model_type')
    if kind not in TYPES:
        raise ValueError(f'{path}: model_type must be one of {", ".join(TYPES)}, got {kind!r}')
    j.only(hidden_act=('silu',), attention_bias=(False,), mlp_bias=(False,))
    rope = values.get('rope_parameters') or values
    scaling = values.get('rope_scaling') or values.get('rope_parameters') or {}
    if not isinstance(rope, Mapping) or not isinstance(scaling, Mapping):
        raise ValueError(f'{path}: rope_parameters and rope_scaling must be objects')
    scaled = scaling.get('rope_type', scaling.get('type', 'default'))
    if scaled != 'default':
        raise ValueError(f'{path}: rotary scaling {scaled!r} is not supported')
    width, heads = j.number('hidden_size'), j.number('num_attention_heads', high=1 << 12)
    layers = j.number('num_hidden_layers', high=1 << 12)
    window = None
    if kind == 'mistral' and values.get('sliding_window', 4096) is not None:
        window = j.number('sliding_window', 4096, high=1 << 31)
    if kind == 'qwen2' and j.flag('use_sliding_window'):
        kinds = values.get('layer_types') or (
            ['sliding_attention'] if values.get('max_window_layers', 28) == 0 else ['mixed'])
        if not isinstance(kinds, list) or set(kinds) != {'sliding_attention'}:
            raise ValueError(f'{path}: use_sliding_window on some layers only is not supported')
        window = j.number('sliding_window', 4096, high=1 << 31)
    return {
        'vocab.size': j.number('vocab_size'), 'backbone.width': width, 'backbone.layers': layers,
        'backbone.heads': heads,
        'backbone.kv_heads': j.number('num_key_value_heads', heads, high=1 << 12),
        'backbone.head_dim': j.number('head_dim', width // heads),
        'backbone.mlp': j.number('intermediate_size'), 'backbone.qkv_bias': kind == 'qwen2',
        'backbone.theta': Json(rope, path).number('rope_theta', 1e4, high=1e12, kind=float),
        'backbone.norm_eps': j.number('rms_norm_eps', 1e-6, low=0, high=1, kind=float),
        'backbone.window_columns': window,
        'head.name': 'tied' if j.flag('tie_word_embeddings') else 'flat',
    }

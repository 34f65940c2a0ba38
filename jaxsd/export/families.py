# SPDX-License-Identifier: Apache-2.0
"""The families of released checkpoints: how each spells its configuration and names its tensors.

Both directions meet in *facts*: a flat dict such as {'backbone.heads': 32, 'backbone.theta': 1e4}
that a config and a peer's config.json can each be read as. Export spells the config's facts as the
peer's config.json; import compares the two before a single tensor is read, so that weights never
run with another rotary base, window or norm than they were trained with.

A family is: facts it can express (`check`), config.json from facts (`spell`), facts from
config.json (`read`), and its rename rules (`rules`). Key names and numerics: transformers
modeling_llama / modeling_mistral / modeling_qwen2, and the moshi package's models/lm.py.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxsd.config import ConfigError, bind, options_of, plain, resolve
from jaxsd.export.rules import Rule, rule
from jaxsd.layout import duplex
from jaxsd.model import make_vocab

BLOCKS, LAYER = 'backbone/blocks/', 'model.layers.{L}.'


class Plan(NamedTuple):
    """Rules of a checkpoint, paths of ours it may leave partly empty, peer keys without meaning."""

    rules: tuple[Rule, ...]
    spare: tuple[str, ...] = ()
    ignored: str = '(?!)'           # regex over whole keys


def facts(config) -> dict:
    """What of `config` a checkpoint can speak about: slots' options, rows, specials, delays."""
    out = {}
    for slot in ('frontend', 'backbone', 'head'):
        bound = bind(config[slot], f'jaxsd.{slot}', slot, given=('rngs',))
        options = {k: p.default for k, p in options_of(bound.func).items()
                   if p.default is not p.empty} | bound.keywords
        out |= {f'{slot}.{k}': v for k, v in options.items()}
        out[f'{slot}.name'] = config[slot]['name']
    vocab = make_vocab(config)
    out |= {f'vocab.{name}': i for name, i in vocab.specials.items()}
    out |= {'vocab.size': vocab.size, 'vocab.rows': vocab.rows, 'columns': config.columns}
    out['rows (size, predicted)'] = tuple((row.size, row.predicted) for row in vocab.rows)
    layout = plain(config.layout)
    options = {k: p.default for k, p in
               options_of(resolve(layout['name'], 'jaxsd.layout')).items()} | layout
    late = {k: options[k] for k in ('acoustic_delay_columns', 'text_delay_columns') if k in options}
    if len(late) == 2:
        out['layout.delays'] = duplex.delays(vocab, **late)
    return out


def disagreements(ours: Mapping, theirs: Mapping) -> list[str]:
    """Sentences for the facts on which the config and the checkpoint differ."""
    return [f'{key} is {ours.get(key)!r}, the checkpoint has {value!r}'
            for key, value in theirs.items() if ours.get(key) != value]


def _need(have: Mapping, want: Mapping, family: str) -> None:
    for key, values in want.items():
        if have.get(key) not in values:
            legal = ' or '.join(map(repr, values))
            raise ConfigError(f'{key} is {have.get(key)!r}; {family} can only say {legal}')


class _Json:
    """A peer's config.json, read with bounds: every value is checked before anyone uses it."""

    def __init__(self, values: Mapping, path: str):
        self.values, self.path = values, path

    def _bad(self, key, want):
        return ValueError(f'{self.path}: {key} must be {want}, got {self.values.get(key)!r}')

    def number(self, key: str, default=None, *, low=1, high=1 << 24, kind=int):
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | kind) or not low <= value <= high:
            raise self._bad(key, f'a number from {low} to {high}')
        return kind(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self._bad(key, 'true or false')
        return value

    def only(self, **legal) -> None:
        """Each key is absent or has one of its legal values."""
        for key, values in legal.items():
            if key in self.values and self.values[key] not in values:
                legal = ' or '.join(map(repr, values))
                raise self._bad(key, f'{legal} (nothing else is supported)')


# Hugging Face decoders ---------------------------------------------------------------------------

TYPES = ('llama', 'mistral', 'qwen2')


def check_hf(have: Mapping) -> None:
    """ConfigError unless a Hugging Face Llama, Mistral or Qwen2 can be what `have` describes."""
    family = "format 'hf'"
    _need(have, {'frontend.name': ('summed',), 'head.name': ('flat', 'tied'),
                 'backbone.name': ('decoder',)}, family)
    if len(have['vocab.rows']) != 1:
        raise ConfigError(f'{family} is one row of tokens, this config has '
                          f"{len(have['vocab.rows'])} rows; use format 'kyutai'")


def hf_rules(have: Mapping) -> Plan:
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


def spell_hf(have: Mapping) -> dict:
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


def read_hf(values: Mapping, path: str) -> dict:
    """The facts of a Hugging Face config.json, in the spelling of transformers 4 or 5."""
    j = _Json(values, path)
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
        'backbone.theta': _Json(rope, path).number('rope_theta', 1e4, high=1e12, kind=float),
        'backbone.norm_eps': j.number('rms_norm_eps', 1e-6, low=0, high=1, kind=float),
        'backbone.window_columns': window,
        'head.name': 'tied' if j.flag('tie_word_embeddings') else 'flat',
    }


# kyutai's LMModel --------------------------------------------------------------------------------

NORMS = {'rms_norm_f32': 1e-8, 'rms_norm': 1e-5}
ROTARY = {'rope': 'interleaved', 'rope_concat': 'half'}
RELEASED = dict(    # what a checkpoint without config.json is (moshi models/loaders.py)
    dim=4096, text_card=32000, existing_text_padding_id=3, n_q=16, dep_q=8, card=2048, num_heads=32,
    num_layers=32, hidden_scale=4.125, context=3000, max_period=10000, gating='silu',
    norm='rms_norm_f32', positional_embedding='rope', depformer_dim=1024,
    depformer_dim_feedforward=4224, depformer_num_heads=16, depformer_num_layers=6,
    depformer_multi_linear=True, depformer_gating='silu', depformer_pos_emb='none',
    depformer_weights_per_step=True, delays=[0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1])


def check_kyutai(have: Mapping) -> None:
    """ConfigError unless a kyutai LMModel can be what `have` describes."""
    family = "format 'kyutai'"
    _need(have, {'frontend.name': ('summed',), 'backbone.name': ('decoder',),
                 'head.name': ('depth',), 'backbone.norm_eps': tuple(NORMS.values()),
                 'head.norm_eps': (have['backbone.norm_eps'],), 'backbone.norm_gain': ('early',),
                 'head.norm_gain': ('early',), 'backbone.qkv_bias': (False,),
                 'backbone.head_dim': (have['backbone.width'] / have['backbone.heads'],)}, family)
    if 'layout.delays' not in have:
        raise ConfigError(f'{family} needs a layout with acoustic_delay_columns')
    if len({row.size for row in have['vocab.rows'][1:]}) != 1:
        raise ConfigError(f'{family} needs codebooks of one size')


def kyutai_rules(have: Mapping) -> Plan:
    """The current dialect: one tensor per step (`in_projs.S`). `legacy_kyutai` knows the older."""
    layer, own = 'transformer.layers.{L}.', have['head.step_weights'] == 'own'
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
    return Plan(tuple(rules), tuple(spare))


def _table(have: Mapping, k: int) -> tuple:
    row = have['vocab.rows'][k]
    return 'frontend/table', 'V D', 'V D', (row.start, row.size)


def _per_step(axes: str, own: bool) -> str:
    """Depth weights are [L, S, ...]; with one set for all steps S is an axis of length one."""
    return f'L S {axes}' if own else f'L 1 {axes}'


def _spoken(have: Mapping) -> int:
    return sum(row.predicted > 0 for row in have['vocab.rows'][1:])


def legacy_kyutai(key: str, have: Mapping) -> tuple[str, ...]:
    """The current names of a key: published checkpoints stack all steps of a projection."""
    for old, new in ((r'in_proj(?:_weight|\.weight)', 'in_projs'),
                     (r'out_proj\.weight', 'out_projs')):
        if match := re.fullmatch(rf'(.*\.self_attn\.){old}', key):
            own = key.startswith('depformer.') and have['head.step_weights'] == 'own'
            return tuple(f'{match[1]}{new}.{s}.weight' for s in range(_spoken(have) if own else 1))
    return (key,)


def _feedforward(hidden: int, width: int) -> int:
    """The dim_feedforward that kyutai's gating turns into `hidden` (moshi modules/gating.py)."""
    least = -(-3 * hidden // 2)
    return next(n for n in (least, least + 1) if _hidden(n, width) == hidden)


def _hidden(feedforward: int, width: int) -> int:
    return 21 * width // 8 if feedforward == 4 * width else 2 * feedforward // 3


def spell_kyutai(have: Mapping) -> dict:
    """config.json for moshi's loaders: arguments of LMModel, and nothing that it would not take."""
    rows, width = have['vocab.rows'], have['backbone.width']
    feedforward = _feedforward(have['backbone.mlp'], width)
    scale = feedforward / width
    if int(scale * width) != feedforward:
        scale = (feedforward + .5) / width
    own = have['head.step_weights'] == 'own'
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
    if repeat > 1:
        out |= dict(kv_repeat=repeat, depformer_kv_repeat=1)
    return out


def read_kyutai(values: Mapping, path: str) -> dict:
    """The facts of a kyutai config.json."""
    j = _Json(values, path)
    own, eps = j.flag('depformer_weights_per_step'), NORMS.get(values.get('norm'))
    j.only(gating=('silu',), positional_embedding=tuple(ROTARY), depformer_pos_emb=('none',),
           norm=tuple(NORMS), causal=(True,), layer_scale=(None,), depformer_layer_scale=(None,),
           depformer_gating=('silu',), depformer_norm=(None,), norm_emb=(False,),
           bias_proj=(False,), depformer_low_rank_embeddings=(None,), extra_heads_num_heads=(0,),
           depformer_weights_per_step_schedule=(None,), demux_second_text_stream=(False,),
           demux_second_stream=(False,), depformer_multi_linear=(own,), quantize=(False,),
           cross_attention=(False,), conditioners=(None, {}), fuser=(None,), lora=(False,))
    for key in ('norm', 'gating', 'positional_embedding', 'depformer_pos_emb'):
        if key not in values:
            raise ValueError(f'{path}: {key} is missing')
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
    delays = values.get('delays')
    if (not isinstance(delays, list) or len(delays) != codebooks + 1
            or any(type(d) is not int or not 0 <= d < 1 << 16 for d in delays)):
        raise ValueError(f'{path}: delays must be n_q + 1 = {codebooks + 1} numbers of columns')
    context = values.get('context')
    return {
        'backbone.width': width, 'backbone.layers': j.number('num_layers', high=1 << 12),
        'backbone.heads': heads, 'backbone.kv_heads': heads // repeat,
        'backbone.head_dim': width // heads, 'backbone.mlp': _hidden(int(scale * width), width),
        'backbone.theta': j.number('max_period', 1e4, high=1e12, kind=float),
        'backbone.pairs': ROTARY[values['positional_embedding']],
        'backbone.window_columns': None if context is None else j.number('context', high=1 << 31),
        'backbone.norm_eps': eps, 'head.norm_eps': eps, 'head.width': deep,
        'head.layers': j.number('depformer_num_layers', high=1 << 12),
        'head.heads': j.number('depformer_num_heads', heads, high=1 << 12),
        'head.mlp': _hidden(deep_mlp, deep), 'head.step_weights': 'own' if own else 'shared',
        'vocab.pad': j.number('existing_text_padding_id', 3, low=0),
        'vocab.epad': j.number('existing_text_end_padding_id', 0, low=0),
        'rows (size, predicted)': ((text + 1, text), *[(card + 1, card)] * spoken,
                                   *[(card + 1, 0)] * (codebooks - spoken)),
        'layout.delays': tuple(delays),
    }


class Family(NamedTuple):
    """One format: see the top of this file.

    dialect: the current names of a key of an older file. sharded: whether the peer reads an index
    of several files. without_config: what a checkpoint that has no config.json is.
    """

    check: Callable[[Mapping], None]
    rules: Callable[[Mapping], Plan]
    spell: Callable[[Mapping], dict]
    read: Callable[[Mapping, str], dict]
    dialect: Callable[[str, Mapping], tuple[str, ...]]
    sharded: bool
    without_config: dict | None


FAMILIES = {
    'hf': Family(check_hf, hf_rules, spell_hf, read_hf, lambda key, have: (key,), True, None),
    'kyutai': Family(check_kyutai, kyutai_rules, spell_kyutai, read_kyutai, legacy_kyutai, False,
                     RELEASED),
}

# SPDX-License-Identifier: Apache-2.0
"""Moshi as transformers lays it out: MoshiForConditionalGeneration (models/moshi).

The same model as kyutai's LMModel under other names. Rotary pairs are halves, so rows of q and k
are permuted; the depth decoder turns nothing and keeps its order. Its linears hold all steps as one
tensor [S, out, in]. The forward pass delays nothing: it is fed the columns that our model is fed.

transformers bundles the codec with the model. Where the config names the weights of a Mimi
(`codec.path`), they go along, and so does the codec that a checkpoint came with from `load` to
`save`; otherwise whoever loads the folder must put one in its place.
"""

import os
from collections.abc import Mapping

from jaxsd.config import ConfigError
from jaxsd.export import safetensors
from jaxsd.export.facts import BLOCKS, WINDOW, Json, Plan, need, rotary_objects
from jaxsd.export.rules import rule

LAYER, DEPTH, DEEP = 'decoder.model.layers.{L}.', 'depth_decoder.layers.{L}.', 'head/blocks/'
ROWS = 'rows (size, predicted)'
CODEC = 'audio_encoder.'


def check(have: Mapping) -> None:
    """ConfigError unless a transformers Moshi can be what `have` describes."""
    family = "format 'kyutai-hf'"
    need(have, {'frontend.name': ('summed',), 'frontend.heard': ((),),
                'frontend.encoder': (None,), 'backbone.name': ('decoder',),
                'head.name': ('depth',), 'head.step_weights': ('own',),
                'backbone.norm_gain': ('early',), 'head.norm_gain': ('early',),
                'backbone.qkv_bias': (False,)}, family)
    codebooks, rest = divmod(len(have['vocab.rows']) - 1, 2)
    spoken = [row.predicted > 0 for row in have['vocab.rows'][1:]]
    if rest or codebooks < 2 or spoken != [True] * codebooks + [False] * codebooks:
        raise ConfigError(f'{family} has two speakers of at least two codebooks each, and speaks '
                          "for one: set vocab.predicted to ('mine',)")
    if len({row.size for row in have['vocab.rows'][1:]}) != 1:
        raise ConfigError(f'{family} needs codebooks of one size')
    if have.get('layout.delays') != _delays(codebooks):
        raise ConfigError(f'{family} can only say acoustic_delay_columns 1 and no text delay')
    if have['backbone.window_columns'] is None:
        raise ConfigError(f'{family} needs backbone.window_columns')
    if _codec_folder(have) and not os.path.isdir(have['codec.path']):
        raise ConfigError(f"codec.path: {family} takes the codec along as transformers lays it "
                          f"out; {have['codec.path']} is no folder with a config.json ('' leaves "
                          'the codec out)')


def _delays(codebooks: int) -> tuple[int, ...]:
    """The delays that transformers builds into its generation."""
    return 0, *(0, *[1] * (codebooks - 1)) * 2


def rules_of(have: Mapping) -> Plan:
    ours, theirs = {'half': ('H', 'H'), 'interleaved': ('(h 2)', '2 h')}[have['backbone.pairs']]
    attention = LAYER + 'self_attn.'
    rules = [
        rule('decoder.model.embed_tokens.weight', _table(have, 0)),
        *(rule(f'embed_tokens.{k}.weight', _table(have, k + 1))
          for k in range(len(have['vocab.rows']) - 1)),
        rule(LAYER + 'input_layernorm.weight', (BLOCKS + 'norm_attention/weight', 'L D', 'D')),
        rule(attention + 'q_proj.linear.weight',
             (BLOCKS + 'q/kernel', f'L D N {ours}', f'(N {theirs}) D')),
        rule(attention + 'k_proj.linear.weight',
             (BLOCKS + 'k/kernel', f'L D G {ours}', f'(G {theirs}) D')),
        rule(attention + 'v_proj.linear.weight', (BLOCKS + 'v/kernel', 'L D G H', '(G H) D')),
        rule(attention + 'o_proj.linear.weight', (BLOCKS + 'out/kernel', 'L N H D', 'D (N H)')),
        rule(LAYER + 'post_attention_layernorm.weight', (BLOCKS + 'norm_mlp/weight', 'L D', 'D')),
        rule(LAYER + 'mlp.fc1.weight', (BLOCKS + 'gate_up/kernel', 'L D U F', '(U F) D')),
        rule(LAYER + 'mlp.fc2.weight', (BLOCKS + 'down/kernel', 'L F D', 'D F')),
        rule('decoder.model.norm.weight', ('backbone/norm/weight', 'D', 'D')),
        rule('decoder.lm_head.weight', ('head/text_out/kernel', 'D V', 'V D')),
        rule('depth_decoder.text_embed_tokens.weight', ('head/text_table', 'V D', 'V D')),
        rule('depth_decoder.embed_tokens.{P}.weight', ('head/tables', 'P V D', 'V D')),
        rule('depth_decoder.input_projections.weight', ('head/inputs/kernel', 'S D E', 'S E D')),
        rule(DEPTH + 'input_layernorm.weight', (DEEP + 'norm_attention/weight', 'L D', 'D')),
        rule(DEPTH + 'self_attn.{U}_proj.linear.weight',
             (DEEP + 'qkv/kernel', 'L S D U N H', 'S (N H) D'), U=('q', 'k', 'v')),
        rule(DEPTH + 'self_attn.o_proj.linear.weight',
             (DEEP + 'out/kernel', 'L S N H D', 'S D (N H)')),
        rule(DEPTH + 'post_attention_layernorm.weight', (DEEP + 'norm_mlp/weight', 'L D', 'D')),
        rule(DEPTH + 'mlp.fc1.weight', (DEEP + 'gate_up/kernel', 'L S D U F', 'S (U F) D')),
        rule(DEPTH + 'mlp.fc2.weight', (DEEP + 'down/kernel', 'L S F D', 'S D F')),
        rule('depth_decoder.lm_heads.weight', ('head/outs/kernel', 'P D V', 'P V D')),
    ]
    # Spare: rows that only pad the line to a multiple.
    return Plan(tuple(rules), ('frontend/table',), CODEC.replace('.', r'\.') + '.*')


def _table(have: Mapping, k: int) -> tuple:
    row = have['vocab.rows'][k]
    return 'frontend/table', 'V D', 'V D', (row.start, row.size)


def spell(have: Mapping) -> dict:
    """config.json in the spelling of transformers 4, which 5 reads too (the reverse is not so)."""
    rows, codebooks = have['vocab.rows'], (len(have['vocab.rows']) - 1) // 2
    text, card = rows[0].predicted, rows[1].predicted
    common = dict(vocab_size=text, audio_vocab_size=card, num_codebooks=codebooks,
                  hidden_act='silu', attention_dropout=0.0, use_cache=True,
                  tie_word_embeddings=False)
    depth = common | dict(
        model_type='moshi_depth', hidden_size=have['head.width'], input_size=have['backbone.width'],
        num_hidden_layers=have['head.layers'], num_attention_heads=have['head.heads'],
        num_key_value_heads=have['head.heads'], head_dim=have['head.width'] // have['head.heads'],
        ffn_dim=2 * have['head.mlp'], rms_norm_eps=have['head.norm_eps'],
        max_position_embeddings=codebooks + 1, sliding_window=codebooks)
    return common | dict(
        architectures=['MoshiForConditionalGeneration'], model_type='moshi',
        hidden_size=have['backbone.width'], num_hidden_layers=have['backbone.layers'],
        num_attention_heads=have['backbone.heads'], num_key_value_heads=have['backbone.kv_heads'],
        head_dim=have['backbone.head_dim'], ffn_dim=2 * have['backbone.mlp'],
        rms_norm_eps=have['backbone.norm_eps'], rope_theta=float(have['backbone.theta']),
        max_position_embeddings=have['backbone.window_columns'],
        sliding_window=have['backbone.window_columns'], torch_dtype='float32',
        depth_decoder_config=depth, audio_encoder_config=_codec_config(have))


def generation(have: Mapping) -> dict:
    """generation_config.json: the sampling that released checkpoints are spoken with.

    Sequences begin with the initial text token, which transformers calls both bos and pad.
    """
    codebooks, start = (len(have['vocab.rows']) - 1) // 2, have['vocab.rows'][0].predicted
    return dict(
        do_sample=True, temperature=0.7, top_k=25, bos_token_id=start, pad_token_id=start,
        depth_decoder_config=dict(do_sample=True, temperature=0.8, top_k=250,
                                  min_length=codebooks + 1, max_length=codebooks + 1))


def read(values: Mapping, path: str) -> dict:
    """The facts of a transformers Moshi's config.json, in the spelling of its release 4 or 5."""
    j = Json(values, path)
    if values.get('model_type') != 'moshi':
        raise ValueError(f"{path}: model_type must be 'moshi', got {values.get('model_type')!r}")
    deep = values.get('depth_decoder_config') or {}
    codec = values.get('audio_encoder_config') or {}
    new, old = rotary_objects(j)
    rope, scaling = new or values, old or new
    for key, value in (('depth_decoder_config', deep), ('audio_encoder_config', codec)):
        if not isinstance(value, Mapping):
            raise ValueError(f'{path}: {key} must be an object')
    d = Json(deep, f'{path}: depth_decoder_config')
    for each in (j, d):
        each.only(hidden_act=('silu',), tie_word_embeddings=(False,))
    if (scaled := scaling.get('rope_type', scaling.get('type', 'default'))) != 'default':
        raise ValueError(f'{path}: rotary scaling {scaled!r} is not supported')
    # The defaults are those of transformers (configuration_moshi.py): the released model's sizes.
    width, heads = j.number('hidden_size', 4096), j.number('num_attention_heads', 32, high=1 << 12)
    deep_width = d.number('hidden_size', 1024)
    deep_heads = d.number('num_attention_heads', 16, high=1 << 12)
    size = Json(codec, f'{path}: audio_encoder_config').number('codebook_size', 2048)
    text, card = j.number('vocab_size', 32000), j.number('audio_vocab_size', size)
    codebooks = j.number('num_codebooks', 8, low=2, high=128)
    # What the model decides for its depth decoder; a file that says otherwise is another model's.
    d.only(vocab_size=(text,), audio_vocab_size=(card,), num_codebooks=(codebooks,),
           input_size=(width,), num_key_value_heads=(None, deep_heads),
           head_dim=(None, deep_width // deep_heads))
    mlp, deep_mlp = j.number('ffn_dim', 22528, low=2), d.number('ffn_dim', 5632, low=2)
    if mlp % 2 or deep_mlp % 2:
        raise ValueError(f'{path}: ffn_dim must be even: it counts gate and up together')
    return {
        'backbone.width': width, 'backbone.heads': heads,
        'backbone.layers': j.number('num_hidden_layers', 32, high=1 << 12),
        'backbone.kv_heads': j.number('num_key_value_heads', heads, high=1 << 12),
        'backbone.head_dim': j.number('head_dim', width // heads), 'backbone.mlp': mlp // 2,
        'backbone.theta': Json(rope, path).number('rope_theta', 1e4, high=1e12, kind=float),
        'backbone.window_columns': j.number('sliding_window', 3000, high=WINDOW),
        'backbone.norm_eps': j.number('rms_norm_eps', 1e-8, low=0, high=1, kind=float),
        'backbone.norm_gain': 'early', 'head.norm_gain': 'early', 'head.name': 'depth',
        'head.norm_eps': d.number('rms_norm_eps', 1e-8, low=0, high=1, kind=float),
        'head.width': deep_width, 'head.heads': deep_heads, 'head.mlp': deep_mlp // 2,
        'head.layers': d.number('num_hidden_layers', 6, high=1 << 12), 'head.step_weights': 'own',
        ROWS: ((text + 1, text), *[(card + 1, card)] * codebooks, *[(card + 1, 0)] * codebooks),
        'layout.delays': _delays(codebooks),
    }


def _codec_config(have: Mapping) -> dict:
    """The codec's own config.json where its folder has one; else what Mimi is, at our sizes."""
    codebooks, card = (len(have['vocab.rows']) - 1) // 2, have['vocab.rows'][1].predicted
    said = {}
    if folder := _codec_folder(have):
        path = os.path.join(folder, 'config.json')
        said = safetensors.read_json(path)
        j = Json(said, path)
        if j.number('codebook_size', 2048) != card or j.number('num_quantizers', 32) < codebooks:
            raise ConfigError(f'codec.path: {path} has another codebook_size, or fewer '
                              'num_quantizers, than the config has codes')
    power = 1 << (card - 1).bit_length()        # transformers refuses any other number
    return dict(codebook_size=power, num_quantizers=max(32, codebooks)) | said | dict(
        model_type='mimi')


def _codec_folder(have: Mapping) -> str:
    return have['codec.path'] if have['codec.name'] == 'mimi' else ''


def along(have: Mapping) -> dict[str, safetensors.Entry]:
    """The codec's tensors, which go along as `audio_encoder`; none where no weights are named."""
    folder = _codec_folder(have)
    return safetensors.entries(folder, lambda key: (CODEC + key,)) if folder else {}


def bundled(source: str) -> tuple[dict, dict[str, safetensors.Entry]]:
    """The codec that the checkpoint `source` brings along: what its config.json says of it, and its
    tensors by key. Nothing where it has none."""
    found = {key: entry for key, entry in safetensors.entries(source, lambda key: (key,)).items()
             if key.startswith(CODEC)}
    if not found:
        return {}, {}
    values = safetensors.read_json(os.path.join(safetensors.folder_of(source), 'config.json'))
    return {k: values[k] for k in ('audio_encoder_config',) if k in values}, found

# SPDX-License-Identifier: Apache-2.0
"""GGUF files for llama.cpp and what is built on it: Llama, Mistral, Mixtral, Qwen2 and Qwen3.

What the format 'hf' would say, respelled as llama.cpp's own converter does (convert_hf_to_gguf.py):
other tensor names, the rotary pairs of queries and keys interleaved where the architecture wants
them so, the experts of a layer in one tensor, and every fact of the model and its tokenizer as
metadata. What slows some rotary pairs more than others is a tensor of factors.
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from jaxsd import model, nn
from jaxsd.config import ConfigError, fingerprint, plain, unknown
from jaxsd.export import bytelevel, decoders, rules, tokens
from jaxsd.export.facts import BLOCKS, facts

DTYPES = ('f32', 'f16', 'q8_0')
ARCHITECTURES = {'llama': 'llama', 'mistral': 'llama', 'mixtral': 'llama', 'qwen2': 'qwen2',
                 'qwen3': 'qwen3'}
MODELS = {'bpe': 'llama', 'unigram': 't5'}      # llama.cpp's names of the two algorithms
LAYER_NAMES = {
    'input_layernorm': 'attn_norm', 'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v', 'self_attn.o_proj': 'attn_output',
    'self_attn.q_norm': 'attn_q_norm', 'self_attn.k_norm': 'attn_k_norm',
    'post_attention_layernorm': 'ffn_norm', 'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up',
    'mlp.down_proj': 'ffn_down', 'block_sparse_moe.gate': 'ffn_gate_inp',
    'block_sparse_moe.experts.w1': 'ffn_gate_exps', 'block_sparse_moe.experts.w3': 'ffn_up_exps',
    'block_sparse_moe.experts.w2': 'ffn_down_exps'}
ROPE_FACTORS = 'rope_freqs.weight'
NAMES = {'model.embed_tokens.weight': 'token_embd.weight',
         'model.norm.weight': 'output_norm.weight', 'lm_head.weight': 'output.weight'}
SPELLED = {     # what `write` turns into metadata, or what has one legal value in llama.cpp
    'architectures', 'model_type', 'vocab_size', 'hidden_size', 'intermediate_size',
    'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads', 'head_dim', 'hidden_act',
    'rms_norm_eps', 'rope_theta', 'rope_scaling', 'max_position_embeddings', 'attention_dropout',
    'tie_word_embeddings', 'use_cache', 'torch_dtype', 'bos_token_id', 'eos_token_id',
    'attention_bias', 'mlp_bias', 'sliding_window', 'use_sliding_window', 'max_window_layers',
    'num_local_experts', 'num_experts_per_tok'}


def check(have: Mapping) -> dict:
    """The model's config.json, or ConfigError where llama.cpp would not run what it says."""
    decoders.check(have, 'gguf')
    spelled = decoders.spell(have)
    if spelled['model_type'] not in ARCHITECTURES:
        raise ConfigError(f"format 'gguf' writes {', '.join(ARCHITECTURES)}, this config is a "
                          f"{spelled['model_type']}; use format 'hf' and llama.cpp's converter")
    if odd := [k for k in spelled if k not in SPELLED]:
        raise ConfigError(f"format 'gguf' cannot say {', '.join(odd)}; use format 'hf' and "
                          "llama.cpp's converter")
    scaling, arch = spelled['rope_scaling'], ARCHITECTURES[spelled['model_type']]
    if scaling and scaling['rope_type'] == 'llama3' and arch != 'llama':
        raise ConfigError(f"format 'gguf' cannot say rope_scaling 'llama3' of a "
                          f"{spelled['model_type']}: llama.cpp reads its factors only for llama")
    return spelled


def rules_of(have: Mapping) -> tuple[rules.Rule, ...]:
    """Those of the format 'hf', with the experts of each layer in one tensor per matrix."""
    kept = [r for r in decoders.rules_of(have).rules if '{E}' not in r.key]
    if have['backbone.experts']:
        at = decoders.LAYER + 'block_sparse_moe.experts.'
        kept += [rules.rule(at + '{U}.weight', (BLOCKS + 'experts/gate_up', 'L E D U F', 'E F D'),
                            U=('w1', 'w3')),
                 rules.rule(at + 'w2.weight', (BLOCKS + 'experts/down', 'L E F D', 'E D F'))]
    return tuple(kept)


def rope_factors(have: Mapping) -> np.ndarray | None:
    """By what each rotary pair is slower than its base says, float32 [H / 2], where that differs
    from pair to pair."""
    scaling = have['backbone.rope_scaling']
    if scaling == 'none' or scaling['name'] != 'llama3':
        return None
    pairs, theta = have['backbone.head_dim'] // 2, have['backbone.theta']
    return nn.frequencies(pairs, theta) / nn.frequencies(pairs, theta, scaling)


def name_of(key: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    if key in NAMES:
        return NAMES[key]
    layer, _, rest = key.removeprefix('model.layers.').partition('.')
    part, _, kind = rest.rpartition('.')
    return f'blk.{layer}.{LAYER_NAMES[part]}.{kind}'


def interleaved(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of every head from (i, i + H/2) to (2i, 2i + 1): the pairs that 'llama' rotates."""
    half = tensor.shape[0] // heads // 2
    out = tensor.reshape(heads, 2, half, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    return np.ascontiguousarray(out)


def write(folder: str, config, flat: Mapping, *, shard_bytes: int, speaks: Mapping,
          dtype: str = 'f16') -> dict:
    """Writes one file model-<dtype>.gguf; see `runtimes.Runtime`.

    dtype: of the matrices, one of DTYPES; rows that q8_0's blocks of 32 do not divide stay f16,
    norms, biases and routers f32. shard_bytes is ignored: llama.cpp maps one file of any size.
    """
    del shard_bytes
    if dtype not in DTYPES:
        raise unknown('dtype', dtype, DTYPES)
    import gguf
    have = facts(config)
    spelled = check(have)
    vocab = model.make_vocab(config)
    given = next((x for x in speaks.get('tokenizer', ()) if x.endswith('tokenizer.json')), '')
    came = bytelevel.read(given, vocab.size) if given and not vocab.tokenizer else None
    arch = ARCHITECTURES[spelled['model_type']]
    shapes = {path: x.shape for path, x in flat.items()}
    plan, factors = list(rules.pieces(rules_of(have), shapes)), rope_factors(have)
    kinds = gguf.GGMLQuantizationType
    wanted = {'f32': kinds.F32, 'f16': kinds.F16, 'q8_0': kinds.Q8_0}[dtype]

    def kind_of(name, shape):
        if len(shape) == 1 or '.ffn_gate_inp.' in name:
            return kinds.F32
        return kinds.F16 if wanted == kinds.Q8_0 and shape[-1] % 32 else wanted

    def tensors():
        if factors is not None:
            yield ROPE_FACTORS, factors.shape, lambda: factors
        for piece in plan:
            yield name_of(piece.key), piece.shape, lambda piece=piece: made(piece)

    def made(piece):
        tensor = rules.forward(piece, flat)
        if arch == 'llama' and '.q_proj.' in piece.key:
            return interleaved(tensor, spelled['num_attention_heads'])
        if arch == 'llama' and '.k_proj.' in piece.key:
            return interleaved(tensor, spelled['num_key_value_heads'])
        return tensor

    file = f'model-{dtype}.gguf'
    writer = gguf.GGUFWriter(os.path.join(folder, file), arch)
    try:
        window = spelled.get('sliding_window')
        context = spelled['max_position_embeddings']
        _metadata(writer, config, spelled, min(context, window or context), dtype)
        if came:
            ids = {k: vocab.specials[k] for k in ('bos', 'eos') if k not in speaks['unstated']}
            bytelevel.add(writer, given, came, ids)
        else:
            _tokenizer(writer, vocab, speaks.get('tokenizer', ()))
        count = size = 0
        for name, shape, _ in tensors():
            kind = kind_of(name, shape)
            n = int(np.prod(gguf.quant_shape_to_byte_shape(shape, kind)))
            writer.add_tensor_info(name, shape, np.dtype(np.float32), n, kind)
            count, size = count + 1, size + n
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, shape, tensor in tensors():
            writer.write_tensor_data(gguf.quants.quantize(tensor(), kind_of(name, shape)))
    finally:
        writer.close()
    return {'bytes': size, 'tensors': count, 'numbers': sum(x.size for x in flat.values()),
            'about': about(file, vocab, window, came)}


def _metadata(writer, config, spelled: Mapping, context: int, dtype: str) -> None:
    import gguf
    writer.add_type('model')
    writer.add_name('jaxsd')
    writer.add_description(f'config {fingerprint(config)}; the sound of units is that of codec '
                           + ', '.join(f'{k} {v}' for k, v in sorted(plain(config.codec).items())))
    writer.add_file_type({'f32': gguf.LlamaFileType.ALL_F32, 'f16': gguf.LlamaFileType.MOSTLY_F16,
                          'q8_0': gguf.LlamaFileType.MOSTLY_Q8_0}[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(spelled['vocab_size'])
    writer.add_context_length(context)
    writer.add_embedding_length(spelled['hidden_size'])
    writer.add_block_count(spelled['num_hidden_layers'])
    writer.add_feed_forward_length(spelled['intermediate_size'])
    writer.add_head_count(spelled['num_attention_heads'])
    writer.add_head_count_kv(spelled['num_key_value_heads'])
    writer.add_key_length(spelled['head_dim'])
    writer.add_value_length(spelled['head_dim'])
    writer.add_rope_dimension_count(spelled['head_dim'])
    writer.add_rope_freq_base(spelled['rope_theta'])
    writer.add_layer_norm_rms_eps(spelled['rms_norm_eps'])
    if (spelled['rope_scaling'] or {}).get('rope_type') == 'linear':
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(spelled['rope_scaling']['factor'])
    if 'num_local_experts' in spelled:
        writer.add_expert_count(spelled['num_local_experts'])
        writer.add_expert_used_count(spelled['num_experts_per_tok'])


def _tokenizer(writer, vocab, files: Sequence[str]) -> None:
    """Every token of the line; without a text tokenizer ids go in and come out.

    files: of the tokenizer that the checkpoint came with, for what they say beside its model.
    """
    if not vocab.tokenizer:
        writer.add_tokenizer_model('none')
        return
    made, around = tokens.line(vocab), {}
    if files:
        made = tokens.with_added(made, files)
        around, template = bytelevel.beside(files[0], len(made.pieces))
        if template:
            writer.add_chat_template(template)
    writer.add_tokenizer_model(MODELS[made.algorithm])
    writer.add_tokenizer_pre('default')
    writer.add_token_list([piece.text for piece in made.pieces])
    writer.add_token_scores([piece.score for piece in made.pieces])
    writer.add_token_types([piece.kind for piece in made.pieces])
    writer.add_bos_token_id(vocab.specials['bos'])
    writer.add_eos_token_id(vocab.specials['eos'])
    for i, piece in enumerate(made.pieces[:made.own]):
        if piece.kind == tokens.UNKNOWN:
            writer.add_unk_token_id(i)
    writer.add_add_bos_token(around.get('bos', True))
    writer.add_add_eos_token(around.get('eos', False))
    writer.add_add_space_prefix(made.prefix)
    writer.add_remove_extra_whitespaces(made.squeeze)
    if made.charsmap and made.algorithm == 'unigram':
        writer.add_precompiled_charsmap(made.charsmap)


def about(file: str, vocab, window: int | None, came: bytelevel.Tokenizer | None) -> str:
    """What the folder is and what its reader must know, for the model card."""
    lines = [f'a model for llama.cpp: `llama-cli -m {file}`, or any program that reads GGUF.']
    if window:
        lines.append(f'The context is {window} columns, the window of its attention: beyond it '
                     'llama.cpp would attend to more than the model was trained to.')
    if came:
        lines.append('Its tokenizer is that of the checkpoint it came from; special tokens are '
                     'shown only with `--special`')
        if came.composed:
            lines[-1] += ('. llama.cpp takes characters as they come: compose them first (NFC), as '
                          'the original does')
    elif not vocab.tokenizer:
        lines.append('It has no text tokenizer: ids go in and come out')
    else:
        made = tokens.line(vocab)
        lines.append('Markers are control tokens and shown only with `--special`; units are '
                     'written like `' + vocab.unit.format(0) + '` and recognized in text')
        if not made.byte_fallback:
            lines[-1] += ('. Its text model has no bytes: llama.cpp cannot read characters that '
                          'are not among its pieces')
    return ' '.join(lines)

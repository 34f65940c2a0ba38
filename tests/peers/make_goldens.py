# SPDX-License-Identifier: Apache-2.0
"""Makes the golden arrays under tests/golden/ from the released PyTorch implementations.

Tiny models with random weights are run by the `moshi` package (LMModel, LMGen, low-rank terms) and
by `transformers` (DECODERS below, Moshi). Each folder receives the weights in the peer's own
on-disk format, the inputs, and what the peer answered, so that the ordinary tests need no PyTorch::

    .peers/bin/python tests/peers/make_goldens.py [FOLDER, default tests/golden]

Nothing is left at an initial value that would let a mistake pass: norm gains are far from one,
biases from zero, windows are shorter than the input, rotary bases are unusual, key and value heads
are fewer than query heads, and weights are large enough for attention to be peaked. Weights are
stored in bfloat16, as released checkpoints are, and run in float32.
"""

import json
import os
import pathlib
import sys
import tempfile

os.environ.setdefault('NO_TORCH_COMPILE', '1')

import numpy as np
import safetensors.torch
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parents[2]

KYUTAI = dict(
    dim=64, text_card=48, existing_text_padding_id=3, n_q=8, dep_q=4, card=32, num_heads=4,
    num_layers=2, hidden_scale=4.125, causal=True, layer_scale=None, context=7, max_period=500,
    gating='silu', norm='rms_norm_f32', positional_embedding='rope', depformer_dim=32,
    depformer_dim_feedforward=int(4.125 * 32), depformer_num_heads=2, depformer_num_layers=2,
    depformer_layer_scale=None, depformer_multi_linear=True, depformer_context=4,
    depformer_max_period=10000, depformer_gating='silu', depformer_pos_emb='none',
    depformer_weights_per_step=True, delays=[0, 0, 1, 1, 1, 0, 1, 1, 1])

SCHEDULED = KYUTAI | dict(      # the later depth steps share a set of weights
    dim=32, text_card=24, n_q=6, dep_q=3, card=16, num_heads=2, num_layers=1, hidden_scale=4,
    context=9, norm='rms_norm', depformer_dim=24, depformer_num_heads=3,
    depformer_dim_feedforward=99, depformer_weights_per_step_schedule=[0, 1, 1],
    delays=[0, 0, 2, 2, 0, 2, 2])

MIMI = dict(    # a codec of no quality, small enough to be made anew by every test
    model_type='mimi', codebook_size=32, num_quantizers=8, hidden_size=32, num_filters=4,
    num_hidden_layers=1, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2,
    head_dim=16, codebook_dim=8, vector_quantization_hidden_dimension=8, upsample_groups=32)

MOSHI = dict(
    vocab_size=40, audio_vocab_size=32, hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
    ffn_dim=128, sliding_window=7, max_position_embeddings=7, rope_theta=500., num_codebooks=3,
    audio_encoder_config=MIMI, depth_decoder_config=dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=48, sliding_window=3,
        max_position_embeddings=4))

DECODERS = {
    'llama': (transformers.LlamaConfig, dict(
        vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=500.,
        max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)),
    'mistral': (transformers.MistralConfig, dict(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-5,
        rope_theta=2000., sliding_window=5, max_position_embeddings=128,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)),
    'qwen2': (transformers.Qwen2Config, dict(
        vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=300.,
        use_sliding_window=False, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2)),
    'llama3': (transformers.LlamaConfig, dict(
        vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5,
        rope_theta=500., rope_scaling=dict(
            rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4.,
            original_max_position_embeddings=32),
        max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)),
    'qwen3': (transformers.Qwen3Config, dict(
        vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6,
        rope_theta=300., use_sliding_window=False, max_position_embeddings=128,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)),
    'mixtral': (transformers.MixtralConfig, dict(
        vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=400.,
        num_local_experts=5, num_experts_per_tok=2, sliding_window=None,
        max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)),
    'helium': (transformers.HeliumConfig, dict(
        vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-8,
        rope_theta=700., max_position_embeddings=128, tie_word_embeddings=False, pad_token_id=0,
        bos_token_id=1, eos_token_id=2)),
}


def shake(model, seed: int, scale: float = 1.4) -> None:
    """Redraws every parameter: gains around one, biases around zero, matrices by their fan-in.

    Values are rounded to bfloat16, so that storing them so loses nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith('audio_encoder'):
                continue
            noise = torch.randn(p.shape, generator=generator)
            if 'norm' in name:
                value = 1 + .3 * noise
            elif name.endswith('.bias'):
                value = .5 * noise
            elif 'emb' in name:
                value = .6 * noise
            # Behind no norm: keeps logits within a few units.
            elif 'linears' in name or 'lm_heads' in name:
                value = .3 * scale * noise / p.shape[-1] ** .5
            else:
                value = scale * noise / p.shape[-1] ** .5
            p.copy_(value.bfloat16().float())


def rotary(values: dict) -> dict:
    """`values` as the installed transformers spells the rotary base and its scaling."""
    if int(transformers.__version__.split('.')[0]) < 5:
        return values
    values = dict(values)
    values['rope_parameters'] = {'rope_type': 'default', 'rope_theta': values.pop('rope_theta')
                                 } | (values.pop('rope_scaling', None) or {})
    return values


def decoder(name: str, seed: int, **changes):
    """A shaken transformers decoder of family `name`, in evaluation mode."""
    config_class, values = DECODERS[name]
    config = config_class(**rotary(values | changes), attn_implementation='eager')
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    shake(model, seed)
    return model


def lm_model(seed: int, **changes):
    """A shaken kyutai LMModel, in evaluation mode."""
    from moshi.models.lm import LMModel
    model = LMModel(**({k: v for k, v in KYUTAI.items()} | changes)).eval()
    shake(model, seed)
    return model


def add_lora(model, seed: int, rank: int, scale: float) -> dict:
    """Low-rank terms for every linear map of an LMModel; returns what moshi-finetune saves."""
    from moshi.modules.lora import replace_all_linear_with_lora
    replace_all_linear_with_lora(model, rank, scale)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'lora' in name:
                size = (.3 if 'lora_B' in name else 1) / p.shape[-1] ** .5
                p.copy_((size * torch.randn(p.shape, generator=generator)).bfloat16().float())
                state[name] = p
    return state


def moshi(seed: int, **changes):
    """A shaken transformers Moshi, in evaluation mode."""
    values = rotary({**MOSHI, **changes, 'audio_encoder_config': dict(MIMI)})
    values['depth_decoder_config'] = dict(values['depth_decoder_config'])
    model = transformers.MoshiForConditionalGeneration(transformers.MoshiConfig(**values)).eval()
    shake(model, seed)
    return model


def moshi_logits(model, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(text [B, T, V], audio [B, Q, T, card]) for the column after each of the first T columns.

    Column by column, since transformers keeps to the window with a cache and not without. Columns
    [B, 1 + 2 Q, T + 1] are as the model is fed: delayed, local ids.
    """
    Q, text, audio = model.num_codebooks, [], []
    cache = transformers.DynamicCache(config=model.config)
    columns = torch.tensor(columns).long()
    for t in range(columns.shape[-1] - 1):
        now = columns[:, :, t:t + 1]
        out = model(input_ids=now[:, 0], moshi_audio_codes=now[:, 1:1 + Q],
                    user_audio_codes=now[:, 1 + Q:], use_cache=True, cache=cache)
        text.append(out.logits)
        audio.append(model.depth_decoder(
            input_ids=columns[:, :Q, t + 1], last_hidden_state=out.last_hidden_state,
            use_cache=False).logits[:, :, None])
    return torch.cat(text, 1).numpy(), torch.cat(audio, 2).numpy()


def moshi_continues(model, codes: np.ndarray, steps: int):
    """What transformers' own `generate` says greedily after `codes` [B, 1 + 2 Q, T].

    Returns its text, its codes, the user's frame of silence, and the narrowest gap of its choices.
    """
    Q, gaps = model.num_codebooks, []

    def watch(module, args, logits):
        top = logits[:, -1].float().topk(2, -1).values
        gaps.append(float((top[..., 0] - top[..., 1]).min()))

    hooks = [m.register_forward_hook(watch)
             for m in (model.decoder.lm_head, model.depth_decoder.lm_heads)]
    codes = torch.tensor(codes).long()
    try:
        out = model.generate(
            input_ids=codes[:, 0], moshi_audio_codes=codes[:, 1:1 + Q],
            user_audio_codes=codes[:, 1 + Q:], max_new_tokens=steps, do_sample=False,
            depth_decoder_do_sample=False, depth_decoder_min_length=Q + 1,
            depth_decoder_max_length=Q + 1, return_audio_waveforms=False, return_audio_codes=True)
    finally:
        for hook in hooks:
            hook.remove()
    rate = model.config.audio_encoder_config
    silence = torch.zeros(len(codes), 1, int(rate.sampling_rate / rate.frame_rate))
    blank = model.audio_encoder.encode(silence, num_quantizers=Q)[0]
    return (out.sequences[:, 1:].numpy().astype(np.int32), out.audio_codes.numpy().astype(np.int32),
            blank[:, :, 0].numpy().astype(np.int32), min(gaps))


def delayed(values: dict, codes: np.ndarray) -> np.ndarray:
    """Codes [B, 1 + 2 Q, T] as a transformers Moshi is fed: [B, 1 + 2 Q, T + 1], local ids."""
    B, rows, T = codes.shape
    out = np.full((B, rows, T + 1), values['audio_vocab_size'])
    out[:, 0, 0] = values['vocab_size']
    for k in range(rows):
        late = int(k > 0 and (k - 1) % values['num_codebooks'] > 0)
        out[:, k, 1 + late:] = codes[:, k, :T - late]
    return out


def codes_for(values: dict, *, seed: int, batch: int, frames: int,
              zeros: float = .08) -> np.ndarray:
    """Random codes [B, 1 + n_q, T] in the peer's own order, some of them -1 (nothing)."""
    rng = np.random.default_rng(seed)
    rows = 1 + values['n_q']
    codes = rng.integers(0, values['card'], (batch, rows, frames))
    codes[:, 0] = rng.integers(0, values['text_card'], (batch, frames))
    codes[rng.random(codes.shape) < zeros] = -1
    return codes.astype(np.int32)


def stream(model, frames: np.ndarray) -> tuple[np.ndarray, float]:
    """What LMGen answers greedily to the user's `frames` [B, user rows, steps], and the narrowest
    gap between a chosen token's score and the runner-up's: greedy answers are only comparable
    between implementations where this is well above rounding."""
    from moshi.models.lm import LMGen
    gaps = []

    def watch(logits):
        top = logits.float().topk(2, -1).values
        gaps.append(float((top[..., 0] - top[..., 1]).min()))

    plain = model.forward_depformer

    def watched(*args):
        logits = plain(*args)
        watch(logits)
        return logits

    model.forward_depformer = watched
    try:
        lm_gen = LMGen(model, use_sampling=False, check=True, on_text_logits_hook=watch)
        with lm_gen.streaming(frames.shape[0]):
            outs = [lm_gen.step(torch.tensor(frames[:, :, s:s + 1]).long())
                    for s in range(frames.shape[-1])]
    finally:
        model.forward_depformer = plain
    said = torch.cat([o for o in outs if o is not None], -1)
    return said.numpy().astype(np.int32), min(gaps)


def on_disk(model) -> dict:
    """The tensors as the peer saves them: transformers stacks experts in memory, not in files."""
    if not hasattr(model, 'save_pretrained'):
        return model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return safetensors.torch.load_file(pathlib.Path(folder) / 'model.safetensors')


def write(folder: pathlib.Path, model, config: dict, arrays: dict, made: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.bfloat16().contiguous() for k, v in on_disk(model).items()
             if not k.startswith('audio_encoder.')}
    safetensors.torch.save_file(state, folder / 'model.safetensors', metadata={'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps(config, indent=1, sort_keys=True) + '\n')
    np.savez_compressed(folder / 'arrays.npz', **arrays)
    made = {'command': 'python tests/peers/make_goldens.py', 'torch': torch.__version__,
            'python': sys.version.split()[0]} | made
    (folder / 'made.json').write_text(json.dumps(made, indent=1, sort_keys=True) + '\n')
    size = sum(p.stat().st_size for p in folder.iterdir())
    print(f'{folder.name}: {size / 1e3:.0f} kB', {k: v.shape for k, v in arrays.items()}, made)


def make_kyutai(folder: pathlib.Path) -> None:
    import moshi
    model = lm_model(20)
    codes = codes_for(KYUTAI, seed=1, batch=2, frames=12)
    with torch.no_grad():
        out = model(torch.tensor(codes).long())
    users = KYUTAI['n_q'] - KYUTAI['dep_q']
    heard = np.random.default_rng(2).integers(0, KYUTAI['card'], (2, users, 18)).astype(np.int32)
    said, gap = stream(model, heard)
    if gap < 1e-3:
        raise SystemExit(f'kyutai: a greedy choice hangs on {gap:.1e}; take another seed')
    arrays = dict(codes=codes, text_logits=out.text_logits.numpy(), logits=out.logits.numpy(),
                  text_mask=out.text_mask.numpy(), mask=out.mask.numpy(), heard=heard, said=said)
    write(folder / 'kyutai', model, KYUTAI, arrays,
          {'moshi': moshi.__version__, 'seed': 20, 'narrowest_greedy_gap': gap})


def make_decoder(folder: pathlib.Path, name: str, seed: int) -> None:
    model = decoder(name, seed)
    vocab = model.config.vocab_size
    tokens = np.random.default_rng(seed).integers(0, vocab, (2, 24)).astype(np.int32)
    with torch.no_grad():
        logits = model(torch.tensor(tokens).long()).logits
        model.set_attn_implementation('sdpa')
        second = model(torch.tensor(tokens).long()).logits
    drift = float((logits - second).abs().max())
    if drift > 1e-4:
        raise SystemExit(f'{name}: eager and sdpa attention differ by {drift}')
    ids = torch.tensor(tokens[:, :8]).long()
    gap = float('inf')
    with torch.no_grad():
        for _ in range(16):
            last = model(ids).logits[:, -1]
            top = last.topk(2, -1).values
            gap = min(gap, float((top[:, 0] - top[:, 1]).min()))
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
    if gap < 1e-3:
        raise SystemExit(f'{name}: a greedy choice hangs on {gap:.1e}; take another seed')
    config = json.loads(model.config.to_json_string(use_diff=False))
    if name in ('mistral', 'llama3', 'mixtral'):    # the older spelling, which 5 still reads
        rope = config.pop('rope_parameters')
        config['rope_theta'] = rope.pop('rope_theta')
        config['rope_scaling'] = None if rope['rope_type'] == 'default' else rope
    config = {k: v for k, v in config.items() if v is not None or k == 'rope_scaling'}
    config['dtype'] = 'bfloat16'
    labels = tokens.copy()      # of which some do not count
    labels[0, :5], labels[1, -3:], labels[:, 11] = -100, -100, -100
    with torch.no_grad():
        loss = model(torch.tensor(tokens).long(), labels=torch.tensor(labels).long()).loss
    arrays = dict(tokens=tokens, logits=logits.numpy(), prompt=tokens[:, :8], labels=labels,
                  greedy=ids[:, 8:].numpy().astype(np.int32), loss=loss.numpy())
    write(folder / name, model, config, arrays,
          {'transformers': transformers.__version__, 'seed': seed, 'narrowest_greedy_gap': gap,
           'eager_minus_sdpa': drift})


def make_scheduled(folder: pathlib.Path) -> None:
    """With and without low-rank terms, which lie beside it as moshi-finetune leaves them."""
    import moshi
    model = lm_model(31, **SCHEDULED)
    codes = codes_for(SCHEDULED, seed=3, batch=2, frames=14)
    heard = np.random.default_rng(4).integers(0, SCHEDULED['card'], (2, 3, 20)).astype(np.int32)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    arrays, gaps = dict(codes=codes, heard=heard), []
    for prefix in ('', 'lora_'):
        if prefix:
            terms = add_lora(model, 29, rank=2, scale=2.0)
        with torch.no_grad():
            out = model(torch.tensor(codes).long())
        said, gap = stream(model, heard)
        gaps.append(gap)
        arrays |= {prefix + k: v for k, v in dict(
            text_logits=out.text_logits.numpy(), logits=out.logits.numpy(), said=said).items()}
    if min(gaps) < 1e-3:
        raise SystemExit(f'kyutai_scheduled: a greedy choice hangs on {gaps}; take another seed')
    plain = lm_model(31, **SCHEDULED)
    plain.load_state_dict(state)
    write(folder / 'kyutai_scheduled', plain, SCHEDULED, arrays,
          {'moshi': moshi.__version__, 'seed': 31, 'narrowest_greedy_gap': min(gaps)})
    beside = folder / 'kyutai_scheduled' / 'lora'
    beside.mkdir(exist_ok=True)
    safetensors.torch.save_file({k: v.detach().bfloat16().contiguous() for k, v in terms.items()},
                                beside / 'lora.safetensors')
    values = SCHEDULED | dict(lora=True, lora_rank=2, lora_scaling=2.0)
    (beside / 'config.json').write_text(json.dumps(values, indent=1, sort_keys=True) + '\n')


def make_moshi(folder: pathlib.Path) -> None:
    model = moshi(31)
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 32, (2, 7, 12)).astype(np.int32)
    with torch.no_grad():
        text, audio = moshi_logits(model, delayed(MOSHI, codes))
        said_text, said, blank, gap = moshi_continues(model, codes[:, :, :4], 16)
    if gap < 1e-3:
        raise SystemExit(f'kyutai_hf: a greedy choice hangs on {gap:.1e}; take another seed')
    config = json.loads(model.config.to_json_string(use_diff=False))
    config = {k: v for k, v in config.items() if v is not None} | {'dtype': 'bfloat16'}
    write(folder / 'kyutai_hf', model, config,
          dict(codes=codes, text_logits=text, logits=audio, said_text=said_text, said=said,
               blank=blank),
          {'transformers': transformers.__version__, 'seed': 31, 'narrowest_greedy_gap': gap})


SPOKEN = [f'<|unit_{i}|>' for i in range(9)]
TEXTS = (       # without letters apart from their accents: llama.cpp does not compose them
    'the cat sat on the mat', " She SELLS shells; they'Ll say I'm, you'RE, 'tis",
    '1 22 333 4444 55555',
    'tabs\tand  two   three    spaces \n\n lines\r\n end ', 'ﬁne ½ Ⅷ ²³ ١٢٣٤ naïve façade',
    'Straße, 日本語のテキスト 안녕하세요 привет мир',
    '\U0001f680\U0001f636‍\U0001f32b️ (emoji) ✅!!!???...',
    '<|unit_3|><|unit_8|>the sea <|unit_0|> sat<|unit_3|>', '<|unit_12|> <|unit_ 1|>', '',
    '<|start|>the dog<|end|>', '\u3000wide\u00a0space', "'''''' ```````\"\"\"\"......!!!", 'a', ' ')
BYTE_LEVEL = {      # how many digits are a word, whether words that are tokens are so at once, NFC
    'three_digits': ('{1,3}', True, False), 'one_digit': ('', False, True)}


def byte_level(digits: str, at_once: bool, composed: bool):
    """A tokenizer of the kind of Llama 3 (three digits) or Qwen2 (one), with units added.

    Where words that are tokens are so at once, the pairs that make up one such word are left out.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
    made = tokenizers.Tokenizer(models.BPE())
    if composed:
        made.normalizer = normalizers.NFC()
    pattern = transformers.models.qwen2.tokenization_qwen2.PRETOKENIZE_REGEX
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(pattern.replace(r'\p{N}|', rf'\p{{N}}{digits}|')),
                             'isolated', False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [*TEXTS[:6], 'the sea sells the shells on the mat'] * 9, tokenizers.trainers.BpeTrainer(
            vocab_size=360, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False))
    said = json.loads(made.to_str())
    if at_once:
        said['model']['ignore_merges'] = True
        said['model']['merges'] = [m for m in said['model']['merges'] if ''.join(m) != 'Ġmat']
    made = tokenizers.Tokenizer.from_str(json.dumps(said))
    made.add_special_tokens(['<|start|>', '<|end|>'])
    made.add_tokens([tokenizers.AddedToken(unit, normalized=False) for unit in SPOKEN])
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    if not composed:
        made.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=True), processors.TemplateProcessing(
                single='<|start|> $A', pair='<|start|> $A <|start|> $B',
                special_tokens=[('<|start|>', made.token_to_id('<|start|>'))])])
    return made


def make_byte_level(folder: pathlib.Path) -> None:
    import tokenizers
    for name, kind in BYTE_LEVEL.items():
        made, out = byte_level(*kind), folder / 'byte_level' / name
        out.mkdir(parents=True, exist_ok=True)
        said = dict(bos_token=None if kind[2] else '<|start|>', eos_token='<|end|>',
                    tokenizer_class='PreTrainedTokenizerFast',
                    chat_template='{{ messages[0].content }}<|end|>')
        for file, value in (
                ('tokenizer.json', json.loads(made.to_str())), ('tokenizer_config.json', said),
                ('ids.json', [[text, made.encode(text).ids] for text in TEXTS]),
                ('made.json', {'tokenizers': tokenizers.__version__})):
            (out / file).write_text(json.dumps(value, ensure_ascii=False) + '\n')


def main() -> None:
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / 'tests' / 'golden'
    torch.set_num_threads(1)
    make_kyutai(folder)
    make_scheduled(folder)
    make_moshi(folder)
    make_byte_level(folder)
    for seed, name in enumerate(DECODERS, 21):
        make_decoder(folder, name, seed)


if __name__ == '__main__':
    main()

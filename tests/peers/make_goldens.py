# SPDX-License-Identifier: Apache-2.0
"""Makes the golden arrays under tests/golden/ from the released PyTorch implementations.

Tiny models with random weights are run by the `moshi` package (LMModel, LMGen) and by
`transformers` (DECODERS below). Each folder receives the weights in the peer's own on-disk
format, the inputs, and what the peer answered, so that the ordinary tests need no PyTorch::

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
            noise = torch.randn(p.shape, generator=generator)
            if 'norm' in name:
                value = 1 + .3 * noise
            elif name.endswith('.bias'):
                value = .5 * noise
            elif 'emb' in name:
                value = .6 * noise
            elif name.startswith('linears'):    # behind no norm: keeps logits within a few units
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
    state = {k: v.bfloat16().contiguous() for k, v in on_disk(model).items()}
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


def main() -> None:
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / 'tests' / 'golden'
    torch.set_num_threads(1)
    make_kyutai(folder)
    for seed, name in enumerate(DECODERS, 21):
        make_decoder(folder, name, seed)


if __name__ == '__main__':
    main()

# SPDX-License-Identifier: Apache-2.0
"""Facts that several configs share: backbone sizes, codecs, and how a config is made small.

Sizes of released models are read from their own config files and code; each names its source.
"""


def llama2_7b(**options) -> dict:
    """Llama-2 7B (meta-llama/Llama-2-7b config.json): 6,738,415,616 parameters with 32k text."""
    return dict(name='decoder', width=4096, layers=32, heads=32, kv_heads=32, head_dim=128,
                mlp=11008, theta=10_000.0, norm_eps=1e-5) | options


def helium_7b(**options) -> dict:
    """Helium 7B (kyutai-labs/moshi models/loaders.py): interleaved rotary, gains in float32."""
    return dict(name='decoder', width=4096, layers=32, heads=32, kv_heads=32, head_dim=128,
                mlp=11264, theta=10_000.0, pairs='interleaved', norm_eps=1e-8,
                norm_gain='early') | options


def mistral_7b(**options) -> dict:
    """Mistral 7B v0.1 (mistralai/Mistral-7B-v0.1 config.json): a window of 4,096."""
    return dict(name='decoder', width=4096, layers=32, heads=32, kv_heads=8, head_dim=128,
                mlp=14336, theta=10_000.0, window_columns=4096, norm_eps=1e-5) | options


def llama3_8b(**options) -> dict:
    """Llama 3 8B (meta-llama/Meta-Llama-3-8B config.json)."""
    return dict(name='decoder', width=4096, layers=32, heads=32, kv_heads=8, head_dim=128,
                mlp=14336, theta=500_000.0, norm_eps=1e-5) | options


def qwen2_05b(**options) -> dict:
    """Qwen2 and Qwen2.5 at 0.5B (their config.json): a tied head, 151,936 ids of text."""
    return dict(name='decoder', width=896, layers=24, heads=14, kv_heads=2, head_dim=64, mlp=4864,
                theta=1_000_000.0, qkv_bias=True, norm_eps=1e-6) | options


def qwen2_7b(**options) -> dict:
    """Qwen2.5 7B (Qwen/Qwen2.5-7B config.json): 152,064 ids of text, an untied head."""
    return dict(name='decoder', width=3584, layers=28, heads=28, kv_heads=4, head_dim=128,
                mlp=18944, theta=1_000_000.0, qkv_bias=True, norm_eps=1e-6) | options


def llama31_8b(**options) -> dict:
    """Llama 3.1 8B (its config.json): Llama 3's sizes with slower positions."""
    return llama3_8b(rope_scaling=llama3_scaling(8.0)) | options


def llama3_scaling(factor: float) -> dict:
    """How Llama 3.1 (factor 8) and 3.2 (factor 32) slow their rotary positions (config.json)."""
    return dict(name='llama3', factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                original_columns=8192)


def rows(count: int) -> tuple[str, ...]:
    """Names of rows of speech."""
    return tuple(f'audio {k}' for k in range(count))


def small(like: dict, *, width: int, layers: int, heads: int, mlp: int, **options) -> dict:
    """A backbone of the same kind as `like` at another size, in one piece for a small machine."""
    return dict(like) | dict(width=width, layers=layers, heads=heads, kv_heads=heads,
                       head_dim=width // heads, mlp=mlp, remat='none') | options


DEMO = 'data/demo'
"""Where `python -m data_pipelines.demo` puts its corpus unless told otherwise."""
PAIRS = 'data/pairs'
"""Where the scripts of `launch` let `python -m data_pipelines.minimal_pairs` put its pairs."""


def demo_units() -> dict:
    """The demo corpus' own k-means units on log-mel frames: acoustic units, not HuBERT."""
    return dict(name='kmeans', path=f'{DEMO}/units.safetensors', frame_hz=25.0, size=500,
                codebooks=1)


def demo_codec() -> dict:
    """The demo corpus' own residual quantizer of log-mel frames at 12.5 Hz."""
    return dict(name='rvq', path=f'{DEMO}/codec.safetensors', frame_hz=12.5, codebooks=8, size=256)


def turn_taking(source: str, **options) -> dict:
    """Who speaks when in the demo corpus' dialogues, whose backchannels are these."""
    return dict(name='turn_taking', source=source, murmurs=('uh huh', 'okay', 'right')) | options


DEMO_TEXT = dict(text_tokens=320, tokenizer=f'{DEMO}/text.model')
"""The demo corpus' sentencepiece model: every word of its closed vocabulary is one piece."""


DEMO_PHONES = tuple(f'/{phone}/' for phone in (
    'b d f h i j k l m n p s t tʃ v w z æ ð ŋ ɡ ɹ θ ə ɐ ɑː ɑːɹ ɒ ɔ ɔː ɔːɹ ɔɪ ɚ ɛ ɛə ɛɹ ɜː ɪ ʊ ʌ uː '
    'iː iə eə eɪ aɪ aʊ oʊ əl əɪ əʊ').split())
"""The phones of the demo corpus without their stress, as markers."""


def demo_answers(c, *, stages, evals=('voice',)) -> None:
    """The demo corpus and usual demo training for `c`: stages are (name, data, options)."""
    c.data.path = DEMO
    start, made = 'init', []
    for name, data, options in stages:
        made.append(dict(name=name, batch=16, schedule='cosine', warmup_steps=40, final_lr=0.05,
                         weight_decay=0.05, save_steps=200, log_steps=20, probe_steps=200,
                         start=start, data=data) | options)
        start = name
    c.stages = tuple(made)
    c.evals = dict(likelihood=dict(name='likelihood', sources=evals))


DEMO_EAR = dict(name='listener', features=640, inside=96, layers=2, heads=4, mlp=256)
"""A small encoder of 8 log-mel frames (80 ms) a column, trained with the rest."""


def tiny(c, *, columns: int, steps: int = 2, batch: int = 8) -> None:
    """Makes every stage of `c` two steps over small rows, for tests of the machinery."""
    c.columns = columns
    c.stages = tuple(dict(s) | dict(steps=steps, batch=batch, lr=1e-2, warmup_steps=0, log_steps=1,
                                    save_steps=steps, accumulate=1, probe_steps=0)
                     for s in c.stages)


def demo_decoder(like: dict, **options) -> dict:
    """A backbone of the same kind at about 3 M parameters, for the demo corpus on a CPU."""
    return small(like, width=160, layers=5, heads=4, mlp=448,
                 **dict(theta=10_000.0, block_columns=64) | options)


def demo_stage(name: str, steps: int, data: dict, **options) -> dict:
    """A stage of the demo corpus: minutes on two CPU cores."""
    return dict(name=name, steps=steps, batch=16, lr=3e-3, schedule='cosine', warmup_steps=40,
                final_lr=0.05, weight_decay=0.05, data=data, save_steps=100, log_steps=10,
                probe_steps=100) | options

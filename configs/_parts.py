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


def small(like: dict, *, width: int, layers: int, heads: int, mlp: int, **options) -> dict:
    """A backbone of the same kind as `like` at another size, in one piece for a small machine."""
    return dict(like) | dict(width=width, layers=layers, heads=heads, kv_heads=heads,
                       head_dim=width // heads, mlp=mlp, remat='none') | options


DEMO = 'data/demo'
"""Where `python -m data_pipelines.demo` puts its corpus unless told otherwise."""


def demo_units() -> dict:
    """The demo corpus' own k-means units on log-mel frames: acoustic units, not HuBERT."""
    return dict(name='kmeans', path=f'{DEMO}/units.safetensors', frame_hz=25.0, size=500,
                codebooks=1)


def demo_codec() -> dict:
    """The demo corpus' own residual quantizer of log-mel frames at 12.5 Hz."""
    return dict(name='rvq', path=f'{DEMO}/codec.safetensors', frame_hz=12.5, codebooks=8, size=256)


DEMO_TEXT = dict(text_tokens=320, tokenizer=f'{DEMO}/text.model')
"""The demo corpus' sentencepiece model: every word of its closed vocabulary is one piece."""


def tiny(c, *, columns: int, steps: int = 2, batch: int = 8) -> None:
    """Makes every stage of `c` two steps over small rows, for tests of the machinery."""
    c.columns = columns
    c.stages = tuple(dict(s) | dict(steps=steps, batch=batch, lr=1e-2, warmup_steps=0, log_steps=1,
                                    save_steps=steps, accumulate=1, probe_steps=0)
                     for s in c.stages)

# SPDX-License-Identifier: Apache-2.0
"""The same question as isoflop.py, for 0.4 to 7 billion parameters and what a pod computes.

`ablate --dry-run` (with --config.data.path and codec of your own) says how many steps each budget
buys each size; `jaxsd plan --config configs/spirit_lm.py --topology v5p:8x8x8` with the changes of
an arm says what they take. `ablate` itself trains an arm in one process; one that needs several
hosts is trained by `jaxsd train` with those changes.
"""


def sized(name: str, width: int, layers: int, mlp: int) -> tuple[str, ...]:
    heads = width // 128
    sizes = dict(width=width, layers=layers, heads=heads, kv_heads=heads, mlp=mlp)
    return (name, *(f'--config.backbone.{k}={n}' for k, n in sizes.items()))


QUESTION = dict(
    question='How should the computation of a pod be shared out between size and data?',
    base=('configs/spirit_lm.py', "--config.evals={'likelihood': {'name': 'likelihood', "
          "'sources': ('aligned',)}}", '--config.stages[0].schedule=cosine',
          '--config.stages[0].warmup_steps=500', '--config.stages[0].lr=3e-4'),
    arms=(sized('400m', 1024, 24, 2816), sized('1b', 2048, 24, 5632), sized('3b', 3072, 26, 8192),
          sized('7b', 4096, 32, 11008)),
    budget=dict(flops=(1e20, 3e20, 1e21)),
    seeds=(0,),
    metrics=(('likelihood', 'aligned/loss/tokens', 'lower'),),
    law=('likelihood', 'aligned/loss/tokens'),
    items=2000,
    limits='One learning rate for all sizes; every size begins with nothing, where the system '
           'itself goes on from a text model.')

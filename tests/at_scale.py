# SPDX-License-Identifier: Apache-2.0
"""Makes a checkpoint of any size and measures the host memory that importing it takes.

    python tests/at_scale.py make FOLDER GIGABYTES      a Llama of random float32 numbers
    python tests/at_scale.py import FOLDER '{"fsdp": 2, "tensor": 2}'

The second prints one JSON line. On a CPU the arrays of its own devices lie in host memory too, so
they are subtracted: what is left is what an accelerator's host would need. `above_bytes` counts
from where the process stood before, with jax and the devices awake; `process_bytes` counts the
interpreter and every library too.
"""

import json
import os
import sys
import time

import numpy as np

WIDTH, MLP, HEADS, VOCAB = 2048, 8192, 16, 64_000
PER_LAYER = 4 * WIDTH * WIDTH + 3 * WIDTH * MLP + 2 * WIDTH


def make(folder: str, gigabytes: float) -> int:
    """Writes a Llama of at least so many 10^9 bytes; returns its bytes. One tensor at a time."""
    from jaxsd.export import safetensors
    layers = max(1, int(np.ceil((gigabytes * 1e9 / 4 - 2 * VOCAB * WIDTH) / PER_LAYER)))
    shapes = {'model.embed_tokens.weight': (VOCAB, WIDTH), 'lm_head.weight': (VOCAB, WIDTH),
              'model.norm.weight': (WIDTH,)}
    for i in range(layers):
        layer = f'model.layers.{i}.'
        shapes |= {layer + f'self_attn.{x}_proj.weight': (WIDTH, WIDTH) for x in 'qkvo'}
        shapes |= {layer + f'mlp.{x}_proj.weight': (MLP, WIDTH) for x in ('gate', 'up')}
        shapes |= {layer + 'mlp.down_proj.weight': (WIDTH, MLP),
                   layer + 'input_layernorm.weight': (WIDTH,),
                   layer + 'post_attention_layernorm.weight': (WIDTH,)}
    os.makedirs(folder)
    config = dict(architectures=['LlamaForCausalLM'], model_type='llama', vocab_size=VOCAB,
                  hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=layers,
                  num_attention_heads=HEADS, num_key_value_heads=HEADS, rms_norm_eps=1e-5,
                  rope_theta=1e4, tie_word_embeddings=False)
    with open(os.path.join(folder, 'config.json'), 'w') as f:
        json.dump(config, f)
    return safetensors.write(folder, shapes, (tensor(k, s) for k, s in shapes.items()),
                             shard_bytes=1 << 30)


def tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor `key`: a stretch of random numbers, repeated; quick, and no two are alike."""
    rng = np.random.default_rng(list(key.encode()))
    return np.resize(rng.standard_normal(1_000_003, np.float32), shape)


def memory(name: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS (now) or VmHWM (the most since it was reset)."""
    with open('/proc/self/status') as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith(name + ':'))


def measure(folder: str, mesh: dict) -> dict:
    """Imports `folder` onto `mesh` and says what it took."""
    import jax

    from jaxsd import export
    jax.block_until_ready([jax.numpy.zeros(8, device=d) for d in jax.devices()])
    before = memory('VmRSS')
    with open('/proc/self/clear_refs', 'w') as f:
        f.write('5')                # starts VmHWM anew
    start = time.perf_counter()
    lm = export.load(folder, mesh=mesh)
    jax.block_until_ready(lm.params)
    seconds, most = time.perf_counter() - start, memory('VmHWM')
    leaves = jax.tree.leaves(lm.params)
    held = sum(s.data.nbytes for x in leaves for s in x.addressable_shards)
    largest = 4 * VOCAB * WIDTH
    blocks = lm.params['backbone']['blocks']
    for i in (0, blocks['q']['kernel'].shape[0] - 1):       # and it is the right numbers
        key = f'model.layers.{i}.mlp.up_proj.weight'
        np.testing.assert_array_equal(np.asarray(blocks['gate_up']['kernel'][i, 5, 1]),
                                      tensor(key, (MLP, WIDTH))[:, 5])
    np.testing.assert_array_equal(np.asarray(lm.params['head']['out']['kernel'][7]),
                                  tensor('lm_head.weight', (VOCAB, WIDTH))[:, 7])
    return dict(mesh=mesh, devices=len(leaves[0].sharding.device_set),
                model_bytes=sum(x.nbytes for x in leaves), array_bytes=held,
                largest_tensor_bytes=largest, bound_bytes=max(2 << 30, 3 * largest),
                above_bytes=most - before - held, process_bytes=most - held,
                seconds=round(seconds, 1))


if __name__ == '__main__':
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if sys.argv[1] == 'make':
        print(make(sys.argv[2], float(sys.argv[3])))
    else:
        print(json.dumps(measure(sys.argv[2], json.loads(sys.argv[3]))))

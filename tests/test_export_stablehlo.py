# SPDX-License-Identifier: Apache-2.0
"""Does an exported program, in a process that has only jax, say what the model says?"""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import released

from jaxsd import export, generate, model
from jaxsd.config import ConfigError
from jaxsd.export import stablehlo

CASES = {       # a window and grouped keys; a depth head
    'flat': released.decoder('mistral'),
    'streams': released.multistream(),
}
CASES['streams'].codec.codebooks = 2
PROMPT, STEPS = 6, 16

CONSUMER = '''
import re
import sys

sys.modules['jaxsd'] = None         # from here on, importing it is an ImportError
program = re.search('```python\\n(.*?)```', open('README.md').read(), re.DOTALL)[1]
exec(program)
given = np.load('given.npz')
said = speak(given['prompt'], int(given['steps']))
logits = scores(weights, given['tokens'], given['segment'], given['position'])
drawn, at = [], np.tile(np.arange(6, dtype=np.int32), (2, 1))
for noise in given['noise']:        # what is known stays, what is free is drawn
    out = step(weights, empty_cache(b=2, c=22), given['prompt'], np.ones_like(at), at,
               given['plan'], noise, given['temperature'])
    drawn.append(np.asarray(out['column']))
assert not [name for name in sys.modules if name.startswith(('jaxsd.', 'flax'))]
np.savez('made.npz', said=said, drawn=np.stack(drawn), **logits,
         **{'step ' + k: v for k, v in out['scores'].items()})
'''


def packed(config, seed: int, columns: int) -> dict:
    """Two rows of random columns, one of two segments and padding; some cells hold nothing."""
    rng = np.random.default_rng(seed)
    rows = model.make_vocab(config).rows
    tokens = np.stack([rng.integers(r.start, r.start + r.size, (2, columns)) for r in rows], 1)
    tokens[1, -1, 4] = -1
    segment, position = np.ones((2, columns), int), np.tile(np.arange(columns), (2, 1))
    segment[0, 4:14], segment[0, 14:], position[0, 4:14] = 2, 0, np.arange(10)
    tokens[0, :, 14:] = -1
    return whole(tokens, segment, position)


def whole(tokens, segment=None, position=None) -> dict:
    B, _, T = tokens.shape
    return {'tokens': tokens.astype(np.int32),
            'segment': np.asarray(np.ones((B, T)) if segment is None else segment, np.int32),
            'position': np.asarray(np.tile(np.arange(T), (B, 1)) if position is None else position,
                                   np.int32)}


@pytest.mark.parametrize('name', CASES)
def test_runs_without_us(name, tmp_path):
    """Against the path that trains: blocks of attention, no cache, all depth steps at once."""
    config = CASES[name]
    params, rows = released.random_params(config, 3), model.make_vocab(config).rows
    made = export.save(config, params, str(tmp_path / 'out'), 'stablehlo')
    assert {'scores.bin', 'step.bin', 'signature.json', 'model.safetensors',
            'vocabulary.json', 'provenance.json', 'generation_config.json', 'README.md'} == set(
                made['files'])
    batch = packed(config, 1, PROMPT + STEPS)
    rng = np.random.default_rng(2)
    prompt = np.stack([rng.integers(r.start, r.start + r.size - 1, (2, PROMPT)) for r in rows],
                      1).astype(np.int32)
    plan = np.full((2, len(rows)), stablehlo.FREE, np.int32)
    plan[0, 0], plan[1, -1] = rows[0].start + 5, rows[-1].start + 1
    noise = rng.random((40, 2, len(rows)), np.float32)
    temperature = np.full(len(rows), .5, np.float32)
    np.savez(tmp_path / 'out' / 'given.npz', prompt=prompt, steps=STEPS, plan=plan, noise=noise,
             temperature=temperature, **batch)
    subprocess.run([sys.executable, '-c', CONSUMER], cwd=tmp_path / 'out', check=True)
    found = dict(np.load(tmp_path / 'out' / 'made.npz'))

    scores = jax.jit(lambda params, batch: released.bound(config, params).scores(batch))
    real, said = batch['segment'] > 0, found['said']
    spoken = scores(params, whole(np.concatenate([prompt, said], 2)))
    for k, (row, logits) in enumerate(zip(rows, scores(params, batch), strict=True)):
        assert (logits is not None) == (row.name in found)
        if logits is None:
            assert (said[:, k] == -1).all()
            continue
        assert found[row.name].std() > .5
        np.testing.assert_allclose(found[row.name][real], np.asarray(logits)[real], atol=2e-5)
        best = np.asarray(spoken[k]).argmax(-1)[:, PROMPT - 1:-1] + row.start
        np.testing.assert_array_equal(said[:, k], best)
    check_draws(rows, found, plan, noise, temperature)


def check_draws(rows, found, plan, noise, temperature):
    """Each free cell is the token whose stretch of cumulative probability holds the noise."""
    for k, row in enumerate(rows):
        for b in range(2):
            drawn = found['drawn'][:, b, k]
            if plan[b, k] != stablehlo.FREE:
                assert (drawn == plan[b, k]).all()
            elif not row.predicted:
                assert (drawn == -1).all()
            elif k == 0:        # later rows depend on what was drawn before them
                p = np.exp(found[f'step {row.name}'][b].astype(np.float64) / temperature[k])
                edges = np.concatenate([[0], np.cumsum(p / p.sum())])
                token = drawn - row.start
                assert len(set(token)) > 3
                assert (edges[token] - 1e-5 <= noise[:, b, k]).all()
                assert (noise[:, b, k] <= edges[token + 1] + 1e-5).all()


def test_nothing_of_this_machine_is_baked_in(tmp_path):
    """Symbolic sizes, one program for three platforms, layers in a loop even though CPU unrolls."""
    from jax import export as jax_export
    config = released.multistream(layers=5)
    config.codec.codebooks = 2
    export.save(config, released.random_params(config, 1), str(tmp_path / 'out'), 'stablehlo')
    signature = json.loads((tmp_path / 'out' / 'signature.json').read_text())
    for name, program in signature['programs'].items():
        made = jax_export.deserialize(bytearray((tmp_path / 'out' / program['file']).read_bytes()))
        assert made.platforms == ('cpu', 'cuda', 'tpu')
        text = made.mlir_module()
        assert not re.search(r'threefry|stablehlo\.(rng|custom_call @(?!shape_assertion))', text)
        # One loop over the backbone's layers, one over the head's for each of its two steps.
        assert text.count('stablehlo.while') == 3
        assert {str(d) for a in made.in_avals for d in a.shape if not isinstance(d, int)} == {
            'scores': {'b', 't'}, 'step': {'b', 't', 'c'}}[name]
        named = [a for a in program['arguments'] if a['name'] not in ('weights', 'cache')]
        assert [[d if isinstance(d, int) else str(d) for d in a.shape]
                for a in made.in_avals[-len(named):]] == [a['shape'] for a in named]
    assert stablehlo.FREE == generate.FREE == signature['free']


def test_refused(tmp_path, monkeypatch):
    config = released.decoder('llama')
    params = released.random_params(config, 1)
    with pytest.raises(ConfigError, match="has no option 'dtype'"):
        export.save(config, params, str(tmp_path / 'out'), 'stablehlo', dtype='f16')
    with pytest.raises(ConfigError, match="^dtype has no option 'f16'"):
        export.save(config, params, str(tmp_path / 'out'), 'hf', dtype='f16')
    with pytest.raises(ValueError, match='the parameters are not those of the config: backbone'):
        export.save(released.decoder('qwen2'), params, str(tmp_path / 'out'), 'stablehlo')
    with pytest.raises(ValueError, match='lora scale'):
        export.save(config, released.random_params(config, 1, dict(rank=2, scale=.5)),
                    str(tmp_path / 'out'), 'stablehlo')
    listening = released.decoder('llama')
    listening.frontend = dict(name='summed', encoder=dict(name='mlp', features=4, hidden=4))
    for format in ('stablehlo', 'hf'):
        with pytest.raises(ConfigError, match=f"frontend.encoder is 'mlp'; format '{format}' can "):
            export.save(listening, released.random_params(listening, 1), str(tmp_path / 'out'),
                        format)
    for slot, options, said in (
            ('frontend', dict(name='summed', prenet=dict(name='mlp', features=4, hidden=4)),
             "frontend.prenet is 'mlp'"),
            ('head', dict(name='flowing', latents=4), 'head.latents is 4')):
        sounding = released.decoder('llama')
        sounding[slot] = options
        with pytest.raises(ConfigError, match=f'{said}; format .* only read and speak columns'):
            stablehlo.check(sounding, 'stablehlo')
    monkeypatch.setitem(sys.modules, 'flatbuffers', None)
    with pytest.raises(ConfigError, match=r"needs the package flatbuffers: pip install 'jaxsd\["):
        export.save(config, params, str(tmp_path / 'out'), 'stablehlo')
    monkeypatch.setitem(sys.modules, 'jax2onnx', None)
    with pytest.raises(ConfigError, match=r"'jaxsd\[onnx\]', then pip install --no-deps 'jax2onnx"):
        export.save(config, params, str(tmp_path / 'out'), 'onnx')
    assert not list(tmp_path.iterdir())

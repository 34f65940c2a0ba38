# SPDX-License-Identifier: Apache-2.0
"""Does an exported ONNX program, in a process that has only onnxruntime, say what the model says?

Needs jax2onnx, so it runs where the peers are (`make test-peers`).
"""

import logging
import subprocess
import sys

import numpy as np
import pytest
import released

from jaxsd import export, model
from jaxsd.config import ConfigError

pytestmark = pytest.mark.peers
PROMPT, STEPS, TOLERANCE = 6, 16, 1e-4

CASES = {
    'llama': released.decoder('llama'),
    'llama3': released.decoder('llama3'),
    'mistral': released.decoder('mistral'),         # whose window the sixteen steps leave
    'qwen2': released.decoder('qwen2'),
    'qwen3': released.decoder('qwen3'),
    'helium': released.decoder('helium'),
    'kyutai': released.multistream(),
    'kyutai schedule': released.scheduled(),
    'kyutai shared steps': released.multistream(head=dict(step_weights='shared'), layers=5),
}

CONSUMER = '''
import re
import sys

sys.modules['jaxsd'] = sys.modules['jax'] = None    # importing them is an ImportError from here on
program = re.search('```python\\n(.*?)```', open('README.md').read(), re.DOTALL)[1]
exec(program)
given = np.load('given.npz')
heard, prompt = given['heard'], given['prompt']     # [rows, t], FREE where the model speaks
cache, columns, logits = empty_cache(), [], []
for t in range(heard.shape[1]):
    now = prompt[:, t] if t < prompt.shape[1] else columns[-1]
    said, scores, cache = read(cache, now, t, heard[:, t])
    columns.append(said)
    logits.append(scores)
if (heard == signature['free']).all():
    steps = heard.shape[1] - prompt.shape[1] + 1
    assert (speak(prompt, steps) == np.stack(columns, 1)[:, -steps:]).all()
np.savez('made.npz', said=np.stack(columns, 1),
         **{k: np.stack([x[k] for x in logits]) for k in scores})
'''


@pytest.mark.parametrize('case', CASES)
def test_runs_without_us(case, tmp_path, caplog):
    """Against the path that trains. What the other speaker says is given, as it is live."""
    config = CASES[case]
    config.columns = 32
    params, rows = released.random_params(config, 3), model.make_vocab(config).rows
    level = logging.getLogger('jax2onnx').level
    with caplog.at_level('INFO'):
        made = export.save(config, params, str(tmp_path / 'out'), 'onnx', shard_bytes=100_000)
    assert not [r for r in caplog.records if r.name.startswith(('jax2onnx', 'onnx_ir'))]
    assert logging.getLogger('jax2onnx').level == level
    assert len([x for x in made['files'] if x.endswith('.safetensors')]) > 1
    assert {'step.onnx', 'signature.json', 'vocabulary.json', 'provenance.json',
            'generation_config.json', 'README.md'} < set(made['files'])
    rng = np.random.default_rng(2)
    prompt, heard = (np.stack([rng.integers(r.start, r.start + r.size - 1, n) for r in rows])
                     for n in (PROMPT, PROMPT + STEPS - 1))
    heard[[row.predicted > 0 for row in rows]] = -2
    np.savez(tmp_path / 'out' / 'given.npz', prompt=prompt, heard=heard)
    subprocess.run([sys.executable, '-c', CONSUMER], cwd=tmp_path / 'out', check=True)
    found = dict(np.load(tmp_path / 'out' / 'made.npz'))
    said = found['said'][:, PROMPT - 1:]
    columns = np.concatenate([prompt, said], 1)[None].astype(np.int32)
    worst = 0.0
    for k, (row, logits) in enumerate(zip(rows, released.scores(config, params, columns),
                                          strict=True)):
        if logits is None:
            np.testing.assert_array_equal(said[k], heard[k, PROMPT - 1:])
            continue
        logits = logits[0, PROMPT - 1:-1]
        assert logits.std() > .3
        worst = max(worst, float(np.abs(found[row.name][PROMPT - 1:] - logits).max()))
        np.testing.assert_array_equal(said[k], logits.argmax(-1) + row.start)
    print(f'{case} in onnxruntime: {worst:.1e}')
    assert worst <= TOLERANCE


def test_experts_are_refused(tmp_path):
    config = released.decoder('mixtral')
    with pytest.raises(ConfigError, match="'onnx' cannot say backbone.experts"):
        export.save(config, released.random_params(config, 1), str(tmp_path / 'out'), 'onnx')
    assert not list(tmp_path.iterdir())

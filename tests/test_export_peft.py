# SPDX-License-Identifier: Apache-2.0
"""Are an adapter's pairs the low-rank terms of the kernels that the peer has?

The live comparison with peft is tests/peers/test_runtimes.py.
"""

import dataclasses
import json

import numpy as np
import pytest
import released
from safetensors.numpy import load_file

from jaxsd import export
from jaxsd.config import ConfigError
from jaxsd.export import peft, rules
from jaxsd.stage import Stage

LORA = dict(rank=3, scale=.75)


@pytest.mark.parametrize('name, changes', [('llama', {}), ('qwen2', {}),
                                           ('llama', dict(pairs='interleaved'))])
def test_an_adapter_is_what_folding_adds(name, changes, tmp_path):
    """Folded export minus base export, tensor by tensor: scale times B A."""
    config = released.decoder(name, **changes)
    params = released.random_params(config, 5, LORA)
    base = {k: v for k, v in export.flatten(params).items() if 'lora_' not in k}
    export.save(config, params, str(tmp_path / 'adapter'), 'peft', lora_scale=.75)
    export.save(config, params, str(tmp_path / 'folded'), 'hf', lora_scale=.75)
    export.save(config, export.unflatten(base), str(tmp_path / 'base'), 'hf')
    said = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())
    assert said['r'] == 3 and said['lora_alpha'] / said['r'] == .75
    modules = {'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'}
    assert set(said['target_modules']) == modules | ({'lm_head'} if name == 'llama' else set())
    pairs = load_file(tmp_path / 'adapter' / 'adapter_model.safetensors')
    folded, plain = (load_file(tmp_path / x / 'model.safetensors') for x in ('folded', 'base'))
    changed = [k for k in plain if (folded[k] != plain[k]).any()]
    assert len(pairs) == 2 * len(changed)
    for key in changed:
        a, b = (pairs[f'{peft.PREFIX}{key.removesuffix("weight")}lora_{x}.weight'] for x in 'AB')
        assert a.shape[0] == b.shape[1] == 3
        np.testing.assert_allclose(.75 * b.astype(np.float64) @ a, folded[key] - plain[key],
                                   atol=2e-6, err_msg=key)
    card = (tmp_path / 'adapter' / 'README.md').read_text()
    assert 'library_name: peft' in card and 'rank 3, scale 0.75' in card


def test_only_what_an_adapter_holds_was_trained():
    params = released.random_params(released.decoder('llama'), 1, LORA)
    common = dict(name='adapt', steps=1, batch=1, data={}, lr=1., lora=LORA)
    adapted = Stage(train=(('.*/lora_.', 1.), ('.*', None)), **common)
    assert export.only_adapted(adapted, params, 'peft') == []
    for rule, path in ((('.*norm.*', 1.), 'backbone/blocks/norm_attention/weight'),
                       (('.*', .1), 'and 3 more')):
        more = Stage(train=(('.*/lora_.', 1.), rule, ('.*', None)), **common)
        with pytest.raises(ConfigError, match=f'adapt also trained .*{path}.* use a format'):
            export.only_adapted(more, params, 'peft')


@pytest.mark.parametrize('format', ['peft', 'kyutai-lora'])
@pytest.mark.parametrize('graft', [dict(rows=dict(name='mean')), dict(fresh=('head/.*',))])
def test_terms_on_a_grafted_start_fit_nothing(graft, format):
    """What the graft added is neither in the checkpoint it began from nor in the terms."""
    params = released.random_params(released.decoder('llama'), 1, LORA)
    stage = Stage(name='adapt', steps=1, batch=1, data={}, lr=1., start='hf:text', graft=graft,
                  train=(('.*/lora_.', 1.), ('.*', None)), lora=LORA)
    with pytest.raises(ConfigError, match='^stage adapt adapts a start that it grafted') as e:
        export.only_adapted(stage, params, format)
    assert '\n' not in str(e.value)
    whole = dataclasses.replace(stage, lora={}, train=(('.*', 1.),))
    assert export.only_adapted(whole, params, format) == []      # for the format to refuse


def test_refused(tmp_path):
    config = released.decoder('llama')
    with pytest.raises(ConfigError, match="this stage has none; use format 'hf'"):
        export.save(config, released.random_params(config, 1), str(tmp_path / 'out'), 'peft')
    config = released.multistream()
    with pytest.raises(ConfigError, match="head.name is 'depth'; format 'peft' can"):
        export.save(config, released.random_params(config, 1, LORA), str(tmp_path / 'out'), 'peft',
                    lora_scale=.75)
    plan = [rules.rule('in', ('q/kernel', 'D N', 'N D'), ('k/kernel', 'D N', 'N D'))]
    with pytest.raises(ConfigError, match='packs several kernels'):
        peft.rules_of(plan, {'q'})
    with pytest.raises(ConfigError, match='no place for other'):
        peft.rules_of(plan, {'other'})
    assert not list(tmp_path.iterdir())

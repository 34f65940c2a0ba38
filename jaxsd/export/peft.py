# SPDX-License-Identifier: Apache-2.0
"""Low-rank terms as a PEFT adapter, to be loaded onto the exported model that they adapt.

A low-rank pair lies where its kernel lies, so its rules are made from the kernel's: A keeps the
kernel's input axes, B its output axes, permuted and split as the kernel's are. Two kernels that
are one of ours (gate and up) get the same A each.
"""

import json
import os
import re
from collections.abc import Mapping

import numpy as np
from safetensors.numpy import save_file

from jaxsd.config import ConfigError
from jaxsd.export import decoders, rules
from jaxsd.export.facts import facts

PREFIX = 'base_model.model.'


def rules_of(plan, adapted: set[str]) -> list[rules.Rule]:
    """The rules of lora_A and lora_B from those of the kernels whose folders are in `adapted`.

    Raises ConfigError where an adapted kernel has no rule of its own in this family.
    """
    out, met = [], set()
    for r in plan:
        part = r.parts[0]
        folder, _, name = part.path.rpartition('/')
        if name != 'kernel' or folder not in adapted:
            continue
        if len(r.parts) > 1:
            raise ConfigError(f"format 'peft' cannot adapt {r.key}, which packs several kernels")
        outputs, inputs = re.findall(r'\([^)]*\)|\S+', part.theirs)
        into, onto = _letters(inputs), _letters(outputs)
        ours = re.findall(r'\([^)]*\)|\S+', part.ours)
        lead = [x for x in ours if not _letters(x) & (into | onto)
                and ours.index(x) < min(i for i, y in enumerate(ours) if _letters(y) & into)]
        a = [x for x in ours if _letters(x) & into]
        b = [x for x in ours if x not in lead and x not in a]
        key = PREFIX + r.key.removesuffix('.weight')
        met.add(folder)
        out += [rules.rule(f'{key}.lora_A.weight', (f'{folder}/lora_a', ' '.join([*lead, *a, 'R']),
                                                    f'R {inputs}'), **r.names),
                rules.rule(f'{key}.lora_B.weight', (f'{folder}/lora_b', ' '.join([*lead, 'R', *b]),
                                                    f'{outputs} R'), **r.names)]
    if left := sorted(adapted - met):
        raise ConfigError(f"format 'peft' has no place for {', '.join(left)}")
    return out


def _letters(group: str) -> set[str]:
    return {atom for atom in group.strip('()').split() if not atom.isdigit()}


def write(folder: str, config, flat: Mapping, *, shard_bytes: int, lora_scale: float) -> dict:
    """adapter_config.json and adapter_model.safetensors; see `runtimes.Runtime`.

    flat: parameters with their low-rank terms. One file: adapters are small.
    """
    del shard_bytes
    adapted = {path.rpartition('/')[0] for path in flat if path.endswith('/lora_a')}
    if not adapted:
        raise ConfigError("format 'peft' writes low-rank terms, and this stage has none; "
                          "use format 'hf'")
    have = facts(config)
    decoders.check(have, 'peft')
    plan = rules_of(decoders.rules_of(have).rules, adapted)
    pairs = {path: np.asarray(x) for path, x in flat.items()
             if path.endswith(('/lora_a', '/lora_b'))}
    made = {p.key: rules.forward(p, pairs)
            for p in rules.pieces(plan, {path: x.shape for path, x in pairs.items()})}
    rank = next(x.shape[-1] for path, x in pairs.items() if path.endswith('/lora_a'))
    alpha = lora_scale * rank           # PEFT multiplies by lora_alpha / r
    modules = sorted({k.rsplit('.lora_', 1)[0].rsplit('.', 1)[-1] for k in made})
    save_file(made, os.path.join(folder, 'adapter_model.safetensors'), {'format': 'pt'})
    with open(os.path.join(folder, 'adapter_config.json'), 'w', encoding='utf-8') as f:
        json.dump({'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': rank,
                   'lora_alpha': int(alpha) if alpha == int(alpha) else alpha,
                   'target_modules': modules, 'lora_dropout': 0.0, 'bias': 'none',
                   'fan_in_fan_out': False, 'inference_mode': True, 'use_rslora': False,
                   'base_model_name_or_path': None}, f, indent=2, sort_keys=True)
        f.write('\n')
    numbers = sum(x.size for x in pairs.values())
    return {'bytes': sum(x.nbytes for x in made.values()), 'tensors': len(made),
            'numbers': numbers, 'about': about(rank, lora_scale)}


def about(rank: int, scale: float) -> str:
    """What the folder is and how it is loaded, for the model card."""
    return (f'a low-rank adapter (rank {rank}, scale {scale:g}) for the model that its stage '
            'started from, exported in the format hf: load that with '
            '`transformers.AutoModelForCausalLM.from_pretrained`, then '
            '`peft.PeftModel.from_pretrained(model, folder)`')

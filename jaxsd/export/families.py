# SPDX-License-Identifier: Apache-2.0
"""The families of released checkpoints: how each spells its configuration and names its tensors.

A family is: facts it can express (`check`), config.json from facts (`spell`), facts from
config.json (`read`), and its rename rules (`rules`). One module for each kind of model.
"""

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxsd.config import unknown
from jaxsd.export import decoders, kyutai, kyutai_hf
from jaxsd.export.facts import Plan
from jaxsd.export.safetensors import Entry, folder_of, read_json, within


class Family(NamedTuple):
    """One format: see the top of this file.

    dialect: the current names of a key of an older file. sharded: whether the peer reads an index
    of several files. without_config: what a checkpoint that has no config.json is. claims: whether
    a config.json is one of this family. cut: a checkpoint's facts as they are after import has left
    out what a smaller config has no place for. generation: its generation_config.json, if not the
    usual one. along: tensors of other parts that travel along, by key. bundled: what the checkpoint
    in a folder (or file) brings besides the model: keys of its config.json with values, tensors.
    tokenizer: the key of config.json that names the file of a text tokenizer that goes along.
    """

    check: Callable[[Mapping], None]
    rules: Callable[[Mapping], Plan]
    spell: Callable[[Mapping], dict]
    read: Callable[[Mapping, str], dict]
    dialect: Callable[[str, Mapping], tuple[str, ...]]
    sharded: bool
    without_config: dict | None
    claims: Callable[[Mapping], bool]
    cut: Callable[[Mapping, Mapping], Mapping] = lambda have, said: said
    generation: Callable[[Mapping], dict] | None = None
    along: Callable[[Mapping], Mapping[str, Entry]] = lambda have: {}
    bundled: Callable[[str], tuple[dict, Mapping[str, Entry]]] = lambda source: ({}, {})
    tokenizer: str = ''


FAMILIES = {
    'hf': Family(decoders.check, decoders.rules_of, decoders.spell, decoders.read,
                 lambda key, have: (key,), True, None,
                 lambda values: values.get('model_type') in tuple(decoders.SILENT)),
    'kyutai': Family(kyutai.check, kyutai.rules_of, kyutai.spell, kyutai.read, kyutai.dialect,
                     False, kyutai.RELEASED, lambda values: {'dim', 'n_q', 'dep_q'} <= set(values),
                     kyutai.cut, bundled=kyutai.bundled, tokenizer='tokenizer_name'),
    'kyutai-hf': Family(kyutai_hf.check, kyutai_hf.rules_of, kyutai_hf.spell, kyutai_hf.read,
                        lambda key, have: (key,), True, None,
                        lambda values: values.get('model_type') == 'moshi',
                        generation=kyutai_hf.generation, along=kyutai_hf.along,
                        bundled=kyutai_hf.bundled),
}


def family_of(format: str) -> Family:
    """The family called `format`. Raises ConfigError with the names that there are."""
    if format not in FAMILIES:
        raise unknown('format', format, FAMILIES)
    return FAMILIES[format]


def described(source: str, format: str = '') -> tuple[str, dict, str]:
    """(format, config.json, its path) of the checkpoint in folder (or file) `source`.

    Without a `format` it is the one that claims the config.json; a file without one is of the
    family that has a released default. Raises ValueError for a folder that no family knows, for one
    of another format than `format`, and for an export of ours that other programs run.
    """
    folder = folder_of(source)
    path, about = (os.path.join(folder, n) for n in ('config.json', 'provenance.json'))
    made = read_json(about) if os.path.isfile(about) else {}
    # What kyutai's low-rank terms are, kyutai.read says itself: they can be imported.
    if 'jaxsd' in made and made.get('format') not in (*FAMILIES, 'kyutai-lora'):
        raise ValueError(f'{folder} is an export in the format {made.get("format")}, for other '
                         f'programs: what can be read back is {", ".join(FAMILIES)}')
    if os.path.lexists(path):
        values = read_json(path)
        claimed = next((k for k, f in FAMILIES.items() if f.claims(values)), '')
        kind = values.get('model_type') or values.get('architectures')
        if format in FAMILIES and claimed and not FAMILIES[format].claims(values):
            raise ValueError(f'{path} is of format {claimed!r}, not {format!r}'
                             + (f': its model_type is {kind!r}' if kind else ''))
        format = format or claimed
        if not format:
            raise ValueError(f'{path}: no format that can be read here has model_type {kind!r} '
                             f'(formats: {", ".join(FAMILIES)})')
        return format, values, path
    released = [k for k, f in FAMILIES.items() if f.without_config is not None]
    format = format or next(iter(released))
    if format not in released:
        raise ValueError(f'no {path}{within(folder)}')
    return format, family_of(format).without_config, f'{source} (which has no config.json)'


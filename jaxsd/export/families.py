# SPDX-License-Identifier: Apache-2.0
"""The families of released checkpoints: how each spells its configuration and names its tensors.

A family is: facts it can express (`check`), config.json from facts (`spell`), facts from
config.json (`read`), and its rename rules (`rules`). One module for each kind of model.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxsd.export import decoders, kyutai, kyutai_hf
from jaxsd.export.facts import Plan


class Family(NamedTuple):
    """One format: see the top of this file.

    dialect: the current names of a key of an older file. sharded: whether the peer reads an index
    of several files. without_config: what a checkpoint that has no config.json is. cut: its facts
    as they are after import has left out what a smaller config has no place for. generation: its
    generation_config.json, if not the usual one. along: tensors of other parts that travel along.
    """

    check: Callable[[Mapping], None]
    rules: Callable[[Mapping], Plan]
    spell: Callable[[Mapping], dict]
    read: Callable[[Mapping, str], dict]
    dialect: Callable[[str, Mapping], tuple[str, ...]]
    sharded: bool
    without_config: dict | None
    cut: Callable[[Mapping, Mapping], Mapping] = lambda have, said: said
    generation: Callable[[Mapping], dict] | None = None
    along: Callable[[Mapping], Mapping] = lambda have: {}


FAMILIES = {
    'hf': Family(decoders.check, decoders.rules_of, decoders.spell, decoders.read,
                 lambda key, have: (key,), True, None),
    'kyutai': Family(kyutai.check, kyutai.rules_of, kyutai.spell, kyutai.read, kyutai.dialect,
                     False, kyutai.RELEASED, kyutai.cut),
    'kyutai-hf': Family(kyutai_hf.check, kyutai_hf.rules_of, kyutai_hf.spell, kyutai_hf.read,
                       lambda key, have: (key,), True, None, generation=kyutai_hf.generation,
                       along=kyutai_hf.along),
}

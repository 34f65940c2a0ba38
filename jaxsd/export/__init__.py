# SPDX-License-Identifier: Apache-2.0
"""Hands checkpoints to the runtimes people use, and starts from the weights people have.

A format is a family of released checkpoints (see `families`): 'hf', a Hugging Face Llama, Mistral
or Qwen2 that any server loads, and 'kyutai', the LMModel of the moshi package. One ordered table of
rules is read in both directions, so import(export(x)) is x to the bit. Parameters are a nested dict
of arrays in the shapes of `model.abstract(config)`.

From a notebook, `load(path)` is all there is to know. Below it: `streaming` reads a checkpoint box
by box into the arrays of a mesh, `surgery` fits the weights of one model into another, `write`
writes, `runs` turns checkpoints into run directories and back.
"""

from jaxsd.export.families import FAMILIES, described, family_of
from jaxsd.export.loading import (
    Loaded,
    import_params,
    is_foreign,
    load,
    open_start,
    stated_license,
    stream,
)
from jaxsd.export.runs import export_run, history, import_run
from jaxsd.export.write import SHARD_BYTES, card, fold_lora, save
from jaxsd.stage import flatten, of_stage

FORMATS = tuple(FAMILIES)

__all__ = ['FAMILIES', 'FORMATS', 'SHARD_BYTES', 'Loaded', 'card', 'described', 'export_run',
           'family_of', 'flatten', 'fold_lora', 'history', 'import_params', 'import_run',
           'is_foreign', 'load', 'of_stage', 'open_start', 'save', 'stated_license', 'stream']

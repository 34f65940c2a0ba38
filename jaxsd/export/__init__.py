# SPDX-License-Identifier: Apache-2.0
"""Hands checkpoints to the runtimes people use, and starts from the weights people have.

A format is a family of released checkpoints (see `families`): 'hf', a Hugging Face decoder that any
server loads (see `decoders`), 'kyutai', the LMModel of the moshi package, and 'kyutai-hf', the same
as transformers lays it out. One ordered table of rules is read in both directions, so
import(export(x)) is x to the bit. Parameters are a nested dict of arrays in the shapes of
`model.abstract(config)`. The formats of `runtimes` are programs and files for other runtimes, and
low-rank terms alone.

From a notebook, `load(path)` is all there is to know. Below it: `streaming` reads a checkpoint box
by box into the arrays of a mesh, `surgery` fits the weights of one model into another, `write`
writes, `runs` turns checkpoints into run directories and back, `begin` is where a stage begins.
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
from jaxsd.export.runs import export_run, history, import_run, only_adapted
from jaxsd.export.runtimes import RUNTIMES
from jaxsd.export.write import SHARD_BYTES, about, card, fold_lora, save, told
from jaxsd.stage import flatten, of_stage, unflatten

FORMATS = (*FAMILIES, *RUNTIMES)

__all__ = ['FAMILIES', 'FORMATS', 'RUNTIMES', 'SHARD_BYTES', 'Loaded', 'about', 'card', 'described',
           'export_run', 'family_of', 'flatten', 'fold_lora', 'history', 'import_params',
           'import_run', 'is_foreign', 'load', 'of_stage', 'only_adapted', 'open_start', 'save',
           'stated_license', 'stream', 'told', 'unflatten']

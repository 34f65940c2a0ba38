# SPDX-License-Identifier: Apache-2.0
"""What runs a model elsewhere, which is only written, and what adapts another model.

A runtime writes its files into a folder that `export.save` opens, and closes with the ids, the text
tokenizer and the card that every export carries.
"""

import importlib.util
import inspect
from collections.abc import Callable
from typing import NamedTuple

from jaxsd.config import ConfigError, unknown
from jaxsd.export import gguf, kyutai_lora, onnx, peft, stablehlo


class Runtime(NamedTuple):
    """write(folder, config, flat, *, shard_bytes, <options>) -> what it wrote.

    That is {'bytes', 'tensors', 'numbers', 'about'}: its size, how many parameters, and the first
    paragraph of the card.
    flat: parameters by path, low-rank terms folded unless `adapts` (then lora_scale is given too).
    speaks: whether it is also given what `loading` tells of how the checkpoint speaks that the
    parameters are, {} where they have become another model.
    package: what must be installed besides the core ('': nothing), and how pip installs it.
    library: how a model hub calls the program that reads these files. tables: paths of embedding
    tables that an adapter can hold besides low-rank terms; the option `tables` asks for them.
    read(config, source, base, lora) -> the parameters `base` by path, and the terms of `source`.
    """

    write: Callable[..., dict]
    library: str
    package: str
    install: str
    adapts: bool = False
    speaks: bool = False
    tables: tuple[str, ...] = ()
    read: Callable[..., dict] | None = None


RUNTIMES = {
    'stablehlo': Runtime(stablehlo.write, 'jax', 'flatbuffers', "pip install 'jaxsd[stablehlo]'"),
    'onnx': Runtime(onnx.write, 'onnx', 'jax2onnx', "pip install 'jaxsd[onnx]', then "
                    "pip install --no-deps 'jax2onnx==0.17.1'"),
    'gguf': Runtime(gguf.write, 'gguf', 'gguf', "pip install 'jaxsd[gguf]'", speaks=True),
    'peft': Runtime(peft.write, 'peft', '', '', adapts=True),
    'kyutai-lora': Runtime(kyutai_lora.write, 'moshi', '', '', adapts=True,
                           tables=kyutai_lora.TABLES, read=kyutai_lora.read),
}


def options_of(format: str) -> dict[str, inspect.Parameter]:
    """What a user may choose about `format`: the keyword-only parameters of its writer."""
    if format not in RUNTIMES:
        return {}
    found = inspect.signature(RUNTIMES[format].write).parameters
    return {k: p for k, p in found.items() if p.kind is p.KEYWORD_ONLY
            and k not in ('shard_bytes', 'lora_scale', 'speaks')}


def checked(format: str, options) -> Runtime:
    """The runtime, or ConfigError for an option it does not take or a package that is missing."""
    runtime = RUNTIMES[format]
    for key in options:
        if key not in options_of(format):
            raise unknown(f'format {format!r}', key, options_of(format))
    if runtime.package and importlib.util.find_spec(runtime.package) is None:
        raise ConfigError(f'format {format!r} needs the package {runtime.package}: '
                          f'{runtime.install}')
    return runtime

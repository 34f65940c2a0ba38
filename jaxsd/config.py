# SPDX-License-Identifier: Apache-2.0
"""Turns a name and options into a bound function, and a config file into a checked tree.

A mechanism's keyword-only signature is its schema: `bind` resolves `name='depth'` by import and
refuses an option that the function does not take, naming the legal ones. Nothing here wakes jax.
"""

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import sys
import types
import typing
from typing import Any

import ml_collections as mlc

KEYS = ('seed', 'codec', 'vocab', 'columns', 'layout', 'frontend', 'backbone', 'head', 'objective',
        'stages', 'data', 'mesh', 'evals')


SLOTS = ('codec', 'vocab', 'layout', 'frontend', 'backbone', 'head', 'objective')
"""The keys that name a mechanism: `head` is looked up in jaxsd.head."""


class ConfigError(ValueError):
    """A config that cannot be used, said in one line that names the path and the fix."""


def parse_arg(arg: str | None, **defaults) -> mlc.ConfigDict:
    """Parses the `tiny` or `width=64,demo` after a config file's colon against declared defaults.

    A bare word sets a boolean. Values are cast to the type of their default.
    """
    out = mlc.ConfigDict(defaults)
    for item in filter(None, (arg or '').split(',')):
        key, _, value = item.partition('=')
        if key not in defaults:
            raise ConfigError(f'unknown config argument {key!r}; legal: {", ".join(defaults)}')
        kind = type(defaults[key])
        if kind is bool:
            if value.lower() not in ('', 'true', 'false', '1', '0'):
                raise ConfigError(f'config argument {key} takes true or false, got {value!r}')
            out[key] = value.lower() in ('', 'true', '1')
        else:
            try:
                out[key] = kind(value)
            except ValueError:
                raise ConfigError(f'config argument {key} takes {kind.__name__}, got {value!r}'
                                  ) from None
    return out


def typed(argument: str) -> str:
    """One argument as it is typed into a shell: in double quotes where it has single ones."""
    if "'" not in argument or '!' in argument:      # which bash takes for its history there
        return shlex.quote(argument)
    return '"' + re.sub(r'(["$`\\])', r'\\\1', argument) + '"'


def unknown(path: str, key: str, legal) -> ConfigError:
    """The error for a name that is not legal at `path`, with the nearest legal one first."""
    legal = sorted(legal)
    near = difflib.get_close_matches(str(key), legal, 1)
    hint = f'; did you mean {near[0]!r}?' if near else ''
    return ConfigError(f'{path} has no option {key!r}{hint} (legal: {", ".join(legal)})')


def _reach(path: str) -> None:
    """Lets a config file import configs._parts, and name functions of files beside it."""
    folder = package = os.path.dirname(os.path.abspath(path))
    while os.path.exists(os.path.join(os.path.dirname(package), '__init__.py')):
        package = os.path.dirname(package)
    if os.path.dirname(package) not in sys.path:
        sys.path.insert(0, os.path.dirname(package))
    if folder not in sys.path:          # last: a config is named like the package it stands for
        sys.path.append(folder)


def _import_file(path: str):
    path = os.path.abspath(path)
    name = '_config_' + hashlib.sha256(path.encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    _reach(path)
    spec.loader.exec_module(module)
    return module


def executed(path: str, flag: str):
    """The module that Python file `path` is, named by `flag`. Raises ConfigError."""
    if os.path.isdir(path):
        raise ConfigError(f'{flag}: {path} is a directory; name a file of it')
    if not os.path.isfile(path):
        meant = f'; did you mean {path}.py?' if os.path.isfile(f'{path}.py') else ''
        raise ConfigError(f'{flag}: no file {path}{meant}')
    if not path.endswith('.py'):
        raise ConfigError(f'{flag}: {path} is no Python file: its name must end in .py')
    try:
        return _import_file(path)
    except ConfigError:
        raise
    except (Exception, SystemExit) as e:
        raise ConfigError(f'{flag}: {path} cannot be executed: {type(e).__name__}: {e}') from e


def read(spec: str) -> mlc.ConfigDict:
    """Reads `FILE.py` or `FILE.py:arg` and checks its top-level names. Raises ConfigError."""
    path, _, arg = spec.partition(':')
    module = executed(path, '--config')
    if not hasattr(module, 'get_config'):
        raise ConfigError(f'--config: {path} defines no get_config(arg)')
    try:
        config = module.get_config(arg or None)
    except ConfigError:
        raise
    except Exception as e:
        raise ConfigError(f'--config: get_config({arg!r}) of {path} failed: {type(e).__name__}: '
                          f'{e}') from e
    if not isinstance(config, mlc.ConfigDict):
        raise ConfigError(f'--config: get_config of {path} must return a ConfigDict, not '
                          f'{type(config).__name__}')
    return checked(config, path)


def made_by(spec: str, overrides) -> dict:
    """What a run keeps of where its config came from: the file, the overrides, the docstring, and
    the directory that relative paths start from."""
    with open(spec.partition(':')[0], encoding='utf-8') as f:
        doc = ast.get_docstring(ast.parse(f.read())) or ''
    return dict(file=spec, overrides=[f'--config.{path}={value}' for path, value in overrides],
                doc=doc, directory=os.getcwd())


def stored(run: dict, path: str) -> mlc.ConfigDict:
    """The config of a run directory's config.json `path`, as `read` gave it when it was made."""
    if file := run.get('file', '').partition(':')[0]:
        _reach(os.path.join(run.get('directory', ''), file))
    return checked(mlc.ConfigDict(plain(run['config'])), path)


def checked(config: mlc.ConfigDict, path: str = 'config') -> mlc.ConfigDict:
    """`config` if it holds exactly the known top-level names, else ConfigError."""
    for key in config:
        if key not in KEYS:
            raise unknown(path, key, KEYS)
    missing = [k for k in KEYS if k not in config]
    if missing:
        raise ConfigError(f'{path} lacks {", ".join(missing)}')
    bounded(config)
    return config


def overridden(config: mlc.ConfigDict, overrides) -> mlc.ConfigDict:
    """`config` with (path, value) overrides set. Raises ConfigError for whatever its options tell
    to be wrong."""
    for path, value in overrides:
        override(config, path, value)
    bounded(config)
    complete(config)
    return config


def bounded(config: mlc.ConfigDict) -> None:
    """Raises ConfigError for numbers at the top that nothing can be made with."""
    for key, least, most in (('seed', 0, (1 << 32) - 1), ('columns', 2, 1 << 24)):
        if not isinstance(config[key], int) or not least <= config[key] <= most:
            raise ConfigError(f'{key} is a whole number in {least}..{most}, got {config[key]!r}')


def resolve(name: str, home: str):
    """The function that `name` stands for: `home.name`, or anyone's `package.module:function`."""
    if ':' in name:
        module_name, _, attr = name.partition(':')
    else:
        module_name, _, attr = f'{home}.{name}'.rpartition('.')
    try:
        found = getattr(importlib.import_module(module_name), attr, None)
    except ImportError as e:
        raise ConfigError(f'{home}: cannot import {module_name} for name {name!r}: {e}') from e
    if found is None or attr.startswith('_'):
        module = importlib.import_module(module_name)
        legal = [k for k, v in vars(module).items() if not k.startswith('_') and callable(v)
                 and getattr(v, '__module__', '') == module_name and options_of(v)]
        raise unknown(module_name, attr, legal)
    return found


def plain(x: Any) -> Any:
    """A config value as plain dicts, tuples and scalars (ConfigDicts and lists removed)."""
    if isinstance(x, mlc.ConfigDict | dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return tuple(plain(v) for v in x)
    return x


def options_of(fn) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of `fn` (of its `__init__` for a class)."""
    signature = inspect.signature(fn.__init__ if inspect.isclass(fn) else fn)
    return {k: p for k, p in signature.parameters.items()
            if p.kind is inspect.Parameter.KEYWORD_ONLY}


PLACES = (('data', 'path'), ('codec', 'path'), ('vocab', 'tokenizer'))
"""What of a config says where files lie, and nothing of what is in them."""


def unplaced(config) -> dict:
    """A config as plain values without its PLACES."""
    return {slot: {k: v for k, v in options.items() if (slot, k) not in PLACES}
            if isinstance(options, dict) else options for slot, options in plain(config).items()}


def sought(config, said: str, made_in: str | None = None) -> str:
    """What to add to an error that names a relative path of the config: from where it was followed.

    made_in: the directory that the config's run was made in. '' where the error is of other things.
    """
    tree, here = plain(config), os.getcwd()
    lost = [(slot, key, path) for slot, key in PLACES if isinstance(tree[slot], dict)
            and isinstance(path := tree[slot].get(key), str) and path
            and not os.path.isabs(path) and not os.path.exists(path)]
    if not any(path in said for *_, path in lost):
        return ''
    there = f'run this in {made_in}, where the run was made, or ' if made_in not in (
        None, here) else ''
    return (f' (looked for in {here}; {there}give '
            + ' '.join(f'--config.{slot}.{key}=PATH' for slot, key, _ in lost) + ')')


def bind(options, home: str, path: str, *, given=()):
    """The function named by `options` with the other options bound to it.

    `home` is the package that bare names are looked up in ('jaxsd.head'); `path` names the place in
    the config for errors; `given` are keyword-only parameters that the caller supplies itself.
    Raises ConfigError for an option the function does not take or a required one that is missing.
    """
    options = plain(options)
    name = options.pop('name', None) if isinstance(options, dict) else None
    if not isinstance(name, str):
        raise ConfigError(f'{path} needs a name')
    fn = resolve(name, home)
    legal = {k: p for k, p in options_of(fn).items() if k not in given}
    for key in options:
        if key not in legal:
            raise unknown(f'{path} (name={name!r})', key, legal)
    missing = [k for k, p in legal.items() if p.default is p.empty and k not in options]
    if missing:
        raise ConfigError(f'{path} (name={name!r}) needs {", ".join(missing)}')
    for key, value in options.items():
        if not _fits(value, legal[key].annotation):
            raise ConfigError(f'{path}.{key} takes {_said(legal[key].annotation)}, got {value!r}')
    return functools.partial(fn, **options)


GIVEN = dict(layout=('vocab', 'rng'), frontend=('rngs',), backbone=('rngs',), head=('rngs',),
             objective=('sizes', 'ranges'))
"""What the callers of a slot's function supply themselves."""


NESTED = {'encoder': 'encoder', 'prenet': 'encoder', 'decoder': 'backbone'}
"""Options that are mechanisms themselves, and the slot they are looked up in."""


def nested(options, slot: str) -> dict:
    """`options` with every mechanism inside them bound, so that slots need not know each other."""
    return {key: bind(value, f'jaxsd.{NESTED[key]}', f'{slot}.{key}', given=('rngs',))
            if key in NESTED else value for key, value in plain(options).items()}


def complete(config) -> None:
    """Raises ConfigError with what is wrong in the options of all slots, in one line."""
    wrong = []
    for slot in SLOTS:
        try:
            bind(nested(config[slot], slot), f'jaxsd.{slot}', slot, given=GIVEN.get(slot, ()))
        except ConfigError as e:
            wrong.append(str(e))
    if wrong:
        raise ConfigError('; '.join(wrong))


def _fits(value, annotation) -> bool:
    """Whether a parameter annotated so takes `value`; True where the annotation names no types."""
    if isinstance(annotation, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(annotation))
    kind, inside = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind is inspect.Parameter.empty or not isinstance(kind, type):
        return True
    if isinstance(value, bool | str):       # neither a number nor a sequence of letters
        return type(value) is kind
    if isinstance(value, tuple) and isinstance(value, kind) and inside:
        if kind is not tuple or inside[-1] is Ellipsis:
            inside = inside[:1] * len(value)
        return len(inside) == len(value) and all(map(_fits, value, inside))
    return isinstance(value, int | float if kind is float else kind)


def _said(annotation) -> str:
    """The types of an annotated parameter in words."""
    parts = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else [annotation]
    return ' or '.join(part.__name__ if isinstance(part, type) else
                       str(part).removeprefix('collections.abc.') for part in parts
                       ).replace('NoneType', 'None')


def to_json(config) -> str:
    """The resolved tree as canonical JSON: what is stored, compared and hashed."""
    return json.dumps(plain(config), sort_keys=True, separators=(',', ':'))


def fingerprint(config) -> str:
    """Twelve hex digits that change whenever anything that is trained does (all but `evals`)."""
    tree = plain(config)
    if isinstance(tree, dict):      # how a model is measured does not change what it is
        tree = {k: v for k, v in tree.items() if k != 'evals'}
    return hashlib.sha256(to_json(tree).encode()).hexdigest()[:12]


def _unwritten(config, keys: list, at) -> dict[str, Any]:
    """{name: default} of what may stand in `at`, found by `keys`, though the file leaves it out."""
    match keys:
        case ['stages', int()]:
            reader = resolve('Stage', 'jaxsd.stage')
        case ['stages', int(), 'data']:
            return dict.fromkeys(config['data'].get('sources', {}), 0.0)
        case ['mesh']:
            axes = importlib.import_module('jaxsd.sharding').AXES
            return dict.fromkeys(axes, 1) | {'slices': 1, 'rules': {}}
        case ['data', 'sources', str()]:
            return {'layout': {}, 'fields': {}}
        case ['evals', str()] if 'name' in at:
            reader = resolve(at['name'], 'jaxsd.evaluate')
        case [*_, slot] if slot in SLOTS and 'name' in at:
            reader = resolve(at['name'], f'jaxsd.{slot}')
        case _:
            return {}
    # What has no default stands in the file, or is given by the caller of the function.
    return {k: _default(p) for k, p in options_of(reader).items() if p.default is not p.empty}


def _default(parameter: inspect.Parameter) -> Any:
    """The default, whose type an override keeps; None where the parameter may be of several."""
    kind = typing.get_origin(parameter.annotation) or parameter.annotation
    fits = isinstance(kind, type) and isinstance(parameter.default, kind)
    return parameter.default if fits else None


def override(config: mlc.ConfigDict, path: str, text: str) -> None:
    """Sets `stages[0].lr` and the like to a Python literal (or a bare string), keeping its type.

    An option that the file leaves out may be set as well, if the function or the part that reads
    that place of the config has it. Raises ConfigError for a path that does not exist, with the
    names that do, or another type.
    """
    if not re.fullmatch(r'\w+(\.\w+|\[-?\d+\])*', path):
        raise ConfigError(f'--config.{path}: write a path like stages[0].lr')
    *folders, last = [int(a[1:-1]) if a.startswith('[') else a
                      for a in re.findall(r'\[-?\d+\]|\w+', path)]
    at, where, unwritten = config, '', {}
    for i, key in enumerate([*folders, last]):
        if isinstance(key, int):
            if not isinstance(at, tuple | list) or not 0 <= key < len(at):
                there = f'items 0..{len(at) - 1}' if isinstance(at, tuple | list) else 'no items'
                raise ConfigError(f'--config.{path}: {where} has {there}, no item {key}')
        elif isinstance(at, tuple | list):
            rest = '.'.join(map(str, [*folders, last][i + key.isdecimal():]))
            raise ConfigError(f'--config.{path}: {where} has items; write {where}'
                              f'[{key if key.isdecimal() else 0}].{rest}')
        elif not isinstance(at, mlc.ConfigDict | dict):
            raise ConfigError(f'--config.{path}: {where} is a single value without {key!r}')
        elif key not in at:
            unwritten = _unwritten(config, folders[:i], at)
            if key not in unwritten:
                raise unknown(f'--config.{path}: {where or "the config"}', key, {*at, *unwritten})
            if i < len(folders):
                raise ConfigError(f'--config.{path}: the config has no {where}.{key} yet; give all '
                                  f'of it, as in --config.{where}.{key}={{...}}')
        if i < len(folders):
            where += f'[{key}]' if isinstance(key, int) else f'.{key}' if where else str(key)
            at = at[key]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        value = text
    old, value = plain(unwritten[last] if last in unwritten else at[last]), plain(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(old, float) and number:
        value = float(value)
    elif isinstance(old, str) and not isinstance(value, str):
        value = text            # a path may look like a number
    fits = isinstance(value, type(old)) and isinstance(value, bool) == isinstance(old, bool)
    # Options inside a slot may be None (no window, say); what stands at the top may not.
    if old is not None and not fits and not (value is None and folders):
        raise ConfigError(f'--config.{path} takes {type(old).__name__}, got {text!r}')
    if isinstance(at, tuple):
        raise ConfigError(f'--config.{path}: items of a tuple cannot be set; set a name inside it')
    at[last] = value

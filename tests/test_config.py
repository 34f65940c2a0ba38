# SPDX-License-Identifier: Apache-2.0
"""Does a config say what is wrong with it, and is its fingerprint that of what is trained?"""

import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence

import ml_collections as mlc
import pytest

from jaxsd import config as configs
from jaxsd.config import (
    ConfigError,
    bind,
    fingerprint,
    override,
    parse_arg,
    plain,
    read,
    resolve,
    stored,
    to_json,
)

ROOT = pathlib.Path(__file__).resolve().parents[1]

WHOLE = """
import ml_collections as mlc
from jaxsd.config import parse_arg
def get_config(arg=None):
    arg = parse_arg(arg, tiny=False, width=8)
    c = mlc.ConfigDict({k: {} for k in (
        'codec', 'vocab', 'layout', 'frontend', 'backbone', 'head', 'objective', 'data', 'mesh',
        'evals')})
    c.seed, c.columns = 0, arg.width
    c.stages = (dict(name='a', lr=1e-3),)
    return c
"""


def tree():
    return mlc.ConfigDict(dict(
        seed=3, columns=64, name='x', rate=0.5, loud=False, none=None, span=(2, 6),
        backbone=dict(window_columns=8, mlp=dict(width=4)),
        stages=(dict(name='a', lr=1e-3, data=dict(text=1.0)), dict(name='b', lr=1e-3)),
        data=dict(sources=dict(text={})), evals=dict(asr=dict(limit=3))))


def refused(fn, *args, **options) -> str:
    with pytest.raises(ConfigError) as e:
        fn(*args, **options)
    assert '\n' not in str(e.value)
    return str(e.value)


# Arguments.

def test_arguments_take_the_type_of_their_default():
    found = parse_arg('tiny,width=12,rate=3,name=x-y', tiny=False, width=8, rate=0.5, name='',
                      deep=1)
    assert found.to_dict() == dict(tiny=True, width=12, rate=3.0, name='x-y', deep=1)
    assert isinstance(found.rate, float)
    assert parse_arg(None, tiny=True).tiny is True
    for said, meant in (('tiny=False', False), ('tiny=0', False), ('tiny=true', True)):
        assert parse_arg(said, tiny=True).tiny is meant


@pytest.mark.parametrize(('arg', 'says'), [
    ('tiney', "unknown config argument 'tiney'; legal: tiny, width"),
    ('width=wide', "width takes int, got 'wide'"), ('width', "width takes int, got ''"),
    ('tiny=maybe', "tiny takes true or false, got 'maybe'")])
def test_arguments_that_are_refused(arg, says):
    assert says in refused(parse_arg, arg, tiny=False, width=8)


# Names and options.

def test_resolve_finds_ours_and_anyones():
    from jaxsd.layout import flat
    assert resolve('flat.sequence', 'jaxsd.layout') is flat.sequence
    assert resolve('json:dumps', 'jaxsd.layout').__name__ == 'dumps'


@pytest.mark.parametrize(('name', 'says'), [
    ('lines', "jaxsd.vocab has no option 'lines'; did you mean 'line'? (legal: "),
    ('_round_up', "jaxsd.vocab has no option '_round_up'"),
    ('nosuch.thing', 'cannot import jaxsd.vocab.nosuch'),
    ('no_such_package:thing', 'cannot import no_such_package'),
    ('json:nosuch', "json has no option 'nosuch'")])
def test_resolve_names_what_there_is(name, says):
    assert says in refused(resolve, name, 'jaxsd.vocab')


def layout(record, *, vocab, rng, width: int, end: str = 'none', words=(1, 2)):
    return record, vocab, rng, width, end, words


def test_bind_binds_what_the_function_takes():
    name = f'{__name__}:layout'
    made = bind(mlc.ConfigDict(dict(name=name, width=3, words=[4, 5])), 'jaxsd.layout', 'layout',
                given=('vocab', 'rng'))
    assert made('r', vocab='v', rng='g') == ('r', 'v', 'g', 3, 'none', (4, 5))


@pytest.mark.parametrize(('options', 'says'), [
    (dict(width=3, edn='eos'), "'edn'; did you mean 'end'? (legal: end, width, words)"),
    (dict(width=3, vocab=1), "has no option 'vocab'"),      # the caller gives it, not the user
    (dict(record=1, width=3), "has no option 'record'"), (dict(), 'needs width')])
def test_bind_names_the_legal_options(options, says):
    said = refused(bind, dict(name=f'{__name__}:layout') | options, 'jaxsd.layout', 'layout',
                   given=('vocab', 'rng'))
    assert said.startswith("layout (name='") and says in said


def typed(*, n: int, x: float, w: int | None, s: str, names: Sequence[str],
          span: tuple[int, int], any_of: tuple[str, ...], tree: dict, free):
    return n, x, w, s, names, span, any_of, tree, free


GOOD = dict(n=1, x=1, w=None, s='s', names=('a', 'b'), span=(1, 2), any_of=(), tree={}, free=3)


@pytest.mark.parametrize(('option', 'value', 'says'), [
    ('n', True, 'n takes int, got True'), ('n', 1.5, 'n takes int, got 1.5'),
    ('x', 'x', "x takes float, got 'x'"), ('x', False, 'x takes float, got False'),
    ('w', 'x', "w takes int or None, got 'x'"), ('s', 3, 's takes str, got 3'),
    ('names', 'ab', "names takes Sequence[str], got 'ab'"),
    ('names', ('a', 3), "names takes Sequence[str], got ('a', 3)"),
    ('span', (1, 'b'), "span takes tuple[int, int], got (1, 'b')"),
    ('span', (1, 2, 3), 'span takes tuple[int, int], got (1, 2, 3)'),
    ('any_of', ('a', True), "any_of takes tuple[str, ...], got ('a', True)"),
    ('tree', 'x', "tree takes dict, got 'x'")])
def test_bind_looks_at_types(option, value, says):
    given = dict(name=f'{__name__}:typed') | GOOD
    assert bind(given, 'jaxsd.layout', 'layout')() == tuple(GOOD.values())
    assert refused(bind, given | {option: value}, 'jaxsd.layout', 'layout') == f'layout.{says}'


def test_bind_needs_a_name():
    assert refused(bind, dict(width=3), 'jaxsd.layout', 'stages[1].layout') == (
        'stages[1].layout needs a name')


# Overrides.

@pytest.mark.parametrize(('path', 'text', 'value'), [
    ('seed', '1_000', 1000), ('rate', '2', 2.0), ('rate', '1e-4', 1e-4), ('name', 'y z', 'y z'),
    ('name', '2024', '2024'), ('name', "'7'", '7'), ('loud', 'True', True),
    ('span', '(1, 3)', (1, 3)), ('span', '[1, 3]', (1, 3)),
    ('none', '3', 3), ('none', 'word', 'word'),
    ('backbone.window_columns', 'None', None), ('backbone.mlp.width', '5', 5),
    ('stages[1].lr', '1', 1.0), ('stages[0].data.text', '0', 0.0), ('stages[0].name', 'c', 'c'),
    ('backbone', "{'mlp': 1}", {'mlp': 1}), ('name', '{[]: 1}', '{[]: 1}')])
def test_override_sets_and_keeps_the_type(path, text, value):
    c, before = tree(), plain(tree())
    override(c, path, text)
    found = c
    for key in re.findall(r'\w+', path):
        found = found[int(key) if key.isdecimal() else key]
    assert plain(found) == value and type(plain(found)) is type(value)
    if path in before:              # and nothing else moved
        assert {k: v for k, v in plain(c).items() if k != path} == {
            k: v for k, v in before.items() if k != path}


def system():
    """What a file of a system may leave out, left out."""
    return mlc.ConfigDict(dict(
        vocab=dict(name='streams', text_tokens=9), backbone=dict(name='decoder', width=8),
        layout=dict(name='duplex.columns'), mesh=dict(fsdp=-1),
        data=dict(path='d', sources=dict(a=dict(select=('x',)), b=dict(select=('y',)))),
        stages=(dict(name='one', steps=1, batch=4, lr=1.0, data=dict(a=1.0)),),
        evals=dict(listening=dict(name='tts', source='b'))))


@pytest.mark.parametrize(('path', 'text', 'value'), [
    ('stages[0].accumulate', '2', 2), ('stages[0].weight_decay', '0', 0.0),
    ('stages[0].betas', '(0.8, 0.9)', (0.8, 0.9)), ('stages[0].start', '7', '7'),
    ('stages[0].lora', "{'rank': 2, 'scale': 1.0}", dict(rank=2, scale=1.0)),
    ('stages[0].data.b', '1', 1.0), ('mesh.tensor', '2', 2),
    ('mesh.rules', "{'column': 'data'}", dict(column='data')),
    ('backbone.window_columns', '16', 16), ('backbone.qkv_bias', 'True', True),
    ('backbone.pairs', 'interleaved', 'interleaved'), ('vocab.multiple', '8', 8),
    ('vocab.speakers', "['mine']", ('mine',)), ('layout.theirs', '0', 0),
    ('layout.theirs', 'none', 'none'), ('layout.weight_text', '2', 2.0),
    ('data.sources.a.layout', "{'name': 'flat.sequence'}", dict(name='flat.sequence')),
    ('evals.listening.listener', 'b', 'b')])
def test_what_a_file_leaves_out_can_be_overridden(path, text, value):
    """The reader's own signature says which names there are, and of which type."""
    c = system()
    override(c, path, text)
    found = c
    for key in re.findall(r'\w+', path):
        found = found[int(key) if key.isdecimal() else key]
    assert plain(found) == value and type(plain(found)) is type(value)


@pytest.mark.parametrize(('path', 'text', 'says'), [
    ('stages[0].acumulate', '2', "did you mean 'accumulate'? (legal: accumulate, "),
    ('stages[0].accumulate', '1.5', "takes int, got '1.5'"),
    ('stages[0].clip', 'much', "takes float, got 'much'"),
    ('stages[0].data.c', '1', 'legal: a, b'), ('mesh.fspd', '2', "did you mean 'fsdp'? (legal: "),
    ('backbone.windw_columns', '2', "did you mean 'window_columns'? (legal: "),
    ('backbone.rngs', '2', "backbone has no option 'rngs'"),        # not the user's to give
    ('layout.rng', '2', "layout has no option 'rng'"),
    ('mesh.rules.column', 'data', 'no mesh.rules yet; give all of it, as in --config.mesh.rules='),
    ('stages[0].lora.rank', '2', 'no stages[0].lora yet; give all of it'),
    ('evals.listening.split', 'x', "has no option 'split'"), ('evals.asr.source', 'a', 'listening'),
    ('data.sources.c.select', '()', 'legal: a, b')])
def test_what_cannot_be_added_to_a_file(path, text, says):
    c = system()
    assert says in refused(override, c, path, text)
    assert plain(c) == plain(system())


@pytest.mark.parametrize(('path', 'text', 'says'), [
    ('sede', '1', "config has no option 'sede'; did you mean 'seed'? (legal: backbone, columns"),
    ('backbone.mpl', '1', "backbone has no option 'mpl'; did you mean 'mlp'?"),
    ('stages[0].nam', '1', "[0] has no option 'nam'; did you mean 'name'? (legal: accum"),
    ('stages[0].data.txt', '1', "stages[0].data has no option 'txt'; did you mean 'text'?"),
    ('stages[2].lr', '1', 'stages has items 0..1, no item 2'),
    ('stages[-1].lr', '1', 'stages has items 0..1, no item -1'),
    ('stages.lr', '1', 'stages has items; write stages[0].lr'),
    ('stages.1.lr', '1', 'stages has items; write stages[1].lr'),
    ('stages[0]', '{}', 'set a name inside it'), ('span[0]', '1', 'set a name inside it'),
    ('seed[0]', '1', 'seed has no items'), ('seed.x', '1', "seed is a single value without 'x'"),
    ('seed', 'x', "takes int, got 'x'"), ('seed', '1.5', "takes int, got '1.5'"),
    ('seed', 'True', "takes int, got 'True'"), ('seed', 'None', "takes int, got 'None'"),
    ('loud', '1', "takes bool, got '1'"), ('rate', 'True', 'takes float'),
    ('rate', 'nan', 'takes float'), ('span', '3', 'takes tuple'), ('backbone', '3', 'takes dict'),
    ('stages[0].lr', 'fast', 'takes float'), ('', '1', 'write a path like stages[0].lr'),
    ('seed.', '1', 'write a path'), ('stages[x].lr', '1', 'write a path')])
def test_overrides_that_are_refused_change_nothing(path, text, says):
    c = tree()
    said = refused(override, c, path, text)
    assert said.startswith(f'--config.{path}') and says in said
    assert plain(c) == plain(tree())


# Fingerprints.

def test_a_fingerprint_is_of_what_is_trained():
    first = fingerprint(tree())
    assert re.fullmatch('[0-9a-f]{12}', first)
    assert first == fingerprint(plain(tree())) == fingerprint(dict(reversed(plain(tree()).items())))
    for path, text in (('seed', '4'), ('stages[1].lr', '2e-3'), ('backbone.mlp.width', '5'),
                       ('stages[0].data.text', '0.5'), ('span', '(6, 2)'), ('none', '0')):
        c = tree()
        override(c, path, text)
        assert fingerprint(c) != first, path
    c = tree()
    override(c, 'evals.asr.limit', '9')     # how it is measured is no part of it
    assert fingerprint(c) == first


def test_a_fingerprint_is_the_same_in_another_process():
    code = ('import os, test_config; from jaxsd.config import fingerprint; '
            'print(fingerprint(test_config.tree()))')
    found = {subprocess.run([sys.executable, '-c', code], cwd=os.path.dirname(__file__), text=True,
                            capture_output=True, check=True,
                            env=os.environ | {'PYTHONHASHSEED': seed}).stdout for seed in '12'}
    assert found == {fingerprint(tree()) + '\n'}


# Files.

@pytest.mark.parametrize('arg', ['', ':demo', ':tiny'])
def test_a_stored_config_is_the_one_that_was_read(arg):
    for path in sorted((ROOT / 'configs').glob('[a-z]*.py')):
        c = read(f'{path}{arg}')
        again = stored({'config': json.loads(to_json(c)), 'file': str(path)}, 'here')
        assert fingerprint(again) == fingerprint(c) and plain(again) == plain(c)


def test_a_file_is_read_with_its_argument(tmp_path):
    file = tmp_path / 'system.py'
    file.write_text(WHOLE)
    assert configs.read(str(file)).columns == 8
    assert configs.read(f'{file}:width=16,tiny').columns == 16


@pytest.mark.parametrize(('text', 'arg', 'says'), [
    (None, '', 'no file'), ('def get_config(', '', 'cannot be executed: SyntaxError'),
    ('import no_such_thing', '', "executed: ModuleNotFoundError: No module named 'no_such"),
    ('x = 1', '', 'defines no get_config(arg)'),
    ('def get_config(arg): return 1 / 0', '', 'failed: ZeroDivisionError'),
    ('def get_config(arg): raise KeyError("mix")', '', "failed: KeyError: 'mix'"),
    ('def get_config(): return 1', '', 'failed: TypeError'),
    ('def get_config(arg): pass', '', 'must return a ConfigDict, not NoneType'),
    (WHOLE, ':tinny', "unknown config argument 'tinny'; legal: tiny, width"),
    (WHOLE.replace('c.seed', 'c.sead'), '', "has no option 'sead'; did you mean 'seed'?"),
    (WHOLE.replace('c.seed, c.columns = 0, arg.width', ''), '', 'lacks seed, columns')])
def test_files_that_are_refused(tmp_path, text, arg, says):
    file = tmp_path / 'system.py'
    if text is not None:
        file.write_text(text)
    said = refused(configs.read, f'{file}{arg}')
    assert says in said
    assert str(file) in said or arg

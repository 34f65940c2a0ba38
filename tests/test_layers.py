# SPDX-License-Identifier: Apache-2.0
"""Do imports follow the layers, do system names stay in configs, is every option worth having?"""

import ast
import io
import pathlib
import re
import sys
import tokenize

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / 'jaxsd').rglob('*.py'))
PIPELINES = sorted((ROOT / 'data_pipelines').rglob('*.py'))
CONFIGS = sorted((ROOT / 'configs').rglob('*.py'))

NUMPY, JAX = {'numpy'}, {'jax', 'numpy'}
FILES = {'numpy', 'grain', 'tensorflow_datasets', 'array_record'}
ANY = None
# module: (row, neighbors it may import although they are not below it, other packages at import
# time, packages it may not import even inside a function). A module imports from lower rows only.
LAYERS = {
    'types': (0, (), NUMPY, {'jax', 'flax'}),
    'config': (0, (), {'numpy', 'ml_collections'}, {'jax', 'flax'}),
    'flags': (0, (), set(), {'jax', 'flax'}),
    'vocab': (0, ('types', 'config'), {'numpy', 'ml_collections'}, {'jax', 'flax'}),
    'layout': (1, (), NUMPY, {'jax', 'flax', 'grain', 'tensorflow_datasets', 'soundfile'}),
    'packing': (1, (), NUMPY, {'jax', 'flax', 'grain', 'tensorflow_datasets'}),
    'dataset': (1, (), FILES, {'jax', 'flax', 'optax', 'orbax'}),
    'turns': (1, (), NUMPY, {'jax', 'flax', 'grain', 'tensorflow_datasets', 'soundfile'}),
    'sharding': (1, (), JAX, set()),
    'nn': (1, ('sharding',), JAX | {'flax'}, set()),
    'attention': (1, ('sharding',), JAX, set()),
    'objective': (1, (), JAX, set()),
    'within': (1, ('nn',), JAX | {'flax'}, set()),
    'data': (2, ('codec',), FILES | {'ml_collections'}, {'jax', 'flax', 'optax', 'orbax'}),
    'codec': (2, (), NUMPY | {'safetensors'}, {'jax', 'flax', 'optax', 'orbax', 'grain'}),
    'goodput': (1, (), NUMPY, {'jax', 'flax', 'optax', 'orbax', 'grain'}),
    'flow': (1, (), JAX, set()),
    'verdict': (1, (), NUMPY, {'jax', 'flax', 'optax', 'orbax', 'grain'}),
    'processes': (2, (), JAX, {'flax', 'optax', 'orbax', 'grain'}),
    'run': (2, (), JAX, {'flax', 'optax', 'orbax', 'grain'}),
    'encoder': (2, (), JAX | {'flax'}, set()),
    'frontend': (2, (), JAX | {'flax'}, set()),
    'backbone': (2, (), JAX | {'flax'}, set()),
    'head': (2, (), JAX | {'flax'}, set()),
    'model': (3, (), JAX | {'flax'}, {'optax', 'orbax'}),
    'stage': (3, (), JAX | {'flax', 'optax'}, {'orbax'}),
    'checkpoint': (3, (), JAX | {'orbax', 'etils'}, {'optax'}),
    'generate': (3, (), JAX | {'flax'}, {'optax', 'orbax', 'grain'}),
    'trained': (4, (), ANY, set()),
    'journal': (4, (), ANY, set()),
    'state': (4, (), JAX | {'optax'}, set()),
    'train': (5, ('export',), ANY, set()),
    'reply': (5, (), ANY, set()),
    'likelier': (5, ('reply', 'speak'), ANY, set()),
    'dialogue': (5, (), ANY, set()),
    'live': (5, ('dialogue',), ANY, set()),
    'frames': (5, ('reply',), ANY, set()),
    'speak': (5, ('dialogue', 'frames', 'live', 'reply'), ANY, set()),
    'talk': (5, ('live', 'speak'), ANY, set()),
    'recognition': (5, ('likelier',), ANY, set()),
    'answering': (5, ('frames', 'likelier', 'recognition', 'reply'), ANY, set()),
    'evaluate': (5, ('answering', 'dialogue', 'likelier', 'recognition'), ANY, set()),
    'plan': (5, ('train',), ANY, set()),
    'bench': (5, ('train',), ANY, set()),
    'ablate': (5, ('train', 'evaluate', 'bench', 'plan'), ANY, set()),
    'pairing': (5, ('answering', 'likelier'), ANY, set()),
    'export': (5, (), ANY, set()),
    'systems': (5, ('evaluate',), ANY, set()),
    'draw': (4, (), NUMPY, {'jax', 'flax'}),
    'report': (5, (), NUMPY, {'jax', 'flax', 'optax', 'orbax', 'grain'}),
    'cli': (6, (), ANY, set()),
}
NOT = {  # below, and still forbidden: (from, to): what to do instead
    **{(a, 'config'): 'take keyword arguments' for a in
       ('sharding', 'nn', 'within', 'attention', 'objective', 'encoder', 'frontend', 'backbone',
        'head')},
    **{(a, b): 'a grid or a batch is all it may see' for a in ('model', 'stage', 'checkpoint')
       for b in ('data', 'dataset', 'layout', 'codec')},
    **{('generate', b): 'parameters and plans are all it may see' for b in
       ('config', 'data', 'dataset', 'codec', 'run')},
    **{(a, 'layout'): 'pass the grid' for a in ('frontend', 'backbone', 'head', 'codec')},
    **{(a, b): 'workers must never wake an accelerator' for a in ('data', 'codec')
       for b in ('sharding', 'nn', 'attention', 'objective')},
}
SHARED_PART = {0: 'types', 1: 'types', 2: 'nn', 3: 'nn', 4: 'run', 5: 'run'}

# The systems of the survey: their names belong to configs, goldens, export's tables, docstrings.
SYSTEM = re.compile('moshi|spirit|omni|salmonn|speechgpt|usdm|emova|spectron|intrinsic|syncllm'
                    '|flatten_?lm|pslm|qwen.?audio|audiopalm|voxtlm', re.IGNORECASE)


def module_of(path: pathlib.Path) -> str:
    """The row's name: `layout` for jaxsd/layout/flat.py, `nn` for jaxsd/nn.py."""
    return path.relative_to(ROOT / 'jaxsd').parts[0].removesuffix('.py')


def imports(path: pathlib.Path, text: str | None = None):
    """(line, dotted name, whether at import time) for each import in `path`, which reads `text`."""
    tree = ast.parse(path.read_text() if text is None else text, str(path))
    lazy = {id(node) for f in ast.walk(tree)
            if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for node in ast.walk(f)}
    for node in ast.walk(tree):
        now = id(node) not in lazy
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, now) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).with_suffix('').parts[:-node.level or None]
            home = '.'.join([*(package if node.level else ()), *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, f'{home}.{alias.name}', now


def complaint(source: str, name: str, now: bool) -> str:
    """Why `jaxsd/<source>` may not import `name`, or ''. `now`: at import time."""
    package, _, rest = name.partition('.')
    row, neighbors, others, never = LAYERS[source]
    if package in ('data_pipelines', 'configs', 'tests'):
        return f'{source} may not import {package}: the library stands alone'
    if package != 'jaxsd':
        known = others is ANY or package in others or package in sys.stdlib_module_names
        if package in never or (now and not known):
            why = 'import it inside the function' if package not in never else 'not in this layer'
            return f'{source} may not import {package}: {why}'
        return ''
    target = rest.partition('.')[0]
    if target in (source, '', '__version__') or target in neighbors:
        return ''
    if target not in LAYERS:
        return f'{source} imports jaxsd.{target}, which has no row in tests/test_layers.py'
    if (source, target) in NOT:
        return f'{source} may not import {target}: {NOT[source, target]}'
    if LAYERS[target][0] >= row:
        return f'{source} may not import {target}: move the shared part to {SHARED_PART[row]}'
    return ''


def test_every_module_has_a_row():
    modules = {module_of(path) for path in LIBRARY} - {'__init__', '__main__'}
    assert modules <= set(LAYERS), f'no row for {sorted(modules - set(LAYERS))}: add one to LAYERS'


def test_imports_follow_the_layers():
    found = [f'{path.relative_to(ROOT)}:{line}: {why}'
             for path in LIBRARY if module_of(path) in LAYERS
             for line, name, now in imports(path)
             if (why := complaint(module_of(path), name, now))]
    assert not found, '\n' + '\n'.join(dict.fromkeys(found))


@pytest.mark.parametrize('source, name, now, sentence', [
    ('head', 'jaxsd.backbone', True, 'head may not import backbone: move the shared part to nn'),
    ('train', 'jaxsd.evaluate', True, 'train may not import evaluate: move the shared part to run'),
    ('data', 'jax', False, 'data may not import jax: not in this layer'),
    ('layout', 'grain', False, 'layout may not import grain: not in this layer'),
    ('nn', 'jaxsd.config', True, 'nn may not import config: take keyword arguments'),
    ('codec', 'librosa', True, 'codec may not import librosa: import it inside the function'),
    ('objective', 'flax.nnx', True, 'objective may not import flax: import it inside the function'),
    ('model', 'jaxsd.data', False,
     'model may not import data: a grid or a batch is all it may see'),
    ('cli', 'data_pipelines.demo', False,
     'cli may not import data_pipelines: the library stands alone'),
    ('evaluate', 'jaxsd.generate', True, ''), ('nn', 'jaxsd.sharding', True, ''),
    ('codec', 'librosa', False, ''), ('layout', 'jaxsd.layout.show', True, ''),
])
def test_the_rule_says_what_to_do(source, name, now, sentence):
    assert complaint(source, name, now) == sentence


def test_relative_imports_are_seen():
    text = 'from . import backbone\n\ndef f():\n    from jaxsd import model\n'
    assert list(imports(ROOT / 'jaxsd' / 'head.py', text)) == [
        (1, 'jaxsd.backbone', True), (4, 'jaxsd.model', False)]


def test_configs_are_data():
    legal = ('jaxsd.config', 'configs._parts', 'ml_collections')
    found = [f'{path.relative_to(ROOT)}:{line}: a config may not import {name}'
             for path in CONFIGS for line, name, _ in imports(path)
             if not name.startswith(legal) and name.split('.')[0] not in sys.stdlib_module_names]
    assert not found, '\n' + '\n'.join(found)


def test_pipelines_use_only_the_file_formats():
    """And `turns`, numpy alone: what is simulated is loud where what is measured is."""
    legal = {'codec', 'dataset', 'flags', 'turns', 'types', 'vocab', '__version__'}
    found = [f'{path.relative_to(ROOT)}:{line}: data_pipelines may not import {name}'
             for path in PIPELINES for line, name, _ in imports(path)
             if name.split('.')[0] == 'jaxsd' and name.split('.')[1] not in legal]
    assert not found, '\n' + '\n'.join(found)


def prose(tree) -> set[int]:
    """Lines where a system may be named: strings that stand alone, and imports of its package."""
    return {line for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            or isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            for line in range(node.lineno, node.end_lineno + 1)}


def test_mechanisms_name_no_system():
    found = []
    for path in LIBRARY:
        if module_of(path) == 'export':
            continue
        if SYSTEM.search(path.stem):
            found.append(f'{path.relative_to(ROOT)}: named for a system')
        text = path.read_text()
        tree = ast.parse(text)
        packages = {name.partition('.')[0] for _, name, _ in imports(path)}
        allowed = prose(tree)
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if (token.type != tokenize.COMMENT and token.start[0] not in allowed
                    and token.string.strip('\'"') not in packages and SYSTEM.search(token.string)):
                found.append(f'{path.relative_to(ROOT)}:{token.start[0]}: {token.string[:60]}: '
                             'name the mechanism, not the system')
    assert not found, '\n' + '\n'.join(found)


def test_no_attics():
    attic = re.compile(r'utils?|helpers?|common|base|misc|experimental|.*_v\d+')
    found = [str(path.relative_to(ROOT)) for path in LIBRARY + PIPELINES + CONFIGS
             if any(attic.fullmatch(part.removesuffix('.py'))
                    for part in path.relative_to(ROOT).parts)]
    assert not found, f'{found}: a file is named for what it does'


def test_files_open_with_license_and_paragraph():
    found = []
    for path in LIBRARY + PIPELINES + CONFIGS + sorted((ROOT / 'tests').rglob('*.py')):
        text = path.read_text()
        if not text.startswith('# SPDX-License-Identifier: Apache-2.0\n'):
            found.append(f'{path.relative_to(ROOT)}: no SPDX line')
        if not ast.get_docstring(ast.parse(text)):
            found.append(f'{path.relative_to(ROOT)}: no paragraph that says what it is')
    assert not found, '\n' + '\n'.join(found)


def test_nothing_is_unpickled():
    text = {path: path.read_text() for path in LIBRARY + PIPELINES}
    found = [str(path.relative_to(ROOT)) for path in text
             if re.search(r'\bpickle\b|allow_pickle=True|joblib\.load|torch\.load\(', text[path])]
    assert not found, f'{found}: use safetensors, json or npz without pickle'


MECHANISMS = ('layout', 'frontend', 'encoder', 'backbone', 'head', 'objective', 'codec', 'stage',
              'vocab')


def options():
    """(mechanism, option, default) for each keyword-only option that has a default."""
    for path in LIBRARY:
        if module_of(path) not in MECHANISMS:
            continue
        body = ast.parse(path.read_text()).body
        named = [(f.name, f) for f in body if isinstance(f, ast.FunctionDef)]
        named += [(c.name, f) for c in body if isinstance(c, ast.ClassDef) for f in c.body
                  if isinstance(f, ast.FunctionDef) and f.name == '__init__']
        for name, f in named:
            for arg, default in zip(f.args.kwonlyargs, f.args.kw_defaults, strict=True):
                if default is not None and not name.startswith('_'):
                    yield f'{module_of(path)}.{name}', arg.arg, literal(default)


def literal(node):
    """The value of a literal, or the node itself, which equals no default."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return node


def settings() -> dict[str, list]:
    """What configs and tests set each name to: f(x=1), {'x': 1}, c.x = 1, --config.x=1."""
    out: dict[str, list] = {}
    for path in CONFIGS + sorted((ROOT / 'tests').glob('*.py')):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg:
                out.setdefault(node.arg, []).append(literal(node.value))
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(key.value, str):
                        out.setdefault(key.value, []).append(literal(value))
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Attribute):
                        out.setdefault(target.attr, []).append(literal(node.value))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                for name in re.findall(r'--config\.[\w.\[\]]*?(\w+)=', node.value):
                    out.setdefault(name, []).append(node)
    return out


def test_every_option_is_varied():
    """An option that no config and no test ever sets to something else is not an option."""
    given = settings()
    found = [f'{mechanism}: option {name} is never set to anything but {default!r}: inline it'
             for mechanism, name, default in options()
             if all(type(value) is type(default) and value == default
                    for value in given.get(name, []))]
    assert not found, '\n' + '\n'.join(found)


def test_only_the_verbs_print():
    noisy = [f'{path.relative_to(ROOT)}:{node.lineno}'
             for path in LIBRARY if LAYERS.get(module_of(path), (9,))[0] <= 3
             for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'print']
    assert not noisy, f'{noisy}: return it, or let a verb say it'

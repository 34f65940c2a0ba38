# SPDX-License-Identifier: Apache-2.0
"""What a report reads. No file is trusted: it may be missing, cut short, huge, of another shape."""

import ast
import itertools
import json
import os
import pathlib

LINES = 1_000_000           # of a metrics file that are read
LINE_BYTES = 1 << 18
JSON_BYTES = 1 << 24


def as_dict(x) -> dict:
    return x if isinstance(x, dict) else {}


def as_dicts(x) -> list[dict]:
    return [e for e in x if isinstance(e, dict)] if isinstance(x, list) else []


def read_json(path: pathlib.Path, kind: type):
    """The JSON in `path` if it is a `kind`, else an empty one."""
    try:
        with open(path, 'rb') as f:
            found = json.loads(f.read(JSON_BYTES))
    except (OSError, ValueError, RecursionError):
        return kind()
    return found if isinstance(found, kind) else kind()


def read_lines(path: pathlib.Path) -> list[dict]:
    """The whole lines of a JSON-lines file; a line that a crash cut short is left out."""
    out = []
    try:
        with open(path, 'rb') as f:
            for line in itertools.islice(iter(lambda: f.readline(LINE_BYTES), b''), LINES):
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(entry, dict):
                    out.append(entry)
    except OSError:
        return []
    return out


def stages_of(lines: list[dict]) -> dict[str, list[dict]]:
    """Metrics by stage, sorted by step; lines of one step (training, held out) become one."""
    out: dict[str, dict[int, dict]] = {}
    for line in lines:
        if isinstance(line.get('step'), int) and abs(line['step']) < 1e15:
            steps = out.setdefault(str(line.get('stage', '')), {})
            steps[line['step']] = steps.get(line['step'], {}) | line
    return {stage: [rows[step] for step in sorted(rows)] for stage, rows in out.items()}


def read_run(folder: pathlib.Path) -> dict:
    run = read_json(folder / 'config.json', dict)
    ledger = read_lines(folder / 'ledger.jsonl')
    file = next((e['file'] for e in [run, *reversed(ledger)] if isinstance(e.get('file'), str)), '')
    config = run.get('config') if isinstance(run.get('config'), dict) else {}
    file = file or _namesake(folder, config)
    return {'folder': folder, 'name': folder.resolve().name, 'file': file,
            'doc': str(run.get('doc') or ast.get_docstring(_tree(file)) or ''),  # the paper card
            'fingerprint': run.get('fingerprint', ''),
            'config': config, 'ledger': ledger,
            'stages': stages_of(read_lines(folder / 'metrics.jsonl')),
            'evaluation': [e for e in read_json(folder / 'evaluation.json', list)
                           if isinstance(e, dict)]}


def _tree(spec: str) -> ast.Module:
    """The syntax of a config file, which is parsed and never executed; empty if there is none."""
    path = spec.partition(':')[0]
    try:
        if path.endswith('.py') and os.path.getsize(path) <= JSON_BYTES:
            return ast.parse(pathlib.Path(path).read_text('utf-8'))
    except (OSError, SyntaxError, ValueError, RecursionError):
        pass
    return ast.parse('')


def _namesake(folder: pathlib.Path, config: dict) -> str:
    """configs/NAME.py for a run in folder NAME, if it names all mechanisms of `config`; or ''."""
    spec = os.path.join('configs', folder.resolve().name + '.py')
    named = {str(n.value) for n in ast.walk(_tree(spec)) if isinstance(n, ast.Constant)}
    used = {str(config[slot].get('name')) for slot in ('layout', 'frontend', 'head', 'objective')
            if isinstance(config.get(slot), dict)}
    return spec if used and used <= named else ''

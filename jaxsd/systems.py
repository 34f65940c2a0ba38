# SPDX-License-Identifier: Apache-2.0
"""One page of every system: how it writes time down, how it is trained, what its demo can do.

The page is written from the config files, from run directories made of their demos, from the
record that it keeps beside itself of runs that it has shown before, and from nothing else. A figure
appears only where the run was whole and of the config as it stands, otherwise there is a dash and
the reason; one of another corpus than the one at hand is marked. Who runs the demos is not its
business (launch/demos.sh does).
"""

import datetime
import json
import os
import re
from typing import NamedTuple

import numpy as np

from jaxsd import config as configs
from jaxsd import data, dataset, evaluate, goodput, model
from jaxsd import run as rundir
from jaxsd import stage as stages
from jaxsd.config import ConfigError, plain
from jaxsd.layout import show
from jaxsd.vocab import Text

COLUMNS = 12            # drawn of a grid of streams; of one row, as a text, four times as many


class Run(NamedTuple):
    """A demo that was trained: what its evaluation found, and where and when it was made."""

    spec: str           # the config file and its argument: demo, perhaps a shorter one
    config: str         # the fingerprint of what that said
    figures: list       # (task, metric, trained, untrained, wrong input, items) of what is judged
    revision: str       # of the code that trained it
    measured: str       # and of the code that evaluated it
    day: str
    minutes: float      # of training: all of it but what lay between two runs
    device: str         # that trained it, and how many
    dataset: str        # the mark of the corpus


def write(specs: list[str], runs: str, out: str) -> None:
    """Writes the page of the config files `specs`, whose demos lie in `runs`/NAME, to `out`.

    A file may have an argument, the name of a recipe: that of 'configs/twist.py:recipe=slam' is
    'configs/twist.py:demo,recipe=slam', and lies in `runs`/twist,recipe=slam.
    Beside it lies the record of the runs shown (`out` with the ending .json): a run that is not in
    `runs`, made on another machine perhaps, is shown from there while its config is the same.
    Raises ConfigError for a file that is no config with a demo or has no Size and Evidence.
    """
    cards, rows, made = [], [], []
    record = os.path.splitext(out)[0] + '.json'
    before = read_record(record)
    named = set(map(_name, specs))
    kept = {name: run._asdict() for name, run in before.items() if name not in named}
    for spec in specs:
        doc = configs.made_by(spec, ())['doc']
        for name in ('Size', 'Evidence'):
            if not told(doc, name):
                raise ConfigError(f'{spec}: its docstring has no line {name}')
        published, demo, name = configs.read(spec), configs.read(_demo(spec)), _name(spec)
        run = read_run(os.path.join(runs, name), spec)
        if isinstance(run, str) and name in before:
            run = _as_it_stands(before[name], run)
        if isinstance(run, Run):
            kept[name] = run._asdict()
            demo = configs.read(run.spec)
            if run.dataset == _corpus(demo):
                run = run._replace(dataset='')      # what is said of a run is another one's mark
            made.append(run)
        rows.append(_row(spec, doc, demo, run))
        cards.append(_card(spec, doc, published, demo, run))
    rundir.write_atomic(out, '\n'.join([*_head(demo, made), *rows, '', *cards]))
    rundir.write_atomic(record, json.dumps(kept, indent=1, sort_keys=True) + '\n')


def _demo(spec: str) -> str:
    """The demo of a config file, or of one of its recipes."""
    file, _, arg = spec.partition(':')
    return f'{file}:demo' + f',{arg}' * bool(arg)


def _name(spec: str) -> str:
    file, _, arg = spec.partition(':')
    return os.path.basename(file).removesuffix('.py') + f',{arg}' * bool(arg)


def read_record(path: str) -> dict[str, Run]:
    """The runs, by the names of their systems, that an earlier page has shown."""
    try:
        with open(path, encoding='utf-8') as f:
            return {name: Run(**run) for name, run in json.load(f).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise ConfigError(f'{path} is no record of runs ({e}); move it away') from None


def _as_it_stands(run: Run, otherwise: str) -> Run | str:
    """`run` if its config still says what it said."""
    try:
        return run if configs.fingerprint(configs.read(run.spec)) == run.config else otherwise
    except ConfigError:
        return otherwise


def _corpus(config) -> str:
    """The mark of the corpus at hand, as the last stage of `config` reads it."""
    return data.fingerprint(config, plain(config.stages)[-1], model.make_vocab(config))['dataset']


def told(doc: str, name: str) -> str:
    """What a docstring says behind `name` at the left edge, its continued lines joined."""
    found = re.search(rf'^{name}  +(.*(?:\n {{6,}}\S.*)*)', doc, re.MULTILINE)
    return ' '.join(found[1].split()) if found else ''


def read_run(workdir: str, spec: str) -> Run | str:
    """The run of the demo of the config file `spec` in `workdir`, or why nothing of it is shown."""
    if not os.path.exists(os.path.join(workdir, 'config.json')):
        return 'not run'
    try:
        file = rundir.read_run(workdir).get('file', '')
        if not file.startswith(_demo(spec)):
            return f'not shown: {workdir} is a run of {file or "an unknown config"}'
        config = configs.read(file)
        rundir.same_run(workdir, config, '')
        ledger = rundir.read_ledger(workdir)
        entries = evaluate.recorded(workdir)
    except ConfigError as e:
        return f'not shown: {e}'
    last = stages.stages(config)[-1]
    begun = [e for e in ledger if e.get('event') in ('start', 'resume') and 'dataset' in e]
    corpora = {e['dataset'] for e in begun}
    if len(corpora) > 1:
        return f'not shown: its stages read several corpora, {", ".join(sorted(corpora))}'
    shown = [e for e in entries if e.get('split') == 'test' and e.get('judged') and
             (e['stage'] == evaluate.UNTRAINED or
              (e['stage'], e['step']) == (last.name, last.steps))]
    if not any(e['stage'] == last.name for e in shown):
        return 'not shown: not trained to the end and evaluated'
    trained, measured = (' and '.join(dict.fromkeys(e.get('revision', 'unknown') for e in x))
                         for x in (begun, shown))
    day = datetime.datetime.fromtimestamp(begun[-1]['time_s'], datetime.UTC).strftime('%Y-%m-%d')
    seconds = sum(x for cause, x in goodput.account(ledger).items() if cause != 'idle')
    devices = ' and '.join(dict.fromkeys(
        f'{e["devices"]} × {e["device_kind"]}' for e in begun))
    return Run(file, configs.fingerprint(config), _figures(shown), trained, measured, day,
               seconds / 60, devices, corpora.pop())


def _figures(entries: list[dict]) -> list[tuple]:
    """(task, metric, trained, untrained, wrong input, items) of every task that is judged."""
    untrained = {e['task']: e for e in entries if e['stage'] == evaluate.UNTRAINED}
    out = []
    for e in entries:
        if e['stage'] != evaluate.UNTRAINED:
            metric, floor = e['judged']
            before = untrained.get(e['task'], {}).get('metrics', {}).get(metric)
            beside = e['metrics'].get(floor) if isinstance(floor, str) else floor
            out.append((e['task'], metric, e['metrics'].get(metric), before, beside, e['items']))
    return out


def _number(x) -> str:
    return '–' if x is None else f'{x:.2f}' if 0 < abs(x) < 1 else f'{x:.1f}'


def _title(doc: str, spec: str) -> tuple[str, str]:
    """(name, what it is) by a docstring's first line; a recipe has its own name behind."""
    name, _, rest = doc.partition('\n')[0].partition(': ')
    arg = spec.partition(':')[2]
    return name + f' ({arg})' * bool(arg), rest.rstrip('.')


def _papers(doc: str) -> str:
    found = dict.fromkeys(re.findall(r'arXiv (\d{4}\.\d{5})', ' '.join(doc.split())))
    links = [f'[{x}](https://arxiv.org/abs/{x})' for x in found]
    links += [f'[{x}](https://{x})' for x in dict.fromkeys(
        re.findall(r'\b[\w-]+\.com/[\w/.-]*\w', doc))]
    return ', '.join(links)


def _head(config, made: list[Run]) -> list[str]:
    manifest = dataset.open_dataset(config.data.path, config.codec).manifest
    hours = manifest['splits']['train']['hours']
    revisions = sorted({r.revision for r in made})
    measured = sorted({r.measured for r in made})
    days = sorted({r.day for r in made})
    devices = sorted({r.device for r in made})
    when = (f'The demos shown were trained at commit {", ".join(revisions)} on '
            f'{" and ".join(days)} and measured at {", ".join(measured)}' if made else
            'No demo has been trained here')
    took = f' ({", ".join(devices)}), beside other work' if made else ''
    others = sorted({r.dataset for r in made} - {''})
    return [
        '# Systems', '',
        'Written by `jaxsd systems` from the config files and the run directories of their demos, '
        'which `launch/demos.sh` trains and evaluates: one command for all of it. systems.json '
        'keeps what was measured.', '',
        f'{when}. Corpus: `{manifest["command"]}`, synthesized speech of a closed vocabulary, '
        f'{hours:.1f} h to train on; figures are of its split `test`, sentences and wordings '
        'never heard in training.', '',
        '*Untrained* is the same model as the seed draws it. *Wrong input* is the same answers '
        'beside what was not asked (another sentence, another question), or what guessing makes. '
        'No model that reads text alone was trained as a floor. '
        f'A dash: not run, or not measurable so. *Minutes* are those of training{took}. '
        'Nothing here was trained at its published size.', '',
        *([f'† was trained and measured on another corpus ({", ".join(others)}): made on another '
           'machine, where sums come out in another order, or with other hours.', '']
          if others else []),
        '| system | demo figure | demo | untrained | wrong input | minutes |',
        '|---|---|---:|---:|---:|---:|']


def _row(spec: str, doc: str, demo, run) -> str:
    name, _ = _title(doc, spec)
    link = f'[{name}](#{_anchor(name)})'
    if isinstance(run, str):
        task = ', '.join(sorted(set(plain(demo.evals)) - {'likelihood'}))
        return f'| {link} | {task} | – | – | – | – |'
    if run.spec != _demo(spec):
        link += f' (`{run.spec.removeprefix(spec)}`)'
    link += ' †' * bool(run.dataset)
    return '\n'.join(
        f'| {link if i == 0 else ""} | {task}: {metric} | {_number(x)} | {_number(before)} | '
        f'{_number(beside)} | {f"{run.minutes:.0f}" if i == 0 else ""} |'
        for i, (task, metric, x, before, beside, _) in enumerate(run.figures))


def _anchor(name: str) -> str:
    return re.sub(r'[^\w -]', '', name.lower()).replace(' ', '-')


def _card(spec: str, doc: str, published, demo, run) -> str:
    name, what = _title(doc, spec)
    lines = [f'## {name}', '', f'{what[:1].upper()}{what[1:]}. `{spec}`. {_papers(doc)}', '',
             '```', _grid(doc, demo), '```', '']
    lines += ['| stage | begins from | steps × rows | trained | reads |', '|---|---|---|---|---|']
    for size, config in (('', published), ('demo: ', demo)):
        lines += [f'| {size}{s.name} | {s.start} | {s.steps:,} × {s.batch:,} | {_trained(s)} | '
                  f'{_mixture(s)} |' for s in stages.stages(config)]
    counts = [model.count(model.abstract(c)[1]) for c in (published, demo)]
    lines += ['', f'Parameters: {counts[0]:,} at published size, {counts[1]:,} in the demo. '
              f'{_sentence(told(doc, "Size"))}', '']
    if isinstance(run, str):
        lines += [f'Demo: {run}.', '']
    else:
        lines += ['| demo: task | metric | trained | untrained | wrong input | items |',
                  '|---|---|---:|---:|---:|---:|']
        lines += [f'| {task} | {metric} | {_number(x)} | {_number(before)} | {_number(beside)} | '
                  f'{items} |' for task, metric, x, before, beside, items in run.figures]
        where = f', on corpus {run.dataset}' if run.dataset else ''
        lines += ['', f'`{run.spec}`, trained at {run.revision}{where}, {run.day}, in '
                  f'{run.minutes:.0f} minutes on {run.device}; measured at {run.measured}.', '']
    lines += [f'Reproduced, and not. {_sentence(told(doc, "Evidence"))}', '']
    return '\n'.join(lines)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ('' if text.endswith('.') else '.')


def _grid(doc: str, config) -> str:
    """What the docstring's command `look` draws, narrow enough for a page."""
    found = re.search(r'^  look .*--source (\w+)', doc, re.MULTILINE)
    source = found[1] if found and found[1] in config.data.sources else next(
        iter(plain(config.stages)[-1]['data']))
    v = model.make_vocab(config)
    try:
        grid = data.grid(config, source, v)
    except ValueError as e:
        return f'{source}: {e}'
    first, columns = 0, 4 * COLUMNS
    if len(v.rows) > 1:         # from shortly before the first column that is learned
        first, columns = max(0, int(np.argmax(grid.weights.any(0))) - 4), COLUMNS
    piece = Text(v.tokenizer).piece if v.tokenizer else None
    return f'{source}\n' + show.text(grid, v, columns=(first, first + columns),
                                     pieces=piece).rstrip()


def _trained(stage: stages.Stage) -> str:
    rules = [f'`{pattern}` {"frozen" if m is None else f"× {m:.3g}"}' for pattern, m in stage.train]
    out = 'everything' if stage.train == (('.*', 1.0),) else '; '.join(rules).replace('|', '\\|')
    return out + (f'; low-rank terms {json.dumps(stage.lora)}' if stage.lora else '')


def _mixture(stage: stages.Stage) -> str:
    def shares(weights):
        total = sum(weights.values())
        return ', '.join(f'{name} {100 * w / total:.3g} %' for name, w in sorted(
            weights.items(), key=lambda x: -x[1]) if w)
    apart = stage.apart and (f'; apart, {100 * stage.apart["share"]:.3g} % of the steps: '
                             f'{shares(stage.apart["data"])}')
    return shares(stage.data) + (apart or '')

# SPDX-License-Identifier: Apache-2.0
"""Runs as Weights & Biases shows them, sent from their files, while they train or afterwards.

Training writes metrics.jsonl and waits for no network; this reads it. Sent again, a run goes on
where it ended. WANDB_MODE=offline keeps everything in ./wandb for `wandb sync`.
"""

import os
import pathlib

from jaxsd.config import ConfigError
from jaxsd.report.ablation import own, read_ablation
from jaxsd.report.files import as_dict, read_json, read_lines, stages_of


def _runs(workdir: str) -> list[tuple[str, pathlib.Path]]:
    """(name, directory) of a run, or of every run of an ablation: question/arm/seed."""
    folder, name = pathlib.Path(workdir), os.path.basename(os.path.abspath(workdir))
    found = read_ablation(folder)
    if not found:
        return [(name, folder)]
    inside = [(f'{name}/{arm["name"]}/{run.get("seed")}', own(folder, run))
              for arm in found['arms'] for run in arm['runs']]
    return [(title, path) for title, path in inside if path and (path / 'config.json').exists()]


def send(workdirs: list[str], project: str) -> None:
    """Sends the runs in `workdirs`, and of ablations, to `project`. Raises ConfigError without
    wandb, or for no run.

    A point's step counts the points of all stages in their order; the stage's own step is one of
    its numbers, which stand under the stage's name. Evaluations become the summary.
    """
    try:
        import wandb
    except ImportError:
        raise ConfigError("--wandb needs the package wandb: pip install 'jaxsd[wandb]'") from None
    for name, folder in [run for workdir in workdirs for run in _runs(workdir)]:
        stored = read_json(folder / 'config.json', dict)
        if not stored:
            raise ConfigError(f'--workdir {folder} holds no run (no config.json)')
        run = wandb.init(project=project, name=name, config=as_dict(stored.get('config')),
                         id=f'{name.replace("/", "-")}-{stored.get("fingerprint", "")}',
                         resume='allow')
        points = [(stage, entry) for stage, entries in stages_of(
            read_lines(folder / 'metrics.jsonl')).items() for entry in entries]
        for n, (stage, entry) in list(enumerate(points))[run.step:]:
            run.log({stage: entry}, step=n)
        for entry in read_json(folder / 'evaluation.json', list):
            for metric, x in as_dict(as_dict(entry).get('metrics')).items():
                run.summary[f'{entry.get("task")}/{entry.get("stage")}/{metric}'] = x
        run.finish()

# SPDX-License-Identifier: Apache-2.0
"""Runs as Weights & Biases shows them, sent from their files, while they train or afterwards.

Training writes metrics.jsonl and waits for no network; this reads it. Sent again, a run goes on
where it ended. WANDB_MODE=offline keeps everything in ./wandb for `wandb sync`.
"""

import os
import pathlib

from jaxsd.config import ConfigError
from jaxsd.report.files import as_dict, read_json, read_lines, stages_of


def send(workdirs: list[str], project: str) -> None:
    """Sends the runs in `workdirs` to `project`. Raises ConfigError without wandb, or for no run.

    A point's step counts the points of all stages in their order; the stage's own step is one of
    its numbers, which stand under the stage's name. Evaluations become the summary.
    """
    try:
        import wandb
    except ImportError:
        raise ConfigError("--wandb needs the package wandb: pip install 'jaxsd[wandb]'") from None
    for workdir in workdirs:
        folder = pathlib.Path(workdir)
        stored = read_json(folder / 'config.json', dict)
        if not stored:
            raise ConfigError(f'--workdir {workdir} holds no run (no config.json)')
        name = os.path.basename(os.path.abspath(workdir))
        run = wandb.init(project=project, name=name, config=as_dict(stored.get('config')),
                         id=f'{name}-{stored.get("fingerprint", "")}', resume='allow')
        points = [(stage, entry) for stage, entries in stages_of(
            read_lines(folder / 'metrics.jsonl')).items() for entry in entries]
        for n, (stage, entry) in list(enumerate(points))[run.step:]:
            run.log({stage: entry}, step=n)
        for entry in read_json(folder / 'evaluation.json', list):
            for metric, x in as_dict(as_dict(entry).get('metrics')).items():
                run.summary[f'{entry.get("task")}/{entry.get("stage")}/{metric}'] = x
        run.finish()

# SPDX-License-Identifier: Apache-2.0
"""One page that shows what runs and ablations did: curves, drawn grids, tables, the audio itself.

The page is a single HTML file. It asks nothing of any network, holds no script, follows the
reader's light or dark setting and fits a phone. It is written from what lies in the run directories
and from nothing else; whatever is missing, damaged or not finite is said in words. All text from
the runs is escaped, and how much is embedded is bounded.
"""

import datetime
import os
import pathlib
import tempfile

from jaxsd import draw
from jaxsd.report.ablation import answer, chosen, read_ablation
from jaxsd.report.elements import esc, loss_curves
from jaxsd.report.files import read_lines, read_run, stages_of
from jaxsd.report.run import article

AUDIO_BYTES = 16 << 20      # of sound in one page


def write(workdirs: list[str], out_path: str, *, note: str = '') -> str:
    """Writes the page of the runs in `workdirs` to `out_path` and returns the path.

    note: a paragraph for the reader, above the runs. Raises ValueError for a directory that does
    not exist; pieces that are missing inside one are said on the page.
    """
    if not workdirs:
        raise ValueError('report: name at least one --workdir')
    for workdir in workdirs:
        if not os.path.isdir(workdir):
            raise ValueError(f'--workdir {workdir}: no such directory')
    folders = [pathlib.Path(workdir) for workdir in workdirs]
    asked = {folder: found for folder in folders if (found := read_ablation(folder))}
    runs = [run for folder in folders for run in (
        chosen(folder, asked[folder]) if folder in asked else [read_run(folder)])]
    style = pathlib.Path(__file__).with_name('page.css').read_text('utf-8')
    room = [AUDIO_BYTES]
    articles = [answer(folder, found) for folder, found in asked.items()]
    articles += [article(run, f'run-{i}', room) for i, run in enumerate(runs)]
    links = ''.join(f'<a href="#run-{i}">{esc(run["name"])}</a>' for i, run in enumerate(runs))
    when = datetime.datetime.now().strftime('%Y-%m-%d %H:%M')
    page = f'''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<title>Spoken language models: what the runs did</title><style>{style}</style></head><body>
<header><h1>Spoken language models: what the runs did</h1>
<p class="soft">Written {when} from {len(runs)} run director{"y" if len(runs) == 1 else "ies"}.</p>
{f"<p>{esc(note)}</p>" if note else ""}
<nav aria-label="Runs">{links if len(runs) > 1 else ""}</nav></header>
<main>{"".join(articles)}</main>
<footer class="small">Made by jaxsd. This page holds everything it shows and loads nothing.</footer>
</body></html>
'''
    _write_whole(out_path, page.encode('utf-8', 'replace'))
    return out_path


def curve_png(workdir: str, out_path: str, *, stage: str = '') -> str:
    """Draws the loss and its terms over the steps of `stage` (default: the last) as a picture.

    Raises ValueError when the run has no such curve.
    """
    stages = stages_of(read_lines(pathlib.Path(workdir) / 'metrics.jsonl'))
    stage = stage or next(reversed(stages), '')
    if stage not in stages:
        raise ValueError(f'{workdir} has no metrics of stage {stage!r} (there are: '
                         f'{", ".join(stages) or "none"})')
    title = f'{pathlib.Path(workdir).resolve().name}: stage {stage}'
    _write_whole(out_path, draw.curves_png(loss_curves(stages[stage]), title))
    return out_path


def _write_whole(path: str, content: bytes):
    """Writes to a temporary name beside `path`, then renames: the page is there whole or not."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=folder, prefix='.report-')
    try:
        with os.fdopen(handle, 'wb') as f:
            f.write(content)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException as e:
        os.unlink(partial)
        if isinstance(e, OSError):
            raise OSError(e.errno, f'{e.strerror} while writing', path) from None
        raise

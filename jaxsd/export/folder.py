# SPDX-License-Identifier: Apache-2.0
"""A folder that appears whole or not at all."""

import contextlib
import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator

from jaxsd.export import safetensors

log = logging.getLogger('jaxsd')
PARTIAL = '.partial'


@contextlib.contextmanager
def fresh(out: str) -> Iterator[str]:
    """A temporary folder beside `out` that takes its name when the block ends well.

    Raises ValueError where `out` has something in it or cannot be replaced, OSError where it cannot
    be written, both before the block begins if it can be known. After an error nothing is left. A
    kill leaves the temporary folder, .NAME.<letters>.partial, which the next export names and does
    not touch: another process may still be writing it.
    """
    if not out or not out.isprintable():
        raise ValueError(f'{out!r} names no folder')
    path = os.path.abspath(out)         # which a slash at the end does not make follow a link
    if os.path.islink(path):
        raise ValueError(f'{out} is a symbolic link; name a new folder')
    if os.path.lexists(path):
        if not os.path.isdir(path) or os.listdir(path):
            raise ValueError(f'{out} is not an empty folder; name a new one')
        if path == os.getcwd() or os.path.ismount(path):
            raise ValueError(f'{out} is in use, as the current folder or a mount; name a '
                             'folder inside it')
    parent, name = os.path.split(path)
    prefix = f'.{name}.'
    for left in sorted(glob.glob(glob.escape(os.path.join(parent, prefix)) + '*' + PARTIAL)):
        log.warning('%s is of an export that was cut short, unless one runs now: delete it', left)
    try:
        os.makedirs(parent, exist_ok=True)
        partial = tempfile.mkdtemp(PARTIAL, prefix, parent)
    except OSError as e:
        raise OSError(f'{out} cannot be written: {e.strerror}') from None
    try:
        yield partial
        os.chmod(partial, 0o755)
        os.replace(partial, path)
    except BaseException as e:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(e, OSError | safetensors.Error):
            reason = getattr(e, 'strerror', None) or e
            raise OSError(f'{out} cannot be written: {reason}') from None
        raise

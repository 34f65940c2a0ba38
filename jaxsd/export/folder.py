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

    Raises ValueError where `out` has something in it, OSError where it cannot be written. After an
    error nothing is left. A kill leaves the temporary folder, .NAME.<letters>.partial, which the
    next export names and does not touch: another process may still be writing it.
    """
    if os.path.isfile(out) or (os.path.isdir(out) and os.listdir(out)):
        raise ValueError(f'--out: {out} is not an empty folder; name a new one')
    parent = os.path.dirname(os.path.abspath(out))
    os.makedirs(parent, exist_ok=True)
    prefix = f'.{os.path.basename(os.path.abspath(out))}.'
    for left in sorted(glob.glob(glob.escape(os.path.join(parent, prefix)) + '*' + PARTIAL)):
        log.warning('%s is of an export that was cut short, unless one runs now: delete it', left)
    partial = tempfile.mkdtemp(PARTIAL, prefix, parent)
    try:
        yield partial
        os.chmod(partial, 0o755)
        os.replace(partial, out)
    except BaseException as e:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(e, OSError | safetensors.Error):
            reason = getattr(e, 'strerror', None) or e
            raise OSError(f'--out: {out} cannot be written: {reason}') from None
        raise

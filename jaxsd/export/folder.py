# SPDX-License-Identifier: Apache-2.0
"""A folder that appears whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def fresh(out: str) -> Iterator[str]:
    """A temporary folder beside `out` that takes its name when the block ends well.

    Raises ValueError where `out` has something in it. After an error nothing is left.
    """
    if os.path.isfile(out) or (os.path.isdir(out) and os.listdir(out)):
        raise ValueError(f'--out: {out} is not an empty folder; name a new one')
    parent = os.path.dirname(os.path.abspath(out))
    os.makedirs(parent, exist_ok=True)
    partial = tempfile.mkdtemp(prefix=f'.{os.path.basename(out)}.', dir=parent)
    try:
        yield partial
        os.chmod(partial, 0o755)
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise

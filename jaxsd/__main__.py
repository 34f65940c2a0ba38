# SPDX-License-Identifier: Apache-2.0
"""`python -m jaxsd`."""

import sys

try:
    from jaxsd.cli import main
except ModuleNotFoundError as e:
    sys.exit(f'jaxsd: {sys.executable} has no {e.name}; run make env, then . .venv/bin/activate')

if __name__ == '__main__':
    sys.exit(main())

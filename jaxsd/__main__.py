# SPDX-License-Identifier: Apache-2.0
"""`python -m jaxsd`."""

import sys

from jaxsd.cli import main

if __name__ == '__main__':
    sys.exit(main())

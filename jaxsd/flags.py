# SPDX-License-Identifier: Apache-2.0
"""Flags of a command, of this package or of a pipeline."""

import argparse


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the flags of a command in one line."""

    def error(self, message):
        self.exit(2, f'{self.prog}: {message}; see {self.prog} --help\n')

    def at_least(self, args: argparse.Namespace, **least: int) -> None:
        """Ends as a wrong flag does where a number in `args` is below its `least`."""
        for name, bound in least.items():
            if not getattr(args, name) >= bound:
                self.error(f'--{name.replace("_", "-")} must be at least {bound}, got '
                           f'{getattr(args, name)}')

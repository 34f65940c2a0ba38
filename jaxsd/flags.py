# SPDX-License-Identifier: Apache-2.0
"""Flags of a command, of this package or of a pipeline."""

import argparse


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the flags of a command in one line."""

    def error(self, message):
        self.exit(2, f'{self.prog}: {message}; see {self.prog} --help\n')

# SPDX-License-Identifier: Apache-2.0
"""What training a config takes on machines that are not here.

`targets` names them, `work` counts operations, `traffic` reads the compiled program, `estimate`
makes one plan of all that, `search` compares many and `table` writes them down. Nothing is imported
here: `targets.prepare` must run before jax is.
"""

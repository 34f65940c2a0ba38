# SPDX-License-Identifier: Apache-2.0
"""jaxsd: sharded, reproducible pretraining of spoken dialogue models in JAX."""

__version__ = '0.1.0'

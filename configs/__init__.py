# SPDX-License-Identifier: Apache-2.0
"""One file per system; each defines get_config(arg)."""

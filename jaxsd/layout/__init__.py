# SPDX-License-Identifier: Apache-2.0
"""How time is written down: pure numpy functions from a stored record to a grid with loss weights.

`flat` writes one row (whole fields and interleavings, whose places to switch are in `spans`),
`template` one row by a list of typed parts, `chunks` two speakers in one row; `duplex` writes one
row per stream on a common clock, `parallel` sets text beside speech that it is not aligned with,
`show` draws any grid for eyes and for goldens. A layout receives ids and a generator; it never
reads files, never tokenizes, never pads to a batch and never cuts anything short.
"""

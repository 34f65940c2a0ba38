# SPDX-License-Identifier: Apache-2.0
"""Interleaved against paired and unimodal training, by what crosses between modalities.

Only the mixture differs between the arms: `mix` of configs/spirit_lm.py.
"""

QUESTION = dict(
    question='Does interleaving speech and text join the modalities better than pairs of both?',
    base='configs/spirit_lm.py:demo',
    arms=(('interleaved', 'mix=interleaved'), ('pairs', 'mix=pairs'), ('unimodal', 'mix=unimodal')),
    budget=dict(tokens=409_600),                # 100 steps of the demo
    seeds=(0, 1, 2),
    metrics=(('stories', 'nats/S->T', 'lower'), ('stories', 'nats/T->S', 'lower'),
             ('stories', 'right %/S->T', 'shown'), ('stories', 'right %/T->S', 'shown')),
    items=100,
    expected=('interleaved > pairs', 'interleaved > unimodal'),
    source='arXiv 2402.05755, Table 4: stories across modalities',
    limits='A closed vocabulary and 2 M parameters. The arms read other records, for the mixture '
           'is the question; what is scored goes on in the other modality, as pairs never do.')

# SPDX-License-Identifier: Apache-2.0
"""A bake-off of paradigms: the same backbone, units and dialogues, written down in six ways.

Judged by a choice that every layout can make (`jaxsd/pairing.py`): which of two answers belongs to
which of two spoken questions. Beside it stands how many columns a layout must say before it can be
heard. `_paradigms.py` holds the config.
"""

QUESTION = dict(
    question='Which way of writing time answers spoken questions best, for the same computation?',
    base='configs/ablations/_paradigms.py',
    arms=tuple((name, f'layout={name}') for name in (
        'chain', 'interleaved', 'parallel', 'grouped', 'chunks', 'multistream')),
    budget=dict(flops=2.8e12),
    seeds=(0, 1, 2),
    metrics=(('pairings', 'right %', 'higher'), ('pairings', 'columns to sound', 'shown')),
    items=200,
    limits='A demo model, trained for minutes on a closed vocabulary; guessing is right in 50 %. '
           'The parallel arm is given the text of the question, as its paper has it recognized '
           'outside, and chain is scored behind the true transcript, which it would have to write '
           'itself; grouped and multistream have no text at all. Exchanges are one question each, '
           'but chunks and multistream train on whole dialogues. Columns are work and not seconds: '
           'one says 40 ms of sound in multistream, 80 in parallel, 200 in grouped, at most 40 in '
           'the others; where they are a clock they include the pause that the recorded speakers '
           'made.')

# SPDX-License-Identifier: Apache-2.0
"""Does a model of speech learn more from the same speech if its body was a text model before?

The budget is speech: the text that the warm arm read first is not counted.
"""

QUESTION = dict(
    question='Does a text model learn speech better than a model that begins with nothing?',
    base='configs/twist.py:demo',
    arms=(('warm',), ('cold', 'cold=True')),
    budget=dict(audio_hours=41.0),              # about 500 steps
    seeds=(0, 1, 2),
    metrics=(('likelihood', 'speech/loss/tokens', 'lower'), ('matched', 'right %', 'shown')),
    items=200,
    expected=('warm > cold',),
    source='arXiv 2305.13009, Table 2 and Figure 3: warm against cold initialization',
    limits='The text model is the demo corpus\'s own, of 2 M parameters, trained for a minute: it '
           'brings the corpus\'s words and not a language.')

# SPDX-License-Identifier: Apache-2.0
"""How finely should text and speech be aligned: by sentence, by word, or by phone?

Spans are about as long at every level (configs/spirit_lm.py, SPANS); only where they may be cut
differs, and phones are written as phones.
"""

QUESTION = dict(
    question='Which alignment of text and speech teaches most across modalities: sentences, words '
             'or phones?',
    base='configs/spirit_lm.py:demo',
    arms=(('sentence', 'level=utterance'), ('word', 'level=word'), ('phone', 'level=phone')),
    budget=dict(tokens=409_600),
    seeds=(0, 1, 2),
    metrics=(('stories', 'right %/S->T', 'higher'), ('stories', 'right %/T->S', 'higher'),
             ('stories', 'nats/S->T', 'shown'), ('stories', 'nats/T->S', 'shown')),
    items=100,
    expected=('word > sentence',),
    source='the nearest published comparison is arXiv 2402.05755, Table 4: interleaved words '
           'against pairs of sentences; none was found for phones',
    limits='Continuations are scored in words at every level, which favors the arm that '
           'interleaved words; the phone arm meets words only in its other tasks.')

# SPDX-License-Identifier: Apache-2.0
"""The inner monologue of a duplex model: with or without text, and how late.

One stage of dialogues on the demo corpus; in the arms the text row is empty, ahead of the sound by
four frames of 80 ms, with it, or behind it.
"""

STAGE = dict(name='duplex', steps=150, batch=8, lr=2e-3, schedule='cosine', warmup_steps=20,
             final_lr=0.05, weight_decay=0.05, data=dict(dialogue=1.0), save_steps=100,
             log_steps=10)

QUESTION = dict(
    question='What do the words beside the sound tell about the sound, and should they come before '
             'it?',
    base=('configs/moshi.py:demo', f'--config.stages=({STAGE!r},)',
          "--config.evals.likelihood.sources=('dialogue',)"),
    arms=(('none', '--config.layout.text=none'),
          ('before', '--config.layout.text_delay_columns=-4'),
          ('with', '--config.layout.text_delay_columns=0'),
          ('after', '--config.layout.text_delay_columns=4')),
    budget=dict(audio_hours=4.0),
    seeds=(0, 1, 2),
    metrics=(('likelihood', 'dialogue/nats/mine 0', 'lower'),
             ('likelihood', 'dialogue/nats/mine 1', 'shown'),
             ('likelihood', 'dialogue/nats/text', 'shown')),
    items=200,
    expected=('with > none', 'before > with > after'),
    source='arXiv 2410.00037, Table 8: spoken questions answered with and without inner '
           'monologue; the order of delays is our guess',
    limits='The true words stand beside the sound while it is scored, so this is how much they '
           'tell, not how well a model does with its own. Far too short to answer questions: that '
           'takes the whole demo.')

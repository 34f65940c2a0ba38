# SPDX-License-Identifier: Apache-2.0
"""How much text must stay in the mixture for a text model that learns speech not to forget it?

Every arm reads text first and speech then; they differ in the share of text in the second stage.
"""

COMMON = dict(batch=16, lr=3e-3, schedule='cosine', warmup_steps=20, final_lr=0.05,
              weight_decay=0.05, save_steps=100, log_steps=10)
STAGES = (dict(name='read', steps=60, data=dict(text=1.0), **COMMON),
          dict(name='hear', steps=90, data=dict(speech=1.0), start='read', **COMMON))


def share(text: float) -> str:
    return f'--config.stages[1].data={dict(speech=round(1.0 - text, 2), text=text)!r}'


QUESTION = dict(
    question='How much text keeps a text model from forgetting it while it learns speech?',
    base=('configs/spirit_lm.py:demo', f'--config.stages={STAGES!r}',
          "--config.evals.likelihood.sources=('text', 'speech')"),
    arms=(('none', share(0.0)), ('tenth', share(0.1)), ('third', share(0.33))),
    budget=dict(tokens=409_600),
    seeds=(0, 1, 2),
    metrics=(('likelihood', 'text/loss/tokens', 'lower'),
             ('likelihood', 'speech/loss/tokens', 'shown')),
    expected=('third > tenth > none',),
    source='arXiv 2410.00037, Table 8: without batches of text, spoken questions are answered '
           'worse',
    limits='Text ability is the likelihood of held-out sentences of a small grammar; what the text '
           'costs speech is shown beside it.')

# SPDX-License-Identifier: Apache-2.0
"""Makes place_words_reference.json by running the interleaver of kyutai-labs/moshi-finetune itself.

Usage: python make_place_words_reference.py CHECKOUT, where CHECKOUT is a clone of that repository.
Its file needs torch and moshi only to wrap a list and to name a type, so stand-ins do.
"""

import json
import pathlib
import random
import subprocess
import sys
import types


def interleaver(checkout: str):
    """The module finetune/data/interleaver.py of `checkout`, as committed at HEAD."""
    class Row(list):
        def view(self, *shape):
            return self

    torch = types.ModuleType('torch')
    torch.Tensor, torch.device, torch.tensor = list, str, lambda row, device: Row(row)
    conditioners = types.ModuleType('moshi.conditioners')
    conditioners.ConditionAttributes = object
    sys.modules |= {'torch': torch, 'moshi': types.ModuleType('moshi'),
                    'moshi.conditioners': conditioners}
    module = sys.modules['interleaver'] = types.ModuleType('interleaver')
    exec(git(checkout, 'show', 'HEAD:finetune/data/interleaver.py'), module.__dict__)
    return module


def git(checkout: str, *command: str) -> str:
    return subprocess.run(['git', '-C', checkout, *command], check=True, text=True,
                          stdout=subprocess.PIPE).stdout


class Spelled:
    """A tokenizer for words that are spelled as their ids: '10 11'."""

    def encode(self, text):
        if isinstance(text, str):
            return [13]
        return [[int(i) for i in line.split()] for line in text]


def main(checkout: str):
    module, cases = interleaver(checkout), []
    rng = random.Random(0)
    for _ in range(30):
        columns, words, t, first = rng.randint(8, 60), [], 0.0, 10
        while t * 12.5 < columns + 2:
            t += rng.choice([0, .01, .05, .1, .3, .8]) * rng.random()
            pieces, lasts = rng.randint(1, 5), rng.choice([0., .02, .1, .3, -.01])
            words.append((list(range(first, first + pieces)), round(t, 3), round(t + lasts, 3)))
            t, first = t + max(lasts, 0), first + pieces
        case = {'columns': columns, 'words': words}
        for rule in ('queue', 'shift'):
            tool = module.Interleaver(Spelled(), 12.5, 3, 0, -1, keep_and_shift=rule == 'shift')
            spoken = [(' '.join(map(str, ids)), (start, end), 'SPEAKER_MAIN')
                      for ids, start, end in words]
            case[rule] = list(tool.prepare_item(spoken, (columns - .5) / 12.5))
        cases.append(json.dumps(case, separators=(',', ':')))
    note = ('Random transcripts and the text rows that finetune/data/interleaver.py of '
            f'kyutai-labs/moshi-finetune at {git(checkout, "rev-parse", "HEAD").strip()} writes '
            'for them, by make_place_words_reference.py: padding 3, end of padding 0, 12.5 Hz, no '
            'delay; queue is keep_and_shift=False, shift is True. A word is [ids, start_s, end_s].')
    path = pathlib.Path(__file__).parent / 'place_words_reference.json'
    path.write_text(f'{{"note": {json.dumps(note)},\n "cases": [\n' + ',\n'.join(cases) + '\n]}\n')


if __name__ == '__main__':
    main(sys.argv[1])

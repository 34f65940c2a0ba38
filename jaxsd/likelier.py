# SPDX-License-Identifier: Apache-2.0
"""Which of two is likelier: the scores behind every choice between a right and a wrong one, and the
tasks of `evaluate` that are such a choice.

A model is asked nothing here and says nothing: it is shown both and tells how probable it finds
them, word against non-word, a story's own end against another's, an answer after its question
against the same answer after somebody else's.
"""

import copy
import csv
import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsd import data, generate, model, packing, reply, speak, trained
from jaxsd.config import ConfigError, bind
from jaxsd.layout import flat
from jaxsd.types import NOTHING, Grid, Record, positive


def shares(sums, of=()) -> dict[str, list[float]]:
    """What each item adds to a metric that is the sum of `sums` over that of `of` (default: items).

    Kept as `per_item` of a result, so that items can be drawn again (`ablate`).
    """
    return {k: [float(f'{x:.7g}') for x in values] for k, values in (('sum', sums), ('of', of))
            if len(values)}


def sequence_score(logp_KT, weights_KT, norm: str) -> float:
    """How likely a sequence is: sum of weight x log-probability, or that per scored column.

    weights: 0 where nothing is scored; codebooks may weigh differently (arXiv 2410.00037 §5.4).
    """
    if norm not in ('mean', 'sum'):
        raise ConfigError(f"norm is 'mean' or 'sum', got {norm!r}")
    total = float(np.sum(np.where(weights_KT > 0, logp_KT, 0.0) * weights_KT))
    return total / max(1, int((weights_KT > 0).any(0).sum())) if norm == 'mean' else total


def preferred(good, bad) -> float:
    """The share of pairs whose first member scores higher; a tie counts half."""
    good, bad = np.asarray(good), np.asarray(bad)
    return float(np.mean(np.where(good == bad, 0.5, good > bad)))


def pair_scores(lm: trained.LM, rows, *, norm: str, scope: str, legal=None, batch: int = 32
                ) -> np.ndarray:
    """`sequence_score` of each (prompt, continuation): ids of one row.

    scope: 'continuation', or 'full', everything but the first id. legal: bool [V], the ids that the
    probability is shared among; a token outside them is not scored.
    """
    if scope not in ('continuation', 'full'):
        raise ConfigError(f"scope is 'continuation' or 'full', got {scope!r}")
    columns = -(-max(len(p) + len(c) for p, c in rows) // 64) * 64

    @jax.jit
    def logp_of(params, arrays):
        lm_ = nnx.merge(lm.graph, params)
        if legal is None:
            return lm_(arrays, jax.random.key(0))[0]
        logits = jnp.where(legal, lm_.scores(arrays)[0][:, :-1], -jnp.inf)
        chosen = jnp.maximum(arrays['tokens'][:, 0, 1:], 0)[..., None]
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)
        return jnp.pad(found[..., 0], ((0, 0), (1, 0)))[:, None]
    out = []
    for part in trained.in_parts(rows, batch):
        tokens = np.full((batch, 1, columns), NOTHING, np.int32)
        weights = np.zeros((batch, 1, columns), np.float32)
        for i, (prompt, continuation) in enumerate(part):
            n, m = len(prompt), len(continuation)
            tokens[i, 0, :n + m] = np.concatenate([prompt, continuation])
            weights[i, 0, n if scope == 'continuation' else 1:n + m] = 1
        if legal is not None:
            weights *= legal[np.maximum(tokens, 0)]
        arrays = dict(tokens=tokens, weights=weights, segment=(tokens[:, 0] >= 0).astype(np.int32),
                      position=np.tile(np.arange(columns, dtype=np.int32), (batch, 1)))
        logp = np.asarray(logp_of(lm.params, arrays))
        out += [sequence_score(x, w, norm) for x, w in zip(logp, weights, strict=True)][:len(part)]
    return np.array(out)


def gold_pairs(path: str) -> dict[str, list[tuple[str, str]]]:
    """{item: [(right file, wrong file) in each voice]} of a ZeroSpeech 2021 gold.csv.

    Its columns id, voice, filename and correct are read; a pair is what one voice says of one item.
    Raises ConfigError for another file and for a pair that is none.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    try:
        with open(path, newline='', encoding='utf-8') as f:
            for row in csv.DictReader(f):
                one = found.setdefault((row['id'], row['voice']), {})
                if row['correct'] not in ('0', '1') or row['correct'] in one:
                    raise ValueError(f'item {row["id"]} of voice {row["voice"]} is no pair of '
                                     'correct 1 and 0')
                one[row['correct']] = row['filename']
        lone = [key for key, one in found.items() if len(one) != 2]
        if lone or not found:
            raise ValueError(f'item {lone[0][0]} of voice {lone[0][1]} has no pair' if lone else
                             'it lists nothing')
    except (OSError, KeyError, ValueError, csv.Error) as e:
        said = f'it has no column {e}' if isinstance(e, KeyError) else e
        raise ConfigError(f'{path} lists no pairs: {said}') from None
    out: dict[str, list[tuple[str, str]]] = {}
    for (item, _), one in found.items():
        out.setdefault(item, []).append((one['1'], one['0']))
    return out


# Whole grids.

def whole(config, stage):
    """The graph definition of a stage's model that scores every column, whatever share it trains.
    """
    config = copy.deepcopy(config)
    if 'fraction' in config.head:
        config.head.fraction = 1.0
    return model.abstract(config, stage.lora)[0]


def grid_scores(lm: trained.LM, grids: list[Grid], *, batch: int) -> np.ndarray:
    """The mean log-probability of each grid's scored cells, by their weights; grids not packed."""
    graph = whole(lm.config, lm.stage)
    logp_of = jax.jit(lambda params, arrays: nnx.merge(graph, params)(arrays, jax.random.key(0))[0])
    extras = data.extras(lm.config, dataclasses.asdict(lm.stage))
    columns, out = -(-max(g.tokens.shape[1] for g in grids) // 64) * 64, []
    for part in trained.in_parts(grids, batch):
        rows = [packing.lay([(g, g.tokens.shape[1])], streams=len(lm.vocab.rows), columns=columns,
                            extras=extras) for g in part]
        rows += rows[-1:] * (batch - len(part))         # few shapes, few compilations
        arrays = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
        logp, weights = np.asarray(logp_of(lm.params, arrays)), arrays['weights']
        found = (np.where(weights > 0, logp, 0) * weights).sum((1, 2)) / weights.sum((1, 2))
        out += found[:len(part)].tolist()
    return np.array(out)


def other(records: list[Record], i: int, said) -> int | None:
    """The next record in the same voice of which `said` is another; of any voice if there is none.
    """
    order = [(i + k) % len(records) for k in range(1, len(records))]
    fits = [j for j in order if said(records[j]) != said(records[i])]
    voice = [r.style[0].split()[:1] if r.style else [] for r in records]
    return next(iter([j for j in fits if voice[j] and voice[j] == voice[i]] or fits), None)


def beside_another(records: list[Record], grids: list[Grid]) -> list[tuple[Grid, Grid]]:
    """Each grid with that of `other`, told apart by all that is said; without those that have none.
    """
    found = [other(records, i, lambda r: [w.text for w in r.words]) for i in range(len(records))]
    return [(grid, grids[j]) for grid, j in zip(grids, found, strict=True) if j is not None]


def first(grid: Grid, columns: int) -> Grid:
    """The first `columns` columns of `grid`."""
    out = Grid.of(grid.tokens[:, :columns], grid.weights[:, :columns])
    out.extra.update({k: x[:columns] for k, x in grid.extra.items()})
    return out


def given_another(grid: Grid, wrong: Grid, given: str, rows) -> tuple[Grid, Grid]:
    """`grid` and the same with what it was given taken from `wrong`; equal cells are scored.

    given: 'before', the columns before the first scored one; 'half', the first half of the columns,
    of which the last quarter is scored, so that the seam tells nothing; 'heard', the columns that
    weigh nothing; or the first word of the names of rows. For these two both are cut to the shorter
    one. A row that is given is not scored.
    """
    if given not in ('before', 'half'):
        n = min(grid.tokens.shape[1], wrong.tokens.shape[1])
        grid, wrong = first(grid, n), first(wrong, n)
        taken = np.array([[row.name.split()[0] == given] for row in rows])
        if given == 'heard':
            taken = ~grid.weights.any(0, keepdims=True)
            if (taken == wrong.weights.any(0)).any():
                raise ConfigError("given='heard': what is heard lies in other columns in each "
                                  "record; use 'before' or 'half'")
        elif not taken.any() or taken.all():
            raise ConfigError(f"given is 'before', 'half', 'heard' or the name of rows, some of "
                              f'{", ".join(dict.fromkeys(r.name.split()[0] for r in rows))}, got '
                              f'{given!r}')
        weights = np.where(taken, 0, grid.weights)
        out = (Grid.of(grid.tokens, weights),
               Grid.of(np.where(taken, wrong.tokens, grid.tokens), weights))
        whole = taken.all(0)        # columns, whose features are given as well
        for name, own in grid.extra.items():
            at = whole.reshape(-1, *[1] * (own.ndim - 1))
            out[0].extra[name] = own
            out[1].extra[name] = np.where(at, wrong.extra[name], own)
        return out

    def cut(g: Grid) -> int:
        return (g.tokens.shape[1] // 2 if given == 'half' else
                int(np.flatnonzero(g.weights.any(0))[0]))
    n, weights = cut(grid), grid.weights
    if given == 'half':
        columns = np.arange(weights.shape[1])
        weights = np.where(columns < len(columns) - len(columns) // 4, 0, weights)

    def upon(g: Grid) -> Grid:
        m = cut(g)
        out = Grid.of(np.concatenate([g.tokens[:, :m], grid.tokens[:, n:]], axis=1),
                      np.concatenate([np.zeros((len(rows), m)), weights[:, n:]], axis=1))
        out.extra.update({k: np.concatenate([x[:m], grid.extra[k][n:]])
                          for k, x in g.extra.items()})
        return out
    return upon(grid), upon(wrong)


# What was given, or another's.

def matched(lm: trained.LM, *, split: str, limit: int | None, source: str, given: str = 'before',
            batch: int = 16) -> dict:
    """Is what follows likelier after what belongs to it than after what another record begins with?

    given: 'before', a question or a text to be read, the columns before the first scored one;
    'half', the first half of a record, whose last quarter is scored; 'heard', every column that is
    never learned, where those of all records are at the same places; or rows, by the first word of
    their name: 'text' beside which a voice speaks, 'theirs' beside whom I do. Of what another says
    as I speak its timing tells as much as its words. nats: of the same scored cells, by weight,
    upon their own and upon another's. right: how often their own is the likelier; guessing makes
    50. The other record is one in the same voice, where there is one.
    """
    positive('evals.matched', batch=batch)
    records = reply.examples(lm, source, split=split, limit=limit)
    # A model is not asked about columns further than it ever learned.
    grids = [first(g, lm.config.columns) for g in reply.drawn(lm, source, records)[0]]
    pairs = [given_another(*pair, given, lm.vocab.rows)
             for pair in beside_another(records, grids)]
    pairs = [pair for pair in pairs if pair[0].weights.any()]
    if not pairs:
        raise ConfigError(f'matched: split {split} of {source} has no two records that say '
                          'different things')
    own, wrong = (grid_scores(lm, list(x), batch=batch) for x in zip(*pairs, strict=True))
    return dict(metrics={'right %': 100 * preferred(own, wrong), 'nats': -float(own.mean()),
                         'nats/another': -float(wrong.mean())},
                items=len(pairs), judged=('right %', 50.0), note='teacher-forced; given: '
                f'{given}; right by guessing: 50 %')


# Continuations across modalities.

def _split_story(record, unit_hz: float):
    """(words of the first turn, its units, words of the second, its units) of a two-turn record."""
    (_, _, end, _), (_, start, _, _) = record.turns[:2]
    cut_s = (end + start) / 2
    cut = round(cut_s * unit_hz)
    units = record.units[0]
    first = [w for w in record.words if w.start_s < cut_s]
    second = [w for w in record.words if w.start_s >= cut_s]
    return first, units[:cut], second, units[cut:]


def stories(lm: trained.LM, *, split: str, limit: int | None, source: str = 'aligned',
            norm: str = 'mean', scope: str = 'continuation', alone: bool = False) -> dict:
    """Does the model know how a story goes on, across modalities? (arXiv 2402.05755 §4.1)

    The first sentence is the prompt, written (T) or spoken (S), and the second is scored in either.
    nats/A->B: mean nats per token of the true continuation. right/A->B: how often it is likelier
    per token than the second sentence of another story told by the same voice.

    norm: 'mean' per token or 'sum', which moves these figures by more than ten points. scope: what
    is scored, the 'continuation' or 'full', all but BOS. alone: only ids of the continuation's
    modality share the probability.
    """
    records = [r for r in data.examples(lm.config, split, source, vocab=lm.vocab, limit=limit)
               if len(r.turns) == 2]
    if not records:
        raise ConfigError(f'stories: split {split} of {source} has no record of two sentences')
    parts = [_split_story(r, lm.config.codec.frame_hz) for r in records]
    v = lm.vocab

    def tokens(kind, words, units):
        return flat.text_tokens(words, v) if kind == 'T' else flat.speech_tokens(units, v)

    def rows(a, b):
        for i, (words, units, *second) in enumerate(parts):
            j = other(records, i, lambda r: r.turns[1].text)
            first = tokens(a, words, units)
            yield ((first, tokens(b, *second)),
                   (first, tokens(b, *parts[i if j is None else j][2:])))
    return dict(**_crossed(lm, rows, norm=norm, scope=scope, alone=alone),
                items=len(records), **_told(norm, scope, 'second sentence'))


def cloze(lm: trained.LM, *, split: str, limit: int | None, path: str, norm: str = 'mean',
          scope: str = 'continuation', alone: bool = False) -> dict:
    """StoryCloze, spoken and written: is a story's own ending likelier than the other one?

    path: a directory with X_mutual, X_correct and X_incorrect, each as wav and txt, for every story
    X, as the multi-speaker benchmark is published. Figures and options as in `stories`; from speech
    to speech what precedes and an ending are encoded as one sound. `split` means nothing here.
    """
    del split
    codec, v, text = bind(lm.config.codec, 'jaxsd.codec', 'codec')(), lm.vocab, lm.text()
    names = sorted(n.removesuffix('_correct.wav') for n in os.listdir(path)
                   if n.endswith('_correct.wav'))[:limit]
    if not names:
        raise ConfigError(f'cloze: {path} holds no X_correct.wav')

    def sound(name):
        return speak.read_wav(os.path.join(path, name + '.wav'),
                              codec.identity['sample_rate_hz'])[0]

    def units(wav):
        return codec.encode(wav)[0]

    def tokens(kind, name):
        if kind == 'S':
            return flat.speech_tokens(units(sound(name)), v)
        with open(os.path.join(path, name + '.txt'), encoding='utf-8') as f:
            return v.encode('text', [i for word in f.read().split() for i in text.encode(word)])

    def rows(a, b):
        for name in names:
            if a == b == 'S':
                first = sound(f'{name}_mutual')
                n = len(units(first))
                whole = [units(np.concatenate([first, sound(f'{name}_{end}')]))
                         for end in ('correct', 'incorrect')]
                yield tuple((flat.speech_tokens(x[:n], v), flat.speech_tokens(x[n:], v))
                            for x in whole)
            else:
                first = tokens(a, f'{name}_mutual')
                yield tuple((first, tokens(b, f'{name}_{end}')) for end in ('correct', 'incorrect'))
    return dict(**_crossed(lm, rows, norm=norm, scope=scope, alone=alone),
                items=len(names), **_told(norm, scope, 'ending'))


def _crossed(lm: trained.LM, rows_of, *, norm: str, scope: str, alone: bool) -> dict:
    """metrics and per_item: nats and right % from and to text (T) and speech (S).

    rows_of(a, b): for each story ((ids of its beginning in a, of its true end in b), (the same,
    of a wrong end)).
    """
    v, marker = lm.vocab, {'T': '[Text]', 'S': '[Speech]'}
    metrics, per_item = {}, {}
    for a in 'TS':
        for b in 'TS':
            legal = generate.allowed_ids(v, 'text' if b == 'T' else 'speech')
            # A continuation in the same modality goes on without a new marker.
            middle = [marker[b]] if a != b else []
            rows = [(trained.prompt(v, marker[a], first, *middle), end)
                    for pair in rows_of(a, b) for first, end in pair]
            scores = pair_scores(lm, rows, norm=norm, scope=scope, legal=legal if alone else None)
            good, bad = scores[0::2], scores[1::2]
            metrics[f'nats/{a}->{b}'] = -float(np.mean(good))
            metrics[f'right %/{a}->{b}'] = 100 * preferred(good, bad)
            per_item |= {f'nats/{a}->{b}': shares(-good), f'right %/{a}->{b}': shares(
                100 * np.where(good == bad, 0.5, good > bad))}
    return dict(metrics=metrics, per_item=per_item)


def _told(norm: str, scope: str, what: str) -> dict:
    return dict(judged=('right %/S->T', 50.0), note=f'{norm} nats ({scope}) of the {what} given '
                'what precedes it; T text, S speech')


def pairs(lm: trained.LM, *, split: str, limit: int | None, path: str, source: str,
          norm: str = 'mean', alone: bool = False) -> dict:
    """Which of two recordings is likelier: words and non-words, grammatical and not (ZeroSpeech).

    path: a directory with gold.csv and the wav files that it names. Each file is written as
    `source` is drawn, and all of the row but BOS is scored. right: per item the mean over voices,
    then over items, ties counting half. norm and alone: see `stories`. `split` means nothing here.
    """
    del split
    codec = bind(lm.config.codec, 'jaxsd.codec', 'codec')()
    gold = gold_pairs(os.path.join(path, 'gold.csv'))
    items = dict(list(gold.items())[:limit])
    rows = []
    for files in items.values():
        for name in (name for pair in files for name in pair):
            file = os.path.join(path, name if name.endswith('.wav') else f'{name}.wav')
            wav = speak.read_wav(file, codec.identity['sample_rate_hz'])
            ids = data.drawn(lm.config, source, lm.vocab, Record(
                name, 'pair', '', wav.shape[-1] / codec.identity['sample_rate_hz'],
                units=(codec.encode(wav.mean(0))[0],))).tokens[0]
            rows.append((ids[:1], ids[1:]))
    legal = generate.allowed_ids(lm.vocab, 'speech') if alone else None
    scores = pair_scores(lm, rows, norm=norm, scope='full', legal=legal)
    by_item, at = [], 0
    for files in items.values():
        mine = scores[at:at + 2 * len(files)]
        by_item.append(preferred(mine[0::2], mine[1::2]))
        at += 2 * len(files)
    return dict(metrics={'right %': 100 * float(np.mean(by_item))}, items=len(items),
                judged=('right %', 50.0),
                per_item={'right %': shares(100 * np.array(by_item))},
                note=f'{norm} over the whole row; voices averaged first, ties count half')

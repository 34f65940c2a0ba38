# SPDX-License-Identifier: Apache-2.0
"""Which of two is likelier: the scores behind every choice between a right and a wrong one.

A model is asked nothing here and says nothing: it is shown both and tells how probable it finds
them, word against non-word, a story's own end against another's, an answer after its question
against the same answer after somebody else's.
"""

import copy
import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsd import data, generate, model, packing
from jaxsd.config import ConfigError
from jaxsd.types import NOTHING, Grid, Record


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


def pair_scores(lm: generate.LM, rows, *, norm: str, scope: str, legal=None, batch: int = 32
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
    for part in generate.in_parts(rows, batch):
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


def grid_scores(lm: generate.LM, grids: list[Grid], *, batch: int) -> np.ndarray:
    """The mean log-probability of each grid's scored cells, by their weights; grids not packed."""
    graph = whole(lm.config, lm.stage)
    logp_of = jax.jit(lambda params, arrays: nnx.merge(graph, params)(arrays, jax.random.key(0))[0])
    extras = data.extras(lm.config, dataclasses.asdict(lm.stage))
    columns, out = -(-max(g.tokens.shape[1] for g in grids) // 64) * 64, []
    for part in generate.in_parts(grids, batch):
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
    of which the last quarter is scored, so that the seam tells nothing; or the first word of the
    names of rows, which are then cut to the shorter of the two. A row that is given is not scored.
    """
    if given not in ('before', 'half'):
        named = np.array([row.name.split()[0] == given for row in rows])
        if not named.any() or named.all():
            raise ConfigError(f"given is 'before', 'half' or the name of rows, some of "
                              f'{", ".join(dict.fromkeys(r.name.split()[0] for r in rows))}, got '
                              f'{given!r}')
        n = min(grid.tokens.shape[1], wrong.tokens.shape[1])
        weights = np.where(named[:, None], 0, grid.weights[:, :n])
        mixed = np.where(named[:, None], wrong.tokens[:, :n], grid.tokens[:, :n])
        return Grid.of(grid.tokens[:, :n], weights), Grid.of(mixed, weights)

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

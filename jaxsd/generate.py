# SPDX-License-Identifier: Apache-2.0
"""Streaming decode over columns: read a prompt, then speak one column after another.

One engine serves every layout. A *plan* [B, K, T] of columns says what is known: a token where a
cell is given (a prompt, the user's voice, an initial token), FREE where the model chooses. The
prompt's columns go through the backbone at once, the others one by one through a ring of cached
keys and values; each step samples the next column and overlays what the plan knows of it. So
writing down speech, reading text aloud, continuing either, and holding a conversation are the same
loop with different plans.
"""

import copy
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsd.layout import chunks, flat
from jaxsd.types import NOTHING, Where
from jaxsd.vocab import Vocab, initial

FREE = -2
"""In a plan: the model chooses this cell."""

CHUNK = 64
"""Columns of a conversation per dispatch: one program for dialogues of every length."""


class Sampler(NamedTuple):
    """How a token is drawn from logits. temperature 0 is argmax; top_k 0 and top_p 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


GREEDY = Sampler()


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def few(n: int) -> int:
    """The first of 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640 ... that holds n.

    Prompts that grow or differ in length take few programs, and at most a quarter of padding.
    """
    return _round_up(n, max(32, (1 << max(n - 1, 1).bit_length()) // 8))


def draw(logits_BV, key, sampler: Sampler):
    """int32 [B]: one id per row of float32 `logits_BV` (-inf where forbidden)."""
    if sampler.temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1)
    logits = logits_BV / sampler.temperature
    if 0 < sampler.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampler.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampler.top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1)[:, ::-1]
        p = jax.nn.softmax(ordered, axis=-1)
        # Keep the smallest set whose mass reaches top_p: everything before it is passed.
        kept = jnp.cumsum(p, axis=-1) - p < sampler.top_p
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1)


class Manners(NamedTuple):
    """What cells of a column owe to others: how a layout goes on is not all the model's choice.

    ends, pads: one id per row; after a row said its end it says its pad. mark: the other rows hold
    something only in columns whose first row holds this id (NOTHING: in all). pairs: of every two
    sequences the second one's first row is that of both: one request, asked twice, whose written
    answer guides the spoken one (arXiv 2408.16725 §3.3).
    """

    ends: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    mark: int = NOTHING
    pairs: bool = False


AS_IT_COMES = Manners()


class Speaker(NamedTuple):
    """A model ready to decode: what `ready` makes of a graph definition, parameters and choices."""

    graph: nnx.GraphDef
    params: dict
    rows: tuple
    samplers: tuple[Sampler, ...]       # one per row
    ring_columns: int | None            # kept of a conversation, however long; None: all
    manners: Manners = AS_IT_COMES


def ready(graph, params, vocab: Vocab, samplers, ring_columns: int | None = None,
          manners: Manners = AS_IT_COMES) -> Speaker:
    """A Speaker. `samplers` maps the first word of a row's name ('text', 'mine') to a Sampler."""
    chosen = tuple(samplers.get(row.name.split()[0], Sampler()) for row in vocab.rows)
    return Speaker(graph, params, vocab.rows, chosen, ring_columns, manners)


def _pick(rows, samplers, allowed, plan_BK):
    """Row k's choice: what the plan gives, else a draw among the allowed ids."""
    def pick(k, logits_BV, key):
        if allowed is not None and k == 0:
            logits_BV = jnp.where(allowed, logits_BV, -jnp.inf)
        chosen = draw(logits_BV, key, samplers[k])
        known = plan_BK[:, k]
        return jnp.where(known == FREE, chosen, known - rows[k].start)
    return pick


def _settled(manners: Manners, plan_BK, sampled_BK, ended_BK):
    """The next column and which rows have ended: the plan, then the manners, then the sample."""
    column = sampled_BK
    if manners.pairs:
        column = column.at[0::2, 0].set(column[1::2, 0])
    if manners.ends:
        column = jnp.where(ended_BK, jnp.asarray(manners.pads), column)
    if manners.mark != NOTHING:
        column = column.at[:, 1:].set(jnp.where(column[:, :1] == manners.mark, column[:, 1:],
                                                NOTHING))
    column = jnp.where(plan_BK == FREE, column, plan_BK).astype(jnp.int32)
    if manners.ends:
        ended_BK = ended_BK | (column == jnp.asarray(manners.ends))
    return column, ended_BK


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _prefill(graph, rows, samplers, manners, params, cache, tokens_BKT, where, plan_BK, allowed,
             key, heard):
    lm = nnx.merge(graph, params)
    sampled, cache = lm.step(tokens_BKT, where, cache, key,
                             _pick(rows, samplers, allowed, plan_BK), heard)
    return *_settled(manners, plan_BK, sampled, jnp.zeros(plan_BK.shape, bool)), cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def _advance(graph, rows, samplers, manners, params, cache, column_BK, ended_BK, position_B,
             plan_NBK, allowed, keys):
    """N columns after `column_BK`: ([N, B, K], which rows have ended, the new cache)."""
    lm = nnx.merge(graph, params)

    def step(carry, now):
        cache, column, ended, position = carry
        plan, key = now
        where = Where(position[:, None], jnp.ones_like(position)[:, None])
        sampled, cache = lm.step(column[:, :, None], where, cache, key,
                                 _pick(rows, samplers, allowed, plan))
        column, ended = _settled(manners, plan, sampled, ended)
        return (cache, column, ended, position + 1), column
    (cache, _, ended, _), out = jax.lax.scan(
        step, (cache, column_BK.astype(jnp.int32), ended_BK, position_B), (plan_NBK, keys))
    return out, ended, cache


def at_the_right(prompts: list[np.ndarray], longest: int, heard=None):
    """(tokens [B, K, longest], where, features or None) of `prompts` [K, T_i] that end together.

    What comes before a shorter one lies in segment 0. heard: see `Stream.first`.
    """
    tokens = np.full((len(prompts), len(prompts[0]), longest), NOTHING, np.int32)
    position = np.zeros((len(prompts), longest), np.int32)
    segment = np.zeros((len(prompts), longest), np.int32)
    for i, p in enumerate(prompts):
        n = p.shape[1]
        tokens[i, :, longest - n:] = p
        position[i, longest - n:] = np.arange(n)
        segment[i, longest - n:] = 1
    features = None
    if heard is not None:
        features = dict(feats=np.zeros((*segment.shape, heard[0][0].shape[1]), np.float32),
                        slot=np.zeros_like(segment))
        for i, (feats, slot) in enumerate(heard):
            features['feats'][i, longest - len(feats):] = feats
            features['slot'][i, longest - len(slot):] = slot
    return tokens, Where(jnp.asarray(position), jnp.asarray(segment)), features


class Stream:
    """A batch of sequences being decoded. `first` reads the prompts, `more` goes on from there.

    Prompts of different lengths stand at the right edge, with columns of segment 0 before them. In
    a `dense` stream these take no place of its `columns`.
    """

    def __init__(self, speaker: Speaker, *, rows: int, columns: int, key, dense: bool = False):
        lm = nnx.eval_shape(lambda p: nnx.merge(speaker.graph, p), speaker.params)
        self._speaker, self._key, self._step = speaker, key, 0
        self._cache = lm.empty_cache(rows, columns)
        if dense:
            self._cache['written'] = jnp.zeros(rows, jnp.int32)
        self._position = jnp.zeros(rows, jnp.int32)     # of the next column

    def _keys(self, n: int):
        keys = jax.vmap(lambda i: jax.random.fold_in(self._key, i))(self._step + jnp.arange(n))
        self._step += n
        return keys

    def fork(self, key) -> 'Stream':
        """Another stream that has read what this one has. Its next call is `first`: `more` would
        take this one's cache away."""
        other = copy.copy(self)
        other._key, other._step = key, 0
        return other

    def first(self, prompts: list[np.ndarray], plan_BK, allowed=None, padded: int = 0,
              heard=None):
        """Reads `prompts` (each [K, T_i]) after what was read before, and returns the first column
        [B, K] decoded.

        They are padded to `padded` columns, or to the longest.
        heard: (feats [T_i, F], slot [T_i]) of each prompt, where the frontend has an encoder.
        """
        longest = max(padded, *(p.shape[1] for p in prompts))
        tokens, where, features = at_the_right(prompts, longest, heard)
        where = where._replace(position=where.position + self._position[:, None])
        s = self._speaker
        self._column, self._ended, self._cache = _prefill(
            s.graph, s.rows, s.samplers, s.manners, s.params, self._cache, tokens, where,
            jnp.asarray(plan_BK), allowed, self._keys(1)[0], features)
        self._position += np.array([p.shape[1] for p in prompts], np.int32)
        return self._column

    def more(self, plan_NBK, allowed=None):
        """The N columns after the last one: [N, B, K], where the plan leaves cells FREE decoded."""
        s = self._speaker
        n = plan_NBK.shape[0]
        out, self._ended, self._cache = _advance(
            s.graph, s.rows, s.samplers, s.manners, s.params, self._cache, self._column,
            self._ended, self._position, jnp.asarray(plan_NBK), allowed, self._keys(n))
        self._column, self._position = out[-1], self._position + n
        return out


# One row: prompts continued until a stop token.

def allowed_ids(vocab: Vocab, kind: str, stop: int | None = None) -> np.ndarray:
    """bool [V]: what may be said in a stretch of 'text', 'speech' or 'any', and its `stop` (EOS).

    Markers never, but for the stop. The released Spirit-LM decodes so: both markers banned, and the
    other modality's ids (spiritlm get_forbidden_tokens). Speech is units and what is told beside.
    """
    out = np.zeros(vocab.rows[0].predicted, bool)
    for name, (start, size) in vocab.ranges.items():
        out[start:start + size] = name != 'markers' and (kind == 'any' or
                                                         (name == 'text') == (kind == 'text'))
    out[vocab.specials['bos']] = out[vocab.specials['eos']] = False
    out[vocab.specials['eos'] if stop is None else stop] = True
    return out


def continue_prompts(speaker: Speaker, prompts: list[np.ndarray], vocab: Vocab, *, kind: str,
                     most_tokens: int, stop: int | None = None, also: tuple[int, ...] = (),
                     key=None, chunk: int = 16) -> list[np.ndarray]:
    """What follows each one-row prompt (ids [T_i]): ids of `kind` up to `stop` or `most_tokens`.

    stop: an id, by default EOS; it is not returned. also: ids that may be said too. Decodes `chunk`
    columns per dispatch and ends when every sequence has.
    """
    key = jax.random.key(0) if key is None else key
    rows = len(prompts)
    padded = min(1 << (rows - 1).bit_length(), _round_up(rows, 8))      # few shapes, few programs
    prompts = prompts + [prompts[-1]] * (padded - rows)
    longest = few(max(len(p) for p in prompts))
    stream = Stream(speaker, rows=padded, columns=longest + most_tokens + chunk, key=key)
    allowed = allowed_ids(vocab, kind, stop)
    allowed[list(also)] = True
    eos = vocab.specials['eos'] if stop is None else stop
    return _said(stream, prompts, longest, jnp.asarray(allowed), eos, most_tokens, chunk, rows)


def _said(stream: Stream, prompts: list[np.ndarray], padded: int, allowed, stop: int,
          most_tokens: int, chunk: int, wanted: int) -> list[np.ndarray]:
    """What `stream` says after each prompt (ids [T_i], padded to `padded`), without its stop.

    Only the first `wanted` are waited for and returned.
    """
    out = [np.asarray(stream.first([p[None] for p in prompts],
                                   np.full((len(prompts), 1), FREE, np.int32), allowed,
                                   padded))[None]]
    plan = np.full((chunk, len(prompts), 1), FREE, np.int32)
    while sum(len(x) for x in out) < most_tokens:
        if (np.concatenate(out)[:, :wanted, 0] == stop).any(0).all():
            break
        out.append(np.asarray(stream.more(plan, allowed)))
    tokens = np.concatenate(out)[:most_tokens, :wanted, 0].T
    return [t[:np.argmax(t == stop)] if (t == stop).any() else t for t in tokens]


class Phase(NamedTuple):
    """A stretch of a template that the model fills: of which kind, after what, up to which id."""

    name: str                   # what it is, such as 'text mine'; several joined by +
    kind: str                   # text, speech or any
    before: np.ndarray          # ids that the template writes before it
    stop: int


def phases(pieces: list[flat.Piece], vocab: Vocab) -> tuple[np.ndarray, list[Phase]]:
    """What of a template's `pieces` is given, as a prompt, and the phases in which the model talks.

    Given is everything up to the first content and every later content that is never learned; the
    template writes its marks and fields itself, and the model what stands between them. So a chain
    of modality becomes a list of phases, each with the ids that may be said in it and the id that
    ends it (as in the released USDM, inference.py). Content without a mark between is one phase, in
    which anything may be said. Raises ValueError for a template that asks for nothing.
    """
    content = [i for i, p in enumerate(pieces) if p.kind in ('text', 'speech', 'label')]
    asked = [i for i in content[1:] if pieces[i].weight > 0]
    if not asked:
        raise ValueError('the template asks for nothing after what it gives')
    said: list[list[int]] = []          # pieces of each phase
    for i in asked:
        if said and said[-1][-1] == i - 1:
            said[-1].append(i)
        else:
            said.append([i])
    out, at = [], 0
    for group in said:
        kinds = {'text' if pieces[i].kind == 'label' else pieces[i].kind for i in group}
        names = dict.fromkeys(f'{pieces[i].kind} {pieces[i].name}' for i in group)
        before = [np.zeros(0, np.int32), *(p.tokens for p in pieces[at:group[0]])]
        at = group[-1] + 1
        stop = int(pieces[at].tokens[0]) if at < len(pieces) else vocab.specials['eos']
        out.append(Phase('+'.join(names), kinds.pop() if len(kinds) == 1 else 'any',
                         np.concatenate(before), stop))
    prompt = np.concatenate([[vocab.specials['bos']], out[0].before]).astype(np.int32)
    return prompt, [out[0]._replace(before=out[0].before[:0]), *out[1:]]


def follow(speaker: Speaker, prompts: list[np.ndarray], steps: list[list[Phase]], vocab: Vocab, *,
           most_tokens: dict[str, int], key=None) -> list[dict[str, np.ndarray]]:
    """For each prompt, the ids said in each of its phases, by the phase's name.

    Prompts share the kinds and stops of their phases; most_tokens bounds each kind.
    """
    key = jax.random.key(0) if key is None else key
    told: list[dict[str, np.ndarray]] = [{} for _ in prompts]
    for n, phase in enumerate(steps[0]):
        now = [s[n] for s in steps]
        if any((p.kind, p.stop, p.name) != (phase.kind, phase.stop, phase.name) for p in now):
            raise ValueError('these templates differ in more than what they give')
        prompts = [np.concatenate([p, x.before]) for p, x in zip(prompts, now, strict=True)]
        said = continue_prompts(speaker, prompts, vocab, kind=phase.kind, stop=phase.stop,
                                most_tokens=most_tokens[phase.kind], key=jax.random.fold_in(key, n))
        for out, ids in zip(told, said, strict=True):
            out[phase.name] = ids
        prompts = [np.concatenate([p, ids]) for p, ids in zip(prompts, said, strict=True)]
    return told


# Two speakers in one row.

def chunk_by_chunk(speaker: Speaker, vocab: Vocab, *, rows: int, columns: int, streams,
                   chunk_frames: int, chunk_text: int, silences, key):
    """Rows of `layout.chunks.flattened` as they come to be: once started, send a chunk of what is
    heard (ids [rows, chunk_frames]) and get its columns, ids [rows, columns of a chunk].

    A chunk of theirs comes in, then the model writes its text and says its units, each a stretch of
    fixed length in which only that stream's ids (or its silence) may stand (arXiv 2410.17799 §3).
    columns: kept of the conversation, however long.
    """
    quiet_text, quiet = (vocab.specials[name] for name in silences)
    sizes = {name: chunk_text if name == 'text' else chunk_frames for name in streams}
    allowed = {name: jnp.asarray(allowed_ids(vocab, *(('text', quiet_text) if name == 'text' else
                                                      ('speech', quiet)))) for name in streams}
    bos = np.full((1, 1), vocab.specials['bos'], np.int32)
    stream, begun, out = Stream(speaker, rows=rows, columns=columns, key=key), False, None
    while True:
        heard = yield out
        out = []
        for name in streams:
            plan = np.full((sizes[name], rows, 1), FREE, np.int32)
            if name == 'theirs':
                plan = heard.T[..., None]
            if not begun:
                out.append(np.asarray(stream.first([bos] * rows, plan[0], allowed[name]))[None])
                plan, begun = plan[1:], True
            if len(plan):
                out.append(np.asarray(stream.more(plan, allowed[name])))
        out = np.concatenate(out)[:, :, 0].T


def in_chunks(speaker: Speaker, heard: list[np.ndarray], vocab: Vocab, *, streams,
              chunk_frames: int, chunk_text: int, silences, key=None) -> list[np.ndarray]:
    """Rows of `layout.chunks.flattened` in which only what is heard (units [U] each) is given, by
    `chunk_by_chunk`; the speaker's ring is what is kept."""
    key = jax.random.key(0) if key is None else key
    counts = [-(-len(units) // chunk_frames) for units in heard]
    given = np.full((len(heard), max(counts) * chunk_frames), vocab.specials[silences[1]], np.int32)
    for i, units in enumerate(heard):
        given[i, :len(units)] = vocab.encode('units', units)
    width = sum(chunk_text if name == 'text' else chunk_frames for name in streams)
    most = 1 + width * max(counts)
    said = chunk_by_chunk(speaker, vocab, rows=len(heard), streams=streams, key=key,
                          columns=min(most, speaker.ring_columns or most),
                          chunk_frames=chunk_frames, chunk_text=chunk_text, silences=silences)
    next(said)
    out = [np.full((len(heard), 1), vocab.specials['bos'], np.int32)]
    for c in range(max(counts)):
        out.append(said.send(given[:, c * chunk_frames:(c + 1) * chunk_frames]))
    rows = np.concatenate(out, axis=1)
    return [row[:1 + width * count] for row, count in zip(rows, counts, strict=True)]


def step_by_step(speaker: Speaker, vocab: Vocab, *, rows: int, columns: int, chunk_frames: int,
                 speakers=('[S0]', '[S1]'), key):
    """Talks in rows of `layout.chunks.synchronous`, a chunk ahead: once started, send what is new
    of a chunk that was heard (units of each row, None where nobody speaks any more) and get what I
    say in the next one (ids of each row), and what I guessed that I would hear.

    While their chunk N is still being said, the model guesses it, says its own chunk N + 1 upon
    that guess, and then puts what was really said in the guess's place, so that it hears everything
    and never has to be waited for (arXiv 2409.15594 §4.3). What is said depends on what was heard
    two chunks before and earlier; the first thing that is got is said before anything is heard.
    columns: kept of the conversation, however long; at least what reading and guessing take.
    """
    clock, other = (vocab.specials[name] for name in speakers)
    new = [[vocab.specials['bos'], clock] for _ in range(rows)]     # what `base` has not read
    most = 2 * chunk_frames + 1                 # of both, and the marker between
    wide = most + 2                             # what a chunk adds to a row, and one before
    allowed = allowed_ids(vocab, 'speech', clock)
    allowed[other] = True
    allowed = jnp.asarray(allowed)
    base = Stream(speaker, rows=rows, columns=max(columns, 2 * wide + most), key=key, dense=True)
    number = itertools.count()

    def say(ahead=None) -> list[np.ndarray]:
        """What the model says after each row, or after a row and what may lie ahead of it."""
        prompts = [np.array(row + more, np.int32)
                   for row, more in zip(new, ahead or [[]] * rows, strict=True)]
        return _said(base.fork(jax.random.fold_in(key, next(number))), prompts, wide, allowed,
                     clock, most, most - 1, rows)

    def listen() -> None:
        """`base` reads the rows but for the last id of each, after which it will be asked."""
        base.first([np.array(row[:-1], np.int32)[None] for row in new],
                   np.full((rows, 1), FREE, np.int32), allowed, wide)
        for row in new:
            del row[:-1]

    def mine(said: np.ndarray) -> list[int]:
        """My units of a chunk: what comes before the other's marker, as many as it has frames."""
        stop = np.flatnonzero(said == other)
        return said[:stop[0] if stop.size else None][:chunk_frames].tolist()

    out, guessed = [mine(said) for said in say()], []
    while True:
        for row, said in zip(new, out, strict=True):
            row += said
        heard = yield out, guessed
        listen()
        guessed = [np.array([t for t in said[np.argmax(said == other):] if t != other]
                            if (said == other).any() else [], np.int32)[:chunk_frames]
                   for said in say()]
        out = [mine(said) for said in say([
            [*([other, *guess] if len(guess) else []), clock] for guess in guessed])]
        for row, units in zip(new, heard, strict=True):
            if units is not None:
                row += [other, *vocab.encode('units', units).tolist()] if len(units) else []
                row.append(clock)
        out = [[] if units is None else said for said, units in zip(out, heard, strict=True)]


def in_step(speaker: Speaker, heard: list[np.ndarray], vocab: Vocab, *, chunk_frames: int,
            speakers=('[S0]', '[S1]'), key=None
            ) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Talks to `heard` (units [U] each) by `step_by_step`; the speaker's ring is what is kept.

    Returns the rows as they came to be and, for each, the guesses.
    """
    key = jax.random.key(0) if key is None else key
    clock, other = (vocab.specials[name] for name in speakers)
    theirs = [chunks.fresh(np.asarray(units), chunk_frames) for units in heard]
    whole = (2 * chunk_frames + 3) * (max(map(len, theirs)) + 3)    # both speakers, both markers
    talk = step_by_step(speaker, vocab, rows=len(heard), key=key, chunk_frames=chunk_frames,
                        columns=min(whole, speaker.ring_columns or whole), speakers=speakers)
    said, _ = next(talk)
    rows = [[vocab.specials['bos'], clock, *mine] for mine in said]
    guesses: list[list[np.ndarray]] = [[] for _ in heard]
    for n in range(max(map(len, theirs))):
        now = [chunked[n] if n < len(chunked) else None for chunked in theirs]
        said, guessed = talk.send(now)
        for i, (units, row) in enumerate(zip(now, rows, strict=True)):
            if units is not None:
                row += [other, *vocab.encode('units', units).tolist()] if len(units) else []
                guesses[i].append(guessed[i])
                if n + 1 < len(theirs[i]):
                    row += [clock, *said[i]]
    return [np.array(row, np.int32) for row in rows], guesses


# Many rows: a conversation on one clock.

def conversation_plan(vocab: Vocab, heard_KT: np.ndarray, late: tuple[int, ...],
                      speaker: str = 'theirs') -> np.ndarray:
    """[K, T + 1]: the other speaker's codes given (delays applied), everything of mine FREE.

    Column 0 and the first `late[k]` columns after it hold each row's initial token, as in training.
    """
    frames = heard_KT.shape[1]
    plan = np.full((len(vocab.rows), frames + 1), FREE, np.int32)
    book = 0
    for k, row in enumerate(vocab.rows):
        if row.name.startswith(speaker):
            kept = max(0, frames - late[k])
            plan[k, 1 + late[k]:] = vocab.encode(row.name, heard_KT[book, :kept])
            book += 1
        plan[k, :1 + late[k]] = initial(row)
    return plan


def converse(speaker: Speaker, plans: list[np.ndarray], *, key=None) -> list[np.ndarray]:
    """Fills the FREE cells of `plans` (each [K, T_i + 1]), all at once, column by column.

    The speaker's ring is what is kept, so memory does not grow with the conversation.
    """
    key = jax.random.key(0) if key is None else key
    longest = 2 + _round_up(max(p.shape[1] for p in plans) - 2, CHUNK)
    batch = np.full((len(plans), plans[0].shape[0], longest), NOTHING, np.int32)
    for i, p in enumerate(plans):
        batch[i, :, :p.shape[1]] = p
    ring = min(few(longest), speaker.ring_columns or few(longest))
    stream = Stream(speaker, rows=len(plans), columns=ring, key=key)
    said = [np.asarray(stream.first([b[:, :1] for b in batch], batch[:, :, 1]))[None]]
    for at in range(2, longest, CHUNK):
        said.append(np.asarray(stream.more(np.moveaxis(batch[:, :, at:at + CHUNK], 2, 0))))
    filled = np.concatenate([batch[:, :, :1], np.moveaxis(np.concatenate(said), 0, 2)], axis=2)
    return [filled[i, :, :p.shape[1]] for i, p in enumerate(plans)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def _next(graph, rows, samplers, manners, params, state, plan_BK, ahead_BK, begins_B, there_B):
    """Reads a column in every slot that is `there`, the initial one where it begins: what was drawn
    for it but where the plan says more. Returns (state, the column, what is drawn for the next,
    for which `ahead` is the plan)."""
    lm = nnx.merge(graph, params)
    begins, there = begins_B[:, None], there_B[:, None]
    column, _ = _settled(manners, plan_BK, jnp.where(plan_BK == FREE, state['drawn'], plan_BK),
                         jnp.zeros(plan_BK.shape, bool))
    column = jnp.where(begins, jnp.asarray([initial(row) for row in rows]), column)
    position = jnp.where(begins_B, 0, state['position'])
    cache = state['cache'] | dict(segment=jnp.where(begins, 0, state['cache']['segment']))
    where = Where(position[:, None], there.astype(jnp.int32))
    drawn, cache = lm.step(column[:, :, None], where, cache,
                           jax.random.fold_in(state['key'], state['step']),
                           _pick(rows, samplers, None, ahead_BK))
    drawn = jnp.where(there, drawn, state['drawn'])
    return dict(cache=cache, drawn=drawn, key=state['key'], position=position + there_B,
                step=state['step'] + 1), column, drawn


class Room:
    """Conversations going on at once, a frame at a time: one dispatch hears and speaks for all.

    Every slot begins, pauses and ends on its own. Its ring holds what the speaker's does (`columns`
    where that is all), so that neither memory nor the time of a step grows with a conversation.
    """

    def __init__(self, speaker: Speaker, late: tuple[int, ...], *, slots: int, columns: int, key):
        lm = nnx.eval_shape(lambda p: nnx.merge(speaker.graph, p), speaker.params)
        self._speaker, self._late, self.slots = speaker, late, slots
        names = [row.name.split()[0] for row in speaker.rows]
        self._theirs = [k for k, name in enumerate(names) if name == 'theirs']
        K = len(speaker.rows)
        cache = lm.empty_cache(slots, speaker.ring_columns or columns)
        self._first = np.array([initial(row) for row in speaker.rows], np.int32)
        self._state = dict(
            cache=cache | dict(written=jnp.zeros(slots, jnp.int32)), key=key,
            drawn=jnp.zeros((slots, K), jnp.int32), position=jnp.zeros(slots, jnp.int32),
            step=jnp.int32(0))
        self._frames = np.zeros(slots, np.int64)            # heard in each slot
        # The last max(late) + 2 columns, of which the newest is drawn and not read yet, and the
        # last max(late) + 1 frames heard, of each slot; newest at the end.
        self._said = np.zeros((max(late) + 2, slots, K), np.int32)
        self._heard = np.zeros((max(late) + 1, slots, K), np.int32)
        self._begin(np.ones(slots, bool))

    def begin(self, slot: int) -> None:
        """The next frame of `slot` is the first of a new conversation, whose initial column is read
        now, when nobody waits."""
        self._begin(np.arange(self.slots) == slot)

    def _begin(self, there: np.ndarray) -> None:
        self._frames[there] = 0
        self._read(np.full((self.slots, len(self._speaker.rows)), FREE, np.int32), there, True)

    def _read(self, plan: np.ndarray, there: np.ndarray, begins: bool) -> None:
        """The next column of some slots, and what is drawn for the one after it."""
        s = self._speaker
        heard = self._frames if begins else self._frames + 1
        early = np.array(self._late) > heard[:, None]
        self._state, column, drawn = _next(
            s.graph, s.rows, s.samplers, s.manners, s.params, self._state, plan,
            np.where(early, self._first, FREE), there & begins, there)
        self._said[-1, there] = np.asarray(column)[there]
        self._said[:-1, there] = self._said[1:, there]
        self._said[-1, there] = np.asarray(drawn)[there]

    def step(self, heard: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Hears a frame in each of some slots (codes [books]) and says what it can in each.

        Returns, where delays allow, the newest complete frame of my rows [K]: what is said
        max(late) - 1 frames before the newest heard, and so a frame after it where nothing is late.
        The first frame, which nothing was heard before, comes with the second where nothing is
        late: [K, 2]; else [K, 1]. Their rows hold what happens to be drawn for them.
        """
        late = self._late
        there = np.zeros(self.slots, bool)
        there[list(heard)] = True
        plan = np.full((self.slots, len(self._speaker.rows)), FREE, np.int32)
        for slot, codes in heard.items():
            self._heard[:-1, slot] = self._heard[1:, slot]
            for book, k in enumerate(self._theirs):
                row, code = self._speaker.rows[k], int(codes[book])
                if not 0 <= code < row.size - 1:
                    raise ValueError(f'{row.name} ids must lie in 0..{row.size - 2}, got {code}')
                self._heard[-1, slot, k] = row.start + code
                plan[slot, k] = self._heard[-1 - late[k], slot, k]
            early = np.array(late) > self._frames[slot]
            plan[slot, early] = self._first[early]
        self._read(plan, there, False)
        out = {}
        for slot in heard:
            self._frames[slot] += 1
            if self._frames[slot] >= max(late):
                count = 2 if self._frames[slot] == 1 and not max(late) else 1
                out[slot] = np.stack([np.array([self._said[d - max(late) - n, slot, k]
                                                for k, d in enumerate(late)])
                                      for n in range(count, 0, -1)], 1)
        return out

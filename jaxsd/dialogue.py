# SPDX-License-Identifier: Apache-2.0
"""Conversations with a trained stage: what the other speaker says goes in, what I say comes out.

The layouts that hold two speakers write time down in different ways. Here each is asked the same:
tokens of the other on a clock, for tokens of mine on that clock and the words that I write. What
speaks is `generate`; `turns` measures what came of it.

    python -m jaxsd.dialogue TALK.wav       # of a recording of two channels, mine first
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxsd import data, generate, trained, turns
from jaxsd.config import ConfigError, options_of, plain, resolve
from jaxsd.layout import chunks, duplex
from jaxsd.types import NOTHING, Record, Turn, positive

LAYOUTS = ('duplex.columns', 'duplex.units', 'chunks.flattened', 'chunks.synchronous')
FLATTENED = ('streams', 'chunk_frames', 'chunk_text', 'silences')
SILENT_RECORDS = 200        # of the training split, to learn which codes mean silence


class Said(NamedTuple):
    """My side: codes [books, T] of the codec, NOTHING where I am silent by a mark of the layout;
    words as (frame, word), None for a system that writes none."""

    codes: np.ndarray
    words: list[tuple[int, str]] | None


def layout_of(config, source: str) -> dict:
    """The options of the layout that draws `source`, with those that the config leaves as they are;
    ConfigError if it holds no two speakers."""
    if source not in config.data.sources:
        raise ConfigError(f'data.sources has no {source}; it has '
                          f'{", ".join(config.data.sources)}')
    options = plain(config.data.sources[source]).get('layout') or plain(config.layout)
    if options['name'] not in LAYOUTS:
        raise ConfigError(f'data.sources.{source} is drawn by {options["name"]}; a conversation '
                          f'needs one of {", ".join(LAYOUTS)}')
    return _with_defaults(options)


def _with_defaults(options: dict) -> dict:
    legal = options_of(resolve(options['name'], 'jaxsd.layout'))
    return {k: p.default for k, p in legal.items() if p.default is not p.empty} | options


def own_source(lm: trained.LM) -> str | None:
    """A source of two speakers, drawn as the stage was trained to talk; None if it has none."""
    def drawn(name):
        return plain(lm.config.data.sources[name]).get('layout') or plain(lm.config.layout)
    learned = [n for n in lm.stage.data if drawn(n)['name'] in LAYOUTS]
    own = [n for n in learned if drawn(n) == plain(lm.config.layout)]
    return next(iter([*own, *learned]), None)


def own_layout(lm: trained.LM) -> dict:
    """The options by which the stage was trained to talk."""
    source = own_source(lm)
    return layout_of(lm.config, source) if source else _with_defaults(plain(lm.config.layout))


def writes(layout: dict, vocab) -> bool:
    """Whether words are written beside what is said."""
    return vocab.rows[0].name == 'text' or 'text' in layout.get('streams', ())


def tokens_of(record: Record, channel: int, layout: dict) -> np.ndarray:
    """What the layout is told of a channel: codes [books, T], or units [1, T]."""
    if layout['name'] == 'duplex.columns':
        return record.codes[channel]
    return np.asarray(record.units[channel])[None]


def talk(lm: trained.LM, heard: list[np.ndarray], layout: dict, *, batch: int = 16,
         samplers: dict | None = None, key=None) -> list[Said]:
    """My side of conversations with each of `heard` [books, T]; greedy unless `samplers` say more.

    Decodes `batch` dialogues at once. Everything that I say is the model's own.
    """
    key = jax.random.key(0) if key is None else key
    speak = dict(zip(LAYOUTS, (_columns, _columns, _flattened, _synchronous), strict=True)
                 )[layout['name']]
    order = sorted(range(len(heard)), key=lambda i: heard[i].shape[1])     # little is padding
    out: list = [None] * len(heard)
    for n, part in enumerate(trained.in_parts(order, batch)):
        full = [heard[i] for i in part] + [heard[part[0]]] * (batch - len(part))   # few shapes
        said = speak(lm, lm.speaker(samplers), full, layout, jax.random.fold_in(key, n))
        for i, one in zip(part, said, strict=False):
            out[i] = one
    return out


def _columns(lm, speaker, heard, layout, key) -> list[Said]:
    v, late = lm.vocab, delays(lm, layout)
    plans = [generate.conversation_plan(v, codes, late) for codes in heard]
    out = []
    for columns in generate.converse(speaker, plans, key=key):
        frames = columns.shape[1] - 1 - max(late)       # the last ones lack their late rows
        rows = duplex.undelay(columns, late)[:, :max(0, frames)]
        out.append(Said(local(v, rows), trained.words_at(v, lm.text(), rows[0]) if writes(layout, v)
                        else None))
    return out


def delays(lm: trained.LM, layout: dict) -> tuple[int, ...]:
    """Each row's delay in columns under `layout`."""
    if layout['name'] == 'duplex.units':
        return (0,) * len(lm.vocab.rows)
    return trained.layout_delays(layout, lm.vocab)


def local(vocab, rows_KT: np.ndarray) -> np.ndarray:
    """Codes [books, T] of my rows among `rows_KT`; what is no code becomes the nearest one."""
    return np.stack([np.clip(rows_KT[k] - row.start, 0, row.size - 2)
                     for k, row in enumerate(vocab.rows) if row.name.startswith('mine')])


def _flattened(lm, speaker, heard, layout, key) -> list[Said]:
    options = {k: layout[k] for k in FLATTENED}
    rows = generate.in_chunks(speaker, [h[0] for h in heard], lm.vocab, key=key, **options)
    out = []
    for row, theirs in zip(rows, heard, strict=True):
        codes, line = _cells(lm, row[1:], layout)
        out.append(Said(codes[:, :theirs.shape[1]], None if line is None else
                        trained.words_at(lm.vocab, lm.text(), line)))
    return out


def _cells(lm, row, layout: dict) -> tuple[np.ndarray, np.ndarray | None]:
    """My codes [1, T] and text ids [T] (NOTHING after those of a chunk) of whole chunks in a row;
    None where none is written."""
    streams, frames, count = layout['streams'], layout['chunk_frames'], layout['chunk_text']
    sizes = [count if name == 'text' else frames for name in streams]
    at = dict(zip(streams, np.cumsum([0, *sizes[:-1]]), strict=True))
    start, size = lm.vocab.ranges['units']
    cells = row.reshape(-1, sum(sizes))
    mine = cells[:, at['mine']:at['mine'] + frames].reshape(1, -1)
    codes = np.where((mine >= start) & (mine < start + size), mine - start, NOTHING)
    if 'text' not in streams:
        return codes, None
    line = np.full((len(cells), frames), NOTHING, np.int32)
    line[:, :count] = cells[:, at['text']:at['text'] + count]
    return codes, line.reshape(-1)


def _synchronous(lm, speaker, heard, layout, key) -> list[Said]:
    options = {k: layout[k] for k in ('chunk_frames', 'speakers')}
    rows, _ = generate.in_step(speaker, [h[0] for h in heard], lm.vocab, key=key, **options)
    return [Said(chunks.interpolate(row, lm.vocab, **options)[:1, :theirs.shape[1]], None)
            for row, theirs in zip(rows, heard, strict=True)]


def by_chunks(lm: trained.LM, speaker: generate.Speaker, layout: dict, key):
    """One conversation in a layout of chunks, for as long as it goes on: send codes [1,
    chunk_frames] of theirs and get a chunk of mine, as (codes [1, chunk_frames], text ids
    [chunk_frames] or None); see `Said` and `_cells`. Who speaks a chunk ahead gives the first when
    started, codes alone, and then the one after what was heard."""
    kept = dict(rows=1, columns=speaker.ring_columns, key=key)
    if layout['name'] == 'chunks.flattened':
        said = generate.chunk_by_chunk(speaker, lm.vocab, **kept,
                                       **{k: layout[k] for k in FLATTENED})
        out = next(said)
        while True:
            heard = yield out
            out = _cells(lm, said.send(lm.vocab.encode('units', heard))[0], layout)
    frames, start = layout['chunk_frames'], lm.vocab.ranges['units'][0]
    said = generate.step_by_step(speaker, lm.vocab, **kept, chunk_frames=frames,
                                 speakers=layout['speakers'])
    (mine,), _ = next(said)
    codes = chunks.filled(np.array(mine, np.int32) - start, NOTHING, frames)
    heard, before = (yield codes[None]), NOTHING
    while True:
        new, = chunks.fresh(heard[0], frames, before)
        (mine,), _ = said.send([new])
        codes = chunks.filled(np.array(mine, np.int32) - start, codes[-1], frames)
        before = heard[0, -1]
        heard = yield codes[None], None


# What is measured.

def silence(config, source: str) -> frozenset[int]:
    """Which ids of the first codebook mean silence, by training dialogues whose turns are known."""
    layout, codes, heard = layout_of(config, source), [], []
    for record in data.examples(config, 'train', source, limit=SILENT_RECORDS):
        for c in (0, 1):
            ids = tokens_of(record, c, layout)[0]
            codes.append(ids)
            own = [(t.start_s, t.end_s) for t in record.turns if t.channel == c]
            heard.append(turns.during(own, len(ids), config.codec.frame_hz))
    found = turns.silent_codes(codes, heard)
    if not found:
        raise ConfigError(f'data.sources.{source}: no code is heard in silence more than in speech')
    return found


def _turns(record: Record, channel: int) -> list[list[Turn]]:
    """The turns of a channel, each with all that follows before the other says anything."""
    out: list[list[Turn]] = []
    other = [t for t in record.turns if t.channel != channel]
    for t in sorted(t for t in record.turns if t.channel == channel):
        if out and not any(o.start_s < t.start_s and o.end_s > out[-1][-1].end_s for o in other):
            out[-1].append(t)
        else:
            out.append([t])
    return out


def transcripts(lm: trained.LM, spoken: list[np.ndarray], source: str) -> list[str]:
    """What each of `spoken` (codes [books, T]) says, written down by the model itself, greedily.

    source: one whose layout writes theirs, late, and leaves my rows empty.
    """
    layout = layout_of(lm.config, source)
    if layout.get('text') != 'theirs' or layout.get('mine') != 'none':
        raise ConfigError(f'listener: data.sources.{source} does not write down what is heard')
    v = lm.vocab
    late = duplex.delays(v, acoustic_delay_columns=layout.get('acoustic_delay_columns', 1),
                         text_delay_columns=layout['text_delay_columns'])
    plans = []
    for codes in spoken:
        plan = generate.conversation_plan(v, codes, late)
        plan = np.pad(plan, ((0, 0), (0, max(late))), constant_values=NOTHING)
        plan[0, 1 + late[0]:] = generate.FREE
        plan[1:][plan[1:] == generate.FREE] = NOTHING
        plans.append(plan)
    return [' '.join(w for _, w in trained.words_at(v, lm.text(), duplex.undelay(x, late)[0]))
            for part in trained.in_parts(plans, 16) for x in generate.converse(lm.speaker(), part)]


def _figures(actives, words, records, hz, murmurs) -> dict[str, float]:
    """What `turns` says of dialogues, pooled: activity [2, T] of each, and frames of my words (None
    where none are written)."""
    out = turns.per_minute([turns.tally(a, hz) for a in actives], hz)
    frames = sum(a.shape[1] for a in actives)
    out['silence %'] = 100 * (1 - sum(int(a[0].sum()) for a in actives) / frames)
    found = []
    for active, said, r in zip(actives, words, records, strict=True):
        theirs = _turns(r, 1)
        spans = [(t[0].start_s, t[-1].end_s) for t in theirs]
        known = [all(x.text in murmurs for x in t) for t in theirs] if murmurs else None
        found += turns.coped(active, spans, hz, words=said, murmurs=known)
    for kind in ('turn', 'pause', 'interruption', 'murmur'):
        these = [c for c in found if c.kind == kind]
        if not these:
            continue
        name = 'went on %' if kind == 'murmur' else 'takeover %'
        out[f'events/{kind}'] = len(these)
        out[f'{name}/{kind}'] = 100 * float(np.mean([c.takeover for c in these]))
        if kind == 'interruption':
            out[f'success %/{kind}'] = 100 * float(np.mean([c.gave_way for c in these]))
            out[f'talked through %/{kind}'] = 100 * float(np.mean([c.through for c in these]))
        for key in ('latency_s', 'stop_s'):
            values = [getattr(c, key) for c in these if getattr(c, key) is not None]
            if values:
                out[f'{key[:-2]} ms/{kind}'] = 1000 * float(np.median(values))
    own = [turns.backchannels(a, hz, w) for a, w in zip(actives, words, strict=True)]
    out['backchannels/min'] = sum(len(b) for b, _ in own) / frames * hz * 60
    return out


def turn_taking(lm: trained.LM, *, split: str, limit: int | None, source: str, batch: int = 16,
                murmurs: tuple[str, ...] = (), listener: str = '', probed: int = 0) -> dict:
    """The other's side of dialogues is played: who speaks when, and how is the other dealt with?

    Units, pauses, gaps and overlaps per minute, counts pooled over all dialogues and turns; how
    often the floor is taken, and how late, when the other pauses, ends, interrupts or murmurs; how
    much of my side is silence, and of what I write repeated. success: who is interrupted goes on
    for less than a second and answers; talked through: goes on until they have ended, which the
    benchmark's takeover counts as well. Figures ending in /true are those of the recorded side.
    response: from the end of their turn to mine, below 0 where they overlap.

    murmurs: what the other says as backchannels; by default whatever is shorter than 1 s and begins
    while I speak. listener: a source that writes down what is heard; text/audio WER then compares
    what I write with what the model itself hears me say. probed: of how many dialogues training
    measures this at each of its probes; 0: of none.
    """
    del probed          # read by evaluate.probe
    positive('evals.turn_taking', batch=batch)
    layout = layout_of(lm.config, source)
    records = list(data.examples(lm.config, split, source, vocab=lm.vocab, limit=limit))
    if not records:
        raise ConfigError(f'turn_taking: split {split} of {source} holds no dialogue')
    silent, hz = silence(lm.config, source), lm.config.codec.frame_hz
    theirs = [tokens_of(r, 1, layout) for r in records]
    said = talk(lm, theirs, layout, batch=min(batch, len(records)))

    def active(mine, other):
        frames = min(mine.shape[1], other.shape[1])
        return np.stack([turns.voiced(x[0, :frames], silent) for x in (mine, other)])
    made = [active(s.codes, t) for s, t in zip(said, theirs, strict=True)]
    real = [active(tokens_of(r, 0, layout), t) for r, t in zip(records, theirs, strict=True)]
    written = [None if s.words is None else [t for t, _ in s.words] for s in said]
    true_words = [[int(w.start_s * hz) for w in r.words if w.channel == 0] for r in records]
    mine = _figures(made, written, records, hz, murmurs)
    true = _figures(real, true_words, records, hz, murmurs)
    metrics = {}
    for name in dict.fromkeys([*mine, *true]):
        metrics |= {n: x[name] for n, x in ((name, mine), (f'{name}/true', true)) if name in x}
    latency = [1000 * s for a in made for who, s in turns.transfers(a, hz) if who == 0]
    if latency:
        metrics |= {f'response ms p{p}': float(np.percentile(latency, p)) for p in (10, 50, 90)}
    human = [(turns.backchannels(a, hz, w)[0], b, t) for a, w, b, t in zip(
        real, true_words, made, written, strict=True)]
    near = [turns.timing_distance(turns.backchannels(b, hz, t)[0], h, b.shape[1], hz)
            for h, b, t in human if h]
    if near:
        metrics['backchannel timing'] = float(np.mean(near))
    if said[0].words is not None:
        metrics['repetition %'] = 100 * turns.repetition(_by_turn(said, made, hz))
        if listener:
            metrics |= _agreement([' '.join(w for _, w in s.words) for s in said],
                                  transcripts(lm, [s.codes for s in said], listener))
    return dict(metrics=metrics, items=len(records), histogram=dict(
        name='response after their end, ms', values=latency),
        note='the other side is played, mine is the model\'s own, greedy; activity by codes that '
             'are heard in silence')


def _by_turn(said: list[Said], actives, hz: float) -> list[list[str]]:
    """The words of each of my turns; a word may be written two frames before it is heard."""
    out = []
    for one, active in zip(said, actives, strict=True):
        mine = [t for t in turns.turns(active, hz) if t.channel == 0]
        out += [[w for f, w in one.words if t.start - 2 <= f < t.end] for t in mine]
    return out


def _agreement(written: list[str], heard: list[str]) -> dict[str, float]:
    """Word errors of what is heard against what is written; the floor: against another dialogue."""
    import jiwer
    kept = [i for i, w in enumerate(written) if w]
    if not kept:
        return {}
    a, b = [written[i] for i in kept], [heard[i] for i in kept]
    return {'text/audio WER %': 100 * jiwer.wer(a, b),
            'text/audio WER %/floor': 100 * jiwer.wer(a, b[1:] + b[:1])}


def main(argv: Sequence[str] | None = None) -> int:
    import os
    import sys

    import soundfile

    from jaxsd.flags import Parser
    parser = Parser(prog='python -m jaxsd.dialogue', description=(
        'Turn-taking of a recording of two channels, mine first, by sound alone.'), epilog=(
        'ipu, pause, gap, overlap: stretches of sound between silences of 0.2 s, silences within a '
        'turn and between turns, and both at once, in seconds and in events a minute. KIND/mine, '
        'KIND/theirs: how many turns of a kind each has (the first is the opening; a smooth one '
        'begins after the other, an interruption or a backchannel within it). transfer ms/mine: '
        'the median from the end of their turn to mine, below 0 where they overlap.'))
    parser.add_argument('wav', help='as `generate --task duplex` writes it; clean channels')
    path = parser.parse_args(argv).wav
    try:
        if not os.path.exists(path):
            raise ValueError('there is no such file')
        wav, rate_hz = soundfile.read(path, dtype='float32', always_2d=True)
        if wav.shape[1] != 2 or not len(wav):
            raise ValueError(f'it has {wav.shape[1]} channels and {len(wav)} samples; two channels '
                             'are needed')
    except (OSError, RuntimeError, ValueError) as e:
        print(f'jaxsd.dialogue: {path} cannot be measured: {e}', file=sys.stderr)
        return 1
    for name, channel in zip(('mine', 'theirs'), wav.T, strict=True):
        if not channel.any():
            print(f'jaxsd.dialogue: {path}: the channel of {name} is silent', file=sys.stderr)
    for name, value in turns.of_sound(wav.T, rate_hz).items():
        print(f'{name:24} {value:10.5g}')
    return 0


if __name__ == '__main__':
    raise SystemExit(main())

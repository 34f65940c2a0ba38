# SPDX-License-Identifier: Apache-2.0
"""The `generate` verb: text or sound in, text or sound out, for one input or for examples.

Everything between files and token ids happens here: reading a wav at the codec's rate, encoding it,
asking `generate` for what comes next, decoding, writing. Examples go to a directory with a
`samples.json` that the report plays.
"""

import dataclasses
import functools
import json
import logging
import os
import signal
import sys
import tempfile

import jax
import numpy as np

from jaxsd import data, dialogue, frames, generate, live, model, reply, trained
from jaxsd import run as rundir
from jaxsd.codec import whole_wav
from jaxsd.config import ConfigError, bind, plain
from jaxsd.layout import flat, template
from jaxsd.types import Word
from jaxsd.vocab import Text

log = logging.getLogger('jaxsd')

TITLES = {'tts': 'Reads {} aloud', 's2s': 'Hears the first half of {} and goes on',
          'duplex': 'Answers the caller of {}'}
MOST_INPUT_S = 600.0
MOST_FRAMES = 512      # columns of an answer in frames
FLOW_STEPS = 8          # of arXiv 2401.13527's released code
RATES_HZ = 4_000, 384_000       # of recordings: others are not made, and cost much to resample
MOST_INPUT_WORDS = 2000     # about as long, read aloud


def read_wav(path: str, rate_hz: int) -> np.ndarray:
    """float32 [channels, samples] at `rate_hz`. One-line ValueError for anything unreadable."""
    import soundfile
    try:
        whole_wav(path)
        with soundfile.SoundFile(path) as f:
            if not f.frames:
                raise ValueError(f'--input {path} holds no sound')
            if f.frames > MOST_INPUT_S * f.samplerate:
                raise ValueError(f'--input {path}: its length is {f.frames / f.samplerate:.1f} s, '
                                 f'allowed are up to {MOST_INPUT_S:.0f} s')
            if not RATES_HZ[0] <= f.samplerate <= RATES_HZ[1]:
                raise ValueError(f'--input {path} has {f.samplerate:,} samples a second; allowed '
                                 f'are {RATES_HZ[0]:,} to {RATES_HZ[1]:,}')
            wav, rate = f.read(dtype='float32', always_2d=True), f.samplerate
            if len(wav) < f.frames - rate // 10:        # mp3 headers may be a little off
                raise ValueError(f'--input {path} was cut short: its header says {f.frames} '
                                 f'samples, {len(wav)} could be read')
    except (OSError, RuntimeError) as e:        # soundfile's own error is a RuntimeError
        raise ValueError(f'--input {path} cannot be read as audio: '
                         f'{getattr(e, "error_string", e)}') from None
    if wav.shape[1] > 2:
        raise ValueError(f'--input {path} has {wav.shape[1]} channels; give one, or two of a '
                         'dialogue (mine, theirs)')
    if not np.isfinite(wav).all():
        raise ValueError(f'--input {path} holds samples that are not finite')
    if rate != rate_hz:
        from scipy.signal import resample_poly
        step = np.gcd(rate, rate_hz)
        wav = resample_poly(wav, rate_hz // step, rate // step, axis=0)
    return wav.T.astype(np.float32)


def write_wav(path: str, wav: np.ndarray, rate_hz: int) -> None:
    """Writes [samples] or [channels, samples] as 16-bit wav, whole or not at all."""
    import io

    import soundfile
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(np.atleast_2d(wav).T, -1, 1), rate_hz, format='WAV',
                    subtype='PCM_16')
    rundir.write_atomic(path, buffer.getvalue())


def run(config, workdir: str, *, task: str, stage_name, source, out: str, split: str, count: int,
        temperature, top_k, top_p, seed: int, drawn: str | None = None) -> None:
    """Generates from `source` (a wav or a text), or from `count` examples of `split` into `out`.

    drawn: the name in config.data.sources of the examples (default: by the task).
    """
    layout = config.layout.name
    if drawn is not None and (source is not None or drawn not in config.data.sources):
        raise ConfigError(f'--source {drawn}: ' + (
            '--input is not drawn from a source; leave one out' if source is not None else
            f'data.sources are {", ".join(config.data.sources)}'))
    beside = layout.startswith('parallel.')
    if beside and (source is not None or task not in ('tts', 's2s')):
        raise ConfigError(f'{layout} answers examples of the dataset: use --task s2s or tts '
                          'without --input')
    streams = len(model.make_vocab(config).rows) > 1
    talks = layout in dialogue.LAYOUTS
    if not beside and (task == 'duplex' and not talks or streams and task != 'duplex'):
        raise ConfigError(f'--task {task} does not fit this config: it has '
                          f'{"several streams; use duplex" if streams else "one stream"}')
    if layout.startswith('framed.') and task not in ('tts', 's2s'):
        raise ConfigError(f'--task {task} does not fit this config: it speaks frames; use tts or '
                          's2s')
    if source == '-' and task != 'duplex':
        raise ConfigError(f'--input -: raw sound is heard by duplex only, not by {task}')
    rundir.same_run(workdir, config, moved=True)
    default = (0.8, 250, 1.0) if task == 'duplex' else (0.0, 0, 1.0)
    sampler = sampler_of(*default, temperature, top_k, top_p)
    if not 0 <= seed < 1 << 32:
        raise ConfigError(f'--seed lies in 0..{(1 << 32) - 1}, got {seed}')
    if os.path.exists(out) and os.path.isdir(out) == (source is not None):
        raise ConfigError(f'--output {out} is a directory; name a file' if source is not None else
                          f'--output {out} is a file; name a directory for the examples')
    if source == '':
        raise ConfigError('--input is empty: name a file, or give a text')
    if source == '-' and (sys.stdin is None or sys.stdin.isatty()):
        raise ConfigError('--input -: nothing is piped in; as in: arecord ... | jaxsd generate ...')
    above = os.path.dirname(os.path.abspath(out))
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not (os.path.isdir(above) and os.access(above, os.W_OK)):
        raise ConfigError(f'--output {out}: {above} is no directory that can be written to')
    if source is not None and task in ('asr', 't2t') and out.endswith('.wav'):
        raise ConfigError(f'--task {task} writes text, no sound: name --output {out} .txt')
    kind = os.path.splitext(out)[1]
    if source is None and kind in ('.wav', '.txt'):
        raise ConfigError(f'--output {out}: examples go to a folder; name one without {kind}, or '
                          'give --input')
    codec = bind(config.codec, 'jaxsd.codec', 'codec')()
    rate = codec.identity['sample_rate_hz']
    if source is not None:      # before the model, which takes longer to read
        written = task in ('tts', 't2t')
        given = (_spelled(config, source) if written else
                 None if source == '-' else read_wav(source, rate))
        if kind not in ('.wav', '.txt') and task not in ('asr', 't2t'):
            raise ConfigError(f'--output {out}: sound is written as wav; name it .wav, or .txt for '
                              'the words alone')
    lm = trained.load(config, workdir, stage_name)
    if task == 'duplex' and source is not None and config.codec.name != 'mimi':
        _talk(lm, codec, given, sampler, seed, out)
        return
    perform = dict(duplex=_duplex, asr=_asr, tts=_tts, s2s=_s2s, t2t=_t2t)[task]
    if beside:
        drawn = drawn or _answered(config)
        perform = functools.partial(_reply, drawn)
    if source is not None:
        result = perform(lm, codec, [given], sampler, seed)[0]
        _write(out, result, rate)
        log.info('%s', result['text'])
        log.info('%s: written', out)
        return
    _examples(lm, codec, perform, task, out, split, count, sampler, seed, rate, drawn)


def sampler_of(usual_temperature: float, usual_top_k: int, usual_top_p: float, temperature, top_k,
               top_p) -> generate.Sampler:
    """A Sampler of what was asked for, and of what is usual where it is None. ConfigError."""
    temperature = usual_temperature if temperature is None else temperature
    top_k = usual_top_k if top_k is None else top_k
    top_p = usual_top_p if top_p is None else top_p
    if not 0 <= temperature < float('inf'):
        raise ConfigError(f'--temperature is 0 (greedy) or above, got {temperature}')
    if top_k < 0:
        raise ConfigError(f'--top-k is a count of tokens (0: all), got {top_k}')
    if not 0 < top_p <= 1:
        raise ConfigError(f'--top-p lies above 0 and up to 1 (all), got {top_p}')
    return generate.Sampler(temperature, top_k, top_p)


def conversing(sampler: generate.Sampler) -> dict[str, generate.Sampler]:
    """Samplers of the rows of two speakers; what is written beside the voice is drawn as Moshi
    draws it (kyutai-labs/moshi, LMGen), unless the voice is greedy."""
    text = generate.Sampler(0.7, 25) if sampler.temperature else sampler
    return dict(mine=sampler, tokens=sampler, text=text)


def _spelled(config, said: str) -> str:
    """`said`, if every word of it can be written in the config's pieces."""
    path = model.make_vocab(config).tokenizer
    text = Text(path) if path else None
    count = len(said.split())
    if not 0 < count <= MOST_INPUT_WORDS:
        raise ValueError('--input is empty: give a text' if not count else
                         f'--input has {count} words, allowed are up to {MOST_INPUT_WORDS}')
    lost = [w for w in said.split() if text and text.decode(text.encode(w)) != w]
    if lost:
        raise ValueError(f'--input: {path} has no pieces for {", ".join(map(repr, lost[:8]))}; '
                         'write it in the words and letters of the corpus')
    return said


def _examples(lm, codec, perform, task, out, split, count, sampler, seed, rate, name=None):
    name = name or ('dialogue' if task == 'duplex' else 'tts' if task == 'tts' else 'asr')
    if task == 'duplex' and name not in lm.config.data.sources:
        name = dialogue.own_source(lm) or name
    if name not in lm.config.data.sources:
        name = next(iter(lm.config.data.sources))
    records = list(data.examples(lm.config, split, name, vocab=lm.vocab, limit=count))
    if task in ('tts', 't2t'):
        given = [' '.join(w.text for w in r.words) for r in records]
    else:       # who learned from codes hears their resynthesis, who learned from sound that
        kept, layout = lm.config.layout.name.startswith('framed.'), dialogue.own_layout(lm)
        given = [codec.decode(dialogue.tokens_of(r, 1, layout)) if task == 'duplex' else
                 _kept(r.wav) if kept else _true(codec, r) for r in records]
        given = [g[None] for g in given]
    listed = _others(os.path.join(out, 'samples.json'), task)   # unreadable: said before the work
    results = perform(lm, codec, given, sampler, seed, records=records)
    if lm.config.layout.name.startswith('parallel.'):
        title, given = 'Answers {}', [x['text'] for x in results]
    else:
        title = TITLES.get(task)
    parent = os.path.dirname(os.path.abspath(out))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory('.partial', f'.{os.path.basename(out)}.', parent) as folder:
        files, references = [], {}

        def write(name: str, wav: np.ndarray | None, text: str = '') -> None:
            files.append(name)
            _write(os.path.join(folder, name), dict(wav=wav, text=text), rate)
        for i, (r, result) in enumerate(zip(records, results, strict=True)):
            stem = f'{task}-{i:03d}'
            if result.get('wav') is not None:
                write(f'{stem}.wav', result['wav'])
                references[f'{stem}.wav'] = given[i] if task == 'tts' else result['text']
                listed.append(dict(file=f'{stem}.wav', title=title.format(r.id),
                                   text=result['text'], **_asked(r, task)))
                if task == 'tts':   # what the same units, had they been right, would sound like
                    write(f'true/{stem}.wav', result.get('true', _true(codec, r)))
            else:
                write(f'{stem}.txt', None, result['text'])
            log.info('%s: %s', stem, result['text'])
        if task == 'tts':
            write('refs.json', None, json.dumps(references, indent=1))
        write('samples.json', None, json.dumps(listed, indent=1))
        for name in files:          # the list last: what it names is there
            os.makedirs(os.path.dirname(os.path.join(out, name)), exist_ok=True)
            os.replace(os.path.join(folder, name), os.path.join(out, name))


def _true(codec, record) -> np.ndarray:
    """What the first channel of a record sounds like through the codec."""
    several = codec.identity['codebooks'] > 1
    return codec.decode(record.codes[0] if several else record.units[0][None])


def _kept(flac: bytes) -> np.ndarray:
    """The first channel of a record's own sound."""
    import io

    import soundfile
    return soundfile.read(io.BytesIO(flac), dtype='float32', always_2d=True)[0][:, 0]


def _asked(r, task: str) -> dict:
    """What a listener to a dialogue must know: who speaks on which channel, and what is right."""
    if task != 'duplex':
        return {}
    turns = [' / '.join(t.text for t in r.turns if t.channel == c) for c in (0, 1)]
    return {'channels': ['mine', 'theirs'],
            'lines': {'The caller says': turns[1], 'A right answer': turns[0]}}


def _others(path: str, task: str) -> list[dict]:
    """What samples.json lists of other tasks."""
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding='utf-8') as f:
            return [e for e in json.load(f) if not e['file'].startswith(f'{task}-')]
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ConfigError(f'{path} cannot be read: {e}; move it away') from None


def _write(out: str, result: dict, rate: int) -> None:
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    if result.get('wav') is not None and not out.endswith('.txt'):
        write_wav(out, result['wav'], rate)
        out = os.path.splitext(out)[0] + '.txt' if result.get('lines') else ''
    if out:
        rundir.write_atomic(out, ''.join(f'{x}\n' for x in result.get('lines', [result['text']])))


def _units(lm, codec, wavs) -> list[np.ndarray]:
    return [flat.speech_tokens(codec.encode(w.mean(0))[0], lm.vocab) for w in wavs]


def _sound(lm, codec, tokens: list[np.ndarray]) -> list[np.ndarray]:
    start, size = lm.vocab.ranges['units']
    units = [t[(t >= start) & (t < start + size)] - start for t in tokens]
    quiet = np.zeros(codec.identity['sample_rate_hz'] // 4, np.float32)
    if 'latents' in lm.config.head:     # units of the first codebook, and a flow for the others
        there = [i for i, u in enumerate(units) if len(u)]
        means = [codec.latents(units[i][None]) for i in there]
        found = frames.refine(lm.speaker(), means, [m[:0] for m in means],
                              steps=FLOW_STEPS) if means else []
        out = dict(zip(there, map(codec.sound, found), strict=True))
        return [out.get(i, quiet) for i in range(len(units))]
    held = trained.unit_frames(lm.config, size)
    return [codec.decode(np.repeat(u, held[u])[None]) if len(u) else quiet for u in units]


def _layout(config, source: str) -> dict:
    own = plain(config.data.sources[source]).get('layout') if source in config.data.sources else {}
    return own or plain(config.layout)


def _by_template(lm, source: str, texts, sampler, seed) -> list[np.ndarray]:
    """Units (ids on the line) of texts in place of what a source's template is given to read."""
    options = {k: x for k, x in _layout(lm.config, source).items() if k not in ('name', 'score')}
    like = next(data.examples(lm.config, 'test', source, vocab=lm.vocab, limit=1))
    text, asked = lm.text(), []
    for said in texts:
        words = tuple(Word(w, 0, 0.0, 0.0, text.encode(w)) for w in said.split())
        made = template.pieces(dataclasses.replace(like, words=words), vocab=lm.vocab,
                               rng=np.random.default_rng(seed), **options)
        asked.append(generate.phases(made, lm.vocab))
    out = []
    for n, part in enumerate(trained.in_parts(asked)):
        told = generate.follow(lm.speaker({lm.vocab.rows[0].name: sampler}),
                               *map(list, zip(*part, strict=True)), lm.vocab,
                               most_tokens=dict(text=50, speech=300, any=350),
                               key=jax.random.fold_in(jax.random.key(seed), n))
        out += [said for each in told for name, said in each.items() if name.startswith('speech')]
    return out


def _pair(lm, source: str) -> tuple[str, str]:
    if source in lm.config.data.sources:
        return trained.markers(lm.config, source)
    return ('[Speech]', '[Text]') if source == 'asr' else ('[Text]', '[Speech]')


def _asr(lm, codec, wavs, sampler, seed, records=None):
    del sampler, seed
    units = ([flat.speech_tokens(r.units[0], lm.vocab) for r in records] if records
             else _units(lm, codec, wavs))
    return [dict(text=t) for t in trained.transcribe(lm, units, *_pair(lm, 'asr'))]


def _tts(lm, codec, texts, sampler, seed, records=None):
    del records
    if lm.config.layout.name.startswith('framed.'):
        text = lm.text()
        prompts = [np.concatenate([trained.prompt(lm.vocab, [i for w in t.split()
                                                              for i in text.encode(w)]),
                                   [lm.vocab.specials['eos']]])[None] for t in texts]
        said = [f for part in trained.in_parts(prompts, 16) for f in frames.say(
            lm.speaker(), part, frames.marks(lm.vocab), most_columns=MOST_FRAMES)]
        return [dict(text=t, wav=frames.wave(lm.config, f))
                for t, f in zip(texts, said, strict=True)]
    if _layout(lm.config, 'tts')['name'] == 'template.chain':
        return [dict(text=t, wav=w) for t, w in zip(texts, _sound(
            lm, codec, _by_template(lm, 'tts', texts, sampler, seed)), strict=True)]
    tokens = trained.read_aloud(lm, texts, *_pair(lm, 'tts'), sampler=sampler, seed=seed)
    return [dict(text=t, wav=w) for t, w in zip(texts, _sound(lm, codec, tokens), strict=True)]


def _continue(lm, prompts, kind, most_tokens, sampler, seed):
    speaker = lm.speaker({lm.vocab.rows[0].name: sampler})
    return generate.continue_prompts(speaker, prompts, lm.vocab, kind=kind,
                                     most_tokens=most_tokens, key=jax.random.key(seed))


def _s2s(lm, codec, wavs, sampler, seed, records=None):
    """Goes on from the first half of what was said (all of it for a file)."""
    if lm.config.layout.name.startswith('framed.'):
        wavs = [w.mean(0) for w in wavs]
        asked = [frames.question(lm.config, lm.vocab, w[:len(w) // 2] if records else w)
                 for w in wavs]
        found = frames.answered(lm, [p for p, _ in asked], [h for _, h in asked],
                                most_columns=MOST_FRAMES)
        text = lm.text()
        return [dict(text=text.decode(ids[:-1]), wav=frames.wave(lm.config, f))
                for ids, f in found]
    units = _units(lm, codec, wavs)
    if records:
        units = [u[:len(u) // 2] for u in units]
    prompts = [trained.prompt(lm.vocab, '[Speech]', u) for u in units]
    # The cap of 300 is that of arXiv 2402.05755 App. D.
    more = _continue(lm, prompts, 'speech', 300, sampler, seed)
    whole = [np.concatenate([u, m]) for u, m in zip(units, more, strict=True)]
    texts = trained.transcribe(lm, whole, *_pair(lm, 'asr'))
    return [dict(text=t, wav=w) for t, w in zip(texts, _sound(lm, codec, whole), strict=True)]


def _answered(config) -> str:
    """The source whose answers `evaluate` measures, else the first."""
    measured = [t['source'] for t in plain(config.evals).values() if t['name'] == 'replies']
    return (measured or list(config.data.sources))[0]


def _reply(source: str, lm, codec, given, sampler, seed, records):
    """Answers to examples as `source` draws them, their text greedy and their voice by `sampler`;
    `true` is how the right one would sound.

    text: what is written where the right answer is, too, else what was asked in writing.
    """
    del given
    v, hz = lm.vocab, codec.identity['sample_rate_hz']
    grids, layout = reply.drawn(lm, source, records)

    def sound(codes):
        return codec.decode(codes) if codes.size else np.zeros(hz // 4, np.float32)

    def told(ids):
        return lm.text().decode([x for x in ids if x not in v.specials.values()])
    found = reply.replies(lm, grids, layout, most_columns=128, voice=sampler, seed=seed)
    true = [reply.true(lm.config, layout, grid, v) for grid in grids]
    codes = reply.on_the_clock(lm, [codes for _, codes in found] + true)
    out = []
    for i, (grid, (ids, _)) in enumerate(zip(grids, found, strict=True)):
        prompt, _ = reply.asked(grid)
        writes = told(reply.written(v, grid.tokens[:, prompt.shape[1]:]))
        out.append(dict(text=told(ids if writes else reply.written(v, prompt)),
                        wav=sound(codes[i]), true=sound(codes[len(grids) + i])))
    return out


def _t2t(lm, codec, texts, sampler, seed, records=None):
    del codec
    text = lm.text()
    given = [t.split()[:max(1, len(t.split()) // 2)] if records else t.split() for t in texts]
    prompts = [trained.prompt(lm.vocab, '[Text]', [i for w in words for i in text.encode(w)])
               for words in given]
    more = _continue(lm, prompts, 'text', 50, sampler, seed)
    return [dict(text=' '.join(g) + ' | ' + text.decode(m))
            for g, m in zip(given, more, strict=True)]


def _duplex(lm, codec, wavs, sampler, seed, records=None):
    """Plays the other speaker's sound to the model and records both: [2, samples], mine first."""
    layout, hz = dialogue.own_layout(lm), codec.identity['frame_hz']
    heard = ([dialogue.tokens_of(r, 1, layout) for r in records] if records else
             [codec.encode(w[-1]) for w in wavs])        # the second channel of two is the user's
    out = []
    for codes, said in zip(heard, dialogue.talk(
            lm, heard, layout, batch=len(heard), key=jax.random.key(seed),
            samplers=conversing(sampler)), strict=True):
        n = said.codes.shape[1]
        if not n:
            raise ValueError('--input is too short to answer')
        mine = codec.decode(np.maximum(said.codes, 0))
        mine *= np.repeat(said.codes[0] >= 0, len(mine) // n)       # the layout's own silence
        theirs = codec.decode(codes[:, :n])
        out.append(dict(wav=np.stack([mine, theirs]),
                        text=' '.join(f'[{t / hz:.2f} s] {w}' for t, w in said.words or ()),
                        lines=[f'{t / hz:.2f} s  {w}' for t, w in said.words or ()]))
    return out


# Live.

def _raw(stream, samples: int):
    """Pieces of raw 16-bit little-endian mono sound, as they come; an odd last byte is lost."""
    left, begun = b'', False
    while part := stream.read1(2 * samples):
        left += part
        if not begun and len(left) < 4:
            continue
        if not begun and left[:4] == b'RIFF':
            raise ValueError('--input - takes raw samples, 16 bits each, and this is a wav file: '
                             'name it instead')
        begun = True
        whole = len(left) - len(left) % 2
        yield np.frombuffer(left[:whole], '<i2').astype(np.float32) / 32768
        left = left[whole:]


def _talk(lm, codec, wav, sampler, seed: int, out: str) -> None:
    """Answers a file's last channel, or raw sound on standard input, while it comes, into `out`:
    both channels, mine first, on the model's clock, and beside it the words with their times."""
    import soundfile
    rate, hz = codec.identity['sample_rate_hz'], codec.identity['frame_hz']
    room = live.room(lm, slots=1, samplers=conversing(sampler), seed=seed)
    frame = round(rate / hz)
    writes = dialogue.writes(dialogue.own_layout(lm), lm.vocab)
    if out.endswith('.txt') and not writes:
        raise ConfigError(f'--output {out}: this system writes no words; name it .wav')
    if wav is not None and wav.shape[1] < room.least * frame:
        raise ValueError(f'--input is too short to answer: it needs {room.least / hz:.2f} s')
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    stem, new = os.path.splitext(out)[0], f'{out}.{os.getpid()}.new'
    reach, held = round(live.REACH_S * rate), round((live.FADE_S + live.SHIFT_S) * rate)
    theirs, mine = [np.zeros(reach, np.float32)], []
    lines: list[str] = []
    samples, stopped = 0, None

    def pieces():
        nonlocal samples
        for piece in (_raw(sys.stdin.buffer, frame) if wav is None else
                      (wav[-1, i:i + frame] for i in range(0, wav.shape[1], frame))):
            theirs.append(piece)
            samples += len(piece)
            yield piece
        rest = np.zeros(room.rest * frame, np.float32)      # what is on its way comes out
        theirs.append(rest)
        yield rest

    def say(sound, words):
        nonlocal held
        mine.append(sound[held:])
        held = max(0, held - len(sound))
        for t, word in words:
            lines.append(f'{t:.2f} s  {word}')
            log.info('%s', lines[-1])
        both = [np.concatenate(x) for x in (mine, theirs)]
        n = min(map(len, both))
        written.write(np.clip(np.stack([x[:n] for x in both], 1), -1, 1))
        mine[:], theirs[:] = ([x[n:]] for x in both)
    terminated = signal.signal(signal.SIGTERM, signal.default_int_handler)     # ends it as Ctrl-C
    try:
        with soundfile.SoundFile(new, 'w', rate, 2, 'PCM_16', format='WAV') as written:
            try:
                found = live.stream(lm, codec, room, pieces(), say)
            except KeyboardInterrupt as e:
                if wav is not None:
                    raise
                stopped = e     # how a conversation ends: what was said until then is kept
        if samples < room.least * frame:
            raise stopped or ValueError('--input - ended before anything could be answered')
        if not out.endswith('.txt'):
            os.replace(new, out)
    finally:
        signal.signal(signal.SIGTERM, terminated or signal.SIG_DFL)
        if os.path.exists(new):
            os.unlink(new)
    if writes:
        rundir.write_atomic(f'{stem}.txt', ''.join(f'{line}\n' for line in lines))
    if stopped:
        log.info('%s: written, up to the interruption', out)
        raise stopped
    log.info('%s: written; first audio after %.0f ms, real-time factor %.2f over %.1f s', out,
             found['first_audio_ms'], found['real_time_factor'], found['frames'] / hz)

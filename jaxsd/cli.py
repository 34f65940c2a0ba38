# SPDX-License-Identifier: Apache-2.0
"""The verbs. Each parses its flags and its config before jax is imported or a directory is made.

Whatever a user can get wrong ends in one line on standard error and exit status 1 (2 for a wrong
flag); a traceback means a bug. JAXSD_TRACEBACK=1 shows it for errors of the first kind too.
"""

import argparse
import ctypes
import dis
import logging
import os
import re
import shlex
import sys
import traceback

from ml_collections import ConfigDict

from jaxsd import __version__
from jaxsd import config as configs
from jaxsd.config import ConfigError
from jaxsd.flags import Parser

log = logging.getLogger('jaxsd')

EPILOG = """\
A config is a Python file with get_config(arg): FILE.py is the published size, FILE.py:demo learns
something on a laptop in minutes, FILE.py:tiny takes two steps. The file may take more arguments,
words or key=value, between commas: FILE.py:demo,share=0.1. Any value can be overridden with
--config.path=value, as in '--config.stages[0].lr=1e-4' (quoted: a shell may read brackets) or
--config.mesh.fsdp=4, also one that the file leaves at its default. A run directory keeps its
config: evaluate, generate and export need no --config. Relative paths of a config start from the
current directory; --config.data.path, --config.codec.path and --config.vocab.tokenizer name others.
"""


IMPORTS = ('hf', 'kyutai', 'kyutai-hf', 'kyutai-lora')
EXPORTS = (*IMPORTS, 'stablehlo', 'onnx', 'gguf', 'peft')
DTYPES = ('f32', 'bf16', 'f16', 'q8_0')


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number above 0')
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog='jaxsd', description='Pretraining of spoken dialogue models in JAX.', epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--version', action='version', version=__version__)
    verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')

    def sampled(p, temperature='0; duplex: 0.8', top_k='all; duplex: 250'):
        p.add_argument('--temperature', type=float, default=None,
                       help=f'of voices, 0 is greedy (default: {temperature}); a row of text '
                            'beside them is drawn at 0.7 from the 25 likeliest, or greedily')
        p.add_argument('--top-k', type=int, default=None,
                       help=f'of so many likeliest (default: {top_k})')
        p.add_argument('--top-p', type=float, default=None,
                       help='of the likeliest of so much mass (default: 1, all)')
        p.add_argument('--seed', type=int, default=0)

    def verb(name, text, workdir=True, many=False):
        p = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + '.',
                             epilog=EPILOG, allow_abbrev=False,
                             formatter_class=argparse.RawDescriptionHelpFormatter)
        reads = name in ('evaluate', 'generate', 'talk', 'export')
        p.add_argument('--config', required=not reads, metavar='FILE.py[:arg]',
                       nargs='+' if many else None,
                       help='default: the one that the run directory was made with' if reads
                       else None)
        if workdir:
            p.add_argument('--workdir', required=True, metavar='DIR', help='the run directory')
        return p

    p = verb('show', 'draw the grid of an example as the model will read it', workdir=False)
    p.add_argument('--source', help='a source of config.data.sources (default: the first)')
    p.add_argument('--split', default='train', help='split of the dataset (default: train)')
    p.add_argument('--index', type=int, default=0, help='which record of the source')
    p.add_argument('--columns', type=_positive, default=48, help='columns to draw at most')
    p.add_argument('--png', metavar='OUT.png', help='draw a picture instead of text')

    p = verb('train', 'train every stage, or one, resuming what the run directory holds')
    p.add_argument('--stage', help='only this stage')
    p.add_argument('--profile', metavar='FIRST,LAST',
                   help='trace these steps with the profiler into WORKDIR/profile')

    p = verb('evaluate', 'measure a trained model; results as JSON and a table')
    p.add_argument('--stage', help='the stage to evaluate (default: the last)')
    p.add_argument('--tasks', help='comma-separated names of config.evals (default: all)')
    p.add_argument('--split', default='test', help='split of the dataset (default: test)')
    p.add_argument('--limit', type=_positive, help='at most so many items per task')
    p.add_argument('--untrained', action='store_true',
                   help='measure the model as it was before any training: a floor')

    p = verb('generate', 'speak or write with a trained model, from a file or the dataset')
    p.add_argument('--stage', help='the stage to speak with (default: the last)')
    p.add_argument('--task', required=True,
                   choices=('asr', 'tts', 's2s', 't2t', 'duplex'),
                   help='asr: speech to text; tts: text to speech; s2s, t2t: continuation; '
                        'duplex: answer the other speaker')
    p.add_argument('--input', help='a wav file (duplex: the other speaker, or two channels, mine '
                                   'and theirs; - for raw 16-bit mono sound at the codec\'s rate '
                                   'on standard input; with silence where an answer is to come), '
                                   'or text in quotes (default: examples of --split)')
    p.add_argument('--output', required=True, metavar='OUT',
                   help='a wav or txt file; with examples, a directory for them')
    p.add_argument('--split', default='test', help='split of the dataset (default: test)')
    p.add_argument('--count', type=_positive, default=4, help='how many examples')
    p.add_argument('--source', metavar='NAME',
                   help='of config.data.sources: what the examples are, and how they are asked')
    sampled(p)

    p = verb('talk', 'a page on this machine to talk with a trained duplex model')
    p.add_argument('--stage', help='the stage to talk with (default: the last)')
    p.add_argument('--host', default='127.0.0.1',
                   help='address to listen at (default: this machine alone can reach it)')
    p.add_argument('--port', type=int, default=8765, help='0: any that is free (default: 8765)')
    p.add_argument('--slots', type=_positive, default=4, help='how many talk at once (default: 4)')
    sampled(p, '0.8', '250')

    p = verb('export', 'write a trained model in the format of another program')
    p.add_argument('--stage', help='the stage to export (default: the last)')
    p.add_argument('--format', required=True, choices=EXPORTS)
    p.add_argument('--out', required=True, metavar='DIR', help='a new folder')
    p.add_argument('--dtype', choices=DTYPES,
                   help='of hf, kyutai and kyutai-hf: f32 (the default) or bf16; of the matrices '
                        'in gguf: f32, f16 (the default) or q8_0')

    p = verb('import', 'make a run directory from weights in the format of another program')
    p.add_argument('--stage', help='the stage the weights stand for (default: the last)')
    p.add_argument('--format', required=True, choices=IMPORTS)
    p.add_argument('--source', required=True, metavar='DIR', help="the checkpoint's folder")

    p = verb('plan', 'compile the train step for machines that are not here: does it fit, how fast',
             workdir=False, many=True)
    p.add_argument('--topology', required=True, nargs='+', metavar='NAME',
                   help='v5e:16x16 (or v5e-256), v5p:8x8x8, v6e:4x4, v4:4x4x4, v5e:16x16*2 (two '
                        'slices), h200:8 (h100, b200), cpu:8')
    p.add_argument('--stage', help='the stage to plan (default: the first)')
    p.add_argument('--price', type=float, metavar='P', help='of an hour of one chip, for the cost')
    p.add_argument('--search', type=float, nargs='?', const=20.0, metavar='MINUTES',
                   help='try meshes, batches and recomputation for so long (default: 20)')
    p.add_argument('--batches', help="comma-separated rows for --search (default: the stage's, "
                                     'from an eighth to eight times as many)')
    p.add_argument('--out', metavar='PLANS.md',
                   help='write plans as one page, beside those that it shows')

    p = verb('bench', 'time the train step on the devices that are here', workdir=False)
    p.add_argument('--stage', help='the stage to time (default: the first)')
    p.add_argument('--steps', type=_positive, default=20, help='steps to time (default: 20)')
    p.add_argument('--out', metavar='OUT.json', help='also write the figures here')

    p = verb('systems', 'write one page of all systems and what their demos do', workdir=False,
             many=True)
    p.add_argument('--runs', required=True, metavar='DIR',
                   help='run directories of the demos, named like the config files')
    p.add_argument('--out', required=True, metavar='OUT.md')

    p = verbs.add_parser('ablate', help='ask a question of several arms under one budget',
                         description='Ask a question of several arms under one budget and one '
                                     'order of data: train and measure each, then say the answer.',
                         epilog=EPILOG, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sweep', required=True, metavar='FILE.py',
                   help='the question, as in configs/ablations/; --config.path=value overrides its '
                        'base')
    p.add_argument('--workdir', required=True, metavar='DIR',
                   help='for a run directory per arm and seed, results.json and report.html')
    p.add_argument('--budget', type=float, metavar='N', help="in place of the question's, in its "
                                                             'unit')
    p.add_argument('--only', metavar='N', help='only this run of the list that --dry-run prints, '
                                               'or several as in 0,3; or the environment variable '
                                               'that holds it')
    p.add_argument('--launch', choices=('local', 'slurm', 'gke'),
                   help='several runs at once: here, on a core each, or as jobs of a cluster')
    p.add_argument('--dry-run', action='store_true',
                   help='say what differs between arms and what would run, and stop')
    p.add_argument('--doc', metavar='OUT.md', help='put the answer into this page')

    p = verbs.add_parser('report', help='one HTML page with curves, grids, tables and audio',
                         description='One HTML page with curves, grids, tables and audio.')
    p.add_argument('--workdir', required=True, action='append', metavar='DIR',
                   help='a run directory; may be given several times')
    p.add_argument('--out', required=True, metavar='OUT.html')
    p.add_argument('--note', default='', help='a paragraph for the reader, above the runs')
    p.add_argument('--wandb', metavar='PROJECT',
                   help='also send the runs to Weights & Biases; again, what is new of them')
    return parser


def _split_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Arguments without the --config.path=value ones, and those as (path, value)."""
    rest, overrides = [], []
    for a in argv:
        if a.startswith('--config.'):
            path, eq, value = a[len('--config.'):].partition('=')
            if not eq:
                raise ConfigError(f'{a}: write --config.{path}=value')
            overrides.append((path, value))
        else:
            rest.append(a)
    return rest, overrides


def _keep_memory() -> None:
    """Tells glibc to keep freed blocks: XLA on CPU otherwise maps, faults in and unmaps its
    temporary buffer at every call, which costs about a third of a small training step."""
    try:
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, -1), (-8, 1)):  # MMAP_MAX, TRIM_THRESHOLD, ARENA_MAX
            libc.mallopt(option, value)
    except (OSError, AttributeError):
        pass        # not glibc: nothing to tell


def _quiet() -> None:
    logging.basicConfig(format='%(message)s', level=logging.WARNING, stream=sys.stdout)
    logging.getLogger('jaxsd').setLevel(logging.INFO)
    logging.getLogger('jaxsd').propagate = True


def _before_jax() -> None:
    """Settings that must precede the first import of jax."""
    _keep_memory()
    cache = os.path.join(os.environ.get('XDG_CACHE_HOME', os.path.expanduser('~/.cache')),
                         'jaxsd', 'xla')
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', cache)
    os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '1')


def _devices() -> None:
    """Joins the other processes and finds the devices. Raises ConfigError where there are none."""
    import jax

    from jaxsd import processes
    processes.connect()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:     # jax asserts where it knows no such platform
        raise ConfigError(f'no device for JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS", "")}: '
                          f'{str(e) or "jax has no such platform here"}') from None


def _show(args, config):
    from jaxsd import data, model
    from jaxsd.layout import show
    from jaxsd.vocab import Text
    v = model.make_vocab(config)
    source = args.source or next(iter(config.data.sources))
    grid = data.grid(config, source, v, split=args.split, index=args.index)
    piece = Text(v.tokenizer).piece if v.tokenizer else None
    if args.png:
        show.picture(grid, v, args.png, columns=(0, args.columns), pieces=piece)
        print(f'{args.png}: {source} {args.index} of {args.split}')
    else:
        print(show.text(grid, v, columns=(0, args.columns), pieces=piece))


def _train(args, config):
    _devices()
    from jaxsd import evaluate, run, train
    profile = ()
    if args.profile:
        try:
            profile = tuple(int(x) for x in args.profile.split(','))
            first, last = profile
        except ValueError:
            raise ConfigError(f'--profile takes FIRST,LAST, got {args.profile!r}') from None
        if not 0 <= first < last:
            raise ConfigError(f'--profile: FIRST must come before LAST, got {args.profile}')
    train.run(config, args.workdir, stage_name=args.stage,
              probe_of=lambda stage: evaluate.probe(config, stage), profile_steps=profile,
              began_s=run.began_s(), made=args.made)


def _evaluate(args, config):
    _devices()
    from jaxsd import evaluate
    tasks = tuple(filter(None, (args.tasks or '').split(',')))
    evaluate.run(config, args.workdir, stage_name=args.stage, tasks=tasks, split=args.split,
                 limit=args.limit, untrained=args.untrained)


def _generate(args, config):
    _devices()
    from jaxsd import speak
    speak.run(config, args.workdir, task=args.task, stage_name=args.stage, source=args.input,
              out=args.output, split=args.split, count=args.count, temperature=args.temperature,
              top_k=args.top_k, top_p=args.top_p, seed=args.seed, drawn=args.source)


def _talk(args, config):
    _devices()
    from jaxsd import talk
    talk.run(config, args.workdir, stage_name=args.stage, host=args.host, port=args.port,
             slots=args.slots, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
             seed=args.seed)


def _export(args, config):
    _devices()
    from jaxsd import export
    options = {} if args.dtype is None else dict(dtype=args.dtype)
    made = export.export_run(config, args.workdir, args.out, args.format, stage_name=args.stage,
                             **options)
    if made:        # the first process
        print(f'{args.out}: written in the format {args.format}: {export.told(made)}')


def _import(args, config):
    _devices()
    from jaxsd import export
    made = export.import_run(config, args.source, args.workdir, args.format,
                             stage_name=args.stage, made=args.made)
    words = ['jaxsd', 'train', '--config', args.made['file'], *args.made['overrides'],
             '--workdir', args.workdir, '--stage', made['stage']]
    print(f'{args.workdir}: a run made from {args.source}, whose weights stand for stage '
          f'{made["stage"]} at step 0'
          + (f'; next: {" ".join(map(configs.typed, words))}' if made['trains'] else ''))


def _bench(args, config):
    import json

    import jax

    from jaxsd import bench, run
    _devices()
    found = bench.run(config, stage_name=args.stage, steps=args.steps)
    print(f'{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}')
    for name, x in found.items():
        print(f'{name:18}{"unknown" if x is None else f"{x:.4g}"}')
    if args.out:
        run.write_atomic(args.out, json.dumps(found, indent=1) + '\n')


def _plan(args, config):
    from jaxsd import journal, run
    from jaxsd import stage as stages
    from jaxsd.plan import estimate, search, table, targets
    if args.price is not None and not args.price >= 0:
        raise ConfigError(f'--price is of an hour of one chip, got {args.price}')
    if not (args.search is None or args.search > 0):
        raise ConfigError(f'--search takes minutes above 0, got {args.search}')
    try:
        batches = tuple(_positive(x) for x in filter(None, (args.batches or '').split(',')))
    except argparse.ArgumentTypeError as e:
        raise ConfigError(f'--batches: {e}') from None
    if args.out:
        table.read(os.path.splitext(args.out)[0] + '.json')     # before hours of compiling
    failed, compilers = False, ', '.join(' '.join(x) for x in ({
        'jax': run.versions()['jax']} | targets.compilers()).items())
    for spec, c in zip(args.config, config, strict=True):
        stage = (stages.find(c, args.stage) if args.stage else stages.stages(c)[0])
        for topology in map(targets.parse, args.topology):
            print(f'{spec} on {topology}', flush=True)
            overrides = ''
            if args.search is None:
                made = estimate.of(c, stage, topology)
            else:
                made, which, tried = search.best(c, stage, topology, minutes=args.search,
                                                 batches=batches)
                if which:
                    overrides = search.pasted(which.overrides(search.index_of(c, stage)))
                elif refused := [p for _, p in tried if not isinstance(p, str)]:
                    made = refused[-1]      # the page says by how much it does not fit
                else:
                    raise ConfigError(f'--search: nothing could be compiled for {topology}: '
                                      f'{tried[-1][1] if tried else "no time"}')
            print(table.text(made, args.price) + (f'\npaste   {overrides}' if overrides else ''),
                  flush=True)
            failed |= not made.fits
            if args.out:        # at once: who stops here keeps it
                table.write([table.Row(spec, made, overrides, args.command, journal.revision(),
                                       compilers)], args.out)
    if args.out:
        print(args.out)
    elif failed:
        raise ConfigError('not everything fits; --search tries other meshes and batches')


def _launched(how: str, lines: list[str]) -> None:
    """Runs shell lines; who is asked to stop asks all that they began, and waits for them."""
    import signal
    import subprocess
    bash = subprocess.Popen(['bash', '-euc', '\n'.join(["trap 'wait; exit 0' TERM", *lines])],
                            start_new_session=True)
    before = {n: signal.signal(n, lambda *_: os.killpg(bash.pid, signal.SIGTERM))
              for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = bash.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status:
        if how == 'local':          # the last line has said why
            raise SystemExit(status)
        raise ConfigError(f'--launch {how}: a line of it failed with status {status}')


def _ablate(args, overrides):
    from jaxsd import ablate, report
    only = []
    if args.only is not None:
        asked = os.environ.get(args.only, args.only)
        if not re.fullmatch(r'\d{1,6}(,\d{1,6})*', asked):
            raise ConfigError(f'--only {asked[:80]!r}: write the number of a run, or several as in '
                              '0,3, or the name of an environment variable that holds one')
        if args.launch or args.doc:
            raise ConfigError(f'--only does not go with {"--launch" if args.launch else "--doc"}, '
                              'which is of all runs')
        only = [int(n) for n in asked.split(',')]
    question = ablate.read(args.sweep, args.budget)
    _devices()
    arms = ablate.arms_of(question, args.workdir, overrides)
    if not only:
        print(ablate.described(question, arms))
    runs = ablate.runs_of(question, arms, args.workdir)
    if beyond := [i for i in only if i >= len(runs)]:
        raise ConfigError(f'--only {beyond[0]}: there are runs 0..{len(runs) - 1}')
    if args.doc and os.path.isdir(args.doc):
        raise ConfigError(f'--doc {args.doc} is a directory; name a page in it')
    if args.doc and not os.path.isdir(os.path.dirname(os.path.abspath(args.doc))):
        raise ConfigError(f'--doc {args.doc}: there is no such directory')
    if args.launch:
        if args.doc and args.launch != 'local':
            raise ConfigError('--doc: with --launch there is no answer yet; give it to the same '
                              'command without --launch when the jobs have ended')
        flags = [f'--config.{path}={value}' for path, value in overrides]
        flags += [f'--budget={args.budget}'] if args.budget else []
        lines = ablate.jobs(args.launch, question, args.workdir, runs, flags)
        lines[-1] += f' --doc {shlex.quote(args.doc)}' if args.doc else ''
        print('\n'.join(lines))
        if not args.dry_run:
            _launched(args.launch, lines)
        return
    if args.dry_run:
        print('\n'.join(f'run {i}: {r.folder}' for i, r in enumerate(runs)))
        return
    found = ablate.run(question, arms, args.workdir, only=only)
    if not only:
        print(ablate.table(found))
        print(report.write([args.workdir], os.path.join(args.workdir, 'report.html')))
        if args.doc:
            ablate.document(found, args.doc, args.command)
            print(args.doc)
    states = [(a['name'], r['seed'], r['state']) for a in found['arms'] for r in a['runs']]
    failed = [x for x in states if x[2].startswith('failed')]
    if failed:
        name, seed, why = failed[0]
        raise ConfigError(f'{len(failed)} of {len(states)} runs failed; arm {name}, seed {seed} '
                          f'{why}')


def _report(args, _):
    from jaxsd import report
    for workdir in args.workdir:
        if os.path.isdir(workdir) and not any(os.path.exists(os.path.join(workdir, name))
                                              for name in ('config.json', 'results.json')):
            raise ConfigError(f'--workdir {workdir} holds no run (no config.json) and no ablation')
    if args.wandb:
        from jaxsd.report import wandb
        wandb.send(args.workdir, args.wandb)
    report.write(args.workdir, args.out, note=args.note)
    print(args.out)


def _systems(args, _):
    from jaxsd import systems
    systems.write(args.config, args.runs, args.out)
    print(args.out)


VERBS = dict(show=_show, train=_train, evaluate=_evaluate, generate=_generate, talk=_talk,
             export=_export, plan=_plan, bench=_bench, ablate=_ablate, report=_report,
             systems=_systems)
VERBS['import'] = _import


def _foreign(error: BaseException) -> str:
    """What to say first of an error that no `raise` of ours made: its words may mislead."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    where = trace.tb_frame.f_globals.get('__name__', '')
    raised = dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == 'RAISE_VARARGS'
    if isinstance(error, OSError) or (raised and where.partition('.')[0] == 'jaxsd'):
        return ''
    return f'{type(error).__name__} in {where or "code"} (JAXSD_TRACEBACK=1 shows where): '


def _end(error: BaseException, trace: str = '') -> int:
    """Exit status 1; as one of several processes this leaves at once, naming those it lost."""
    processes = sys.modules.get('jaxsd.processes')      # jax is not imported only to fail
    return processes.end(error, trace) if processes else 1


def main(argv: list[str] | None = None) -> int:
    """Runs a verb. Returns the exit status: 0 only when the thing was done."""
    try:
        return _main(sys.argv[1:] if argv is None else list(argv))
    except Exception as e:      # a bug, and yet other processes must not wait for this one
        _end(e, traceback.format_exc())
        raise


def _main(argv: list[str]) -> int:
    _quiet()
    _before_jax()
    config, made_in = None, None
    try:
        rest, overrides = _split_overrides(argv)
        parser = _parser()
        args, odd = parser.parse_known_args(rest)
        if odd:
            parser.prog += f' {args.verb}'
            parser.error(f'unrecognized arguments: {" ".join(odd)}')
        if args.verb == 'plan':
            from jaxsd.plan import targets
            targets.prepare(map(targets.parse, args.topology))
            args.command = shlex.join(['python', '-m', 'jaxsd', *argv])
            config = [configs.overridden(configs.read(spec), overrides) for spec in args.config]
        elif args.verb == 'systems':
            if overrides:
                raise ConfigError('systems takes no --config overrides')
        elif args.verb == 'ablate':
            args.command = shlex.join(['python', '-m', 'jaxsd', *argv])
            config = overrides
        elif args.verb != 'report':
            if args.config is None:
                from jaxsd import run
                found = run.read_run(args.workdir)
                made_in = found.get('directory')
                config = configs.stored(found, os.path.join(args.workdir, 'config.json'))
            else:
                config = configs.read(args.config)
                args.made = configs.made_by(args.config, overrides)
            config = configs.overridden(config, overrides)
        elif overrides:
            raise ConfigError('report takes no --config overrides')
        VERBS[args.verb](args, config)
        return 0
    except (ValueError, OSError, RuntimeError) as e:    # ConfigError, CheckpointError, full disks
        if os.environ.get('JAXSD_TRACEBACK') == '1':
            raise
        reason = _foreign(e) + (' '.join(str(e).split()) or type(e).__name__)
        if isinstance(config, ConfigDict):
            reason += configs.sought(config, reason, made_in)
        print(f'jaxsd {argv[0] if argv else ""}: {reason[:2000]}', file=sys.stderr)
        return _end(e)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130

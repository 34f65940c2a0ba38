# SPDX-License-Identifier: Apache-2.0
"""What a compiled step moves, read from the text of its optimized HLO: memory and network.

XLA's own cost analysis sees a scanned layer once. Here the text is walked from its entry through
every computation that is called, and what lies in a loop counts as often as the loop runs.
"""

import math
import re
from typing import NamedTuple

import numpy as np

BITS = {'pred': 8, 'token': 0, 'opaque': 0}
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
               'collective-permute', 'collective-broadcast')
# On TPUs sums over slices go through the hosts: a program only sends its part and receives.
BETWEEN_SLICES = 'between-slices'
# What reads and writes no memory of its own: names, loops (their bodies are counted), hand-overs.
FREE = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional',
        'call', 'after-all', 'partition-id', 'replica-id', 'opt-barrier', 'add-dependency', 'iota')


class Collective(NamedTuple):
    """One collective of the program. bytes: of the whole array that is gathered or summed.

    times: how often a step runs it. group: the devices of the first group, by their place in the
    mesh. overlaps: whether the compiler starts it and works on before it needs the result.
    """

    kind: str
    bytes: int
    times: int
    group: tuple[int, ...]
    overlaps: bool

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device receives in a step, however the network routes them."""
        n = len(self.group)
        if self.kind in ('collective-permute', 'collective-broadcast'):
            return float(self.bytes * self.times)
        share = (n - 1) / n * (2 if self.kind in ('all-reduce', BETWEEN_SLICES) else 1)
        return share * self.bytes * self.times


class Traffic(NamedTuple):
    """Of one device in one step: collectives, and bytes that its memory reads and writes.

    multiplied: bytes of operations with a matrix product inside, which happen while it computes;
    other: bytes of all else, during which no product runs. loops_once: loops whose number of turns
    the text does not tell.
    """

    collectives: tuple[Collective, ...]
    multiplied_bytes: float
    other_bytes: float
    loops_once: int


class _Op(NamedTuple):
    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    rest: str           # attributes, after the operands
    line: str


_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$|^(ENTRY )?%?([\w.\-]+) \{$')
_NAMED = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(r'(?:calls|to_apply|body|condition|true_computation|false_computation|'
                     r'called_computations|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)')
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_OP = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$')


def _closing(text: str, at: int) -> int:
    """Where the bracket that opens at `at` is closed."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] in '([{') - (text[i] in ')]}')
        if not depth:
            return i
    return len(text) - 1


def _parse(line: str) -> _Op | None:
    """An instruction: `%name = type op(operands), attributes`; None for any other line."""
    found = _OP.match(line)
    if not found:
        return None
    name, right = found.groups()
    end = _closing(right, 0) + 1 if right.startswith('(') else right.find(' ')
    kind = re.match(r'\s*([\w\-]+)\(', right[end:])
    if end <= 0 or not kind:
        return None
    start = end + kind.end() - 1
    stop = _closing(right, start)
    inside = right[start + 1:stop]
    return _Op(name, right[:end], kind[1], tuple(_NAMED.findall(inside)) or tuple(
        x.strip() for x in inside.split(',') if x.strip()), right[stop + 1:], line)


def computations(text: str) -> tuple[dict[str, list[_Op]], str]:
    """({name: its instructions}, the entry). A computation ends where the next one begins: kernels
    embed text of many lines, some of which are a lone bracket."""
    out: dict[str, list[_Op]] = {}
    entry, now = '', None
    for line in text.splitlines():
        header = not line[:1].isspace() and _HEADER.match(line)
        if header and not line.startswith('HloModule'):
            name = header[2] or header[4]
            now = out.setdefault(name, [])
            entry = name if header[1] or header[3] else entry
        elif now is not None and (op := _parse(line)):
            now.append(op)
    if not entry:
        raise ValueError('the text is no HLO module: it has no ENTRY computation')
    return out, entry


def _width(dtype: str) -> int:
    """Bits of an element of `dtype` ('bf16', 'f8e4m3fn', 's32', ...)."""
    if dtype in BITS:
        return BITS[dtype]
    digits = re.search(r'\d+', dtype)
    return int(digits[0]) if digits else 0


def size(type_text: str, memory_only: bool = False) -> int:
    """Bytes of a type, a tuple's parts added up. memory_only: not those that the compiler placed in
    another memory than the device's large one, such as S(1) for the vector memory of a TPU."""
    total = 0
    for dtype, dims, layout in _ARRAY.findall(type_text):
        if memory_only and re.search(r'S\([1-9]', layout):
            continue
        bits = re.search(r'E\((\d+)\)', layout)
        total += (math.prod(map(int, filter(None, dims.split(','))))
                  * (int(bits[1]) if bits else _width(dtype)) + 7) // 8
    return total


def groups(text: str, devices: int) -> tuple[int, ...]:
    """The first group of the `replica_groups` (or pairs) of an instruction's attributes."""
    if pairs := re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', text):
        return int(pairs[1]), int(pairs[2])
    iota = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
    if iota:
        shape, dims = (tuple(map(int, x.split(','))) for x in iota.groups()[:2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            ids = ids.transpose(tuple(map(int, iota[3].split(','))))
        return tuple(int(i) for i in ids.reshape(-1, shape[-1])[0])
    mesh = re.search(r"replica_groups=@?\w*\[((?:'?\w+'?=\d+,? ?)+)\](?:, device_ids=\([^)]*\))? "
                     r"?\{([^}]*)\}", text)
    if mesh:
        sizes = {k.strip("' "): int(n) for k, n in
                 (part.split('=') for part in mesh[1].split(','))}
        axes = [a.strip("' ") for a in mesh[2].split(',')]
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        first = tuple(slice(None) if a in axes else 0 for a in sizes)
        return tuple(int(i) for i in ids[first].reshape(-1))
    if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', text):
        return tuple(map(int, listed[1].split(',')))
    return tuple(range(devices))


def _trips(op: _Op, comps: dict[str, list[_Op]]) -> int | None:
    """How often a while loop runs: as the text says, or else the largest number that its condition
    compares with; None where it compares with none."""
    if known := re.search(r'known_trip_count[^\d}]*(\d+)', op.rest):
        return int(known[1])
    seen, todo, most = set(), re.findall(r'condition=%?([\w.\-]+)', op.rest), None
    while todo:
        name = todo.pop()
        if name in seen or name not in comps:
            continue
        seen.add(name)
        for inner in comps[name]:
            if inner.op == 'constant' and re.match(r'\s*[su]32\[\]', inner.type):
                value = re.search(r'constant\((-?\d+)\)', inner.line)
                most = max(most or 0, int(value[1])) if value else most
            todo += _called(inner)
    return most if most else None


def _called(op: _Op) -> list[str]:
    """Names of the computations that an instruction calls."""
    return [name for group in _CALLED.findall(op.rest)
            for name in re.findall(r'[\w.\-]+', group)]


def _fused_bytes(op: _Op, inner: list[_Op], types: dict[str, str]) -> int:
    """Bytes a fusion reads and writes: of an array that it only cuts slices from, or writes a slice
    into, the slices."""
    users: dict[str, list[_Op]] = {}
    by_name = {x.name: x for x in inner}
    for x in inner:
        for operand in x.operands:
            users.setdefault(operand, []).append(x)

    def uses(name):
        for x in users.get(name, ()):
            if x.op == 'bitcast':
                yield from uses(x.name)
            else:
                yield name, x
    total = 0
    for x in inner:
        if x.op != 'parameter':
            continue
        number = int(re.search(r'parameter\((\d+)\)', x.line)[1])
        if number >= len(op.operands):
            continue
        whole = size(types.get(op.operands[number], ''), memory_only=True)
        found = list(uses(x.name))
        if whole and found and all(u.op in ('dynamic-slice', 'gather') and u.operands[0] == at
                                   for at, u in found):
            whole = min(whole, sum(size(u.type) for _, u in found))
        elif whole and found and all(u.op == 'dynamic-update-slice' and u.operands[0] == at
                                     for at, u in found):
            whole = 0
        total += whole
    root = next((x for x in inner if x.line.lstrip().startswith('ROOT')), None)
    parts = [root] if root and root.op != 'tuple' else [
        by_name[n] for n in (root.operands if root else ()) if n in by_name]
    written = 0
    for part in parts:
        while part.op == 'bitcast' and part.operands[0] in by_name:
            part = by_name[part.operands[0]]
        update = by_name.get(part.operands[1]) if part.op == 'dynamic-update-slice' else None
        written += size(update.type if update else part.type, memory_only=not update)
    return total + min(written, size(op.type, memory_only=True))


def read(text: str, devices: int) -> Traffic:
    """The traffic of a compiled step from `compiled.as_text()`, run on `devices` of them."""
    comps, entry = computations(text)
    types = {op.name: op.type for ops in comps.values() for op in ops}
    multiplies: dict[str, bool] = {}

    def has_product(name: str) -> bool:
        if name not in multiplies:
            multiplies[name] = False
            multiplies[name] = any(
                op.op in ('dot', 'convolution') or any(map(has_product, _called(op)))
                for op in comps.get(name, ()))
        return multiplies[name]

    found: dict[object, Collective] = {}
    bytes_of = {True: 0.0, False: 0.0}
    unknown = set()

    def memory(op: _Op, called: list[str]) -> int:
        if op.op == 'fusion':
            return _fused_bytes(op, comps.get(called[0], []) if called else [], types)
        operands = [size(types.get(n, ''), memory_only=True) for n in op.operands]
        written = size(op.type, memory_only=True)
        if op.op in ('dynamic-slice', 'gather', 'slice'):
            return 2 * written
        if op.op == 'dynamic-update-slice':
            return 2 * size(types.get(op.operands[1], ''))
        return sum(operands) + written

    def walk(name: str, times: int, counted: bool, via: str = '') -> None:
        for nth, op in enumerate(comps.get(name, ())):
            if op.op == 'recv' and 'megascale' in op.rest:
                _received(op, comps[name][nth + 1:], times)
            called = _called(op)
            kind, _, ending = op.op.rpartition('-')
            base = kind if ending in ('start', 'done') else op.op
            if base in COLLECTIVES:
                if ending != 'done':
                    _note(op, base, ending == 'start', f'{via} {name}', times)
                continue
            if op.op == 'while':
                turns = _trips(op, comps)
                if turns is None:
                    unknown.add(op.name)
                for inner in called:
                    walk(inner, times * (turns or 1), counted)
                continue
            inside = op.op in ('call', 'conditional') or op.op.startswith('async')
            if counted and op.op not in FREE and not inside and ending not in ('start', 'done'):
                product = (op.op in ('dot', 'convolution') or any(map(has_product, called))
                           or ('custom_call_target' in op.rest and re.search(
                               r'custom_call_target="[^"]*(gemm|matmul|conv|cudnn|tpu_custom_call)',
                               op.rest) is not None))
                bytes_of[product] += times * memory(op, called)
            for inner in called:
                walk(inner, times, counted and inside, op.name)

    def _received(op: _Op, after: list[_Op], times: int) -> None:
        ids = re.search(r'_xla_megascale_target="\{([\d,]+)\}', op.rest)
        slices = len(ids[1].split(',')) if ids else 2
        waits = next((n for n, x in enumerate(after)
                      if x.op == 'recv-done' and op.name in x.operands), 0)
        busy = any(x.op in ('fusion', 'dot', 'convolution', 'custom-call', 'while')
                   for x in after[:waits])
        array = _ARRAY.match(op.type.lstrip('('))
        found[op.name] = Collective(BETWEEN_SLICES, size(array[0]), times,
                                    tuple(range(0, devices, devices // slices)), busy)

    def _note(op: _Op, kind: str, overlaps: bool, where: str, times: int) -> None:
        out, read_ = size(op.type), sum(size(types.get(n, '')) for n in op.operands)
        # Fused into a sum and a slice of it: each device keeps its part alone.
        if kind == 'all-reduce' and 'all-reduce-scatter' in where:
            kind = 'reduce-scatter'
            whole = read_
        elif kind == 'all-gather':          # the result of a start is (operands, results)
            whole = out - read_ if overlaps and op.type.startswith('(') else out
        else:
            whole = read_
        channel = re.search(r'channel_id=(\d+)', op.rest)
        key = int(channel[1]) if channel else op.name
        overlaps |= bool(re.search(r'async', where))
        one = Collective(kind, whole, times, groups(op.rest, devices), overlaps)
        before = found.get(key)
        if before is None or before.times < times or (
                before.times == times and before.kind == 'all-reduce' != kind):
            found[key] = one._replace(overlaps=overlaps or bool(before and before.overlaps))
        elif overlaps:
            found[key] = before._replace(overlaps=True)

    walk(entry, 1, True)
    alone = tuple(c for c in found.values() if len(c.group) > 1)
    return Traffic(alone, bytes_of[True], bytes_of[False], len(unknown))

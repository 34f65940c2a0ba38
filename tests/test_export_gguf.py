# SPDX-License-Identifier: Apache-2.0
"""Does a GGUF file say what the released implementation says, read by llama.cpp's conventions?

The forward pass below is written from llama.cpp (src/llama-model.cpp, src/llama-graph.cpp): 'llama'
rotates neighboring pairs, 'qwen2' and 'qwen3' halves; matrices are [out, in]; a missing output is
the table; `rope_freqs` divides frequencies; the weights of the experts that are used sum to one. It
reads nothing but the file.
"""

import functools
import heapq
import json
import re
import shutil
import unicodedata

import gguf
import numpy as np
import pytest
import released
import sentencepiece
import small

from jaxsd import export, model
from jaxsd.config import ConfigError, fingerprint

REQUIRED = ('{}.context_length', '{}.embedding_length', '{}.block_count', '{}.feed_forward_length',
            '{}.attention.head_count', '{}.attention.layer_norm_rms_epsilon')


def read(path):
    """({key: value}, {name: float32 array}) of a GGUF file."""
    file = gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in file.fields.items()}
    return fields, {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1])
                    for t in file.tensors}


def forward(fields, weights, tokens):
    """Logits [B, T, V] of tokens [B, T], float64, as llama.cpp computes them."""
    arch = fields['general.architecture']
    for key in REQUIRED:
        assert key.format(arch) in fields, key
    get = {k.removeprefix(f'{arch}.'): v for k, v in fields.items()}
    N, G = get['attention.head_count'], get['attention.head_count_kv']
    H, eps = get['rope.dimension_count'], get['attention.layer_norm_rms_epsilon']
    assert H == get['attention.key_length'] == get['attention.value_length']
    B, T = tokens.shape
    w = {k: v.astype(np.float64) for k, v in weights.items()}
    slow = w.get('rope_freqs.weight', 1.) * get.get('rope.scaling.factor', 1.)
    assert get.get('rope.scaling.type', 'linear') == 'linear'
    angle = np.arange(T)[:, None] * get['rope.freq_base'] ** (-np.arange(0, H, 2) / H) / slow
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[name]

    def linear(x, name):
        return x @ w[f'{name}.weight'].T + w.get(f'{name}.bias', 0.)

    def rope(x):
        first, second = ((slice(0, None, 2), slice(1, None, 2)) if arch == 'llama' else
                         (slice(0, H // 2), slice(H // 2, None)))
        out = np.empty_like(x)
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
        return out

    def heads(x, name, count):
        x = linear(x, name).reshape(B, T, count, H)
        return norm(x, f'{name}_norm.weight') if f'{name}_norm.weight' in w else x

    def silu(x):
        return x / (1 + np.exp(-x))

    def experts(y, at):
        E, used = get['expert_count'], get['expert_used_count']
        p = np.exp(linear(y, at + 'ffn_gate_inp'))
        p = p / p.sum(-1, keepdims=True)
        least = np.sort(p, -1)[..., E - used, None]
        p = np.where(p >= least, p, 0)
        gate, up = (np.einsum('btd,efd->btef', y, w[f'{at}ffn_{n}_exps.weight'])
                    for n in ('gate', 'up'))
        out = np.einsum('btef,edf->bted', silu(gate) * up, w[at + 'ffn_down_exps.weight'])
        return ((p / p.sum(-1, keepdims=True))[..., None] * out).sum(2)

    x = w['token_embd.weight'][tokens]
    for i in range(get['block_count']):
        at = f'blk.{i}.'
        y = norm(x, at + 'attn_norm.weight')
        q = rope(heads(y, at + 'attn_q', N))
        k = rope(heads(y, at + 'attn_k', G)).repeat(N // G, 2)
        v = linear(y, at + 'attn_v').reshape(B, T, G, H).repeat(N // G, 2)
        s = np.einsum('btnh,bcnh->bntc', q, k) / np.sqrt(H)
        s = np.exp(np.where(np.tri(T, dtype=bool), s, -np.inf))
        o = np.einsum('bntc,bcnh->btnh', s / s.sum(-1, keepdims=True), v).reshape(B, T, N * H)
        x = x + linear(o, at + 'attn_output')
        y = norm(x, at + 'ffn_norm.weight')
        x = x + (experts(y, at) if 'expert_count' in get else linear(
            silu(linear(y, at + 'ffn_gate')) * linear(y, at + 'ffn_up'), at + 'ffn_down'))
    x = norm(x, 'output_norm.weight')
    return x @ w.get('output.weight', w['token_embd.weight']).T


@pytest.mark.parametrize('name, arch', [('llama', 'llama'), ('mistral', 'llama'),
                                        ('llama3', 'llama'), ('mixtral', 'llama'),
                                        ('qwen2', 'qwen2'), ('qwen3', 'qwen3')])
def test_the_peer_s_logits(name, arch, tmp_path):
    """What a released implementation computed in float32, from a file made of its own weights."""
    golden = np.load(released.GOLDEN / name / 'arrays.npz')
    config = released.decoder(name)
    params = export.import_params(config, str(released.GOLDEN / name), 'hf')
    export.save(config, params, str(tmp_path / 'out'), 'gguf', dtype='f32')
    fields, weights = read(tmp_path / 'out' / 'model-f32.gguf')
    assert (fields['general.architecture'], fields['general.file_type']) == (arch, 0)
    assert (fields['tokenizer.ggml.model'], fields[f'{arch}.vocab_size']) == ('none', 96)
    assert fingerprint(config) in fields['general.description']
    context = fields[f'{arch}.context_length']      # llama.cpp knows no window for this family
    assert context == (5 if name == 'mistral' else 128)
    tokens, logits = golden['tokens'][:, :context], golden['logits'][:, :context]
    assert logits.std() > .5
    np.testing.assert_allclose(forward(fields, weights, tokens), logits, atol=5e-5)
    kinds = gguf.MODEL_TENSORS[next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)]
    legal = {gguf.TENSOR_NAMES[kind] for kind in kinds}     # what llama.cpp looks for
    assert {re.sub(r'blk\.\d+', 'blk.{bid}', k).rpartition('.')[0] for k in weights} <= legal


@pytest.mark.parametrize('name', ['llama', 'qwen3', 'mixtral'])
def test_slow_rotary_positions(name, tmp_path):
    """One factor for all pairs is metadata; against our model, which the released one proves."""
    config = released.decoder(name, rope_scaling=dict(name='linear', factor=3.0))
    params = released.random_params(config, 6)
    export.save(config, params, str(tmp_path / 'out'), 'gguf', dtype='f32')
    fields, weights = read(tmp_path / 'out' / 'model-f32.gguf')
    assert 'rope_freqs.weight' not in weights
    tokens = np.random.default_rng(7).integers(0, 96, (2, 20))
    ours, = released.scores(config, params, tokens[:, None])
    np.testing.assert_allclose(forward(fields, weights, tokens), ours, atol=5e-5)


def test_experts_in_smaller_numbers(tmp_path):
    """The choice of experts hangs on small differences: the router stays whole, all else does not.
    """
    config = released.decoder('mixtral', mlp=64)
    export.save(config, released.random_params(config, 8), str(tmp_path / 'out'), 'gguf',
                dtype='q8_0')
    tensors = gguf.GGUFReader(tmp_path / 'out' / 'model-q8_0.gguf').tensors
    kinds = {re.sub(r'blk\.\d+\.', '', t.name): (t.tensor_type.name, tuple(t.shape.tolist()))
             for t in tensors}
    assert kinds['ffn_gate_inp.weight'] == ('F32', (32, 5))
    assert kinds['ffn_up_exps.weight'] == kinds['ffn_gate_exps.weight'] == ('Q8_0', (32, 64, 5))
    assert kinds['ffn_down_exps.weight'] == ('Q8_0', (64, 32, 5))


@pytest.mark.parametrize('kind, changes', [('llama', {}), ('qwen2', dict(head_dim=8))])
def test_interleaved_pairs(kind, changes, tmp_path):
    """Our other order of rotary pairs, against the half order that the test above proves."""
    half = released.decoder(kind, **changes)
    config = released.decoder(kind, pairs='interleaved', **changes)
    params = released.random_params(config, 2)
    turned = ('backbone/blocks/q', 'backbone/blocks/k')
    same = export.unflatten({
        path: np.concatenate([x[..., 0::2], x[..., 1::2]], -1) if path.startswith(turned) else x
        for path, x in export.flatten(params).items()})
    made = []
    for i, (c, p) in enumerate(((config, params), (half, same))):
        export.save(c, p, str(tmp_path / str(i)), 'gguf', dtype='f32')
        made.append(read(tmp_path / str(i) / 'model-f32.gguf')[1])
    for name, x in made[0].items():
        np.testing.assert_array_equal(x, made[1][name], err_msg=name)


@pytest.mark.parametrize('dtype, file_type', [('f16', 1), ('q8_0', 7)])
def test_smaller_numbers(dtype, file_type, tmp_path):
    """Every matrix is as near as its format allows; norms and biases stay whole."""
    config = released.decoder('qwen2')
    params = released.random_params(config, 4)
    whole = export.save(config, params, str(tmp_path / 'f32'), 'gguf', dtype='f32')
    made = export.save(config, params, str(tmp_path / dtype), 'gguf', dtype=dtype)
    assert made['bytes'] < whole['bytes'] * (.55 if dtype == 'f16' else .4)
    exact = read(tmp_path / 'f32' / 'model-f32.gguf')[1]
    fields, near = read(tmp_path / dtype / f'model-{dtype}.gguf')
    assert fields['general.file_type'] == file_type and set(near) == set(exact)
    kinds = {t.name: t.tensor_type.name for t in
             gguf.GGUFReader(tmp_path / dtype / f'model-{dtype}.gguf').tensors}
    for name, x in exact.items():
        if x.ndim == 1:
            assert kinds[name] == 'F32'
            np.testing.assert_array_equal(near[name], x)
        elif dtype == 'f16' or name.endswith('ffn_down.weight'):    # 80 is not divisible by 32
            assert kinds[name] == 'F16'
            np.testing.assert_array_equal(near[name], x.astype(np.float16).astype(np.float32))
        else:
            assert kinds[name] == 'Q8_0'
            blocks = x.reshape(-1, 32)
            step = abs(blocks).max(-1, keepdims=True) / 127
            assert (abs(near[name].reshape(-1, 32) - blocks) <= step * .56).all()
    tokens = np.random.default_rng(5).integers(0, 96, (2, 20))
    whole = forward(fields, exact, tokens)
    off = forward(fields, near, tokens) - whole
    assert off.std() < whole.std() * (2e-3 if dtype == 'f16' else .05)


def spm(fields, text: str) -> list[int]:
    """llama.cpp's 'llama' tokenizer (llm_tokenizer_spm): the best-scored neighbors join first."""
    pieces = fields['tokenizer.ggml.tokens']
    scores = fields['tokenizer.ggml.scores']
    ids = {t: i for i, t in enumerate(pieces)}
    text = '\u2581' * fields['tokenizer.ggml.add_space_prefix'] + text.replace(' ', '\u2581')
    symbols, follow = list(text), list(range(1, len(text) + 1))
    before, queue = list(range(-1, len(text) - 1)), []

    def offer(left, right):
        if left >= 0 and right < len(symbols) and (both := symbols[left] + symbols[right]) in ids:
            heapq.heappush(queue, (-scores[ids[both]], left, right, both))
    for i in range(len(symbols) - 1):
        offer(i, i + 1)
    while queue:
        _, left, right, both = heapq.heappop(queue)
        if symbols[left] and symbols[right] and symbols[left] + symbols[right] == both:
            symbols[left], symbols[right] = both, ''
            follow[left] = follow[right]
            if follow[left] < len(symbols):
                before[follow[left]] = left
            offer(before[left], left)
            offer(left, follow[left])
    return [i for s in symbols if s for i in
            ([ids[s]] if s in ids else [ids[f'<0x{b:02X}>'] for b in s.encode()])]


def with_chat(tmp_path):
    """A checkpoint as fine-tuned Llamas come: a sentencepiece model of 400 pieces, added tokens."""
    config, path = released.decoder('llama'), small.text_model(tmp_path, 'bpe')
    config.codec = dict(name='none', frame_hz=0.0, codebooks=1, size=0)
    config.layout = dict(name='flat.sequence', fields=('text',))
    config.vocab = dict(name='line', text_tokens=403, markers=(), multiple=1, eos=401)
    export.save(config, released.random_params(config, 1), str(tmp_path / 'in'), 'hf')
    (tmp_path / 'in' / 'vocabulary.json').unlink()
    shutil.copy(path, tmp_path / 'in' / 'tokenizer.model')
    told = {'tokenizer_config.json': dict(
        add_bos_token=False, chat_template='{{ messages }}', eos_token='<|im_end|>',
        added_tokens_decoder={'401': dict(content='<|im_end|>', special=True)}),
        'added_tokens.json': {'<|im_start|>': 400, '<|im_end|>': 401}}
    for name, said in told.items():
        (tmp_path / 'in' / name).write_text(json.dumps(said))
    return tmp_path / 'in'


def test_tokens_that_were_added_to_a_sentencepiece_model(tmp_path):
    """They are written in files beside it; what ends a turn must not be lost."""
    folder = with_chat(tmp_path)
    lm = export.load(str(folder))
    lm.save(str(tmp_path / 'out'), 'gguf')
    fields, _ = read(tmp_path / 'out' / 'model-f16.gguf')
    said = {k.removeprefix('tokenizer.'): v for k, v in fields.items()}
    assert said['ggml.tokens'][400:] == ['<|im_start|>', '<|im_end|>', '[unused402]']
    assert said['ggml.token_type'][400:] == [4, 3, 5] and said['ggml.eos_token_id'] == 401
    assert said['chat_template'] == '{{ messages }}' and said['ggml.add_bos_token'] is False
    lm.save(str(tmp_path / 'hf'))
    for name in ('tokenizer.model', 'tokenizer_config.json', 'added_tokens.json'):
        assert (tmp_path / 'hf' / name).read_bytes() == (folder / name).read_bytes()
    for damaged, match in (('{"a": "b"}', 'added_tokens.json: added tokens cannot be read'),
                           ('{"a": 400, "</s>": 402}', "'</s>' is written for several ids")):
        (folder / 'added_tokens.json').write_text(damaged)
        with pytest.raises(ConfigError, match=match) as e:
            lm.save(str(tmp_path / 'no'), 'gguf')
        assert '\n' not in str(e.value) and not (tmp_path / 'no').exists()


def test_tokenizer(tmp_path):
    """Every id's token, score and kind, and text cut by llama.cpp's algorithm as we cut it."""
    config = released.decoder('llama')
    path = small.text_model(tmp_path, 'bpe', normalization_rule_name='identity')
    config.vocab = dict(name='line', text_tokens=400, tokenizer=path, unit='<{}>', multiple=64)
    vocab = model.make_vocab(config)
    export.save(config, released.random_params(config, 1), str(tmp_path / 'out'), 'gguf')
    with pytest.raises(ValueError, match='out is an export in the format gguf, for other programs: '
                       'what can be read back is hf, kyutai, kyutai-hf$'):
        export.load(str(tmp_path / 'out'))
    fields, weights = read(tmp_path / 'out' / 'model-f16.gguf')
    assert fields['tokenizer.ggml.model'] == 'llama'
    pieces, kinds = fields['tokenizer.ggml.tokens'], fields['tokenizer.ggml.token_type']
    assert len(pieces) == len(set(pieces)) == len(kinds) == vocab.size == 448
    assert weights['token_embd.weight'].shape[0] == vocab.size
    theirs = sentencepiece.SentencePieceProcessor(model_file=path)
    for i in range(theirs.get_piece_size()):
        assert pieces[i] == theirs.id_to_piece(i)
        assert fields['tokenizer.ggml.scores'][i] == theirs.get_score(i)
        assert kinds[i] == (2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else
                            6 if theirs.is_byte(i) else 1)
    assert pieces[399:404] == ['[unused399]', '[Text]', '[Speech]', '<0>', '<1>']
    assert kinds[399:404] == [5, 3, 3, 4, 4] and pieces[435] == '<33>' and kinds[436:] == [5] * 12
    assert [fields[f'tokenizer.ggml.{k}'] for k in (
        'bos_token_id', 'eos_token_id', 'unknown_token_id', 'add_bos_token', 'add_eos_token',
    )] == [1, 2, 4, True, False]
    for text in (*small.SENTENCES, *small.NONSENSE, 'unseen wörds zzz', 'a'):
        assert spm(fields, text) == theirs.encode(text), text
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert 'llama-cli -m model-f16.gguf' in card and '`<0>`' in card


def test_unigram_tokenizer(tmp_path):
    config = released.decoder('llama')
    path = small.text_model(tmp_path, 'unigram')
    config.vocab = dict(name='line', text_tokens=400, tokenizer=path)
    export.save(config, released.random_params(config, 1), str(tmp_path / 'out'), 'gguf')
    fields, _ = read(tmp_path / 'out' / 'model-f16.gguf')
    assert fields['tokenizer.ggml.model'] == 't5'
    assert fields['tokenizer.ggml.remove_extra_whitespaces'] is True
    assert len(fields['tokenizer.ggml.precompiled_charsmap']) > 1000


@functools.cache
def letters(kind: str) -> str:
    """The characters of a Unicode category as a class for `re`, without its brackets."""
    found = [c for c in range(0x20000) if unicodedata.category(chr(c))[0] == kind]
    ends = [i for i, c in enumerate(found) if i + 1 == len(found) or found[i + 1] != c + 1]
    starts = [0, *(i + 1 for i in ends[:-1])]
    return ''.join(f'\\U{found[a]:08x}-\\U{found[b]:08x}'
                   for a, b in zip(starts, ends, strict=True))


def bytes_as_letters() -> dict[int, str]:
    """How byte-level BPE writes a byte: itself where it shows, else the next letter past 255."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def gpt2(fields, text: str) -> list[int]:
    """llama.cpp's 'gpt2' tokenizer (llm_tokenizer_bpe): special tokens, then words, then pairs."""
    tokens, kinds = fields['tokenizer.ggml.tokens'], fields['tokenizer.ggml.token_type']
    ids, pre = {t: i for i, t in enumerate(tokens)}, fields['tokenizer.ggml.pre']
    ranks = {}
    for i, pair in enumerate(fields['tokenizer.ggml.merges']):
        ranks.setdefault((pair[:pair.index(' ', 1)], pair[pair.index(' ', 1) + 1:]), i)
    L, N, digits = letters('L'), letters('N'), {'llama-bpe': '{1,3}', 'qwen2': ''}[pre]
    pattern = (rf"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n{L}{N}]?[{L}]+"
               rf'|[{N}]{digits}| ?[^\s{L}{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')
    special = sorted((t for t, k in zip(tokens, kinds, strict=True) if k in (3, 4)), key=len)
    out, letter = [], bytes_as_letters()
    for part in re.split('(' + '|'.join(map(re.escape, special[::-1])) + ')', text):
        if part in special:
            out.append(ids[part])
            continue
        for word in re.findall(pattern, part):
            word = ''.join(letter[b] for b in word.encode())
            symbols = [word] if pre == 'llama-bpe' and word in ids else list(word)
            while pairs := [(ranks[p], i) for i, p in enumerate(zip(symbols, symbols[1:],
                                                                    strict=False)) if p in ranks]:
                i = min(pairs)[1]
                symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
            out += [ids[s] for s in symbols]
    if fields['tokenizer.ggml.add_bos_token']:
        out.insert(0, fields['tokenizer.ggml.bos_token_id'])
    return out


def with_tokenizer(folder, kind: str, golden: str, **stated):
    """A checkpoint of 380 ids, and the byte-level tokenizer of 371 that lies with the goldens."""
    config = released.decoder(kind)
    config.vocab = dict(name='line', text_tokens=344, multiple=1)
    export.save(config, released.random_params(config, 1), str(folder), 'hf')
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        shutil.copyfile(released.GOLDEN / 'byte_level' / golden / name, folder / name)
    (folder / 'vocabulary.json').unlink()
    for name in ('config.json', 'generation_config.json'):
        said = json.loads((folder / name).read_text())
        said = {k: v for k, v in said.items() if k not in ('bos_token_id', 'eos_token_id')} | stated
        (folder / name).write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize('kind, golden, pre', [('llama', 'three_digits', 'llama-bpe'),
                                               ('qwen2', 'one_digit', 'qwen2'),
                                               ('qwen3', 'one_digit', 'qwen2')])
def test_byte_level_tokenizer(kind, golden, pre, tmp_path):
    """What comes with a checkpoint goes into the file, and cuts text as `tokenizers` cut it."""
    source = with_tokenizer(tmp_path / 'in', kind, golden)
    lm = export.load(str(source))
    lm.save(str(tmp_path / 'out'), 'gguf', dtype='f32')
    fields, weights = read(tmp_path / 'out' / 'model-f32.gguf')
    get = {k.removeprefix('tokenizer.ggml.'): v for k, v in fields.items()}
    assert (get['model'], get['pre']) == ('gpt2', pre)
    tokens, kinds = get['tokens'], get['token_type']
    assert len(tokens) == len(set(tokens)) == len(kinds) == len(weights['token_embd.weight']) == 380
    said = json.loads((source / 'tokenizer.json').read_text())
    assert [tokens[i] for i in said['model']['vocab'].values()] == [*said['model']['vocab']]
    assert get['merges'] == [' '.join(m) for m in said['model']['merges']]
    assert tokens[359:373] == [tokens[359], '<|start|>', '<|end|>', *(
        f'<|unit_{i}|>' for i in range(9)), '[PAD371]', '[PAD372]']
    assert kinds == [1] * 360 + [3] * 2 + [4] * 9 + [5] * 9
    assert (get['eos_token_id'], get['add_eos_token']) == (361, False)
    assert (get.get('bos_token_id'), get['add_bos_token']) == (
        (360, True) if pre == 'llama-bpe' else (None, False))
    assert fields['tokenizer.chat_template'] == '{{ messages[0].content }}<|end|>'
    known = json.loads((released.GOLDEN / 'byte_level' / golden / 'ids.json').read_text())
    assert len(known) > 12
    for text, ids in known:
        assert gpt2(fields, text) == ids, text
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert 'that of the checkpoint' in card and ('(NFC)' in card) == (pre == 'qwen2')
    lm.config.vocab = dict(lm.config.vocab.to_dict(), text_tokens=370, markers=('[Text]',),
                           multiple=380)    # another vocabulary now
    lm.save(str(tmp_path / 'two'), 'gguf', dtype='f32')
    assert read(tmp_path / 'two' / 'model-f32.gguf')[0]['tokenizer.ggml.model'] == 'none'


def test_ids_that_only_the_model_states(tmp_path):
    """A tokenizer without a config of its own: bos and eos are what config.json says."""
    source = with_tokenizer(tmp_path / 'in', 'llama', 'three_digits', bos_token_id=360,
                            eos_token_id=[361, 5])
    (source / 'tokenizer_config.json').unlink()
    export.load(str(source)).save(str(tmp_path / 'out'), 'gguf', dtype='f32')
    fields, _ = read(tmp_path / 'out' / 'model-f32.gguf')
    assert [fields[f'tokenizer.ggml.{k}'] for k in (
        'bos_token_id', 'eos_token_id', 'add_bos_token', 'add_eos_token'
    )] == [360, 361, True, False]


def test_byte_level_tokenizers_of_other_kinds(tmp_path):
    """One line that names the file and what llama.cpp would do otherwise; nothing written."""
    lm = export.load(str(with_tokenizer(tmp_path / 'in', 'llama', 'three_digits')))
    path = tmp_path / 'in' / 'tokenizer.json'
    sound = path.read_text()

    def refused(match, change=None, text=None):
        said = json.loads(sound)
        if change:
            change(said)
        path.write_text(text or json.dumps(said))
        with pytest.raises(ValueError, match=match) as e:
            lm.save(str(tmp_path / 'out'), 'gguf')
        assert '\n' not in str(e.value) and str(path) in str(e.value)
        assert not (tmp_path / 'out').exists()

    def cut(said):
        return said['pre_tokenizer']['pretokenizers'][0]
    refused(r"pre-tokenizer .*N\}\{1,2\}.*ignore_merges True", lambda s: cut(s)['pattern'].update(
        Regex=cut(s)['pattern']['Regex'].replace('{1,3}', '{1,2}')))
    refused("pre-tokenizer 'Sequence'", lambda s: cut(s).update(behavior='Removed'))
    refused("pre-tokenizer 'Sequence'", lambda s: s['pre_tokenizer']['pretokenizers'][1].update(
        add_prefix_space=True))
    refused("pre-tokenizer 'Whitespace'", lambda s: s.update(pre_tokenizer={'type': 'Whitespace'}))
    refused('the one of ByteLevel.* and ignore_merges True', lambda s: s.update(
        pre_tokenizer=dict(type='ByteLevel', add_prefix_space=False)))
    refused('model BPE with byte_fallback', lambda s: s['model'].update(byte_fallback=True))
    refused('model Unigram', lambda s: s['model'].update(type='Unigram'))
    refused('unk_token', lambda s: s['model'].update(unk_token='a'))
    refused('normalizer Lowercase', lambda s: s.update(normalizer={'type': 'Lowercase'}))
    refused('no merges', lambda s: s['model'].update(merges=[]))
    refused("'more' has id 380", lambda s: s['model']['vocab'].update(more=380))
    refused("'more' has id 7", lambda s: s['model']['vocab'].update(more=7))
    refused("'a' is written for several", lambda s: s['added_tokens'].append(
        dict(id=379, content='a', special=False)))
    refused('taking the spaces around it', lambda s: s['added_tokens'][0].update(lstrip=True))
    refused('not a tokenizer.json of byte-level BPE .KeyError', lambda s: s.pop('model'))
    refused('not a tokenizer.json of byte-level BPE .AttributeError',
            lambda s: s['model'].update(vocab=[1]))
    refused('is damaged', lambda s: s['model'].update(merges=[['a', 1]]))
    refused('cannot be read as JSON', text='{')
    beside = tmp_path / 'in' / 'tokenizer_config.json'
    beside.write_text('{}')
    refused('begins or ends with bos')
    beside.write_text('{"chat_template": [1]}')
    refused('is damaged')


def test_refused(tmp_path):
    config = released.decoder('llama')
    params = released.random_params(config, 1)
    with pytest.raises(ConfigError, match="^dtype has no option 'f8'"):
        export.save(config, params, str(tmp_path / 'out'), 'gguf', dtype='f8')
    with pytest.raises(ConfigError, match="head.name is .*; format 'gguf' can only say"):
        config = released.multistream()
        export.save(config, released.random_params(config, 1), str(tmp_path / 'out'), 'gguf')
    for name, match in (('helium', 'this config is a helium'), ('qwen3', 'only for llama')):
        config = released.decoder(name, rope_scaling=released.decoder('llama3').backbone[
            'rope_scaling'].to_dict())
        with pytest.raises(ConfigError, match=match):
            export.save(config, released.random_params(config, 1), str(tmp_path / 'out'), 'gguf')
    assert not list(tmp_path.iterdir())

# SPDX-License-Identifier: Apache-2.0
"""What other programs make of the files beside the weights: tokenizers and adapters."""

import json

import numpy as np
import pytest
import released
import sentencepiece
import small
from test_export_gguf import read

from jaxsd import export, model

pytestmark = pytest.mark.peers


@pytest.mark.parametrize('algorithm', ['bpe', 'unigram'])
@pytest.mark.parametrize('rule', ['identity', 'nmt_nfkc'])
def test_tokenizer(algorithm, rule, tmp_path):
    """Loaded by transformers: our ids for text, markers and units, in both directions."""
    import transformers
    path = small.text_model(tmp_path, algorithm, normalization_rule_name=rule)
    config = released.decoder('llama')
    config.vocab = dict(name='line', text_tokens=400, tokenizer=path, unit='<|unit{}|>',
                        markers=('[Text]', '[Speech]', '[ASR]'))
    vocab = model.make_vocab(config)
    export.save(config, released.random_params(config, 1), str(tmp_path / 'out'), 'hf')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    ours = sentencepiece.SentencePieceProcessor(model_file=path)
    for name, i in vocab.specials.items():
        written = {'bos': '<s>', 'eos': '</s>'}.get(name, name)
        assert theirs.convert_tokens_to_ids(written) == i
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    units = vocab.encode('units', np.arange(34))
    assert theirs.convert_tokens_to_ids([f'<|unit{i}|>' for i in range(34)]) == units.tolist()
    assert len(theirs) == 400 + 3 + 34 <= vocab.size
    for text in (*small.SENTENCES, *small.NONSENSE, 'the  shells   sang', ' unseen wörds zzz ',
                 'ﬁne ½', '日本語 \U0001f600'):
        assert theirs(text).input_ids == [1, *ours.encode(text)], text
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text)), text
    mixed = '[Text] the cat [Speech]<|unit3|><|unit33|>[Text]sat on'
    assert theirs(mixed).input_ids == [
        1, vocab.specials['[Text]'], *ours.encode('the cat'), vocab.specials['[Speech]'],
        *units[[3, 33]].tolist(), vocab.specials['[Text]'], *ours.encode('sat on')]
    shown = theirs.decode(theirs(mixed).input_ids, skip_special_tokens=True)
    assert '<|unit3|>' in shown and '[Speech]' not in shown


@pytest.mark.parametrize('name, changes', [('llama', dict(pairs='interleaved')), ('qwen2', {})])
def test_adapter(name, changes, tmp_path):
    """peft puts the adapter onto the exported base model: the logits of the folded export."""
    import peft
    import torch
    import transformers
    config = released.decoder(name, **changes)
    params = released.random_params(config, 5, dict(rank=3, scale=.75))
    base = export.unflatten({k: v for k, v in export.flatten(params).items() if 'lora_' not in k})
    export.save(config, params, str(tmp_path / 'adapter'), 'peft', lora_scale=.75)
    export.save(config, params, str(tmp_path / 'folded'), 'hf', lora_scale=.75)
    export.save(config, base, str(tmp_path / 'base'), 'hf')
    tokens = torch.tensor(np.random.default_rng(1).integers(0, 96, (2, 20)))
    load = transformers.AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        plain = load(tmp_path / 'base')(tokens).logits
        folded = load(tmp_path / 'folded')(tokens).logits
        adapted = peft.PeftModel.from_pretrained(load(tmp_path / 'base'), tmp_path / 'adapter')
        ours = adapted(tokens).logits
    assert (folded - plain).abs().max() > .1
    worst = float((ours - folded).abs().max() / folded.abs().max())
    print(f'adapter against folded, {name}: {worst:.1e} of the largest logit')
    assert worst < 1e-5
    wanted = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())
    assert set(adapted.peft_config['default'].target_modules) == set(wanted['target_modules'])


@pytest.mark.parametrize('name, changes', [
    ('llama', {}), ('llama', dict(kv_heads=4, pairs='interleaved', layers=3)), ('qwen2', {})])
def test_gguf(name, changes, tmp_path):
    """transformers reads GGUF files too, by a reader of its own (of Qwen3 only the released width
    of heads, whatever the file says)."""
    import torch
    import transformers
    config = released.decoder(name, **changes)
    params = released.random_params(config, 6)
    export.save(config, params, str(tmp_path / 'out'), 'gguf', dtype='f32')
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / 'out', gguf_file='model-f32.gguf', dtype=torch.float32)
    assert type(peer).__name__.lower() == f'{name}forcausallm'
    tokens = np.random.default_rng(1).integers(0, 96, (2, 20))
    with torch.no_grad():
        theirs = peer(torch.tensor(tokens)).logits.numpy()
    ours, = released.scores(config, params, tokens[:, None])
    worst = float(np.abs(ours - theirs).max())
    print(f'{name} by way of GGUF: {worst:.1e}')
    assert worst <= 1e-4 and theirs.std() > .5


def rebuilt(fields):
    """A tokenizer of `tokenizers` from what a GGUF file says, cut as llama.cpp's names mean."""
    import tokenizers
    from tokenizers import models, pre_tokenizers
    get = {k.removeprefix('tokenizer.ggml.'): v for k, v in fields.items()}
    pattern = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|" + {
        'llama-bpe': r'\p{N}{1,3}', 'qwen2': r'\p{N}'}[get['pre']]
        + r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')
    of = dict(zip(get['tokens'], get['token_type'], strict=True))
    made = tokenizers.Tokenizer(models.BPE(
        vocab={t: i for i, t in enumerate(get['tokens'])},
        merges=[tuple(m.split(' ')) for m in get['merges']],
        ignore_merges=get['pre'] == 'llama-bpe'))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.add_special_tokens([t for t, k in of.items() if k == 3])
    made.add_tokens([tokenizers.AddedToken(t, normalized=False) for t, k in of.items() if k == 4])
    return made


@pytest.mark.parametrize('kind', ['three_digits', 'one_digit', 'saved by the peer'])
def test_byte_level_tokenizer_in_gguf(kind, tmp_path):
    """Text of every kind becomes the ids of the original, by way of what the file says alone; and
    as transformers reads a GGUF file's tokenizer."""
    import make_goldens
    import tokenizers
    import transformers
    digits = 'three_digits' if kind == 'three_digits' else 'one_digit'
    made = make_goldens.byte_level(*make_goldens.BYTE_LEVEL[digits])
    config = released.decoder('llama' if digits == 'three_digits' else 'qwen2')
    config.vocab = dict(name='line', text_tokens=344, multiple=1)
    export.save(config, released.random_params(config, 1), str(tmp_path / 'in'), 'hf')
    if kind == 'saved by the peer':
        said = json.loads(made.to_str())['model']
        theirs = transformers.Qwen2Tokenizer(
            vocab=said['vocab'] | {'<|endoftext|>': 360},
            merges=[tuple(m) for m in said['merges']], eos_token='<|endoftext|>')
        theirs.add_tokens(make_goldens.SPOKEN)
        theirs.save_pretrained(tmp_path / 'in')
    else:
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=made, eos_token='<|end|>',
            bos_token='<|start|>' if digits == 'three_digits' else None).save_pretrained(
                tmp_path / 'in')
    original = tokenizers.Tokenizer.from_file(str(tmp_path / 'in' / 'tokenizer.json'))
    export.load(str(tmp_path / 'in')).save(str(tmp_path / 'out'), 'gguf', dtype='f32')
    fields, _ = read(tmp_path / 'out' / 'model-f32.gguf')
    ours = rebuilt(fields)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out', gguf_file='model-f32.gguf')
    rng = np.random.default_rng(1)
    pool = [*'abzthe  \n\t\r\'"<|_>0123456789é½Ⅷ٣日本한и\u3000\xa0.,!-', "'LL", 'the', '<|unit_3|>',
            '<|end|>', '\U0001f600']
    texts = [*make_goldens.TEXTS, *small.SENTENCES, *small.NONSENSE, *(
        ''.join(rng.choice(pool, 40)) for _ in range(200))]
    for text in texts:
        ids = original.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == ids, text
        assert original.decode(ids, skip_special_tokens=False) == text
    other = [t for t in make_goldens.TEXTS if peer(t, add_special_tokens=False).input_ids
             != original.encode(t, add_special_tokens=False).ids]
    # Their reader does not know that a word which is a token is one at once.
    assert other == (['the cat sat on the mat'] if digits == 'three_digits' else [])

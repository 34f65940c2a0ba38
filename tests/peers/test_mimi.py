# SPDX-License-Identifier: Apache-2.0
"""Mimi by name against kyutai's own implementation, random weights: the same codes and sound."""

import numpy as np
import pytest

from jaxsd import codec

pytestmark = pytest.mark.peers
BOOKS = 8


@pytest.fixture(scope='module')
def released(tmp_path_factory):
    """kyutai's model, nothing in it zero or tiny by initialization, and its weights' file."""
    import torch
    from moshi.models import loaders
    from safetensors.torch import save_file
    torch.manual_seed(0)
    model = loaders.get_mimi(None, device='cpu', num_codebooks=32).eval()
    state = model.state_dict()
    for key, value in state.items():
        if key.endswith('embedding_sum'):
            value.normal_()
        elif key.endswith('cluster_usage'):
            value.uniform_(0.5, 2.0)
        elif key.endswith('_initialized'):
            value.fill_(1.0)
        elif 'layer_scale' in key:
            value.uniform_(0.2, 1.0)    # 0.01 would hide the attention
    model.load_state_dict(state)
    model.set_num_codebooks(BOOKS)
    path = tmp_path_factory.mktemp('mimi') / 'mimi.safetensors'
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return model, str(path)


def test_codes_and_sound_equal_the_original(released):
    import torch
    model, path = released
    ours = codec.mimi(path=path, codebooks=BOOKS)
    wav = np.random.default_rng(0).normal(0, 0.1, 1920 * 13).astype(np.float32)
    codes = ours.encode(wav[:-700])
    padded = np.concatenate([wav[:-700], np.zeros(700, np.float32)])
    with torch.no_grad():
        theirs = model.encode(torch.from_numpy(padded)[None, None])[0].numpy()
        sound = model.decode(torch.from_numpy(theirs)[None])[0, 0].numpy()
    assert codes.dtype == np.int16 and codes.shape == (BOOKS, 13)
    assert len(np.unique(codes)) > 20
    np.testing.assert_array_equal(codes, theirs)
    np.testing.assert_allclose(ours.decode(codes), sound, atol=1e-5 * np.abs(sound).max())
    assert ours.encode(np.zeros(0, np.float32)).shape == (BOOKS, 0)
    assert ours.identity['name'] == 'mimi' and len(ours.identity['sha256']) == 64


def test_a_directory_holds_the_same_model(released, tmp_path):
    _, path = released
    codec._mimi_model(path).save_pretrained(tmp_path)
    wav = np.random.default_rng(1).normal(0, 0.1, 1920 * 5).astype(np.float32)
    np.testing.assert_array_equal(codec.mimi(path=str(tmp_path), codebooks=3).encode(wav),
                                  codec.mimi(path=path, codebooks=3).encode(wav))


def test_what_is_wrong_is_said_in_a_line(released, tmp_path):
    from safetensors.torch import load_file, save_file
    _, path = released
    whole = open(path, 'rb').read(1 << 20)
    (tmp_path / 'cut').write_bytes(whole)
    state = load_file(path)
    state.pop('quantizer.rvq_first.input_proj.weight')
    save_file(state, tmp_path / 'incomplete')
    for name, said in (('cut', 'no Mimi can be read'), ('incomplete', '1 missing keys'),
                       ('absent', 'no Mimi weights at')):
        with pytest.raises(ValueError, match=said) as e:
            codec.mimi(path=str(tmp_path / name))
        assert '\n' not in str(e.value)
    for options, said in (({'codebooks': 33}, '32 codebooks'), ({'size': 1024}, 'size=2048'),
                          ({'frame_hz': 25.0}, 'frame_hz=12.5')):
        with pytest.raises(ValueError, match=said):
            codec.mimi(path=path, **options)

# SPDX-License-Identifier: Apache-2.0
"""The model a second time, in float64 numpy from the papers' equations, one segment at a time.

Written for reading, not for speed, and sharing nothing with the library but the shapes of its
parameters. Several tests compare with it.
"""

import numpy as np


def norm(x, weight, eps):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(s):
    s = np.exp(s - s.max(-1, keepdims=True))
    return s / s.sum(-1, keepdims=True)


def log_softmax(s):
    return np.log(softmax(s))


def slowed(frequency, name, factor, low_freq_factor=None, high_freq_factor=None,
           original_columns=None):
    """One rotary frequency, as Llama 3.1's model code has it: by its wavelength in columns."""
    wavelength = 2 * np.pi / frequency
    if name == 'linear' or wavelength > original_columns / low_freq_factor:
        return frequency / factor
    if wavelength < original_columns / high_freq_factor:
        return frequency
    smooth = (original_columns / wavelength - low_freq_factor) / (
        high_freq_factor - low_freq_factor)
    return (1 - smooth) * frequency / factor + smooth * frequency


def rotary(x, theta, pairs, scaling='none'):
    """[T, N, H] as complex pairs, pair j of column t times exp(i t theta^(-j / pairs))."""
    half = x.shape[-1] // 2
    frequency = theta ** (-np.arange(half) / half)
    if scaling != 'none':
        frequency = np.array([slowed(f, **scaling) for f in frequency])
    a, b = ((slice(0, half), slice(half, None)) if pairs == 'half' else
            (slice(0, None, 2), slice(1, None, 2)))
    z = (x[..., a] + 1j * x[..., b]) * np.exp(
        1j * np.arange(len(x))[:, None, None] * frequency)
    out = np.empty_like(x)
    out[..., a], out[..., b] = z.real, z.imag
    return out


def attention(q, k, v, seen):
    """[T, N, H] queries; query head n reads kv head n // (N / G). seen: bool [T, T]."""
    k, v = (np.repeat(z, q.shape[1] // z.shape[1], axis=1) for z in (k, v))
    s = np.einsum('tnh,snh->nts', q, k) / np.sqrt(q.shape[-1])
    return np.einsum('nts,snh->tnh', softmax(np.where(seen, s, -np.inf)), v)


def frontend(params, tokens_KT):
    """[T, D]: the sum of a column's embeddings, nothing for a cell of nothing."""
    x = np.zeros((tokens_KT.shape[1], params['table'].shape[1]))
    for k, t in np.ndindex(tokens_KT.shape):
        if tokens_KT[k, t] >= 0:
            x[t] += params['table'][tokens_KT[k, t]]
    return x


def experts(p, x_TD, used):
    """Column by column: its `used` likeliest experts, weighted as likely as they are together."""
    out = np.zeros_like(x_TD)
    for t, x in enumerate(x_TD):
        likely = softmax(x @ p['router'])
        best = np.argsort(-likely)[:used]
        for e in best:
            gate, up = np.einsum('d,dcf->cf', x, p['gate_up'][e])
            out[t] += likely[e] / likely[best].sum() * (silu(gate) * up) @ p['down'][e]
    return out


def decoder(params, x_TD, *, theta, pairs='half', window_columns=None, norm_eps=1e-5,
            rope_scaling='none', experts_per_column=None):
    T, layers = len(x_TD), len(params['blocks']['norm_mlp']['weight'])
    back = np.arange(T)[:, None] - np.arange(T)
    seen = (back >= 0) & (back < (window_columns or T))
    x = x_TD
    for i in range(layers):
        p = params['blocks']
        y = norm(x, p['norm_attention']['weight'][i], norm_eps)
        q, k, v = (np.einsum('td,dnh->tnh', y, p[n]['kernel'][i])
                   + (p[n]['bias'][i] if 'bias' in p[n] else 0.0) for n in 'qkv')
        if 'norm_q' in p:
            q, k = (norm(z, p[n]['weight'][i], norm_eps) for z, n in ((q, 'norm_q'), (k, 'norm_k')))
        q, k = (rotary(z, theta, pairs, rope_scaling) for z in (q, k))
        o = attention(q, k, v, seen)
        x = x + np.einsum('tnh,nhd->td', o, p['out']['kernel'][i])
        y = norm(x, p['norm_mlp']['weight'][i], norm_eps)
        if 'experts' in p:
            e = p['experts']
            x = x + experts(dict(router=e['router']['kernel'][i], gate_up=e['gate_up'][i],
                                 down=e['down'][i]), y, experts_per_column)
            continue
        gate, up = np.einsum('td,dcf->ctf', y, p['gate_up']['kernel'][i])
        x = x + (silu(gate) * up) @ p['down']['kernel'][i]
    return norm(x, params['norm']['weight'], norm_eps)


def _each(values, kernels, slots):
    """Every step's value through the kernel of its slot."""
    return np.stack([np.tensordot(y, kernels[s], y.ndim)
                     for y, s in zip(values, slots, strict=True)])


def depth(params, h_TD, target_KT, rows, slots, norm_eps=1e-8):
    """Logits of the text row and of each predicted audio row: a list of [T, V_row].

    Column by column: one sequence of as many steps as there are predicted audio rows, whose step p
    reads the hidden state and the token of the row above the one that it predicts.
    """
    steps = len(slots)
    out = [h_TD @ params['text_out']['kernel']]
    audio = np.zeros((steps, len(h_TD), params['outs']['kernel'].shape[-1]))
    for t, h in enumerate(h_TD):
        x = np.zeros((steps, params['text_table'].shape[1]))
        for p, slot in enumerate(slots):
            x[p] = h @ params['inputs']['kernel'][slot]
            token = target_KT[p, t] - rows[p].start
            if target_KT[p, t] >= 0:
                x[p] += params['text_table'][token] if p == 0 else params['tables'][p - 1, token]
        b = params['blocks']
        for i in range(len(b['norm_mlp']['weight'])):
            y = norm(x, b['norm_attention']['weight'][i], norm_eps)
            qkv = _each(y, b['qkv']['kernel'][i], slots)
            o = attention(qkv[:, 0], qkv[:, 1], qkv[:, 2], np.tri(steps, dtype=bool))
            x = x + _each(o, b['out']['kernel'][i], slots)
            y = norm(x, b['norm_mlp']['weight'][i], norm_eps)
            gate_up = _each(y, b['gate_up']['kernel'][i], slots)
            x = x + _each(silu(gate_up[:, 0]) * gate_up[:, 1], b['down']['kernel'][i], slots)
        for p in range(steps):
            audio[p, t] = x[p] @ params['outs']['kernel'][p]
    return out + list(audio)


def float64(params):
    """A nested dict of arrays in double precision."""
    return {k: float64(v) if isinstance(v, dict) else np.asarray(v, np.float64)
            for k, v in params.items()}


def slope(loss, params: dict, path: tuple, index: tuple, step: float = 1e-5) -> float:
    """d loss / d params[path][index] by a central difference."""
    leaf = params
    for key in path:
        leaf = leaf[key]
    kept = leaf[index]
    values = []
    for at in (kept + step, kept - step):
        leaf[index] = at
        values.append(loss(params))
    leaf[index] = kept
    return (values[0] - values[1]) / (2 * step)

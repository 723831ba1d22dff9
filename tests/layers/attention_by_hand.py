"""The attention layer written out in NumPy, float64, token by token, for one document a row."""

from typing import Any

import numpy as np
from flax import nnx

from nha_jax.layers import NativeHybridAttention


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


FEATURE_MAPS = {None: lambda x: x, "silu": silu, "relu": lambda x: np.maximum(x, 0)}


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def rotate(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    half = x.shape[-1] // 2
    angle = position * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
    )


def heads_by_hand(
    layer: NativeHybridAttention, x: np.ndarray, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """What each head reads, [B,T,N,K], and its slot mass, [B,T,N]. A document per row."""
    p: dict[str, Any] = {
        path[0]: np.asarray(leaf[...], np.float64)
        for path, leaf in nnx.to_flat_state(nnx.state(layer, nnx.Param))
        if len(path) == 1
    }
    q, k, v = (np.einsum("btd,dhk->bthk", x, p[name]) for name in ("query", "key", "value"))
    if "query_bias" in p:
        q, k, v = q + p["query_bias"], k + p["key_bias"], v + p["value_bias"]
    if layer.query_norm is not None:
        q = rms_norm(q, np.asarray(layer.query_norm.scale[...]), layer.query_norm.eps)
        k = rms_norm(k, np.asarray(layer.key_norm.scale[...]), layer.key_norm.eps)
    if layer.silu_values:
        v = silu(v)
    alpha = np.ones((*k.shape[:3], 0))
    if "gate" in p:
        alpha = sigmoid(np.einsum("btd,dgm->btgm", x, p["gate"])) ** (1 / layer.gate_normalizer)
    phi = FEATURE_MAPS[layer.slot_feature_map]
    lag = window if layer.slot_lag is None or window == 0 else layer.slot_lag

    out, mass = np.zeros((*q.shape[:3], v.shape[-1])), np.zeros(q.shape[:3])
    group = q.shape[2] // k.shape[2]
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        g = n // group
        slots_k = np.zeros((alpha.shape[3], q.shape[-1]))
        slots_v = np.zeros((alpha.shape[3], v.shape[-1]))
        for t in range(x.shape[1]):
            if t >= lag:
                a = alpha[b, t - lag, g][:, None]
                slots_k = a * slots_k + (1 - a) * phi(k[b, t - lag, g])
                slots_v = a * slots_v + (1 - a) * v[b, t - lag, g]
            scores, values = [], []
            if t >= lag or layer.empty_slots == "sink":
                scores += list(slots_k @ phi(q[b, t, n]))
                values += list(slots_v)
            in_slots = len(scores)
            for j in range(max(0, t - window + 1), t + 1):
                pair = (q[b, t, n], k[b, j, g])
                if layer.rope_theta is not None:
                    pair = tuple(
                        rotate(y, i, layer.rope_theta) for y, i in zip(pair, (t, j), strict=True)
                    )
                scores.append(pair[0] @ pair[1])
                values.append(v[b, j, g])
            weights = np.exp(layer.scale * np.asarray(scores))
            weights /= weights.sum()
            out[b, t, n] = weights @ np.asarray(values)
            mass[b, t, n] = weights[:in_slots].sum()
    return out, mass


def project_by_hand(layer: NativeHybridAttention, heads: np.ndarray) -> np.ndarray:
    """The output projection of heads [B,T,N,K], after its norm if there is one."""
    if layer.output_norm is not None:
        flat = silu(heads).reshape(*heads.shape[:2], -1)
        scale = np.asarray(layer.output_norm.scale[...])
        heads = rms_norm(flat, scale, layer.output_norm.eps).reshape(heads.shape)
    return np.einsum("btnk,nkd->btd", heads, np.asarray(layer.output[...], np.float64))

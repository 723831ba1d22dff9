"""Native Hybrid Attention as a Flax NNX layer (arXiv 2510.07019, section 3)."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nha_jax.layers.checks import (
    Window,
    check_array,
    check_cache,
    check_choice,
    check_documents,
    check_heads,
    check_scale,
    check_slots,
    check_window,
)
from nha_jax.layers.feature_map import (
    FEATURE_MAPS,
    FeatureMap,
    RopeTables,
    separate_slot_features,
)
from nha_jax.layers.norm import RMSNorm
from nha_jax.layers.parameters import constant_parameter, normal_parameter, small_init_stddev
from nha_jax.layers.positions import document_positions
from nha_jax.layers.rotary import RopeScaling, rotary_frequencies, rotary_tables
from nha_jax.ops import IMPLEMENTATIONS, Cache, init_cache, native_hybrid_attention


class Projections(NamedTuple):
    """What a layer makes of its input before any token looks at another."""

    q: Float[Array, "B T N K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T G K"]
    log_decay: Float[Array, "B T G M"] | None
    fusion_weight: Float[Array, "N"] | None


class NativeHybridAttention(nnx.Module):
    """Slots and a sliding window, read by one softmax.

    `q, k, v = x W_q, x W_k, x W_v`; the forget gate of each key/value head and slot is
    `log_decay = logsigmoid(x W_f) / gate_normalizer`, in float32; then the operator
    (`nha_jax.ops`), and the output projection. `window` alone moves a layer, with the weights it
    has, from a linear RNN (0) through a hybrid to full attention ("full"); it can be set again at
    each call.

    The initialisation, and the logical axis names of the parameters, are described in
    `nha_jax.layers.parameters`. Parameters: `query [D,N,K]`, `key [D,G,K]`, `value [D,G,K]`,
    `gate [D,G,M]` (none if M = 0), `output [N,K,D]`, and with the options `query_bias [N,K]`,
    `key_bias [G,K]`, `value_bias [G,K]`, `query_norm`, `key_norm` (scale `[K]`), `output_norm`
    (scale `[N·K]`).

    Args:
      width: model width D.
      num_heads: query heads N.
      num_kv_heads: key/value heads G, a divisor of N; None: N.
      head_size: K, of queries, keys and values; None: D / N.
      num_slots: M; 0: a window only, and no gate.
      window: W tokens read exactly, or "full": the whole document.
      slot_lag: tokens after which a token retires into the slots, at most the window; None: the
        window. With a window of 0 it is 0, and "full" layers retire nothing.
      empty_slots: "mask" or "sink", see `nha_jax.ops.native_hybrid_attention`.
      gate_normalizer: divides the gate's log-sigmoid; larger forgets more slowly.
      rope_theta: base of the rotary wavelengths; None: no rotation.
      rope_scaling: Llama-3 frequency scaling.
      qkv_bias: biases on queries, keys and values (Qwen2.5).
      qk_norm: RMS norm of each head's queries and keys (Qwen3).
      silu_values: SiLU on the values (Gated Slot Attention, NHA).
      slot_feature_map: "silu" or "relu" on the slots' queries and keys only; see
        `nha_jax.layers.feature_map` for its cost in a hybrid layer.
      output_norm: SiLU, then RMS norm over all heads, before the output projection.
      norm_eps: epsilon of these norms.
      scale: of the scores; None: K^-½.
      depth: layers L of the model, for the initialisation of `output`.
      implementation: of the operator, by name; None: the fastest that serves the call.
      dtype: compute dtype of projections, queries, keys and values. Gates, softmax and slots are at
        least float32.
      param_dtype: dtype of the parameters.
      rngs: of which the `params` stream is used.

    Raises:
      ValueError: an argument that makes no layer, by name.
    """

    _num_caches = 1  # of the operator, in the layer's

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_size: int | None = None,
        num_slots: int = 64,
        window: Window = 64,
        slot_lag: int | None = None,
        empty_slots: Literal["mask", "sink"] = "mask",
        gate_normalizer: float = 8.0,
        rope_theta: float | None = 10_000.0,
        rope_scaling: RopeScaling | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        silu_values: bool = False,
        slot_feature_map: FeatureMap | None = None,
        output_norm: bool = False,
        norm_eps: float = 1e-6,
        scale: float | None = None,
        depth: int = 1,
        implementation: str | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_heads(width, num_heads, num_kv_heads, head_size)
        head_size = width // num_heads if head_size is None else head_size
        check_window(window)
        check_slots(num_slots, window, slot_lag, empty_slots)
        if gate_normalizer <= 0:
            raise ValueError(f"gate_normalizer={gate_normalizer}: expected a positive number")
        check_choice("slot_feature_map", slot_feature_map, (None, *FEATURE_MAPS))
        check_choice("implementation", implementation, (None, *IMPLEMENTATIONS))
        check_scale(scale)
        if rope_theta is not None:
            rotary_frequencies(head_size, rope_theta, rope_scaling)  # refuses an odd size

        self.width, self.num_heads, self.num_kv_heads = width, num_heads, num_kv_heads
        self.head_size, self.num_slots, self.window = head_size, num_slots, window
        self.slot_lag, self.empty_slots = slot_lag, empty_slots
        self.gate_normalizer = gate_normalizer
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        self.silu_values, self.slot_feature_map = silu_values, slot_feature_map
        self.scale = head_size**-0.5 if scale is None else scale
        self.implementation, self.dtype = implementation, jnp.dtype(dtype)

        stddev = small_init_stddev(width)
        n, g, k, m = num_heads, num_kv_heads, head_size, num_slots

        def matrix(
            shape: tuple[int, ...],
            axes: tuple[str, ...],
            stddev: float = stddev,
            decay: bool = True,
        ) -> nnx.Param:
            return normal_parameter(rngs, shape, stddev, param_dtype, axes, weight_decay=decay)

        kv_axes = ("embed", "kv_heads", "head_size")
        self.query = matrix((width, n, k), ("embed", "heads", "head_size"))
        self.key = matrix((width, g, k), kv_axes)
        self.value = matrix((width, g, k), kv_axes)
        self.output = matrix(
            (n, k, width), ("heads", "head_size", "embed"), small_init_stddev(width, depth)
        )
        # No decay: a gate pulled towards 0 is pulled towards one half-life for every slot.
        self.gate = (
            matrix((width, g, m), ("embed", "kv_heads", "slots"), decay=False) if m else None
        )

        def bias(heads: int, name: str) -> nnx.Param | None:
            shape = (heads, k)
            return (
                constant_parameter(0.0, shape, param_dtype, (name, "head_size"))
                if qkv_bias
                else None
            )

        self.query_bias, self.key_bias = bias(n, "heads"), bias(g, "kv_heads")
        self.value_bias = bias(g, "kv_heads")

        def norm(size: int, axis_name: str, wanted: bool) -> RMSNorm | None:
            if not wanted:
                return None
            return RMSNorm(size, eps=norm_eps, axis_name=axis_name, param_dtype=param_dtype)

        self.query_norm, self.key_norm = (norm(k, "head_size", qk_norm) for _ in range(2))
        self.output_norm = norm(n * k, "heads", output_norm)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "b T"] | None = None,
        cache: Any = None,
        return_cache: bool = False,
        return_slot_mass: bool = False,
        window: Window | None = None,
    ) -> Any:
        """Mixes tokens.

        Args:
          x: inputs.
          segment_ids: document ids; 0 is padding. None: one document.
          positions: for the rotation, batch axis 1 or B; None: position within the document,
            continuing the cache's.
          cache: from `init_cache` or an earlier call, for the same window.
          return_cache: also return the state after the last token. Without `cache` the state starts
            empty, and that of a "full" layer then has room for these T tokens only.
          return_slot_mass: also return the probability that went to the slots, `[B,T,N]` float32.
          window: overrides the layer's window for this call.

        Returns:
          `[B,T,D]` in the compute dtype, or `(out[, slot mass][, cache])` in this order.

        Raises:
          ValueError: a bad argument, by name.
          NotImplementedError: the named implementation cannot serve the call, with the reasons.
        """
        d = self.width
        check_array("x", x, jnp.floating, [(None, None, d)], f"[B,T,D] with D = {d}")
        batch, length = x.shape[:2]
        check_documents(batch, length, segment_ids, positions)
        check_cache(cache, batch, self._num_caches)
        rope = self.rope_tables(length, segment_ids, positions, cache)
        out, slot_mass, final = self.read(
            self.project(x),
            window=self.window if window is None else window,
            rope=rope,
            segment_ids=segment_ids,
            cache=cache,
            return_cache=return_cache,
        )
        out = self.merge_heads(out)
        results = [out]
        if return_slot_mass:
            results.append(slot_mass)
        if return_cache:
            results.append(final)
        return tuple(results) if len(results) > 1 else out

    def rope_tables(
        self,
        length: int,
        segment_ids: Int[Array, "B T"] | None,
        positions: Int[Array, "b T"] | None,
        cache: Any = None,
    ) -> RopeTables | None:
        """Rotary tables for the rows of a call; positions are counted where None is given."""
        if self.rope_theta is None:
            return None
        if positions is None:
            state = first_cache(cache)
            positions = document_positions(
                length,
                segment_ids,
                None if state is None else state.segment_id,
                None if state is None else state.segment_length,
            )
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return rotary_tables(positions, self.head_size, self.rope_theta, self.rope_scaling, wide)

    def project(self, x: Float[Array, "B T D"]) -> Projections:
        """Queries, keys, values (compute dtype) and log decays (float32 or wider)."""
        x = x.astype(self.dtype)

        def heads(kernel: nnx.Param, bias: nnx.Param | None) -> jax.Array:
            y = jnp.einsum("btd,dhk->bthk", x, kernel[...].astype(self.dtype))
            return y if bias is None else y + bias[...].astype(self.dtype)

        q = heads(self.query, self.query_bias)
        k = heads(self.key, self.key_bias)
        v = heads(self.value, self.value_bias)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.silu_values:
            v = jax.nn.silu(v)
        return Projections(q, k, v, self._log_decay(x), self._fusion_weight())

    def _log_decay(self, x: jax.Array) -> jax.Array | None:
        if self.gate is None:
            return None
        wide = jnp.promote_types(self.dtype, jnp.float32)
        kernel = self.gate[...].astype(self.dtype)
        logits = jnp.einsum("btd,dgm->btgm", x, kernel, preferred_element_type=wide)
        return jax.nn.log_sigmoid(logits) / self.gate_normalizer

    def _fusion_weight(self) -> jax.Array | None:
        return None

    def read(
        self,
        projections: Projections,
        *,
        window: Window,
        rope: RopeTables | None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Any = None,
        return_cache: bool = False,
    ) -> tuple[Float[Array, "B T N K"], Float[Array, "B T N"], Any]:
        """What each token reads: heads, slot mass, and the final cache (None if not wanted).

        Uses no parameters, only settings, so that layers with other parameters can share it.

        Raises:
          ValueError: a bad window, cache or `segment_ids`, by name.
          NotImplementedError: the named implementation cannot serve the call, with the reasons.
        """
        if return_cache and cache is None:
            batch, length = projections.q.shape[:2]
            max_length = length if window == "full" else max(length, window)
            cache = self.init_cache(batch, max_length=max_length, window=window)
        return self._read(projections, window, rope, segment_ids, cache, return_cache)

    def _read(
        self,
        projections: Projections,
        window: Window,
        rope: RopeTables | None,
        segment_ids: jax.Array | None,
        cache: Any,
        return_cache: bool,
    ) -> tuple[jax.Array, jax.Array, Any]:
        q, k, v, log_decay, _ = projections
        if self.num_slots == 0 or (window == "full" and self.empty_slots == "mask"):
            log_decay = None  # slots that are never read cost nothing
        out = self._operator(q, k, v, log_decay, window, rope, segment_ids, cache, return_cache)
        return out if return_cache else (*out, None)

    def _operator(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        log_decay: jax.Array | None,
        window: Window,
        rope: RopeTables | None,
        segment_ids: jax.Array | None,
        cache: Cache | None,
        return_cache: bool,
    ) -> Any:
        """One call of the operator, "full" and the feature map translated."""
        static_window = self._static_window(window, q.shape[1], cache)
        if self.slot_feature_map is not None and log_decay is not None:
            if static_window == 0:
                phi = FEATURE_MAPS[self.slot_feature_map]
                q, k = phi(q), phi(k)
            elif window != "full":  # the slots of a "full" layer stay empty
                q, k, rope = separate_slot_features(q, k, rope, self.slot_feature_map)
        return native_hybrid_attention(
            q,
            k,
            v,
            log_decay,
            window=static_window,
            slot_lag=self._lag(window) if log_decay is not None else None,
            empty_slots=self.empty_slots,
            rope=rope if static_window else None,
            scale=self.scale,
            segment_ids=segment_ids,
            return_slot_mass=True,
            cache=cache,
            return_cache=return_cache,
            implementation=self.implementation,  # type: ignore[arg-type]
        )

    def _static_window(self, window: Window, length: int, cache: Cache | None) -> int:
        """The operator's window; "full" is any window that no token can outlive."""
        check_window(window)
        if window != "full":
            return window
        if cache is None:
            return length
        if not cache.is_bounded:
            raise ValueError(f"cache was made for window={cache.window}: expected one for 'full'")
        return cache.window

    def _lag(self, window: Window) -> int | None:
        return None if window in (0, "full") else self.slot_lag

    def merge_heads(self, out: Float[Array, "B T N K"]) -> Float[Array, "B T D"]:
        """The output projection, after its norm if there is one."""
        if self.output_norm is not None:
            flat = jax.nn.silu(out).reshape(*out.shape[:2], -1)
            out = self.output_norm(flat).reshape(out.shape)
        return jnp.einsum("btnk,nkd->btd", out, self.output[...].astype(self.dtype))

    def init_cache(
        self,
        batch: int,
        *,
        max_length: int,
        window: Window | None = None,
        bounded: bool = False,
    ) -> Any:
        """An empty cache for calls with this window.

        Args:
          batch: rows B.
          max_length: longest document in tokens; it bounds "full" layers.
          window: None: the layer's.
          bounded: whether `max_length` bounds layers of any window, which then keep
            min(W, max_length) tokens; otherwise they keep W and read documents of any length.

        Raises:
          ValueError: a bad argument, by name.
        """
        window = self.window if window is None else window
        check_window(window)
        no_slots = self.num_slots == 0 or (window == "full" and self.empty_slots == "mask")
        num_slots = 0 if no_slots else self.num_slots
        return self._init_cache(batch, max_length, window, num_slots, bounded)

    def _init_cache(
        self, batch: int, max_length: int, window: Window, num_slots: int, bounded: bool
    ) -> Cache:
        # A window above max_length is the operator's word for "bounded by max_length".
        static_window = max_length + 1 if window == "full" else window
        widened = self.slot_feature_map is not None and num_slots and window not in (0, "full")
        return init_cache(
            batch,
            num_kv_heads=self.num_kv_heads,
            key_size=3 * self.head_size if widened else self.head_size,
            value_size=self.head_size,
            num_slots=num_slots,
            window=static_window,
            slot_lag=self._lag(window) if num_slots else None,
            max_length=max_length
            if bounded or window == "full"
            else max(max_length, static_window, 1),
            dtype=self.dtype,
        )


def first_cache(cache: Any) -> Cache | None:
    """The operator's cache in a layer's: the layer's own, or the first of a pair."""
    return cache[0] if isinstance(cache, tuple) else cache

"""A baseline: slots and window in two softmaxes, added with a learned weight."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax.layers.attention import NativeHybridAttention, Projections
from nha_jax.layers.checks import Window, check_window
from nha_jax.layers.feature_map import RopeTables
from nha_jax.layers.parameters import constant_parameter


class WeightedSumFusion(NativeHybridAttention):
    """The design the paper argues against: two softmaxes and a learned weight for each head.

    `out = w * slots + (1 - w) * window` with `w = sigmoid(fusion_logits [N])`, which starts at 1/2.
    The slots hold the whole past (gated slot attention), the window its W tokens; each is one call
    of the operator. Everything else is `NativeHybridAttention`, whose arguments it takes. *Slot
    mass* is w.

    Raises:
      ValueError: an argument that makes no layer, by name; no slots, no window, or a lag.
    """

    _num_caches = 2

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs, **settings: Any) -> None:
        super().__init__(width, num_heads, rngs=rngs, **settings)
        if self.num_slots == 0:
            raise ValueError("num_slots=0: weighted-sum fusion needs slots to weigh")
        if self.window == 0:
            raise ValueError("window=0: weighted-sum fusion needs a window to weigh")
        if self.slot_lag not in (None, 0):
            raise ValueError(f"slot_lag={self.slot_lag}: weighted-sum fusion has no lag")
        param_dtype = settings.get("param_dtype", jnp.float32)
        self.fusion_logits = constant_parameter(0.0, (num_heads,), param_dtype, ("heads",))

    def _fusion_weight(self) -> jax.Array | None:
        return jax.nn.sigmoid(
            self.fusion_logits[...].astype(jnp.promote_types(self.dtype, jnp.float32))
        )

    def _read(
        self,
        projections: Projections,
        window: Window,
        rope: RopeTables | None,
        segment_ids: jax.Array | None,
        cache: Any,
        return_cache: bool,
    ) -> tuple[jax.Array, jax.Array, Any]:
        q, k, v, log_decay, weight = projections
        slot_cache, window_cache = (None, None) if cache is None else cache
        # With a window of 0 every token is in the slots as soon as it is there to be read.
        slots = self._operator(q, k, v, log_decay, 0, None, segment_ids, slot_cache, return_cache)
        near = self._operator(q, k, v, None, window, rope, segment_ids, window_cache, return_cache)
        assert weight is not None
        share = weight[:, None]
        out = (share * slots[0] + (1 - share) * near[0]).astype(q.dtype)
        # The slots-only mass is 1 on tokens and 0 on padding.
        final = (slots[2], near[2]) if return_cache else None
        return out, slots[1] * share[:, 0], final

    def init_cache(
        self,
        batch: int,
        *,
        max_length: int,
        window: Window | None = None,
        bounded: bool = False,
    ) -> Any:
        """An empty pair of caches: the slots' and the window's.

        Raises:
          ValueError: a bad argument, by name.
        """
        window = self.window if window is None else window
        check_window(window)
        return (
            self._init_cache(batch, max_length, 0, self.num_slots, bounded),
            self._init_cache(batch, max_length, window, 0, bounded),
        )

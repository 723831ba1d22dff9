"""What a language model is made of, as one frozen dataclass."""

import dataclasses
import math
import numbers
from typing import Any, Literal, NamedTuple, get_args

from nha_jax.layers.checks import Window, check_window
from nha_jax.layers.rotary import RopeScaling
from nha_jax.ops import IMPLEMENTATIONS

LayerKind = Literal["nha", "full", "gsa", "swa", "fusion"]
Remat = Literal["none", "dots", "full"]


class LayerSpec(NamedTuple):
    """What makes a layer a distinct program: two layers with equal specs compile to one."""

    kind: LayerKind
    window: Window


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder language model.

    Layer kinds: "nha" (slots and a window), and the baselines "full" (full attention, no slots:
    Transformer++), "gsa" (gated slot attention: slots only), "swa" (a sliding window only) and
    "fusion" (slots and a window in two softmaxes with a learned weight). `windows` speaks to "nha",
    "swa" and "fusion"; a "full" layer's window is always the whole document and a "gsa" layer's 0.
    The options of the attention layer apply to all layers, whatever their kind.

    Attributes:
      vocab_size: tokens P.
      num_layers: L.
      width: D.
      num_heads: query heads N.
      num_kv_heads: key/value heads G, a divisor of N.
      mlp_width: feed-forward width F.
      head_size: K; None: D / N.
      num_slots: M per key/value head, for the kinds that have slots.
      windows: W in tokens or "full", repeated to the depth, which its length must divide.
      layer_kinds: likewise.
      slot_lag, empty_slots, gate_normalizer, rope_theta, rope_scaling, qkv_bias, qk_norm,
        silu_values, slot_feature_map, output_norm, attention_scale: options of the attention layer,
        see `nha_jax.layers.NativeHybridAttention`.
      norm_eps: epsilon of all norms.
      tie_embeddings: whether the readout uses the embedding table.
      param_dtype: "float32" or "bfloat16": dtype of the parameters.
      compute_dtype: "float32" or "bfloat16": dtype of activations. Gates, softmax, slots and logits
        are float32.
      remat: what the backward pass recomputes. "none": nothing; "dots": all but products with
        weights; "full": everything but each layer's input.
      implementation: of the operator, by name; None: the fastest that serves the call.

    Raises:
      ValueError: a field that makes no model, by name.
    """

    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    mlp_width: int
    head_size: int | None = None
    num_slots: int = 64
    windows: tuple[int | Literal["full"], ...] = (64,)
    layer_kinds: tuple[LayerKind, ...] = ("nha",)
    slot_lag: int | None = None
    empty_slots: Literal["mask", "sink"] = "mask"
    gate_normalizer: float = 8.0
    rope_theta: float | None = 10_000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    silu_values: bool = False
    slot_feature_map: Literal["silu", "relu"] | None = None
    output_norm: bool = False
    attention_scale: float | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    implementation: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "num_layers",
            "width",
            "num_heads",
            "num_kv_heads",
            "mlp_width",
        ):
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("num_slots", self.num_slots, 0)
        if self.slot_lag is not None:
            _check_at_least("slot_lag", self.slot_lag, 0)
        self._check_heads()
        for name in ("windows", "layer_kinds"):
            # Lists come from YAML and JSON; tuples keep the config hashable.
            object.__setattr__(self, name, _pattern(name, getattr(self, name)))
        self._check_options()
        self.layers()

    def _check_options(self) -> None:
        for name, allowed in (
            ("layer_kinds", get_args(LayerKind)),
            ("empty_slots", ("mask", "sink")),
            ("slot_feature_map", (None, "silu", "relu")),
            ("param_dtype", ("float32", "bfloat16")),
            ("compute_dtype", ("float32", "bfloat16")),
            ("remat", get_args(Remat)),
            ("implementation", (None, *IMPLEMENTATIONS)),
        ):
            value = getattr(self, name)
            for entry in value if isinstance(value, tuple) else (value,):
                if entry not in allowed:
                    known = ", ".join(map(repr, allowed))
                    raise ValueError(f"model.{name}={entry!r}: expected one of {known}")
        for name in ("gate_normalizer", "norm_eps"):
            _check_positive(name, getattr(self, name))
        for name in ("attention_scale", "rope_theta"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        for name in ("qkv_bias", "qk_norm", "silu_values", "output_norm", "tie_embeddings"):
            if not isinstance(flag := getattr(self, name), bool):
                raise ValueError(f"model.{name}={flag!r}: expected True or False")
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise ValueError(
                f"model.rope_scaling={self.rope_scaling!r}: expected None or a RopeScaling"
            )

    def _check_heads(self) -> None:
        n, g, d = self.num_heads, self.num_kv_heads, self.width
        if n % g:
            raise ValueError(f"model.num_kv_heads={g}: expected a divisor of num_heads={n}")
        if self.head_size is None and d % n:
            raise ValueError(
                f"model.num_heads={n}: expected a divisor of width={d}, or set model.head_size"
            )
        if self.head_size is not None:
            _check_at_least("head_size", self.head_size, 1)
        if self.rope_theta is not None and self.key_size % 2:
            raise ValueError(
                f"model.head_size={self.key_size}: rotary position embedding needs an even size"
            )

    @property
    def key_size(self) -> int:
        """K, resolved."""
        return self.width // self.num_heads if self.head_size is None else self.head_size

    def layers(self, windows: tuple[Window, ...] | None = None) -> tuple[LayerSpec, ...]:
        """Kind and window of each layer, first to last.

        Args:
          windows: instead of the config's, repeated to the depth in the same way.

        Raises:
          ValueError: windows that are none, that the layers' kinds cannot have, or whose number
            does not divide the depth.
        """
        pattern = self.windows if windows is None else _pattern("windows", windows)
        depth = self.num_layers
        spread = _repeat("windows", pattern, depth)
        kinds = _repeat("layer_kinds", self.layer_kinds, depth)
        return tuple(map(self._layer, kinds, spread))

    def _layer(self, kind: Any, window: Any) -> LayerSpec:
        try:
            check_window(window)
        except ValueError as error:
            raise ValueError(f"model.{str(error).replace('window', 'windows', 1)}") from None
        if kind in ("nha", "gsa", "fusion") and self.num_slots == 0:
            raise ValueError(f"model.num_slots=0: a {kind!r} layer needs slots")
        if kind == "full":
            return LayerSpec(kind, "full")
        if kind == "gsa":
            return LayerSpec(kind, 0)
        if window == 0 and kind != "nha":
            raise ValueError(f"model.windows=0: a {kind!r} layer needs a window of at least 1")
        if kind == "nha" and isinstance(window, int) and 0 < window < (self.slot_lag or 0):
            raise ValueError(
                f"model.slot_lag={self.slot_lag}: expected at most each window, got {window}"
            )
        return LayerSpec(kind, window)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The distinct layer kinds, in order of first appearance."""
        return tuple(dict.fromkeys(layer.kind for layer in self.layers()))


def _check_at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"model.{name}={value!r}: expected an int of at least {least}")


def _check_positive(name: str, value: Any) -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"model.{name}={value!r}: expected a positive number")


def _pattern(name: str, entries: object) -> tuple:
    if not isinstance(entries, list | tuple):
        example = {"windows": "[64] or [64, 'full']", "layer_kinds": "['nha']"}[name]
        raise ValueError(f"model.{name}={entries!r}: expected a list such as {example}")
    return tuple(entries)


def _repeat(name: str, pattern: tuple, depth: int) -> tuple:
    if not pattern or depth % len(pattern):
        raise ValueError(
            f"model.{name} has {len(pattern)} entries: expected a number that divides "
            f"num_layers={depth}"
        )
    return pattern * (depth // len(pattern))

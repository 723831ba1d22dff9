"""Rotary position embedding: tables of cosines and sines (Su et al. 2021, arXiv 2104.09864).

Only the tables are made here. The operator applies them (half-split pairing: element i with element
i + K/2), to the window's queries and keys and not to the slots'.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3's frequency scaling, for contexts longer than the one trained on.

    A frequency whose wavelength is longer than `original_context / low_frequency_factor` tokens is
    divided by `factor`, one shorter than `original_context / high_frequency_factor` is left alone,
    those between are interpolated (Llama 3, arXiv 2407.21783; the reference code of Llama 3.1).

    Raises:
      ValueError: a field that makes no scaling, by name.
    """

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if not 1.0 <= self.factor < math.inf:
            raise ValueError(f"rope_scaling.factor={self.factor}: expected at least 1")
        if not 0.0 < self.low_frequency_factor < self.high_frequency_factor < math.inf:
            raise ValueError(
                f"rope_scaling: expected 0 < low_frequency_factor < high_frequency_factor, got "
                f"{self.low_frequency_factor} and {self.high_frequency_factor}"
            )
        if self.original_context < 1:
            raise ValueError(
                f"rope_scaling.original_context={self.original_context}: expected at least 1"
            )


def rotary_frequencies(
    head_size: int, theta: float, scaling: RopeScaling | None = None
) -> Float[np.ndarray, "pairs"]:
    """Angular frequencies in radians per token, `theta^(-2i/K)` for pair i, in float64.

    Args:
      head_size: key size K, even.
      theta: base of the wavelengths.
      scaling: Llama-3 frequency scaling.

    Raises:
      ValueError: K is odd or theta is not positive.
    """
    if head_size % 2:
        raise ValueError(f"head_size={head_size}: rotary position embedding needs an even size")
    if theta <= 0.0:
        raise ValueError(f"rope_theta={theta}: expected a positive number")
    frequencies = theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    if scaling is None:
        return frequencies
    # How often a pair turns within the original context decides its share of the scaled frequency.
    turns = scaling.original_context * frequencies / (2.0 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rotary_tables(
    positions: Int[Array | np.ndarray, "batch T"],
    head_size: int,
    theta: float,
    scaling: RopeScaling | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "batch T pairs"], Float[Array, "batch T pairs"]]:
    """Cosines and sines of the rotation angles, `[batch, T, K/2]` each.

    Args:
      positions: position of each token within its document; batch may be 1.
      head_size: key size K.
      theta: base of the wavelengths.
      scaling: Llama-3 frequency scaling.
      dtype: of the tables and of the angles; the operator takes float32, or float64 for float64.

    Raises:
      ValueError: K is odd or theta is not positive.
    """
    frequencies = jnp.asarray(rotary_frequencies(head_size, theta, scaling), dtype)
    angles = jnp.asarray(positions)[..., None].astype(dtype) * frequencies
    return jnp.cos(angles), jnp.sin(angles)

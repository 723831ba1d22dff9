"""Which device a program is made for, as far as JAX says so while it traces."""

import jax


def gpu_at_hand() -> bool:
    """Whether programs run on a GPU unless told otherwise."""
    default = getattr(jax.config, "jax_default_device", None)
    if default is None:
        return jax.default_backend() == "gpu"
    return getattr(default, "platform", default) in ("gpu", "cuda", "rocm")


def nvidia_compute_capability() -> float | None:
    """Of the first GPU, as 9.0; None where it is no NVIDIA GPU, or there is none."""
    if not gpu_at_hand():
        return None
    device = jax.devices("gpu")[0]
    if "NVIDIA" not in device.device_kind and "cuda" not in device.client.platform_version:
        return None
    capability = getattr(device, "compute_capability", None)
    return float(capability) if capability else None

"""What `python -m nha_jax.inference.benchmark` is made of."""

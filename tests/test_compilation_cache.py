"""Which folder and which threshold JAX is told of."""

import pytest

from nha_jax.compilation_cache import use_compilation_cache

_THRESHOLD = "jax_persistent_cache_min_compile_time_secs"


@pytest.mark.parametrize(
    ("directory", "environment", "expected"),
    [
        ("~/programs", {}, {"jax_compilation_cache_dir": "/home/a/programs", _THRESHOLD: 0.5}),
        ("there", {_THRESHOLD.upper(): "3"}, {"jax_compilation_cache_dir": "there"}),
        (None, {}, {"jax_compilation_cache_dir": None}),
    ],
)
def test_what_jax_is_told(monkeypatch, directory, environment, expected):
    monkeypatch.delenv(_THRESHOLD.upper(), raising=False)
    for name, value in ({"HOME": "/home/a"} | environment).items():
        monkeypatch.setenv(name, value)
    told = {}
    monkeypatch.setattr("jax.config.update", told.__setitem__)
    use_compilation_cache(directory)
    assert told == expected

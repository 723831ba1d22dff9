"""ModelConfig: patterns, checks, and the plan that turns layers into loops."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest

from nha_jax.models import LayerSpec, ModelConfig
from nha_jax.models.schedule import PeriodicPlan, plan

BASE = {
    "vocab_size": 11,
    "num_layers": 4,
    "width": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_width": 24,
    "num_slots": 3,
}


def test_one_entry_a_pattern_and_one_entry_a_layer_are_one_thing():
    spelled = [
        ModelConfig(**BASE, windows=windows).layers()
        for windows in ((8, "full"), (8, "full", 8, "full"))
    ]
    expected = (LayerSpec("nha", 8), LayerSpec("nha", "full")) * 2
    assert spelled == [expected, expected]
    assert ModelConfig(**BASE).layers(("full", 8)) == expected[1:] + expected[:1]


def test_baselines_have_the_windows_they_are_named_for():
    config = ModelConfig(**BASE, windows=(8,), layer_kinds=("full", "gsa", "swa", "fusion"))
    assert config.layers() == (("full", "full"), ("gsa", 0), ("swa", 8), ("fusion", 8))
    assert config.kinds == ("full", "gsa", "swa", "fusion")


def test_config_is_frozen_and_hashable_whatever_the_file_held():
    config = _construct({"windows": [8, "full"], "layer_kinds": ["nha"]})
    assert hash(config) == hash(ModelConfig(**BASE, windows=(8, "full")))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, r"model.vocab_size=0: expected an int of at least 1"),
        ({"num_layers": True}, r"model.num_layers=True"),
        ({"num_slots": -1}, r"model.num_slots=-1"),
        ({"num_kv_heads": 3}, r"model.num_kv_heads=3: expected a divisor of num_heads=4"),
        ({"num_heads": 6, "num_kv_heads": 6}, r"model.num_heads=6: expected a divisor of width=16"),
        ({"head_size": 5}, r"model.head_size=5: rotary"),
        ({"windows": (8, 8, 8)}, r"model.windows has 3 entries.*num_layers=4"),
        ({"windows": ()}, r"model.windows has 0 entries"),
        ({"windows": (-1,)}, r"model.windows=-1"),
        ({"windows": ("half",)}, r"model.windows='half'"),
        ({"layer_kinds": ("nha", "rnn")}, r"model.layer_kinds='rnn'"),
        ({"layer_kinds": ("nha",) * 3}, r"model.layer_kinds has 3 entries"),
        ({"num_slots": 0}, r"model.num_slots=0: a 'nha' layer needs slots"),
        ({"windows": (0,), "layer_kinds": ("swa",)}, r"model.windows=0: a 'swa' layer"),
        (
            {"slot_lag": 8, "windows": (4,)},
            r"model.slot_lag=8: expected at most each window",
        ),
        ({"slot_lag": -1}, r"model.slot_lag=-1: expected an int of at least 0"),
        ({"implementation": "fast"}, r"model.implementation='fast': expected one of .*'xla'"),
        ({"windows": 64}, r"model.windows=64: expected a list such as \[64\]"),
        ({"windows": "full"}, r"model.windows='full': expected a list"),
        ({"layer_kinds": "nha"}, r"model.layer_kinds='nha': expected a list such as \['nha'\]"),
        ({"gate_normalizer": 0.0}, r"model.gate_normalizer=0.0"),
        ({"gate_normalizer": None}, r"model.gate_normalizer=None: expected a positive number"),
        ({"norm_eps": None}, r"model.norm_eps=None: expected a positive number"),
        ({"rope_theta": "1e4"}, r"model.rope_theta='1e4': expected a positive number"),
        ({"attention_scale": True}, r"model.attention_scale=True: expected a positive number"),
        ({"tie_embeddings": "no"}, r"model.tie_embeddings='no': expected True or False"),
        ({"qkv_bias": "false"}, r"model.qkv_bias='false': expected True or False"),
        ({"silu_values": 1}, r"model.silu_values=1: expected True or False"),
        ({"qk_norm": None}, r"model.qk_norm=None: expected True or False"),
        ({"output_norm": 0}, r"model.output_norm=0: expected True or False"),
        ({"rope_scaling": {"factor": 8.0}}, r"model.rope_scaling=\{'factor': 8.0\}: expected None"),
        ({"remat": "some"}, r"model.remat='some'"),
        ({"compute_dtype": "float16"}, r"model.compute_dtype='float16'"),
    ],
    ids=str,
)
def test_impossible_configs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        # Not through the annotated constructor: YAML holds what it holds.
        _construct(changes)


def _construct(fields: dict) -> ModelConfig:
    """A config with fields as a file may hold them, which the annotations forbid."""
    config = ModelConfig(**BASE)
    for name, value in fields.items():
        object.__setattr__(config, name, value)
    config.__post_init__()
    return config


_LAYERS = st.lists(
    st.sampled_from([LayerSpec("nha", 4), LayerSpec("nha", "full"), LayerSpec("full", "full")]),
    min_size=1,
    max_size=12,
)


@hypothesis.given(layers=_LAYERS, with_caches=st.booleans())
def test_a_plan_runs_the_layers_in_their_order_and_each_distinct_one_once(layers, with_caches):
    layers = tuple(layers)
    schedule = plan(layers, with_caches=with_caches)
    if isinstance(schedule, PeriodicPlan):
        assert len({run.spec for run in schedule.runs}) == len(schedule.runs)
        assert with_caches or all(run.length == 1 for run in schedule.runs)
        period = [run.spec for run in schedule.runs for _ in range(run.length)]
        assert tuple(period * schedule.periods) == layers
        for kind in {layer.kind for layer in layers}:
            places = [
                run.start + i
                for run in schedule.runs
                for i in range(run.length)
                if run.spec.kind == kind
            ]
            assert places == list(range(len(places)))
    else:
        assert tuple(schedule.specs[i] for i in schedule.branch) == layers
        for i, (spec, place) in enumerate(zip(layers, schedule.place, strict=True)):
            assert place == layers[:i].count(spec)


@pytest.mark.parametrize(
    ("windows", "with_caches", "loops"),
    [
        ((4,), False, True),
        ((4, "full"), False, True),
        ((4, 4, 4, "full"), False, False),
        ((4, 4, 4, "full"), True, True),
        ((4, "full", "full", 4), True, False),
    ],
)
def test_which_patterns_need_no_switch(windows, with_caches, loops):
    layers = ModelConfig(**BASE).layers(windows) * 3
    assert isinstance(plan(layers, with_caches=with_caches), PeriodicPlan) == loops

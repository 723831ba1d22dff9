"""What the processes of a job compare, and what they say of a difference."""

import numpy as np
import pytest

from train.agreement import describe_difference, digest_values, shared_values


def difference(*processes: dict) -> str | None:
    digests = np.stack([digest_values(values) for values in processes])
    return describe_difference(list(processes[0]), digests)


def test_processes_and_keys_that_differ_are_named() -> None:
    values = {"seed": 0, "model.windows": [4], "data manifest_hash": "12ab"}
    assert difference(values, values, values) is None
    others = (values | {"seed": 1, "model.windows": [4, "full"]}, values, values | {"seed": 2})
    assert difference(values, *others) == (
        "all processes must be started alike: process 1 has another seed, model.windows; "
        "process 3 has another seed than process 0"
    )


@pytest.mark.parametrize(
    "change, agree",
    [
        ({"seed": 1}, False),
        ({"steps": 7}, False),
        ({"name": "other"}, False),
        ({"resume": "must"}, False),
        ({"model__num_slots": 8}, False),
        ({"data__mask_documents": False}, False),
        ({"optimizer": {"clip_norm": None}}, False),
        ({"runs_directory": "/elsewhere"}, True),
        ({"data__directory": "/elsewhere"}, True),
        ({"data__num_workers": 2}, True),
        ({"log__every_steps": 5}, True),
    ],
    ids=str,
)
def test_all_but_places_must_agree(make_config, change: dict, agree: bool) -> None:
    values = [shared_values(make_config(**changes).to_dict()) for changes in ({}, change)]
    assert (difference(*values) is None) == agree

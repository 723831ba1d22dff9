"""The pictures of a run show what its records say."""

import json
from pathlib import Path

import numpy as np
import pytest

from train.plots import loss_figure, plot_run, slot_mass_figure

TRAIN = [{"kind": "train", "step": step, "loss": 5 - step / 100} for step in range(1, 201)]
VALIDATION = [
    {
        "kind": "validation",
        "step": step,
        "loss": 5 - step / 100,
        "bits_per_byte": 6 - step / 100,
        "slot_mass": [0.1, 0.2 + step / 1000, 0.0],
    }
    for step in (0, 100, 200)
]
BASELINES = {
    "kind": "baselines",
    "unigram_loss": 4.5,
    "bigram_loss": 3.5,
    "unigram_bits_per_byte": 5.5,
    "bigram_bits_per_byte": 4.5,
}


def lines_of(figure) -> dict[str, tuple[list, list]]:
    (axes,) = figure.axes
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    }


def test_loss_picture_has_all_curves() -> None:
    lines = lines_of(loss_figure(TRAIN, VALIDATION, BASELINES))
    steps, losses = lines["validation"]
    assert (steps, losses) == ([0, 100, 200], [5, 4, 3])
    steps, losses = lines["training"]
    assert steps == list(range(1, 201))
    np.testing.assert_allclose(losses[10:-10], [r["loss"] for r in TRAIN[10:-10]])
    assert lines["unigram (5.50 bits per byte)"][1] == [4.5, 4.5]
    assert lines["bigram (4.50 bits per byte)"][1] == [3.5, 3.5]


def test_slot_mass_picture_has_a_line_per_layer() -> None:
    lines = lines_of(slot_mass_figure(VALIDATION))
    assert lines["layer 1"] == ([0, 100, 200], pytest.approx([0.2, 0.3, 0.4]))
    assert lines["layer 2"][1] == [0, 0, 0]
    many = [record | {"slot_mass": [0.5] * 30} for record in VALIDATION]
    named = [label for label in lines_of(slot_mass_figure(many)) if not label.startswith("_")]
    assert named == ["layer 0", "layer 29"]


def test_pictures_are_drawn_from_the_records(tmp_path: Path) -> None:
    assert plot_run(tmp_path) == []
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in TRAIN))
    assert [picture.name for picture in plot_run(tmp_path)] == ["loss.png"]
    records = [*TRAIN, *VALIDATION, BASELINES]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    pictures = plot_run(str(tmp_path))
    assert [picture.name for picture in pictures] == ["loss.png", "slot_mass.png"]
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000

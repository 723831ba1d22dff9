"""The pictures of a run, drawn from its `metrics.jsonl`."""

from pathlib import Path
from typing import Any

import numpy as np

from train.logging import METRICS_FILE, read_records
from train.run_files import writing

LOSS_PICTURE = "loss.png"
SLOT_MASS_PICTURE = "slot_mass.png"


def plot_run(directory: str | Path) -> list[Path]:
    """Draws `loss.png` and `slot_mass.png` in the folder of a run.

    `loss.png` shows training and validation loss in nats per token against the step, with the
    unigram and bigram entropies as lines where they are logged, and bits per byte on the right.
    `slot_mass.png` shows, for each layer, the share of attention that went to the slots in
    each validation pass.

    Args:
      directory: of the run; holds `metrics.jsonl`.

    Returns:
      The pictures written; a picture that nothing is logged for is not drawn.

    Raises:
      ResumeError: a line of `metrics.jsonl` is not a record.
      RunFileError: a picture cannot be written.
    """
    directory = Path(directory)
    records = read_records(directory / METRICS_FILE)
    train = [r for r in records if r["kind"] == "train" and r["loss"] is not None]
    validation = [r for r in records if r["kind"] == "validation" and r["loss"] is not None]
    baselines = next((r for r in reversed(records) if r["kind"] == "baselines"), None)
    written = []
    if train or validation:
        figure = loss_figure(train, validation, baselines)
        written.append(_save(figure, directory / LOSS_PICTURE))
    if validation:
        figure = slot_mass_figure(validation)
        written.append(_save(figure, directory / SLOT_MASS_PICTURE))
    return written


def loss_figure(
    train: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    baselines: dict[str, Any] | None,
) -> Any:
    """A matplotlib figure of the loss; the arguments are records of `metrics.jsonl`."""
    figure, axes = _figure("loss (nats per token)")
    losses = np.array([record["loss"] for record in train])
    if len(train):
        steps = np.array([record["step"] for record in train])
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
        axes.plot(steps, _smooth(losses), color="tab:blue", label="training")
    if validation:
        axes.plot(
            [record["step"] for record in validation],
            [record["loss"] for record in validation],
            "o-",
            color="tab:orange",
            markersize=4,
            label="validation",
        )
        last = validation[-1]
        if last["loss"] and last["bits_per_byte"]:
            ratio = last["bits_per_byte"] / last["loss"]
            right = axes.secondary_yaxis(
                "right", functions=(lambda loss: loss * ratio, lambda bits: bits / ratio)
            )
            right.set_ylabel("bits per byte")
    if baselines is not None:
        for name, style in (("unigram", ":"), ("bigram", "--")):
            label = f"{name} ({baselines[f'{name}_bits_per_byte']:.2f} bits per byte)"
            axes.axhline(baselines[f"{name}_loss"], color="gray", linestyle=style, label=label)
    axes.legend()
    return figure


def slot_mass_figure(validation: list[dict[str, Any]]) -> Any:
    """A matplotlib figure of the slot mass by layer; the arguments are validation records."""
    figure, axes = _figure("share of attention that went to the slots")
    from matplotlib import colormaps

    steps = [record["step"] for record in validation]
    masses = np.array([record["slot_mass"] for record in validation], np.float64)
    layers = masses.shape[1]
    colors = colormaps["viridis"](np.linspace(0, 0.95, layers))
    for layer in range(layers):
        axes.plot(steps, masses[:, layer], "o-", color=colors[layer], markersize=3)
        # A legend of many layers hides the picture: first and last tell the order of colours.
        if layers <= 12 or layer in (0, layers - 1):
            axes.lines[-1].set_label(f"layer {layer}")
    axes.set_ylim(0, 1)
    axes.legend(ncols=2)
    return figure


def _save(figure: Any, path: Path) -> Path:
    with writing(path):
        figure.savefig(path, dpi=120)
    return path


def _figure(ylabel: str) -> tuple[Any, Any]:
    # Without pyplot there is no global state and no display to look for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving mean over about a fiftieth of the values."""
    width = max(1, len(values) // 50)
    total = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(len(values))
    low, high = np.maximum(index - width, 0), np.minimum(index + width + 1, len(values))
    return (total[high] - total[low]) / (high - low)

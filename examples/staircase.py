"""Keras' loss curve is a staircase; the losses of its batches, and their averages, are not.

Keras shows as `loss` the mean since the epoch began. While a model improves, that mean lags behind:
late in an epoch it still includes many old batches, and it jumps when the next epoch begins. This
script trains a small network on handwritten digits with `fastema.keras.LossAverages` in front of
TensorBoard's callback, reads the event file back and draws both curves.

    pip install fastema keras torch scikit-learn matplotlib tensorboard
    KERAS_BACKEND=torch python examples/staircase.py
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from fastema.keras import LossAverages
from fastema.tracking import TensorBoardWriter, logs, plot
from fastema.tracking.logs import Curve
from fastema.tracking.plots.style import EDGE, GREY, INK, STYLE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--window-size", type=int, default=20, help="values in the SMA")
    parser.add_argument("--decay", type=float, default=0.9, help="decay of the EMA")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--logs", type=Path, help="folder for the event files (by default a temporary one)"
    )
    parser.add_argument("--out", type=Path, default=Path("staircase.png"))
    args = parser.parse_args()
    if args.logs and args.logs.exists() and any(args.logs.iterdir()):
        parser.error(f"--logs: {args.logs} is not empty")

    with tempfile.TemporaryDirectory() as scratch:
        folder = args.logs or Path(scratch)
        true = train(args, folder)
        curves = read(args, folder)
    report(args, curves, true)
    draw(args, curves, true)
    print(f"Picture: {args.out}")


def train(args: argparse.Namespace, folder: Path) -> list[float]:
    """Write event files; return the loss of all training images at the end of each epoch."""
    digits = load_digits()
    x, y = digits.data.astype("float32") / 16, digits.target
    keras.utils.set_random_seed(args.seed)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
    averages = LossAverages(window_size=args.window_size, decay=args.decay)
    history = model.fit(
        x,
        y,
        batch_size=args.batch_size,
        epochs=args.epochs,
        # Not held out on purpose: the same images, with the weights at the end of the epoch.
        validation_data=(x, y),
        verbose=0,
        callbacks=[averages, board(folder)],  # in this order: the second sees what the first adds
    )
    return history.history["val_loss"]


def board(folder: Path) -> keras.callbacks.Callback:
    """Return Keras' own callback, or, without TensorFlow, one that writes the same values."""
    if importlib.util.find_spec("tensorflow"):
        return keras.callbacks.TensorBoard(folder, update_freq="batch", write_graph=False)
    writer = TensorBoardWriter(folder / "train", window_size=None, decay=None)

    def write(batch: int, logs: dict[str, float]) -> None:
        writer.add_scalars({f"batch_{name}": value for name, value in logs.items()})

    return keras.callbacks.LambdaCallback(
        on_train_batch_end=write, on_train_end=lambda _: writer.close()
    )


def read(args: argparse.Namespace, folder: Path) -> dict[str, Curve]:
    """Read the curves of the training batches from the event files."""
    found = {name.rpartition("/")[2]: curve for name, curve in logs.read(folder).items()}
    return {
        "loss": found["batch_loss"],
        "loss_raw": found["batch_loss_raw"],
        f"loss_sma_{args.window_size}": found["batch_loss_sma"],
        f"loss_ema_{args.decay}": found["batch_loss_ema"],
    }


def report(args: argparse.Namespace, curves: dict[str, Curve], true: list[float]) -> None:
    """Print the picture's numbers as a table."""
    shown, _, sma, ema = (curve.values for curve in curves.values())
    steps = len(shown) // args.epochs
    print(f"Keras on {keras.backend.backend()}, {args.epochs} epochs of {steps} batches.\n")
    print("       at the end of the epoch             from its last batch to the next")
    print("       loss of      loss that   too high   that loss   SMA        EMA")
    settings = f"{args.window_size:<8}   {args.decay:g}"
    print(f"epoch  the model    Keras says  by         jumps by    {settings}")
    for epoch, now in enumerate(true, start=1):
        last = epoch * steps - 1
        row = f"{epoch:5}  {now:<11.3f}  {shown[last]:<10.3f}  {shown[last] / now - 1:<9.0%}"
        if epoch < args.epochs:
            jumps = [curve[last + 1] - curve[last] for curve in (shown, sma, ema)]
            row += "  {:<+10.3f}  {:<+9.3f}  {:+.3f}".format(*jumps)
        print(row)


def draw(args: argparse.Namespace, curves: dict[str, Curve], true: list[float]) -> None:
    """Draw the reported loss, the loss of each batch, and its averages."""
    steps = len(curves["loss"].steps) // args.epochs
    excess = np.mean(curves["loss"].values[steps - 1 :: steps] / true)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 6.6), dpi=150)
        ax = figure.add_axes((0.07, 0.13, 0.82, 0.64))
        plot(curves, log=True, ax=ax)
        for epoch in range(1, args.epochs):
            ax.axvline(epoch * steps - 0.5, color=EDGE, linewidth=0.8, linestyle=(0, (4, 3)))
        ax.plot(
            np.arange(1, args.epochs + 1) * steps - 1, true, "o", color=INK, zorder=4, clip_on=False
        )
        for epoch in range(args.epochs):
            ax.annotate(
                f"epoch {epoch + 1}",
                ((epoch + 0.5) * steps, 0.97),
                xycoords=("data", "axes fraction"),
                color=GREY,
                fontsize=9,
                ha="center",
            )
        headline = "Keras' loss curve is a staircase; the loss is not"
        figure.text(0.045, 0.935, headline, fontsize=20, fontweight="bold")
        figure.text(
            0.045,
            0.855,
            "Keras reports the mean since the epoch began: noisy at first, then slower and "
            f"slower to follow. At the end of an epoch it is,\non average, {excess:.1f} times the "
            "model's loss at that moment (grey dots: all training images); then it jumps.",
            color=GREY,
            fontsize=11,
            linespacing=1.4,
        )
        figure.text(
            0.045,
            0.025,
            f"1,797 handwritten digits, batches of {args.batch_size}, Adam, Keras on "
            f"{keras.backend.backend()} · read back from a TensorBoard event file written with "
            f"fastema.keras.LossAverages · seed {args.seed}",
            color=GREY,
            fontsize=8.5,
        )
        figure.savefig(args.out)


if __name__ == "__main__":
    sys.exit(main())

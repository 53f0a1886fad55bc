"""The demo's settings, kept apart so that the command line imports nothing heavy."""

from dataclasses import dataclass

MODEL_NAMES = ("cnn", "resnet", "mlp")
TRAIN_IMAGES = 898  # half of all images: a large test set resolves 0.1 points of accuracy


@dataclass(frozen=True)
class Recipe:
    """The command line's settings and their defaults; `add_arguments` explains each."""

    model: str = "cnn"
    decay: float = 0.99
    epochs: int = 30
    batch_size: int = 16
    lr: float = 0.02
    seed: int = 0

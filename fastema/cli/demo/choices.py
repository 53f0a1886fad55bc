"""What may be asked of the demo, known before anything heavy is imported."""

from dataclasses import dataclass

MODEL_NAMES = ("cnn", "resnet", "mlp")
TRAIN_IMAGES = 898  # half of them: a large test set, so that 0.1 points of accuracy can be seen


@dataclass(frozen=True)
class Recipe:
    """What the command line asks for, and its defaults; `add_arguments` says what each means."""

    model: str = "cnn"
    decay: float = 0.99
    epochs: int = 30
    batch_size: int = 16
    lr: float = 0.02
    seed: int = 0

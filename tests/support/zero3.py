"""Parameters as DeepSpeed's ZeRO-3 leaves them, without DeepSpeed."""

from enum import Enum
from math import prod

import torch
from torch import nn


class ZeroParamStatus(Enum):
    """The names and values of ``deepspeed.runtime.zero.partition_parameters``."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


def partition(model: nn.Module, ranks: int = 2) -> None:
    """Empty all parameters and keep the first rank's elements of each, padded at the end."""
    for number, one in enumerate(model.parameters()):
        size = -(-one.numel() // ranks)
        one.ds_id, one.ds_shape, one.ds_numel = number, one.shape, one.numel()  # type: ignore[attr-defined]
        one.ds_status = ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]
        one.ds_tensor = one.detach().flatten()[:size].clone()  # type: ignore[attr-defined]
        one.data = torch.empty(0)


def gather(model: nn.Module) -> None:
    """Give the parameters all their elements until the next partition."""
    for one in model.parameters():
        one.data = torch.arange(float(prod(one.ds_shape))).reshape(one.ds_shape)  # type: ignore[attr-defined]
        one.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]

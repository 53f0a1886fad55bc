"""For PyTorch users: what a model with batch normalisation needs besides its averaged weights."""

from __future__ import annotations

from fastema.torch.batch_norm import update_bn

__all__ = ["update_bn"]

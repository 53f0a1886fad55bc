"""For PyTorch users: batch normalization statistics for averaged weights."""

from __future__ import annotations

from fastema.torch.batch_norm import update_bn

__all__ = ["update_bn"]

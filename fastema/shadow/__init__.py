"""Shadow weights: averages of a model that are kept, applied for evaluation and taken back."""

from fastema.shadow.average import EMA

__all__ = ["EMA"]

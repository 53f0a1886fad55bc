"""The one place that ties an average to a model: pairing, watching, locating, swapping."""

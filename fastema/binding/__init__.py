"""Bind an average to a model: pair, watch, locate and swap their tensors."""

"""Generative models as pure functions."""

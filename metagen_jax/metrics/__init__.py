"""Measures of generated and held-out images."""

"""Strategies for choosing tasks: samplers that look at what a task would teach before they propose it."""

"""Adapters: ways to turn a support set into task parameters."""

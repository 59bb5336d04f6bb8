"""Errors for bad arguments. They name the argument, what was expected and what came."""

from __future__ import annotations


class ArgumentError(ValueError, RuntimeError):
    """A wrong shape, value or device. PyTorch raises RuntimeError for these, Python's habit is ValueError: this is both."""


class ArgumentTypeError(TypeError, RuntimeError):
    """A wrong dtype or type; a RuntimeError too, as in PyTorch."""

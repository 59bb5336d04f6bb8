"""Losses: arithmetic on the N-vectors that the core returns."""

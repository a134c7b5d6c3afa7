"""Losses: callables (model, batch) -> {"loss": ..., ...}."""

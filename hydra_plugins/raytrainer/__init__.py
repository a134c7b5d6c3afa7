"""Hydra searches this namespace for plugins in every application, so importing its packages must cost nothing."""

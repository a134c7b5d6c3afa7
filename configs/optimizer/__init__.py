"""Optimizers: the parameters are given to them, in groups."""

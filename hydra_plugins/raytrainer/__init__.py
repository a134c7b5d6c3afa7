"""Hydra finds its plugins in packages of this namespace, in any application: importing one must cost nothing."""

"""Sweeps: how trials are drawn and which of them go on; with -m, as in `-m optimizer.lr=0.1,0.01 sweep=grid`."""

"""Sweeps: many trials of one experiment, drawn by a searcher, pruned by a scheduler of Ray Tune and kept in a ledger.
Names are imported where they are used: the ledger alone needs neither Ray nor torch."""

"""Datasets to train on and to validate on, with how they are made into batches."""

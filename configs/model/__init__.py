"""Models: any importable nn.Module that takes and returns what the loss gives and wants."""

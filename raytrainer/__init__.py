"""raytrainer: distributed PyTorch training on Ray, configured by Hydra, kept by MLflow."""

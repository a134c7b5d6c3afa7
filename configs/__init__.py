"""The configuration groups, the only copy of them; also importable as raytrainer.configs, for Hydra's pkg:// scheme."""

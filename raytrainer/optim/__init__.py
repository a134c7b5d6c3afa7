"""Parameter groups and freezing, Muon, and learning-rate curves as pure functions of the step."""

from raytrainer.optim.curves import WSD, Constant, Cosine, Curve, Linear, build_scheduler
from raytrainer.optim.groups import build_optimizer, freeze, mend_fused_sgd, parameter_groups
from raytrainer.optim.muon import Muon

__all__ = [
    "WSD",
    "Constant",
    "Cosine",
    "Curve",
    "Linear",
    "Muon",
    "build_optimizer",
    "build_scheduler",
    "freeze",
    "mend_fused_sgd",
    "parameter_groups",
]

"""A multilayer perceptron: the smallest reference model, for tests, sweeps and tabular data."""

from __future__ import annotations

from torch import Tensor, nn

from raytrainer.errors import ConfigError


class MLP(nn.Module):
    """Fully connected layers with ReLU between them.

    Args:
        in_features: Values in one sample; an input of any shape `[N, ...]` is flattened to `[N, in_features]`.
        num_classes: Number of outputs: `[N, num_classes]`.
        width: Units in each hidden layer.
        depth: Number of hidden layers; 0 makes a linear model.
        dropout: The probability with which a hidden unit is dropped in training.

    Raises:
        ConfigError: A size or `dropout` is out of range.
    """

    def __init__(
        self, in_features: int, num_classes: int, *, width: int = 256, depth: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        for key, value, least in (
            ("in_features", in_features, 1),
            ("num_classes", num_classes, 1),
            ("width", width, 1),
            ("depth", depth, 0),
        ):
            if value < least:
                raise ConfigError(f"must be at least {least}", key=f"model.{key}", value=value)
        if not 0 <= dropout < 1:
            raise ConfigError("must be at least 0 and below 1", key="model.dropout", value=dropout)
        layers: list[nn.Module] = []
        features = in_features
        for _ in range(depth):
            layers += [nn.Linear(features, width), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
            features = width
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, ...]` to logits `[N, num_classes]`."""
        logits: Tensor = self.head(self.hidden(x.flatten(1)))
        return logits

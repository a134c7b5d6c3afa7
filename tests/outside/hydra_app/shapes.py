"""A module of the application, beside its script."""

SHIFT = 1.0


class Cone:
    def __call__(self, x: float) -> float:
        return SHIFT + abs(x - 0.25)

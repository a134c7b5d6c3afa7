"""Learning-rate curves, or any torch scheduler that is stepped without a metric."""

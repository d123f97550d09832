"""The official metrics, computed from saved results; they know nothing of models."""

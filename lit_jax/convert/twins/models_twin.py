"""The model of the config."""

MODELS = {}

"""Captions as tokens and as features, the input of text-to-image models."""

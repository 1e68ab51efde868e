"""Scores image sets against a reference; each score is stored with its settings."""

"""Scores image sets against a reference, each with its recipe card."""

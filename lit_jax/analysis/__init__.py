"""Analyzes models: attention maps, their similarity and rank, routing, and the loss by time."""

"""Inheritance, the step, state and optimizers, the loop, mesh and sharding, logs and metrics."""

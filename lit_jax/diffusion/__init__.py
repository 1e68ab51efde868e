"""Schedules, objective, distillation, guidance and samplers. A model is a function here."""

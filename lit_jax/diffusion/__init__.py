"""Schedules, objective, distillation, guidance and samplers; a model is a plain function here."""

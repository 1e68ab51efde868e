"""Scores from features: Fréchet distance, KID, precision and recall, inception score, GenEval; toy judges."""

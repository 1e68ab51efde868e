"""Numbers from features: Fréchet distance, KID, precision and recall, inception score, GenEval, and judges
for the toys."""

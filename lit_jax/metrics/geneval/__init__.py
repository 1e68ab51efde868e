"""GenEval (Ghosh, Hajishirzi & Schmidt 2023): objects, counts, colours and positions of prompts."""

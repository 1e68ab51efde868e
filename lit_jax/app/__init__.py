"""`demo.py`: a page in the browser that draws images of classes or of prompts, with a teacher beside its
student."""

"""A local page in the browser that draws classes or prompts, with a teacher beside its student."""

"""GenEval (Ghosh, Hajishirzi & Schmidt 2023): do images show the objects, counts, colours and places of their
prompt?

`prompts` makes the list, `scoring` holds the rules, `detector` what finds objects, `mask2former` the one that
published numbers come from, `run` scores a folder.
"""

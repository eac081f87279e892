"""What can fail, found before any weight loads: every fault at once, with its file, row and mend.

``examine.examine`` looks at a recipe's keys, methods, model, adapter, pairs, launch and memory, and
at images that are both trained and evaluated on; ``show`` prints what it found.
"""

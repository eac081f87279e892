"""What an answer is worth, and which of its words: one file per reward.

A reward is built as ``METHOD(settings, context)`` and called with completions; it gives one
``Scored`` each, with spans where it can say which words are meant. ``_reward.py`` holds what they
share and the one check of what they give, ``_combine.py`` their weighted sum.
"""

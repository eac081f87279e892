"""The photographs surrogate: a small LLaVA composed of packages, trained on captioned photographs.

``compose`` makes the model folder, ``sft_data`` the training text, ``train_base`` the training.
"""

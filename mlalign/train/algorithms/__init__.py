"""Ways to train an arm: one file each, named in a recipe as ``train.algorithm``.

A file defines METHOD, a class with

    Settings                          its settings (pydantic), the recipe's keys beside the name
    train(recipe, arm, run)           train ``arm`` into ``run/<arm>``, resuming from its last
                                      complete checkpoint; returns the trainer. Every process of
                                      the launch calls it
"""

"""Who samples a policy's answers: one file each, named in a recipe as ``train.algorithm.engine``.

A file defines METHOD, a class made as ``METHOD(settings, vlm)`` with

    Settings                           its settings (pydantic), the recipe's keys beside the name
    sample(requests, decoding, batch_size)
                                       token ids ``[request][sample]`` as ``generate.generate_ids``
                                       gives them, drawn from the policy of this moment. Every
                                       process calls it, with its own requests, at the same time
"""

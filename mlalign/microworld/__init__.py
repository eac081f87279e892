"""The built-in world: rendered scenes with known objects and boxes, and a small LLaVA.

A scene is a pure function of (seed, split, index), so nothing is downloaded and every object, box
and colour is known exactly. The small LLaVA that ships here sees well and hallucinates what is
typical of a scene, because its training captions did; its figures say nothing of a real model.
"""

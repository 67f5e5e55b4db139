"""From a model to its `Plan`: trace, shapes, rules over nodes, relations, then plain data that says what each part is.

No tensor has a value here: all runs on the meta device.
"""

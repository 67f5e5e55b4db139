"""A plan carried out: `split` restricts a model to its parts, `merge` prolongs them to the model, `packed` stacks them.

Knows plans and tensors, and no operation.
"""

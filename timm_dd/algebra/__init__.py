"""The algebra of widths: what a channel axis is made of, how it is cut into K parts, and the boxes of the image.

Knows no torch.fx and no model. `widths` has the unknowns, `axes` what they become, `domain` the boxes.
"""

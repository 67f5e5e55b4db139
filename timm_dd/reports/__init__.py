"""What a split costs and whether its claims hold: profile, verify, pictures.

Called `reports`, since `timm_dd.report` is a function's name.
"""

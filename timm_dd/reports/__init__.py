"""What a split costs and whether its claims hold: profile, verify, pictures; and what a run was like: its page.

Called `reports`, since `timm_dd.report` is a function's name.
"""

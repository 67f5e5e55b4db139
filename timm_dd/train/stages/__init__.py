"""The stages of a run, in the order of the method: parts, joint, coarse and together, tuned; and the baseline."""

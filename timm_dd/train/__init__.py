"""Training in two stages: the parts without a word between them, then the composed model, under torchrun."""

"""Training in two stages: the parts without communication, then the composed model, under torchrun."""

"""The Hugging Face Hub: what is pushed, and the model card that goes with it."""

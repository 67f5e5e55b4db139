"""How one network is trained, update by update: its optimizer, learning rate, loss, memory layout and CUDA graphs."""

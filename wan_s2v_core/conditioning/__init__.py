"""What a clip is conditioned on, from user inputs to tensors."""

"""What the pages show of the models on this box and of the model library."""

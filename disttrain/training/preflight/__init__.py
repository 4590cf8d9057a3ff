"""What is tried before training, so that it does not fail afterwards."""

"""What starts workers: this machine today. Never imports torch, so that its commands answer at once."""

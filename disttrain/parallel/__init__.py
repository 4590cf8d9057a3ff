"""How gradients meet."""

"""Networks as their owners bring them: wrappers, stopped gradients, and layers with every derivative."""

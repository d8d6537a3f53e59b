"""Other people's modules as they are: wrappers, stopped gradients, and layers carried out with every derivative."""

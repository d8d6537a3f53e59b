"""The mathematics: the gradient as a map of the input, J, its spectrum, the influence and its bound, noise, errors."""

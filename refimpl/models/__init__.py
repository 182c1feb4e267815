"""Models made of the operators, one file each: Config, the weights' names and shapes, and the forward pass."""

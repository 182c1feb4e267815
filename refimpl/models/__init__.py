"""Encoders made of the operators, one file each (Config, shapes of the weights, hidden states), and their heads."""

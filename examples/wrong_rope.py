# refimpl check python:examples/wrong_rope.py     (positions clipped at 2047, as a table of 2048 rows does)
import numpy as np
from my_rope import rotate

IMPLEMENTS = {"rope.rotate_interleaved": lambda x, positions, base: rotate(x, np.minimum(positions, 2047), base)}

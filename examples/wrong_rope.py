# refimpl check python:examples/wrong_rope.py     (positions clipped at 2048, as a table that is too short does)
import numpy as np
from my_rope import rotate

IMPLEMENTS = {"rope.rotate_interleaved": lambda x, positions, base: rotate(x, np.minimum(positions, 2047), base)}

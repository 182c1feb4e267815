"""The specification: every operator as a NumPy function in float64.

Letters used in every shape annotation and every einsum string, in every folder:
b batch, h heads, g key-value heads, n queries, m keys, d width, s shared key width of a GAU,
e expanded width, c chunk, r rank, k kept components or classes.

Vectors are rows: y = x W with W of shape (in, out). Masks are boolean, True = may attend.
"""

__version__ = "0.1.0"

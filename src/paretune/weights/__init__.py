"""Stored weights that are more than plain floats: codes, zeros that stay, shapes that shrink, layers that share."""

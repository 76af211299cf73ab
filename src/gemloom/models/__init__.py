"""One file an architecture: a forward pass that can be recited, and what it needs of a file."""

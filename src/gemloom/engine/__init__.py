"""Requests: their state, which rows a step computes, and the one thread that computes."""

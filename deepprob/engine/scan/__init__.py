"""A recurrence as one node of a graph, and its gradient."""

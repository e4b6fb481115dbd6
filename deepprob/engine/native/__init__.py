"""Compile a graph to a native library in the user's cache."""

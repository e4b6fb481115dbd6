"""Native code: from a graph to a library in the user's cache."""

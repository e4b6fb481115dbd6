"""Programs: what a program is, and how one is run."""

"""The engine: random streams, noise, tracing, loops and native code. It knows torch only."""

"""The engine: random streams, noise, tracing, loops and native code. It depends on torch only."""

from __future__ import annotations

from deepprob.engine.loop import Loop, Noise, PerStep, Step, StepData
from deepprob.engine.noise import LiftedNoise, NoiseSize
from deepprob.engine.random import RandomStream

__all__ = ["LiftedNoise", "Loop", "Noise", "NoiseSize", "PerStep", "RandomStream", "Step", "StepData"]

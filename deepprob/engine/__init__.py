"""The engine: random streams, noise, tracing, loops and native code. It depends on torch only."""

from __future__ import annotations

from deepprob.engine.loop import Loop, Step
from deepprob.engine.loop_inputs import Noise, PerStep, StepData
from deepprob.engine.noise import LiftedNoise, NoiseSize
from deepprob.engine.random import RandomStream

__all__ = ["LiftedNoise", "Loop", "Noise", "NoiseSize", "PerStep", "RandomStream", "Step", "StepData"]

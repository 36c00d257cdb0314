"""Measures the cost of a training step and the quality of its gradients."""

from .activations import SavedActivations, saved_activations
from .gradients import GradientQuality, TensorQuality, gradient_quality
from .memory import Allocated, PeakMemory, allocated, peak_memory
from .products import MultiplyAdds, multiply_adds
from .steps import StepCost, step_cost

__all__ = [
    "Allocated",
    "GradientQuality",
    "MultiplyAdds",
    "PeakMemory",
    "SavedActivations",
    "StepCost",
    "TensorQuality",
    "allocated",
    "gradient_quality",
    "multiply_adds",
    "peak_memory",
    "saved_activations",
    "step_cost",
]

"""Few-step autoregressive video generation: Self-Forcing rollouts, Data-Forcing Distillation,
endless streaming.
"""

__version__ = "0.1.0"

"""A cost model of a training step: computation, communication and memory, without a run."""

"""Linear algebra of double preconditioning, on tensors alone: no hooks, no optimizer, no model."""

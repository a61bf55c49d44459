"""Use the preconditioner in other trainers. The module of a trainer imports its library."""

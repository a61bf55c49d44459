"""Use the preconditioner in other libraries' trainers. Each module imports its library."""

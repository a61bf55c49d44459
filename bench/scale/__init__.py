"""A step on paper: what it computes, sends and holds, from the code's own shapes."""

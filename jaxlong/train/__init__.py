"""Training as functions: a gradient function, an optimizer and a state make a step; `fit` repeats it."""

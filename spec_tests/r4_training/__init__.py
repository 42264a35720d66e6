"""R 4: hyper-parameters, the optimiser, a step."""

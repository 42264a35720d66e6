"""Inputs of tests: small models, rank programs, operands, mutants, and an array that is not NumPy's."""

"""The same again, written differently: loops, float64, rational numbers; and how two answers are compared."""

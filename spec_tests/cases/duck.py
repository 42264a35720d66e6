"""An array that is not NumPy's: what CuPy's looks like to our code, on a machine without a GPU.

It answers NumPy's functions through `__array_ufunc__` and `__array_function__`, keeps 0-d results as
arrays, and refuses what a device array refuses: becoming a NumPy array silently, and meeting one in
an operation, as an index, or in an assignment.
"""

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin


class Duck(NDArrayOperatorsMixin):
    """A wrapped ndarray. `.get()`, as in CuPy, is the only way out."""

    def __init__(self, array):
        self._array = np.asarray(array)

    def get(self):
        return self._array

    def __array__(self, *args, **kwargs):
        raise TypeError("implicit conversion of a device array to NumPy")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        out = getattr(ufunc, method)(*map(unwrapped, inputs), **unwrapped(kwargs))
        return kwargs["out"][0] if "out" in kwargs else wrapped(out)

    def __array_function__(self, func, types, args, kwargs):
        if func is np.asarray:  # np.asarray(numbers, like=duck): an upload, asked for
            return Duck(np.asarray(*args, **kwargs))
        return wrapped(func(*unwrapped(args), **unwrapped(kwargs)))

    def __getitem__(self, index):
        return wrapped(self._array[unwrapped(index)])

    def __setitem__(self, index, value):
        self._array[unwrapped(index)] = unwrapped(value)

    def __len__(self):
        return len(self._array)

    def __iter__(self):
        return map(wrapped, iter(self._array))

    def __bool__(self):
        return bool(self._array)

    def __int__(self):
        return int(self._array)

    def __float__(self):
        return float(self._array)


def _method(name):
    def call(self, *args, **kwargs):
        return wrapped(getattr(self._array, name)(*unwrapped(args), **unwrapped(kwargs)))

    return call


METHODS = (
    "reshape",
    "view",
    "transpose",
    "swapaxes",
    "astype",
    "copy",
    "sum",
    "max",
    "min",
    "any",
    "all",
    "argmax",
    "argsort",
    "repeat",
)
for _name in METHODS:
    setattr(Duck, _name, _method(_name))
for _name in ("shape", "ndim", "size", "dtype"):
    setattr(Duck, _name, property(lambda self, n=_name: getattr(self._array, n)))
Duck.T = property(lambda self: Duck(self._array.T))


def wrapped(x):
    """Arrays and NumPy scalars as Ducks, also inside tuples and lists."""
    if isinstance(x, tuple | list):
        return type(x)(wrapped(v) for v in x)
    if isinstance(x, dict):
        return {k: wrapped(v) for k, v in x.items()}
    return Duck(x) if isinstance(x, np.ndarray | np.generic) else x


def unwrapped(x):
    """Ducks as arrays; a NumPy array, 0-d too, is an intruder; a NumPy scalar is let in."""
    if isinstance(x, Duck):
        return x._array
    if isinstance(x, tuple | list):
        return type(x)(unwrapped(v) for v in x)
    if isinstance(x, dict):
        return {k: unwrapped(v) for k, v in x.items()}
    if isinstance(x, np.ndarray):
        raise TypeError("a NumPy array meets a device array")
    return x

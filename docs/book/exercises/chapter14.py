"""Chapter 14, the diff: three exercises. `pytest docs/book -k chapter14` says how far you are."""


def worst_row(x, e):
    """Of all rows (last axis) the largest |x - e| / |e|, where |e| counts as at least 1/1000 of the largest |e|.

    x, e (..., n) -> float. Both may be all zeros: then 0.0. What cannot be compared (NaN in x) is infinitely far: math.inf.
    """
    raise NotImplementedError("exercise 14.1")


def allowed(stage, inputs, twins, seed):
    """max(4 x worst twin, 4 u), u = 2**-24.

    stage: a function of float arrays. inputs: a list of float32 arrays. A twin runs the stage in float32 on inputs that are each
    multiplied by 1 + u d, d uniform in [-1, 1] from np.random.default_rng(seed); it is compared with the stage in float64 on
    the inputs as they are. Returns a float. You may use your worst_row.
    """
    raise NotImplementedError("exercise 14.2")


def culprits(program, taps):
    """Taps whose own stage, fed with the engine's own inputs, gives something else than the engine recorded.

    program: a list of (tap, stage, names of inputs), in model order; a name is a tap or an input, and all are in `taps`
    (name -> float32 array). Return the list of culprits in model order: those further off than `allowed` with 4 twins, seed 0.
    """
    raise NotImplementedError("exercise 14.3")

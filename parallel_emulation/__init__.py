"""Rank programs: what DeepSeek-V3 computes when it is spread over many devices.

The room for communicators (simulated and MPI), collectives, the parallel forms of the layers,
pipeline schedules and expert load balancing. A rank program will be plain blocking code,
``f(comm, ...)``, the same source on the simulator and on MPI, and its one claim is always the same:
W ranks give what one rank gives, bitwise where the order of summation is fixed. Nothing lives here
yet; the single-rank model in `refimpl.layers` never imports this package.
"""

if __name__ != "refimpl.parallel_emulation":
    raise ImportError(
        f"this folder is the package refimpl.parallel_emulation, not {__name__}; see pyproject.toml"
    )

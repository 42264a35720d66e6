"""Rank programs: what DeepSeek-V3 computes when it is spread over many devices.

A rank program is plain blocking code, `f(comm, ...)`, the same source on the simulator (`simulator.spmd`) and on MPI
(`python -m refimpl.parallel_emulation`); its one claim is always the same: W ranks give what one rank gives, bitwise where
the order of summation is fixed. Reading order: comm (communicator, simulator), collectives (collectives, duals), axes (tensor,
expert, data, mesh), pipeline (schedule, dualpipe, checker, timeline, executor), eplb, cost. The single-rank model in
`refimpl.layers` never imports this package.
"""

if __name__ != "refimpl.parallel_emulation":
    raise ImportError(f"this folder is the package refimpl.parallel_emulation, not {__name__}; see pyproject.toml")

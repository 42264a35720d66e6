"""Claims that any implementation can be held to: `refimpl conform pkg.mod:Impl`, or `SPEC_IMPL=pkg.mod:Impl pytest`."""

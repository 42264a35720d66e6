"""Other people's implementations in the protocol, by way of the recorders; beside each what it is known to do otherwise."""

"""What a variant is and what it costs: parameters, FLOPs, cache bytes, time."""

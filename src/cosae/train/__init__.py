"""Many SAEs in lockstep on one stream."""

"""Before a run: estimates of memory and time, sweeps, the self-test of `minimind doctor`."""

"""Planning around training: resource estimates, sweeps over settings, and the self-test."""

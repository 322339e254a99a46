"""A test-time step that is learned beforehand, against the mean over views at equal cost."""

"""The error of everything that is loaded at startup."""


class LoadError(ValueError):
    """A device, checkpoint or bundle that cannot be used; one sentence for the operator."""

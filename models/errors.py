"""The error of everything that is loaded at startup, and how to install what is missing."""


def install_extra(extra: str) -> str:
    """The command that installs an optional set of packages, to be run in a checkout."""
    return f"run `.venv/bin/python -m pip install -c constraints.txt -e '.[{extra}]'`"


class LoadError(ValueError):
    """A device, checkpoint or bundle that cannot be used; one sentence for the operator."""

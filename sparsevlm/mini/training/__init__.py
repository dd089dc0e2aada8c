"""The training of the embedded models. Part of the repository, not of the installed package."""

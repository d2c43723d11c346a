"""Scripts, run from a checkout as `python -m experiments.<name>`."""
